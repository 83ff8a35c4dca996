"""What decides an evaluation's numbers, under names that stay when settings are renamed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from config import Config
from utils.artifacts import files
from utils.artifacts.identity import Identity, chosen, same_names
from utils.data.retrieval.retrieved_prompts import BM25
from utils.evaluation import baseline_weight
from utils.evaluation.learning_curve.curve_runs import CurveRuns
from utils.evaluation.metrics.primary import ANSWER_NLL
from utils.evaluation.run_groups import ComparedRuns
from utils.models import devices
from utils.models.base_model import BaseModel
from utils.models.model_shapes import PLAIN
from utils.models.rows.row_support import RowSupport

# recorded name -> setting; which rows there are is decided by the runs and models that take part
SCORED = same_names("margin", "batch_tokens", "max_heldout_documents", "generated_answers", "resamples")
ANSWERED = same_names("max_new_tokens")
KEPT = same_names("base", "runs", "models", "recipe", "alone", "curve", "dtype", "quantization", "seed")


def evaluation_identity(
    config: Config,
    base: BaseModel,
    parts: ComparedRuns,
    supports: Mapping[str, RowSupport],
    turn: Mapping[str, Any],
    curve: CurveRuns | None = None,
) -> Identity:
    """The identity of a comparison of these runs, and of a learning curve's.

    `supports` is what each model honours when rows are shared, `turn` what stands around answers (`chat.deciding`).
    """
    recorded = {
        "base": base.digest,
        "runs": [run.digest for run in parts.runs()],
        "models": {row.name: row.model.digest for row in parts.guests if row.model},
        "recipe": asdict(used.recipe) if (used := parts.composed or parts.alone) else None,
        # until 2026-11-30 one adapter alone got no verdict
        **({"alone": parts.which_alone} if parts.alone else {}),
        **({"curve": [run.digest for run in curve.runs()]} if curve else {}),
        "evaluate": config.evaluate.model_dump(mode="json") | _primary(parts),
        "dtype": str(devices.compute_dtype(config.base.dtype)),
        **({} if base.quantization == PLAIN else {"quantization": base.quantization}),
        "seed": config.run.seed,
        **({} if config.inference.engine == "local" else {"engine": "server"}),
    }
    searched = baseline_weight.search_of(parts)
    row_facts = {name: facts["rows"] for name, support in supports.items() if (facts := support.deciding())}
    return Identity.of(
        "evaluation",
        _values(recorded)
        | ({"rows": row_facts} if row_facts else {})
        | ({"baseline_weight": searched} if searched else {})
        | dict(turn)
        | base.deciding_tokenizer(),
        _values,
    )


def _values(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The deciding values of an identity that holds the whole section, as those of before 2026-11-30 do."""
    section, engine = recorded["evaluate"], recorded.get("engine")
    scored = chosen(section, SCORED)
    answers_all = section.get("answers_all", False)
    if section.get("primary", ANSWER_NLL.name) != ANSWER_NLL.name:  # left out of those of before there were others
        scored["primary"] = section["primary"]
    if retrieval := section.get("retrieval"):
        scored["retrieval"] = BM25 if retrieval == BM25 else _content(Path(retrieval))
    if section.get("judge"):
        labels = section["judge_labels"]
        scored["judge"] = {"url": section["judge"], "labels": _content(Path(labels)) if labels else ""}
    if section.get("task_kind"):
        scored["task_kind"] = section["task_kind"]
    if answers_all:
        del scored["generated_answers"]
    if answers_all or section["generated_answers"]:
        scored |= chosen(section, ANSWERED)
        # a server rounds otherwise, whoever started it
        scored |= {"engine": engine} if engine else {}
    if section["general_text"]:
        scored["general_text"] = _content(Path(section["general_text"]))
    return {**chosen(recorded, KEPT), "evaluate": scored}


def _primary(parts: ComparedRuns) -> dict[str, Any]:
    """What decides: the metric, or a person's file by its contents, with its margin; and the kind of task."""
    metric, kind = parts.primary, parts.kind.deciding()
    return {
        "task_kind": kind,
        "primary": metric.recorded or metric.name,
        "margin": metric.margin,
        "answers_all": metric.generates,
    }


def _content(path: Path) -> str:
    """Digest of a file, or of the files of a folder; the path itself where nothing is there."""
    if path.is_file():
        return files.sha256_file(path)
    inside = sorted(p for p in path.rglob("*") if p.is_file())
    return (
        files.fingerprint([(str(p.relative_to(path)), files.sha256_file(p)) for p in inside]) if inside else str(path)
    )
