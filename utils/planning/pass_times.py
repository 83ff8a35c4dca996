"""How long a pass takes: arithmetic, what is read from memory, and what is sent between GPUs. Numbers in, numbers out.

The one model of time: training, scoring and answering are passes of it. A pass takes at least the longest of its parts
and at most all of them one after the other, as sending is hidden behind arithmetic or not; both are given, and which
part bounds it. Not counted: loading, checkpoints, waiting for the slowest rank, kernels slower than the assumed
share of the peak. So real times are longer.

Operations: 2 per parameter and token forward, 2 for the inputs' gradients, 2 to recompute; frozen weights need no
gradient of their own. Sharded weights (FSDP2) are gathered before they are used, once forward and once backward, and
each rank receives (n - 1) / n of them; gradients of the factors are reduced in every pass.

Where ranks share experts only the rest is gathered; what experts take in and give is sent instead, once there and once
back for each token and expert, forward, backward and to recompute. Experts' arithmetic and what is sent are those of
the busiest rank. Factors of experts stay where they are, and their gradients are added once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from utils.models.model_shapes import Dtype, ModelSizes
from utils.models.process_layout import ProcessLayout
from utils.planning.estimates import Adapter, TrainingStep, lora_parameters, weight_bytes
from utils.planning.hardware import Hardware
from utils.planning.memory.activations import expert_factors, width_of

GATHERS, EXCHANGE, GRADIENTS, ARITHMETIC, MEMORY = "gathers", "exchange", "gradients", "arithmetic", "memory"
# bits that are read, and bfloat16 that is written and read again, where weights are de-quantised for each product
_DEQUANTISED_BYTES = {"nf4": 0.5625 + 4, "int8": 1 + 4}


@dataclass(frozen=True)
class PassTime:
    """Seconds of one pass over `tokens` tokens on each rank: what one GPU does, and what is sent meanwhile."""

    tokens: int
    own: dict[str, float]
    sent: dict[str, float] = field(default_factory=dict)

    @property
    def least(self) -> float:
        """Everything that is sent is hidden behind what the GPU does, or the reverse."""
        return max(sum(self.own.values()), sum(self.sent.values()))

    @property
    def most(self) -> float:
        """Nothing is hidden."""
        return sum(self.own.values()) + sum(self.sent.values())

    @property
    def bound(self) -> str:
        """The part that takes the most time, or what is sent as a whole where that is more than what the GPU does."""
        parts = self.sent if sum(self.sent.values()) > sum(self.own.values()) else self.own
        return max(parts, key=lambda name: parts[name])

    def rates(self, processes: int) -> tuple[float, float]:
        """Tokens per second of all ranks together, at least and at most."""
        return processes * self.tokens / self.most, processes * self.tokens / self.least


def flops_per_token(sizes: ModelSizes, *, row_tokens: int = 0, checkpointing: bool) -> int:
    """Operations to train on one token; attention over `row_tokens` is added, half of it behind the diagonal."""
    return forward_flops(sizes, row_tokens) * (3 if checkpointing else 2)


def forward_flops(sizes: ModelSizes, row_tokens: int) -> int:
    """Operations of one token's forward pass."""
    return 2 * sizes.multiplied + 2 * row_tokens * sizes.query * sizes.num_layers


def expert_lora_flops(sizes: ModelSizes, adapter: Adapter, *, checkpointing: bool) -> int:
    """Operations of one forward and backward pass whatever its tokens: B A is made for every expert of every layer."""
    if not adapter.experts:
        return 0
    once = 2 * adapter.rank * sizes.parameters["experts"]
    return once * (4 if checkpointing else 3)  # forward, gradients of A and of B, and again to recompute


def training_pass(
    sizes: ModelSizes, step: TrainingStep, layout: ProcessLayout, hardware: Hardware, *, passes_per_step: int = 1
) -> PassTime:
    """One forward and backward pass of every rank. Whole models exchange gradients once a step."""
    passes, below = 3 if step.checkpointing else 2, [step.below] if step.below else []
    flops = flops_per_token(sizes, row_tokens=step.row_tokens, checkpointing=step.checkpointing) * step.tokens
    trained, frozen = _factors(sizes, [step.adapter]), _factors(sizes, below)
    of_experts = 0
    if layout.expert > 1:
        of_experts = expert_factors(sizes, step.adapter)
        busiest = step.tokens * hardware.imbalance(sizes, layout)
        flops += passes * step.tokens * _busiest_flops(sizes, layout, hardware)
        flops += busiest * shared_lora_flops(sizes, [step.adapter], passes=passes + 1)
        flops += busiest * shared_lora_flops(sizes, below, passes=passes)
        frozen -= sum(expert_factors(sizes, one) for one in below)
    else:
        flops += expert_lora_flops(sizes, step.adapter, checkpointing=step.checkpointing)
    gathered = trained - of_experts
    gradients = 4 * gathered * _received(layout.shard) / hardware.gather_rate(layout)
    between = 2 * 4 * (gathered / layout.shard) * _received(layout.replicate) / hardware.replica_rate(layout)
    gradients += between if layout.is_sharded else between / passes_per_step
    copies = layout.processes // layout.expert
    apart = 2 * 4 * (of_experts / layout.expert) * _received(copies) / hardware.copies_rate(layout)
    gradients += apart / passes_per_step
    return PassTime(
        step.tokens,
        _without_zeros(
            {ARITHMETIC: flops / hardware.flops, MEMORY: passes * _dequantising(sizes, step.base, hardware)}
        ),
        _without_zeros(
            {
                GATHERS: 2 * _gathering(sizes, step.base, 4 * (gathered + frozen), layout, hardware),
                EXCHANGE: passes * exchanging(sizes, step.base, step.tokens, layout, hardware),
                GRADIENTS: gradients,
            }
        ),
    )


