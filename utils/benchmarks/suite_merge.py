"""The merge suite: what does merging cost beside copying the files, and beside peft's merge_and_unload?

Builds a synthetic MiniMax-M2 with the real layer width and fewer experts and layers, a file per layer, and an adapter
of rank 16 on its attention. Copying, our merge, its self-check and peft's merge then run each in a process
of its own. Nothing is dropped from the page cache, so files that fit are read from memory by all; what earlier steps
left to be written is flushed before each. Times count from the start of the work, after the imports; memory is the
whole process's.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from config import ATTENTION, BaseModelSection, Config, LoraSection
from utils.adapters import adapter_files
from utils.adapters.factors import ModuleFactors
from utils.artifacts import files, locks
from utils.benchmarks.suite_data import peak_memory
from utils.exceptions import ArtefactError, Problem, VerificationError
from utils.export import merge, merge_check, merge_plan
from utils.logger import event
from utils.models.base_model import BaseModel
from utils.models.weights import safetensors_io

GIGABYTE = 10**9
ROOT = Path(__file__).resolve().parents[2]
# base and result, both up to a layer larger than asked for, and both again where only some layers fit into memory
DISK_PER_BYTE = 4.5
# peft's merge of 4 GB took 6.9 GB
MEMORY_PER_BYTE = 1.8


@dataclass(frozen=True)
class Width:
    """Sizes of one layer."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head: int
    experts: int
    vocabulary: int


REAL = Width(3072, 1536, 48, 8, 128, experts=32, vocabulary=8192)
# for tests: below the size of two real layers
TOY = Width(64, 64, 4, 2, 16, experts=4, vocabulary=512)


@dataclass(frozen=True)
class MergeRun:
    """One measured process."""

    seconds: float
    cpu_seconds: float
    """Of all its threads and children: unlike the time, hardly changed by other work on the machine."""
    peak_memory_bytes: int
    """Largest resident set, pages of memory-mapped files included."""
    peak_anonymous_bytes: int
    """Largest resident set without them; 0 where the system does not say."""
    facts: dict[str, Any]


def measure(config: Config) -> dict[str, Any]:
    """Build the checkpoint, then copy and merge it, in turn."""
    size = config.benchmark.merge_gigabytes * GIGABYTE
    width = REAL if size >= 2 * GIGABYTE else TOY
    with locks.scratch("merging") as scratch:
        _refuse_too_small(size, scratch)
        base, adapter, target = (scratch / name for name in ("base", "adapter", "target"))
        event("writing a synthetic checkpoint", gigabytes=size / GIGABYTE)
        layers = write_checkpoint(base, width, size, seed=config.run.seed)
        lora = config.domain.lora.model_copy(update={"rank": 16, "target_modules": ATTENTION})
        _write_adapter(adapter, base, lora, with_experts=config.benchmark.merge_experts)
        runs: dict[str, list[tuple[MergeRun, MergeRun]]] = {"cp": [], "ours": [], "self-check": [], "peft": []}
        repeats = 2 if width is REAL else 1
        for number in range(repeats):
            copied = _copy(base, target)
            runs["cp"].append((copied, copied))
            shutil.rmtree(target)
            runs["ours"].append((_run("ours", base, adapter, target), copied))
            if number == 0:
                runs["self-check"].append((_run("self-check", base, adapter, target), copied))
            shutil.rmtree(target)
            if number == repeats - 1:
                runs["peft"].append((_run("peft", base, adapter, target), copied))
        files_bytes = [path.stat().st_size for path in base.glob("*.safetensors")]
    return {
        "checkpoint": {
            **asdict(width),
            "layers": layers,
            "files": len(files_bytes),
            "bytes": sum(files_bytes),
            "largest_file_bytes": max(files_bytes),
        },
        "with_experts": config.benchmark.merge_experts,
        "contenders": {name: _summary(pairs) for name, pairs in runs.items()},
    }


