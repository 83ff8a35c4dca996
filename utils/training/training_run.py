"""The run around the training loop, as both training scripts tell it: open, load, attach, train, save, record.

Every process of a run calls these functions in the same order. The first one holds the lock and the log and writes; the
others train with it and wait where they have to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import USUAL_ROW_TOKENS, Config, LoraSection, run_label, with_row_tokens
from utils import logger
from utils.adapters import adapter_files, cards, peft_model
from utils.adapters.factors import Factors, zero_modules
from utils.artifacts import files, runs
from utils.artifacts.identity import Identity
from utils.artifacts.runs import Run
from utils.data.batches import Batch, TrainingData
from utils.exceptions import ArtefactError, NonFiniteError, Problem
from utils.models import devices, loading
from utils.models.base_model import BaseModel
from utils.models.parallel import ranks, sharding
from utils.models.rows import row_probe, row_support
from utils.planning import preflight
from utils.training import checkpoints, trackers, training_loop
from utils.training.keeping.keep_decision import KeepDomain
from utils.training.schedules.active_adapters import AdapterSchedule
from utils.training.training_setup import TrainingOutcome, TrainingSetup

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TrainingRun:
    """One adapter's run directory, open in this process: `complete` is the run where there is nothing left to do."""

    config: Config
    stage: str
    base: BaseModel
    identity: Identity
    parents: tuple[Run, ...]
    directory: Path
    complete: Run | None = None
    is_main: bool = True
    log: ExitStack = field(default_factory=ExitStack)
    predicted_bytes: int | None = None


@contextmanager
def opened(
    config: Config, stage: str, base: BaseModel, identity: Identity, parents: list[Run]
) -> Iterator[TrainingRun]:
    """The run with this identity: complete, or locked, logged to and to be trained by this process and the others.

    Raises ArtefactError when the directory holds other settings, or another command is at it.
    """

    def directory_and_run() -> tuple[Path, Run | None]:
        directory = runs.directory_for(config.run.models_dir, stage, config.run.name, run_label(config), identity)
        try:
            complete = runs.open_run(directory, identity)
        except ArtefactError as error:
            raise ArtefactError([*error.problems, *_other_parents(config, directory, identity)]) from error
        if complete is not None:
            checkpoints.keep_last(directory)
            checkpoints.discard(directory / files.SCRATCH)  # a run killed right after it was sealed still has them
        return directory, complete

    fix = "let every node see the same --run.data_dir and --run.models_dir"
    ranks.refuse_unequal(identity.values, "what is to be trained", ArtefactError, fix)
    directory, complete = ranks.first(directory_and_run)
    run = TrainingRun(config, stage, base, identity, tuple(parents), directory, complete)
    if complete is not None:
        logger.event(f"the {stage} adapter is already complete", path=directory)
        yield run
        return
    if ranks.index() == 0:
        with files.locked(directory, "the run"), run.log:
            run.log.enter_context(runs.begun(directory, identity))
            overrides = ", ".join(config.overrides) or "none"
            logger.event(f"training the {stage} adapter", path=directory, overrides=overrides)
            _say_other_data(config, stage, base, identity)
            memory = preflight.predicted(config, stage, base)
            ranks.meet()  # the lock is held
            yield replace(run, predicted_bytes=memory.total if memory else None)
    else:
        ranks.meet()
        yield replace(run, is_main=False)
    ranks.meet()


def _say_other_data(config: Config, stage: str, base: BaseModel, identity: Identity) -> None:
    """One line where the newest adapter of this stage and base was trained on other prepared data."""
    complete = runs.complete_runs(config.run.models_dir, stage)
    newest = next((run for run in complete if run.manifest["base"].get("digest") == base.digest), None)
    is_chosen = config.inputs.prepared or getattr(config, stage).continue_from
    if newest and not is_chosen and newest.manifest["identity"].get("data") != identity.values.get("data"):
        paths = [parent["path"] for parent in newest.manifest["parents"] if parent["kind"] == "prepared"]
        if not paths:  # an adapter of random weights, or of another tool
            return
        event = f"other data than the newest {stage} adapter had; --inputs.prepared takes that again"
        logger.event(event, adapter=newest.directory, its_data=", ".join(paths))


