"""From per-item scores to what the report says: measures with intervals, the verdict, differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from config import EvaluateSection
from utils.evaluation import one_adapter, verdict
from utils.evaluation.intervals import Interval, ratio_interval
from utils.evaluation.metrics.primary import ANSWER_NLL, PrimaryMetric, is_right, with_choices
from utils.evaluation.scored_rows import MEANING, ModelRow
from utils.evaluation.verdict import Scores, Verdict

# measure -> (which scores, numerator, denominator); a measure is sum / sum, with documents as clusters
Reader = Callable[[Mapping[str, Any]], float]
MEASURES: dict[str, tuple[str, Reader, Reader]] = {
    "domain_nll": ("heldout", lambda d: d["nll"], lambda d: d["tokens"]),
    "domain_nll_per_byte": ("heldout", lambda d: d["nll"], lambda d: d["utf8_bytes"]),
    "corpus_nll": ("seen", lambda d: d["nll"], lambda d: d["tokens"]),
    "general_nll": ("general", lambda d: d["nll"], lambda d: d["tokens"]),
    "answer_nll": ("items", lambda i: i["answer_nll"], lambda i: i["answer_tokens"]),
    "end_of_turn_nll": ("items", lambda i: i["end_nll"], lambda i: 1.0),
    "choice_accuracy": ("choices", lambda i: is_right(i, normalised=False), lambda i: 1.0),
    "choice_accuracy_per_token": ("choices", lambda i: is_right(i, normalised=True), lambda i: 1.0),
    "em": ("answers", lambda a: a["exact_match"], lambda a: 1.0),
    "f1": ("answers", lambda a: a["f1"], lambda a: 1.0),
}
PERPLEXITIES = {"domain_ppl": "domain_nll", "corpus_ppl": "corpus_nll", "general_ppl": "general_nll"}
# metrics that are measured under another name
RENAMED = {"exact_match": "em"}
# a person's own metric, as a measure of each cell
OWN = "own_metric"
FORMAT = ("ended", "repetitive", "thinking_left")


def assemble(
    rows: Sequence[ModelRow],
    raw: Mapping[str, Any],
    settings: EvaluateSection,
    seed: int,
    primary: PrimaryMetric = ANSWER_NLL,
    also: Sequence[PrimaryMetric] = (),
    alone: str = "",
) -> dict[str, Any]:
    """Cells with intervals, the verdict with its contrasts, and composed against every other cell.

    `also` are metrics of the kind of task, which are measured and decide nothing; `alone` is the only adapter
    ("domain" or "task"), which is judged against the base model.
    """
    by_cell = _by_cell(rows, raw)
    common: dict[str, Any] = {"resamples": settings.resamples, "seed": seed}
    answers = verdict.with_spans({cell: primary.scores(scores) for cell, scores in by_cell.items()})
    meaning, own = MEANING, {}
    if alone:
        judged, changes = judge_alone(by_cell, alone, common, primary)
        meaning = {**MEANING, **one_adapter.MEANING}
        own = {"alone": alone, "changes": {what: plain(change) for what, change in changes.items()}}
    else:
        judged = judge(by_cell, settings, seed, primary=primary)
    return {
        **own,
        "verdict": judged.verdict,
        "sentence": judged.sentence,
        "primary": primary.to_json(),
        "cells": {
            cell: {
                "meaning": meaning.get(cell, "as named by --evaluate.also"),
                **measured(scores, common, [primary, *also]),
                "seeds": [row.seed for row in rows if row.cell == cell],
            }
            for cell, scores in by_cell.items()
        },
        "contrasts": judged.to_json(),
        "untested": judged.untested,
        "closest_control": judged.closest_control,
        "differences": {
            f"{cell} - composed": plain(verdict.gain(other, answers["composed"], **common))
            for cell, other in answers.items()
            if "composed" in answers and cell != "composed" and len(other.weights)
        },
        "by_seed": by_seed(by_cell, primary),
        "margin": primary.margin,
    }


def without(
    rows: Sequence[ModelRow],
    raw: Mapping[str, Any],
    settings: EvaluateSection,
    seed: int,
    flagged: set[str],
    primary: PrimaryMetric = ANSWER_NLL,
    alone: str = "",
) -> dict[str, Any] | None:
    """The verdict on the test items that are not flagged; None when all are, or none is."""
    by_cell = _by_cell(rows, raw)
    names = {item["name"] for item in next(iter(by_cell.values()))[0]["items"]}
    kept = names - flagged
    if not kept or kept == names:
        return None
    if alone:
        common = {"resamples": settings.resamples, "seed": seed}
        judged, _ = judge_alone(by_cell, alone, common, primary, kept)
    else:
        judged = judge(by_cell, settings, seed, kept, primary)
    return {
        "items": len(kept),
        "verdict": judged.verdict,
        "sentence": judged.sentence,
        "contrasts": judged.to_json(),
        "answer_nll": {
            cell: float(scored.loss_SN.sum() / (len(scored.loss_SN) * sum(scored.weights)))
            for cell, scores in by_cell.items()
            for scored in [ANSWER_NLL.scores(scores, kept)]
        },
    }


def judge(
    by_cell: Mapping[str, list[Any]],
    settings: EvaluateSection,
    seed: int,
    names: set[str] | None = None,
    primary: PrimaryMetric = ANSWER_NLL,
) -> Verdict:
    """The verdict; with `names` only on these test items."""
    return verdict.judge(
        {cell: primary.scores(scores, names) for cell, scores in by_cell.items()},
        {cell: _documents(scores) for cell, scores in by_cell.items() if scores[0].get("heldout")},
        margin=primary.margin,
        resamples=settings.resamples,
        seed=seed,
        unit=primary.unit,
    )


def judge_alone(
    by_cell: Mapping[str, list[Any]],
    which: str,
    common: Mapping[str, Any],
    primary: PrimaryMetric = ANSWER_NLL,
    names: set[str] | None = None,
) -> tuple[Verdict, dict[str, Interval]]:
    """The verdict on an adapter without the other, and its changes against the base model; `names` as in `judge`."""
    kinds = {one_adapter.HELD_OUT: "heldout", one_adapter.OWN: "seen", one_adapter.PROSE: "general"}
    answers = verdict.with_spans({cell: primary.scores(by_cell[cell], names) for cell in ("base", which)})
    base, ours = (
        {one_adapter.ANSWERS: answers[cell]}
        | {what: _documents(by_cell[cell], kind) for what, kind in kinds.items() if by_cell[cell][0].get(kind)}
        for cell in ("base", which)
    )
    changed = one_adapter.changes(base, ours, **common)
    return one_adapter.judge(which, changed, base, ours, unit=primary.unit), changed


def measured(
    scores: Sequence[Mapping[str, Any]], common: Mapping[str, Any], also: Sequence[PrimaryMetric] = ()
) -> dict[str, Any]:
    """Every measure that the data support, its 95% interval by document, and the form of the answers."""
    values: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    further = {
        OWN if m.recorded else m.name: (m.source, m.value, m.weight)
        for m in also
        if m.name not in MEASURES and m.name not in RENAMED
    }
    for name, (kind, top, bottom) in {**MEASURES, **further}.items():
        table = [_entries(one, kind) for one in scores]
        table = [entries for entries in table if entries]
        if not table:
            continue
        interval = ratio_interval(
            np.array([[top(e) for e in entries] for entries in table]),
            [bottom(e) for e in table[0]],
            [e.get("document", e["name"]) for e in table[0]],
            **common,
        )
        values[name] = interval.estimate
        if math.isfinite(interval.low):
            intervals[name] = [interval.low, interval.high]
    for name, nll in PERPLEXITIES.items():
        if nll in values:
            values[name] = math.exp(min(values[nll], 700.0))
            if nll in intervals:
                intervals[name] = [math.exp(min(end, 700.0)) for end in intervals[nll]]
    answers = scores[0].get("answers") or []
    if answers:
        values["format"] = {name: sum(a[name] for a in answers) / len(answers) for name in FORMAT}
        values["format"]["tokens"] = sum(a["tokens"] for a in answers) / len(answers)
        values["format"]["answers"] = len(answers)
    return {**values, "intervals": intervals}


def by_seed(by_cell: Mapping[str, list[Any]], primary: PrimaryMetric = ANSWER_NLL) -> dict[str, list[float]]:
    """The primary metric of each cell for each seed, where there are several."""
    return {
        cell: [primary.mean(one) for one in scores]
        for cell, scores in by_cell.items()
        if len(scores) > 1 and all(primary.entries(one) for one in scores)
    }


def plain(interval: Interval) -> dict[str, Any]:
    """An interval as JSON values: what is infinite is null."""
    return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in asdict(interval).items()}


def _by_cell(rows: Sequence[ModelRow], raw: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {cell: [raw[row.name] for row in rows if row.cell == cell] for cell in dict.fromkeys(r.cell for r in rows)}


def of_documents(*seeds: Sequence[Mapping[str, Any]]) -> Scores:
    """NLL of documents, a list of them for each seed, weighted by tokens."""
    loss_SN = np.array([[document["nll"] for document in documents] for documents in seeds])
    return Scores(loss_SN, [d["tokens"] for d in seeds[0]], [d["name"] for d in seeds[0]])


def _documents(scores: Sequence[Mapping[str, Any]], kind: str = "heldout") -> Scores:
    return of_documents(*(one[kind] for one in scores))


def _entries(scores: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    return with_choices(scores) if kind == "choices" else list(scores.get(kind) or [])
