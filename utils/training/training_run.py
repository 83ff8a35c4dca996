"""What every script starts with, and what both training scripts share around the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from config import Config, LoraSection
from utils import logger
from utils.adapters import adapter_files, cards, peft_model
from utils.adapters.factors import ModuleFactors, zero_modules
from utils.artifacts import files, runs
from utils.artifacts.identity import Identity
from utils.artifacts.runs import Run
from utils.data.batches import Batch, TrainingData
from utils.exceptions import ConfigError, NonFiniteError, Problem
from utils.models import devices, parallel
from utils.models.base_model import BaseModel
from utils.planning import preflight
from utils.training import checkpoints, training_loop
from utils.training.training_identity import training_identity

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel
    from transformers import PreTrainedModel

# switches adapters for a step, or for dev (None), and returns the names of those that are on
EachStep = Callable[["PeftModel", "int | None"], Sequence[str]]


def identity_of(config: Config, stage: str, base: BaseModel, data: Run, **facts: Any) -> Identity:
    """Everything that decides a trained adapter."""
    section = getattr(config, stage)
    return training_identity(
        stage,
        base,
        data,
        section.lora,
        section.train,
        seed=config.run.seed,
        dtype=config.base.dtype,
        native_fp8=preflight.form(config, stage, base).native,
        facts=facts,
    )


def settings(config: Config, stage: str) -> dict[str, Any]:
    """What a manifest says about settings, also those that trade memory for time and decide nothing."""
    section = getattr(config, stage)
    sections = {"lora": section.lora.model_dump(mode="json"), "train": section.train.model_dump(mode="json")}
    return {**sections, "attention": config.base.attention}


def load_base(config: Config, stage: str, base: BaseModel) -> PreTrainedModel:
    """The frozen base model for training an adapter; an FP8 checkpoint stays FP8 where that can be."""
    form = preflight.form(config, stage, base)
    if form.why:
        logger.event(f"the FP8 checkpoint {'stays FP8' if form.native else 'is de-quantised'}", why=form.why)
    return parallel.load_model(base, config.base, native_fp8=form.native)


def train_adapter(
    config: Config,
    stage: str,
    base: BaseModel,
    identity: Identity,
    parents: list[Run],
    build: Callable[[], tuple[PeftModel, TrainingData, list[Batch], dict[str, Any]]],
    each_step: EachStep | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Train, save and record one adapter; a complete run with this identity is reused, a started one goes on.

    `build` gives the model with the adapter `stage` active and trainable, the data, the dev batches and facts about
    the data. `each_step` is called with the model and the step's number, or None before dev is measured; it must follow
    from these alone, and says which adapters are on (without it, the trained one alone); the model is held to that.
    Returns the stage's result for the last line of stdout.
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
        _train(config, stage, base, directory, build, each_step)
        state.wait_for_everyone()
        state.destroy_process_group()
        return {}
    with files.locked(directory, "the run"):
        with logger.to_file(directory / "run.log"):  # closed before the manifest takes the digest of the log
            runs.start(directory, identity)
            said = ", ".join(config.overrides) or "none"
            logger.event(f"training the {stage} adapter", path=directory, overrides=said)
            memory = preflight.predicted(config, stage, base)
            factors, outcome, data_facts = _train(config, stage, base, directory, build, each_step)
            if len(zero_modules(factors)) == len(factors):
                raise NonFiniteError(Problem(f"every B of the {stage} adapter is still zero after training"))
            adapter_files.save(directory / "adapter", factors, base, lora=getattr(config, stage).lora)
            files.write_text(
                directory / "adapter" / "README.md",
                cards.adapter_card(stage, base, parents, system_prompt=facts.get("system_prompt", "")),
            )
            files.write_json(directory / "config.json", config.model_dump(mode="json"))
            logger.event(f"{stage} adapter saved", path=directory / "adapter", kept_step=outcome.kept_step)
            peak = {"measured_bytes": outcome.peak_memory_bytes, "predicted_bytes": memory.total if memory else None}
            logger.event("peak memory", **peak)
        manifest = runs.manifest(
            stage,
            identity,
            base=base.record(),
            parents=parents,
            measured=asdict(outcome) | {"predicted_peak_memory_bytes": peak["predicted_bytes"]},
            data=data_facts,
            seed=config.run.seed,
            settings=settings(config, stage),
            **facts,
        )
        run = Run(directory, files.seal(directory, manifest))
        checkpoints.discard(directory / files.SCRATCH)
    state.wait_for_everyone()
    state.destroy_process_group()
    return _result(config, stage, run, reused=False)


def _train(
    config: Config, stage: str, base: BaseModel, directory: Path, build: Callable[[], Any], each_step: EachStep | None
) -> tuple[dict[str, ModuleFactors], training_loop.TrainingOutcome, dict[str, Any]]:
    model, data, dev, data_facts = build()
    preflight.check_trainable(model, config, stage, base)
    accelerator = _accelerator(config, stage, directory)

    def before_step(step: int | None) -> None:
        active = each_step(model, step) if each_step else [stage]
        peft_model.refuse_other_state(model, active, trainable=stage)

    outcome = training_loop.train(
        model,
        data,
        dev,
        getattr(config, stage).train,
        seed=config.run.seed,
        directory=directory,
        accelerator=accelerator,
        what=f"{stage} adapter",
        before_step=before_step,
    )
    # not end_training(): it also takes the process group down, and the processes still have to meet
    for tracker in accelerator.trackers:
        tracker.finish()
    return peft_model.factors_of(model, stage), outcome, data_facts


def new_adapter(model: Any, stage: str, lora: LoraSection, seed: int, frozen: list[str] | None = None) -> PeftModel:
    """The model with a fresh adapter `stage` active on top of frozen ones, and nothing else trainable."""
    torch.manual_seed(seed)
    model = peft_model.attach(model, stage, lora)
    peft_model.activate(model, [*(frozen or []), stage], trainable=stage)
    return model


def domain_is_on(seed: int, step: int | None) -> bool:
    """Whether a domain-ready step sees the domain adapter (Parovic et al. 2023, doi:10.18653/v1/2023.findings-acl.13).

    A function of the step alone, so a resumed run does the same; dev (None) is measured with it on.
    """
    return step is None or Random(f"{seed}:domain:{step}").random() < 0.5


def _accelerator(config: Config, stage: str, directory: Path) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    project = ProjectConfiguration(project_dir=str(directory), logging_dir=str(directory / "tracking"))
    try:
        with parallel.unseen():  # dealing the model out is ours too
            accelerator = Accelerator(
                mixed_precision="no",  # autocast is ours: the frozen weights are loaded in the compute dtype
                cpu=devices.device().type == "cpu",
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
