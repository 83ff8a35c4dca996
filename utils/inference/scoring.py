"""What a model knows and does, per item: answer NLL, choice likelihoods, document NLL.

Every cell of a comparison is the same loaded base with other adapters active, scored on the same tokens. A question and
all its candidate answers are one row: the prompt is computed once and each candidate attends to it and to itself only.
Models that were measured not to keep candidates or documents apart (`row_probe`) get one of them in each row.

Shape suffixes: B rows, T tokens, N scored tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from config import InferenceSection
from utils.data import answer_metrics
from utils.data.batches import Batch
from utils.data.labelled.long_contexts import fitting_prompt
from utils.exceptions import NonFiniteError, Problem
from utils.inference import generation
from utils.models import chat, turn_format
from utils.models.losses import autocast, token_nll
from utils.models.parallel import ranks, work
from utils.models.rows import row_layouts, row_support
from utils.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """One test item as tokens: the prompt, and candidate answers of which the first is the gold answer.

    `choice_of` maps the item's choices to candidates. `skip` is the length of the template's think block in front of
    each answer; it is conditioned on and not scored. Each candidate ends with `end_tokens` tokens that end the turn.
    """

    name: str
    document: str
    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    skip: int
    choice_of: tuple[int, ...]
    answer_index: int | None
    end_tokens: int = 1

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(len(candidate) for candidate in self.candidates)


@dataclass(frozen=True)
class ItemScore:
    """NLL sums of one item: the gold answer's text, its end-of-turn token, and each choice's text."""

    name: str
    document: str
    answer_nll: float
    answer_tokens: int
    end_nll: float
    choice_nlls: list[float] = field(default_factory=list)
    choice_tokens: list[int] = field(default_factory=list)
    answer_index: int | None = None

    def chosen(self, *, normalised: bool) -> int | None:
        """The choice of highest likelihood, or of highest likelihood per token."""
        if not self.choice_nlls:
            return None
        divisors = self.choice_tokens if normalised else [1] * len(self.choice_nlls)
        scores = [nll / n for nll, n in zip(self.choice_nlls, divisors, strict=True)]
        return scores.index(min(scores))


@dataclass(frozen=True)
class DocumentScore:
    """NLL sum of one document over its predicted tokens, and its size in bytes."""

    name: str
    nll: float
    tokens: int
    utf8_bytes: int


def questions(
    examples: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, system_prompt: str, max_tokens: int
) -> tuple[list[Question], list[str]]:
    """Test items as tokens, and the names of those left out because prompt and longest answer exceed `max_tokens`."""
    items: list[Question] = []
    too_long: list[str] = []
    skip, ending = chat.answer_offset(tokenizer), len(turn_format.end_of_turn(tokenizer))
    for example in examples:
        texts = [example["answers"][0]]
        choice_of = []
        for choice in example.get("choices") or []:
            if choice not in texts:
                texts.append(choice)
            choice_of.append(texts.index(choice))
        calls = example.get("tool_calls")
        candidates = tuple(tuple(chat.answer_ids(tokenizer, text, calls=calls)) for text in texts)
        prompt, _ = fitting_prompt(example, tokenizer, system_prompt, max_tokens - max(len(c) for c in candidates))
        if prompt is None or any(len(c) == skip + ending for c in candidates):
            too_long.append(str(example["id"]))
            continue
        index = example.get("answer_index") if choice_of else None
        items.append(
            Question(
                str(example["id"]),
                str(example["document"]),
                tuple(prompt),
                candidates,
                skip,
                tuple(choice_of),
                index,
                ending,
            )
        )
    return items, too_long


@torch.no_grad()
def score_questions(
    model: Any, items: Sequence[Question], *, batch_tokens: int, pad_id: int, device: torch.device, what: str
) -> list[ItemScore]:
    """Scores in the order of `items`; long and short ones are batched apart."""
    if row_support.of(model).candidates == "none" and any(len(item.candidates) > 1 for item in items):
        alone = [replace(item, candidates=(c,), choice_of=()) for item in items for c in item.candidates]
        how: dict[str, Any] = {"batch_tokens": batch_tokens, "pad_id": pad_id, "device": device, "what": what}
        return _joined(items, score_questions(model, alone, **how))
    order = sorted(range(len(items)), key=lambda i: items[i].num_tokens)
    groups = _batches(order, [items[i].num_tokens for i in order], batch_tokens)
    costs = [len(rows) * items[rows[-1]].num_tokens for rows in groups]

    def scored(rows: list[int]) -> list[ItemScore]:
        return _score_batch(model, [items[i] for i in rows], pad_id, device)

    with Progress(what, total=len(items), unit="item") as bar:
        parts = work.computed(groups, costs, scored, bar, [len(rows) for rows in groups])
    scores = {i: score for rows, part in zip(groups, parts, strict=True) for i, score in zip(rows, part, strict=True)}
    return [scores[i] for i in range(len(items))]


@torch.no_grad()
def score_documents(
    model: Any, data: Any, *, batch_tokens: int, device: torch.device, what: str
) -> list[DocumentScore]:
    """NLL of each document of a PackedDocuments, in rows whose documents do not see each other."""
    if not row_support.of(model).packs:
        data = data.unpacked()
    lengths = data.filled_lengths(0)
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    groups = [tuple(group) for group in _batches(order, [lengths[row] for row in order], batch_tokens)]

    def scored(chosen: tuple[int, ...]) -> list[tuple[int, float, int]]:
        """(document, NLL, tokens) of each piece of a document in these rows."""
        batch: Batch = data.batch(0, chosen)
        filled = max(lengths[row] for row in chosen)  # what pads all of these rows is not computed
        tensors = (batch.input_ids_BT, batch.position_ids_BT, batch.labels_BT)
        nll_N = _nll(model, *(tensor_BT[:, :filled] for tensor_BT in tensors), None, device)
        pieces, position = [], 0
        for number in chosen:
            for piece in data.rows(0)[number]:
                count = piece.end - piece.start - int(piece.end == data.lengths[piece.document])
                pieces.append((piece.document, float(nll_N[position : position + count].double().sum()), count))
                position += count
        return pieces

    sizes = [len(chosen) for chosen in groups]
    costs = [len(chosen) * lengths[chosen[-1]] for chosen in groups]
    with Progress(what, total=len(order), unit="row") as bar:
        parts = work.computed(groups, costs, scored, bar, sizes)
    sums: dict[int, list[float]] = {}
    for document, nll, count in (piece for pieces in parts for piece in pieces):
        total = sums.setdefault(document, [0.0, 0])
        total[0] += nll
        total[1] += count
    facts = data.documents.select_columns(["id", "utf8_bytes"])
    return [DocumentScore(facts[d]["id"], nll, n, facts[d]["utf8_bytes"]) for d, (nll, n) in sorted(sums.items()) if n]


@torch.no_grad()
def answered(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, Any]],
    system_prompt: str,
    max_new_tokens: int,
    *,
    what: str,
) -> list[dict[str, Any]]:
    """Greedy answers and what they are worth: exact match, token F1, and whether their form is right."""
    how = InferenceSection(max_new_tokens=max_new_tokens)
    with Progress(what, total=len(examples), unit="answer") as bar:
        given = generation.answer_all(model, tokenizer, examples, system_prompt, how, bar)
    return judged(tokenizer, examples, given)


def judged(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict[str, Any]], given: Sequence[generation.GeneratedAnswer]
) -> list[dict[str, Any]]:
    """What answers are worth, whoever generated them: exact match, token F1, and whether their form is right."""
    thinks = turn_format.writes_thinking(tokenizer)
    rows = []
    for example, answer in zip(examples, given, strict=True):
        text = answer.answer
        left_over = "<think>" in text or (chat.THINK_END in answer.text) != thinks
        rows.append(
            {
                "name": str(example["id"]),
                "document": str(example["document"]),
                "text": text,
                "tokens": answer.tokens,
                "ended": answer.ended,
                "repetitive": answer_metrics.is_repetitive(text or answer.text),
                "thinking_left": left_over if answer.ended else "<think>" in text,
                "exact_match": answer_metrics.exact_match(text, example["answers"]),
                "f1": answer_metrics.token_f1(text, example["answers"]),
            }
        )
    return rows


def summary(items: Sequence[ItemScore], documents: Sequence[DocumentScore]) -> dict[str, float]:
    """The numbers of one cell; a key that the data does not support is absent."""
    metrics: dict[str, float] = {}
    if documents:
        nll = sum(d.nll for d in documents)
        metrics["domain_nll"] = nll / sum(d.tokens for d in documents)
        metrics["domain_nll_per_byte"] = nll / sum(d.utf8_bytes for d in documents)
        metrics["domain_ppl"] = float(torch.exp(torch.tensor(metrics["domain_nll"], dtype=torch.float64)))
    if items:
        metrics["answer_nll"] = sum(i.answer_nll for i in items) / sum(i.answer_tokens for i in items)
        metrics["end_of_turn_nll"] = sum(i.end_nll for i in items) / len(items)
    with_choices = [i for i in items if i.choice_nlls and i.answer_index is not None]
    if with_choices:
        for key, normalised in (("choice_accuracy", False), ("choice_accuracy_per_token", True)):
            right = sum(i.chosen(normalised=normalised) == i.answer_index for i in with_choices)
            metrics[key] = right / len(with_choices)
    return metrics


def to_json(scores: Sequence[ItemScore | DocumentScore]) -> list[dict[str, Any]]:
    """Scores as plain values."""
    return [asdict(score) for score in scores]


def _score_batch(model: Any, items: list[Question], pad_id: int, device: torch.device) -> list[ItemScore]:
    """Scores of items whose candidates share a row, or of items with one candidate each."""
    (ids, positions, labels), visible = row_layouts.sharing_a_prompt([(i.prompt, i.candidates) for i in items], pad_id)
    if row_support.of(model).candidates == "none":
        visible = None
    nll_N = _nll(model, ids, positions, labels, visible, device)
    scores = []
    at = 0
    for item in items:
        sums = []
        for candidate in item.candidates:
            own = nll_N[at : at + len(candidate)].double()
            answer_nlls = own[item.skip : -item.end_tokens]
            sums.append((float(answer_nlls.sum()), len(answer_nlls), float(own[-item.end_tokens :].sum())))
            at += len(candidate)
        scores.append(_item_score(item, sums))
    return scores


def _joined(items: Sequence[Question], alone: Sequence[ItemScore]) -> list[ItemScore]:
    """Scores of items from those of each candidate alone."""
    own = iter(alone)
    return [
        _item_score(
            item, [(s.answer_nll, s.answer_tokens, s.end_nll) for s in itertools.islice(own, len(item.candidates))]
        )
        for item in items
    ]


def _item_score(item: Question, sums: Sequence[tuple[float, int, float]]) -> ItemScore:
    """An item's score from (text NLL, text tokens, end-of-turn NLL) of each candidate."""
    chosen = [sums[i] for i in item.choice_of]
    return ItemScore(
        name=item.name,
        document=item.document,
        answer_nll=sums[0][0],
        answer_tokens=sums[0][1],
        end_nll=sums[0][2],
        choice_nlls=[nll for nll, _, _ in chosen],
        choice_tokens=[tokens for _, tokens, _ in chosen],
        answer_index=item.answer_index,
    )


