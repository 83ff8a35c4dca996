"""Rows that are asked with passages of the documents in the prompt, and what that buys beside the adapters.

Rows with adapters are those that were trained without passages, asked with them (or trained with them, where
`task.retrieval` was set). How many passages of how many tokens is chosen on dev with the base model alone, so that it
favours no adapter. Passages are found once, and every row sees the same ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from config import Config
from utils.adapters import adapter_tokenizer
from utils.artifacts import resumable
from utils.data.prepared import Prepared
from utils.data.retrieval.passages import Passage, PassageIndex, cut
from utils.data.retrieval.retrieved_prompts import BM25, found_in_corpus, read_passages, with_passages
from utils.data.retrieval.withheld_passages import holding_the_question
from utils.data.splits import hash_share
from utils.evaluation import verdict
from utils.evaluation.metrics.primary import PrimaryMetric
from utils.evaluation.run_groups import ComparedRuns
from utils.evaluation.scored_rows import RETRIEVAL, Material, ModelRow, ScoredModel
from utils.exceptions import DataError, Problem
from utils.inference import scoring
from utils.logger import event
from utils.models import chat
from utils.models.base_model import BaseModel
from utils.models.parallel import ranks
from utils.models.structure import model_class

# passages and their tokens that dev chooses from; together at most so many tokens
COUNTS, LENGTHS, MOST_TOKENS = (1, 3, 5), (64, 128, 256), 1024
DEV_ITEMS = 60


@dataclass(frozen=True)
class Choice:
    """How passages are found, and what dev said of the alternatives; numbers are None for a person's own retriever."""

    how: str
    passages: int | None
    tokens: int | None
    on_dev: tuple[dict[str, Any], ...] = ()


def with_retrieval(
    config: Config, base: BaseModel, parts: ComparedRuns, on: Material, directory: Path
) -> tuple[Material, dict[str, Any]]:
    """The material with the questions as rows with retrieval are asked them, and what is said about it."""
    prepared, tokenizer = Prepared(parts.data.directory), adapter_tokenizer.of(base)
    room = _room(config, base)
    scored = {item.name for item in on.items}
    examples = [example for example in on.examples if str(example["id"]) in scored]
    source = config.evaluate.retrieval
    began, excluded, searching = time.perf_counter(), 0, 0.0
    if source == BM25:
        recorded = resumable.result(
            directory / "retrieval_on_dev.json",
            resumable.owner(directory),
            lambda: asdict(_chosen_on_dev(config, base, on, prepared, tokenizer, room)),
        )
        choice = Choice(**recorded)
        index = PassageIndex(cut(prepared.documents("corpus"), tokenizer, choice.tokens or LENGTHS[0]))
        excluded = sum(map(len, holding_the_question(examples, index.passages)))
        began = time.perf_counter()
        texts = found_in_corpus(index, examples, tokenizer, choice.passages or 1)
        searching = (time.perf_counter() - began) / max(1, len(examples))
    else:
        choice = Choice(Path(source).name, None, None)
        given = read_passages(Path(source), [str(example["id"]) for example in examples])
        texts, excluded = _without_own_text(examples, [given[str(example["id"])] for example in examples])
    answers = {item.name: max(map(len, item.candidates)) for item in on.items}
    extended, counts = [], []
    for example, passages in zip(examples, texts, strict=True):
        left = room - max(answers[str(example["id"])], config.evaluate.max_new_tokens)
        longer, used = with_passages(example, passages, tokenizer, on.system_prompt, left)
        extended.append(longer)
        counts.append(used)
    items, left_out = scoring.questions(extended, tokenizer, on.system_prompt, room)
    if left_out:  # with_passages never makes a prompt longer than what fits
        raise DataError(Problem("questions with passages do not fit", left_out[:5], "raise --evaluate.batch_tokens"))
    by_name = {str(example["id"]): example for example in extended}
    answer_examples = [by_name[str(example["id"])] for example in on.answer_examples if str(example["id"]) in by_name]
    facts = {
        **asdict(choice),
        "passages_a_question": sum(counts) / max(1, len(counts)),
        "excluded": excluded,
        "seconds_a_search": searching,
    }
    event("questions have passages", **{k: facts[k] for k in ("how", "passages", "tokens", "excluded")})
    return replace(on, retrieved=items, retrieved_answer_examples=answer_examples), facts


def compared(
    rows: Sequence[ModelRow], raw: Mapping[str, Any], settings: Any, seed: int, primary: PrimaryMetric
) -> dict[str, Any]:
    """What each of retrieval, adapters and both gains over the base, and over composed, with intervals; and costs."""
    by_cell: dict[str, list[Any]] = {}
    for row in rows:
        by_cell.setdefault(row.cell, []).append(raw[row.name])
    scores = verdict.with_spans({cell: primary.scores(of_seeds) for cell, of_seeds in by_cell.items()})
    common: dict[str, Any] = {"resamples": settings.resamples, "seed": seed}
    retrieving = [cell for cell in scores if cell.endswith(RETRIEVAL)]
    compared_cells = [*(cell for cell in ("task", "composed") if cell in scores), *retrieving]
    gains = {cell: verdict.gain(scores["base"], scores[cell], **common) for cell in compared_cells}
    over = {}
    if "composed" in scores:
        over = {cell: verdict.gain(scores["composed"], scores[cell], **common) for cell in retrieving}
    results = {
        "gains": {cell: _plain(one) for cell, one in gains.items()},
        "over_composed": {cell: _plain(one) for cell, one in over.items()},
        "costs": {row.cell: raw[row.name]["per_answer"] for row in reversed(rows) if "per_answer" in raw[row.name]},
    }
    return {
        **results,
        "sentence": sentence(results, primary.unit),
        "verdict_sentence": in_the_verdict(results, primary.unit),
    }


