"""How stages find their parents, and what both training scripts share around the loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import Config, LoraSection, TrainSection
from utils import adapters, base_model, cards, checkpoints, files, logger, prepared, runs, training
from utils.base_model import BaseModel
from utils.composition import ModuleFactors, relative_error, weighted_sum, zero_modules
from utils.exceptions import ArtefactError, ConfigError, NonFiniteError, Problem, VerificationError
from utils.runs import Run
from utils.training_data import Batch, TrainingData

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel

# float32 rounding of a sum of two rank-r products, with room
EXACT = 1e-5


def start(config: Config) -> BaseModel:
    """Threads, seed and the base model; the main process fetches or builds it while the others wait."""
    from accelerate import PartialState

    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    state = PartialState(cpu=base_model.device().type == "cpu")
    with state.main_process_first():
        return base_model.fetch(config.base, config.run.models_dir)


def prepared_run(config: Config, base: BaseModel) -> Run:
    """The prepared data to use: pinned, or the newest that fits this tokenizer and any --data flags of this command."""
    said = sorted(path for path in config.overrides if path.startswith("data."))
    wanted = files.fingerprint(prepared.identity(config.data, base, config.run.seed)) if said else ""

    def fits(run: Run) -> str:
        if run.manifest["identity"]["tokenizer"] != base.tokenizer_digest:
            return "prepared with another tokenizer"
        if wanted and run.manifest["fingerprint"] != wanted:
            return f"prepared with other settings than {', '.join('--' + path for path in said)}"
        return ""

    hint = "" if config.preset == "smollm2_135m" else f" --preset {config.preset}"
    root = config.run.data_dir
    return runs.parent(root, "prepared", config.inputs.prepared, fits, flag="--inputs.prepared", hint=hint)


def domain_run(config: Config, base: BaseModel) -> Run:
    """The domain adapter: pinned, or the newest for this base model."""
    flag = "--domain_adapter"
    return runs.parent(
        config.run.models_dir, "domain", config.inputs.domain_adapter, _for_base(base), flag=flag, hint=_preset(config)
    )


def task_run(config: Config, base: BaseModel, *, on: str | None = None, quiet: bool = False) -> Run:
    """The task adapter: pinned, or the newest for this base model that was trained on `task.on`."""
    wanted, right_base = on or config.task.on, _for_base(base)

    def fits(run: Run) -> str:
        trained_on = run.manifest["identity"]["on"]
        if reason := right_base(run):
            return reason
        return "" if trained_on == wanted else f"trained on {trained_on}, not on {wanted} (say --task.on {trained_on})"

    pinned = config.inputs.task_adapter if on is None else ""
    hint = _preset(config) + ("" if wanted == "domain" else f" --task.on {wanted}")
    return runs.parent(
        config.run.models_dir,
        "task",
        pinned,
        right_base if pinned else fits,
        flag="--task_adapter",
        hint=hint,
        quiet=quiet,
    )


def parent_of(run: Run, kind: str, root: Path) -> Run | None:
    """The parent of that kind, found by digest, so a moved or renamed directory is found too."""
    wanted = next((p for p in run.manifest["parents"] if p["kind"] == kind), None)
    if wanted is None:
        return None
    found = next((r for r in runs.complete_runs(root, kind) if r.digest == wanted["digest"]), None)
    if found is None:
        raise ArtefactError(
            Problem(
                f"{run.directory} was made from the {kind} run {wanted['path']}, which is not under {root}",
                wanted["digest"],
            )
        )
    files.verify(found.directory)
    return found


def lineage(config: Config, base: BaseModel) -> tuple[Run | None, Run]:
    """(domain run, task run) that belong together: a stacked task adapter fixes its domain adapter by digest."""
    task = task_run(config, base)
    trained_on = parent_of(task, "domain", config.run.models_dir)
    if trained_on is None:
        if config.inputs.domain_adapter:  # a path that was given and is wrong must not pass for none
            return domain_run(config, base), task
        with suppress(ArtefactError):
            return domain_run(config, base), task
        return None, task
    if config.inputs.domain_adapter:
        asked = domain_run(config, base)
        if asked.digest != trained_on.digest:
            raise ArtefactError(
                Problem(
                    f"{task.directory} was trained on {trained_on.directory}, not on the domain adapter asked for",
                    str(asked.directory),
                    "leave out --domain_adapter, or train the task adapter on it",
                )
            )
    return trained_on, task


def training_identity(config: Config, stage: str, base: BaseModel, data: Run, **facts: Any) -> dict[str, Any]:
    """Everything that decides a trained adapter."""
    section = getattr(config, stage)
    return {
        "stage": stage,
        "base": base.digest,
        "data": data.digest,
        "lora": section.lora.model_dump(mode="json"),
        "train": section.train.model_dump(mode="json"),
        "seed": config.run.seed,
        "dtype": str(base_model.compute_dtype(config.base.dtype)),
        "attention": config.base.attention,
        **facts,
    }


def train_adapter(
    config: Config,
    stage: str,
    base: BaseModel,
    identity: dict[str, Any],
    parents: list[Run],
    build: Callable[[], tuple[PeftModel, TrainingData, list[Batch], dict[str, Any]]],
    **facts: Any,
) -> dict[str, Any]:
    """Train, save and record one adapter; a complete run with this identity is reused, a started one goes on.

    `build` gives the model with the adapter `stage` active and trainable, the data, the dev batches and facts about
    the data. Returns the stage's result for the last line of stdout.
    """
    from accelerate import PartialState

    directory = runs.directory_for(config.run.models_dir, stage, config.run.name, config.preset, identity)
    state = PartialState()
    with state.main_process_first():
        run = runs.open_run(directory, identity)
    if run is not None:
        checkpoints.discard(directory / files.SCRATCH)  # a run killed right after it was sealed still has them
        logger.event(f"the {stage} adapter is already complete", path=directory)
        return _result(config, stage, run, reused=True)
    state.wait_for_everyone()
    if not state.is_main_process:
        _train(config, stage, directory, build)
        state.wait_for_everyone()
        state.destroy_process_group()
        return {}
    with files.locked(directory, "the run"):
        with logger.to_file(directory / "run.log"):  # closed before the manifest takes the digest of the log
            runs.start(directory, identity)
            said = ", ".join(config.overrides) or "none"
            logger.event(f"training the {stage} adapter", path=directory, overrides=said)
            model, outcome, data_facts = _train(config, stage, directory, build)
            factors = adapters.factors_of(model, stage)
            if len(zero_modules(factors)) == len(factors):
                raise NonFiniteError(Problem(f"every B of the {stage} adapter is still zero after training"))
            adapters.save(directory / "adapter", factors, base, lora=getattr(config, stage).lora)
            files.write_text(directory / "adapter" / "README.md", cards.adapter_card(stage, base, parents))
            files.write_json(directory / "config.json", config.model_dump(mode="json"))
            logger.event(f"{stage} adapter saved", path=directory / "adapter", kept_step=outcome.kept_step)
        manifest = runs.manifest(
            stage,
            identity,
            base=base.record(),
            parents=parents,
            measured=asdict(outcome),
            data=data_facts,
            seed=config.run.seed,
            **facts,
        )
        run = Run(directory, files.seal(directory, manifest))
        checkpoints.discard(directory / files.SCRATCH)
    state.wait_for_everyone()
    state.destroy_process_group()
    return _result(config, stage, run, reused=False)


def _train(
    config: Config, stage: str, directory: Path, build: Callable[[], Any]
) -> tuple[PeftModel, training.Outcome, dict[str, Any]]:
    model, data, dev, data_facts = build()
    accelerator = _accelerator(config, stage, directory)
    outcome = training.train(
        model,
        data,
        dev,
        getattr(config, stage).train,
        seed=config.run.seed,
        directory=directory,
        accelerator=accelerator,
        what=f"{stage} adapter",
    )
    # not end_training(): it also takes the process group down, and the processes still have to meet
    for tracker in accelerator.trackers:
        tracker.finish()
    return model, outcome, data_facts


def new_adapter(model: Any, stage: str, lora: LoraSection, seed: int, frozen: list[str] | None = None) -> PeftModel:
    """The model with a fresh adapter `stage` active on top of frozen ones, and nothing else trainable."""
    torch.manual_seed(seed)
    model = adapters.attach(model, stage, lora)
    adapters.activate(model, [*(frozen or []), stage], trainable=stage)
    return model


def pad_id(tokenizer: Any) -> int:
    """Any token will do: padding is by position."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def dev_batches(data: TrainingData, settings: TrainSection) -> list[Batch]:
    """The dev data in its first fixed order, up to max_dev_tokens."""
    batches: list[Batch] = []
    tokens = 0
    for step in data.steps(0):
        for rows in step:
            batch = data.batch(0, rows)
            tokens += batch.input_ids_BT.numel()
            if batches and settings.max_dev_tokens and tokens > settings.max_dev_tokens:
                return batches
            batches.append(batch)
    return batches


