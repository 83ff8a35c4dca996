"""Every stage of the pipeline on planned hardware: its command, memory of one GPU, and time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from config import LIKELIHOOD_METRICS, PRESETS, Config
from utils.models.model_shapes import Dtype, ModelSizes
from utils.models.process_layout import ProcessLayout
from utils.planning import estimates, hardware, pass_times, stage_commands
from utils.planning.estimates import Fit
from utils.planning.fitting_settings import ScoringPlan, Way
from utils.planning.hardware import Hardware
from utils.planning.pass_times import MEMORY, PassTime
from utils.planning.planned_data import PlannedData
from utils.planning.stage_commands import STAGES

# tokens per second and processor of preparing, slowest and fastest of three measured corpora on 2 cores, 4 bytes a
# token; and what it holds in memory (decision_document.md, 2026-11-22)
PREPARED_TOKENS, PREPARING_BYTES = (324_000.0, 764_000.0), 5 * 10**9
# weights that a search measures on all of dev, and a fourth of those that it measures on a part, at least and at most
# (tests/test_planning_stages.py counts them)
SEARCHED_POINTS = (5, 60)
# rows of the evaluation's table, and trainings that its controls take beside the two: a wrong-domain adapter, and task
# adapters on it, on a random one, of the ranks together, and on the base
TABLE_ROWS, CONTROL_TRAININGS = 7, {"domain": 1, "task": 4}
VLLM_SHARE, VLLM_RANKS = 0.9, (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class StageCost:
    """One stage. Peaks are bytes of one GPU, `host` of main memory of the first node; seconds at least and at most."""

    stage: str
    command: str
    peak: tuple[int, int]
    host: int
    verdict: Fit
    seconds: tuple[float, float]
    bound: str
    note: str = ""


@dataclass(frozen=True)
class Disk:
    """Bytes of what the pipeline writes for this model."""

    download: int
    checkpoints: int
    adapter: int
    merged: int


def every_stage(way: Way, sizes: ModelSizes, data: PlannedData) -> list[StageCost]:
    """In the order of the pipeline."""
    machine = hardware.of(way.config.plan)
    trainings = [_training(way, sizes, machine, stage, data) for stage in STAGES]
    loading = _loading(way, sizes, machine, way.scoring.layout)
    return [
        _prepare(way, sizes, machine, data),
        *trainings,
        _search(way, sizes, machine, data, loading),
        _evaluate(way, sizes, machine, data, loading, dict(zip(STAGES, trainings, strict=True))),
        _asking(way, sizes, machine, loading),
        _merge(way, sizes, machine),
        serving(way.config, sizes, machine),
    ]


def training_seconds(way: Way, stage: str, data: PlannedData) -> tuple[float, float]:
    """Of all epochs, or of `max_steps`, without loading."""
    train, (slow, fast) = getattr(way.config, stage).train, way.trainings[stage].rates
    tokens = train.max_steps * train.batch_tokens if train.max_steps else data.trained(stage) * train.epochs
    if stage == "task" and way.config.task.keep_domain in ("auto", "replay"):  # auto at most
        tokens /= 1 - way.config.task.replay_share
    return tokens / fast, tokens / slow


def _prepare(way: Way, sizes: ModelSizes, machine: Hardware, data: PlannedData) -> StageCost:
    tokens = data.domain_tokens + data.task_tokens
    slow, fast = PREPARED_TOKENS
    verdict: Fit = "fits" if machine.host_bytes >= PREPARING_BYTES else "tight"
    command = stage_commands.command(_without_training(way.config), sizes, "prepare", None)
    return StageCost("prepare", command, (0, 0), PREPARING_BYTES, verdict, (tokens / fast, tokens / slow), "tokenising")


def _training(way: Way, sizes: ModelSizes, machine: Hardware, stage: str, data: PlannedData) -> StageCost:
    plan = way.trainings[stage]
    reading, host = _loading(way, sizes, machine, plan.layout, trained=True)
    least, most = training_seconds(way, stage, data)
    config = way.config if stage == "domain" else _without_domain(way.config)
    fits: Fit = "no" if plan.refused else _with_host(plan.verdict, host, machine)
    return StageCost(
        stage,
        stage_commands.command(config, sizes, stage, plan.layout),
        (plan.low.total, plan.high.total),
        host,
        fits,
        (least + reading, most + reading),
        plan.time.bound,
        plan.refused or str(plan.layout),
    )


def _search(way: Way, sizes: ModelSizes, machine: Hardware, data: PlannedData, loading: tuple[float, int]) -> StageCost:
    one = _scored(way, sizes, machine, data.dev_tokens)
    least, most = (points * seconds for points, seconds in zip(SEARCHED_POINTS, one, strict=True))
    return _scoring_stage(way, sizes, machine, "search", way.scoring, (least, most), loading)


def _evaluate(
    way: Way,
    sizes: ModelSizes,
    machine: Hardware,
    data: PlannedData,
    loading: tuple[float, int],
    trainings: dict[str, StageCost],
) -> StageCost:
    """The table's rows, the answers of each, and the controls' trainings; memory is the largest of them."""
    settings = way.config.evaluate
    # a metric that needs answers has every question answered
    questions = settings.generated_answers if settings.primary in LIKELIHOOD_METRICS else data.test_items
    scored, answered = _scored(way, sizes, machine, data.test_tokens), _answered(
        way, sizes, machine, questions, settings.max_new_tokens
    )
    controls = [sum(CONTROL_TRAININGS[stage] * trainings[stage].seconds[at] for stage in STAGES) for at in (0, 1)]
    seconds = tuple(TABLE_ROWS * (scored[at] + answered[at]) + controls[at] for at in (0, 1))
    part = _scoring_stage(way, sizes, machine, "evaluate", way.scoring, (seconds[0], seconds[1]), loading)
    parts = [part.peak, *(trainings[stage].peak for stage in STAGES)]
    share = controls[1] / seconds[1]
    return StageCost(
        "evaluate",
        part.command,
        (max(low for low, _ in parts), max(high for _, high in parts)),
        part.host,
        min([part.verdict, *(trainings[stage].verdict for stage in STAGES)], key=["no", "tight", "fits"].index),
        part.seconds,
        part.bound,
        f"{share:.0%} of it trains controls",
    )


def _asking(way: Way, sizes: ModelSizes, machine: Hardware, loading: tuple[float, int]) -> StageCost:
    """A hundred questions in a file."""
    tokens = way.config.inference.max_new_tokens
    seconds = _answered(way, sizes, machine, 100, tokens)
    cost = _scoring_stage(way, sizes, machine, "asking", way.answering, seconds, loading)
    step = _decoding(way, sizes, machine)
    range_of = f"{step.least:.2g}" if step.least == step.most else f"{step.least:.2g} to {step.most:.2g}"
    note = f"100 questions, {tokens} tokens each, {range_of} s for each token of a batch"
    if way.answering.layout.is_sharded:
        note += "; a server (below) gathers nothing and is the faster way"
    return StageCost(**{**cost.__dict__, "note": note, "bound": step.bound})


def _scoring_stage(
    way: Way,
    sizes: ModelSizes,
    machine: Hardware,
    stage: str,
    plan: ScoringPlan,
    seconds: tuple[float, float],
    loading: tuple[float, int],
) -> StageCost:
    reading, host = loading
    return StageCost(
        stage,
        (
            stage_commands.command(_without_training(way.config), sizes, stage, plan.layout)
            if stage != "evaluate"
            else stage_commands.command(way.config, sizes, stage, plan.layout)
        ),
        (plan.low.total, plan.high.total),
        host,
        _with_host(plan.verdict, host, machine),
        (seconds[0] + reading, seconds[1] + reading),
        _pass(way, sizes, machine).bound,
        str(plan.layout),
    )


def _merge(way: Way, sizes: ModelSizes, machine: Hardware) -> StageCost:
    """Read, written, read again by the check, one file of at most 5 GB in memory at a time."""
    written: Dtype = {"fp8": "fp8", "float32": "float32"}.get(way.config.merge.dtype, "bfloat16")
    stored, merged = estimates.weight_bytes(sizes, sizes.stored), estimates.weight_bytes(sizes, written)
    host = max(estimates.checking_bytes(sizes), min(2 * merged, 10 * 10**9))
    seconds = (max(stored, merged) / machine.disk_rate, (stored + 2 * merged) / machine.disk_rate)
    command = stage_commands.command(_without_training(way.config), sizes, "merge", None)
    note = f"writes {merged / 1e9:,.0f} GB in {written}; no GPU"
    fits: Fit = "fits" if host <= machine.host_bytes else "no"
    return StageCost("merge", command, (0, 0), host, fits, seconds, "disk", note)


def serving(config: Config, sizes: ModelSizes, machine: Hardware) -> StageCost:
    """The merged model in vLLM, in the first form of which a node holds the weights and as many for keys and values as
    there is; time is that of 100 answers to one client."""
    options = [(held, asks, estimates.weight_bytes(sizes, held)) for held, asks in _served(config, sizes)]
    fitting = [option for option in options if tensor_parallel(option[2], machine) <= machine.gpus]
    held, asks, size = (fitting or options[-1:])[0]
    room, gpus = VLLM_SHARE * machine.memory_bytes, tensor_parallel(size, machine)
    parallel = min(gpus, machine.gpus)
    each = math.ceil(size / parallel)
    cache = max(0, room - each) * parallel / pass_times.cache_bytes_per_token(sizes, held)
    step = pass_times.visited_bytes(sizes, held, 1) / parallel / machine.memory_rate
    tokens = 100 * config.inference.max_new_tokens
    command = (
        f"vllm serve models/merged_model {' '.join(vllm_parallel(parallel, has_experts=bool(sizes.experts)))}{asks}"
    )
    note = (
        f"{parallel} GPU{'s' * (parallel > 1)}, {held}; {cache:,.0f} tokens of keys and values fit beside the weights"
    )
    fits: Fit = "fits" if gpus <= machine.gpus else "no"
    return StageCost(
        "serving", command, (each, max(each, int(room))), 0, fits, (tokens * step, tokens * step), MEMORY, note
    )


def _served(config: Config, sizes: ModelSizes) -> list[tuple[Dtype, str]]:
    """Forms of the merged weights in vLLM, the most exact first, and what asks for them."""
    if config.merge.dtype == "fp8":
        return [("fp8", "")]
    if sizes.experts:  # quantising while loading is for dense models; experts are merged into FP8 instead
        return [("bfloat16", "")]
    return [("bfloat16", ""), ("fp8", " --quantization fp8"), ("nf4", " --quantization bitsandbytes")]


def disk(sizes: ModelSizes, adapter: estimates.Adapter, *, keep_checkpoints: int, merged: Dtype) -> Disk:
    """What one training run and one merge write; a checkpoint has the adapter, the best one and two moments."""
    factors = 4 * sum(estimates.lora_parameters(sizes, adapter).values())
    return Disk(
        download=estimates.weight_bytes(sizes, sizes.stored),
        checkpoints=4 * factors * (keep_checkpoints + 1),  # the new one is written before the oldest goes
        adapter=factors,
        merged=estimates.weight_bytes(sizes, merged),
    )


def tensor_parallel(size: int, machine: Hardware) -> int:
    """GPUs that hold these weights and leave a tenth for keys and values, as a power of two."""
    return next(n for n in (1, 2, 4, 8, 16, 32, 64, 2**30) if size <= n * VLLM_SHARE * machine.memory_bytes)


def vllm_parallel(gpus: int, *, has_experts: bool, with_adapters: bool = False) -> list[str]:
    """vLLM's words for a model on so many GPUs.

    vLLM's recipe for MiniMax-M2: eight parts of an expert's matrix are no whole FP8 blocks, so experts are cut by
    number. LoRA on experts that are cut by number asserts this exchange (vLLM 0.32, lora/layers/fused_moe.py).
    """
    words = ["--tensor-parallel-size", str(gpus)]
    if has_experts and gpus > 4:
        words += ["--enable-expert-parallel"]
        words += ["--all2all-backend", "allgather_reducescatter"] if with_adapters else []
    return words


def vllm_rank(ranks: int) -> int:
    """The smallest --max-lora-rank of vLLM's that holds an adapter of this rank."""
    return next((rank for rank in VLLM_RANKS if ranks <= rank), ranks)


