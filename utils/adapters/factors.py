"""One adapter as factors: module or parameter name -> (A, B, scale), so that its delta is scale * B @ A.

Shapes: r rank, I in_features, O out_features: A_rI, B_Or. Fused experts (one 3-D parameter for all of them) have a
leading dimension E: A (E, r, I), B (E, O, r), one update per expert; every function here works on both.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModuleFactors:
    """The low-rank update of one linear module, or of one fused parameter expert by expert."""

    a_rI: torch.Tensor
    b_Or: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a_rI.shape[-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it updates: (O, I), or (E, O, I)."""
        return (*self.b_Or.shape[:-1], self.a_rI.shape[-1])

    @property
    def is_experts(self) -> bool:
        return self.a_rI.ndim == 3


Factors = Mapping[str, ModuleFactors]


def delta(factors: ModuleFactors) -> torch.Tensor:
    """The dense update (O, I), or (E, O, I), in float32."""
    return factors.scale * (factors.b_Or.float() @ factors.a_rI.float())


def scaled(factors: ModuleFactors, weight: float) -> ModuleFactors:
    """The same update times `weight`; the tensors are shared."""
    return ModuleFactors(factors.a_rI, factors.b_Or, weight * factors.scale)


def stacked(parts: Sequence[ModuleFactors]) -> ModuleFactors:
    """The sum of updates of one module as one update of rank sum(r_i) and scale 1, in float32: no cross terms.

    Raises ValueError when the parts update weights of different shapes.
    """
    shapes = {part.shape for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"the adapters were made for different shapes {sorted(shapes)}")
    a_rI = torch.cat([part.scale * part.a_rI.float() for part in parts], dim=-2)
    b_Or = torch.cat([part.b_Or.float() for part in parts], dim=-1)
    return ModuleFactors(a_rI.contiguous(), b_Or.contiguous(), 1.0)


def padded(factors: ModuleFactors, rank: int) -> ModuleFactors:
    """The same update with `rank` and scale 1: the scale goes into A, zero rows are added."""
    more = rank - factors.rank
    a_rI = torch.nn.functional.pad(factors.scale * factors.a_rI.float(), (0, 0, 0, more))
    return ModuleFactors(a_rI, torch.nn.functional.pad(factors.b_Or.float(), (0, more)), 1.0)


def of_one_rank(factors: Factors) -> Factors:
    """The same updates, all of the largest rank and of one scale; as they are where that is so already.

    llama.cpp's converter keeps one alpha and divides it by each tensor's own rank, and vLLM compares its limit with the
    rank that the configuration names.
    """
    if len({(f.rank, f.scale) for f in factors.values()}) <= 1:
        return factors
    rank = max(f.rank for f in factors.values())
    return {name: padded(f, rank) for name, f in factors.items()}


def inner(first: ModuleFactors, second: ModuleFactors) -> float:
    """<D_1, D_2> without making the updates: sum of (B_1^T B_2) * (A_1 A_2^T), in float64."""
    products = (first.b_Or.double().mT @ second.b_Or.double()) * (first.a_rI.double() @ second.a_rI.double().mT)
    return first.scale * second.scale * float(products.sum())


def norm(factors: ModuleFactors) -> float:
    """Frobenius norm of the update."""
    return max(0.0, inner(factors, factors)) ** 0.5


def distance(factors: ModuleFactors | None, parts: Sequence[ModuleFactors]) -> float:
    """||D - sum of the parts||_F from inner products alone, so independent of how a sum is written as factors.

    Exact to 1e-8 of the sizes involved, far below float32 rounding.
    """
    terms = [*parts, *([] if factors is None else [scaled(factors, -1.0)])]
    squared = sum(inner(a, a) for a in terms) + 2 * sum(inner(a, b) for a, b in itertools.combinations(terms, 2))
    return max(0.0, squared) ** 0.5


def random_like(factors: Factors, seed: int) -> dict[str, ModuleFactors]:
    """Gaussian factors of the same shapes whose update has the same Frobenius norm in every module (and expert)."""
    generator = torch.Generator().manual_seed(seed)
    random_factors = {}
    for name, f in sorted(factors.items()):
        a_rI = torch.randn(f.a_rI.shape, generator=generator)
        b_Or = torch.randn(f.b_Or.shape, generator=generator)
        target_norms, drawn_norms = (
            [norm(ModuleFactors(a, b, m.scale)) for a, b in _updates(m)]
            for m in (f, ModuleFactors(a_rI, b_Or, f.scale))
        )
        ratio = torch.tensor([w / m for w, m in zip(target_norms, drawn_norms, strict=True)], dtype=b_Or.dtype)
        random_factors[name] = ModuleFactors(a_rI, b_Or * (ratio[:, None, None] if f.is_experts else ratio), f.scale)
    return random_factors


def zero_modules(factors: Factors) -> list[str]:
    """Modules whose update is exactly zero: an adapter made of these was never trained or not loaded."""
    return [name for name, f in factors.items() if not f.scale or not f.b_Or.any() or not f.a_rI.any()]


def _updates(f: ModuleFactors) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The factors of each update: one, or one for each expert."""
    return list(zip(f.a_rI, f.b_Or, strict=True)) if f.is_experts else [(f.a_rI, f.b_Or)]
