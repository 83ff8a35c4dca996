"""Rows and batches: packed documents for the domain adapter, length-bucketed pairs for the task adapter.

A row is token ids, position ids and next-token labels; -100 marks what is not trained. Padding always follows the last
real token and starts its own positions at 0, and so does every packed piece: attention never crosses such a border
(transformers reads it off the position ids), so no attention mask is needed and pad tokens may equal eos.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from config import TrainSection
from utils.data.pair_rows import Pair
from utils.models.losses import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

OPEN_ROWS = 64  # rows kept open while packing: larger fills better and costs a longer scan


@dataclass(frozen=True)
class Batch:
    """One forward pass; `names` says which documents or examples it holds, for error messages."""

    input_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    names: tuple[str, ...]
    # True where the prediction has to stay what it was without the trained adapter; None where nothing is held
    kept_BT: torch.Tensor | None = None

    @property
    def num_labels(self) -> int:
        return int((self.labels_BT != IGNORED).sum())

    def uncounted(self) -> Batch:
        """The same forward pass without anything that is trained."""
        kept_BT = None if self.kept_BT is None else torch.zeros_like(self.kept_BT)
        return replace(self, labels_BT=torch.full_like(self.labels_BT, IGNORED), kept_BT=kept_BT)


MicroBatch = tuple[int, ...]
OptimiserStep = list[MicroBatch]


class TrainingData(Protocol):
    """What the training loop needs to know about data."""

    def steps(self, epoch: int) -> list[OptimiserStep]:
        """The optimiser steps of an epoch, each a list of micro-batches of row numbers; the same at every call."""

    def batch(self, epoch: int, rows: MicroBatch) -> Batch:
        """The tensors of a micro-batch."""

    def num_labels(self, epoch: int, step: OptimiserStep) -> int:
        """Trained tokens in a step, over all its micro-batches."""


@dataclass(frozen=True)
class Piece:
    """Tokens start..end of a document."""

    document: int
    start: int
    end: int


class PackedDocuments:
    """Documents packed into rows of `max_sequence_tokens`; a long one continues in another row, no token is lost.

    Without `packs` each piece is a row of its own, and rows of similar length make a step: for models that do not
    honour borders within a row (`row_support`).
    """

    def __init__(self, documents: Dataset, train: TrainSection, seed: int, pad_id: int, *, packs: bool = True):
        self.documents, self.train, self.seed, self.pad_id, self.packs = documents, train, seed, pad_id, packs
        self.lengths = np.asarray(documents.with_format("numpy")["num_tokens"][:], dtype=np.int64)
        self._packed: tuple[int, list[list[Piece]]] = (-1, [])

    def rows(self, epoch: int) -> list[list[Piece]]:
        """The pieces of each row; packing is redone each epoch, so neighbours change."""
        if self._packed[0] != epoch:
            arrange = pack if self.packs else one_piece_each
            generator = random.Random(f"{self.seed}:{epoch}")
            self._packed = (epoch, arrange(self.lengths, self.train.max_sequence_tokens, generator))
        return self._packed[1]

    def row_lengths(self, epoch: int) -> list[int]:
        """Tokens of each row, padding included where rows are packed."""
        if self.packs:
            return [self.train.max_sequence_tokens] * len(self.rows(epoch))
        return [piece.end - piece.start for (piece,) in self.rows(epoch)]

    def filled_lengths(self, epoch: int) -> list[int]:
        """Tokens of each row without its padding."""
        return [sum(piece.end - piece.start for piece in pieces) for pieces in self.rows(epoch)]

    def unpacked(self) -> PackedDocuments:
        """The same documents, each piece in a row of its own."""
        return PackedDocuments(self.documents, self.train, self.seed, self.pad_id, packs=False)

    def steps(self, epoch: int) -> list[OptimiserStep]:
        lengths = self.row_lengths(epoch)
        order = sorted(range(len(lengths)), key=lambda row: lengths[row])  # packed rows are all of one length
        steps = group(order, [lengths[row] for row in order], self.train)
        if not self.packs:
            random.Random(f"{self.seed}:{epoch}:steps").shuffle(steps)
        return steps

    def batch(self, epoch: int, rows: MicroBatch) -> Batch:
        lengths, pieces = self.row_lengths(epoch), self.rows(epoch)
        return rows_of_pieces(
            self.documents, [pieces[row] for row in rows], max(lengths[row] for row in rows), self.pad_id
        )

    def num_labels(self, epoch: int, step: OptimiserStep) -> int:
        rows = self.rows(epoch)
        pieces = [piece for micro in step for number in micro for piece in rows[number]]
        return sum(p.end - p.start - int(p.end == self.lengths[p.document]) for p in pieces)


class BucketedPairs:
    """Prompt-answer pairs in batches of similar length; the answer and its end-of-turn token are trained.

    Of the prompt's tokens a share, `prompt_loss_weight`, is drawn anew in each epoch and trained as well: on average
    the loss with this weight on all of them (Shi et al. 2024, arXiv 2405.14394), for fewer logits.
    """

    def __init__(
        self, pairs: Sequence[Pair], train: TrainSection, seed: int, pad_id: int, *, prompt_loss_weight: float = 0.0
    ):
        self.pairs, self.train, self.seed, self.pad_id = pairs, train, seed, pad_id
        self.prompt_loss_weight = prompt_loss_weight

    def steps(self, epoch: int) -> list[OptimiserStep]:
        order = list(range(len(self.pairs)))
        generator = random.Random(f"{self.seed}:{epoch}")
        generator.shuffle(order)
        lengths = [len(self.pairs[i].ids) for i in order]
        order = [i for _, i in sorted(zip(lengths, order, strict=True), key=lambda pair: pair[0])]
        steps = group(order, [len(self.pairs[i].ids) for i in order], self.train)
        generator.shuffle(steps)
        return steps

    def batch(self, epoch: int, rows: MicroBatch) -> Batch:
        batch = pad([self.pairs[row] for row in rows], self.pad_id)
        for at, row in enumerate(rows):
            drawn = self._drawn(epoch, row)
            batch.labels_BT[at, drawn] = batch.input_ids_BT[at, drawn + 1]
        return batch

    def num_labels(self, epoch: int, step: OptimiserStep) -> int:
        rows = [row for micro in step for row in micro]
        return sum(self.pairs[row].num_trained + len(self._drawn(epoch, row)) for row in rows)

    def _drawn(self, epoch: int, row: int) -> torch.Tensor:
        """Positions in the prompt whose next token, of the prompt too, is trained; the same at every call."""
        pair = self.pairs[row]
        count = len(pair.ids) - pair.num_answer_tokens - 1 if self.prompt_loss_weight else 0
        draw = np.random.default_rng((self.seed, epoch, row)).random(max(0, count))
        for start, end in pair.earlier:  # answers, which are trained anyway
            draw[start - 1 : end - 1] = 1.0
        return torch.from_numpy(np.flatnonzero(draw < self.prompt_loss_weight))


def rows_of_pieces(documents: Dataset, rows: Sequence[Sequence[Piece]], length: int, pad_id: int) -> Batch:
    """Rows of `length` tokens, each filled with pieces of documents; across a cut, the next token is the label."""
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    names: list[str] = []
    for row, pieces in enumerate(rows):
        at = 0
        for piece in pieces:
            document = documents[piece.document]
            tokens = np.asarray(document["input_ids"][piece.start : piece.end + 1], dtype=np.int64)
            size = piece.end - piece.start
            ids[row, at : at + size] = tokens[:size]
            labels[row, at : at + len(tokens) - 1] = tokens[1:]
            positions[row, at : at + size] = np.arange(size)
            names.append(document["id"])
            at += size
        positions[row, at:] = np.arange(length - at)
    return Batch(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(labels), tuple(names))


def pack(lengths: Sequence[int], row_tokens: int, generator: random.Random) -> list[list[Piece]]:
    """Rows of at most `row_tokens`: documents in random order, each piece into the open row it fills best."""
    order = list(range(len(lengths)))
    generator.shuffle(order)
    done: list[list[Piece]] = []
    open_rows: list[tuple[int, list[Piece]]] = []  # (free tokens, pieces)
    for document in order:
        for start in range(0, int(lengths[document]), row_tokens):
            piece = Piece(document, start, min(start + row_tokens, int(lengths[document])))
            size = piece.end - piece.start
            fitting = [(free, at) for at, (free, _) in enumerate(open_rows) if free >= size]
            if fitting:
                free, at = min(fitting)
                open_rows[at] = (free - size, [*open_rows[at][1], piece])
            else:
                open_rows.append((row_tokens - size, [piece]))
            if len(open_rows) > OPEN_ROWS:
                fullest = min(range(len(open_rows)), key=lambda at: open_rows[at][0])
                done.append(open_rows.pop(fullest)[1])
    rows = done + [pieces for _, pieces in open_rows]
    generator.shuffle(rows)
    return rows


def one_piece_each(lengths: Sequence[int], row_tokens: int, generator: random.Random) -> list[list[Piece]]:
    """As `pack`, with a row for each piece."""
    rows = [
        [Piece(document, start, min(start + row_tokens, int(length)))]
        for document, length in enumerate(lengths)
        for start in range(0, int(length), row_tokens)
    ]
    generator.shuffle(rows)
    return rows


def group(order: Sequence[int], lengths: Sequence[int], train: TrainSection) -> list[OptimiserStep]:
    """Rows into steps of at most batch_tokens padded tokens, each cut into micro-batches of at most micro_batch_tokens.

    Which rows make a step does not depend on the micro-batch: that trades memory for time and decides no result.
    """
    length_of = dict(zip(order, lengths, strict=True))
    steps = _steps(order, length_of, train.batch_tokens)
    limit = train.micro_batch_tokens
    # cut inside a pass, no micro-batch pads more than the pass that was counted
    return [[micro for rows in step for micro in _micro_batches(rows, length_of, limit)] for step in steps]


def _steps(order: Sequence[int], length_of: Mapping[int, int], batch_tokens: int) -> list[list[list[int]]]:
    """Rows of each step, in as few padded passes as the step's own size allows."""
    steps: list[list[list[int]]] = [[]]
    rows = longest = spent = 0
    for row in order:
        length = length_of[row]
        if rows and max(longest, length) * (rows + 1) > batch_tokens:
            spent += longest * rows
            rows = longest = 0
        if steps[-1] and spent + max(longest, length) * (rows + 1) > batch_tokens:
            steps.append([])
            rows = longest = spent = 0
        if not rows:
            steps[-1].append([])
        steps[-1][-1].append(row)
        rows, longest = rows + 1, max(longest, length)
    return [step for step in steps if step]


