"""What `--dry-run` says about size and time per script, from config.json or built-in constants: no torch, no hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from config import AUTO, Config, TrainSection
from utils.artifacts import files
from utils.exceptions import ArtefactError, Problem
from utils.models.architectures import registry
from utils.models.model_shapes import GIB, Dtype, ModelSizes
from utils.planning import estimates, fitting_settings, hardware, plan_report, planned_data, stage_costs, training_plan
from utils.planning.plan_report import gb, gib
from utils.planning.stage_commands import STAGES


def lines(config: Config, script: str) -> list[str]:
    """The plan's part in a script's dry run; empty for models whose sizes take torch or the hub.

    Raises ArtefactError for a config.json that lacks what the sizes follow from.
    """
    path, known = Path(config.base.source) / "config.json", registry.published(config.base.source)
    if not path.is_file() and known is None:
        return []
    settings = files.read_object(path) if path.is_file() else known.settings
    count = registry.of(settings.get("model_type")).sizes
    if count is None:
        return []
    try:
        sizes = count(settings)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"the sizes of {config.base.source} do not follow from its config.json: {error}"
        raise ArtefactError(Problem(what, fix="restore the file")) from error
    base = fitting_settings.planned_base(config)
    return [plan_report.headline(sizes, base), *_SCRIPTS[script](config, sizes, base)]


def _training(stage: str) -> Callable[[Config, ModelSizes, Dtype], list[str]]:
    def described(config: Config, sizes: ModelSizes, base: Dtype) -> list[str]:
        data, way = planned_data.of(config), fitting_settings.find(config, sizes)
        cost = next(one for one in stage_costs.every_stage(way, sizes, data) if one.stage == stage)
        plan, chosen = (
            plan_report.choices(config, sizes, fitting_settings.planned_base(config), stage)[0],
            way.trainings[stage],
        )
        section = getattr(config, stage)
        written = stage_costs.disk(
            sizes, plan.step.adapter, keep_checkpoints=section.train.keep_checkpoints, merged="bfloat16"
        )
        low, high = (plan_report.duration(seconds / 3600) for seconds in cost.seconds)
        return [
            f"train {plan_report.trainable(sizes, plan.step.adapter)}",
            f"as configured, {plan_report.verdict(plan, config.plan)}",
            *(f"instead: {change}" for change in plan_report.changes(config, sizes)),
            *plan_report.loading(way, sizes),
            f"{plan_report.between(low, high)} for {data.trained(stage):,} tokens an epoch",
            plan_report.speed(chosen, config.plan),
            plan_report.NOT_COUNTED,
            f"disk: {gb(written.checkpoints)} of checkpoints, then {gb(written.adapter)} of adapter",
            cost.command if cost.verdict != "no" else "no launch file makes this fit",
        ]

    return described


def _prepare(config: Config, sizes: ModelSizes, base: Dtype) -> list[str]:
    download = estimates.weight_bytes(sizes, sizes.stored)
    return [f"fetch the model where it is not here yet: {gb(download)}; preparing reads its tokenizer alone"]


def _compose(config: Config, sizes: ModelSizes, base: Dtype) -> list[str]:
    searched = _stage("search")(config, sizes, base) if config.compose.search else []
    return [_adapters(config, sizes), _checking(sizes), *searched]


def _inference(config: Config, sizes: ModelSizes, base: Dtype) -> list[str]:
    if config.merge.path:
        merged: Dtype = "fp8" if config.merge.dtype == "fp8" else "bfloat16"
        size = estimates.weight_bytes(sizes, merged)
        return [
            f"stream {gb(estimates.weight_bytes(sizes, sizes.stored))} into {gb(size)} of {merged} on the disk of "
            f"{config.merge.path}; no GPU is needed, and memory for one file of it",
            _checking(sizes),
            f"then serve it: vllm serve {config.merge.path} {_vllm_parallel(config, sizes, size)}",
        ]
    rank = stage_costs.vllm_rank(config.domain.lora.rank + config.task.lora.rank)
    parallel = _vllm_parallel(config, sizes, estimates.weight_bytes(sizes, "bfloat16"), with_adapters=True)
    return [
        *_stage("asking")(config, sizes, base),
        "or merge with --merge_path DIR and serve that, or serve the adapter on a bfloat16 copy of the base: "
        f"vllm serve BASE {parallel} --enable-lora --max-lora-rank {rank} "
        "--lora-modules mine=ADAPTER",
    ]


def _stage(stage: str) -> Callable[[Config, ModelSizes, Dtype], list[str]]:
    """A stage's row of the plan."""

    def described(config: Config, sizes: ModelSizes, base: Dtype) -> list[str]:
        way = fitting_settings.find(config, sizes)
        cost = next(one for one in stage_costs.every_stage(way, sizes, planned_data.of(config)) if one.stage == stage)
        low, high = (plan_report.duration(seconds / 3600) for seconds in cost.seconds)
        peak = f"{cost.peak[0] / GIB:.1f} to {gib(cost.peak[1])} of each GPU in {way.form.scored}"
        return [f"{peak}: {cost.verdict}; {plan_report.between(low, high)} ({cost.note})", cost.command]

    return described


