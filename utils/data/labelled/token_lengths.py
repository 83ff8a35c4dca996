"""How long labelled pairs are in tokens, which row length that asks for, and what does not fit one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from config import USUAL_ROW_TOKENS as USUAL
from config import TaskSection
from utils.artifacts import files
from utils.logger import warning
from utils.models import chat, devices
from utils.models.base_model import BaseModel
from utils.progress import Progress

STEP, MOST_ON_CPU = 64, 2048
SHARE = 0.95
# above this share of the pairs it is said as a warning
WORTH_WARNING = 0.01


@dataclass(frozen=True)
class PairLength:
    """Tokens of one trained or scored turn: all of it, its context's, and whether its answer stands in the context."""

    split: str
    tokens: int
    context: int
    answer_in_context: bool


def measure(splits: Mapping[str, Sequence[dict[str, Any]]], tokenizer: Any, task: TaskSection) -> list[PairLength]:
    """The lengths of every turn that is trained (train) and of every answer that is scored (dev, test)."""
    lengths: list[PairLength] = []
    total = sum(len(examples) for examples in splits.values())
    with Progress("token lengths", total=total, unit="pair") as bar:
        for split, examples in splits.items():
            for example in examples:
                every = split == "train" and task.turns == "all"
                for turn in chat.turn_examples(tokenizer, example, task.system_prompt) if every else [example]:
                    lengths.append(_length(split, turn, tokenizer, task.system_prompt))
                bar.advance(1)
    return lengths


def row_tokens(lengths: Sequence[PairLength], base: BaseModel) -> int:
    """The 95th percentile of the training turns rounded up to 64: at least 256, at most what the model or a CPU takes.

    A shorter pair costs nothing in a longer row, so there is no point in less than the usual length.
    """
    trained = sorted(length.tokens for length in lengths if length.split == "train")
    if not trained:
        return USUAL
    positions = _positions(files.read_object(base.directory / "config.json"))
    most = min(positions or MOST_ON_CPU, MOST_ON_CPU) if devices.device().type == "cpu" else positions or MOST_ON_CPU
    tokens = STEP * math.ceil(trained[math.ceil(SHARE * len(trained)) - 1] / STEP)
    return max(16, min(max(tokens, USUAL), most))


def against(lengths: Sequence[PairLength], limit: int) -> dict[str, Any]:
    """The lengths in figures, and per split what does not fit rows of `limit` tokens."""
    ordered = sorted(length.tokens for length in lengths)
    figures: dict[str, Any] = {"limit": limit, "turns": len(ordered)}
    if ordered:
        figures |= {
            "median": ordered[len(ordered) // 2],
            "95%": ordered[math.ceil(SHARE * len(ordered)) - 1],
            "longest": ordered[-1],
        }
    for split in dict.fromkeys(length.split for length in lengths):
        own = [length for length in lengths if length.split == split]
        long = [length for length in own if length.tokens > limit]
        cut = [length for length in long if length.tokens - length.context < limit and length.context]
        figures[split] = {
            "turns": len(own),
            "contexts_cut": len(cut),
            "contexts_cut_without_the_answer": sum(not length.answer_in_context for length in cut),
            "do_not_fit": len(long) - len(cut),
        }
    return figures


def warn(figures: Mapping[str, Any]) -> None:
    """Say which share of the training turns is cut or left out, above one in a hundred."""
    train = figures.get("train")
    if not train:
        return
    for what, number in (("contexts are cut", train["contexts_cut"]), ("pairs do not fit", train["do_not_fit"])):
        if number > WORTH_WARNING * train["turns"]:
            warning(
                f"{number:,} of {train['turns']:,} training {what} in rows of {figures['limit']:,} tokens",
                instead=f"--task.train.max_sequence_tokens {STEP * math.ceil(figures['longest'] / STEP)} holds all",
            )


def lines(figures: Mapping[str, Any]) -> list[str]:
    """The lengths for a terminal."""
    if "median" not in figures:
        return []
    sizes = f"median {figures['median']:,}, 95% {figures['95%']:,}, longest {figures['longest']:,}"
    shown = [f"tokens a turn     {sizes}; rows of {figures['limit']:,}"]
    for split in ("train", "dev", "test"):
        own = figures.get(split, {})
        if own.get("contexts_cut") or own.get("do_not_fit"):
            without = own["contexts_cut_without_the_answer"]
            shown.append(
                f"  {split}: of {own['turns']:,} turns {own['contexts_cut']:,} have their context cut ({without:,} of "
                f"them do not hold the answer word for word: the beginning is kept), {own['do_not_fit']:,} do not fit"
            )
    return shown


def _length(split: str, turn: dict[str, Any], tokenizer: Any, system_prompt: str) -> PairLength:
    text, context = turn["answers"][0], turn.get("context") or ""
    answer = chat.answer_ids(tokenizer, text, turn.get("reasoning"), calls=turn.get("tool_calls"))
    prompt = chat.prompt_ids(tokenizer, turn, system_prompt)
    inside = len(chat.text_ids(tokenizer, [context])[0]) if context else 0
    return PairLength(split, len(prompt) + len(answer), inside, text in context)


def _positions(settings: Mapping[str, Any]) -> int | None:
    """Positions that the model was made for; a multimodal one has them in its text part."""
    inner = settings.get("text_config")
    for part in (settings, inner if isinstance(inner, dict) else {}):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
            if isinstance(part.get(name), int) and part[name] > 0:
                return int(part[name])
    return None
