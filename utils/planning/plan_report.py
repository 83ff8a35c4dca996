"""A plan in words: what a stage trains, what it takes on the planned hardware, what to change, and how to launch it.

No torch here: `--dry-run` answers in a second. Sizes come from `sizes` (meta device) or `known_models`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from config import Config, LoraSection, PlanSection
from utils.flags import arguments
from utils.models.model_shapes import GIB, Dtype, ModelSizes
from utils.planning import estimates
from utils.planning.estimates import Adapter, Fit, TrainingMemory, TrainingStep

LAUNCH = "scripts/launch"
STAGES = {"domain": "scripts/train_domain_adapter.py", "task": "scripts/train_task_adapter.py"}
SECTIONS = ("base", "domain", "task", "inputs", "run")
DOMAIN_TOKENS, TASK_TOKENS = 10_000_000, 1_000_000
BOTH_ON_EXPERTS = (
    "the domain adapter below is on the experts: merged into the base first (inference.py --adapters domain "
    "--merge_path DIR, then --base.source DIR --task.on base) it takes no memory of its own"
)
EXPECT_LESS = (
    "times are an upper bound until you measured: on mixtures of experts transformers' kernels are known to reach less"
)
# from this memory on, a GPU is one of the 141 GB kind
LARGE_GPU_GIB = 100
_ORDER: tuple[Fit, ...] = ("no", "tight", "fits")


@dataclass(frozen=True)
class StagePlan:
    """One way to train a stage, and what it takes of one GPU. `low` and `high` differ in what may overlap."""

    stage: str
    step: TrainingStep
    shards: int
    low: TrainingMemory
    high: TrainingMemory
    verdict: Fit
    tokens_per_second: float
    refused: str = ""

    @property
    def name(self) -> str:
        experts = " with experts" if self.step.adapter.experts else ""
        return f"{self.stage} rank {self.step.adapter.rank}{experts}, {self.step.base}"


def adapter(lora: LoraSection, *, experts: bool | None = None) -> Adapter:
    """The planner's view of an adapter's settings."""
    return Adapter(lora.target_modules, lora.rank, lora.experts if experts is None else experts)


def step(config: Config, stage: str, base: Dtype) -> TrainingStep:
    """The forward and backward pass that a stage's settings ask for."""
    section = getattr(config, stage)
    below = adapter(config.domain.lora) if stage == "task" and config.task.on != "base" else None
    return TrainingStep(
        base=base,
        adapter=adapter(section.lora),
        tokens=section.train.micro_batch_tokens,
        row_tokens=section.train.sequence_tokens,
        packed=stage == "domain",
        checkpointing=section.train.gradient_checkpointing,
        below=below,
    )


def trained_in(config: Config, sizes: ModelSizes, base: Dtype) -> Dtype:
    """The form of the frozen weights in training, as far as the settings alone say it."""
    return "fp8" if config.base.fp8 == "native" and sizes.stored == "fp8" else base


def usable(plan: PlanSection) -> float:
    """Bytes of one GPU that tensors may take."""
    return (plan.gpu_memory_gib - plan.headroom_gib) * GIB


def choice(sizes: ModelSizes, plan: PlanSection, stage: str, what: TrainingStep) -> StagePlan:
    """What a step takes: weights on every GPU where they fit there, else dealt out to all of them.

    Those in 4 or 8 bits are not dealt out.
    """
    gpus = plan.gpus * plan.nodes
    for shards in dict.fromkeys((1, 1 if what.base in ("nf4", "int8") else gpus)):
        low = estimates.training_memory(sizes, what, shards=shards)
        high = estimates.training_memory(sizes, what, shards=shards, careful=True)
        verdict = estimates.verdict(low.total, high.total, usable(plan))
        if verdict == "fits":
            break
    rate = estimates.tokens_per_second(
        sizes,
        what,
        row_tokens=what.row_tokens,
        gpus=gpus,
        tflops=plan.gpu_tflops,
        utilisation=plan.utilisation,
    )
    on_experts = what.adapter.experts or (what.below is not None and what.below.experts)
    refused = "adapters on FP8 experts are silently wrong" if what.base == "fp8" and on_experts else ""
    return StagePlan(stage, what, shards, low, high, verdict, rate, refused)


