"""What kind of task labelled pairs are, recognised from the training pairs: it decides what is measured beside the NLL.

choice          most questions have choices of their own
classification  all answers are one of a few labels, or all questions have the same choices
extraction      the answers are JSON objects
long answer     half of the answers have thirty words and more
short answer    everything else
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from utils.data.ngram_overlap import units_per_word, words_of
from utils.data.prepared import Prepared
from utils.evaluation.metrics import json_answers
from utils.evaluation.metrics.primary import BUILT_IN, PrimaryMetric
from utils.evaluation.metrics.text_scores import TextValue
from utils.exceptions import ArtefactError

Kind = Literal["choice", "classification", "extraction", "long answer", "short answer"]
MOST = 0.95
MOST_LABELS, LABEL_WORDS, PAIRS_A_LABEL, FEWEST_PAIRS = 50, 8, 5, 20
LONG_WORDS = 30


@dataclass(frozen=True)
class TaskKind:
    """`labels` of a classification, `schema` of an extraction; `multi_turn`: most pairs go on a conversation."""

    name: Kind
    labels: tuple[str, ...] = ()
    schema: Mapping[str, Any] = field(default_factory=dict)
    multi_turn: bool = False

    @property
    def sentence(self) -> str:
        """What was recognised, for the log and the report."""
        description = {
            "choice": "multiple choice: the choice of the highest likelihood is the answer",
            "classification": f"classification into {len(self.labels)} labels, by the likelihood of each",
            "extraction": "extraction to JSON: validity by schema, and F1 over fields",
            "long answer": "long answers: chrF and ROUGE-L",
            "short answer": "short answers: exact match and token F1",
        }[self.name]
        turns = "; conversations, of which the last turn is scored" if self.multi_turn else ""
        return f"The pairs are {description}{turns}."

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "labels": list(self.labels),
            "multi_turn": self.multi_turn,
            "sentence": self.sentence,
        }

    def deciding(self) -> dict[str, Any]:
        """What it adds to an evaluation's identity: nothing where no more is measured than before there were kinds."""
        if self.name == "classification":
            return {"labels": list(self.labels)}
        if self.name == "extraction":
            return {"schema": dict(self.schema)}
        return {"kind": self.name} if self.name == "long answer" else {}


SHORT_ANSWERS = TaskKind("short answer")


def recognised(prepared: Prepared, schema: Mapping[str, Any] | None = None) -> TaskKind:
    """The kind of the pairs of prepared data; `schema` is a person's own and makes them an extraction."""
    training, dev = _split(prepared, "train"), _split(prepared, "dev")
    pairs = [*training, *dev]
    if not pairs:
        return SHORT_ANSWERS
    multi_turn = 2 * sum(bool(pair.get("history")) for pair in pairs) > len(pairs)
    firsts = [str(pair["answers"][0]).strip() for pair in pairs]
    if schema:
        return TaskKind("extraction", schema=schema, multi_turn=multi_turn)
    if sum(json_answers.parsed(text) is not None for text in firsts) >= MOST * len(firsts):
        inferred_schema = json_answers.schema_of(firsts[: len(training)], firsts[len(training) :])
        return TaskKind("extraction", schema=inferred_schema, multi_turn=multi_turn)
    given = [tuple(pair["choices"]) for pair in pairs if pair.get("choices")]
    if len(given) >= MOST * len(pairs):
        same = {tuple(sorted(choices)) for choices in given}
        labels = next(iter(same)) if len(same) == 1 and len(pairs) >= FEWEST_PAIRS else ()
        return TaskKind("classification" if labels else "choice", labels, multi_turn=multi_turn)
    if not given and (labels := _labels(firsts[: len(training)], firsts[len(training) :])):
        return TaskKind("classification", labels, multi_turn=multi_turn)
    lengths = [len(words) / units_per_word(words) for words in map(words_of, firsts)]
    return TaskKind(
        "long answer" if statistics.median(lengths) >= LONG_WORDS else "short answer", multi_turn=multi_turn
    )


def metrics(kind: TaskKind) -> list[PrimaryMetric]:
    """What is measured of the generated answers because of the kind, beside exact match and token F1."""
    if kind.name == "long answer":
        return [BUILT_IN["chrf"], BUILT_IN["rouge_l"]]
    if kind.name == "extraction":
        validity = TextValue(lambda text, _: float(json_answers.is_valid(text, kind.schema)))
        valid = replace(BUILT_IN["field_f1"], name="json_valid", title="valid JSON", unit="validity", value=validity)
        return [valid, BUILT_IN["field_f1"]]
    return []


def too_long(kind: TaskKind, lengths: Sequence[int], max_new_tokens: int) -> str:
    """A sentence where expected answers (in tokens) are longer than what is generated; empty where few are."""
    longer = sum(length > max_new_tokens for length in lengths)
    if kind.name not in ("long answer", "extraction") or 10 * longer <= len(lengths):
        return ""
    enough = max(lengths)
    return (
        f"{longer} of {len(lengths)} expected answers are longer than --evaluate.max_new_tokens {max_new_tokens}: what "
        f"is generated is cut off, and counts so; {enough} is enough"
    )


def _labels(training: Sequence[str], dev: Sequence[str]) -> tuple[str, ...]:
    """The labels of pairs whose answers are few, short, and known on dev; empty where they are no labels."""
    counts = Counter(training)
    known = sum(text in counts for text in dev)
    is_small = 2 <= len(counts) <= MOST_LABELS and len(training) >= max(FEWEST_PAIRS, PAIRS_A_LABEL * len(counts))
    is_short = all(len(words_of(label)) <= LABEL_WORDS for label in counts)
    return tuple(sorted(counts)) if is_small and is_short and known >= MOST * len(dev) else ()


def _split(prepared: Prepared, split: str) -> list[dict[str, Any]]:
    try:
        return prepared.examples(split)
    except ArtefactError:
        return []