NAMES = {
    "base_retrieval": "retrieval alone",
    "task": "the task adapter alone",
    "task_retrieval": "the task adapter with retrieval",
    "composed": "composed",
    "composed_retrieval": "both",
}


def sentence(results: Mapping[str, Any], unit: str) -> str:
    """What each buys over the base model: one sentence, with intervals."""
    gains = [f"{name} {_sized(results['gains'][cell])}" for cell, name in NAMES.items() if cell in results["gains"]]
    return f"Over the base model: {', '.join(gains)} {unit}."


def in_the_verdict(results: Mapping[str, Any], unit: str) -> str:
    """Whether retrieval does better than composing, as a sentence for the verdict; empty where that is not shown."""
    shown = {cell: one for cell, one in results["over_composed"].items() if one["low"] is not None and one["low"] > 0}
    without = {cell: one for cell, one in shown.items() if cell != f"composed{RETRIEVAL}"}
    if without:
        best = max(without, key=lambda cell: without[cell]["estimate"])
        name = NAMES[best][0].upper() + NAMES[best][1:]
        return f"{name}, without the domain adapter, does better than composed ({_sized(without[best])} {unit})."
    if both := shown.get(f"composed{RETRIEVAL}"):
        return f"With retrieval, composed does better still ({_sized(both)} {unit})."
    return ""


def _chosen_on_dev(
    config: Config, base: BaseModel, on: Material, prepared: Prepared, tokenizer: Any, room: int
) -> Choice:
    """The number and length of passages with the lowest loss of dev answers, by the base model."""
    dev = sorted(prepared.examples("dev"), key=lambda example: hash_share(str(example["id"]), config.run.seed))
    dev = [{**example, "choices": None, "answer_index": None} for example in dev[:DEV_ITEMS]]
    tried: list[dict[str, Any]] = []
    with ranks.Held(ScoredModel, config, base, base, {}, on) as model:
        for tokens in LENGTHS:
            counts = [count for count in COUNTS if count * tokens <= min(MOST_TOKENS, room)]
            if not counts:
                continue
            index = PassageIndex(cut(prepared.documents("corpus"), tokenizer, tokens))
            texts = found_in_corpus(index, dev, tokenizer, max(counts))
            for count in counts:
                longer = [
                    with_passages(
                        example, passages[:count], tokenizer, on.system_prompt, room - _answer(example, tokenizer)
                    )[0]
                    for example, passages in zip(dev, texts, strict=True)
                ]
                items, _ = scoring.questions(longer, tokenizer, on.system_prompt, room)
                loss = model.loss(items, f"dev with {count} passages of {tokens} tokens")
                tried.append({"passages": count, "tokens": tokens, "answer_nll": loss})
                event("retrieval on dev", passages=count, tokens=tokens, answer_nll=round(loss, 4))
    if not tried:
        what = f"no passage of {LENGTHS[0]} tokens fits a prompt of {room}"
        raise DataError(Problem(what, fix="leave out --evaluate.retrieval, or raise --evaluate.batch_tokens"))
    best = min(tried, key=lambda one: (one["answer_nll"], one["passages"] * one["tokens"]))
    return Choice(BM25, best["passages"], best["tokens"], tuple(tried))


def _answer(example: Mapping[str, Any], tokenizer: Any) -> int:
    return len(chat.answer_ids(tokenizer, example["answers"][0]))


def _room(config: Config, base: BaseModel) -> int:
    """Tokens of a prompt with its answer: those of a pass, or as many as the model has positions for."""
    return model_class.longest_row(base.directory, config.evaluate.batch_tokens)


def _without_own_text(
    examples: Sequence[Mapping[str, Any]], given: Sequence[Sequence[str]]
) -> tuple[list[list[str]], int]:
    """A person's passages without those that hold their question's text, and how many these were."""
    kept, excluded = [], 0
    for example, passages in zip(examples, given, strict=True):
        each = [Passage(str(at), text, ()) for at, text in enumerate(passages)]
        (own,) = holding_the_question([example], each)
        kept.append([text for at, text in enumerate(passages) if at not in own])
        excluded += len(own)
    return kept, excluded


def _sized(interval: Mapping[str, Any]) -> str:
    if interval["low"] is None or interval["high"] is None:
        return f"{interval['estimate']:+.3f} (no interval)"
    return f"{interval['estimate']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"


def _plain(interval: Any) -> dict[str, Any]:
    return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in asdict(interval).items()}
