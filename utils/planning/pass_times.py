"""How long a pass takes: arithmetic, what is read from memory, and what is sent between GPUs. Numbers in, numbers out.

The one model of time: training, scoring and answering are passes of it. A pass takes at least the longest of its parts
and at most all of them one after the other, as sending is hidden behind arithmetic or not; both are given, and which
part bounds it. Not counted: loading, checkpoints, waiting for the slowest process, kernels slower than the assumed
share of the peak. So real times are longer.

Operations: 2 per parameter and token forward, 2 for the inputs' gradients, 2 to recompute; frozen weights need no
gradient of their own. Sharded weights (FSDP2) are gathered before they are used, once forward and once backward, and
each process receives (n - 1) / n of them; gradients of the factors are reduced in every pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from utils.models.model_shapes import Dtype, ModelSizes
from utils.models.process_layout import ProcessLayout
from utils.planning.estimates import Adapter, TrainingStep, lora_parameters, weight_bytes
from utils.planning.hardware import Hardware

GATHERS, GRADIENTS, ARITHMETIC, MEMORY = "gathers", "gradients", "arithmetic", "memory"
# bits that are read, and bfloat16 that is written and read again, where weights are de-quantised for each product
_DEQUANTISED_BYTES = {"nf4": 0.5625 + 4, "int8": 1 + 4}


@dataclass(frozen=True)
class PassTime:
    """Seconds of one pass over `tokens` tokens on each process: what one GPU does, and what is sent meanwhile."""

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
        """Tokens per second of all processes together, at least and at most."""
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
    """One forward and backward pass of every process. Whole models exchange gradients once a step."""
    flops = flops_per_token(sizes, row_tokens=step.row_tokens, checkpointing=step.checkpointing) * step.tokens
    flops += expert_lora_flops(sizes, step.adapter, checkpointing=step.checkpointing)
    trained = _factors(sizes, [step.adapter])
    frozen = _factors(sizes, [step.below] if step.below else [])
    gradients = 4 * trained * _received(layout.shard) / hardware.gather_rate(layout)
    between = 2 * 4 * (trained / layout.shard) * _received(layout.replicate) / hardware.replica_rate(layout)
    gradients += between if layout.is_sharded else between / passes_per_step
    passes = 3 if step.checkpointing else 2
    return PassTime(
        step.tokens,
        _without_zeros(
            {ARITHMETIC: flops / hardware.flops, MEMORY: passes * _dequantising(sizes, step.base, hardware)}
        ),
        _without_zeros(
            {
                # expert parallelism: the experts leave what is gathered, and their tokens become a part of their own
                GATHERS: 2 * _gathering(sizes, step.base, 4 * (trained + frozen), layout, hardware),
                GRADIENTS: gradients,
            }
        ),
    )


def scoring_pass(
    sizes: ModelSizes, base: Dtype, tokens: int, row_tokens: int, layout: ProcessLayout, hardware: Hardware
) -> PassTime:
    """One forward pass of every process; frozen adapters are whole everywhere and not gathered."""
    return PassTime(
        tokens,
        _without_zeros(
            {
                ARITHMETIC: tokens * forward_flops(sizes, row_tokens) / hardware.flops,
                MEMORY: _dequantising(sizes, base, hardware),
            }
        ),
        _without_zeros({GATHERS: _gathering(sizes, base, 0, layout, hardware)}),
    )


def decoding_step(
    sizes: ModelSizes, base: Dtype, rows: int, context: int, layout: ProcessLayout, hardware: Hardware
) -> PassTime:
    """One new token for each of `rows` rows of every process, after `context` tokens of each.

    The weights that the rows visit are read once, keys and values of every row too; sharded weights are gathered whole.
    """
    read = visited_bytes(sizes, base, rows) + rows * context * cache_bytes_per_token(sizes, base)
    return PassTime(
        rows,
        _without_zeros(
            {
                ARITHMETIC: rows * forward_flops(sizes, context) / hardware.flops,
                MEMORY: read / hardware.memory_rate + _dequantising(sizes, base, hardware),
            }
        ),
        _without_zeros({GATHERS: _gathering(sizes, base, 0, layout, hardware)}),
    )


def visited_bytes(sizes: ModelSizes, base: Dtype, rows: int) -> float:
    """Bytes of the weights that one token of each row is multiplied with; of experts, those expected to be chosen."""
    whole = weight_bytes(sizes, base)
    if not sizes.experts:
        return whole
    experts = whole * sizes.parameters["experts"] / sizes.total
    chosen = 1 - (1 - sizes.experts_per_token / sizes.experts) ** rows
    return whole - experts * (1 - chosen)


def cache_bytes_per_token(sizes: ModelSizes, base: Dtype) -> int:
    """Keys and values of one token in every layer."""
    return 2 * sizes.num_layers * sizes.key * (4 if base == "float32" else 2)


def _gathering(sizes: ModelSizes, base: Dtype, factors: int, layout: ProcessLayout, hardware: Hardware) -> float:
    """Seconds in which every process receives the parts of all weights and `factors` bytes that it does not hold."""
    return (weight_bytes(sizes, base) + factors) * _received(layout.shard) / hardware.gather_rate(layout)


def _received(parts: int) -> float:
    return (parts - 1) / parts


def _factors(sizes: ModelSizes, adapters: Sequence[Adapter]) -> int:
    return sum(sum(lora_parameters(sizes, one).values()) for one in adapters)


def _dequantising(sizes: ModelSizes, base: Dtype, hardware: Hardware) -> float:
    quantised = sum(matrix.parameters for matrix in sizes.matrices if not matrix.is_experts)
    return quantised * _DEQUANTISED_BYTES.get(base, 0.0) / hardware.memory_rate


def _without_zeros(parts: dict[str, float]) -> dict[str, float]:
    return {name: seconds for name, seconds in parts.items() if seconds}
