"""Answers: one, streamed; many, batched. What a model prints is made harmless for the terminal."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from config import InferenceSection
from utils.artifacts import files
from utils.exceptions import DataError, Problem
from utils.inference import stop_tokens
from utils.inference.answer_journal import AnswerJournal
from utils.logger import event, printable
from utils.models import chat
from utils.models.losses import autocast
from utils.models.parallel import ranks, work
from utils.models.rows import row_support
from utils.models.structure import model_class
from utils.planning.fitting_settings import answers_at_once
from utils.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class GeneratedAnswer:
    """A generated text, its reasoning included, in how many tokens, and whether it ended by itself.

    `opened`: the prompt left a think block open, so that the text begins in it.
    """

    text: str
    tokens: int
    ended: bool
    opened: bool

    @property
    def reasoning(self) -> str:
        """What stands in the think block."""
        return chat.split_reasoning(self.text, opened=self.opened)[0]

    @property
    def answer(self) -> str:
        """The answer without its reasoning; empty when the tokens ran out in it."""
        return chat.answer_of(self.text, opened=self.opened)


class ThinkSplitter:
    """A text that is streamed: what stands in the think block goes to one place, the answer to another."""

    def __init__(self, thoughts: Callable[[str], None], answer: Callable[[str], None], *, opened: bool):
        self._thoughts, self._answer, self._inside, self._held = thoughts, answer, opened, ""

    def __call__(self, piece: str) -> None:
        if not self._inside:
            self._answer(piece)
            return
        before, mark, after = (self._held + piece).partition(chat.THINK_END)
        if mark:
            self._inside, self._held = False, ""
            self._thoughts(before)
            self._answer(after.lstrip("\n"))
            return
        # the beginning of what may become the mark waits for the next piece
        kept = next((n for n in range(len(chat.THINK_END) - 1, 0, -1) if before.endswith(chat.THINK_END[:n])), 0)
        self._held = before[len(before) - kept :]
        self._thoughts(before[: len(before) - kept])

    def end(self) -> None:
        """Give out what was held back."""
        self._thoughts(self._held)
        self._held = ""


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stream: Callable[[str], None] | None = None,
) -> list[GeneratedAnswer]:
    """The model's answer to each prompt (token ids); left-padded as one batch.

    `stream`, for a single prompt, receives the text as it is made.
    """
    from transformers import TextStreamer

    device = next(model.parameters()).device
    ends, pad = stop_tokens.of(tokenizer, getattr(model, "generation_config", None)), chat.pad_id(tokenizer)
    length = max(len(prompt) for prompt in prompts)
    _refuse_too_long(model, length, max_new_tokens)
    ids = torch.tensor([[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}

    class Streamer(TextStreamer):
        def put(self, value: torch.Tensor) -> None:
            if not self.next_tokens_are_prompt:
                value = torch.tensor([i for i in chat.shown_ids(tokenizer, value.tolist()) if i not in ends])
            if len(value):
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if stream is not None:
                stream(printable(text))

    streamer = Streamer(tokenizer, skip_prompt=True) if stream and len(prompts) == 1 else None
    # a model that has no use for a mask may refuse one; where prompts are padded it has to be asked all the same
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    with torch.no_grad(), autocast(model, device):
        output_ids = model.generate(
            input_ids=ids,
            **({"attention_mask": mask} if takes_mask or not mask.all() else {}),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=ends,
            streamer=streamer,
            # ranks that hold the model together go on until the last of them has its answers
            synced_gpus=ranks.is_sharded(),
            **sampling,
        )
    opened = chat.opens_thinking(tokenizer)
    return [read_answer(tokenizer, row, ends, opened=opened) for row in output_ids[:, length:].tolist()]


def read_answer(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Sequence[int], *, opened: bool
) -> GeneratedAnswer:
    """Generated token ids as an answer: up to the first of `ends`, without special tokens, harmless for a terminal."""
    at = next((at for at, token in enumerate(ids) if token in ends), None)
    ended, kept = at is not None, ids[:at]
    text = printable(tokenizer.decode(chat.shown_ids(tokenizer, kept)))
    return GeneratedAnswer(text, len(kept) + ended, ended, opened)


def _refuse_too_long(model: Any, prompt_tokens: int, new_tokens: int) -> None:
    """Raises DataError where the model has no positions for a prompt and its answer."""
    positions = model_class.position_table(model)
    if positions and prompt_tokens + new_tokens > positions:
        what = f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones: the model has {positions} positions"
        raise DataError(Problem(what, fix="shorten the prompt, or lower --inference.max_new_tokens"))


def _groups(order: Sequence[int], lengths: Sequence[int], most: Callable[[int], int]) -> list[list[int]]:
    """Consecutive groups of like size, none larger than `most(its greatest length)`; `lengths` ascend.

    Four or more are an even number: two ranks have as much to do, and any number of ranks has the same groups.
    """
    count = 1
    while True:
        ends = [len(order) * at // count for at in range(count + 1)]
        spans = list(pairwise(ends))
        if all(end - start <= max(1, most(lengths[end - 1])) for start, end in spans if end > start):
            return [list(order[start:end]) for start, end in spans if end > start]
        count += 1 if count < 4 else 2


def answer_all(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, Any]],
    system_prompt: str,
    settings: InferenceSection,
    bar: Progress | None = None,
    *,
    what: str = "",
    journal: AnswerJournal | None = None,
) -> list[GeneratedAnswer]:
    """Answers to many examples in their order, prompts of similar length together; `what` shows a bar of its own.

    What is sampled depends on the seed and on the batch, and not on the rank that answers it. Batches that stand in
    the journal are not answered again.
    """
    prompts = [chat.prompt_ids(tokenizer, example, system_prompt) for example in examples]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    lengths = [len(prompts[i]) + settings.max_new_tokens for i in order]
    groups = _groups(order, lengths, answers_at_once if row_support.of(model).pads_left else lambda _: 1)
    seed = torch.initial_seed()
    sampled = [settings.max_new_tokens, settings.temperature, settings.top_p]
    keys = [
        files.fingerprint([[list(prompts[i]) for i in rows], *sampled, (seed, number) if settings.temperature else 0])
        for number, rows in enumerate(groups)
    ]
    known = ranks.first(journal.known) if journal else {}
    open_groups = [number for number, key in enumerate(keys) if key not in known]

    def answered(number: int) -> list[GeneratedAnswer]:
        if settings.temperature > 0:
            torch.manual_seed((seed * 1_000_003 + number) % 2**63)
        batch_answers = answer(
            model,
            tokenizer,
            [prompts[i] for i in groups[number]],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        if journal:
            journal.add(keys[number], [asdict(one) for one in batch_answers])
        return batch_answers

    # what an answer costs is what is generated, and only then known
    sizes = [len(groups[number]) for number in open_groups]
    done = len(prompts) - sum(sizes)
    if done:
        event(f"{what}: on disk already", answers=done, open=sum(sizes))
    with Progress(what, total=len(prompts), unit="prompt", done=done) if what else nullcontext(bar) as shown:
        by_group = dict(zip(open_groups, work.computed(open_groups, sizes, answered, shown, sizes), strict=True))
    for number in set(range(len(groups))) - set(open_groups):
        by_group[number] = [GeneratedAnswer(**kept) for kept in known[keys[number]]]
    answers = {i: given for n, rows in enumerate(groups) for i, given in zip(rows, by_group[n], strict=True)}
    return [answers[i] for i in range(len(prompts))]
