"""The primary metric: what H2 to H4, the detectable effect and the canary's golden prompts are decided on.

A metric gives each test question a value and a weight; a row's score is sum(value * weight) / sum(weight), and a gain
is counted so that above 0 composed is the better. Values come from likelihoods, from choices, or from generated
answers; the last kind answers every test question in every row and with every seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from config import ANSWER_METRICS, EvaluateSection
from utils.data.prepared import Prepared
from utils.evaluation.metrics import json_answers, own_function
from utils.evaluation.metrics.text_scores import TEXT_SCORES, TextValue
from utils.evaluation.verdict import Scores
from utils.exceptions import ArtefactError, ConfigError, Problem
from utils.inference.scoring import ItemScore

Entry = Mapping[str, Any]
# what a person would call no loss: two answers in a hundred, or as much of a graded score
SHARE_MARGIN = 0.02
DEV_CHECKED = 200


@dataclass(frozen=True)
class PrimaryMetric:
    """`source` is the list of a row's scores that is read; `span` the largest difference of two values of a question.

    `span` is 0 where values are unbounded and never tie (losses), and None where it is taken from the values
    themselves. `recorded` is what identifies a function of a person's own.
    """

    name: str
    title: str
    unit: str
    margin: float
    source: Literal["items", "choices", "answers"]
    value: Callable[[Entry], float]
    weight: Callable[[Entry], float] = field(default=lambda entry: 1.0)
    higher_is_better: bool = True
    span: float | None = 1.0
    recorded: str = ""

    @property
    def generates(self) -> bool:
        """Whether it needs answers, and not likelihoods alone."""
        return self.source == "answers"

    def entries(self, scores: Mapping[str, Any]) -> list[Entry]:
        """The questions of a row that have a value."""
        if self.source == "choices":
            return with_choices(scores)
        return list(scores.get(self.source) or [])

    def scores(self, seeds: Sequence[Mapping[str, Any]], names: set[str] | None = None) -> Scores:
        """A row's values as losses per question, a line for each seed; with `names` only of these questions."""
        table = [[e for e in self.entries(one) if names is None or e["name"] in names] for one in seeds]
        table = [entries for entries in table if entries]
        if not table:
            return Scores(np.zeros((1, 0)), [], [], self.span, ties=self.span != 0)
        sign = -1.0 if self.higher_is_better else 1.0
        loss_SN = np.array([[sign * self.value(e) * self.weight(e) for e in entries] for entries in table])
        clusters = [str(e["document"]) for e in table[0]]
        return Scores(loss_SN, [self.weight(e) for e in table[0]], clusters, self.span, ties=self.span != 0)

    def mean(self, scores: Mapping[str, Any]) -> float:
        """The score of one row with one seed."""
        entries = self.entries(scores)
        weights = [self.weight(e) for e in entries]
        return sum(self.value(e) * w for e, w in zip(entries, weights, strict=True)) / sum(weights)

    def on(self, examples: Sequence[Entry]) -> PrimaryMetric:
        """The metric for these examples: a person's function sees the example beside the answer."""
        if not isinstance(self.value, (own_function.OwnFunction, TextValue)):
            return self
        return replace(self, value=self.value.on(examples))

    def to_json(self) -> dict[str, Any]:
        """As the results say it."""
        keys = ("name", "title", "unit", "margin", "source", "higher_is_better")
        return {key: getattr(self, key) for key in keys}


def with_choices(scores: Mapping[str, Any]) -> list[Entry]:
    """The questions of a row that have choices of which the right one is known."""
    return [item for item in scores["items"] if item["choice_nlls"] and item["answer_index"] is not None]


def likeliest(item: Entry, *, normalised: bool = False) -> int | None:
    """The number of the likeliest choice (per token, if normalised)."""
    own = {key: item[key] for key in ItemScore.__dataclass_fields__ if key in item}
    return ItemScore(**own).chosen(normalised=normalised)


def is_right(item: Entry, *, normalised: bool) -> float:
    """1 where the likeliest choice is the right one, else 0."""
    return float(likeliest(item, normalised=normalised) == item["answer_index"])


ANSWER_NLL = PrimaryMetric(
    "answer_nll",
    "answer NLL",
    "nats per token",
    0.05,
    "items",
    lambda item: item["answer_nll"] / item["answer_tokens"],
    lambda item: float(item["answer_tokens"]),
    higher_is_better=False,
    span=0.0,
)
BUILT_IN = {
    metric.name: metric
    for metric in (
        ANSWER_NLL,
        PrimaryMetric("f1", "token F1", "F1", SHARE_MARGIN, "answers", lambda answer: answer["f1"]),
        PrimaryMetric(
            "exact_match", "exact match", "exact match", SHARE_MARGIN, "answers", lambda answer: answer["exact_match"]
        ),
        PrimaryMetric(
            "choice_accuracy",
            "choice accuracy",
            "accuracy",
            SHARE_MARGIN,
            "choices",
            lambda item: is_right(item, normalised=False),
        ),
        *(
            PrimaryMetric(name, title, title, SHARE_MARGIN, "answers", TextValue(TEXT_SCORES[name]))
            for name, title in (("chrf", "chrF"), ("rouge_l", "ROUGE-L"), ("field_f1", "field F1"))
        ),
    )
}


def chosen(settings: EvaluateSection, prepared: Prepared, *, has_labels: bool = False) -> PrimaryMetric:
    """The metric that the settings name, tried on dev, with its margin; `has_labels`: labels stand for choices.

    Raises ConfigError for a function that cannot be loaded or fails on dev, and for a metric these data do not support.
    """
    metric = BUILT_IN.get(settings.primary)
    if metric is None:
        metric = _own(settings.primary, prepared)
    elif (
        metric.source == "choices"
        and not has_labels
        and not any(_has_choices(example) for example in prepared.examples("test"))
    ):
        fix = f"give the pairs choices (docs/data.md), or take another of {', '.join(ANSWER_METRICS)}"
        raise ConfigError(Problem("evaluate.primary: no test question has choices", settings.primary, fix))
    elif metric.name == "field_f1" and not any(json_answers.parsed(e["answers"][0]) for e in prepared.examples("test")):
        fix = f"take another of {', '.join(ANSWER_METRICS)}"
        raise ConfigError(Problem("evaluate.primary: no expected answer is a JSON object", settings.primary, fix))
    return metric if settings.margin is None else replace(metric, margin=settings.margin)


def _own(written: str, prepared: Prepared) -> PrimaryMetric:
    """A person's function, tried on the gold answers of dev; its margin is a share of what separates gold from none."""
    function = own_function.load(written)
    try:
        examples = prepared.examples("dev")
    except ArtefactError:
        examples = prepared.examples("train")
    distance = function.tried_on(examples[:DEV_CHECKED])
    title = function.name.replace("_", " ")
    return PrimaryMetric(
        written, title, title, SHARE_MARGIN * distance, "answers", function, span=None, recorded=function.recorded
    )


def _has_choices(example: Entry) -> bool:
    return bool(example.get("choices")) and example.get("answer_index") is not None
