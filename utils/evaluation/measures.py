"""From per-item scores to what the report says: measures with intervals, the verdict, differences, examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from config import EvaluateSection
from utils.evaluation import verdict
from utils.evaluation.intervals import Interval, ratio_interval
from utils.evaluation.scored_rows import MEANING, ModelRow
from utils.evaluation.verdict import Scores, Verdict
from utils.inference.scoring import ItemScore
from utils.models import chat

SHOWN_EXAMPLES = 10
# measure -> (which scores, numerator, denominator); a measure is sum / sum, with documents as clusters
Reader = Callable[[Mapping[str, Any]], float]
MEASURES: dict[str, tuple[str, Reader, Reader]] = {
    "domain_nll": ("heldout", lambda d: d["nll"], lambda d: d["tokens"]),
    "domain_nll_per_byte": ("heldout", lambda d: d["nll"], lambda d: d["utf8_bytes"]),
    "corpus_nll": ("seen", lambda d: d["nll"], lambda d: d["tokens"]),
    "general_nll": ("general", lambda d: d["nll"], lambda d: d["tokens"]),
    "answer_nll": ("items", lambda i: i["answer_nll"], lambda i: i["answer_tokens"]),
    "end_of_turn_nll": ("items", lambda i: i["end_nll"], lambda i: 1.0),
    "choice_accuracy": ("choices", lambda i: _right(i, normalised=False), lambda i: 1.0),
    "choice_accuracy_per_token": ("choices", lambda i: _right(i, normalised=True), lambda i: 1.0),
    "em": ("answers", lambda a: a["exact_match"], lambda a: 1.0),
    "f1": ("answers", lambda a: a["f1"], lambda a: 1.0),
}
PERPLEXITIES = {"domain_ppl": "domain_nll", "corpus_ppl": "corpus_nll", "general_ppl": "general_nll"}
FORMAT = ("ended", "repetitive", "thinking_left")


def assemble(rows: Sequence[ModelRow], raw: Mapping[str, Any], settings: EvaluateSection, seed: int) -> dict[str, Any]:
    """Cells with intervals, the verdict with its contrasts, and composed against every other cell."""
    by_cell = _by_cell(rows, raw)
    common: dict[str, Any] = {"resamples": settings.resamples, "seed": seed}
    judged = judge(by_cell, settings, seed)
    return {
        "verdict": judged.verdict,
        "sentence": judged.sentence,
        "cells": {
            cell: {
                "meaning": MEANING.get(cell, "as named by --evaluate.also"),
                **measured(scores, common),
                "seeds": [row.seed for row in rows if row.cell == cell],
            }
            for cell, scores in by_cell.items()
        },
        "contrasts": judged.to_json(),
        "untested": judged.untested,
        "closest_control": judged.closest_control,
        "differences": {
            f"{cell} - composed": plain(verdict.gain(_answers(scores), _answers(by_cell["composed"]), **common))
            for cell, scores in by_cell.items()
            if "composed" in by_cell and cell != "composed"
        },
        "by_seed": by_seed(by_cell),
        "margin": settings.margin,
    }


def without(
    rows: Sequence[ModelRow], raw: Mapping[str, Any], settings: EvaluateSection, seed: int, flagged: set[str]
) -> dict[str, Any] | None:
    """The verdict on the test items that are not flagged; None when all are, or none is."""
    by_cell = _by_cell(rows, raw)
    names = {item["name"] for item in next(iter(by_cell.values()))[0]["items"]}
    kept = names - flagged
    if not kept or kept == names:
        return None
    judged = judge(by_cell, settings, seed, kept)
    return {
        "items": len(kept),
        "verdict": judged.verdict,
        "sentence": judged.sentence,
        "contrasts": judged.to_json(),
        "answer_nll": {
            cell: float(scored.nll_SN.sum() / (len(scored.nll_SN) * sum(scored.tokens)))
            for cell, scores in by_cell.items()
            for scored in [_answers(scores, kept)]
        },
    }


def judge(
    by_cell: Mapping[str, list[Any]], settings: EvaluateSection, seed: int, names: set[str] | None = None
) -> Verdict:
    """The verdict; with `names` only on these test items."""
    return verdict.judge(
        {cell: _answers(scores, names) for cell, scores in by_cell.items()},
        {cell: _documents(scores) for cell, scores in by_cell.items() if scores[0].get("heldout")},
        margin=settings.margin,
        resamples=settings.resamples,
        seed=seed,
    )


def measured(scores: Sequence[Mapping[str, Any]], common: Mapping[str, Any]) -> dict[str, Any]:
    """Every measure that the data support, its 95% interval by document, and the form of the answers."""
    found: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    for name, (kind, top, bottom) in MEASURES.items():
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
        found[name] = interval.estimate
        if math.isfinite(interval.low):
            intervals[name] = [interval.low, interval.high]
    for name, nll in PERPLEXITIES.items():
        if nll in found:
            found[name] = math.exp(min(found[nll], 700.0))
            if nll in intervals:
                intervals[name] = [math.exp(min(end, 700.0)) for end in intervals[nll]]
    answers = scores[0].get("answers") or []
    if answers:
        found["format"] = {name: sum(a[name] for a in answers) / len(answers) for name in FORMAT}
        found["format"]["tokens"] = sum(a["tokens"] for a in answers) / len(answers)
        found["format"]["answers"] = len(answers)
    return {**found, "intervals": intervals}


def by_seed(by_cell: Mapping[str, list[Any]]) -> dict[str, list[float]]:
    """Answer NLL of each cell for each seed, where there are several."""
    return {
        cell: [
            sum(i["answer_nll"] for i in one["items"]) / sum(i["answer_tokens"] for i in one["items"]) for one in scores
        ]
        for cell, scores in by_cell.items()
        if len(scores) > 1
    }


def chosen_examples(ours: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names of the items with the largest gain and loss per token, at most ten each: by rule, not by hand."""
    gains = {
        a["name"]: b["answer_nll"] / b["answer_tokens"] - a["answer_nll"] / a["answer_tokens"]
        for a, b in zip(ours, others, strict=True)
    }
    order = sorted(gains, key=lambda name: (-gains[name], name))
    return {
        "won": [name for name in order if gains[name] > 0][:SHOWN_EXAMPLES],
        "lost": [name for name in reversed(order) if gains[name] < 0][:SHOWN_EXAMPLES],
    }


