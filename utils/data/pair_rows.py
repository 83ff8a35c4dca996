"""Labelled pairs as tokens: the prompt as the template makes it, and the answer that is trained.

A context that is too long is cut, an answer never; what still does not fit is left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from utils.data.labelled.long_contexts import fitting_prompt
from utils.exceptions import DataError, Problem
from utils.logger import warning
from utils.models import chat, turn_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# share of the pairs above which it is said that they do not fit
WORTH_WARNING = 0.01


@dataclass(frozen=True)
class Pair:
    """One tokenised example: prompt, then answer and end-of-turn token.

    A conversation whose turns are all trained is one row where each turn begins with the whole of the one before it;
    `earlier` has the places (start, end) of the answers inside its prompt.
    """

    name: str
    ids: tuple[int, ...]
    num_answer_tokens: int
    earlier: tuple[tuple[int, int], ...] = ()

    @property
    def trained(self) -> tuple[tuple[int, int], ...]:
        """Places (start, end) of what is trained, in their order: answers and their end-of-turn tokens."""
        return (*self.earlier, (len(self.ids) - self.num_answer_tokens, len(self.ids)))

    @property
    def num_trained(self) -> int:
        """Tokens that are trained."""
        return sum(end - start for start, end in self.trained)


@dataclass(frozen=True)
class PairReport:
    """What became of the examples; of conversations, of each of their turns that is trained."""

    usable: int
    answer_does_not_fit: int
    contexts_shortened: int

    @property
    def unusable_share(self) -> float:
        return self.answer_does_not_fit / max(1, self.usable + self.answer_does_not_fit)


def tokenise_pairs(
    examples: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    max_tokens: int,
    *,
    all_turns: bool = False,
) -> tuple[list[Pair], PairReport]:
    """Examples as pairs of at most `max_tokens`: a long context is cut, an answer never; what cannot fit is left out.

    `all_turns` trains each assistant turn of a conversation, else the last alone: in one row as far as its prompt
    begins with the turns before it, in a row for each where the template writes them otherwise later on.
    """
    pairs: list[Pair] = []
    usable = dropped = shortened = 0
    if all_turns:
        examples = [turn for example in examples for turn in chat.turn_examples(tokenizer, example, system_prompt)]
    if not turn_format.has_place_for_reasoning(tokenizer):
        refuse_reasoning(examples)
    for example in examples:
        text, calls = example["answers"][0], example.get("tool_calls")
        answer = chat.answer_ids(tokenizer, text, example.get("reasoning"), calls=calls)
        prompt, was_cut = fitting_prompt(example, tokenizer, system_prompt, max_tokens - len(answer), for_training=True)
        if prompt is None:
            dropped += 1
            continue
        usable, shortened = usable + 1, shortened + was_cut
        pair = Pair(str(example["id"]), (*prompt, *answer), len(answer))
        # turns of one conversation follow each other
        if all_turns and pairs and _goes_on(pair, pairs[-1]):
            pair = replace(pair, earlier=pairs.pop().trained)
        pairs.append(pair)
    return pairs, PairReport(usable, dropped, shortened)


def trains_earlier_turns(counts: Mapping[str, Any]) -> bool:
    """Whether prepared data, by its counts, hold conversations of which more than the last turn is trained."""
    examples = counts.get("examples", {})
    turns = examples.get("lengths", {}).get("train", {}).get("turns", 0)
    return bool(turns > examples.get("train", {}).get("examples", turns))


def _goes_on(pair: Pair, before: Pair) -> bool:
    """Whether the prompt begins with the whole of the pair before, its answer included, and says more."""
    prompt = len(pair.ids) - pair.num_answer_tokens
    return len(before.ids) < prompt and pair.ids[: len(before.ids)] == before.ids


def refuse_reasoning(examples: Sequence[dict[str, Any]]) -> None:
    """Raises DataError for pairs with reasoning, of which a template without a place for it would train nothing."""
    names = [str(example.get("id")) for example in examples if example.get("reasoning")]
    if names:
        what = f"{len(names)} pairs carry reasoning that the chat template of this base model has no place for"
        fix = "leave `reasoning` (and <think> blocks) out of them, or adapt a model whose template writes a think block"
        raise DataError(Problem(what, names[:5], fix))


def warn_of_cuts(train: PairReport, dev: PairReport, max_tokens: int) -> None:
    """Say how many contexts were cut and how many pairs left out, where that is more than one in a hundred."""
    for split, report in (("training", train), ("dev", dev)):
        total = report.usable + report.answer_does_not_fit
        if report.contexts_shortened + report.answer_does_not_fit > WORTH_WARNING * total:
            warning(
                f"{split} pairs do not fit {max_tokens} tokens",
                pairs=total,
                contexts_cut=report.contexts_shortened,
                left_out=report.answer_does_not_fit,
                instead="raise --task.train.max_sequence_tokens",
            )


def check_usable(report: PairReport, max_unusable_share: float, max_tokens: int) -> None:
    """Raises DataError when too many examples had to be left out, or none is left."""
    if report.usable and report.unusable_share <= max_unusable_share:
        return
    raise DataError(
        Problem(
            f"{report.answer_does_not_fit} of {report.usable + report.answer_does_not_fit} training pairs do not fit "
            f"{max_tokens} tokens with their answer",
            f"{report.unusable_share:.1%}",
            "raise --task.train.max_sequence_tokens (and micro_batch_tokens), or allow it with "
            f"--task.max_unusable_share {min(1.0, report.unusable_share + 0.01):.2f}",
        )
    )
