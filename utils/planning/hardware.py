"""The GPUs that a plan is made for: what the settings say, and the common card of that memory for what they leave open.

Peaks and bandwidths are the makers' data sheets: dense bfloat16 (for GeForce cards with float32 accumulation), memory,
and the link between GPUs in one direction, of which NCCL's gathers reach about eight ninths over NVLink and less over
PCI Express; GPUs of a node then receive `node_rate`. Between nodes a ring of NCCL's sends every byte through each node
once, over all adapters of the node together (nccl-tests, PERFORMANCE.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from config import AUTO, PlanSection
from utils.models.model_shapes import GIB, Dtype, ModelSizes
from utils.models.process_layout import ProcessLayout
from utils.planning import expert_imbalance


@dataclass(frozen=True)
class Card:
    """A GPU that can be bought or rented: TFLOP/s, GB/s of its memory and of its link, compute capability."""

    name: str
    memory_gib: float
    tflops: float
    memory_gbs: float
    link_gbs: float
    capability: tuple[int, int]


# by memory; of one size the one that is met most
CARDS = (
    Card("RTX 3060", 12, 25, 360, 12, (8, 6)),
    Card("RTX 4080", 16, 97, 717, 20, (8, 9)),
    Card("RTX 4090", 24, 165, 1008, 20, (8, 9)),
    Card("RTX 5090", 32, 209, 1792, 40, (12, 0)),
    Card("A100 40 GB", 40, 312, 1555, 267, (8, 0)),
    Card("L40S", 48, 362, 864, 20, (8, 9)),
    Card("H100", 80, 989, 3350, 400, (9, 0)),
    Card("RTX PRO 6000", 96, 504, 1792, 40, (12, 0)),
    Card("H200", 141, 989, 4800, 400, (9, 0)),
    Card("B200", 180, 2250, 7700, 800, (10, 0)),
)


@dataclass(frozen=True)
class Hardware:
    """Nodes of equal GPUs. `memory_bytes` of a GPU are for tensors; rates are bytes per second, `flops` is reached."""

    card: str
    gpus: int
    nodes: int
    memory_bytes: float
    host_bytes: float
    flops: float
    memory_rate: float
    node_rate: float
    network_rate: float
    disk_rate: float
    capability: tuple[int, int]
    expert_imbalance: float = 0.0
    expert_parallel: str = AUTO

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    @property
    def layouts(self) -> tuple[ProcessLayout, ...]:
        """The model on every GPU; cut over a node, with a copy in each; cut over all."""
        n, g = self.processes, self.gpus
        return tuple(
            dict.fromkeys((ProcessLayout(n, 1), ProcessLayout(self.nodes, g), ProcessLayout(1, n))),
        )

    def layouts_of(self, sizes: ModelSizes, form: Dtype) -> tuple[ProcessLayout, ...]:
        """Those for weights of this form, then those in which GPUs share experts: of a node, or as many as asked."""
        # accelerate leaves bytes out of sharding
        layouts = [one for one in self.layouts if not (one.is_sharded and form in ("nf4", "int8"))]
        setting = self.expert_parallel
        count = {AUTO: self.gpus, "off": 1}[setting] if setting in (AUTO, "off") else int(setting)
        if sizes.expert_plan and sizes.experts % count == 0 and form != "fp8" and count > 1:
            layouts += [replace(one, expert=count) for one in layouts if one.is_sharded and one.shard % count == 0]
        return tuple(layouts)

    def imbalance(self, sizes: ModelSizes, layout: ProcessLayout) -> float:
        """Rows of the busiest of the ranks that share experts, over the mean: as set, or as expected."""
        return self.expert_imbalance or expert_imbalance.expected(sizes.experts, layout.expert)

    def exchange_rate(self, layout: ProcessLayout) -> float:
        """Bytes that a rank receives per second while tokens go to the ranks that have their experts."""
        return self.node_rate if layout.expert <= self.gpus else min(self.node_rate, self.network_rate)

    def copies_rate(self, layout: ProcessLayout) -> float:
        """Bytes per second between ranks that hold the same experts."""
        return self.network_rate if layout.expert >= self.gpus else self.node_rate

    def gather_rate(self, layout: ProcessLayout) -> float:
        """Bytes that a rank receives per second while the shards of a layer are put together."""
        if layout.shard <= self.gpus:
            return self.node_rate
        return min(self.node_rate, self.gpus * self.network_rate)

    def replica_rate(self, layout: ProcessLayout) -> float:
        """Bytes per second between ranks that hold the same part."""
        return self.network_rate if self.nodes > 1 and layout.shard >= self.gpus else self._between_all()

    def _between_all(self) -> float:
        return self.node_rate if self.nodes == 1 else min(self.node_rate, self.gpus * self.network_rate)


def card_of(plan: PlanSection) -> Card:
    """The common card whose memory is nearest, as a ratio."""
    return min(CARDS, key=lambda card: abs(math.log(card.memory_gib / plan.gpu_memory_gib)))


def of(plan: PlanSection, expert_parallel: str = AUTO) -> Hardware:
    """What the settings say, with the common card's figures for what they leave at 0.

    `expert_parallel` as in `run.expert_parallel`.
    """
    card = card_of(plan)
    return Hardware(
        card=card.name,
        gpus=plan.gpus,
        nodes=plan.nodes,
        memory_bytes=(plan.gpu_memory_gib - plan.headroom_gib) * GIB,
        host_bytes=plan.host_memory_gib * GIB,
        flops=(plan.gpu_tflops or card.tflops) * 1e12 * plan.utilisation,
        memory_rate=(plan.gpu_bandwidth_gbs or card.memory_gbs) * 1e9,
        node_rate=(plan.node_bandwidth_gbs or card.link_gbs) * 1e9,
        network_rate=plan.network_bandwidth_gbs * 1e9,
        disk_rate=plan.disk_bandwidth_gbs * 1e9,
        capability=card.capability,
        expert_imbalance=plan.expert_imbalance,
        expert_parallel=expert_parallel,
    )


def peak_tflops(plan: PlanSection) -> float:
    """The peak that utilisation is a share of."""
    return float(plan.gpu_tflops or card_of(plan).tflops)
