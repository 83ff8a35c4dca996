"""The suites that were asked for, one after the other: each one's results are kept as soon as they are there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from config import Config
from utils.artifacts import resumable
from utils.artifacts.runs import Run
from utils.benchmarks import (
    inputs,
    suite_data,
    suite_evaluation,
    suite_gpu,
    suite_inference,
    suite_merge,
    suite_training,
)
from utils.exceptions import ConfigError, Problem
from utils.models import devices
from utils.models.base_model import BaseModel
from utils.models.parallel import launcher, ranks


def measure(config: Config, base: BaseModel, pair: tuple[Run, Run] | None, directory: Path) -> dict[str, Any]:
    """Suite -> results, and the machine; an interrupted call goes on at the first suite that has no file yet."""
    on_gpu = devices.device().type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability()
    machine: dict[str, Any] = {"device": name, "threads": torch.get_num_threads(), "load_before": _load()}
    results: dict[str, Any] = {}
    for suite in config.benchmark.suite:
        path, of = directory / f"suite_{suite}.json", resumable.owner(directory)
        results[suite] = resumable.result(path, of, lambda suite=suite: _measured(suite, config, base, pair))
    return {"machine": machine | {"load_after": _load()}, **results}


def refuse_sharded(config: Config) -> None:
    """Raises ConfigError for suites that need the whole model in one rank, where the launcher shards it."""
    whole = sorted({"training", "evaluation", "gpu"} & set(config.benchmark.suite))
    if whole and launcher.current().shard > 1:
        fix = "start these with python, or with a launch file that shards nothing"
        raise ConfigError(Problem("these suites measure a model that is whole in one process", whole, fix))


def _measured(suite: str, config: Config, base: BaseModel, pair: tuple[Run, Run] | None) -> dict[str, Any]:
    section = config.benchmark
    if suite == "inference":
        longest = max(section.prompt_tokens) * max(section.batch_sizes)
        measured = (config, base, pair, inputs.token_stream(config, base, longest))
        if launcher.current().shard > 1:
            return ranks.everywhere(suite_inference.measure, *measured)
        return suite_inference.measure(*measured)
    if suite == "training":
        return suite_training.measure(config, base, inputs.token_stream(config, base, section.training_tokens))
    if suite == "data":
        return suite_data.measure(config)
    if suite == "evaluation":
        return suite_evaluation.measure(config, base)
    if suite == "gpu":
        return suite_gpu.measure(config)
    return suite_merge.measure(config)


def _load() -> list[float] | None:
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
