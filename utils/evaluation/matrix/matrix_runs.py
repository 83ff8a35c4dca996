"""Which adapters stand in the rows and columns of a matrix, and which pairs of them can be composed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from config import Config
from utils import flags
from utils.adapters import adapter_files, parent_runs
from utils.adapters.factors import Factors
from utils.artifacts import files, runs
from utils.artifacts.runs import Run
from utils.composition import chosen_adapters
from utils.composition.methods import Recipe, compose
from utils.data.prepared import Prepared
from utils.evaluation.baseline_weight import search_behind
from utils.evaluation.controls import Trainer
from utils.evaluation.metrics import json_answers, task_kinds
from utils.evaluation.metrics import primary as primary_metric
from utils.evaluation.metrics.primary import ANSWER_NLL, PrimaryMetric
from utils.evaluation.metrics.task_kinds import TaskKind
from utils.exceptions import ArtefactError, ConfigError, Problem
from utils.logger import event
from utils.models.base_model import BaseModel


@dataclass(frozen=True)
class AdapterPair:
    """A domain and a task adapter. `why_empty` says why they are not composed; `composed` is a run of exactly these."""

    domain: Run
    task: Run
    composed: Run | None = None
    why_empty: str = ""

    @property
    def recipe(self) -> Recipe:
        """As the newest composed run of exactly these, else the sum with weights of 1."""
        if self.composed is None:
            return Recipe()
        recorded = self.composed.manifest["composition"]["recipe"]
        return Recipe(**{**recorded, "weights": tuple(recorded["weights"])})

    def factors(self, base: BaseModel) -> Factors:
        """Both as one adapter."""
        if self.composed is not None:
            return adapter_files.load(self.composed.adapter, base)
        return compose([adapter_files.load(run.adapter, base) for run in (self.domain, self.task)], self.recipe)


@dataclass(frozen=True)
class MatrixRuns:
    """Everyone who takes part. `data` has what each adapter was trained on, `baselines` what a task adapter alone is,
    `metrics` what decides about it, `kinds` what its questions are.

    A baseline is the task adapter trained on the base with the same settings, or the adapter itself where it was
    trained to work without a domain adapter; None where there is neither. By digest.
    """

    domains: tuple[Run, ...]
    tasks: tuple[Run, ...]
    pairs: tuple[AdapterPair, ...]
    data: dict[str, Run]
    baselines: dict[str, Run | None]
    # of task adapters that are in a pair
    metrics: dict[str, PrimaryMetric] = field(default_factory=dict)
    kinds: dict[str, TaskKind] = field(default_factory=dict)

    def metric_of(self, task: Run) -> PrimaryMetric:
        """What decides about a task adapter."""
        return self.metrics.get(task.digest, ANSWER_NLL)

    def search_of(self, pair: AdapterPair) -> dict[str, Any] | None:
        """The search that the baseline of a pair needs too (`baseline_weight`), where the pair's weights had one."""
        return search_behind(pair.composed) if self.baselines[pair.task.digest] is not None else None

    def runs(self) -> list[Run]:
        """Each run once."""
        composed = [pair.composed for pair in self.pairs]
        everyone = [*self.domains, *self.tasks, *self.baselines.values(), *self.data.values(), *composed]
        return list({run.digest: run for run in everyone if run is not None}.values())


def is_asked(config: Config) -> bool:
    """Whether the settings ask for a matrix."""
    section = config.evaluate
    return section.matrix or bool(section.matrix_domain or section.matrix_task)


def gather(config: Config, base: BaseModel) -> MatrixRuns:
    """Find the adapters and pair them. Raises ArtefactError with every path that cannot take part."""
    problems: list[Problem] = []
    domains = _named(config, base, "domain", config.evaluate.matrix_domain, problems)
    tasks = _named(config, base, "task", config.evaluate.matrix_task, problems)
    for stage, adapters in (("domain", domains), ("task", tasks)):
        if not adapters and not problems:
            fix = f"train one: {runs.STAGES[stage]}{flags.given(config, 'base')}"
            problems.append(Problem(f"there is no complete {stage} run of this base model", fix=fix))
    if problems:
        raise ArtefactError(problems)
    data = {
        run.digest: own for run in (*domains, *tasks) if (own := parent_runs.data_of(config, base, [run])) is not None
    }
    trainer = Trainer(config, base)
    baselines = {task.digest: _baseline(trainer, task) for task in tasks}
    pairs = tuple(_pair(config, base, domain, task, data) for domain in domains for task in tasks)
    event(
        "a matrix of adapters",
        domains=len(domains),
        tasks=len(tasks),
        pairs=sum(not pair.why_empty for pair in pairs),
        empty=sum(bool(pair.why_empty) for pair in pairs),
    )
    metrics, kinds = _metrics(
        config, {pair.task.digest: data[pair.task.digest] for pair in pairs if not pair.why_empty}
    )
    return MatrixRuns(tuple(domains), tuple(tasks), pairs, data, baselines, metrics, kinds)


