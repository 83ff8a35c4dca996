"""Gradients of one step made one over all ranks, their norm, and clipping it.

What is whole in each rank, or sharded, is averaged in the backward pass. Factors of experts that ranks share are not:
a rank's gradient is that of all tokens that its group sent to its experts, so copies are added and divided by all
ranks, once a step. Their squares are added over the group that holds each expert once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from utils.models.parallel import expert_parallel, sharding

if TYPE_CHECKING:
    from accelerate import Accelerator


def reduce(parameters: Mapping[str, torch.nn.Parameter], ranks: int) -> None:
    """Make the gradients of shared experts' factors those of the mean over `ranks`; every rank has to call it."""
    for parameter in parameters.values():
        if expert_parallel.is_factor(parameter) and parameter.grad is not None:
            gradient, copies = sharding.own(parameter.grad), parameter.device_mesh["copies"]
            if copies.size() > 1:
                dist.all_reduce(gradient, group=copies.get_group())
            gradient.div_(ranks)


def clip(parameters: Mapping[str, torch.nn.Parameter], largest: float, accelerator: Accelerator) -> float:
    """Scale the gradients so that their norm over all parameters is at most `largest`; returns the norm before."""
    factors = [p for p in parameters.values() if expert_parallel.is_factor(p) and p.grad is not None]
    if not factors:
        return float(sharding.whole(accelerator.clip_grad_norm_(parameters.values(), largest)))
    others = [p for p in parameters.values() if not expert_parallel.is_factor(p) and p.grad is not None]
    squares = torch.stack([sharding.own(p.grad).double().square().sum() for p in factors]).sum()
    dist.all_reduce(squares, group=factors[0].device_mesh["experts"].get_group())
    rest = torch.nn.utils.get_total_norm([p.grad for p in others]) if others else torch.zeros(())
    norm = math.sqrt(float(squares) + float(sharding.whole(rest)) ** 2)
    share = min(1.0, largest / (norm + 1e-6))  # as torch's clip_grad_norm_
    for parameter in (*others, *factors):
        sharding.own(parameter.grad).mul_(share)
    return norm
