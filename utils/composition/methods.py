"""How adapters are put together: one row per method, with its paper and whether it is exact.

A method says which weight each adapter has at a module, and how the weighted updates of one module become one update.
Exact methods give W + sum_i a_i D_i; the others are approximate and there for comparison. Adding a row edits nothing
else, and the invariants in the tests run over every row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from utils.adapters.factors import Factors, ModuleFactors, distance, norm, scaled, stacked
from utils.composition import approximate
from utils.composition.truncation import truncated
from utils.models.weights.tensor_names import layer_of


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a composition besides the adapters; see `ComposeSection` for the fields."""

    method: str = "sum"
    weights: tuple[float, ...] = ()
    rank: int = 0
    density: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Method:
    """One row of the registry. `numbers(depth)` weights are given per adapter; `at` reads off the one of a layer."""

    combine: Callable[[Sequence[ModuleFactors], Recipe, str], ModuleFactors]
    exact: bool
    source: str
    numbers: Callable[[int], int] = lambda depth: 1
    at: Callable[[Sequence[float], int, int], float] = lambda own, layer, depth: own[0]


def _sum(parts: Sequence[ModuleFactors], recipe: Recipe, module: str) -> ModuleFactors:
    return stacked(parts)


def _sum_truncated(parts: Sequence[ModuleFactors], recipe: Recipe, module: str) -> ModuleFactors:
    return truncated(stacked(parts), recipe.rank or sum(part.rank for part in parts))


def _ties(parts: Sequence[ModuleFactors], recipe: Recipe, module: str) -> ModuleFactors:
    return approximate.low_rank(
        approximate.ties(parts, recipe.density), recipe.rank or sum(part.rank for part in parts)
    )


def _dare(parts: Sequence[ModuleFactors], recipe: Recipe, module: str) -> ModuleFactors:
    made = approximate.dare(parts, recipe.density, f"{recipe.seed}:{module}")
    return approximate.low_rank(made, recipe.rank or sum(part.rank for part in parts))


def _factor_sum(parts: Sequence[ModuleFactors], recipe: Recipe, module: str) -> ModuleFactors:
    return approximate.sum_of_factors(parts)


def _linear_in_depth(own: Sequence[float], layer: int, depth: int) -> float:
    return own[0] + (own[1] - own[0]) * (layer / (depth - 1) if depth > 1 else 0.0)


METHODS: dict[str, Method] = {
    "sum": Method(_sum, True, "concatenation of factors: W + sum a_i s_i B_i A_i (Hu et al. 2021, arXiv:2106.09685)"),
    "depth_gate": Method(
        _sum, True, "weights linear in depth (TaDA, arXiv:2606.05016)", lambda depth: 2, _linear_in_depth
    ),
    "per_layer": Method(
        _sum,
        True,
        "a weight per layer (LoRA Soups' CAT without its softmax, arXiv:2410.13025)",
        lambda depth: depth,
        lambda own, layer, depth: own[layer],
    ),
    "sum_truncated": Method(
        _sum_truncated, False, "the sum at a given rank (Eckart and Young 1936): QR, SVD of the core"
    ),
    "ties": Method(
        _ties, False, "trim, elect signs, disjoint mean of true deltas (Yadav et al. 2023, arXiv:2306.01708)"
    ),
    "dare": Method(_dare, False, "drop and rescale entries of true deltas (Yu et al. 2023, arXiv:2311.03099)"),
    "factor_sum": Method(
        _factor_sum, False, "A's and B's summed apart, cross terms and all: PEFT's `linear`, a reference"
    ),
}


def depth(adapters: Sequence[Factors]) -> int:
    """Number of layers up to the deepest that any adapter changes; at least 1."""
    layers = [layer for adapter in adapters for name in adapter if (layer := layer_of(name)) is not None]
    return 1 + max(layers, default=0)


def weights_at(module: str, recipe: Recipe, adapters: int, layers: int) -> list[float]:
    """The weight of each adapter at a module; what lies outside the layers counts as the last one.

    Raises ValueError when the recipe's weights are not as many as its method takes; without weights each is 1.
    """
    method = METHODS[recipe.method]
    numbers = method.numbers(layers)
    given = recipe.weights or (1.0,) * (adapters * numbers)
    if len(given) != adapters * numbers:
        raise ValueError(f"{recipe.method} of {adapters} adapters takes {adapters * numbers} weights, got {len(given)}")
    layer = layer_of(module)
    place = layers - 1 if layer is None else layer
    return [method.at(given[i * numbers : (i + 1) * numbers], place, layers) for i in range(adapters)]


def compose(adapters: Sequence[Factors], recipe: Recipe) -> dict[str, ModuleFactors]:
    """The adapters as one adapter, in float32. A weight of 0 is absence: that adapter adds no rank there.

    Raises ValueError for a wrong number of weights, unequal shapes at a module, or when nothing is left.
    """
    layers = depth(adapters)
    composed: dict[str, ModuleFactors] = {}
    for module in dict.fromkeys(name for adapter in adapters for name in adapter):
        weights = weights_at(module, recipe, len(adapters), layers)
        parts = _weighted(adapters, weights, module)
        if parts:
            try:
                composed[module] = METHODS[recipe.method].combine(parts, recipe, module)
            except ValueError as error:
                raise ValueError(f"{module}: {error}") from error
    if not composed:
        raise ValueError("every weight is 0: that is the base model, not a composition")
    return composed


def relative_errors(composed: Factors, adapters: Sequence[Factors], recipe: Recipe) -> dict[str, float]:
    """Per module ||D_composed - sum a_i D_i||_F / ||sum a_i D_i||_F, with the weights that the recipe has there."""
    layers = depth(adapters)
    found = {}
    for module in dict.fromkeys([*composed, *(name for adapter in adapters for name in adapter)]):
        parts = _weighted(adapters, weights_at(module, recipe, len(adapters), layers), module)
        # when the parts cancel, their own sizes are what rounding is relative to
        size = max(distance(None, parts), 1e-3 * sum(map(norm, parts)))
        found[module] = distance(composed.get(module), parts) / (size or 1.0)
    return found


def _weighted(adapters: Sequence[Factors], weights: Sequence[float], module: str) -> list[ModuleFactors]:
    present = zip(adapters, weights, strict=True)
    return [scaled(adapter[module], weight) for adapter, weight in present if module in adapter and weight != 0.0]
