"""Greedy tokens of a GGUF file by llama.cpp, for lists of token ids on standard input; both as JSON.

python -P llama_cpp_answers.py MODEL.gguf NEW_TOKENS < prompts.json
"""

import json
import sys

from llama_cpp import Llama

model = Llama(sys.argv[1], n_ctx=512, n_threads=2, verbose=False, seed=1)
answers = []
for prompt in json.load(sys.stdin):
    model.reset()
    answer = []
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        answer.append(token)
        if len(answer) == int(sys.argv[2]):
            break
    answers.append(answer)
print(json.dumps({"answers": answers, "template": model.metadata.get("tokenizer.chat_template", "")}))
