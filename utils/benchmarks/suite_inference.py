"""The inference suite: base, two active adapters, composed and merged on the same prompts, as ratios to base.

All models share one set of loaded weights; only the merged one has its own, unless the model is large: then the deltas
are folded into the shared weights in place, after everything else was measured. One repeat of each model follows the
other in rotating order, and a ratio is taken within a repeat, so that a machine that grows slow slows both sides.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from config import BenchmarkSection, Config
from utils.adapters import inference_layers, peft_model
from utils.adapters.factors import Factors, ModuleFactors, delta
from utils.artifacts.runs import Run
from utils.benchmarks.inputs import TokenStream, adapter_pair
from utils.composition.methods import Recipe, compose
from utils.models import devices
from utils.models.base_model import BaseModel
from utils.models.losses import autocast
from utils.models.parallel import expert_parallel, ranks, sharding
from utils.progress import Progress

MODELS = ("base", "two active", "composed", "merged")
# up to this size of weights the merged model is a second copy and takes part in every repeat
COPY_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Repeat:
    """One prompt answered once: seconds to the first token, and of each further one."""

    prefill: float
    steps: list[float]

    @property
    def decode(self) -> float:
        """Median over the steps: one interrupted step does not count."""
        return statistics.median(self.steps)


def measure(config: Config, base: BaseModel, runs: tuple[Run, Run] | None, stream: TokenStream) -> dict[str, Any]:
    """Every model in every cell of prompt length x batch size."""
    settings = config.benchmark
    model = sharding.ready_model(base, config.base)
    pair = adapter_pair(config, base, model, runs)
    composed = compose(pair, Recipe())
    together = weights_bytes(model) <= COPY_BYTES and not ranks.is_sharded()
    if ranks.is_sharded():
        models = sharded_variants(model, pair, composed)
    else:
        models = variants(model, pair, composed, with_merged=together)
    total = len(settings.prompt_tokens) * len(settings.batch_sizes) * (settings.repeats + 1) * len(MODELS)
    cells = []
    with Progress("inference", total=total, unit="answer") as bar:
        for prompt_tokens in settings.prompt_tokens:
            for batch_size in settings.batch_sizes:
                ids_BT = _prompts(stream, batch_size, prompt_tokens).to(model.device)
                cells.append((ids_BT, *_interleaved(models, ids_BT, settings, bar)))
        if not together:
            merge_in_place(model, composed)
            for ids_BT, repeats, peaks in cells:
                late, late_peaks = _interleaved({"merged": model}, ids_BT, settings, bar)
                repeats.update(late)
                peaks.update(late_peaks)
    return {
        "dtype": str(model.dtype),
        "prompts": stream.source,
        "vector_products": inference_layers.vector_products_are_fast() and model.dtype == torch.bfloat16,
        "adapters": [str(run.directory) for run in runs] if runs else "random",
        "rank": max(f.rank for f in composed.values()),
        "merged_measured_in_same_repeats": together,
        "weights_bytes": {"model": weights_bytes(model), "composed_adapter": sum(_factor_bytes(composed, model))},
        "cells": [_summary(ids_BT, repeats, peaks) for ids_BT, repeats, peaks in cells],
    }


def variants(
    model: Any, pair: tuple[Factors, Factors], composed: Factors, *, with_merged: bool = True
) -> dict[str, torch.nn.Module]:
    """The models that are compared, on one set of base weights."""
    merged = merged_copy(model, composed) if with_merged else None
    two = peft_model.add(inference_layers.sharing_weights(model), "domain", pair[0])
    two = peft_model.add(two, "task", pair[1])
    peft_model.activate(two, ["domain", "task"])
    one = inference_layers.attach(inference_layers.sharing_weights(model), {"composed": composed})
    models = {"base": model, "two active": two.eval(), "composed": one.eval()}
    return models | ({"merged": merged} if merged is not None else {})


class SelectedAdapters(torch.nn.Module):
    """A sharded model, of which there is only one, in the state of one of those that are compared."""

    def __init__(self, model: Any, weights: dict[str, float]):
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, **inputs: Any) -> Any:
        if inputs["past_key_values"] is None:  # the first pass of an answer
            inference_layers.select(self.model, self.weights)
        return self.model(**inputs)


def sharded_variants(model: Any, pair: tuple[Factors, Factors], composed: Factors) -> dict[str, torch.nn.Module]:
    """The same on a model that several ranks hold together; two active adapters are those of our layers, not PEFT's."""
    adapters = {"domain": pair[0], "task": pair[1], "composed": composed}
    inference_layers.attach(model, adapters)
    states = {"base": {}, "two active": {"domain": 1.0, "task": 1.0}, "composed": {"composed": 1.0}}
    return {name: SelectedAdapters(model, weights) for name, weights in states.items()}


