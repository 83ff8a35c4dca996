"""What plain transformers computes from model directories; peft only where an adapter of its own format is asked for.

    python -P plain_logits.py OUT.safetensors TOKEN_IDS.safetensors [--every-expert] DIRECTORY[=ADAPTER]...

It imports nothing of this project. Logits are saved under the argument as it was given.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config


def load(directory: str, adapter: str) -> Any:
    """The model in float32, FP8 weights dequantized, with the adapter as peft reads it."""
    settings = json.loads((Path(directory) / "config.json").read_text())
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
    if "quantization_config" in settings:
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(directory, **options).float().eval()
    assert type(model).__name__ in settings["architectures"], type(model)
    if adapter:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, adapter)
    assert "peft" not in sys.modules, "loading the model brought in peft"
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("token_ids")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--every-expert", action="store_true")
    parser.add_argument("--tokenizer", action="store_true", help="it has to load too")
    given = parser.parse_args()
    ids_BT, logits = load_file(given.token_ids)["input_ids"], {}
    for argument in given.models:
        directory, _, adapter = argument.partition("=")
        model = load(directory, adapter)
        for module in model.modules() if given.every_expert else ():
            if hasattr(module, "top_k") and hasattr(module, "num_experts"):
                module.top_k = module.num_experts
        if given.tokenizer:
            AutoTokenizer.from_pretrained(directory, local_files_only=True)
        with torch.no_grad():
            logits[argument] = model(ids_BT, use_cache=False).logits.contiguous()
    save_file(logits, given.out)


if __name__ == "__main__":
    main()
