"""Classification: the likeliest label of a fixed set, its accuracy, macro F1, and who is taken for whom.

Labels are scored as choices are, by the likelihood of their text, so an answer is always one of them. Shapes: C
clusters, L labels, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.evaluation.intervals import MIN_CLUSTERS
from utils.evaluation.metrics.primary import likeliest

RESAMPLES = 1_000


def with_labels(examples: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Examples with the labels as their choices; one whose answer is no label has no right choice."""
    known = {label: at for at, label in enumerate(labels)}
    return [
        {**example, "choices": list(labels), "answer_index": known.get(example["answers"][0].strip())}
        for example in examples
    ]


def confusion(items: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Counts (C, L, L) of right label by likeliest label in each cluster, and the clusters' names."""
    known = [item for item in items if item["answer_index"] is not None and len(item["choice_nlls"]) == len(labels)]
    names = sorted({str(item["document"]) for item in known})
    place = {name: at for at, name in enumerate(names)}
    counts_CLL = np.zeros((len(names), len(labels), len(labels)), dtype=int)
    for item in known:
        counts_CLL[place[str(item["document"])], item["answer_index"], likeliest(item)] += 1
    return counts_CLL, names


def macro_f1(counts_LL: np.ndarray) -> float:
    """Mean F1 over the labels that occur, as a right answer or as a given one."""
    right, given, hit = counts_LL.sum(-1), counts_LL.sum(-2), np.diagonal(counts_LL, axis1=-2, axis2=-1)
    total = right + given
    return float((2 * hit[total > 0] / total[total > 0]).mean()) if total.any() else 0.0


def report(scores: Sequence[Mapping[str, Any]], labels: Sequence[str], *, seed: int) -> dict[str, Any]:
    """The confusion matrix of a row's first seed, and macro F1 with its 95% interval by document."""
    counts_CLL, names = confusion(scores[0]["items"], labels)
    total_LL = counts_CLL.sum(0)
    summary: dict[str, Any] = {"confusion": total_LL.tolist(), "macro_f1": macro_f1(total_LL), "interval": None}
    if len(names) >= MIN_CLUSTERS:
        draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
        drawn = [macro_f1(np.tensordot(row, counts_CLL, axes=1)) for row in draws]
        summary["interval"] = [float(end) for end in np.quantile(drawn, [0.025, 0.975])]
    return summary


def reports(by_cell: Mapping[str, Sequence[Mapping[str, Any]]], labels: Sequence[str], *, seed: int) -> dict[str, Any]:
    """`report` of each row; none where there are no labels."""
    return {cell: report(scores, labels, seed=seed) for cell, scores in by_cell.items()} if labels else {}
