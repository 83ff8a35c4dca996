"""Passes through the model: who takes which micro-batch, the loss of one, and the mean over the dev batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from utils.data.batches import Batch
from utils.models.losses import autocast

if TYPE_CHECKING:
    from accelerate import Accelerator


def share_of(items: Sequence[Any], process: int, processes: int) -> list[tuple[Any, bool]]:
    """This rank's micro-batches, and whether each counts; short ranks repeat one that does not count.

    The passes through the model have to be as many on every rank: each is a conversation between them.
    """
    mine = [(rows, True) for rows in items[process::processes]]
    missing = math.ceil(len(items) / processes) - len(mine)
    return mine + [(items[0], False)] * missing


def batch_loss(module: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """Sum of the NLL of the trained tokens of a micro-batch, and of what is held: a scalar with a gradient."""
    rows = [batch.input_ids_BT, batch.position_ids_BT, batch.labels_BT]
    if batch.kept_BT is not None:
        rows.append(batch.kept_BT)
    with autocast(module, device):
        return module(*(row.to(device) for row in rows))


@torch.no_grad()
def mean_loss(loss_module: torch.nn.Module, batches: list[Batch], accelerator: Accelerator) -> float:
    """Mean NLL per trained token over batches that are split over the ranks; every rank gets the same number."""
    was_training = loss_module.training
    loss_module.eval()
    inner = accelerator.unwrap_model(loss_module)
    sums = torch.zeros(2, dtype=torch.float64)
    for batch, counts in share_of(batches, accelerator.process_index, accelerator.num_processes):
        loss = float(batch_loss(inner, batch, accelerator.device))
        if counts:
            sums += torch.tensor([loss, batch.num_labels], dtype=torch.float64)
    sums = accelerator.reduce(sums.to(accelerator.device), "sum")
    loss_module.train(was_training)
    return float(sums[0] / sums[1])


@torch.no_grad()
def sums(loss_module: torch.nn.Module, batches: Sequence[Batch], accelerator: Accelerator) -> list[float]:
    """The summed NLL of each batch, split over the ranks; every rank gets the same numbers."""
    was_training = loss_module.training
    loss_module.eval()
    inner = accelerator.unwrap_model(loss_module)
    losses = torch.zeros(len(batches), dtype=torch.float64)
    numbers = share_of(range(len(batches)), accelerator.process_index, accelerator.num_processes)
    for number, counts in numbers:
        loss = float(batch_loss(inner, batches[number], accelerator.device))
        if counts:
            losses[number] = loss
    losses = accelerator.reduce(losses.to(accelerator.device), "sum")
    loss_module.train(was_training)
    return [float(value) for value in losses]
