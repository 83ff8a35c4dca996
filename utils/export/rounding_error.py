"""What rounding took of a merge: of the weights, and of what the adapters changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from utils.models.weights.safetensors_io import Header


def squared_norm(values: torch.Tensor) -> float:
    """||values||^2 of a piece of a tensor."""
    return float(torch.linalg.vector_norm(values)) ** 2


def figures(outputs: Mapping[str, Header], record: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How much rounding took: ||W_out - W_exact|| as a share of ||W_exact|| and of ||delta||, overall and worst."""
    squares = {name: sums for done in record.values() for name, sums in done["squares"].items()}
    if not squares:  # a copy
        return {"tensors": sum(len(header.tensors) for header in outputs.values()), "tensors_changed": 0}
    error, size, delta = (math.fsum(column) for column in zip(*squares.values(), strict=True))
    return {
        "tensors": sum(len(header.tensors) for header in outputs.values()),
        "tensors_changed": len(squares),
        "rounding_to_weight": _share(error, size),
        "rounding_to_weight_worst": max(_share(e, s) for e, s, _ in squares.values()),
        "rounding_to_delta": _share(error, delta),
        "rounding_to_delta_worst": max(_share(e, d) for e, _, d in squares.values()),
    }


def _share(error: float, whole: float) -> float:
    return math.sqrt(error / whole) if whole else 0.0
