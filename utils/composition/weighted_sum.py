"""The exact composition: W + sum_i a_i s_i B_i A_i as one LoRA whose rank is the sum of the ranks.

B = [B_1, B_2, ...] side by side and A = [a_1 s_1 A_1; a_2 s_2 A_2; ...] stacked give B A = sum_i a_i s_i B_i A_i with
no cross terms, for any ranks, alphas and target modules. (PEFT calls it `cat`; its other types are not this sum, see
decision_document.md.) The scale of the result is 1, so it is served by anything that takes one LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from utils.composition.factors import Factors, ModuleFactors, delta


def weighted_sum(adapters: Sequence[Factors], weights: Sequence[float]) -> dict[str, ModuleFactors]:
    """The weighted sum of adapters as one adapter, in float32.

    A weight of 0 is absence: that adapter adds no rank. Raises ValueError when the counts differ, when a module has
    different shapes in two adapters, or when nothing is left.
    """
    if len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters but {len(weights)} weights")
    present = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if weight != 0.0]
    if not present:
        raise ValueError("every weight is 0: that is the base model, not a composition")
    composed: dict[str, ModuleFactors] = {}
    for name in dict.fromkeys(name for adapter, _ in present for name in adapter):
        parts = [(adapter[name], weight) for adapter, weight in present if name in adapter]
        shapes = {(part.b_Or.shape[0], part.a_rI.shape[1]) for part, _ in parts}
        if len(shapes) > 1:
            raise ValueError(f"{name}: the adapters were made for different shapes {sorted(shapes)}")
        a_rI = torch.cat([weight * part.scale * part.a_rI.float() for part, weight in parts])
        b_Or = torch.cat([part.b_Or.float() for part, _ in parts], dim=1)
        composed[name] = ModuleFactors(a_rI.contiguous(), b_Or.contiguous(), 1.0)
    return composed


def relative_error(composed: Factors, adapters: Sequence[Factors], weights: Sequence[float]) -> float:
    """Largest over modules of ||D_composed - sum a_i D_i||_F / ||sum a_i D_i||_F, from the dense deltas."""
    worst = 0.0
    for name in {name for adapter in adapters for name in adapter}:
        true = sum(w * delta(adapter[name]) for adapter, w in zip(adapters, weights, strict=True) if name in adapter)
        found = delta(composed[name]) if name in composed else torch.zeros_like(true)
        scale = float(torch.linalg.norm(true)) or 1.0
        worst = max(worst, float(torch.linalg.norm(found - true)) / scale)
    return worst
