"""The runs that are compared: a family for each seed, made of the adapters, the baseline and the controls."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import BaseModelSection, Config, EvaluateSection
from utils import flags
from utils.adapters import adapter_files, parent_runs
from utils.artifacts import files, runs
from utils.artifacts.runs import Run
from utils.composition import chosen_adapters, composed_adapter
from utils.composition.composed_adapter import Composition
from utils.composition.search import ChosenWeights
from utils.data.prepared import Prepared
from utils.data.retrieval import retrieved_prompts
from utils.evaluation.controls import Trainer
from utils.evaluation.metrics import json_answers, judging, task_kinds
from utils.evaluation.metrics import primary as primary_metric
from utils.evaluation.metrics.primary import PrimaryMetric
from utils.evaluation.metrics.task_kinds import SHORT_ANSWERS, TaskKind
from utils.exceptions import ArtefactError, ConfigError, Problem
from utils.logger import event, warning
from utils.models import sources
from utils.models.base_model import BaseModel
from utils.training.training_identity import decided


@dataclass(frozen=True)
class RunGroup:
    """What one seed trained. `task` belongs to the composed model, `baseline` was trained on the base.

    Where only one adapter was made, the other is None; a task adapter alone is its own baseline.

    A control stands for the domain adapter (`wrong_domain`, `random`: the adapter and the task adapter trained on it in
    the same regime) or is a task adapter of the ranks together (`rank_matched`). Where the task adapter keeps its
    domain, controls do as it did, each with the documents of its own domain adapter; `task_plain` is the baseline
    without that.
    """

    seed: int
    domain: Run | None
    task: Run | None
    baseline: Run | None
    controls: dict[str, tuple[Run, ...]] = field(default_factory=dict)

    def runs(self) -> list[Run]:
        own = [run for run in (self.domain, self.task, self.baseline) if run is not None]
        return own + [run for runs in self.controls.values() for run in runs]


@dataclass(frozen=True)
class FurtherRow:
    """A further row of `evaluate.also`: adapters that are applied together, or a merged model."""

    name: str
    adapters: tuple[Run, ...]
    model: BaseModel | None = None


@dataclass(frozen=True)
class ComparedRuns:
    """Everyone, the data they are judged on, and why somebody is missing.

    `alone` is the one adapter that is judged where there is no other to compose it with.
    """

    data: Run
    families: tuple[RunGroup, ...]
    composed: Composition | None
    guests: tuple[FurtherRow, ...]
    missing: dict[str, str]
    primary: PrimaryMetric = primary_metric.ANSWER_NLL
    kind: TaskKind = SHORT_ANSWERS
    # of the baseline, chosen on dev where the composed model's were (`baseline_weight`)
    baseline_weight: ChosenWeights | None = None
    alone: Composition | None = None

    @property
    def which_alone(self) -> str:
        """ "domain" or "task" where only that one is judged, else an empty string."""
        return "" if self.alone is None else "domain" if self.first.task is None else "task"

    @property
    def first(self) -> RunGroup:
        return self.families[0]

    def runs(self) -> list[Run]:
        """Each run once, in order."""
        used = self.composed or self.alone
        composed_runs = [used.run] if used and used.run else []
        further = list(used.runs[2 if self.composed else 1 :]) if used else []
        everyone = [run for family in self.families for run in family.runs()]
        everyone += [run for guest in self.guests for run in guest.adapters]
        return list({run.digest: run for run in [*everyone, self.data, *composed_runs, *further]}.values())


def gather(config: Config, base: BaseModel) -> ComparedRuns:
    """Find the runs; with `evaluate.controls` and `evaluate.seeds` also make the ones that are missing.

    Raises ArtefactError when a run is missing that cannot be made here.
    """
    domain, task = chosen_adapters.pair(config, base)
    own = [run for run in (domain, task) if run is not None]
    data = parent_runs.data_of(config, base, own[-1:])
    if data is None:
        raise ArtefactError(
            Problem(
                f"{own[-1].directory} does not say which data it was trained on",
                fix=f"prepare data: {runs.STAGES['prepared']}{flags.given(config, 'base', 'data')}",
            )
        )
    # before hours are spent on controls: what cannot be used is refused here
    _refuse_for_one(config.evaluate, domain, task)
    schema = json_answers.read_schema(Path(config.evaluate.json_schema)) if config.evaluate.json_schema else None
    kind = task_kinds.recognised(Prepared(data.directory), schema)
    if task is not None:
        event(kind.sentence)
    primary = primary_metric.chosen(config.evaluate, Prepared(data.directory), has_labels=bool(kind.labels))
    judging.check(config.evaluate)
    retrieved_prompts.check(config.evaluate.retrieval, Prepared(data.directory))
    guests = tuple(_guest(config, base, Path(path), at) for at, path in enumerate(config.evaluate.also))
    trainer = Trainer(config, base)
    missing: dict[str, str] = {}
    first = _family(config, trainer, missing, domain, task)
    families = [first]
    for seed in config.evaluate.seeds:
        if any(seed == family.seed for family in families):
            raise ArtefactError(Problem("evaluate.seeds: this seed is there already", seed, "leave it out"))
        families.append(_sibling(config, trainer, missing, first, seed))
    used = composed_adapter.composition(config, base)
    for name, why in missing.items():
        warning(f"{name} is left out: {why}")
    composed, alone = (used, None) if len(own) == 2 else (None, used)
    return ComparedRuns(data, tuple(families), composed, guests, missing, primary, kind, alone=alone)


def _refuse_for_one(settings: EvaluateSection, domain: Run | None, task: Run | None) -> None:
    """Raises ConfigError for what is asked about both adapters where there is only one of them."""
    if domain is not None and task is not None:
        return
    only = "task" if domain is None else "domain"
    other = {"task": "domain", "domain": "task"}[only]
    given = {"--evaluate.judge": (settings.judge, "compares composed with the task adapter")}
    if only == "domain":
        of_answers = "scores answers, and a domain adapter alone is judged by held-out documents"
        is_other = settings.primary != primary_metric.ANSWER_NLL.name
        given |= {"--evaluate.primary": (settings.primary if is_other else "", of_answers)}
        given |= {"--evaluate.retrieval": (settings.retrieval, of_answers)}
    problems = [
        Problem(f"{flag} {why}; there is only a {only} adapter", value, f"leave it out, or train the {other} adapter")
        for flag, (value, why) in given.items()
        if value
    ]
    if problems:
        raise ConfigError(problems)


def _family(
    config: Config, trainer: Trainer, missing: dict[str, str], domain: Run | None, task: Run | None
) -> RunGroup:
    """The adapters that were asked for, with their baseline and controls; one that is alone has neither."""
    if domain is None or task is None:
        only = domain or task
        if config.evaluate.controls:
            missing["controls"] = "they take the domain adapter's place in a composition, and there is none"
        return RunGroup(int(only.manifest["identity"].get("seed", config.run.seed)), domain, task, task)
    if task.manifest["identity"]["on"] == parent_runs.EXTERNAL:
        missing["task"] = "the adapter is external: the settings of a fair baseline are not known"
        return RunGroup(config.run.seed, domain, task, None)
    if not _can_be_repeated(task) and task.manifest["identity"]["on"] != "base":
        missing["task"] = (
            "the task adapter started from another one: an adapter trained from nothing is no fair baseline"
        )
        return RunGroup(int(task.manifest["identity"]["seed"]), domain, task, None)
    seed = int(task.manifest["identity"]["seed"])
    return RunGroup(
        seed,
        domain,
        task,
        _baseline(config, trainer, missing, domain, task),
        _controls(config, trainer, missing, domain, task, seed),
    )


def _sibling(config: Config, trainer: Trainer, missing: dict[str, str], first: RunGroup, seed: int) -> RunGroup:
    """The same family with another seed."""
    domain, task = first.domain, first.task
    external = [run for run in (domain, task) if run and not _can_be_repeated(run)]
    if external:
        raise ArtefactError(
            Problem(
                "evaluate.seeds: an external adapter, or one that started from another, cannot be trained anew",
                str(external[0].directory),
                "leave out --evaluate.seeds",
            )
        )
    other_domain = trainer.domain(domain, seed) if domain else None
    if task is None:
        return RunGroup(seed, other_domain, None, None)
    stacked = task.manifest["identity"]["on"] != "base"
    other_task = trainer.task(task, seed, other_domain if stacked else None)
    baseline = None if stacked else other_task
    if stacked and first.baseline:
        baseline = trainer.task(other_task, seed, None, keeping=decided(other_task), documents_of=other_domain)
    return RunGroup(
        seed, other_domain, other_task, baseline, _controls(config, trainer, missing, other_domain, other_task, seed)
    )


def _baseline(config: Config, trainer: Trainer, missing: dict[str, str], domain: Run | None, task: Run) -> Run | None:
    """The adapter trained on the base with the same data, steps and settings as `task`."""
    identity = task.manifest["identity"]
    if identity["on"] == "base":
        return task
    keeping = decided(task)
    run = trainer.on_base(task, domain)
    if run is None and config.evaluate.controls:
        run = trainer.task(task, int(identity["seed"]), None, keeping=keeping, documents_of=domain)
    if run is None:
        keeping_flags = (
            "" if keeping["keep_domain"] == "off" else "".join(f" --task.{k} {v}" for k, v in keeping.items())
        )
        missing["task"] = (
            "no task adapter was trained on the base with the same settings: train it with "
            f"{runs.STAGES['task']} --task.on base{keeping_flags}{_as_trained(config, task)}, or add "
            "--evaluate.controls"
        )
    else:
        event("the task row is the adapter trained on the base", path=run.directory)
    return run


def _as_trained(config: Config, task: Run) -> str:
    """The flags of a training with the data and settings of this one, under another name; for one of ours."""
    if not (task.directory / "config.json").is_file():
        return flags.given(config, "base")
    words: list[str | Path] = ["--config", task.directory / "config.json"]
    with suppress(ArtefactError):  # its data may be gone
        if (data := parent_runs.parent_of(task, "prepared", config.run.data_dir)) is not None:
            words += ["--inputs.prepared", data.directory]
    return " " + shlex.join(map(str, [*words, "--run.name", f"{task.directory.name}-on-base"]))


def _controls(
    config: Config, trainer: Trainer, missing: dict[str, str], domain: Run | None, task: Run, seed: int
) -> dict[str, tuple[Run, ...]]:
    """The controls of one family: nothing without the flag or without a domain adapter."""
    if not config.evaluate.controls or domain is None:
        return {}
    stacked, keeping = task.manifest["identity"]["on"] != "base", decided(task)

    def with_task(other: Run) -> tuple[Run, ...]:
        return other, trainer.task(task, seed, other, keeping=keeping) if stacked else task

    def on_base(**how: Any) -> tuple[Run, ...]:
        return (trainer.task(task, seed, None, documents_of=domain, **{"keeping": keeping, **how}),)

    controls: dict[str, tuple[Run, ...]] = {}
    makers: dict[str, Callable[[], tuple[Run, ...]]] = {
        "random": lambda: with_task(trainer.random_domain(domain, seed)),
        "rank_matched": lambda: on_base(rank=_rank(domain) + _rank(task)),
    }
    if keeping["keep_domain"] != "off":
        makers["task_plain"] = lambda: on_base(keeping={"keep_domain": "off"})
    if not _can_be_repeated(domain):
        what = "the domain adapter is external, or started from another adapter"
        missing["wrong_domain"] = f"{what}: how to train another in the same way is not known"
    else:
        data = parent_runs.parent_by_digest(domain, "prepared", (config.run.data_dir, config.run.data_dir / "controls"))
        makers["wrong_domain"] = lambda: with_task(trainer.domain(domain, seed, trainer.wrong_data(data)))
    for name, make in makers.items():
        controls[name] = make()
    return controls


def _can_be_repeated(run: Run) -> bool:
    """Whether the settings of a run say all of how it was trained."""
    identity = run.manifest["identity"]
    return identity.get("on") != parent_runs.EXTERNAL and not {"init_from", "continue_from"} & set(identity)


def _rank(run: Run) -> int:
    if "lora" in run.manifest["identity"]:
        return int(run.manifest["identity"]["lora"]["rank"])
    return max(f.rank for f in adapter_files.load(run.adapter).values())


def _guest(config: Config, base: BaseModel, path: Path, at: int) -> FurtherRow:
    """What a path of `evaluate.also` names. Raises ArtefactError when it is nothing that can be compared."""
    name = f"also{at + 1}_{path.resolve().name}"
    is_model = (path / "config.json").is_file() and not any(
        (path / folder / "adapter_config.json").is_file() for folder in (".", "adapter")
    )
    if is_model and not (path / "identity.json").exists():
        model = sources.fetch(BaseModelSection(source=str(path)), config.run.models_dir)
        if model.tokenizer_digest != base.tokenizer_digest:
            raise ArtefactError(
                Problem(
                    "--evaluate.also: this model has another tokenizer, so likelihoods per token do not compare",
                    str(path),
                    "compare models of one tokenizer",
                )
            )
        if (path / files.MANIFEST).exists():
            files.verify(path)
        return FurtherRow(name, (), model)
    run = parent_runs.any_run(config, base, path, flag="--evaluate.also")
    if run.manifest["kind"] == "task" and run.manifest["identity"]["on"] in ("domain", "domain_ready"):
        below = parent_runs.parent_by_digest(run, "domain", (config.run.models_dir, config.run.models_dir / "controls"))
        return FurtherRow(name, (below, run))
    return FurtherRow(name, (run,))