def write_checkpoint(directory: Path, width: Width, size: float, seed: int) -> int:
    """A MiniMax-M2 of random bfloat16 weights of at least `size` bytes, streamed; returns its number of layers."""
    layer = sum(safetensors_io.described("BF16", shape).size for shape in _layer_shapes(width, 0).values())
    layers = max(2, math.ceil(size / layer))
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    # one block of normal numbers, entered at another place for each piece: drawing billions takes longer than merging
    block = (0.02 * torch.randn(2 * safetensors_io.PIECE_BYTES, generator=generator)).bfloat16()
    weight_map = {}
    for number in range(layers):
        shapes = _layer_shapes(width, number) | (_outer_shapes(width) if number == 0 else {})
        routers = ("gate.weight", "e_score_correction_bias")
        tensors = {n: safetensors_io.described("F32" if n.endswith(routers) else "BF16", s) for n, s in shapes.items()}
        header = safetensors_io.plan(tensors, {"format": "pt"})

        def content(name: str, header: safetensors_io.Header = header) -> Iterator[safetensors_io.Buffer]:
            tensor = header.tensors[name]
            if name.endswith("norm.weight"):
                yield safetensors_io.as_bytes(torch.ones(tensor.shape, dtype=torch.bfloat16))
                return
            dtype = safetensors_io.DTYPES[tensor.dtype]
            left = math.prod(tensor.shape)
            while left:
                at = int(torch.randint(len(block) // 2, (1,), generator=generator))
                yield safetensors_io.as_bytes(block[at : at + min(left, len(block) // 2)].to(dtype))
                left -= min(left, len(block) // 2)

        file = f"model-{number + 1:05}-of-{layers:05}.safetensors"
        safetensors_io.write(directory / file, header, content)
        weight_map |= dict.fromkeys(tensors, file)
    files.write_json(directory / merge.INDEX, {"metadata": {}, "weight_map": weight_map})
    files.write_json(directory / "config.json", _settings(width, layers))
    return layers


def _layer_shapes(width: Width, number: int) -> dict[str, tuple[int, ...]]:
    query, key = width.heads * width.head, width.key_value_heads * width.head
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (query, width.hidden),
        "self_attn.k_proj.weight": (key, width.hidden),
        "self_attn.v_proj.weight": (key, width.hidden),
        "self_attn.o_proj.weight": (width.hidden, query),
        "self_attn.q_norm.weight": (query,),
        "self_attn.k_norm.weight": (key,),
        "input_layernorm.weight": (width.hidden,),
        "post_attention_layernorm.weight": (width.hidden,),
        "block_sparse_moe.gate.weight": (width.experts, width.hidden),
        "block_sparse_moe.e_score_correction_bias": (width.experts,),
    }
    for expert in range(width.experts):
        for leaf in ("w1", "w2", "w3"):
            inner = (width.hidden, width.intermediate)
            shapes[f"block_sparse_moe.experts.{expert}.{leaf}.weight"] = inner if leaf == "w2" else inner[::-1]
    return {f"model.layers.{number}.{name}": shape for name, shape in shapes.items()}


def _outer_shapes(width: Width) -> dict[str, tuple[int, ...]]:
    table = (width.vocabulary, width.hidden)
    return {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (width.hidden,)}


def _settings(width: Width, layers: int) -> dict[str, Any]:
    return {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "dtype": "bfloat16",
        "vocab_size": width.vocabulary,
        "hidden_size": width.hidden,
        "intermediate_size": width.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": width.heads,
        "num_key_value_heads": width.key_value_heads,
        "head_dim": width.head,
        "rotary_dim": width.head // 2,
        "num_local_experts": width.experts,
        "num_experts_per_tok": min(8, width.experts),
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _write_adapter(directory: Path, base: Path, lora: LoraSection, *, with_experts: bool) -> None:
    """Random factors on every layer's attention, and fused experts; as small beside the weights as trained ones."""
    checkpoint = safetensors_io.Checkpoint(base)
    width = checkpoint.config
    generator = torch.Generator().manual_seed(1)
    shapes = {
        name.removesuffix(".weight"): checkpoint.tensor(name).shape
        for name in checkpoint.homes
        if name.removesuffix(".weight").endswith(tuple(lora.target_modules))
    }
    if with_experts:
        experts, hidden, inner = width["num_local_experts"], width["hidden_size"], width["intermediate_size"]
        for layer in range(width["num_hidden_layers"]):
            shapes[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = (experts, 2 * inner, hidden)
            shapes[f"model.layers.{layer}.mlp.experts.down_proj"] = (experts, hidden, inner)
    factors = {
        name: ModuleFactors(
            torch.randn(*lead, lora.rank, columns, generator=generator) / columns**0.5,
            torch.randn(*lead, rows, lora.rank, generator=generator) * 0.01,
            lora.alpha / lora.rank,
        )
        for name, (*lead, rows, columns) in shapes.items()
    }
    adapter_files.save(directory, factors, _base(base))


def _base(directory: Path) -> BaseModel:
    return BaseModel(directory, str(directory), "", "0" * 64, "0" * 64)


def _refuse_too_small(size: float, scratch: Path) -> None:
    free, memory = shutil.disk_usage(scratch).free, psutil.virtual_memory().available
    problems = []
    if free < DISK_PER_BYTE * size:
        what = (
            f"the merge suite needs {DISK_PER_BYTE * size / 1e9:.1f} GB under {scratch}, {free / 1e9:.1f} GB are free"
        )
        problems.append(Problem(what, fix="set TMPDIR to a larger disk, or give a smaller --benchmark.merge_gigabytes"))
    if memory < MEMORY_PER_BYTE * size:
        what = (
            f"peft's merge needs about {MEMORY_PER_BYTE * size / 1e9:.1f} GB of memory, {memory / 1e9:.1f} GB are free"
        )
        problems.append(Problem(what, fix="give a smaller --benchmark.merge_gigabytes"))
    if problems:
        raise ArtefactError(problems)


def _copy(base: Path, target: Path) -> MergeRun:
    os.sync()
    began, used = time.perf_counter(), _cpu_seconds()
    peak, anonymous = peak_memory(subprocess.Popen(["cp", "-r", str(base), str(target)]))
    seconds, used = time.perf_counter() - began, _cpu_seconds() - used
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    on_disk = round(time.perf_counter() - began, 2)
    event("measured cp", seconds=seconds, cpu_seconds=used, seconds_until_on_disk=on_disk)
    return MergeRun(seconds, used, peak, anonymous, {"seconds_until_on_disk": on_disk})


def _run(what: str, base: Path, adapter: Path, target: Path) -> MergeRun:
    """Run one step in a process of its own, and watch it."""
    os.sync()
    command = [sys.executable, "-m", "utils.benchmarks.suite_merge", what, str(base), str(adapter), str(target)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=out, stderr=errors, cwd=ROOT)
        peak, anonymous = peak_memory(child)
        out.seek(0)
        errors.seek(0)
        if child.returncode:
            raise VerificationError(Problem(f"{what} failed", errors.read().strip().splitlines()[-3:]))
        result = json.loads(out.read().strip().splitlines()[-1])
    seconds, used = result["seconds"], result["cpu_seconds"]
    event(f"measured {what}", seconds=seconds, cpu_seconds=used, anonymous_mb=anonymous // 10**6)
    return MergeRun(seconds, used, peak, anonymous, result["facts"])


def _cpu_seconds() -> float:
    """Used so far by this process and by children that have ended."""
    return sum(os.times()[:4])


def _summary(pairs: list[tuple[MergeRun, MergeRun]]) -> dict[str, Any]:
    """Of a step's runs, each with the copy that was made shortly before it."""
    runs = [run for run, _ in pairs]
    return {
        "seconds": [round(run.seconds, 2) for run in runs],
        "cpu_seconds": [round(run.cpu_seconds, 2) for run in runs],
        "to_cp": round(statistics.mean(run.seconds / copied.seconds for run, copied in pairs), 2),
        "peak_memory_bytes": max(run.peak_memory_bytes for run in runs),
        "peak_anonymous_bytes": max(run.peak_anonymous_bytes for run in runs),
        "facts": runs[-1].facts,
    }


def _main(what: str, base: Path, adapter: Path, target: Path) -> dict[str, Any]:
    """In the process that is watched: one step, and what there is to say about it."""
    from peft import PeftModel  # by all steps, before the clock starts
    from transformers import AutoModelForCausalLM

    facts: dict[str, Any] = {}
    factors = adapter_files.load(adapter)
    began, used = time.perf_counter(), _cpu_seconds()
    if what == "peft":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, local_files_only=True)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)
    elif what == "ours":
        digests: dict[str, str] = {}
        with files.publish(target, dict, digests=digests) as directory:
            facts, new_digests = merge.write(merge_plan.plan(_base(base), factors, "base"), directory, "# Synthetic\n")
            digests |= new_digests
    else:
        facts = merge_check.merged_equals_composed(_base(base), factors, target, BaseModelSection(dtype="bfloat16"))
    return {"seconds": time.perf_counter() - began, "cpu_seconds": _cpu_seconds() - used, "facts": facts}


if __name__ == "__main__":
    print(json.dumps(_main(sys.argv[1], *map(Path, sys.argv[2:]))))