def _micro_batches(rows: Sequence[int], length_of: Mapping[int, int], limit: int) -> OptimiserStep:
    """Consecutive rows whose padded tokens stay below the limit; at least one row each."""
    micro_batches: list[list[int]] = []
    longest = 0
    for row in rows:
        if not micro_batches or max(longest, length_of[row]) * (len(micro_batches[-1]) + 1) > limit:
            micro_batches.append([])
            longest = 0
        micro_batches[-1].append(row)
        longest = max(longest, length_of[row])
    return [tuple(micro) for micro in micro_batches]


def pad(pairs: Sequence[Pair], pad_id: int) -> Batch:
    """Right-padded pairs with next-token labels on the answers."""
    length = max(len(pair.ids) for pair in pairs)
    ids = torch.full((len(pairs), length), pad_id)
    labels = torch.full((len(pairs), length), IGNORED)
    for row, pair in enumerate(pairs):
        tokens = torch.tensor(pair.ids)
        ids[row, : len(tokens)] = tokens
        for start, end in pair.trained:
            labels[row, start - 1 : end - 1] = tokens[start:end]
    positions = torch.arange(length).expand(len(pairs), -1).contiguous()
    return Batch(ids, positions, labels, tuple(pair.name for pair in pairs))


def dev_batches(data: TrainingData, settings: TrainSection) -> list[Batch]:
    """The dev data in its first fixed order, up to max_dev_tokens."""
    batches: list[Batch] = []
    tokens = 0
    for step in data.steps(0):
        for rows in step:
            batch = data.batch(0, rows)
            tokens += batch.input_ids_BT.numel()
            if batches and settings.max_dev_tokens and tokens > settings.max_dev_tokens:
                return batches
            batches.append(batch)
    return batches
