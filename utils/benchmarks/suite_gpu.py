"""The gpu suite: MiniMax-M2 at its own width with as many layers as fit, and a dense model of a billion parameters.

All weights are random and made here, so nothing is fetched. MiniMax-M2 trains through the loop that the scripts use, at
sequence 4096 with activation checkpointing, and its peak stands beside the planner's prediction. The dense model goes
through the training and inference suites (TRL beside our loop, PEFT's two active adapters beside the composed one), the
composition check and the streaming merge. From the layers that fit, the whole model is extrapolated, assumptions named.

With `benchmark.gpu_toy` everything runs at a toy's width, on a CPU too: the path is shown to work, the numbers mean
nothing.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from config import (
    ALL_LINEAR_LLAMA,
    BaseModelSection,
    Config,
    DomainSection,
    LoraSection,
    MergeSection,
    TaskSection,
    TrainSection,
)
from utils import disk, logger
from utils.adapters import peft_model
from utils.artifacts import locks
from utils.artifacts.runs import METRICS
from utils.benchmarks import inputs, suite_inference, suite_training
from utils.benchmarks import suite_merge as synthetic
from utils.benchmarks.gpu_scale import REAL, ROOM, TOY, SuiteScale, extrapolation, most_layers, predicted, sizes
from utils.composition import composed_adapter
from utils.composition.methods import Recipe, compose
from utils.data.batches import PackedDocuments
from utils.exceptions import ArtefactError, ConfigError, NonFiniteError, Problem
from utils.export import merge
from utils.logger import event
from utils.models import devices, float32_model, loading, sources
from utils.models.architectures import toy
from utils.models.base_model import BaseModel
from utils.models.model_shapes import GIB, Dtype
from utils.planning import estimates, hardware, pass_times, training_plan
from utils.planning.memory.native_fp8 import LEAST_CAPABILITY
from utils.training import training_loop, training_run
from utils.training.schedules.active_adapters import AdapterSchedule
from utils.training.training_setup import TrainingSetup

OTHERS_FAIL = (RuntimeError, ValueError, ImportError, OSError, AssertionError, NonFiniteError, ArtefactError)


def refuse(config: Config) -> None:
    """Raises ConfigError, saying what it needs, where the suite cannot run; called before anything is made."""
    if config.benchmark.gpu_toy:
        return
    fix = "run it on such a machine; --benchmark.gpu_toy true runs its whole path at toy size, on a CPU too"
    needed = predicted(REAL, 2, REAL.attention, "bfloat16").total / ROOM
    if devices.device().type != "cuda":
        what = f"the gpu suite needs a GPU with at least {needed / GIB:.0f} GiB (two layers), and none is visible"
        raise ConfigError(Problem(what, "torch.cuda.is_available() is False", fix))
    if (free := torch.cuda.mem_get_info()[0]) < needed:
        what = f"the gpu suite needs {needed / GIB:.0f} GiB of GPU memory for two layers, {free / GIB:.1f} GiB are free"
        raise ConfigError(Problem(what, torch.cuda.get_device_name(), fix))


def measure(config: Config) -> dict[str, Any]:
    """Every part of the suite, the largest models first, while the memory is whole."""
    refuse(config)
    scale = TOY if config.benchmark.gpu_toy else REAL
    with locks.scratch("gpu-suite") as scratch:
        moe: dict[str, Any] = {}
        for name, lora in (("attention", scale.attention), ("experts", scale.experts)):
            layers = most_layers(scale, lora, _free_bytes())
            event(f"gpu suite: MiniMax-M2, {name}", layers=layers, tokens=scale.sequence_tokens)
            model = _random_moe(scale, layers, torch.bfloat16, config.run.seed)
            moe[name] = _trained(config, scale, model, layers, lora, "bfloat16", scratch / name)
            del model
            _release()
        moe["fp8"] = _on_fp8(config, scale, scratch)
        parity = _parity(config, scale)
        dense = _dense(config, scale, scratch)
    return {
        "toy": config.benchmark.gpu_toy,
        "minimax_m2": moe,
        "parity_minimax_m2": parity,
        "extrapolation": extrapolation(moe["attention"], hardware.peak_tflops(config.plan)),
        **dense,
    }


def _random_moe(scale: SuiteScale, layers: int, dtype: torch.dtype, seed: int) -> Any:
    """MiniMax-M2's architecture with random weights, made on the device, routers in float32."""
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    settings = MiniMaxM2Config(
        **{k: v for k, v in scale.moe.items() if k != "model_type"} | {"num_hidden_layers": layers}
    )
    torch.manual_seed(seed)
    with logger.quiet_transformers(), devices.device():
        model = MiniMaxM2ForCausalLM._from_config(settings, dtype=dtype, attn_implementation="sdpa")
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.float()
    loading.route_outside_autocast(model.requires_grad_(False))
    return model.eval()


