"""How good a text is by the primary metric, where a server answers and gives no likelihoods. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from config import EvaluateSection
from utils.data import answer_metrics
from utils.evaluation.metrics import json_answers, own_function, text_overlap

TEXT_SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "f1": answer_metrics.token_f1,
    "exact_match": answer_metrics.exact_match,
    "chrf": text_overlap.chrf,
    "rouge_l": text_overlap.rouge_l,
    "field_f1": json_answers.field_f1,
}


@dataclass(frozen=True)
class TextValue:
    """A score of a text against its expected answers, as the value of a generated answer; each is scored once."""

    score: Callable[[str, Sequence[str]], float]
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    known: dict[tuple[str, str], float] = field(default_factory=dict)

    def on(self, examples: Sequence[Mapping[str, Any]]) -> TextValue:
        """The same for answers to these examples."""
        return replace(self, examples={str(example["id"]): example for example in examples}, known={})

    def __call__(self, answer: Mapping[str, Any]) -> float:
        key = (answer["name"], answer["text"])
        if key not in self.known:
            self.known[key] = float(self.score(answer["text"], self.examples[answer["name"]]["answers"]))
        return self.known[key]


def text_score(
    settings: EvaluateSection, examples: Sequence[Mapping[str, Any]]
) -> tuple[str, Callable[[str, Mapping[str, Any]], float]]:
    """Name and function (text, example) of the score of an answer; one of a person's own is tried on the examples.

    What needs likelihoods, which servers do not give of an answer that they did not choose, is token F1 here.
    """
    if own_function.is_own(settings.primary):
        function = own_function.load(settings.primary)
        if examples:
            function.tried_on(examples)
        return settings.primary, function.checked
    name = settings.primary if settings.primary in TEXT_SCORES else "f1"
    score = TEXT_SCORES[name]
    return name, lambda text, example: score(text, example["answers"])
