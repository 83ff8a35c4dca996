"""A plan in words: what a stage trains, what every stage takes on the planned hardware, why, and the commands.

No torch here: `--dry-run` answers in a second. Sizes come from `count_parameters` (meta device) or `architectures`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from config import Config, PlanSection, reason_of
from utils import flags
from utils.models.model_shapes import GIB, Dtype, ModelSizes
from utils.planning import (
    estimates,
    fitting_settings,
    hardware,
    smallest_hardware,
    stage_commands,
    stage_costs,
    training_plan,
)
from utils.planning.estimates import Adapter
from utils.planning.fitting_settings import Way
from utils.planning.planned_data import PlannedData
from utils.planning.stage_commands import STAGES
from utils.planning.stage_costs import StageCost
from utils.planning.training_plan import StagePlan

BOTH_ON_EXPERTS = (
    "the domain adapter below is on the experts: merged into the base first (inference.py --adapters domain "
    "--merge_path DIR, then --base.source DIR --task.on base) it takes no memory of its own"
)
NOT_COUNTED = (
    "not counted: checkpoints, waiting for the slowest rank, kernels below that share of the peak (mixtures of "
    "experts); real times are longer"
)


def choices(config: Config, sizes: ModelSizes, base: Dtype, stage: str) -> list[StagePlan]:
    """The configured settings first, then the other base dtype and the other answer to whether experts are adapted."""
    step, machine = training_plan.step(config, stage, base), _machine(config)
    kinds = [step.adapter.experts, not step.adapter.experts] if sizes.experts else [False]
    bases = [base, "fp8"] if sizes.stored == "fp8" and base != "fp8" else [base]
    plans = []
    for dtype in bases:
        for experts in kinds:
            what = replace(step, base=dtype, adapter=replace(step.adapter, experts=experts))
            plans.append(training_plan.choice(sizes, machine, stage, what, getattr(config, stage).train.batch_tokens))
    return plans


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


def verdict(stage_plan: StagePlan, plan: PlanSection) -> str:
    """One choice against the memory there is."""
    says = {"fits": "fits", "tight": "tight", "no": "does NOT fit"}[stage_plan.verdict]
    peak = between(gib(stage_plan.low.total), gib(stage_plan.high.total))
    usable = gib(hardware.of(plan).memory_bytes)
    return f"{stage_plan.name}: {peak} of {usable} usable per GPU, {stage_plan.layout}: {stage_plan.refused or says}"


def speed(stage_plan: StagePlan, plan: PlanSection) -> str:
    """Tokens per second, and what was assumed."""
    gpus = stage_plan.layout.processes
    all_of, each = (between(*(f"{rate / share:,.0f}" for rate in stage_plan.rates)) for share in (1, gpus))
    assumed = f"{plan.utilisation:.0%} of {hardware.peak_tflops(plan):g} TFLOP/s a GPU"
    shown = ", ".join(
        f"{name} {seconds:.3g} s" for name, seconds in (stage_plan.time.own | stage_plan.time.sent).items()
    )
    return (
        f"{all_of} tokens/s ({each} a GPU): a pass of {stage_plan.step.tokens:,} tokens takes {shown}; "
        f"{stage_plan.time.bound} bound it; arithmetic at {assumed}"
    )


def report(config: Config, sizes: ModelSizes, data: PlannedData) -> tuple[list[str], dict[str, Any]]:
    """The whole plan: lines for a person, and the same for a program."""
    plan, base = config.plan, fitting_settings.planned_base(config)
    way, machine = fitting_settings.find(config, sizes), hardware.of(config.plan)
    gpus = f"{plan.nodes} x {plan.gpus} GPUs of {plan.gpu_memory_gib:g} GiB"
    lines = [
        headline(sizes, base),
        f"preset {config.preset}: {reason_of(config.preset)}",
        f"planned for {gpus} (as {machine.card}), {plan.headroom_gib:g} GiB of each for what is not a tensor; each GPU "
        f"receives {machine.node_rate / 1e9:g} GB/s in its node and {machine.network_rate / 1e9:g} GB/s between nodes",
    ]
    facts: dict[str, Any] = {"parameters": sizes.total, "active_parameters": sizes.active, "stages": {}}
    for stage in STAGES:
        lines += ["", *_training(config, sizes, base, way, stage)]
    costs = stage_costs.every_stage(way, sizes, data)
    lines += ["", "chosen, and why:", *(f"  {reason}" for reason in way.why if reason)]
    lines += ["", *_stages(costs), "", f"times count {_counted(config, data)}", NOT_COUNTED]
    lines += ["", *loading(way, sizes), *stored(config, sizes)]
    verdict_of_all = training_plan.verdict_of(cost.verdict for cost in costs)
    if verdict_of_all == "no":
        lines += ["", *instead(config, sizes)]
    for cost in costs:
        facts["stages"][cost.stage] = {
            "command": None if cost.verdict == "no" else cost.command,
            "verdict": cost.verdict,
            "peak_bytes": list(cost.peak),
            "host_bytes": cost.host,
            "hours": [round(seconds / 3600, 4) for seconds in cost.seconds],
            "bound": cost.bound,
            "note": cost.note,
        }
    for stage in STAGES:
        facts["stages"][stage] |= _facts(config, sizes, base, way, stage)
    facts |= {"verdict": verdict_of_all, "why": [reason for reason in way.why if reason]}
    return lines, facts


def instead(config: Config, sizes: ModelSizes) -> list[str]:
    """What other hardware does it, the least memory first."""
    options = smallest_hardware.smallest(config, sizes)
    if not options:
        return ["no hardware that is looked at (up to 32 GPUs) fits: take a smaller model with --base.source"]
    return [
        "these GPUs cannot do it, whatever the settings. What does:",
        *(f"  {name}: {_peaks(way)} per GPU, {way.verdict}" for name, way in options),
    ]


def changes(config: Config, sizes: ModelSizes) -> list[str]:
    """The flags that make the trainings fit, or other hardware; empty where the configured settings fit."""
    base, machine = fitting_settings.planned_base(config), _machine(config)
    stage_plans = [
        training_plan.choice(
            sizes, machine, stage, training_plan.step(config, stage, base), getattr(config, stage).train.batch_tokens
        )
        for stage in STAGES
    ]
    if all(plan.verdict == "fits" for plan in stage_plans):
        return []
    way = fitting_settings.find(config, sizes)
    if way.verdict == "no":
        return [line.strip() for line in instead(config, sizes)[:4]]
    flags = " ".join(_differences(config, way.config))
    return [f"{flags or 'as it is'}: {_peaks(way)}, {way.verdict}"]


def loading(way: Way, sizes: ModelSizes) -> list[str]:
    """Host memory of a node while the weights are loaded."""
    plan, layout = way.config.plan, way.scoring.layout
    needed = estimates.loading_bytes(
        sizes, way.form.scored, processes=min(plan.gpus, layout.processes), sharded=layout.is_sharded
    )
    how = "each rank reads its shard" if layout.is_sharded else "a copy for each rank"
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
        what = training_plan.adapter(section.lora)
        disk = stage_costs.disk(sizes, what, keep_checkpoints=section.train.keep_checkpoints, merged=merged)
        parts.append(f"{stage} checkpoints {gb(disk.checkpoints)} and adapter {gb(disk.adapter)}")
    parts.append(f"merged model in {merged} {gb(disk.merged)}")
    return ["disk: " + ", ".join(parts)]


def _training(config: Config, sizes: ModelSizes, base: Dtype, way: Way, stage: str) -> list[str]:
    """The table of forms with the configured settings, and the settings that were chosen."""
    plans = choices(config, sizes, base, stage)
    configured_plan, chosen = plans[0], way.trainings[stage]
    lines = [f"{stage} adapter: trains {trainable(sizes, configured_plan.step.adapter)}"]
    if sizes.experts:
        other = replace(configured_plan.step.adapter, experts=not configured_plan.step.adapter.experts)
        name = "with the experts" if other.experts else "without the experts"
        lines.append(f"  {name} it would be {trainable(sizes, other)}")
    lines += ["  with the settings as they are:", *_table(plans), f"  chosen: {verdict(chosen, config.plan)}"]
    lines.append(f"  {speed(chosen, config.plan)}")
    lines += _layouts(config, sizes, way, stage)
    if chosen.step.below and chosen.step.below.experts:
        lines.append(f"  {BOTH_ON_EXPERTS}")
    if config.plan.nodes > 1:
        script = stage_commands.COMMANDS[stage].script
        lines.append(f"  with Slurm: sbatch {stage_commands.LAUNCH}/minimax_m2.slurm scripts/{script}.py ...")
    return lines


def _compared(config: Config, sizes: ModelSizes, way: Way, stage: str) -> list[StagePlan]:
    """The chosen plan's step in every layout, each with its best micro-batch; the chosen one as it is."""
    chosen, machine = way.trainings[stage], _machine(config)
    best = training_plan.by_layout(sizes, machine, stage, chosen.step, chosen.batch_tokens)
    return [chosen if one.layout == chosen.layout else one for one in best]