def _loading(
    way: Way, sizes: ModelSizes, machine: Hardware, layout: ProcessLayout, *, trained: bool = False
) -> tuple[float, int]:
    """(seconds, bytes of main memory of a node): the files are read once for all that share the model."""
    form = way.form.trained if trained else way.form.scored
    host = estimates.loading_bytes(
        sizes, form, processes=min(layout.processes, machine.gpus), sharded=layout.is_sharded
    )
    return estimates.weight_bytes(sizes, sizes.stored) / machine.disk_rate, host


def _scored(way: Way, sizes: ModelSizes, machine: Hardware, tokens: int) -> tuple[float, float]:
    one = _pass(way, sizes, machine)
    passes = math.ceil(tokens / (one.tokens * way.scoring.layout.processes))
    return passes * one.least, passes * one.most


def _pass(way: Way, sizes: ModelSizes, machine: Hardware) -> PassTime:
    row = min(way.scoring.tokens, way.config.plan.item_tokens)
    return pass_times.scoring_pass(sizes, way.form.scored, way.scoring.tokens, row, way.scoring.layout, machine)


def _decoding(way: Way, sizes: ModelSizes, machine: Hardware) -> PassTime:
    context = way.config.plan.item_tokens
    return pass_times.decoding_step(
        sizes, way.form.scored, way.answering.tokens, context, way.answering.layout, machine
    )


