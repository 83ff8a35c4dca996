"""Rows of a batch in which pieces stand one after the other: documents, or answers to one prompt.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from utils.models.losses import IGNORED

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def packed(rows: Sequence[Sequence[Sequence[int]]], pad_id: int) -> Tensors:
    """(ids, positions, labels) (B, T) of rows of pieces, each with its own positions and next-token labels.

    Padding follows the last piece and has positions of its own.
    """
    length = max(sum(len(piece) for piece in row) for row in rows)
    ids = torch.full((len(rows), length), pad_id)
    labels = torch.full((len(rows), length), IGNORED)
    positions = torch.zeros((len(rows), length), dtype=torch.long)
    for number, row in enumerate(rows):
        at = 0
        for piece in row:
            end = at + len(piece)
            ids[number, at:end] = torch.tensor(piece)
            labels[number, at : end - 1] = torch.tensor(piece[1:])
            positions[number, at:end] = torch.arange(len(piece))
            at = end
        positions[number, at:] = torch.arange(length - at)
    return ids, positions, labels


def sharing_a_prompt(
    items: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], pad_id: int
) -> tuple[Tensors, torch.Tensor]:
    """(ids, positions, labels) (B, T) and who sees whom (B, T, T), for (prompt, candidates) in each row.

    A row is the prompt without its last token, then per candidate that last token and the candidate's inputs: so each
    candidate predicts its own first token, at the position that it has when it stands alone after the prompt.
    """
    length = max(len(prompt) + sum(len(c) for c in candidates) for prompt, candidates in items)
    ids = torch.full((len(items), length), pad_id)
    positions = torch.zeros((len(items), length), dtype=torch.long)
    labels = torch.full((len(items), length), IGNORED)
    # True where a query may look; pad queries see themselves, because a row without any key is NaN
    visible = torch.eye(length, dtype=torch.bool).repeat(len(items), 1, 1)
    for row, (prompt, candidates) in enumerate(items):
        shared = len(prompt) - 1
        ids[row, :shared] = torch.tensor(prompt[:-1])
        positions[row, :shared] = torch.arange(shared)
        visible[row, :shared, :shared] = torch.ones(shared, shared, dtype=torch.bool).tril()
        at = shared
        for candidate in candidates:
            end = at + len(candidate)
            ids[row, at:end] = torch.tensor((prompt[-1], *candidate[:-1]))
            positions[row, at:end] = torch.arange(shared, shared + len(candidate))
            labels[row, at:end] = torch.tensor(candidate)
            visible[row, at:end, :shared] = True
            visible[row, at:end, at:end] = torch.ones(end - at, end - at, dtype=torch.bool).tril()
            at = end
    return (ids, positions, labels), visible