def _layouts(config: Config, sizes: ModelSizes, way: Way, stage: str) -> list[str]:
    """Every layout of the weights, where there are several, with its rate and memory."""
    plans, chosen = _compared(config, sizes, way, stage), way.trainings[stage].layout
    if len(plans) == 1:
        return []
    lines = ["  layouts, each with its fastest micro-batch:"]
    for one in plans:
        rate = between(*(f"{rate / one.layout.processes:,.0f}" for rate in one.rates))
        peak = between(f"{one.low.total / GIB:.0f}", f"{one.high.total / GIB:.0f}")
        words = f"{rate} tokens/s a GPU, {peak} GiB, {one.step.tokens:,} tokens a pass, bound by {one.time.bound}"
        lines.append(f"    {one.layout}: {words}: {one.verdict}{', chosen' if one.layout == chosen else ''}")
    return lines


def _machine(config: Config) -> hardware.Hardware:
    return hardware.of(config.plan, config.run.expert_parallel)


def _facts(config: Config, sizes: ModelSizes, base: Dtype, way: Way, stage: str) -> dict[str, Any]:
    chosen = way.trainings[stage]
    return {
        "trainable_parameters": sum(estimates.lora_parameters(sizes, chosen.step.adapter).values()),
        "tokens_per_second": [round(rate, 1) for rate in chosen.rates],
        "launch_file": stage_commands.launch_file(config.plan, chosen.layout),
        "layout": asdict(chosen.layout),
        "layouts": [
            {
                "layout": asdict(one.layout),
                "tokens_per_second_per_gpu": [round(rate / one.layout.processes, 1) for rate in one.rates],
                "peak_bytes": [one.low.total, one.high.total],
                "pass_tokens": one.step.tokens,
                "seconds": one.time.own | one.time.sent,
                "verdict": one.verdict,
            }
            for one in _compared(config, sizes, way, stage)
        ],
        "settings": _differences(config, way.config),
        "choices": [
            {"name": c.name, "verdict": c.refused or c.verdict, "low": asdict(c.low), "high": asdict(c.high)}
            for c in choices(config, sizes, base, stage)
        ],
    }


