"""One way to train a stage on planned hardware: memory, time, and the best micro-batch, recomputation and sharding.

What is varied here decides nothing about the result but rounding. `ways` varies what does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from config import USUAL_ROW_TOKENS, Config, LoraSection
from utils.models.model_shapes import Dtype, ModelSizes
from utils.models.process_layout import ProcessLayout
from utils.planning import estimates, pass_times
from utils.planning.estimates import Adapter, Fit, TrainingMemory, TrainingStep
from utils.planning.hardware import Hardware
from utils.planning.memory.native_fp8 import LEAST_CAPABILITY
from utils.planning.pass_times import PassTime

ORDER: tuple[Fit, ...] = ("no", "tight", "fits")
# a faster micro-batch than the configured one has to be this much faster
WORTH_CHANGING = 1.05
# no larger pass is looked at: what is left to gain is small, and memory is needed for what no arithmetic knows
MOST_PASS_TOKENS = 65_536
ON_FP8_EXPERTS = "adapters on FP8 experts are silently wrong"


@dataclass(frozen=True)
class StagePlan:
    """One way to train a stage, and what it takes of one GPU. `low` and `high` differ in what may overlap."""

    stage: str
    step: TrainingStep
    layout: ProcessLayout
    batch_tokens: int
    low: TrainingMemory
    high: TrainingMemory
    verdict: Fit
    time: PassTime
    refused: str = ""

    @property
    def name(self) -> str:
        experts = " with experts" if self.step.adapter.experts else ""
        return f"{self.stage} rank {self.step.adapter.rank}{experts}, {self.step.base}"

    @property
    def rates(self) -> tuple[float, float]:
        """Trained tokens per second of all GPUs, at least and at most; GPUs for which a step has no rows wait."""
        passes = math.ceil(self.batch_tokens / (self.step.tokens * self.layout.processes))
        return self.batch_tokens / (passes * self.time.most), self.batch_tokens / (passes * self.time.least)


def adapter(lora: LoraSection, *, experts: bool | None = None) -> Adapter:
    """The planner's view of an adapter's settings."""
    return Adapter(lora.target_modules, lora.rank, lora.experts if experts is None else experts)


def step(config: Config, stage: str, base: Dtype) -> TrainingStep:
    """The forward and backward pass that a stage's settings ask for."""
    section = getattr(config, stage)
    row_tokens = section.train.max_sequence_tokens or USUAL_ROW_TOKENS
    below = adapter(config.domain.lora) if stage == "task" and config.task.on != "base" else None
    return TrainingStep(
        base=base,
        adapter=adapter(section.lora),
        tokens=max(section.train.micro_batch_tokens, row_tokens),
        row_tokens=row_tokens,
        packed=stage == "domain",
        checkpointing=section.train.gradient_checkpointing,
        below=below,
    )


def choice(sizes: ModelSizes, hardware: Hardware, stage: str, what: TrainingStep, batch_tokens: int) -> StagePlan:
    """The fastest layout of those that fit, else of those that are tight, else the one that takes least memory."""
    return _best(layouts(sizes, hardware, stage, what, batch_tokens))


def tuned(sizes: ModelSizes, hardware: Hardware, stage: str, what: TrainingStep, batch_tokens: int) -> StagePlan:
    """As `choice`, with the fastest micro-batch and recomputation; the configured ones unless it is worth it."""
    configured_plan = choice(sizes, hardware, stage, what, batch_tokens)
    best = _best([configured_plan, *by_layout(sizes, hardware, stage, what, batch_tokens)])
    same = ORDER.index(best.verdict) == ORDER.index(configured_plan.verdict) != ORDER.index("no")
    return configured_plan if same and best.rates[0] < WORTH_CHANGING * configured_plan.rates[0] else best


def by_layout(
    sizes: ModelSizes, hardware: Hardware, stage: str, what: TrainingStep, batch_tokens: int
) -> list[StagePlan]:
    """The best plan of each layout, with the micro-batch and recomputation that are the fastest there."""
    alternatives: dict[ProcessLayout, list[StagePlan]] = {}
    for tokens in _pass_tokens(what, batch_tokens, hardware.processes):
        for checkpointing in (what.checkpointing, not what.checkpointing):
            other = replace(what, tokens=tokens, checkpointing=checkpointing)
            for plan in layouts(sizes, hardware, stage, other, batch_tokens):
                alternatives.setdefault(plan.layout, []).append(plan)
    return [_best(plans) for plans in alternatives.values()]


def verdict_of(plans: Iterable[Fit]) -> Fit:
    """The worst."""
    return min(plans, key=ORDER.index)


def layouts(
    sizes: ModelSizes, hardware: Hardware, stage: str, what: TrainingStep, batch_tokens: int
) -> list[StagePlan]:
    """The same step in every layout that the hardware and the form of the weights allow."""
    plans = []
    for layout in hardware.layouts_of(sizes, what.base):
        low, high = (
            estimates.training_memory(
                *(sizes, what),
                shards=layout.shard,
                expert_ranks=layout.expert,
                imbalance=hardware.imbalance(sizes, layout),
                careful=careful,
            )
            for careful in (False, True)
        )
        passes = max(1, batch_tokens // (what.tokens * layout.processes))
        time = pass_times.training_pass(sizes, what, layout, hardware, passes_per_step=passes)
        verdict = estimates.verdict(low.total, high.total, hardware.memory_bytes)
        refused = _refused(what, hardware)
        plans.append(StagePlan(stage, what, layout, batch_tokens, low, high, verdict, time, refused))
    return plans


def _refused(what: TrainingStep, hardware: Hardware) -> str:
    """Why this cannot be done whatever the memory."""
    if what.base != "fp8":
        return ""
    if what.adapter.experts or (what.below is not None and what.below.experts):
        return ON_FP8_EXPERTS
    if hardware.capability < LEAST_CAPABILITY:
        has = ".".join(map(str, hardware.capability))
        return f"FP8 takes compute capability 8.9, this GPU ({hardware.card}) has {has}"
    return ""


def _best(plans: list[StagePlan]) -> StagePlan:
    def rank(plan: StagePlan) -> tuple[int, float]:
        fits = ORDER.index(plan.verdict)
        return fits, plan.rates[0] if fits else -plan.low.total

    return max(plans, key=rank)  # of equals the first


def _pass_tokens(what: TrainingStep, batch_tokens: int, processes: int) -> list[int]:
    """Rows of this length in powers of two, up to what a step has for each rank."""
    most = min(MOST_PASS_TOKENS, max(what.row_tokens, batch_tokens // processes))
    rows = [what.row_tokens * 2**power for power in range(16)]
    return sorted({tokens for tokens in rows if tokens <= most})