def _accelerator(config: Config, stage: str, directory: Path) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    project = ProjectConfiguration(project_dir=str(directory), logging_dir=str(directory / "tracking"))
    try:
        accelerator = Accelerator(
            mixed_precision="no",  # autocast is ours: the frozen weights are loaded in the compute dtype
            cpu=base_model.device().type == "cpu",
            log_with=list(config.run.trackers) or None,
            project_config=project,
        )
        if config.run.trackers:
            accelerator.init_trackers(f"{stage}-adapter")
    except (ValueError, ImportError) as error:
        raise ConfigError(
            Problem(
                f"run.trackers: {str(error).splitlines()[0]}",
                config.run.trackers,
                "install it, or --run.trackers tensorboard",
            )
        ) from error
    return accelerator


def _for_base(base: BaseModel) -> Callable[[Run], str]:
    def fits(run: Run) -> str:
        found = run.manifest["base"]
        if found["digest"] == base.digest:
            return ""
        other, ours = found["digest"][:12], base.digest[:12]
        return f"made for another base model ({found['source']}, digest {other}; this one is {ours})"

    return fits


def _preset(config: Config) -> str:
    return "" if config.preset == "smollm2_135m" else f" --preset {config.preset}"


def _result(config: Config, stage: str, run: Run, *, reused: bool) -> dict[str, Any]:
    runs.mark_latest(config.run.models_dir, stage, run.directory)
    measured = run.manifest["measured"]
    return {
        "stage": stage,
        "run": str(run.directory),
        "adapter": str(run.directory / "adapter"),
        "digest": run.digest,
        "reused": reused,
        **{k: measured[k] for k in ("steps", "seconds", "tokens_per_second", "best_dev_loss", "peak_memory_bytes")},
    }


def composed_factors(
    domain: Run | None, task: Run | None, weights: tuple[float, float]
) -> tuple[dict[str, ModuleFactors], list[Run]]:
    """The exact weighted sum of the adapters that are there, checked, and the runs that went into it.

    Raises ArtefactError when nothing is left, VerificationError when the sum is not the sum.
    """
    chosen = [(run, weight) for run, weight in zip((domain, task), weights, strict=True) if run is not None and weight]
    if not chosen:
        raise ArtefactError(Problem("no adapter with a weight other than 0", weights, "give --weights 1,1"))
    parts = [adapters.load(run.directory / "adapter") for run, _ in chosen]
    used = [weight for _, weight in chosen]
    try:
        composed = weighted_sum(parts, used)
    except ValueError as error:
        raise ArtefactError(Problem(f"these adapters do not compose: {error}")) from error
    if (off := relative_error(composed, parts, used)) > EXACT:
        raise VerificationError(Problem("the composed adapter is not the weighted sum of its parts", off))
    return composed, [run for run, _ in chosen]