def choices(config: Config, sizes: ModelSizes, base: Dtype, stage: str) -> list[StagePlan]:
    """The configured way first, then the other base dtype and the other answer to whether experts are adapted."""
    asked = step(config, stage, base)
    kinds = [asked.adapter.experts, not asked.adapter.experts] if sizes.experts else [False]
    bases = [base, "fp8"] if sizes.stored == "fp8" and base != "fp8" else [base]
    found = []
    for dtype in bases:
        for experts in kinds:
            what = replace(asked, base=dtype, adapter=replace(asked.adapter, experts=experts))
            found.append(choice(sizes, config.plan, stage, what))
    return found


def headline(sizes: ModelSizes, base: Dtype) -> str:
    """What the model is, in one line."""
    stored = f", {gib(estimates.weight_bytes(sizes, 'fp8'))} as stored in FP8" if sizes.stored == "fp8" else ""
    visited = f" ({sizes.active:,} active per token)" if sizes.experts else ""
    return f"{sizes.model_type}: {sizes.total:,} parameters{visited}; {_weights(sizes, base)} in {base}{stored}"


def trainable(sizes: ModelSizes, what: Adapter) -> str:
    """What is trained, by target."""
    counts = estimates.lora_parameters(sizes, what)
    by_target = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"{sum(counts.values()):,} at rank {what.rank} ({by_target})"


def verdict(found: StagePlan, plan: PlanSection) -> str:
    """One choice against the memory there is."""
    how = f"dealt out to {found.shards} GPUs" if found.shards > 1 else "whole on each GPU"
    says = {"fits": "fits", "tight": "tight", "no": "does NOT fit"}[found.verdict]
    peak = f"{found.low.total / GIB:.1f} to {gib(found.high.total)}"
    return f"{found.name}: {peak} of {gib(usable(plan))} usable per GPU, {how}: {found.refused or says}"


def changes(config: Config, sizes: ModelSizes, found: StagePlan) -> list[str]:
    """What would make a stage fit, each with the peak it leads to; empty where it fits."""
    if found.verdict == "fits":
        return []
    seen = []
    for flags, plan, what in _alternatives(config, sizes, found):
        other = choice(sizes, plan, found.stage, what)
        better = _ORDER.index(other.verdict) > _ORDER.index(found.verdict)
        if better and not other.refused:
            seen.append(f"{flags}: {other.low.total / GIB:.1f} to {gib(other.high.total)}, {other.verdict}")
            if other.verdict == "fits" and plan.nodes > config.plan.nodes:
                break  # more nodes fit as well
    return seen or ["nothing in these settings makes it fit: take a smaller model with --base.source"]


def launch_file(sizes: ModelSizes, plan: PlanSection, *, sharded: bool) -> str:
    """The file of scripts/launch/ for this hardware."""
    if sharded:
        size = "8x141gb" if plan.gpu_memory_gib >= LARGE_GPU_GIB else "8x80gb"
        return f"{LAUNCH}/minimax_m2_{'2x8' if plan.nodes > 1 else size}.yaml"
    if plan.nodes > 1:
        return f"{LAUNCH}/several_nodes.yaml"
    return f"{LAUNCH}/{'one_gpu' if plan.gpus == 1 else 'one_node'}.yaml"


def command(config: Config, sizes: ModelSizes, stage: str, *, sharded: bool) -> str:
    """The exact command that trains a stage on this hardware."""
    plan = config.plan
    file = launch_file(sizes, plan, sharded=sharded)
    words = ["accelerate launch", f"--config_file {file}"]
    if plan.nodes > 1:
        words.append("--machine_rank RANK --main_process_ip ADDRESS")
    usual = {"one_gpu.yaml": 1, "several_nodes.yaml": 16, "minimax_m2_2x8.yaml": 16}
    if plan.nodes * plan.gpus != usual.get(file.rpartition("/")[2], 8) or plan.nodes > 2:
        words.append(f"--num_machines {plan.nodes} --num_processes {plan.nodes * plan.gpus}")
    if sharded and sizes.layer_class != "MiniMaxM2DecoderLayer":
        words.append(f"--fsdp_transformer_layer_cls_to_wrap {sizes.layer_class}")
    return " ".join([*words, STAGES[stage], *arguments(config, SECTIONS)])


def launching(config: Config, sizes: ModelSizes, found: StagePlan) -> list[str]:
    """The command of a choice that can be launched."""
    if found.verdict == "no" or found.refused:
        return ["no launch file makes this fit"]
    run = command(config, sizes, found.stage, sharded=found.shards > 1)
    return (
        [run, f"or with Slurm: sbatch {LAUNCH}/minimax_m2.slurm {STAGES[found.stage]}"]
        if config.plan.nodes > 1
        else [run]
    )