def _answered(way: Way, sizes: ModelSizes, machine: Hardware, answers: int, new_tokens: int) -> tuple[float, float]:
    """Batches one after the other on every rank: the prompts' pass, then a step for each new token."""
    step, rows = _decoding(way, sizes, machine), way.answering.tokens * way.config.plan.item_tokens
    prompts = pass_times.scoring_pass(
        sizes, way.form.scored, rows, way.config.plan.item_tokens, way.answering.layout, machine
    )
    batches = math.ceil(answers / (way.answering.tokens * way.answering.layout.processes))
    return batches * (prompts.least + new_tokens * step.least), batches * (prompts.most + new_tokens * step.most)


def _with_host(verdict: Fit, host: int, machine: Hardware) -> Fit:
    return verdict if host <= machine.host_bytes else "no"


def _without_training(config: Config) -> Config:
    """What only training reads is not typed elsewhere."""
    usual = PRESETS[config.preset]().base.fp8
    return config.model_copy(update={"base": config.base.model_copy(update={"fp8": usual})})


def _without_domain(config: Config) -> Config:
    """The task adapter's training reads nothing of how the domain adapter is trained."""
    usual = PRESETS[config.preset]().domain.train
    return config.model_copy(update={"domain": config.domain.model_copy(update={"train": usual})})
