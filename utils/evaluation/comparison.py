"""The comparison that `scripts/evaluate.py` runs: gather who takes part, score every row, conclude, show."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from config import Config
from utils import flags
from utils.artifacts import files, resumable, runs
from utils.artifacts.identity import settings_of
from utils.artifacts.runs import Run
from utils.composition import composed_adapter, search
from utils.data import contamination
from utils.data.prepared import Prepared
from utils.evaluation import baseline_weight, measures, retrieved_rows, scored_rows, served_rows, test_reads
from utils.evaluation.learning_curve import curve
from utils.evaluation.learning_curve.curve_runs import CurveRuns
from utils.evaluation.metrics import classification, judging, task_kinds
from utils.evaluation.metrics.primary import PrimaryMetric
from utils.evaluation.report import largest_differences
from utils.evaluation.run_groups import ComparedRuns
from utils.evaluation.scored_rows import Material, ModelRow
from utils.logger import warning
from utils.models import devices
from utils.models.base_model import BaseModel

FEW_DOCUMENTS = 12
NEVER_ENDS = 0.5


def compare(
    config: Config, base: BaseModel, parts: ComparedRuns, directory: Path, more: CurveRuns | None = None
) -> dict[str, Any]:
    """Score every row on the same tokens and conclude. Returns what `results.json` holds.

    `more` are the runs of a learning curve, where one is asked for.
    """
    began = time.perf_counter()
    if used := parts.composed or parts.alone:
        composed_adapter.say(config, used)
    parts = replace(parts, baseline_weight=baseline_weight.chosen(config, base, parts, directory))
    on = scored_rows.material(config, base, parts, directory / ".reading")
    on, retrieval = (
        retrieved_rows.with_retrieval(config, base, parts, on, directory) if config.evaluate.retrieval else (on, {})
    )
    lengths = [len(item.candidates[0]) for item in on.items]
    if on.answer_examples and (caution := task_kinds.too_long(parts.kind, lengths, config.evaluate.max_new_tokens)):
        warning(caution)
    rows = scored_rows.rows(config, base, parts)
    served_rows.refuse_other_models(config, rows)
    read = _read(parts, on, directory)
    raw = scored_rows.score(config, base, rows, on, directory)
    primary = parts.primary.on(on.examples)
    also = [metric.on(on.examples) for metric in task_kinds.metrics(parts.kind)]
    raw, examples = _answered(config, base, rows, raw, on, primary, directory)
    results = measures.assemble(rows, raw, config.evaluate, config.run.seed, primary, also, parts.which_alone)
    task = parts.first.task
    results |= {
        **({"task": _task(config, parts, rows, raw)} if task else {}),
        "examples": examples,
        "test_items": len(on.items),
        "test_documents": len({item.document for item in on.items}),
        "items_without_document": _without_document(on),
        "left_out": len(on.left_out),
        "seeds": [family.seed for family in parts.families],
        "task_trained_on": task.manifest["identity"]["on"] if task else None,
        "keeping": task.manifest.get("measured", {}).get("keeping") if task else None,
        "missing": parts.missing,
        "reads": {**read, "sentence": test_reads.sentence(read)},
        "lineage": _lineage(base, parts),
        "dataset": _dataset(parts.data),
        "contamination": _contamination(config, parts, rows, raw, primary),
        "command": flags.command(),
        "versions": runs.versions(),
    }
    if retrieval:
        measured = retrieved_rows.compared(rows, raw, config.evaluate, config.run.seed, primary)
        results["retrieval"] = retrieval | measured
        results["sentence"] = f"{results['sentence']} {measured['verdict_sentence']}".strip()
    if config.evaluate.judge:
        results["judge"] = _judged(config, rows, raw, on, directory)
    if parts.baseline_weight:
        results["baseline_weight"] = search.to_json(parts.baseline_weight)
    if more is not None:
        results["learning_curve"] = curve.results(config, base, parts, more, on, raw, primary, directory)
    results["cautions"] = cautions(config, results, parts)
    if parts.composed:
        recorded = composed_adapter.record(parts.composed, base)
        results["composition"] = {
            **{key: recorded[key] for key in ("recipe", "exact", "searched")},
            "adapters": [run.digest for run in parts.composed.runs],
        }
        results["composed_run"] = str(parts.composed.run.directory) if parts.composed.run else None
    results["measured"] = {
        "seconds": round(time.perf_counter() - began, 1),
        "peak_memory_bytes": devices.peak_memory_bytes(),
        "answers": sum(len(scores["answers"]) for scores in raw.values()),
        "answering_seconds": round(sum(scores.get("answering_seconds", 0.0) for scores in raw.values()), 1),
    }
    return results


def _answered(
    config: Config,
    base: BaseModel,
    rows: Sequence[ModelRow],
    raw: dict[str, Any],
    on: Material,
    primary: PrimaryMetric,
    directory: Path,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(scores with the generated answers of every row, the examples of the report), by this process or an engine."""
    if config.inference.engine == "local":

        def loaded(shown: Sequence[ModelRow], examples: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
            return scored_rows.answers_to(config, base, shown, on, examples)

        return raw, _examples(config, rows, raw, on, primary, directory, loaded)
    with served_rows.ServedRows(config, base, rows, on, directory) as engine:

        def served(shown: Sequence[ModelRow], examples: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
            return {row.cell: [one.answer for one in engine.answers(row, examples)] for row in shown}

        scored = engine.scores(raw)
        return scored, _examples(config, rows, scored, on, primary, directory, served)


def _examples(
    config: Config,
    rows: Sequence[ModelRow],
    raw: Mapping[str, Any],
    on: Material,
    primary: PrimaryMetric,
    directory: Path,
    answers_to: Callable[[Sequence[ModelRow], Sequence[dict[str, Any]]], dict[str, list[str]]],
) -> dict[str, Any]:
    """The items where composed won and lost most against the task adapter alone, with what both say."""
    first = {row.cell: row for row in reversed(rows)}
    if not {"composed", "task"} <= set(first) or not on.answer_examples:
        return {}
    shown = [first["task"], first["composed"]]

    def answered() -> dict[str, Any]:
        chosen = largest_differences.chosen(raw[shown[1].name], raw[shown[0].name], primary)
        by_name = {str(example["id"]): example for example in on.examples}
        names = [*chosen["won"], *chosen["lost"]]
        answers = {row.cell: {a["name"]: a["text"] for a in raw[row.name]["answers"]} for row in shown}
        new = [name for name in names if any(name not in texts for texts in answers.values())]
        # those that were asked before are not asked again, and for none no model is loaded
        for cell, texts in (answers_to(shown, [by_name[name] for name in new]) if new else {}).items():
            answers[cell] |= dict(zip(new, texts, strict=True))
        scores = {row.cell: raw[row.name] for row in shown}
        return {
            kind: largest_differences.described(listed, by_name, scores, answers, primary)
            for kind, listed in chosen.items()
        }

    return resumable.result(directory / "examples.json", resumable.owner(directory), answered)


def _read(parts: ComparedRuns, on: Material, directory: Path) -> dict[str, Any]:
    """The record of this reading of the test split; a domain adapter alone reads none."""
    if not on.examples:
        return test_reads.NONE
    used = parts.composed or parts.alone
    return test_reads.record(
        directory.parent,
        test=test_reads.digest([str(e["id"]) for e in on.examples], [str(e["question"]) for e in on.examples]),
        composed=files.fingerprint([run.digest for run in used.runs] if used else []),
        run=directory.name,
        primary=Path(parts.primary.name).name,
    )


def _task(config: Config, parts: ComparedRuns, rows: Sequence[ModelRow], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The kind of the pairs; of a classification also the confusion matrix and macro F1 of each row."""
    by_cell: dict[str, list[Any]] = {}
    for row in rows:
        by_cell.setdefault(row.cell, []).append(raw[row.name])
    labels = parts.kind.labels
    return parts.kind.to_json() | {"cells": classification.reports(by_cell, labels, seed=config.run.seed)}


def _judged(
    config: Config, rows: Sequence[ModelRow], raw: Mapping[str, Any], on: Material, directory: Path
) -> dict[str, Any] | None:
    """What a judge says of composed's answers against the task adapter's; None where one of the rows is not there."""
    first = {row.cell: row for row in reversed(rows)}
    if not {"composed", "task"} <= set(first):
        return None
    settings = config.evaluate
    task, composed = ({a["name"]: a["text"] for a in raw[first[cell].name]["answers"]} for cell in ("task", "composed"))
    labels = judging.read_labels(Path(settings.judge_labels)) if settings.judge_labels else []
    judge = judging.Judge(settings.judge, directory / "judge.jsonl")
    how = {"resamples": settings.resamples, "seed": config.run.seed}
    return judging.compared(judge, on.answer_examples, task, composed, labels, **how)


def _contamination(
    config: Config, parts: ComparedRuns, rows: Sequence[ModelRow], raw: Mapping[str, Any], primary: PrimaryMetric
) -> dict[str, Any]:
    """Which test items stand in what was trained on, and the verdict without them."""
    if parts.first.task is None:  # no question was asked
        return {}
    measured = contamination.report(Prepared(parts.data.directory))
    flagged = set(measured.flagged)
    rest = measures.without(rows, raw, config.evaluate, config.run.seed, flagged, primary, parts.which_alone)
    return {**measured.to_json(), "lines": measured.lines(), "without_flagged": rest}


def cautions(config: Config, results: Mapping[str, Any], parts: ComparedRuns) -> list[str]:
    """What a reader has to know before believing the numbers."""
    notes = [test_reads.sentence(results["reads"])]
    if results["items_without_document"]:
        notes.append(
            f"{results['items_without_document']} of {results['test_items'] + results['left_out']} test questions "
            "name no document: each counts as one of its own; where some share a source the intervals are too narrow."
        )
    if results["left_out"]:
        notes.append(f"{results['left_out']} test questions do not fit --evaluate.batch_tokens and are left out.")
    if results["test_items"] and results["test_documents"] < FEW_DOCUMENTS:
        documents = f"{results['test_documents']} document{'s' * (results['test_documents'] != 1)}"
        notes.append(f"The test questions are about {documents}: few to draw conclusions from.")
    if parts.composed and not parts.composed.searched:
        search_command = composed_adapter.searching(config, parts.composed)
        notes.append(f"The weights were not chosen on dev; {search_command} chooses them there.")
    if len(parts.families) == 1:
        notes.append("One training seed: what others would give is not in the intervals (--evaluate.seeds 1,2).")
    if chosen := results.get("baseline_weight"):
        (weight,) = chosen["chosen"]["weights"]
        beside = "" if weight == 1 else "; the row task_at_1 has it at weight 1"
        notes.append(f"The task adapter alone has a weight chosen on dev too ({weight:g}), as composed has{beside}.")
    if keeping := results.get("keeping"):
        notes.append(f"What keeps the domain while the task adapter is trained: {keeping['how']} ({keeping['why']}).")
    trained = parts.first.task.manifest["identity"] if parts.first.task else {}
    if trained.get("retrieval") and "retrieval" not in results:
        notes.append(
            "The task adapter was trained with passages and asked without: --evaluate.retrieval bm25 asks it with."
        )
    kept = trained.get("prompt_loss_weight") or (results.get("keeping") or {}).get("how", "off") != "off"
    if results["verdict"] == "interferes" and "train" in trained and not kept:
        notes.append(
            "A task adapter that reads the domain's documents too may leave more of it: --task.keep_domain replay; "
            "where prompts are long and answers short, so may one that is trained on part of the prompt: "
            "--task.prompt_loss_weight 0.1. Look on dev before you read the test again."
        )
    silent = [c for c, cell in results["cells"].items() if cell.get("format", {}).get("ended", 1.0) < NEVER_ENDS]
    if silent:
        notes.append(
            f"Most answers of {', '.join(silent)} do not end by themselves: their exact match and F1 mean little."
        )
    return [sentence for sentence in notes if sentence]


def _without_document(on: Material) -> int:
    """Items that stand for a document of their own: their intervals assume that they have nothing in common.

    A document that several items share was named, even where it has the name of one of them.
    """
    items = Counter(str(e["document"]) for e in on.examples)
    return sum(str(e["document"]) == str(e["id"]) and items[str(e["document"])] == 1 for e in on.examples)


def _lineage(base: BaseModel, parts: ComparedRuns) -> list[dict[str, Any]]:
    own = [{"kind": "base", "path": base.source, "digest": base.digest}]
    return own + [
        {**run.as_parent(), "measured": {k: v for k, v in run.manifest.get("measured", {}).items() if _is_small(v)}}
        for run in parts.runs()
    ]


def _dataset(data: Run) -> dict[str, Any]:
    """Where the test questions and the held-out documents came from."""
    data_settings = settings_of(data.manifest)["data"]
    return {
        "task": data_settings["task_test"] or data_settings["task"],
        "task_revision": data_settings["task_revision"],
        "corpus": data_settings["corpus_heldout"] or data_settings["corpus"],
        "corpus_revision": data_settings["corpus_revision"],
    }


def _is_small(value: Any) -> bool:
    return not isinstance(value, (list, dict))
