"""Where a process computes and in which dtype, and how much memory it took."""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from utils.exceptions import ConfigError, Problem
from utils.logger import warning

PROC = Path("/proc")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def device() -> torch.device:
    """This process's device: the launcher's GPU, or the CPU."""
    if torch.cuda.is_available() and not _on_cpu_by_wish():
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


def refuse_missing_gpus() -> None:
    """Raises ConfigError where a launch file for GPUs starts several processes and they do not each have one.

    Eight processes would share the CPU without a word. A file that hides the GPUs (`gpu_ids`) asks for the CPU.
    """
    processes, visible = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes <= max(1, visible) or _on_cpu_by_wish():
        return
    if visible:
        fix = f"--num_processes {visible} (with --config_file; several nodes: {visible} for each)"
        raise ConfigError(Problem(f"the launcher starts {processes} processes on {visible} GPUs", fix=fix))
    fix = (
        "on a CPU launch with --config_file scripts/launch/cpu.yaml, or cpu_two_processes.yaml; for so many processes "
        "on the CPU on purpose: ACCELERATE_USE_CPU=true, or gpu_ids: '-1,-1' in the file"
    )
    raise ConfigError(
        Problem(f"the launcher starts {processes} processes for GPUs, and no GPU is visible here", fix=fix)
    )


def warn_of_processes() -> None:
    """Say where a launch on CPUs is not what it looks like: one process for several, or several for each core.

    `accelerate launch --cpu` starts one process whatever `--num_processes` says (accelerate 1.15).
    """
    cores, started, number = _cores(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")), _asked_processes(os.environ)
    one = "accelerate launch --config_file scripts/launch/cpu.yaml"
    many = f"accelerate launch --config_file scripts/launch/cpu_two_processes.yaml --num_processes {min(number, cores)}"
    if started == 1 and number > 1:
        fix = f"{one} (the same, without this), or {many}" if cores > 1 else one
        warning(f"accelerate started 1 process of the {number} asked for, as always with --cpu", cores=cores, fix=fix)
    elif device().type == "cpu" and started > cores:
        fix = f"--num_processes {cores}, or {one}" if cores > 1 else one
        warning(f"{started} processes wait for each other on {cores} core{'s' if cores > 1 else ''}", fix=fix)


def set_threads(threads: int) -> int:
    """CPU threads of this process, and how many: `threads`, or where nobody chose a number its share of the cores.

    `accelerate launch` says OMP_NUM_THREADS=1 for everyone who says nothing, and a training would take one core.
    """
    if threads:
        torch.set_num_threads(threads)
    elif not _threads_are_chosen(os.environ):
        torch.set_num_threads(max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return torch.get_num_threads()


def _on_cpu_by_wish() -> bool:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() in ("", "-1")
    return hidden or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")


def _threads_are_chosen(environment: Mapping[str, str]) -> bool:
    """Whether a person said how many threads there are. Python without a launcher takes what OpenMP takes."""
    threads = environment.get("OMP_NUM_THREADS")
    if "ACCELERATE_MIXED_PRECISION" not in environment:
        return True
    if threads != "1":
        return threads is not None
    # what the launcher was started with says whether the 1 is its own
    chosen = any(variable.startswith("OMP_NUM_THREADS=") for variable in _of_launcher("environ"))
    return chosen or any(word.startswith("--num_cpu_threads_per_process") for word in _of_launcher("cmdline"))


def _of_launcher(what: str) -> list[str]:
    """The words or the variables that this process's parent was started with; none where the system does not tell."""
    try:
        return (PROC / str(os.getppid()) / what).read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _asked_processes(environment: Mapping[str, str]) -> int:
    """How many processes the launcher's command line asks for, where it started this one alone; 1 where it does not."""
    # what accelerate sets for every process, for several, and for several that it started
    if not {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= environment.keys() or "WORLD_SIZE" in environment:
        return 1
    words = _of_launcher("cmdline")
    for at, word in enumerate(words):
        name, _, value = word.partition("=")
        if name.replace("-", "_") == "__num_processes":
            value = value or "".join(words[at + 1 : at + 2])
            return int(value) if value.isdigit() else 1
    return 1


def _cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> None:
    """Have what is no longer used given back, also by the GPU's allocator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_peak_memory() -> None:
    """Begin a new peak, where a GPU counts it; a process's resident set keeps its own."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def host_bytes() -> int:
    """Memory that can still be had, within the container's limit where there is one."""
    available = psutil.virtual_memory().available
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else "max"
    return min(available, int(limit)) if limit.isdigit() else available