def scoring_pass(
    sizes: ModelSizes, base: Dtype, tokens: int, row_tokens: int, layout: ProcessLayout, hardware: Hardware
) -> PassTime:
    """One forward pass of every rank; frozen adapters are whole everywhere and not gathered."""
    flops = forward_flops(sizes, row_tokens) + _busiest_flops(sizes, layout, hardware)
    return PassTime(
        tokens,
        _without_zeros(
            {ARITHMETIC: tokens * flops / hardware.flops, MEMORY: _dequantising(sizes, base, hardware)},
        ),
        _without_zeros(
            {
                GATHERS: _gathering(sizes, base, 0, layout, hardware),
                EXCHANGE: exchanging(sizes, base, tokens, layout, hardware),
            }
        ),
    )


def decoding_step(
    sizes: ModelSizes, base: Dtype, rows: int, context: int, layout: ProcessLayout, hardware: Hardware
) -> PassTime:
    """One new token for each of `rows` rows of every rank, after `context` tokens of each.

    The weights that the rows visit are read once, keys and values of every row too; sharded weights are gathered whole.
    Of shared experts each rank reads those of its own that the rows of all of them visit.
    """
    read = visited_bytes(sizes, base, rows, layout.expert) + rows * context * cache_bytes_per_token(sizes, base)
    return PassTime(
        rows,
        _without_zeros(
            {
                ARITHMETIC: rows * forward_flops(sizes, context) / hardware.flops,
                MEMORY: read / hardware.memory_rate + _dequantising(sizes, base, hardware),
            }
        ),
        _without_zeros(
            {
                GATHERS: _gathering(sizes, base, 0, layout, hardware),
                EXCHANGE: exchanging(sizes, base, rows, layout, hardware),
            }
        ),
    )


def visited_bytes(sizes: ModelSizes, base: Dtype, rows: int, expert_ranks: int = 1) -> float:
    """Bytes of the weights that one token of each row is multiplied with; of experts, those expected to be chosen.

    With `expert_ranks` they are chosen by so many times the rows, and each rank has its part of them.
    """
    whole = weight_bytes(sizes, base)
    if not sizes.experts:
        return whole
    experts = whole * sizes.parameters["experts"] / sizes.total
    chosen = 1 - (1 - sizes.experts_per_token / sizes.experts) ** (rows * expert_ranks)
    return whole - experts * (1 - chosen / expert_ranks)


def exchanging(sizes: ModelSizes, base: Dtype, tokens: int, layout: ProcessLayout, hardware: Hardware) -> float:
    """Seconds in which the busiest rank is sent its experts' inputs in one pass, and sends back what they give."""
    rows = tokens * sizes.experts_per_token * sizes.expert_layers * hardware.imbalance(sizes, layout)
    return 2 * rows * sizes.hidden * width_of(base) * _received(layout.expert) / hardware.exchange_rate(layout)


def shared_lora_flops(sizes: ModelSizes, adapters: Sequence[Adapter], *, passes: int) -> float:
    """Operations for a token of its experts' factors, in two products of their own; 2 for each of `passes`."""
    chosen = sizes.experts_per_token / max(1, sizes.experts)
    return 2 * passes * chosen * sum(expert_factors(sizes, one) for one in adapters)


def _busiest_flops(sizes: ModelSizes, layout: ProcessLayout, hardware: Hardware) -> float:
    """Operations of a forward pass that the busiest rank has more for each of its own tokens."""
    visited = sizes.parameters["experts"] * sizes.experts_per_token / max(1, sizes.experts)
    return 2 * visited * (hardware.imbalance(sizes, layout) - 1) if layout.expert > 1 else 0


def cache_bytes_per_token(sizes: ModelSizes, base: Dtype) -> int:
    """Keys and values of one token in every layer."""
    return 2 * sizes.num_layers * sizes.key * (4 if base == "float32" else 2)


def _gathering(sizes: ModelSizes, base: Dtype, factors: int, layout: ProcessLayout, hardware: Hardware) -> float:
    """Seconds in which every rank receives the parts of all weights and `factors` bytes that it does not hold.

    Of experts that ranks share, those of its group's part that others of its shard hold.
    """
    experts = sizes.parameters["experts"] * width_of(base) if layout.expert > 1 else 0
    rest = weight_bytes(sizes, base) + factors - experts
    own = experts / layout.expert * _received(layout.shard // layout.expert)
    return (rest * _received(layout.shard) + own) / hardware.gather_rate(layout)


def _received(parts: int) -> float:
    return (parts - 1) / parts


def _factors(sizes: ModelSizes, adapters: Sequence[Adapter]) -> int:
    return sum(sum(lora_parameters(sizes, one).values()) for one in adapters)


def _dequantising(sizes: ModelSizes, base: Dtype, hardware: Hardware) -> float:
    quantised = sum(matrix.parameters for matrix in sizes.matrices if not matrix.is_experts)
    return quantised * _DEQUANTISED_BYTES.get(base, 0.0) / hardware.memory_rate


def _without_zeros(parts: dict[str, float]) -> dict[str, float]:
    return {name: seconds for name, seconds in parts.items() if seconds}