def _other_parents(config: Config, directory: Path, identity: Identity) -> list[Problem]:
    """The flags that name what the run in the directory was made from, where that is not what is taken now."""
    problems = []
    with suppress(ArtefactError):
        sealed = (directory / files.MANIFEST).exists()
        recorded = (
            files.read_manifest(directory)["identity"] if sealed else files.read_object(directory / runs.IDENTITY)
        )
        data, domain = ("prepared", config.run.data_dir), ("domain", config.run.models_dir)
        for name, flag, (kind, root) in (
            ("data", "--inputs.prepared", data),
            ("domain_adapter", "--domain_adapter", domain),
        ):
            if (was := recorded.get(name)) != identity.values.get(name):
                here = (run.directory for run in runs.complete_runs(root, kind) if run.digest == was)
                problems += [
                    Problem(
                        f"it was made from {path}", fix=f"to take that again, repeat your command with {flag} {path}"
                    )
                    for path in here
                ]
    return problems


def with_length(config: Config, data: Run) -> Config:
    """The settings with the row length that the prepared data asks for, where they leave it open."""
    counts = data.manifest.get("counts")
    recorded = counts.get("sequence_tokens") if isinstance(counts, dict) else None
    tokens = recorded if type(recorded) is int and recorded >= 16 else USUAL_ROW_TOKENS  # data of before has none
    for stage in ("domain", "task"):
        if not getattr(config, stage).train.max_sequence_tokens and tokens != USUAL_ROW_TOKENS:
            logger.event(f"{stage}.train.max_sequence_tokens follows the labelled pairs", tokens=tokens)
    return with_row_tokens(config, tokens)


def load_base(config: Config, stage: str, base: BaseModel) -> PreTrainedModel:
    """The frozen base model for training an adapter; an FP8 checkpoint stays FP8 where that can be.

    Rows are fed to it as it was measured to honour them (`row_probe`).
    """
    form = preflight.form(config, stage, base)
    if form.why:
        logger.event(f"the FP8 checkpoint {'stays FP8' if form.native else 'is de-quantised'}", why=form.why)
    model = sharding.load_model(base, config.base, native_fp8=form.native)
    row_support.attach(model, row_probe.measured(base, config.base))
    return model


def new_adapter(
    model: Any,
    stage: str,
    lora: LoraSection,
    seed: int,
    frozen: list[str] | None = None,
    *,
    initial: Factors | None = None,
) -> PeftModel:
    """The model with an adapter `stage` active on top of frozen ones, and nothing else trainable.

    The adapter is fresh, or starts as `initial` is. Raises ArtefactError when that has other modules or ranks.
    """
    torch.manual_seed(seed)
    model = peft_model.attach(model, stage, lora)
    if initial is not None:
        peft_model.start_from(model, stage, initial)
    peft_model.activate(model, [*(frozen or []), stage], trainable=stage)
    return model


def train(
    run: TrainingRun,
    model: PeftModel,
    data: TrainingData,
    dev: list[Batch],
    schedule: AdapterSchedule,
    keep: KeepDomain | None = None,
    *,
    finished: Run | None = None,
) -> TrainingOutcome:
    """Train the active adapter of `model`, which then holds the state that is kept; from the state of `finished` on.

    Raises as the loop does.
    """
    preflight.check_trainable(model, run.config, run.stage, run.base)
    accelerator = _accelerator(run.config, run.stage, run.directory)
    outcome = training_loop.train(
        TrainingSetup(
            model,
            data,
            dev,
            getattr(run.config, run.stage).train,
            schedule,
            seed=run.config.run.seed,
            directory=run.directory,
            accelerator=accelerator,
            what=f"{run.stage} adapter",
            keep=keep,
            go_on_from=checkpoints.last_state(finished.directory) if finished else None,
        )
    )
    # not end_training(): it also takes the process group down, and the processes still have to meet
    for tracker in accelerator.trackers:
        tracker.finish()
    return outcome


