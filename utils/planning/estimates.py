"""What fits where, before any weight is loaded: parameters, memory and disk. Numbers in, numbers out.

Bytes unless a name says otherwise; GiB = 2**30. Every size follows from the model's own shapes; what the training step
keeps for its backward pass was read off autograd, tensor by tensor. All peaks are checked against measured ones
(tests/test_planning_estimates.py). What no arithmetic knows (CUDA's context, NCCL, fragmentation) is the caller's
headroom. Times are those of `pass_times`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from config import AUTO
from utils.models.model_shapes import FP8_BLOCK, NF4_BLOCK, TRANSIENT_LAYERS, Dtype, Matrix, ModelSizes

# positions whose logits exist at a time (utils/models/losses.py)
LOSS_POSITIONS = 128
# float32: value, gradient and AdamW's two moments
TRAINED_BYTES = 16
# a second adapter on the experts: its measured transient, and that of one alone, in a layer's experts (PEFT 0.21)
TWO_EXPERT_ADAPTERS, ONE_EXPERT_ADAPTER = 3.67, 1.41
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
        return _width(self.base)


@dataclass(frozen=True)
class TrainingMemory:
    """Peak bytes on one GPU (or of one CPU process). `kept` is for the backward pass; `passing` comes and goes."""

    weights: int
    gathered: int
    adapters: int
    kept: int
    passing: int
    expert_weights: int

    @property
    def total(self) -> int:
        return self.weights + self.gathered + self.adapters + self.kept + self.passing + self.expert_weights


Fit = Literal["fits", "tight", "no"]
# a prediction is not a measurement: with less than this share of the memory to spare it is only called tight
COMFORT = 0.1


def verdict(low: int, high: int, available: float) -> Fit:
    """Whether a peak between `low` and `high` bytes has room in `available` ones."""
    if high <= (1 - COMFORT) * available:
        return "fits"
    return "tight" if low <= available else "no"


def lora_parameters(sizes: ModelSizes, adapter: Adapter) -> dict[str, int]:
    """Trainable parameters by leaf name, in the model's order."""
    found: dict[str, int] = {}
    for matrix in sizes.matrices:
        if adapter.takes(matrix):
            found[matrix.name] = found.get(matrix.name, 0) + matrix.lora_parameters(adapter.rank)
    return found


def weight_bytes(sizes: ModelSizes, dtype: Dtype) -> int:
    """Bytes of the whole model with its weights in this dtype.

    FP8 is for matrices alone, nf4 and int8 for those that are no experts; the rest stays bfloat16.
    """
    plain = 4 if dtype == "float32" else 2
    router = sizes.parameters["router"] * (4 if sizes.float32_router else plain)
    rest = sizes.total - sizes.parameters["router"]
    if dtype in ("nf4", "int8"):
        linear = [matrix for matrix in sizes.matrices if not matrix.is_experts]
        bits = sum(_quantised_bytes(matrix, dtype) for matrix in linear)
        return bits + (rest - sum(matrix.parameters for matrix in linear)) * plain + router
    if dtype != "fp8":
        return rest * plain + router
    quantised = sum(matrix.parameters for matrix in sizes.matrices)
    blocks = sum(
        matrix.copies * math.ceil(matrix.out_features / FP8_BLOCK) * math.ceil(matrix.in_features / FP8_BLOCK)
        for matrix in sizes.matrices
    )
    return quantised + 4 * blocks + (rest - quantised) * plain + router


def training_memory(
    sizes: ModelSizes, step: TrainingStep, *, shards: int = 1, careful: bool = False, whole_logits: bool = False
) -> TrainingMemory:
    """Peak of one training step. `shards` processes hold the weights and adapters together (FSDP2); 1: each holds all.

    `careful` counts what may overlap as overlapping: the next layer is gathered before its turn, and adapters on the
    experts find the transients of the ones before still there. `whole_logits` is for a loss that is not chunked.
    """
    trained = sum(lora_parameters(sizes, step.adapter).values())
    frozen = sum(lora_parameters(sizes, step.below).values()) if step.below else 0
    layer = _share(weight_bytes(sizes, step.base) * sizes.layer_parameters, sizes.total)
    layer += _share(4 * (trained + frozen), sizes.num_layers)
    outside = _outside(sizes, step.base)
    saved, working = _layer_activations(sizes, step)
    width, hidden = step.activation_bytes, sizes.hidden
    # the last norm keeps its input in float32
    kept = step.tokens * 4 * hidden + (
        sizes.num_layers * step.tokens * width * hidden if step.checkpointing else sizes.num_layers * saved
    )
    casts = 2 * trained if step.base != "float32" else 0  # autocast keeps the factors in bfloat16 too
    passing = (saved if step.checkpointing else 0) + working + 2 * step.tokens * width * hidden
    passing += _dequantised(sizes, step.base)
    return TrainingMemory(
        weights=_share(weight_bytes(sizes, step.base), shards),
        gathered=layer * (2 if careful else 1) + outside if shards > 1 else 0,
        adapters=_share(TRAINED_BYTES * trained + 4 * frozen, shards),
        kept=kept + _share(casts, shards),
        passing=max(_loss(sizes, step, whole_logits), passing),
        expert_weights=_expert_weights(sizes, step, careful),
    )


