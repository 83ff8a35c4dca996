"""Where a process computes and in which dtype, and how much memory it took."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from typing import Any

import torch


def device() -> torch.device:
    """This process's device: the launcher's GPU, or the CPU."""
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("true", "1"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def compute_dtype(name: str) -> torch.dtype:
    """The torch dtype of a setting; auto is bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device().type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_prefers_bfloat16(torch.cpu.get_capabilities()) else torch.float32


def _cpu_prefers_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """By what was measured (decision_document.md): avx512_bf16 without matrix units is slow by Intel and fast by AMD.

    On AMD's cores MKL takes AVX2 for float32 products, so bfloat16, which oneDNN multiplies, is 4.5 times as fast.
    """
    by_amd = str(capabilities.get("cpu_name", "")).startswith("AMD")
    native = capabilities.get("amx_bf16") or capabilities.get("bf16")
    return bool(native or (by_amd and capabilities.get("avx512_bf16")))


def peak_memory_bytes() -> int:
    """Largest memory so far: the GPU's allocations where there is one, else this process's resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