@torch.no_grad()
def merged_copy(model: Any, factors: Factors) -> torch.nn.Module:
    """A model whose adapted weights are its own: base plus delta, summed in float32 and rounded once."""
    copy = inference_layers.sharing_weights(model)
    for name, f in factors.items():
        module, parameter = _adapted(copy, name, f)
        weight = getattr(module, parameter)
        merged = (weight.float() + delta(f).to(weight.device)).to(weight.dtype)
        setattr(module, parameter, torch.nn.Parameter(merged, requires_grad=False))
    return copy


@torch.no_grad()
def merge_in_place(model: Any, factors: Factors) -> None:
    """The same without a copy; every model that shares these weights changes with it."""
    inference_layers.select(model, {})
    for name, f in factors.items():
        module, parameter = _adapted(model, name, f)
        weight, change = getattr(module, parameter), expert_parallel.own_part(module, delta(f))
        own = sharding.own(weight)
        own.copy_(own.float() + sharding.own(sharding.like(change.to(own.device), weight)))


def _adapted(model: Any, name: str, factors: ModuleFactors) -> tuple[torch.nn.Module, str]:
    """The module that holds the weight of an update, and the weight's name in it."""
    path, _, parameter = name.rpartition(".") if factors.is_experts else (name, "", "weight")
    module = model.get_submodule(path)
    return getattr(module, "base", module), parameter


@torch.no_grad()
def answer_once(model: Any, ids_BT: torch.Tensor, new_tokens: int) -> Repeat:
    """Greedy answer of exactly `new_tokens` tokens with a KV cache; end-of-turn tokens do not stop it.

    The forward pass is called directly: `generate` adds the same few milliseconds of bookkeeping to every model,
    which would hide a part of the difference.
    """
    seconds = []
    cache, next_B1 = None, ids_BT
    with autocast(model, ids_BT.device):
        for _ in range(new_tokens):
            began = _now(ids_BT.device)
            outputs = model(input_ids=next_B1, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, next_B1 = outputs.past_key_values, outputs.logits[:, -1].argmax(-1, keepdim=True)
            seconds.append(_now(ids_BT.device) - began)
    return Repeat(seconds[0], seconds[1:] or seconds)


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of the model's parameters, shared ones once; of a sharded model all of them."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _interleaved(
    models: dict[str, torch.nn.Module], ids_BT: torch.Tensor, settings: BenchmarkSection, bar: Progress
) -> tuple[dict[str, list[Repeat]], dict[str, int]]:
    """(model -> its counted repeats, model -> peak memory), after one warm-up of each."""
    names = list(models)
    repeats: dict[str, list[Repeat]] = {name: [] for name in names}
    peaks: dict[str, int] = {}
    for number in range(settings.repeats + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            _reset_peak(ids_BT.device)
            repeat = answer_once(models[name], ids_BT, settings.new_tokens)
            peaks[name] = max(peaks.get(name, 0), _peak(ids_BT.device))
            if number:
                repeats[name].append(repeat)
            bar.advance(1)
    return repeats, peaks


def _summary(ids_BT: torch.Tensor, repeats: dict[str, list[Repeat]], peaks: dict[str, int]) -> dict[str, Any]:
    rows, length = ids_BT.shape
    summary: dict[str, Any] = {"prompt_tokens": length, "batch_size": rows, "models": {}}
    for name, own in repeats.items():
        pairs = list(zip(own, repeats["base"], strict=True))
        steps = [step for repeat in own for step in repeat.steps]
        rates = [rows * (1 + len(r.steps)) / (r.prefill + sum(r.steps)) for r in own]
        summary["models"][name] = {
            "prefill_ms": _percentiles([repeat.prefill for repeat in own]),
            "decode_ms_per_token": _percentiles(steps),
            "tokens_per_second": round(statistics.median(rates), 2),
            "prefill_to_base": round(statistics.median(r.prefill / b.prefill for r, b in pairs), 4),
            "decode_to_base": round(statistics.median(r.decode / b.decode for r, b in pairs), 4),
            "peak_memory_bytes": peaks[name],
        }
    return summary


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p95 = np.percentile(np.asarray(seconds) * 1e3, [50, 95])
    return {"p50": round(float(p50), 3), "p95": round(float(p95), 3)}


def _prompts(stream: TokenStream, rows: int, length: int) -> torch.Tensor:
    return stream.ids[: rows * length].view(rows, length)


def _factor_bytes(factors: Factors, model: Any) -> list[int]:
    size = torch.finfo(model.dtype).bits // 8
    return [size * (f.a_rI.numel() + f.b_Or.numel()) for f in factors.values()]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:  # Linux: the kernel forgets the peak of the resident set; elsewhere it stays the peak so far
        with open("/proc/self/clear_refs", "w", encoding="ascii") as handle:
            handle.write("5")
    except OSError:
        return


def _peak(device: torch.device) -> int:
    """Bytes; on a CPU the resident set of the whole process, which holds every model of the comparison."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/status", encoding="ascii") as handle:
            return next(int(line.split()[1]) * 1024 for line in handle if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return devices.peak_memory_bytes()