def planned_tokens(config: Config) -> dict[str, int]:
    """Tokens of an epoch by stage, as stated."""
    return {
        "domain": config.plan.domain_tokens or DOMAIN_TOKENS,
        "task": config.plan.task_tokens or TASK_TOKENS,
    }


def hours(config: Config, stage: str, rate: float, tokens: int) -> float:
    """Training time of a stage over `tokens` tokens an epoch."""
    train = getattr(config, stage).train
    wanted = tokens * train.epochs
    if train.max_steps:
        wanted = min(wanted, train.max_steps * train.batch_tokens)
    return wanted / rate / 3600


def report(config: Config, sizes: ModelSizes, base: Dtype, tokens: dict[str, int]) -> tuple[list[str], dict[str, Any]]:
    """The whole plan: lines for a person, and the same for a program. `tokens` of an epoch by stage."""
    plan = config.plan
    gpus = f"{plan.nodes} x {plan.gpus} GPUs of {plan.gpu_memory_gib:g} GiB"
    lines = [headline(sizes, base), f"planned for {gpus}, {plan.headroom_gib:g} GiB of each for what is not a tensor"]
    facts: dict[str, Any] = {"parameters": sizes.total, "active_parameters": sizes.active, "stages": {}}
    for stage in STAGES:
        found = choices(config, sizes, base, stage)
        asked = found[0]
        lines += ["", f"{stage} adapter: trains {trainable(sizes, asked.step.adapter)}"]
        if sizes.experts:
            other = replace(asked.step.adapter, experts=not asked.step.adapter.experts)
            name = "with the experts" if other.experts else "without the experts"
            lines.append(f"  {name} it would be {trainable(sizes, other)}")
        lines += _table(found)
        lines += _checkpointing(sizes, asked)
        lines += [f"  {verdict(asked, plan)}"]
        lines += [f"  instead: {change}" for change in changes(config, sizes, asked)]
        if asked.step.below and asked.step.below.experts:
            lines.append(f"  {BOTH_ON_EXPERTS}")
        sharded = asked.shards > 1
        takes = hours(config, stage, asked.tokens_per_second, tokens[stage])
        lines.append(
            f"  {asked.tokens_per_second:,.0f} tokens/s if {plan.utilisation:.0%} of {plan.gpu_tflops:g} TFLOP/s a GPU "
            f"is reached: {duration(takes)} for {tokens[stage]:,} tokens an epoch"
        )
        lines += [f"  {line}" for line in launching(config, sizes, asked)]
        facts["stages"][stage] = {
            "trainable_parameters": sum(estimates.lora_parameters(sizes, asked.step.adapter).values()),
            "verdict": asked.verdict,
            "peak_bytes": [asked.low.total, asked.high.total],
            "tokens_per_second": round(asked.tokens_per_second, 1),
            "hours": round(takes, 3),
            "launch_file": launch_file(sizes, plan, sharded=sharded),
            "command": command(config, sizes, stage, sharded=sharded) if asked.verdict != "no" else None,
            "choices": [
                {"name": c.name, "verdict": c.refused or c.verdict, "low": asdict(c.low), "high": asdict(c.high)}
                for c in found
            ],
        }
    if sizes.experts:
        lines += ["", EXPECT_LESS]
    lines += ["", *loading(config, sizes, base, sharded=sharded), *stored(config, sizes)]
    if sizes.stored == "fp8":
        lines.append(
            "fp8 rows hold where training keeps the weights FP8 (compute capability 8.9, the `kernels` package,"
        )
        lines.append(
            "adapters on the attention alone; --base.fp8); everything else becomes bfloat16 while it is loaded"
        )
    return lines, facts


def loading(config: Config, sizes: ModelSizes, base: Dtype, *, sharded: bool) -> list[str]:
    """Host memory of a node, of the first if the model is dealt out, while the weights are loaded."""
    plan = config.plan
    needed = estimates.loading_bytes(sizes, base, processes=plan.gpus, sharded=sharded)
    how = (
        "one copy in the first process, which deals it out" if sharded else f"a copy for each of {plan.gpus} processes"
    )
    enough = "fits" if needed <= plan.host_memory_gib * GIB else "does NOT fit"
    return [f"host memory while loading: {gib(needed)} of {plan.host_memory_gib:g} a node ({how}): {enough}"]