def _nll(
    model: Any,
    ids_BT: torch.Tensor,
    positions_BT: torch.Tensor,
    labels_BT: torch.Tensor,
    visible_BTT: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """NLL of each labelled position (N,), float32 on the CPU. Raises NonFiniteError instead of returning NaN."""
    visible_BTT = None if visible_BTT is None else visible_BTT.to(device)
    with autocast(model, device):
        nll_N = token_nll(model, ids_BT.to(device), positions_BT.to(device), labels_BT.to(device), visible_BTT).cpu()
    if not torch.isfinite(nll_N).all():
        raise NonFiniteError(Problem("the model gives NaN or infinite log-likelihoods", fix="check its weights"))
    return nll_N


def _batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Consecutive groups whose padded size stays within `batch_tokens`; as many for each rank, and of like size.

    `lengths` ascend. Ranks that each hold the model have two or more, so that what they cost evens out.
    """
    groups, count = _within(order, lengths, batch_tokens), ranks.size()
    if count == 1 or len(order) <= count:
        return groups if count == 1 else [[i] for i in order]
    passes = max(1 if ranks.is_sharded() else 2, -(-len(groups) // count))
    low, high = max(lengths), max(batch_tokens, max(lengths))
    while low < high:  # the smallest limit that makes no more groups than that
        middle = (low + high) // 2
        low, high = (low, middle) if len(_within(order, lengths, middle)) <= passes * count else (middle + 1, high)
    return _within(order, lengths, low)


def _within(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    for i, length in zip(order, lengths, strict=True):
        if groups[-1] and length * (len(groups[-1]) + 1) > batch_tokens:  # lengths ascend: the newest is the longest
            groups.append([])
        groups[-1].append(i)
    return [group for group in groups if group]