def described(
    names: Sequence[str],
    examples: Mapping[str, dict[str, Any]],
    raw: Mapping[str, Any],
    said: Mapping[str, dict[str, str]],
) -> list[dict[str, Any]]:
    """Examples as the report shows them: question, gold answer, NLL per token and text of each cell."""
    items = {cell: {i["name"]: i for i in scores["items"]} for cell, scores in raw.items()}
    return [
        {
            "name": name,
            "question": chat.user_text(examples[name]),
            "gold": examples[name]["answers"][0],
            "nll": {cell: found[name]["answer_nll"] / found[name]["answer_tokens"] for cell, found in items.items()},
            "said": {cell: texts[name] for cell, texts in said.items()},
        }
        for name in names
    ]


def plain(found: Interval) -> dict[str, Any]:
    """An interval as JSON values: what is infinite is null."""
    return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in asdict(found).items()}


def _by_cell(rows: Sequence[ModelRow], raw: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {cell: [raw[row.name] for row in rows if row.cell == cell] for cell in dict.fromkeys(r.cell for r in rows)}


def _answers(scores: Sequence[Mapping[str, Any]], names: set[str] | None = None) -> Scores:
    kept = [i for i, item in enumerate(scores[0]["items"]) if names is None or item["name"] in names]
    table = [[one["items"][i] for i in kept] for one in scores]
    nll_SN = np.array([[item["answer_nll"] for item in items] for items in table])
    return Scores(nll_SN, [i["answer_tokens"] for i in table[0]], [i["document"] for i in table[0]])


def _documents(scores: Sequence[Mapping[str, Any]]) -> Scores:
    table = [one["heldout"] for one in scores]
    nll_SN = np.array([[document["nll"] for document in documents] for documents in table])
    return Scores(nll_SN, [d["tokens"] for d in table[0]], [d["name"] for d in table[0]])


def _entries(scores: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    if kind == "choices":
        return [i for i in scores["items"] if i["choice_nlls"] and i["answer_index"] is not None]
    return list(scores.get(kind) or [])


def _right(item: Mapping[str, Any], *, normalised: bool) -> float:
    return float(ItemScore(**item).chosen(normalised=normalised) == item["answer_index"])
