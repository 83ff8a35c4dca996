"""The runs behind a learning curve: adapters trained on parts of the data with the settings of those that are judged.

Five sizes of the pairs and three of the documents, the largest of which is the run that is there. A task adapter that
was trained on a domain adapter is trained on each size's own. They lie below models/controls and data/controls; what
exists is used again, so an interrupted command goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from config import Config, LoraSection, TrainSection, run_label
from utils.adapters import parent_runs
from utils.artifacts import runs
from utils.artifacts.identity import settings_of
from utils.artifacts.runs import Run
from utils.evaluation.controls import PartOfData, Trainer
from utils.evaluation.learning_curve import prepared_part
from utils.evaluation.learning_curve.curve_sizes import DOCUMENTS, PAIRS, part_counts, too_few
from utils.evaluation.learning_curve.prepared_part import Size
from utils.evaluation.run_groups import ComparedRuns, RunGroup
from utils.exceptions import ConfigError, Problem
from utils.logger import event, warning
from utils.models.base_model import BaseModel
from utils.training import training_identity


@dataclass(frozen=True)
class CurvePoint:
    """One size: how much of the data (pairs, or tokens of documents) and the adapters that were trained on it."""

    size: float
    domain: Run | None
    task: Run | None
    is_whole: bool = False

    def name(self, kind: str) -> str:
        """Of its row."""
        return f"curve_{kind}_{self.size:.0f}"


@dataclass(frozen=True)
class CurveRuns:
    """The sizes of each kind of data, smallest first, and why a kind has none."""

    points: dict[str, tuple[CurvePoint, ...]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def runs(self) -> list[Run]:
        """Each run that was trained for the curve, once."""
        trained = [
            run for points in self.points.values() for p in points if not p.is_whole for run in (p.domain, p.task)
        ]
        return list({run.digest: run for run in trained if run is not None}.values())


def gather(config: Config, base: BaseModel, parts: ComparedRuns) -> CurveRuns:
    """Find the runs of every size, and train those that are missing.

    Raises ConfigError for a primary metric that no power law can be laid through, before anything is trained.
    """
    _refuse_metric(config, parts)
    trainer, points, missing = _PartTrainer(config, base), {}, {}
    for kind, own in ((PAIRS, parts.first.task), (DOCUMENTS, parts.first.domain)):
        if own is None:
            continue
        if reason := _cannot(own, parts.first.task):
            missing[kind] = reason
            continue
        # a domain adapter may have been trained on other data than the task adapter
        data = parent_runs.parent_by_digest(own, "prepared", trainer.data_roots)
        sizes = [1] * prepared_part.pairs_of(data) if kind == PAIRS else prepared_part.document_tokens(data)
        counts, whole = part_counts(kind, sizes), float(sum(sizes))
        if reason := too_few(kind, counts, len(sizes)):
            missing[kind] = reason
            continue
        reached = [float(sum(sizes[:count])) for count in counts]
        part_points = [
            CurvePoint(size, *trainer.adapters(kind, parts.first, data, count, size / whole))
            for size, count in zip(reached, counts, strict=True)
        ]
        points[kind] = (*part_points, CurvePoint(whole, parts.first.domain, parts.first.task, is_whole=True))
        event(f"learning curve of {kind}", sizes=", ".join(f"{point.size:,.0f}" for point in points[kind]))
    for kind, why in missing.items():
        warning(f"no learning curve of {kind}: {why}")
    return CurveRuns(points, missing)


def _refuse_metric(config: Config, parts: ComparedRuns) -> None:
    metric, problems = parts.primary, []
    if metric.recorded:
        what = (
            "evaluate.learning_curve: a power law needs a metric whose best value is known, and this function's is not"
        )
        fix = "leave out --evaluate.learning_curve, or let another metric decide: --evaluate.primary answer_nll"
        problems.append(Problem(what, metric.name, fix))
    if metric.generates and config.inference.engine != "local":
        what = (
            f"evaluate.learning_curve: {metric.name} needs answers of every size, which are generated in this process"
        )
        problems.append(Problem(what, config.inference.engine, "leave out --inference.engine"))
    if problems:
        raise ConfigError(problems)


def _cannot(own: Run, task: Run | None) -> str:
    """Why adapters cannot be trained anew on less data; empty when they can."""
    for run in filter(None, (own, task)):
        identity = run.manifest["identity"]
        if identity.get("on") == parent_runs.EXTERNAL:
            return f"the {run.manifest['kind']} adapter is external: how it was trained is not known"
        if "init_from" in identity or "continue_from" in identity:
            return f"the {run.manifest['kind']} adapter started from another one"
    return ""


class _PartTrainer(Trainer):
    """Trains siblings of an adapter on parts of its data."""

    @property
    def data_roots(self) -> tuple[Path, Path]:
        return self._roots(True)

    def adapters(
        self, kind: str, first: RunGroup, data: Run, count: int, share: float
    ) -> tuple[Run | None, Run | None]:
        """(domain adapter, task adapter) of one size, `count` pairs or documents of `data`."""
        domain, task = first.domain, first.task
        stacked = task is not None and task.manifest["identity"]["on"] != "base"
        what = f"{count} {kind}"
        if kind == PAIRS:
            part = PartOfData(self.part(data, Size(pairs=count)), share)
            return domain, self.task_on(task, part, domain if stacked else None, what)
        part = PartOfData(self.part(data, Size(documents=count)), share)
        smaller = self.domain_on(domain, part, what)
        if stacked:
            task = self.task(task, int(task.manifest["identity"]["seed"]), smaller)
        return smaller, task

    def part(self, data: Run, size: Size) -> Run:
        """A part of prepared data."""
        identity = prepared_part.identity(data, size)
        if (run := self.existing("prepared", identity)) is not None:
            return run
        directory = runs.directory_for(self.data, "prepared", "", run_label(self.config), identity)
        return prepared_part.make(data, size, self.base, directory)

    def domain_on(self, like: Run, part: PartOfData, what: str) -> Run:
        """A domain adapter with the settings of `like` on a part of its data, in as many passes."""
        settings, seed = settings_of(like.manifest), int(like.manifest["identity"]["seed"])
        train = TrainSection.model_validate(part.steps(settings["train"]))
        section = {"lora": LoraSection.model_validate(settings["lora"]), "train": train}
        config = self._config({"domain": section, "inputs": {"prepared": str(part.data.directory)}}, seed, like)
        identity = self._trained("domain", like, part.data, config)
        return self._find_or_make("domain", identity, config, f"a domain adapter on {what}")

    def task_on(self, like: Run, part: PartOfData, domain: Run | None, what: str) -> Run:
        """A task adapter with the settings of `like` on a part of its data, in as many passes.

        It keeps its domain as `like` was told to, so with `auto` each size decides for itself.
        """
        keeping = training_identity.keep_settings(like)
        if step := keeping.get("keep_from_step"):
            keeping["keep_from_step"] = math.ceil(step * part.share)
        seed = int(like.manifest["identity"]["seed"])
        config, identity = self._of_task(like, seed, domain, 0, keeping, None, part)
        return self._find_or_make("task", identity, config, f"a task adapter on {what}")
