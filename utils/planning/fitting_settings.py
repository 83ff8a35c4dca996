"""Finding a way: the settings that make a model trainable on planned hardware, the cheapest for the result first.

Forms of the frozen weights are tried in the order of what they cost: as configured; FP8 that stays FP8; 8 bits; 4 bits.
For each, micro-batch, recomputation and sharding are what is fastest (`training_plan`). Only where no form fits is
changed what is learnt: shorter rows, no adapters on experts. Where that does not help, other hardware is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from config import USUAL_ROW_TOKENS, Config
from utils.models.model_shapes import GIB, PLAIN, Dtype, ModelSizes
from utils.models.process_layout import ProcessLayout
from utils.planning import estimates, hardware, pass_times, training_plan
from utils.planning.estimates import Fit, InferenceMemory
from utils.planning.hardware import Hardware
from utils.planning.memory.native_fp8 import KERNELS, LEAST_CAPABILITY
from utils.planning.stage_commands import STAGES
from utils.planning.training_plan import ORDER, StagePlan, verdict_of

SHORTER_ROWS = (4096, 2048, 1024, 512)
# a search and an evaluation have the adapters of both stages on the model
_BITS: tuple[tuple[Dtype, str], ...] = (
    ("int8", "8 bits of bitsandbytes: slower, nearly the same losses"),
    ("nf4", "4 bits of bitsandbytes (QLoRA): the smallest, at a small loss of quality"),
)


# prompts that are answered as one batch: few of any length, more where they are short
LEAST_ANSWERS, MOST_ANSWERS, ANSWERING_TOKENS = 8, 32, 4096


def answers_at_once(tokens: int) -> int:
    """How many answers are generated as one batch, of which the longest has so many tokens with its prompt."""
    return max(LEAST_ANSWERS, min(MOST_ANSWERS, ANSWERING_TOKENS // tokens))


@dataclass(frozen=True)
class Form:
    """The frozen weights in training and elsewhere, the settings that ask for them, and what they cost."""

    trained: Dtype
    scored: Dtype
    settings: dict[str, Any] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True)
class ScoringPlan:
    """Scoring or answering: the layout, memory of one GPU, and the tokens of one pass."""

    layout: ProcessLayout
    tokens: int
    low: InferenceMemory
    high: InferenceMemory
    verdict: Fit


@dataclass(frozen=True)
class Way:
    """Settings for everything, with the plan of each training, of scoring and of answering. `config` has them."""

    config: Config
    form: Form
    trainings: dict[str, StagePlan]
    scoring: ScoringPlan
    answering: ScoringPlan
    why: tuple[str, ...]

    @property
    def verdicts(self) -> list[Fit]:
        trained: list[Fit] = ["no" if plan.refused else plan.verdict for plan in self.trainings.values()]
        return [*trained, self.scoring.verdict, self.answering.verdict]

    @property
    def verdict(self) -> Fit:
        return verdict_of(self.verdicts)


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """The configuration with other values, checked again; `domain.train.max_steps` -> 3."""
    values = config.model_dump()
    for path, value in settings.items():
        *sections, name = path.split(".")
        reduce(dict.__getitem__, sections, values)[name] = value
    return Config.model_validate(values)


def planned_base(config: Config) -> Dtype:
    """The form that the settings ask for on a GPU: auto is bfloat16 there."""
    if config.base.quantization != PLAIN:
        return config.base.quantization
    return "float32" if config.base.dtype == "float32" else "bfloat16"


def find(config: Config, sizes: ModelSizes) -> Way:
    """The first way of which most fits; where nothing fits, the one that comes nearest."""
    machine = hardware.of(config.plan, config.run.expert_parallel)
    unchanged: list[Way] = []
    for changed in _learning(config, sizes):
        candidates = []
        for form in forms(config, sizes, machine):
            candidates.append(_way(changed, config, sizes, machine, form))
            if candidates[-1].verdict == "fits":
                return candidates[-1]
        unchanged = unchanged or candidates
        if any(way.verdict != "no" for way in candidates):
            return _nearest(candidates)
    return _nearest(unchanged)


def forms(config: Config, sizes: ModelSizes, machine: Hardware) -> Iterator[Form]:
    """The forms of the frozen weights that the settings leave open, the cheapest for the result first."""
    base, fp8 = planned_base(config), config.base.fp8
    on_experts = any(getattr(config, stage).lora.experts for stage in STAGES)
    can_stay = sizes.stored == "fp8" and base == "bfloat16" and machine.capability >= LEAST_CAPABILITY
    can_stay = can_stay and not on_experts
    if not (can_stay and fp8 == "native"):
        settings = {"base.fp8": "dequantise"} if can_stay else {}
        yield Form(
            base, base, settings, f"{base}, as configured" if sizes.stored != "fp8" else "de-quantised to bfloat16"
        )
    if can_stay and fp8 != "dequantise":
        why = f"FP8 stays FP8 in training, at half the bytes; it takes a package: pip install '{KERNELS}'"
        yield Form("fp8", base, {"base.fp8": "native"}, why)
    if config.base.quantization == PLAIN and sizes.stored != "fp8" and not sizes.experts:
        for bits, why in _BITS:
            yield Form(bits, bits, {"base.quantization": bits}, why)


def _learning(config: Config, sizes: ModelSizes) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes of what is learnt, none first: (settings, what they cost)."""
    yield {}, ""
    for tokens in SHORTER_ROWS:
        stages = [stage for stage in STAGES if tokens < getattr(config, stage).train.max_sequence_tokens]
        if stages:
            names = ("max_sequence_tokens", "micro_batch_tokens")
            settings = {f"{stage}.train.{name}": tokens for stage in stages for name in names}
            yield settings, f"rows of {tokens:,} tokens: longer documents are cut, longer pairs left out"
    on_experts = [stage for stage in STAGES if getattr(config, stage).lora.experts]
    if sizes.experts and on_experts:
        yield {f"{stage}.lora.experts": False for stage in on_experts}, "adapters on the attention alone"


