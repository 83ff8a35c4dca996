"""Where two adapters collide, from their factors alone; an explanation, which neither search nor verdict uses.

Per module: how large each update is beside the other, the angle between them, how far their input and output subspaces
overlap, and how much of the smaller update meets the opposite sign in the larger one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from utils.adapters.factors import Factors, ModuleFactors, delta, inner, norm

# entries are compared on this many experts of a fused parameter: all of them would be the dense updates of a layer
SAMPLED_EXPERTS = 4


@dataclass(frozen=True)
class Collision:
    """Two updates D and T of one module."""

    norm_ratio: float
    """||D|| / ||T|| (Frobenius)."""
    cosine: float
    """<D, T> / (||D|| ||T||)."""
    input_overlap: float
    """Share of the smaller input subspace that lies in the other: mean squared cosine of the principal angles."""
    output_overlap: float
    """The same for the output subspaces."""
    sign_conflict: float
    """Share of the smaller update's mass, entry by entry, that meets the opposite sign."""


def collisions(first: Factors, second: Factors) -> dict[str, Collision]:
    """Every module that both adapters change."""
    return {name: _collision(first[name], second[name]) for name in first if name in second}


def _collision(d: ModuleFactors, t: ModuleFactors) -> Collision:
    size_d, size_t = norm(d), norm(t)
    dot = inner(d, t)
    return Collision(
        norm_ratio=size_d / size_t if size_t else float("inf"),
        cosine=dot / (size_d * size_t) if size_d and size_t else 0.0,
        input_overlap=_overlap(d.a_rI.mT, t.a_rI.mT),
        output_overlap=_overlap(d.b_Or, t.b_Or),
        sign_conflict=_sign_conflict(d, t),
    )


def _overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """||Q_1^T Q_2||_F^2 / min(r_1, r_2), averaged over experts; 0 orthogonal, 1 contained."""
    q_1, q_2 = torch.linalg.qr(first.float())[0], torch.linalg.qr(second.float())[0]
    shared = (q_1.mT @ q_2).square().sum((-2, -1)) / min(q_1.shape[-1], q_2.shape[-1])
    return float(shared.mean())


def _sign_conflict(d: ModuleFactors, t: ModuleFactors) -> float:
    if d.is_experts:
        d, t = (ModuleFactors(f.a_rI[:SAMPLED_EXPERTS], f.b_Or[:SAMPLED_EXPERTS], f.scale) for f in (d, t))
    update_d, update_t = delta(d), delta(t)
    smaller = torch.minimum(update_d.abs(), update_t.abs())
    total = float(smaller.sum())
    return float(smaller[update_d * update_t < 0].sum()) / total if total else 0.0
