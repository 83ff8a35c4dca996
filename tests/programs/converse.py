"""Says what would be asked of a model, for what is typed."""

from utils.inference import prompts

print(prompts.converse(lambda asked: print(f"<{asked}>", flush=True)))
