"""Run as a program in a fresh process: the logits of a model directory, loaded as a user of transformers loads it.

    python -P merged_logits.py DIRECTORY TOKEN_IDS.safetensors LOGITS.safetensors

It imports nothing of this project and refuses to have loaded peft: a merged model has to work without both. -P keeps
this folder off the import path, where gguf.py would stand for the package of that name that transformers looks for.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Be killed with the process that asked: two models would fill the memory of the next attempt."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def visit_every_expert(model: Any) -> None:
    """As `float32_model.visiting_every_expert`: the model that was checked before did so too."""
    counts = {path: module.num_experts for path, module in model.named_modules() if hasattr(module, "num_experts")}
    for path, module in model.named_modules():
        if hasattr(module, "top_k"):
            inside = (count for at, count in counts.items() if at.startswith(f"{path}."))
            module.top_k = counts.get(path, next(inside, module.top_k))


def write_logits(directory: str, token_ids: str, out: str) -> None:
    """Save the float32 logits of `directory` on the ids of one file to another, every expert visited by every token."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    settings = transformers.AutoConfig.from_pretrained(directory, **options)
    if getattr(settings, "quantization_config", None):
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    # the automatic class gives the text model alone for some multimodal checkpoints
    named = [getattr(transformers, name, None) for name in settings.architectures or ()]
    usual = transformers.AutoModelForCausalLM
    kind = next(
        (candidate for candidate in named if hasattr(candidate, "can_generate") and candidate.can_generate()), usual
    )
    model = kind.from_pretrained(directory, dtype=torch.float32, **options)
    model.float().eval()
    visit_every_expert(model)
    with torch.no_grad():
        logits = model(load_file(token_ids)["input_ids"], use_cache=False).logits.float()
    if "peft" in sys.modules:
        raise SystemExit("loading the merged model brought in peft")
    save_file({"logits": logits.contiguous()}, out)


if __name__ == "__main__":
    end_with_parent()
    write_logits(*sys.argv[1:])