def _trained(
    config: Config, scale: SuiteScale, model: Any, layers: int, lora: LoraSection, base: Dtype, directory: Path
) -> dict[str, Any]:
    """Speed and peak of the training loop; the first step is a warm-up."""
    from accelerate import Accelerator
    from datasets import Dataset

    tokens, steps = scale.sequence_tokens, config.benchmark.gpu_steps + 1
    settings = TrainSection(
        **{"max_sequence_tokens": tokens, "batch_tokens": tokens, "micro_batch_tokens": tokens, "epochs": 1},
        **{"max_steps": steps, "gradient_checkpointing": True, "save_every_steps": steps + 1, "learning_rate": 1e-4},
    )
    generator = Random(config.run.seed)
    lengths = [generator.randint(tokens // 8, tokens) for _ in range(4 * steps)]
    ids = [[generator.randrange(scale.moe["vocab_size"]) for _ in range(length)] for length in lengths]
    rows = {"id": [str(i) for i in range(len(ids))], "input_ids": ids, "num_tokens": lengths}
    data = PackedDocuments(Dataset.from_dict(rows), settings, config.run.seed, 0)
    model = training_run.new_adapter(model, "task", lora, config.run.seed)
    trainable = sum(parameter.numel() for parameter in peft_model.trainable_parameters(model).values())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    directory.mkdir()
    setup = TrainingSetup(
        model,
        data,
        [],
        settings,
        AdapterSchedule("task"),
        seed=config.run.seed,
        directory=directory,
        accelerator=Accelerator(cpu=devices.device().type == "cpu"),
        what=f"gpu suite, {directory.name}",
    )
    outcome = training_loop.train(setup)
    records = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
    rate = statistics.median([row["tokens_per_second"] for row in records if "tokens_per_second" in row][1:])
    shapes, low = sizes(scale, layers), predicted(scale, layers, lora, base).total
    peak = hardware.peak_tflops(config.plan) * 1e12

    def utilisation(*, checkpointing: bool) -> float:
        per_pass = pass_times.expert_lora_flops(shapes, training_plan.adapter(lora), checkpointing=checkpointing)
        flops = pass_times.flops_per_token(shapes, row_tokens=tokens, checkpointing=checkpointing) + per_pass / tokens
        return rate * flops / peak

    return {
        "layers": layers,
        "rank": lora.rank,
        "trainable_parameters": trainable,
        "row_tokens": tokens,
        "counted_steps": outcome.steps - 1,
        "tokens_per_second": round(rate, 1),
        "model_utilisation": utilisation(checkpointing=False),
        "hardware_utilisation": utilisation(checkpointing=True),
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "predicted_bytes": [low, predicted(scale, layers, lora, base, careful=True).total],
        "measured_to_predicted": round(outcome.peak_memory_bytes / low, 3),
    }


def _on_fp8(config: Config, scale: SuiteScale, scratch: Path) -> dict[str, Any]:
    """The attention adapter on a base that stays FP8, or why not."""
    if reason := fp8_missing():
        event("gpu suite: no FP8 base", reason=reason)
        return {"skipped": reason}
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    directory = scratch / "fp8-base"
    width = replace(synthetic.REAL, experts=scale.moe["num_local_experts"], vocabulary=scale.moe["vocab_size"])
    kept = ["gate", "e_score_correction_bias", "lm_head"]
    try:
        disk.require(scratch, estimates.weight_bytes(sizes(scale, 2), "bfloat16"), "a base to be quantised")
        layers = synthetic.write_checkpoint(directory, width, 1.0, config.run.seed)
        with logger.quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.bfloat16,
                quantization_config=FineGrainedFP8Config(modules_to_not_convert=kept),
                device_map={"": devices.device()},
                local_files_only=True,
            )
        loading.route_outside_autocast(model.requires_grad_(False))
        return _trained(config, scale, model, layers, scale.attention, "fp8", scratch / "fp8")
    except OTHERS_FAIL as error:  # kernels are other people's programs; the other parts need not suffer for them
        return {"skipped": f"with FP8 kernels: {(str(error).splitlines() or [type(error).__name__])[0]}"}
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        _release()


def fp8_missing() -> str:
    """What this machine lacks to train on a base that stays FP8; empty when nothing is known to be missing."""
    if devices.device().type != "cuda":
        return "no GPU: an FP8 base would be de-quantised"
    if (capability := torch.cuda.get_device_capability()) < LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} has no FP8 units, 8.9 is the first that has"
    if importlib.util.find_spec("kernels") is None:
        return "the package kernels, which brings the FP8 products, is not installed"
    return ""


