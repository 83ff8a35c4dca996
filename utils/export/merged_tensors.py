"""The bytes of one merged tensor, in pieces: read a few rows at a time, dequantized if it is FP8, its update added in
float32, rounded once. A tensor that does not change is copied.

Shapes: R rows of a piece, O out_features, I in_features, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from utils.adapters.factors import norm
from utils.exceptions import NonFiniteError, Problem
from utils.export.merge_plan import Plan
from utils.export.rounding_error import squared_norm
from utils.models.weights import fp8, safetensors_io


def content(plan: Plan, path: Path, squares: dict[str, list[float]], name: str) -> Iterator[Any]:
    """The bytes of tensor `name` of the merged file `path`; `squares` gets the squared norms of a changed one.

    Raises NonFiniteError when a merged weight is not finite.
    """
    before, after = plan.checkpoint.headers[path].tensors[name], plan.outputs[path.name].tensors[name]
    weight = name.removesuffix(safetensors_io.SCALE)
    if weight in plan.updates and weight != name:
        # made anew from the weight: it may come before it, or be in another file
        for exact_RI in _exact(plan, plan.checkpoint.homes[weight], weight):
            yield safetensors_io.as_bytes(fp8.quantise(exact_RI, plan.checkpoint.block)[1])
    elif name not in plan.updates and after.dtype == before.dtype:
        yield from safetensors_io.raw(path, plan.checkpoint.headers[path], name)
    else:
        yield from _computed(plan, path, name, squares)


def _computed(plan: Plan, path: Path, name: str, squares: dict[str, list[float]]) -> Iterator[Any]:
    dtype = plan.outputs[path.name].tensors[name].dtype
    error = size = 0.0
    for exact_RI in _exact(plan, path, name):
        if dtype == safetensors_io.FP8:
            written_RI, scales = fp8.quantise(exact_RI, plan.checkpoint.block)
            rounded_RI = fp8.dequantise(written_RI, scales, plan.checkpoint.block)
        else:
            written_RI = exact_RI.to(safetensors_io.DTYPES[dtype])
            rounded_RI = written_RI.float()
        if name in plan.updates:
            error += squared_norm(rounded_RI - exact_RI)
            size += squared_norm(exact_RI)
        yield safetensors_io.as_bytes(written_RI)
    if name in plan.updates:
        if not math.isfinite(error + size):
            raise NonFiniteError(Problem(f"{name} is not finite after merging", fix="look at the adapters' weights"))
        squares[name] = [error, size, norm(plan.updates[name]) ** 2]


def _exact(plan: Plan, path: Path, name: str) -> Iterator[torch.Tensor]:
    """The weights of a tensor (R, I) in float32 with its update added, piece by piece."""
    update = plan.updates.get(name)
    if update is not None:
        # one update per leading index, as `rows` counts them
        a_LrI = update.a_rI.float().view(-1, *update.a_rI.shape[-2:])
        b_LOr = update.b_Or.float().view(-1, *update.b_Or.shape[-2:])
    for lead, first, weights_RI in plan.checkpoint.rows(path, name):
        if update is not None:
            weights_RI.addmm_(b_LOr[lead, first : first + len(weights_RI)], a_LrI[lead], alpha=update.scale)
        yield weights_RI