def _stages(costs: list[StageCost]) -> list[str]:
    """A table of every stage, and below it the commands."""
    lines = [f"{'stage':<10}{'GiB per GPU':>14}{'main memory':>14}{'time':>22}  bound by    verdict"]
    for cost in costs:
        low, high = (amount / GIB for amount in cost.peak)
        peak = between(f"{low:.1f}", f"{high:.1f}", "-") if high else "-"
        time = between(*(duration(seconds / 3600) for seconds in cost.seconds))
        host = gib(cost.host) if cost.host else "-"
        lines.append(f"{cost.stage:<10}{peak:>14}{host:>14}{time:>22}  {cost.bound:<12}{cost.verdict}  {cost.note}")
    lines.append("")
    for cost in costs:
        lines.append(f"{cost.stage}: {cost.command if cost.verdict != 'no' else 'not on this hardware'}")
    return lines


def _counted(config: Config, data: PlannedData) -> str:
    plan = config.plan
    return (
        f"{data.domain_tokens:,} tokens of documents and {data.task_tokens:,} of pairs an epoch, {data.test_items:,} "
        f"test questions of {data.item_tokens:,} tokens, arithmetic at {plan.utilisation:.0%} of the peak, gathers and "
        f"gradients (hidden or not), and reading the model at {plan.disk_bandwidth_gbs:g} GB/s"
    )


def _table(plans: list[StagePlan]) -> list[str]:
    titles = ("weights", "gathered", "adapters", "saved act.", "workspace", "experts", "peak GiB")
    lines = [" " * 42 + "".join(f"{title:>12}" for title in titles)]
    for one in plans:
        low, high = asdict(one.low), asdict(one.high)
        if one.refused:
            lines.append(f"  {one.name:<40}refused: {one.refused}")
            continue
        columns = [*((low[k], high[k]) for k in low), (one.low.total, one.high.total)]
        lines.append(f"  {one.name:<40}" + "".join(f"{_range(*pair):>12}" for pair in columns) + f"  {one.verdict}")
    return lines


def _peaks(way: Way) -> str:
    lows, highs = zip(*(fitting_settings.gib_of(plan) for plan in (*way.trainings.values(), way.scoring)), strict=True)
    return f"{between(f'{max(lows):.1f}', f'{max(highs):.1f}')} GiB"


def _differences(config: Config, chosen: Config) -> list[str]:
    """The flags of what was chosen."""
    return [
        f"--{path} {flags.shown(flags.value_of(chosen, path))}"
        for path in flags.fields()
        if flags.value_of(chosen, path) != flags.value_of(config, path)
    ]


def _range(low: int, high: int) -> str:
    return between(f"{low / GIB:.1f}", f"{high / GIB:.1f}", "-")


def between(least: str, most: str, to: str = " to ") -> str:
    """A range, or one value where both are written alike."""
    return least if least == most else f"{least}{to}{most}"


def _weights(sizes: ModelSizes, dtype: Dtype) -> str:
    return f"weights {gib(estimates.weight_bytes(sizes, dtype))}"


def duration(hours: float) -> str:
    """Hours, or minutes below one, or seconds below one of those."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.0f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"


def gib(amount: float) -> str:
    """Memory, as GPUs are sold and asked: in powers of two."""
    return f"{amount / GIB:,.1f} GiB" if amount >= GIB / 10 else f"{amount / 2**20:,.1f} MiB"


def gb(amount: float) -> str:
    """Disk, as it is sold: in powers of ten."""
    return f"{amount / 1e9:,.1f} GB" if amount >= 1e8 else f"{amount / 1e6:,.1f} MB"