def loading_bytes(sizes: ModelSizes, dtype: Dtype, *, processes: int, sharded: bool) -> int:
    """Host memory of one node while loading: a copy for each process, or what passes where each reads its own part.

    Of a sharded model that is embeddings, head and a layer in each; FP8 that stays so is read whole by the first.
    """
    whole = weight_bytes(sizes, dtype)
    if not sharded or dtype == "fp8":
        return whole * (1 if sharded else processes)
    return processes * whole * gathered_parameters(sizes) // sizes.total


def gathered_parameters(sizes: ModelSizes) -> int:
    """What is whole in each process of a sharded model where it is asked: embeddings, head, and the layer in turn."""
    return sizes.parameters["embeddings"] + sizes.parameters["head"] + sizes.layer_parameters


def checking_bytes(sizes: ModelSizes) -> int:
    """Least memory in which a merge can be checked: one layer in float32 with what passes, embeddings and head."""
    shared = sizes.parameters["embeddings"] + sizes.parameters["head"]
    return 4 * (shared + (1 + TRANSIENT_LAYERS) * sizes.layer_parameters)


@dataclass(frozen=True)
class InferenceMemory:
    """Peak bytes on one GPU (or of one CPU process) while nothing is trained."""

    weights: int
    gathered: int
    adapters: int
    cache: int
    passing: int

    @property
    def total(self) -> int:
        return self.weights + self.gathered + self.adapters + self.cache + self.passing


def scoring_memory(
    sizes: ModelSizes,
    base: Dtype,
    adapters: Sequence[Adapter],
    tokens: int,
    row_tokens: int,
    *,
    shards: int = 1,
    careful: bool = False,
) -> InferenceMemory:
    """Peak of a forward pass over `tokens` tokens whose losses are wanted, in rows of `row_tokens` with a mask.

    `careful` as in `training_memory`.
    """
    e, hidden = _width(base), sizes.hidden
    chunk = min(LOSS_POSITIONS, tokens) * sizes.vocabulary * 8
    mask = tokens * row_tokens * e
    passing = mask + max(tokens * _forward_activations(sizes, e), tokens * 3 * e * hidden + chunk)
    return _inference(sizes, base, adapters, 0, passing + _dequantised(sizes, base), shards, careful)


def answering_memory(
    sizes: ModelSizes,
    base: Dtype,
    adapters: Sequence[Adapter],
    rows: int,
    prompt_tokens: int,
    new_tokens: int,
    *,
    shards: int = 1,
    careful: bool = False,
) -> InferenceMemory:
    """Peak of answering `rows` prompts as one batch: keys and values of all tokens, a layer's twice while it grows."""
    e = _width(base)
    per_layer = rows * (prompt_tokens + new_tokens) * 2 * sizes.key * e
    prompts = rows * prompt_tokens * (_forward_activations(sizes, e) + e * prompt_tokens)
    passing = max(prompts, rows * sizes.vocabulary * 8) + _dequantised(sizes, base)
    return _inference(sizes, base, adapters, per_layer * (sizes.num_layers + 1), passing, shards, careful)


def _inference(
    sizes: ModelSizes,
    base: Dtype,
    adapters: Sequence[Adapter],
    cache: int,
    passing: int,
    shards: int,
    careful: bool,
) -> InferenceMemory:
    e = _width(base)
    factors = sum(sum(lora_parameters(sizes, one).values()) for one in adapters)
    layer = _share(weight_bytes(sizes, base) * sizes.layer_parameters, sizes.total) * (2 if careful else 1)
    return InferenceMemory(
        weights=_share(weight_bytes(sizes, base), shards),
        gathered=layer + _outside(sizes, base) if shards > 1 else 0,
        # each adapter, and the selected ones side by side
        adapters=2 * e * factors,
        cache=cache,
        passing=passing,
    )


