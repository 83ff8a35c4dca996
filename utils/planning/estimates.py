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

from utils.models.model_shapes import FP8_BLOCK, NF4_BLOCK, TRANSIENT_LAYERS, Dtype, Matrix, ModelSizes
from utils.planning import expert_imbalance
from utils.planning.memory.activations import (
    Adapter,
    TrainingStep,
    expert_factors,
    forward_activations,
    layer_activations,
    lora_parameters,
    share,
    width_of,
)

# positions whose logits exist at a time (utils/models/losses.py)
LOSS_POSITIONS = 128
# float32: value, gradient and AdamW's two moments
TRAINED_BYTES = 16
# a second adapter on the experts: its measured transient, and that of one alone, in a layer's experts (PEFT 0.21)
TWO_EXPERT_ADAPTERS, ONE_EXPERT_ADAPTER = 3.67, 1.41


@dataclass(frozen=True)
class TrainingMemory:
    """Peak bytes on one GPU, or of one CPU process. `activations` are saved for the backward pass."""

    weights: int
    gathered: int
    adapters: int
    activations: int
    workspace: int
    expert_weights: int

    @property
    def total(self) -> int:
        return self.weights + self.gathered + self.adapters + self.activations + self.workspace + self.expert_weights


Fit = Literal["fits", "tight", "no"]
# a prediction is not a measurement: with less than this share of the memory to spare it is only called tight
COMFORT = 0.1


def verdict(low: int, high: int, available: float) -> Fit:
    """Whether a peak between `low` and `high` bytes has room in `available` ones."""
    if high <= (1 - COMFORT) * available:
        return "fits"
    return "tight" if low <= available else "no"


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
    sizes: ModelSizes,
    step: TrainingStep,
    *,
    shards: int = 1,
    expert_ranks: int = 1,
    imbalance: float = 1.0,
    careful: bool = False,
    whole_logits: bool = False,
) -> TrainingMemory:
    """Peak of one training step. `shards` ranks hold the weights and adapters together (FSDP2); 1: each holds all.

    `careful` counts what may overlap as overlapping: the next layer is gathered before its turn, and adapters on the
    experts find the transients of the ones before still there. `whole_logits` is for a loss that is not chunked.
    Of `expert_ranks` that share the experts it is the busiest, with `imbalance` times the mean of their rows in every
    layer, and more in the worst of them.
    """
    trained = sum(lora_parameters(sizes, step.adapter).values())
    frozen = sum(lora_parameters(sizes, step.below).values()) if step.below else 0
    layer = _gathered_layer(sizes, step.base, shards, expert_ranks)
    apart = [0, 0]  # factors of experts, trained and frozen, which are cut by expert and nothing else
    if expert_ranks > 1:
        apart = [expert_factors(sizes, one) for one in (step.adapter, step.below)]
    trained, frozen = trained - apart[0], frozen - apart[1]
    layer += share(4 * (trained + frozen), sizes.num_layers)
    outside = _outside(sizes, step.base)
    worst = expert_imbalance.worst(imbalance, expert_ranks, sizes.expert_layers)
    saved, _ = layer_activations(sizes, step, imbalance, is_shared=expert_ranks > 1)
    worst_saved, working = layer_activations(sizes, step, worst, is_shared=expert_ranks > 1)
    width, hidden = step.activation_bytes, sizes.hidden
    # the last norm keeps its input in float32
    kept = step.tokens * 4 * hidden + (
        sizes.num_layers * step.tokens * width * hidden if step.checkpointing else sizes.num_layers * saved
    )
    # autocast keeps the factors in bfloat16 too
    casts = share(2 * trained, shards) + share(2 * apart[0], expert_ranks) if step.base != "float32" else 0
    held = share(TRAINED_BYTES * trained + 4 * frozen, shards)
    workspace = (worst_saved if step.checkpointing else 0) + working + 2 * step.tokens * width * hidden
    workspace += _dequantised(sizes, step.base)
    return TrainingMemory(
        weights=share(weight_bytes(sizes, step.base), shards),
        gathered=layer * (2 if careful else 1) + outside if shards > 1 else 0,
        adapters=held + share(TRAINED_BYTES * apart[0] + 4 * apart[1], expert_ranks),
        activations=kept + casts,
        workspace=max(_loss(sizes, step, whole_logits), workspace),
        expert_weights=_expert_weights(sizes, step, careful) if expert_ranks == 1 else 0,
    )


def loading_bytes(sizes: ModelSizes, dtype: Dtype, *, processes: int, sharded: bool) -> int:
    """Host memory of one node while loading: a copy for each rank, or what is in transit where each reads its own part.

    Of a sharded model that is embeddings, head and a layer in each; FP8 that stays so is read whole by the first.
    """
    whole = weight_bytes(sizes, dtype)
    if not sharded or dtype == "fp8":
        return whole * (1 if sharded else processes)
    return processes * whole * gathered_parameters(sizes) // sizes.total