def _metrics(config: Config, data: Mapping[str, Run]) -> tuple[dict[str, PrimaryMetric], dict[str, TaskKind]]:
    """The primary metric on the questions of each task adapter, and their kind.

    Raises ConfigError with every task whose data do not support it.
    """
    section, problems = config.evaluate, []
    schema = json_answers.read_schema(Path(section.json_schema)) if section.json_schema else None
    metrics, kinds = {}, {}
    for task, run in data.items():
        prepared = Prepared(run.directory)
        kinds[task] = task_kinds.recognised(prepared, schema)
        try:
            metric = primary_metric.chosen(section, prepared, has_labels=bool(kinds[task].labels))
            metrics[task] = metric.on(prepared.examples("test"))
        except ConfigError as error:
            problems += [replace(one, what=f"{one.what} ({run.directory.name})") for one in error.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return metrics, kinds


def refuse_flags(config: Config) -> None:
    """Raises ConfigError for settings of a single comparison, which would be silently left out."""
    section, inputs = config.evaluate, config.inputs
    given = {
        "--evaluate.controls": section.controls,
        "--evaluate.seeds": section.seeds,
        "--evaluate.also": section.also,
        "--evaluate.learning_curve": section.learning_curve,
        "--evaluate.retrieval": section.retrieval,
        "--evaluate.judge": section.judge,
        f"--inference.engine {config.inference.engine}": config.inference.engine != "local",
        "--composed": inputs.composed,
        "--domain_adapter": inputs.domain_adapter,
        "--task_adapter": inputs.task_adapter,
        "--weights": config.compose.weights,
    }
    problems = [
        Problem(f"{flag} belongs to the evaluation of one pair", fix="leave it out, or leave out --evaluate.matrix...")
        for flag, is_given in given.items()
        if is_given
    ]
    if problems:
        raise ConfigError(problems)


def _named(config: Config, base: BaseModel, stage: str, paths: Sequence[str], problems: list[Problem]) -> list[Run]:
    """The adapters at these paths, or every complete run of the stage; each once."""
    flag, adapters = f"--evaluate.matrix_{stage}", []
    if not paths:
        fits = parent_runs.for_base(config, base)
        listed = [run for run in runs.complete_runs(config.run.models_dir, stage) if not fits(run)]
        for run in listed:
            files.verify(run.directory)
        return sorted(listed, key=lambda run: run.directory.name)
    for path in paths:
        try:
            run = parent_runs.any_run(config, base, Path(path), flag=flag)
        except ArtefactError as error:
            problems += error.problems
            continue
        kind = run.manifest["kind"]
        if kind not in (stage, "further"):
            problems.append(Problem(f"{flag}: this is a {kind} run", path, f"name a {stage} adapter"))
        elif any(run.digest == other.digest for other in adapters):
            problems.append(Problem(f"{flag}: this adapter is named twice", path, "name it once"))
        else:
            adapters.append(run)
    return adapters


def _pair(config: Config, base: BaseModel, domain: Run, task: Run, data: dict[str, Run]) -> AdapterPair:
    below = next((p for p in task.manifest["parents"] if p["kind"] == "domain"), None)
    if task.manifest["identity"].get("on") == "domain" and below and below["digest"] != domain.digest:
        why = f"it was trained on {Path(below['path']).name} and works on that one alone"
        return AdapterPair(domain, task, why_empty=why)
    if task.digest not in data:
        return AdapterPair(
            domain, task, why_empty="the data it was trained on is not here, so there are no test questions"
        )
    if not (data[task.digest].directory / "task_test.jsonl").is_file() or not _has_test(data[task.digest]):
        return AdapterPair(domain, task, why_empty=f"{data[task.digest].directory.name} has no test questions")
    return AdapterPair(domain, task, chosen_adapters.made_of(config, base, [domain, task]))


def _has_test(data: Run) -> bool:
    return bool(Prepared(data.directory).examples("test"))


def _baseline(trainer: Trainer, task: Run) -> Run | None:
    """What answers without a domain adapter: see `MatrixRuns`."""
    identity = task.manifest["identity"]
    on = identity.get("on")
    if on == "base" or on == parent_runs.EXTERNAL:
        return task
    below = None
    with suppress(ArtefactError):
        below = parent_runs.parent_by_digest(task, "domain", (trainer.config.run.models_dir, trainer.models))
    if not {"init_from", "continue_from"} & set(identity) and (run := trainer.on_base(task, below)) is not None:
        return run
    return task if on == "domain_ready" else None
