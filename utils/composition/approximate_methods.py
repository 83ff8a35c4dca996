"""Approximate methods, kept for comparison: TIES and DARE on true deltas, and the sum of factors.

PEFT applies TIES and DARE to A and B apart, which is another thing (measured relative error 0.97 and above); here they
act on the dense updates they were published for, and the result is written as factors again by a truncated SVD.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from utils.adapters.factors import ModuleFactors, delta


def ties(parts: Sequence[ModuleFactors], density: float) -> torch.Tensor:
    """Keep the largest `density` of each update, elect each entry's sign by mass, average those that agree."""
    kept = torch.stack([_largest(delta(part), density) for part in parts])
    elected = kept.sum(0).sign()
    agreeing = kept * (kept.sign() == elected)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


def dare(parts: Sequence[ModuleFactors], density: float, seed: str) -> torch.Tensor:
    """Keep each entry with probability `density`, rescaled by 1 / density; then the sum. The same for the same seed."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    total = torch.zeros(parts[0].shape)
    for part in parts:
        total += delta(part).cpu() * (torch.rand(part.shape, generator=generator) < density) / density
    return total


def sum_of_factors(parts: Sequence[ModuleFactors]) -> ModuleFactors:
    """(sum b_i B_i)(sum a_i A_i) with a_i b_i = scale_i: cross terms B_i A_j come with it, so it is not the sum.

    It changes when an adapter is rewritten as the identical (B Q, Q^T A). Raises ValueError for unequal ranks.
    """
    ranks = sorted({part.rank for part in parts})
    if len(ranks) > 1:
        raise ValueError(f"factors of unequal ranks {ranks} cannot be summed; use the method sum")
    roots = [abs(part.scale) ** 0.5 for part in parts]
    signs = [root if part.scale > 0 else -root for root, part in zip(roots, parts, strict=True)]
    a_rI = sum(sign * part.a_rI.float() for sign, part in zip(signs, parts, strict=True))  # on A, as in PEFT
    b_Or = sum(root * part.b_Or.float() for root, part in zip(roots, parts, strict=True))
    return ModuleFactors(a_rI, b_Or, 1.0)


def low_rank(update: torch.Tensor, rank: int) -> ModuleFactors:
    """The closest update of at most `rank` to a dense one (O, I) or (E, O, I)."""
    u, s, v = torch.linalg.svd(update.float(), full_matrices=False)
    root_r = s[..., :rank].sqrt()
    a_rI, b_Or = root_r.unsqueeze(-1) * v[..., :rank, :], u[..., :rank] * root_r.unsqueeze(-2)
    return ModuleFactors(a_rI.contiguous(), b_Or.contiguous(), 1.0)


def _largest(update: torch.Tensor, density: float) -> torch.Tensor:
    """The update with all but its largest entries (share `density`, over the whole module) set to 0."""
    keep = max(1, round(density * update.numel()))
    threshold = update.abs().flatten().kthvalue(update.numel() - keep + 1).values
    return update * (update.abs() >= threshold)
