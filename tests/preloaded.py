"""What every test file and each script that it runs would spend seconds on, done once in what they are forked from.

The libraries and all modules of this project are imported, and the model of the language detector is read. Nothing
here starts a thread or computes with torch, so that a fork is as good as a new process.
"""

from __future__ import annotations

import importlib
import pkgutil

from py3langid import langid

import utils

LIBRARIES = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "safetensors.torch", "scipy.stats", "datasketch"),
    *("datasets", "accelerate", "peft.helpers", "peft.tuners.lora", "transformers.generation.streamers"),
    *("transformers.generation.utils", "transformers.models.auto.modeling_auto"),
    *("transformers.models.llama.modeling_llama", "transformers.models.minimax_m2.modeling_minimax_m2"),
)

for name in (*LIBRARIES, *(module.name for module in pkgutil.walk_packages(utils.__path__, "utils."))):
    importlib.import_module(name)
for name in ("support", "fault_support"):
    importlib.import_module(f"tests.{name}")
langid._get_identifier()