def stored(config: Config, sizes: ModelSizes) -> list[str]:
    """Disk of the download, of training, and of a merge."""
    merged: Dtype = (
        "fp8" if config.merge.dtype == "fp8" else "float32" if config.merge.dtype == "float32" else "bfloat16"
    )
    parts = [f"download {gb(estimates.weight_bytes(sizes, sizes.stored))}"]
    for stage in STAGES:
        section = getattr(config, stage)
        found = estimates.disk(
            sizes, adapter(section.lora), keep_checkpoints=section.train.keep_checkpoints, merged=merged
        )
        parts.append(f"{stage} checkpoints {gb(found.checkpoints)} and adapter {gb(found.adapter)}")
    parts.append(f"merged model in {merged} {gb(found.merged)}")
    return ["disk: " + ", ".join(parts)]


def _alternatives(
    config: Config, sizes: ModelSizes, found: StagePlan
) -> Iterator[tuple[str, PlanSection, TrainingStep]]:
    """(flags, hardware, step) of what could be changed, the cheapest for the result first."""
    plan, what, stage = config.plan, found.step, found.stage
    if not what.checkpointing:
        yield f"--{stage}.train.gradient_checkpointing true", plan, replace(what, checkpointing=True)
    for tokens in (2048, 1024, 512):
        if tokens < what.row_tokens:
            flags = f"--{stage}.train.sequence_tokens {tokens} --{stage}.train.micro_batch_tokens {tokens}"
            yield flags, plan, replace(what, tokens=tokens, row_tokens=tokens, checkpointing=what.checkpointing)
        elif tokens < what.tokens:
            yield f"--{stage}.train.micro_batch_tokens {what.row_tokens}", plan, replace(what, tokens=what.row_tokens)
    if what.adapter.experts:
        plain = replace(what.adapter, experts=False)
        yield f"--{stage}.lora.experts false", plan, replace(what, adapter=plain)
    if what.below and what.below.experts:
        yield "merge the domain adapter into the base, then --task.on base", plan, replace(what, below=None)
    if sizes.stored == "fp8" and what.base != "fp8" and not what.adapter.experts:
        yield "--base.fp8 native", plan, replace(what, base="fp8")
    if plan.gpu_memory_gib < LARGE_GPU_GIB:
        yield "GPUs of 141 GB", plan.model_copy(update={"gpu_memory_gib": 141.0}), what
    for nodes in (2, 4, 8):
        if nodes > plan.nodes:
            yield f"{nodes} nodes of {plan.gpus} GPUs", plan.model_copy(update={"nodes": nodes}), what


def _table(found: list[StagePlan]) -> list[str]:
    titles = ("weights", "gathered", "adapters", "kept", "passing", "experts", "peak GiB")
    lines = [" " * 42 + "".join(f"{title:>12}" for title in titles)]
    for one in found:
        low, high = asdict(one.low), asdict(one.high)
        if one.refused:
            lines.append(f"  {one.name:<40}refused: {one.refused}")
            continue
        columns = [*((low[k], high[k]) for k in low), (one.low.total, one.high.total)]
        lines.append(f"  {one.name:<40}" + "".join(f"{_range(*pair):>12}" for pair in columns) + f"  {one.verdict}")
    return lines


def _checkpointing(sizes: ModelSizes, found: StagePlan) -> list[str]:
    parts = []
    for on in (True, False):
        memory = estimates.training_memory(sizes, replace(found.step, checkpointing=on), shards=found.shards)
        parts.append(f"{gib(memory.kept + memory.passing)} {'with' if on else 'without'} checkpointing")
    rows = max(1, math.floor(found.step.tokens / found.step.row_tokens))
    return [f"  activations of {rows} x {found.step.row_tokens:,} tokens: {', '.join(parts)}"]


def _range(low: int, high: int) -> str:
    a, b = f"{low / GIB:.1f}", f"{high / GIB:.1f}"
    return a if a == b else f"{a}-{b}"


def _weights(sizes: ModelSizes, dtype: Dtype) -> str:
    return f"weights {gib(estimates.weight_bytes(sizes, dtype))}"


def duration(hours: float) -> str:
    """Hours, or minutes below one."""
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def gib(amount: float) -> str:
    """Memory, as GPUs are sold and asked: in powers of two."""
    return f"{amount / GIB:,.1f} GiB" if amount >= GIB / 10 else f"{amount / 2**20:,.1f} MiB"


def gb(amount: float) -> str:
    """Disk, as it is sold: in powers of ten."""
    return f"{amount / 1e9:,.1f} GB" if amount >= 1e8 else f"{amount / 1e6:,.1f} MB"