def _way(changed: tuple[dict[str, Any], str], config: Config, sizes: ModelSizes, machine: Hardware, form: Form) -> Way:
    settings, cost = changed
    form_config = with_settings(config, settings | form.settings)
    plans, chosen, reasons = {}, dict(settings), [form.why, *([cost] if cost else [])]
    for stage in STAGES:
        train = getattr(form_config, stage).train
        what = training_plan.step(form_config, stage, form.trained)
        plan = training_plan.tuned(sizes, machine, stage, what, train.batch_tokens)
        plans[stage] = plan
        reasons += _layout_reason(plan, training_plan.layouts(sizes, machine, stage, plan.step, train.batch_tokens))
        if plan.step.tokens != train.micro_batch_tokens:
            chosen[f"{stage}.train.micro_batch_tokens"] = plan.step.tokens
            reasons.append(_tokens_reason(stage, plan, train.micro_batch_tokens))
        if plan.step.checkpointing != train.gradient_checkpointing:
            chosen[f"{stage}.train.gradient_checkpointing"] = plan.step.checkpointing
            reasons.append(
                f"{stage}: activations are recomputed, which is exact and takes a third more arithmetic"
                if plan.step.checkpointing
                else f"{stage}: activations fit, so they are not recomputed"
            )
    adapters = [training_plan.adapter(getattr(form_config, stage).lora) for stage in STAGES]
    scoring = _scoring(form_config, sizes, machine, form, adapters)
    if scoring.tokens != form_config.evaluate.batch_tokens:
        chosen["evaluate.batch_tokens"] = scoring.tokens
        reasons.append(f"scoring: {scoring.tokens:,} tokens a pass (memory allows no more)")
    answering = _answering(form_config, sizes, machine, form, adapters)
    chosen_config = with_settings(config, chosen | form.settings)
    return Way(chosen_config, form, plans, scoring, answering, tuple(reasons))