def _parity(config: Config, scale: SuiteScale) -> dict[str, float]:
    """MiniMax-M2's composition in float32, at full width on one layer: parts active, composed, PEFT."""
    model = float32_model.visiting_every_expert(_random_moe(scale, 1, torch.float32, config.run.seed))
    pair = [inputs.random_factors(model, scale.attention, seed) for seed in (1, 2)]
    ids = torch.randint(0, scale.moe["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(0))
    try:
        return composed_adapter.check_logits(pair, compose(pair, Recipe()), model, ids, exact=True)
    finally:
        del model
        _release()


def _dense(config: Config, scale: SuiteScale, scratch: Path) -> dict[str, Any]:
    """The dense model through the training and inference suites, the composition check and the merge."""
    base, config = _dense_base(config, scale, scratch / "dense")
    count = max(
        config.benchmark.training_tokens, max(config.benchmark.prompt_tokens) * max(config.benchmark.batch_sizes)
    )
    ids = torch.randint(0, len(toy.tiny_tokenizer()), (count,), generator=torch.Generator().manual_seed(0))
    stream = inputs.TokenStream(ids, torch.arange(count), "random")
    results = {"training": suite_training.measure(config, base, stream)}
    _release()
    results["inference"] = suite_inference.measure(config, base, None, stream)
    _release()
    model = float32_model.in_float32(base, config.base)
    pair = [inputs.random_factors(model, config.domain.lora, seed) for seed in (1, 2)]
    composed = compose(pair, Recipe())
    results["parity_dense"] = composed_adapter.check_logits(pair, composed, model, ids[:96].view(2, 48), exact=True)
    del model
    _release()
    began = time.perf_counter()
    facts: dict[str, Callable[..., Any] | str] = {"fingerprint": "gpu-suite", "manifest": lambda checks: {}}
    checks = merge.merge(
        base, composed, scratch / "merged", MergeSection(dtype="float32"), config.base, card="# Random\n", **facts
    )
    kept = ("largest_logit", "max_logit_difference", "adapter_effect_on_logits", "rounding_to_delta")
    results["merge"] = {"seconds": round(time.perf_counter() - began, 2), **{key: checks[key] for key in kept}}
    return results


def _dense_base(config: Config, scale: SuiteScale, directory: Path) -> tuple[BaseModel, Config]:
    """A random dense model on disk, and the configuration under which the other suites measure it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.run.seed)
    with logger.quiet_transformers():
        with devices.device():
            model = LlamaForCausalLM._from_config(LlamaConfig(**scale.dense), dtype=torch.bfloat16)
        model.save_pretrained(directory)
        toy.tiny_tokenizer().save_pretrained(directory)
    del model
    _release()
    row, steps = scale.dense_tokens, config.benchmark.gpu_steps + 1
    lora = LoraSection(rank=16, alpha=32, target_modules=ALL_LINEAR_LLAMA)
    train = TrainSection(max_sequence_tokens=row, batch_tokens=8 * row, micro_batch_tokens=4 * row)
    section = BaseModelSection(source=str(directory), dtype="bfloat16", attention=config.base.attention)
    benchmark = config.benchmark.model_copy(update={"training_tokens": steps * 8 * row})
    stage = {"domain": DomainSection(lora=lora, train=train), "task": TaskSection(lora=lora, train=train)}
    config = config.model_copy(update={"base": section, "benchmark": benchmark, **stage})
    return sources.fetch(section, directory.parent), config


def _free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if devices.device().type == "cuda" else 16 * GIB


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