def _benchmark(config: Config, sizes: ModelSizes, base: Dtype) -> list[str]:
    loading = sorted({"inference", "training"}.intersection(config.benchmark.suite))
    return [_one_process(sizes, base, f"the suite {' and '.join(loading)}")] if loading else []


def _rollout(config: Config, sizes: ModelSizes, base: Dtype) -> list[str]:
    options = []
    for dtype in ("bfloat16", "fp8"):
        size = estimates.weight_bytes(sizes, dtype)
        options.append(f"{_tensor_parallel(config, size)} GPUs in {dtype} ({gib(size)})")
    return [f"production and candidate each take {' or '.join(options)}, side by side while the rollout lasts"]


def _verify(config: Config, sizes: ModelSizes, base: Dtype) -> list[str]:
    size = estimates.weight_bytes(sizes, sizes.stored)
    return [f"reading the base model's {gb(size)} takes {plan_report.duration(size / 1e9 / 3600)} at 1 GB/s"]


def _whole(config: Config, sizes: ModelSizes, base: Dtype) -> list[str]:
    return [line for line in plan_report.report(config, sizes, planned_data.of(config))[0][1:] if line]


def _adapters(config: Config, sizes: ModelSizes) -> str:
    parts = []
    for stage in STAGES:
        count = sum(estimates.lora_parameters(sizes, training_plan.adapter(getattr(config, stage).lora)).values())
        parts.append(f"{stage} {gb(4 * count)}")
    return f"adapters in float32: {', '.join(parts)}, composed as much as both"


def _checking(sizes: ModelSizes) -> str:
    needed = gib(estimates.checking_bytes(sizes))
    return f"checking it takes {needed} of main memory for one layer; with more memory more layers are checked"


def _one_process(sizes: ModelSizes, base: Dtype, what: str) -> str:
    size = gib(estimates.weight_bytes(sizes, base))
    return f"{what} loads the model in one process: {size} of memory in {base}, and refused where that is not there"


def _tensor_parallel(config: Config, size: int) -> int:
    return stage_costs.tensor_parallel(size, hardware.of(config.plan))


def _vllm_parallel(config: Config, sizes: ModelSizes, size: int, *, with_adapters: bool = False) -> str:
    gpus, experts = _tensor_parallel(config, size), bool(sizes.experts)
    return " ".join(stage_costs.vllm_parallel(gpus, has_experts=experts, with_adapters=with_adapters))


_SCRIPTS: dict[str, Callable[[Config, ModelSizes, Dtype], list[str]]] = {
    "prepare_data": _prepare,
    "train_domain_adapter": _training("domain"),
    "train_task_adapter": _training("task"),
    "compose": _compose,
    "inference": _inference,
    "evaluate": _stage("evaluate"),
    "benchmark": _benchmark,
    "rollout": _rollout,
    "verify": _verify,
    "plan": _whole,
}


def targets(config: Config, stage: str) -> str:
    """The leaf names that an adapter is on; those of auto from what is known without building the model."""
    named = getattr(config, stage).lora.target_modules
    if AUTO not in named:
        return ", ".join(named)
    kind, _, rest = config.base.source.partition(":")
    is_built = kind in ("wheel", "toy") and bool(rest)
    directory = config.run.models_dir / "base" / config.base.name if is_built else Path(config.base.source)
    path, known = directory / "config.json", registry.published(config.base.source)
    settings = files.read_object(path) if path.is_file() else known.settings if known else {}
    count = registry.of(settings.get("model_type")).sizes
    leaves = [m.name for m in count(settings).matrices if m.adaptable and not m.is_experts] if count else []
    if not leaves:
        leaves = _leaves_on_disk(directory)
    return ", ".join(leaves) if leaves else "every linear module of attention and MLP"


# tensors that are no linear module of the language model's layers, by the words in their names
_OTHERS = re.compile(
    r"norm|embed|experts?\.\d|router|vis|audio|image|conv|(^|\.)(wte|wpe|lm_head|gate|\w+_gate)\.weight$"
)


def _leaves_on_disk(directory: Path) -> list[str]:
    """Leaf names of the matrices in numbered layers, from the headers of the files; no torch."""
    leaves: dict[str, None] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with path.open("rb") as handle:
                header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        except (OSError, ValueError):
            return []
        for name, tensor in header.items():
            parts = name.split(".")
            is_matrix = name.endswith(".weight") and len(tensor.get("shape", ())) == 2
            if is_matrix and any(part.isdigit() for part in parts) and not _OTHERS.search(name):
                leaves.setdefault(parts[-2])
    return list(leaves)


def passes(train: TrainSection) -> str:
    """How long a training lasts: "3 epochs", or "100 steps" where --STAGE.train.max_steps decides."""
    count, unit = (train.max_steps, "step") if train.max_steps else (train.epochs, "epoch")
    return f"{count:,} {unit}{'s' * (count != 1)}"