def _layout_reason(plan: StagePlan, others: list[StagePlan]) -> list[str]:
    """Why the weights are where they are; nothing where there is one GPU."""
    if plan.layout.processes == 1:
        return []
    if not plan.layout.is_sharded:
        return [f"{plan.stage}: {plan.layout}, so nothing is gathered"]
    whole = next((other for other in others if not other.layout.is_sharded), None)
    reason = f"{plan.stage}: {plan.layout}"
    if whole is not None and whole.verdict != "fits":
        reason += f"; whole it takes {whole.low.total / GIB:,.0f} GiB of each GPU"
    for other in others:
        if other.layout.is_sharded and other.layout != plan.layout:
            is_worse = ORDER.index(other.verdict) < ORDER.index(plan.verdict)
            label = {"no": "does not fit", "tight": "tight", "fits": "no faster"}[other.verdict if is_worse else "fits"]
            reason += f"; {other.layout}: {label}"
    return [reason]


def _tokens_reason(stage: str, plan: StagePlan, configured: int) -> str:
    rate, processes = plan.rates[0] / plan.layout.processes, plan.layout.processes
    if plan.step.tokens > configured:
        why = "gathers are shared by more tokens" if plan.layout.is_sharded else "memory is there"
    else:
        shared = configured * processes > plan.batch_tokens
        why = "so that a step has rows for every GPU" if shared else "memory allows no more"
    bound = f"{plan.time.bound} then bound it at {rate:,.0f} tokens/s/GPU"
    return f"{stage}: {plan.step.tokens:,} tokens a pass ({why}); {bound}"


def _scoring(
    config: Config, sizes: ModelSizes, machine: Hardware, form: Form, adapters: list[estimates.Adapter]
) -> ScoringPlan:
    """Scoring with the configured tokens a pass, or with half as many as often as it takes to fit."""
    row = max(getattr(config, stage).train.max_sequence_tokens or USUAL_ROW_TOKENS for stage in STAGES)
    plans, tokens = [], config.evaluate.batch_tokens
    while True:
        fitting = []
        for layout in machine.layouts_of(sizes, form.scored):
            low, high = (
                estimates.scoring_memory(
                    *(sizes, form.scored, adapters, tokens, min(row, tokens)),
                    shards=layout.shard,
                    expert_ranks=layout.expert,
                    imbalance=machine.imbalance(sizes, layout),
                    careful=careful,
                )
                for careful in (False, True)
            )
            verdict = estimates.verdict(low.total, high.total, machine.memory_bytes)
            plans.append(ScoringPlan(layout, tokens, low, high, verdict))
            fitting += plans[-1:] if verdict == "fits" else []
        if fitting:
            return min(
                fitting,
                key=lambda plan: pass_times.scoring_pass(
                    *(sizes, form.scored, tokens, min(row, tokens), plan.layout, machine)
                ).most,
            )
        if tokens <= 2 * row:
            return max(plans, key=lambda plan: (ORDER.index(plan.verdict), -plan.low.total))
        tokens //= 2


def _answering(
    config: Config, sizes: ModelSizes, machine: Hardware, form: Form, adapters: list[estimates.Adapter]
) -> ScoringPlan:
    plans = []
    count = answers_at_once(config.plan.item_tokens + config.inference.max_new_tokens)
    for layout in machine.layouts_of(sizes, form.scored):
        low, high = (
            estimates.answering_memory(
                *(sizes, form.scored, adapters, count, config.plan.item_tokens),
                config.inference.max_new_tokens,
                shards=layout.shard,
                expert_ranks=layout.expert,
                imbalance=machine.imbalance(sizes, layout),
                careful=careful,
            )
            for careful in (False, True)
        )
        verdict = estimates.verdict(low.total, high.total, machine.memory_bytes)
        plans.append(ScoringPlan(layout, count, low, high, verdict))

    def rank(plan: ScoringPlan) -> tuple[int, float]:
        step = pass_times.decoding_step(*(sizes, form.scored, count, config.plan.item_tokens, plan.layout, machine))
        return ORDER.index(plan.verdict), -step.most

    return max(plans, key=rank)  # of equals the first: whole, then a node


def _nearest(candidates: list[Way]) -> Way:
    """A stage that cannot be done outweighs all that are tight; of equals the first."""
    lacks = {"no": 100, "tight": 1, "fits": 0}
    return min(candidates, key=lambda way: sum(lacks[verdict] for verdict in way.verdicts))


def gib_of(plan: StagePlan | ScoringPlan) -> tuple[float, float]:
    """Predicted peak of one GPU in GiB, at least and at most."""
    return plan.low.total / GIB, plan.high.total / GIB
