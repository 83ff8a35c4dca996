"""What a layer's activations take: saved for the backward pass, and workspace. Numbers in, numbers out; bytes.

What a training step saves was read off autograd, tensor by tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from config import AUTO
from utils.models.model_shapes import Dtype, Matrix, ModelSizes

# matrices with the same input, which LoRA keeps once
_SHARED_INPUTS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


@dataclass(frozen=True)
class Adapter:
    """What one LoRA adapter is on: `targets` as `lora.target_modules`."""

    targets: tuple[str, ...]
    rank: int
    experts: bool = False

    def takes(self, matrix: Matrix) -> bool:
        """Whether it is on these matrices."""
        is_named = AUTO in self.targets or matrix.name in self.targets
        return self.experts if matrix.is_experts else matrix.adaptable and is_named


@dataclass(frozen=True)
class TrainingStep:
    """One forward and backward pass on one process: `tokens` with padding, in rows of `row_tokens`, maybe packed."""

    base: Dtype
    adapter: Adapter
    tokens: int
    row_tokens: int
    packed: bool = False
    checkpointing: bool = False
    below: Adapter | None = None

    @property
    def activation_bytes(self) -> int:
        """Bytes of one activation."""
        return width_of(self.base)


def lora_parameters(sizes: ModelSizes, adapter: Adapter) -> dict[str, int]:
    """Trainable parameters by leaf name, in the model's order."""
    counts: dict[str, int] = {}
    for matrix in sizes.matrices:
        if adapter.takes(matrix):
            counts[matrix.name] = counts.get(matrix.name, 0) + matrix.lora_parameters(adapter.rank)
    return counts


def layer_activations(
    sizes: ModelSizes, step: TrainingStep, imbalance: float = 1.0, *, is_shared: bool = False
) -> tuple[int, int]:
    """(kept for the backward pass of one layer, what that pass needs beside it)."""
    e, hidden, query, inner = step.activation_bytes, sizes.hidden, sizes.query, sizes.intermediate
    touched = lora_parameters(sizes, step.adapter)
    per_token = 4 * (2 * hidden + (query + sizes.key if sizes.has_qk_norm else 0))  # norms compute in float32
    # queries, keys, values, the heads' outputs, and these side by side for the output projection; a mask between packed
    # documents makes transformers repeat keys and values for every head
    per_token += e * (3 * query + 2 * (query if step.packed else sizes.key)) + 4 * sizes.heads
    per_token += sum(e * hidden for group in _SHARED_INPUTS if touched.keys() & group)
    per_token += e * step.adapter.rank * sum(m.name in touched and not m.is_experts for m in sizes.matrices)
    if sizes.experts:
        chosen = sizes.experts_per_token * (imbalance if is_shared else 1)
        # gate and up, silu(gate), the output before its weight; indices; the router's scores
        per_token += chosen * (e * (3 * inner + hidden) + 40) + 4 * sizes.experts
        if step.adapter.experts:
            per_token += chosen * e * (hidden + inner)  # the inputs of both products
        # the weighted outputs are float32: their gradient, and that times weight and times output
        working = chosen * max(12 * hidden, e * (hidden + 3 * inner))
        working += _exchanged(sizes, e, imbalance) if is_shared else 0
    else:
        per_token += e * (3 + ("down_proj" in touched)) * inner
        working = 3 * e * inner
    mask = step.tokens * step.row_tokens * e if step.packed else 0
    return int(step.tokens * per_token) + mask, int(step.tokens * max(working, 3 * e * query))


def forward_activations(sizes: ModelSizes, e: int, imbalance: float = 1.0, *, is_shared: bool = False) -> int:
    """Bytes for a token in the layer that takes most, where nothing is kept for a backward pass."""
    hidden, query, inner = sizes.hidden, sizes.query, sizes.intermediate
    attention = e * (3 * query + 2 * sizes.key) + 4 * 2 * (query if sizes.has_qk_norm else 0)
    # gate, up and what an adapter adds; of experts in and out, the weighted output and its sum in float32
    mlp = e * 3 * inner
    if sizes.experts:
        mlp = sizes.experts_per_token * max(2 * e * hidden + 8 * hidden + e * inner, e * (hidden + 3 * inner))
        mlp = int(mlp * imbalance) + _exchanged(sizes, e, imbalance) if is_shared else mlp
    return 4 * e * hidden + max(attention, mlp)


def _exchanged(sizes: ModelSizes, e: int, imbalance: float) -> int:
    """Bytes for a token of what experts are sent and give: inputs and outputs, as sender and expert have them."""
    return int(sizes.experts_per_token * e * sizes.hidden * (2 + 2 * imbalance))


def expert_factors(sizes: ModelSizes, adapter: Adapter | None) -> int:
    if adapter is None:
        return 0
    return sum(m.lora_parameters(adapter.rank) for m in sizes.matrices if m.is_experts and adapter.takes(m))


def width_of(base: Dtype) -> int:
    """Bytes of one activation."""
    return 4 if base == "float32" else 2


def share(amount: int, parts: int) -> int:
    return math.ceil(amount / parts)
