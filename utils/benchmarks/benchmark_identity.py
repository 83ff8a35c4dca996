"""What decides a benchmark: what is measured and on what machine, under names that stay when settings are renamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from config import Config, LoraSection, with_today_s_names
from utils.artifacts.identity import Identity, chosen, same_names
from utils.artifacts.runs import Run
from utils.models import devices, loading
from utils.models.base_model import BaseModel
from utils.models.structure import linear_modules, model_class
from utils.planning import hardware

# recorded name -> setting; here memory settings decide too, because memory and time are what is measured
MEASURED = same_names(
    *("suite", "prompt_tokens", "batch_sizes", "new_tokens", "repeats", "training_tokens", "corpus_megabytes"),
    *("merge_gigabytes", "merge_experts", "evaluation_items", "gpu_steps", "gpu_toy", "evaluation_document_tokens"),
)
RECIPE = same_names("method", "weights", "rank", "density")
LORA = same_names("rank", "alpha", "dropout", "use_rslora", "target_modules", "experts")
TRAIN = {"sequence_tokens": "max_sequence_tokens"} | same_names(
    *("learning_rate", "batch_tokens", "micro_batch_tokens", "weight_decay", "max_grad_norm", "gradient_checkpointing")
)
MACHINE = same_names("dtype", "attention", "device", "gpu_tflops", "threads", "torch", "evaluate_batch_tokens", "seed")


def benchmark_identity(config: Config, base: BaseModel, pair: Sequence[Run] | None) -> Identity:
    """Another machine, torch or setting gives another run."""
    recorded = {
        "base": base.digest,
        "adapters": [run.digest for run in pair] if pair else None,
        "compose": config.compose.model_dump(mode="json"),
        "benchmark": config.benchmark.model_dump(mode="json"),
        "evaluate_batch_tokens": config.evaluate.batch_tokens,
        "domain": config.domain.model_dump(mode="json") | {"lora": _lora(config.domain.lora, base)},
        "task_lora": _lora(config.task.lora, base),
        "dtype": str(devices.compute_dtype(config.base.dtype)),
        "attention": loading.attention_of(base, config.base),
        "device": devices.device().type,
        "gpu_tflops": hardware.peak_tflops(config.plan) if "gpu" in config.benchmark.suite else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seed": config.run.seed,
    }
    return Identity.of("benchmark", _values(recorded), _values)


def _lora(lora: LoraSection, base: BaseModel) -> dict[str, Any]:
    """The section with the leaf names that its targets find in the model."""
    names = linear_modules.leaves(linear_modules.named(model_class.outline(base.directory), lora.target_modules))
    return lora.model_dump(mode="json") | {"target_modules": names}


def _values(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The deciding values of an identity that holds whole sections, as those of before 2026-11-30 do."""
    return {
        "base": recorded["base"],
        "adapters": recorded["adapters"],
        "measured": chosen(recorded["benchmark"], MEASURED),
        "recipe": chosen(recorded["compose"], RECIPE),
        "domain": {
            "lora": chosen(recorded["domain"]["lora"], LORA),
            "train": chosen(with_today_s_names(recorded["domain"]["train"]), TRAIN),
        },
        "task": {"lora": chosen(recorded["task_lora"], LORA)},
        **chosen(recorded, MACHINE),
    }
