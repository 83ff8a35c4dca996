"""Labelled pairs with what keeps the domain beside them: windows of its documents, or prompts that are held to.

Replay (Robins 1995; for language models Ibrahim et al. 2024, arXiv 2403.08763) adds documents to each optimiser step:
the pairs of a step, the number of steps and the learning rate stay what they are without it. Learning without
forgetting (Li and Hoiem 2016, arXiv 1606.09282) needs no documents: it holds the predictions on prompt tokens.

Everything is a function of the seed and the number of the step, so a resumed run does the same.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from utils.data.batches import Batch, BucketedPairs, MicroBatch, OptimiserStep, Piece, rows_of_pieces

if TYPE_CHECKING:
    from datasets import Dataset

# tokens of a window of documents: as long as most prompts, so that a step of a few hundred tokens has whole ones
WINDOW_TOKENS = 128
How = Literal["off", "replay", "kl"]


@dataclass(frozen=True)
class DomainKeeping:
    """What keeps the domain, from which step on; before it nothing does."""

    how: How = "off"
    from_step: int = 0


class DocumentRows(tuple[int, ...]):
    """A micro-batch of windows of documents, by their numbers."""

    __slots__ = ()


class HeldRows(tuple[int, ...]):
    """A micro-batch of pairs, of which a share has its prompt's predictions held."""

    __slots__ = ()


class DocumentWindows:
    """Rows of `tokens` tokens cut from documents at random: window `n` is a function of the seed and `n` alone.

    Nothing is packed in advance, so a corpus of any size costs the same. A row is filled from several documents where
    they are short; without `packs` it has one piece (`row_support`).
    """

    def __init__(self, documents: Dataset, tokens: int, seed: int, pad_id: int, *, packs: bool = True):
        self.documents, self.tokens, self.seed, self.pad_id, self.packs = documents, tokens, seed, pad_id, packs
        self.lengths = np.asarray(documents.with_format("numpy")["num_tokens"][:], dtype=np.int64)
        self.ends = self.lengths.cumsum()

    def pieces(self, number: int) -> list[Piece]:
        """The pieces of a window: documents by their length, the place in them uniform."""
        generator = np.random.default_rng((self.seed, number))
        pieces: list[Piece] = []
        free = self.tokens
        while free > 1 and (self.packs or not pieces):
            place = int(generator.integers(self.ends[-1]))
            document = int(np.searchsorted(self.ends, place, side="right"))
            length = int(self.lengths[document])
            start = max(0, min(place - int(self.ends[document]) + length, length - free))
            pieces.append(Piece(document, start, min(start + free, length)))
            free -= pieces[-1].end - start
        return pieces

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Windows as tensors (B, T); every token but a document's first is a label."""
        rows = [self.pieces(number) for number in numbers]
        longest = self.tokens if self.packs else max(piece.end - piece.start for (piece,) in rows)
        return rows_of_pieces(self.documents, rows, longest, self.pad_id)

    def num_labels(self, numbers: Sequence[int]) -> int:
        """Labels of these windows."""
        pieces = [piece for number in numbers for piece in self.pieces(number)]
        return sum(p.end - p.start - int(p.end == self.lengths[p.document]) for p in pieces)


class KeptPairs:
    """The pairs, and in each step what a `DomainKeeping` adds; as the training loop takes data (`TrainingData`)."""

    def __init__(self, pairs: BucketedPairs, windows: DocumentWindows | None, share: float):
        self.pairs, self.windows, self.share = pairs, windows, share
        # by the tokens themselves: padding follows the micro-batch, which decides no result
        steps = max(1, len(pairs.steps(0)))
        self.step_tokens = sum(len(pair.ids) for pair in pairs.pairs) / steps

    def steps(self, epoch: int) -> list[OptimiserStep]:
        return self.pairs.steps(epoch)

    def with_keeping(self, step: OptimiserStep, number: int, keeping: DomainKeeping) -> OptimiserStep:
        """Optimiser step `number` (from 0) of the run, with what keeps the domain in it."""
        since = number - keeping.from_step
        if keeping.how == "off" or since < 0:
            return step
        if keeping.how == "kl":
            return [HeldRows(rows) for rows in step]
        if self.windows is None:
            raise ValueError("there are no documents to replay")
        rate = self.windows_per_step
        numbers = range(round(since * rate), round((since + 1) * rate))
        most = max(1, self.pairs.train.micro_batch_tokens // self.windows.tokens)
        added = [DocumentRows(numbers[at : at + most]) for at in range(0, len(numbers), most)]
        return [*step, *added]

    @property
    def windows_per_step(self) -> float:
        """So many that `share` of the tokens of a step, on average, are documents."""
        if self.windows is None:
            return 0.0
        return self.share / (1 - self.share) * self.step_tokens / self.windows.tokens

    def batch(self, epoch: int, rows: MicroBatch) -> Batch:
        if isinstance(rows, DocumentRows) and self.windows is not None:
            return self.windows.batch(rows)
        batch = self.pairs.batch(epoch, rows)
        if not isinstance(rows, HeldRows):
            return batch
        kept_BT = torch.zeros_like(batch.labels_BT, dtype=torch.bool)
        for at, row in enumerate(rows):
            kept_BT[at, : self._held(epoch, row)] = True
        return replace(batch, kept_BT=kept_BT)

    def num_labels(self, epoch: int, step: OptimiserStep) -> int:
        """Trained tokens and held predictions of a step: the loss is their mean."""
        documents = [number for rows in step if isinstance(rows, DocumentRows) for number in rows]
        total = self.windows.num_labels(documents) if self.windows is not None else 0
        total += sum(self._held(epoch, row) for rows in step if isinstance(rows, HeldRows) for row in rows)
        return total + self.pairs.num_labels(epoch, [rows for rows in step if not isinstance(rows, DocumentRows)])

    def _held(self, epoch: int, row: int) -> int:
        """Positions at the beginning of a pair whose predictions are held: those that predict its prompt, or none."""
        pair = self.pairs.pairs[row]
        is_drawn = np.random.default_rng((self.pairs.seed, epoch, row, 1)).random() < self.share
        return max(0, len(pair.ids) - pair.num_answer_tokens - 1) if is_drawn else 0