def gathered_parameters(sizes: ModelSizes) -> int:
    """What is full on each rank of a sharded model where it is asked: embeddings, head, and the layer in turn."""
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
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.gathered + self.adapters + self.cache + self.workspace


def scoring_memory(
    sizes: ModelSizes,
    base: Dtype,
    adapters: Sequence[Adapter],
    tokens: int,
    row_tokens: int,
    *,
    shards: int = 1,
    expert_ranks: int = 1,
    imbalance: float = 1.0,
    careful: bool = False,
) -> InferenceMemory:
    """Peak of a forward pass over `tokens` tokens whose losses are wanted, in rows of `row_tokens` with a mask.

    `careful` as in `training_memory`.
    """
    e, hidden = width_of(base), sizes.hidden
    chunk = min(LOSS_POSITIONS, tokens) * sizes.vocabulary * 8
    mask = tokens * row_tokens * e
    worst = expert_imbalance.worst(imbalance, expert_ranks, sizes.expert_layers)
    rows = forward_activations(sizes, e, worst, is_shared=expert_ranks > 1)
    workspace = mask + max(tokens * rows, tokens * 3 * e * hidden + chunk) + _dequantised(sizes, base)
    return _inference(sizes, base, adapters, 0, workspace, shards, expert_ranks, careful)


def answering_memory(
    sizes: ModelSizes,
    base: Dtype,
    adapters: Sequence[Adapter],
    rows: int,
    prompt_tokens: int,
    new_tokens: int,
    *,
    shards: int = 1,
    expert_ranks: int = 1,
    imbalance: float = 1.0,
    careful: bool = False,
) -> InferenceMemory:
    """Peak of answering `rows` prompts as one batch: keys and values of all tokens, a layer's twice while it grows."""
    e = width_of(base)
    per_layer = rows * (prompt_tokens + new_tokens) * 2 * sizes.key * e
    worst = expert_imbalance.worst(imbalance, expert_ranks, sizes.expert_layers)
    token = forward_activations(sizes, e, worst, is_shared=expert_ranks > 1) + e * prompt_tokens
    workspace = max(rows * prompt_tokens * token, rows * sizes.vocabulary * 8) + _dequantised(sizes, base)
    cache = per_layer * (sizes.num_layers + 1)
    return _inference(sizes, base, adapters, cache, workspace, shards, expert_ranks, careful)


def _inference(
    sizes: ModelSizes,
    base: Dtype,
    adapters: Sequence[Adapter],
    cache: int,
    workspace: int,
    shards: int,
    expert_ranks: int,
    careful: bool,
) -> InferenceMemory:
    e = width_of(base)
    factors = sum(sum(lora_parameters(sizes, one).values()) for one in adapters)
    if expert_ranks > 1:
        apart = sum(expert_factors(sizes, one) for one in adapters)
        factors += share(apart, expert_ranks) - apart
    layer = _gathered_layer(sizes, base, shards, expert_ranks) * (2 if careful else 1)
    return InferenceMemory(
        weights=share(weight_bytes(sizes, base), shards),
        gathered=layer + _outside(sizes, base) if shards > 1 else 0,
        # each adapter, and the selected ones side by side
        adapters=2 * e * factors,
        cache=cache,
        workspace=workspace,
    )


def _gathered_layer(sizes: ModelSizes, base: Dtype, shards: int, expert_ranks: int) -> int:
    """Bytes of a layer put together; of shared experts, those of one rank where its shard cuts them once more."""
    if expert_ranks == 1:
        return share(weight_bytes(sizes, base) * sizes.layer_parameters, sizes.total)
    experts = sizes.parameters["experts"] // max(1, sizes.expert_layers)
    own = share(experts, expert_ranks) if shards > expert_ranks else 0
    return (sizes.layer_parameters - experts + own) * width_of(base)


def _dequantised(sizes: ModelSizes, base: Dtype) -> int:
    """A matrix that is de-quantised whole for its product."""
    if base not in ("nf4", "int8"):
        return 0
    return max(2 * m.out_features * m.in_features for m in sizes.matrices if not m.is_experts)


def _outside(sizes: ModelSizes, base: Dtype) -> int:
    """Embeddings and head, which are gathered with the loss and stay until it is done."""
    return (sizes.parameters["embeddings"] + sizes.parameters["head"]) * width_of(base)


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
    layer = share(sizes.parameters["experts"] * step.activation_bytes, sizes.num_layers)
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
