"""On which hardware a model would fit: nodes, GPUs and cards in order of their memory."""

from __future__ import annotations

from config import Config
from utils.models.model_shapes import ModelSizes
from utils.planning import fitting_settings
from utils.planning.fitting_settings import Way
from utils.planning.hardware import CARDS


def smallest(config: Config, sizes: ModelSizes, count: int = 3) -> list[tuple[str, Way]]:
    """Other hardware on which there is a way, the least memory in total first, with its flags."""
    plan, larger_ways = config.plan, []
    here = plan.nodes * plan.gpus * plan.gpu_memory_gib
    shapes = [(nodes, gpus) for nodes, gpus in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8))]
    options = sorted(
        ((nodes * gpus * card.memory_gib, nodes, gpus, card) for nodes, gpus in shapes for card in CARDS),
        key=lambda option: option[:3],
    )
    for total, nodes, gpus, card in options:
        if total <= here:
            continue
        other = {"nodes": nodes, "gpus": gpus, "gpu_memory_gib": card.memory_gib, "gpu_tflops": 0}
        open_ones = {"gpu_bandwidth_gbs": 0, "node_bandwidth_gbs": 0}
        way = fitting_settings.find(
            fitting_settings.with_settings(config, {f"plan.{k}": v for k, v in (other | open_ones).items()}), sizes
        )
        if way.verdict != "no":
            flags = f"--plan.nodes {nodes} --plan.gpus {gpus} --plan.gpu_memory_gib {card.memory_gib:g}"
            larger_ways.append((f"{nodes * gpus} x {card.name} ({flags})", way))
        if len(larger_ways) == count:
            break
    return larger_ways
