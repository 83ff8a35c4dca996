"""LoRA factors in, LoRA factors out: pure functions on tensors that know no disk, no PEFT and no model.

factors     one adapter; its updates, their norms, their exact sum
methods     the registry: what each method does, its paper, whether it is exact; `compose`
truncation  the best update of a given rank      dense   TIES, DARE, the sum of factors
checks      what a composition must pass         search  choosing weights on dev      interference  who collides where
"""

from utils.composition.checks import EXACT, FactorCheck, check
from utils.composition.factors import (
    Factors,
    ModuleFactors,
    delta,
    distance,
    inner,
    norm,
    random_like,
    scaled,
    stacked,
    zero_modules,
)
from utils.composition.methods import METHODS, Recipe, compose, depth, layer_of, relative_errors, weights_at

__all__ = [
    "EXACT",
    "METHODS",
    "FactorCheck",
    "Factors",
    "ModuleFactors",
    "Recipe",
    "check",
    "compose",
    "delta",
    "depth",
    "distance",
    "inner",
    "layer_of",
    "norm",
    "random_like",
    "relative_errors",
    "scaled",
    "stacked",
    "weights_at",
    "zero_modules",
]
