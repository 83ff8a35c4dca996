"""One adapter as factors: module name -> (A, B, scale), so that its delta is scale * B @ A.

Shapes: r rank, I in_features, O out_features.  A_rI, B_Or.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModuleFactors:
    """The low-rank update of one linear module."""

    a_rI: torch.Tensor
    b_Or: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a_rI.shape[0])


Factors = Mapping[str, ModuleFactors]


def delta(factors: ModuleFactors) -> torch.Tensor:
    """The dense update (O, I) in float32."""
    return factors.scale * (factors.b_Or.float() @ factors.a_rI.float())


def zero_modules(factors: Factors) -> list[str]:
    """Modules whose update is exactly zero: an adapter made of these was never trained or not loaded."""
    return [name for name, f in factors.items() if not f.b_Or.any() or not f.a_rI.any()]