def save(run: TrainingRun, model: PeftModel, outcome: TrainingOutcome, *, system_prompt: str = "") -> None:
    """Write adapter/ with its card, and config.json. Raises NonFiniteError when the adapter does nothing."""
    factors = peft_model.factors_of(model, run.stage)  # of a sharded model every rank has to ask for it
    if not run.is_main:
        return
    if len(zero_modules(factors)) == len(factors):
        raise NonFiniteError(Problem(f"every B of the {run.stage} adapter is still zero after training"))
    adapter = run.directory / "adapter"
    adapter_files.save(adapter, factors, run.base, lora=getattr(run.config, run.stage).lora)
    card = cards.adapter_card(run.stage, run.base, list(run.parents), system_prompt=system_prompt)
    files.write_text(adapter / "README.md", card)
    files.write_json(run.directory / "config.json", run.config.model_dump(mode="json"))
    logger.event(f"{run.stage} adapter saved", path=adapter, kept_step=outcome.kept_step)
    peak, predicted = outcome.peak_memory_bytes, run.predicted_bytes
    logger.event("peak memory", measured_bytes=peak, predicted_bytes=predicted)


def record(run: TrainingRun, outcome: TrainingOutcome, *, data: dict[str, Any], **facts: Any) -> TrainingRun:
    """Seal the run with its manifest, after which it is complete, and remove its checkpoints.

    `data` says what became of the data, `facts` goes into the manifest beside it.
    """
    if not run.is_main:
        return run
    run.log.close()  # before the manifest takes the digest of the log
    manifest = runs.manifest(
        run.stage,
        run.identity,
        base=run.base.record(),
        parents=list(run.parents),
        measured=asdict(outcome) | {"predicted_peak_memory_bytes": run.predicted_bytes},
        data=data,
        seed=run.config.run.seed,
        settings=_settings(run),
        **sharding.loaded(),
        **facts,
    )
    complete = Run(run.directory, files.seal(run.directory, manifest))
    checkpoints.keep_last(run.directory)
    checkpoints.discard(run.directory / files.SCRATCH)
    return replace(run, complete=complete)


def result(run: TrainingRun, *, reused: bool) -> dict[str, Any]:
    """The last line of stdout for a complete run, which later stages then take; empty in the other processes."""
    if run.complete is None:
        return {}
    if ranks.index() == 0:
        runs.mark_latest(run.config.run.models_dir, run.stage, run.directory)
    measured = run.complete.manifest["measured"]
    return {
        "stage": run.stage,
        "run": str(run.directory),
        "adapter": str(run.complete.adapter),
        "digest": run.complete.digest,
        "reused": reused,
        **{k: measured[k] for k in ("steps", "seconds", "tokens_per_second", "best_dev_loss", "peak_memory_bytes")},
    }


def _settings(run: TrainingRun) -> dict[str, Any]:
    """What the manifest says about settings, also those that trade memory for time and decide nothing."""
    section = getattr(run.config, run.stage)
    sections = {"lora": section.lora.model_dump(mode="json"), "train": section.train.model_dump(mode="json")}
    return {**sections, "attention": loading.attention_of(run.base, run.config.base)}


def _accelerator(config: Config, stage: str, directory: Path) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    project = ProjectConfiguration(project_dir=str(directory), logging_dir=str(directory / trackers.FOLDER))
    accelerator = Accelerator(
        mixed_precision="no",  # autocast is ours: the frozen weights are loaded in the compute dtype
        cpu=devices.device().type == "cpu",
        log_with=list(config.run.trackers) or None,
        project_config=project,
    )
    section = getattr(config, stage).model_dump(mode="json")
    settings = {"base": config.base.source, "seed": config.run.seed, stage: section}
    trackers.start(accelerator, f"{stage}-adapter", settings, directory)
    return accelerator
