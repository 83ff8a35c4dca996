"""The questions with the largest differences between two rows: chosen by rule, and described for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.evaluation.metrics.primary import ANSWER_NLL, PrimaryMetric
from utils.models import chat

SHOWN_EXAMPLES = 10


def chosen(
    ours: Mapping[str, Any], others: Mapping[str, Any], primary: PrimaryMetric = ANSWER_NLL
) -> dict[str, list[str]]:
    """Names of the items with the largest gain and loss, at most ten each: by rule, not by hand.

    By the primary metric; where that ties, by the gold answer's NLL per token.
    """
    sign = 1 if primary.higher_is_better else -1
    values = [{e["name"]: sign * primary.value(e) for e in primary.entries(one)} for one in (ours, others)]
    nats = [{e["name"]: -ANSWER_NLL.value(e) for e in one["items"]} for one in (ours, others)]
    gains = {name: (value - values[1][name], nats[0][name] - nats[1][name]) for name, value in values[0].items()}
    order = sorted(gains, key=lambda name: (*(-gain for gain in gains[name]), name))
    return {
        "won": [name for name in order if gains[name][0] > 0][:SHOWN_EXAMPLES],
        "lost": [name for name in reversed(order) if gains[name][0] < 0][:SHOWN_EXAMPLES],
    }


def described(
    names: Sequence[str],
    examples: Mapping[str, dict[str, Any]],
    raw: Mapping[str, Any],
    answers: Mapping[str, dict[str, str]],
    primary: PrimaryMetric = ANSWER_NLL,
) -> list[dict[str, Any]]:
    """Examples as the report shows them: question, gold answer, NLL per token, primary value and text of each cell."""
    items = {cell: {i["name"]: i for i in scores["items"]} for cell, scores in raw.items()}
    values = {cell: {e["name"]: primary.value(e) for e in primary.entries(scores)} for cell, scores in raw.items()}
    return [
        {
            "name": name,
            "question": chat.user_text(examples[name]),
            "gold": examples[name]["answers"][0],
            "nll": {cell: ANSWER_NLL.value(by_name[name]) for cell, by_name in items.items()},
            "value": {cell: by_name[name] for cell, by_name in values.items()},
            "said": {cell: texts[name] for cell, texts in answers.items()},
        }
        for name in names
    ]