def _forward_activations(sizes: ModelSizes, e: int) -> int:
    """Bytes for a token in the layer that takes most, where nothing is kept for a backward pass."""
    hidden, query, inner = sizes.hidden, sizes.query, sizes.intermediate
    attention = e * (3 * query + 2 * sizes.key) + 4 * 2 * (query if sizes.has_qk_norm else 0)
    # gate, up and what an adapter adds; of experts in and out, the weighted output and its sum in float32
    mlp = e * 3 * inner
    if sizes.experts:
        mlp = sizes.experts_per_token * max(2 * e * hidden + 8 * hidden + e * inner, e * (hidden + 3 * inner))
    return 4 * e * hidden + max(attention, mlp)


def _dequantised(sizes: ModelSizes, base: Dtype) -> int:
    """A matrix that is de-quantised whole for its product."""
    if base not in ("nf4", "int8"):
        return 0
    return max(2 * m.out_features * m.in_features for m in sizes.matrices if not m.is_experts)


def _outside(sizes: ModelSizes, base: Dtype) -> int:
    """Embeddings and head, which are gathered with the loss and stay until it is done."""
    return (sizes.parameters["embeddings"] + sizes.parameters["head"]) * _width(base)


def _width(base: Dtype) -> int:
    """Bytes of one activation."""
    return 4 if base == "float32" else 2


def _layer_activations(sizes: ModelSizes, step: TrainingStep) -> tuple[int, int]:
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
        chosen = sizes.experts_per_token
        # gate and up, silu(gate), the output before its weight; indices; the router's scores
        per_token += chosen * (e * (3 * inner + hidden) + 40) + 4 * sizes.experts
        if step.adapter.experts:
            per_token += chosen * e * (hidden + inner)  # the inputs of both products
        # the weighted outputs are float32: their gradient, and that times weight and times output
        working = chosen * max(12 * hidden, e * (hidden + 3 * inner))
    else:
        per_token += e * (3 + ("down_proj" in touched)) * inner
        working = 3 * e * inner
    mask = step.tokens * step.row_tokens * e if step.packed else 0
    return step.tokens * per_token + mask, step.tokens * max(working, 3 * e * query)


def _loss(sizes: ModelSizes, step: TrainingStep, whole_logits: bool) -> int:
    """Logits, their float32 copy and log-probabilities, and those of the chunk before; the hidden states' gradient."""
    narrow = step.base != "float32"
    hidden = 2 * step.tokens * step.activation_bytes * sizes.hidden
    if whole_logits:
        return step.tokens * sizes.vocabulary * (10 if narrow else 8) + hidden
    chunk = 10 if narrow else 8
    if step.tokens > LOSS_POSITIONS:
        chunk += 4
    return min(LOSS_POSITIONS, step.tokens) * sizes.vocabulary * chunk + hidden


def _expert_weights(sizes: ModelSizes, step: TrainingStep, careful: bool) -> int:
    """Experts with their update and the gradient of that, which PEFT makes for all experts of a layer at once.

    Of one adapter's gradient, that of the larger matrices and the updated smaller ones are not there at the same time.
    """
    if not sizes.experts:
        return 0
    layer = _share(sizes.parameters["experts"] * step.activation_bytes, sizes.num_layers)
    updated = [a for a in (step.adapter, step.below) if a and a.experts]
    if not updated:
        return 0
    kept = 1 if step.checkpointing else sizes.num_layers
    gradient = 1.0 if careful else ONE_EXPERT_ADAPTER - 1
    second = TWO_EXPERT_ADAPTERS - (0 if careful else ONE_EXPERT_ADAPTER) if len(updated) > 1 else 0
    return int(layer * (kept + gradient + second))


def _quantised_bytes(matrix: Matrix, dtype: Dtype) -> int:
    if dtype == "nf4":
        return matrix.parameters // 2 + 4 * math.ceil(matrix.parameters / NF4_BLOCK)
    return matrix.parameters + 4 * matrix.out_features * matrix.copies


def _share(amount: int, parts: int) -> int:
    return math.ceil(amount / parts)
