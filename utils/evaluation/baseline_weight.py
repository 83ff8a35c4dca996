"""The weight of the fair baseline: chosen on dev where the composed model's weights were, so best meets best.

A search gives the composed model's task adapter the weight that answers dev questions best. Scaling the task adapter
alone can be worth more than the margin of H2, so the row it is compared with gets the same search, on the same
questions: one weight, no domain to keep, the first seed's for all seeds, as the composed model's are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from config import Config
from utils.adapters import adapter_files
from utils.artifacts.runs import Run
from utils.composition import dev_losses, search
from utils.composition.dev_losses import DevProbe
from utils.composition.search import ChosenWeights
from utils.composition.weights.measured_points import MeasuredPoints
from utils.evaluation.run_groups import ComparedRuns
from utils.logger import event
from utils.models.base_model import BaseModel
from utils.models.parallel import ranks

POINTS = "baseline_points.jsonl"


def search_of(parts: ComparedRuns) -> dict[str, Any] | None:
    """What decides the search: which dev questions the composed model's weights were chosen on; None without one."""
    if parts.composed is None or not parts.composed.searched or parts.first.baseline is None:
        return None
    return search_behind(parts.composed.run)


def search_behind(composed: Run | None) -> dict[str, Any] | None:
    """The same of a composed run; None where its weights were not searched."""
    if composed is None or not composed.manifest["composition"]["searched"]:
        return None
    recorded = composed.manifest["identity"]
    searched = recorded.get("search") or recorded["compose"]  # the whole section, until 2026-11-30
    return {"max_dev_items": searched["max_dev_items"], "seed": recorded["seed"], "data": recorded["data"]}


def chosen(config: Config, base: BaseModel, parts: ComparedRuns, directory: Path) -> ChosenWeights | None:
    """The baseline's weight and what was tried; None where the composed model's weights were not searched.

    Points are remembered in `directory`, so an interrupted evaluation goes on.
    """
    of, baseline = search_of(parts), parts.first.baseline
    if of is None or baseline is None:
        return None
    prompt = parts.first.task.manifest["system_prompt"]
    return searched_alone(config, base, of, baseline, parts.data, prompt, directory / POINTS)


def searched_alone(
    config: Config,
    base: BaseModel,
    of: dict[str, Any],
    baseline: Run,
    data: Run,
    system_prompt: str,
    remembered: Path,
) -> ChosenWeights:
    """The weight of one adapter, searched as `of` says on the dev questions of `data`."""
    compose = config.compose.model_copy(update={"max_dev_items": of["max_dev_items"]})
    dev_config = config.model_copy(
        update={"compose": compose, "run": config.run.model_copy(update={"seed": of["seed"]})}
    )
    dev = dev_losses.dev_data(dev_config, base, data.directory, system_prompt)
    adapter = adapter_files.load(baseline.adapter, base)
    with ranks.Held(DevProbe.on, base, config.base, [adapter], replace(dev, documents=None)) as probe:
        outcome = search.search_alone(MeasuredPoints(probe, remembered).on_all)
    event("the baseline's weight chosen on dev", weight=outcome.chosen.weights[0], reason=outcome.reason)
    return outcome
