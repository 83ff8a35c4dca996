"""How adapters are put together: one row per method, with its paper and whether it is exact.

A method says which weight each adapter has at a module, and how the weighted updates of one module become one update.
Exact methods give W + sum_i a_i D_i; the others are approximate and there for comparison. Adding a row edits nothing
else: the command line, its help, the search and the invariants in the tests read the rows. torch is imported by what
computes, so that help and errors do not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from config import ComposeSection
from utils.exceptions import ConfigError, Problem, did_you_mean
from utils.models.weights.tensor_names import layer_of

if TYPE_CHECKING:
    from utils.adapters.factors import Factors, ModuleFactors

SUM = "sum"
OPEN = ("method", "weights", "rank", "density")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a composition besides the adapters; see `ComposeSection` for the fields.

    Its defaults are what a setting means that is left open where nothing was composed before.
    """

    method: str = SUM
    weights: tuple[float, ...] = ()
    rank: int = 0
    density: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Method:
    """One row of the registry: what a method does, and all that is needed to use it.

    `at` reads the weight of a layer off an adapter's own weights (weights, layer, number of layers). `per_adapter` is
    how many weights each adapter has, None for one per layer; `takes` says so in words. `search` is how weights are
    chosen: not at all, by stepping from the best weights of the sum, or fitted per layer. `reads` names the settings
    that matter besides the weights.
    """

    combine: Callable[[Sequence[ModuleFactors], Recipe, str], ModuleFactors]
    exact: bool
    source: str
    per_adapter: int | None = 1
    at: Callable[[Sequence[float], int, int], float] = lambda own, layer, depth: own[0]
    takes: str = "a weight for each adapter"
    search: Literal["", "steps", "fit"] = ""
    needs_weights: bool = False
    reads: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.search and not self.exact:
            raise ValueError("dev losses are measured on weighted adapters, which only an exact method equals")
        if self.search == "fit" and self.per_adapter is not None:
            raise ValueError("what is fitted is a weight per layer")

    def numbers(self, layers: int) -> int:
        """Weights of each adapter in a model of so many layers."""
        return layers if self.per_adapter is None else self.per_adapter


def _sum(parts: Sequence[ModuleFactors], recipe: Recipe, module: str) -> ModuleFactors:
    from utils.adapters.factors import stacked

    return stacked(parts)


def _sum_truncated(parts: Sequence[ModuleFactors], recipe: Recipe, module: str) -> ModuleFactors:
    from utils.adapters.factors import stacked
    from utils.composition.truncation import truncated

    return truncated(stacked(parts), recipe.rank or sum(part.rank for part in parts))


def _ties(parts: Sequence[ModuleFactors], recipe: Recipe, module: str) -> ModuleFactors:
    from utils.composition import approximate_methods

    update = approximate_methods.ties(parts, recipe.density)
    return approximate_methods.low_rank(update, recipe.rank or sum(part.rank for part in parts))


def _dare(parts: Sequence[ModuleFactors], recipe: Recipe, module: str) -> ModuleFactors:
    from utils.composition import approximate_methods

    update = approximate_methods.dare(parts, recipe.density, f"{recipe.seed}:{module}")
    return approximate_methods.low_rank(update, recipe.rank or sum(part.rank for part in parts))


def _factor_sum(parts: Sequence[ModuleFactors], recipe: Recipe, module: str) -> ModuleFactors:
    from utils.composition import approximate_methods

    return approximate_methods.sum_of_factors(parts)


def _linear_in_depth(own: Sequence[float], layer: int, depth: int) -> float:
    return own[0] + (own[1] - own[0]) * (layer / (depth - 1) if depth > 1 else 0.0)


# from the simplest on: a search takes the first that is good enough
METHODS: dict[str, Method] = {
    SUM: Method(
        _sum,
        True,
        "concatenation of factors: W + sum a_i s_i B_i A_i (Hu et al. 2021, arXiv:2106.09685)",
        search="steps",
    ),
    "depth_gate": Method(
        _sum,
        True,
        "weights linear in depth (TaDA, arXiv:2606.05016)",
        per_adapter=2,
        at=_linear_in_depth,
        takes="weights of the first and the last layer for each adapter",
        search="steps",
    ),
    "per_layer": Method(
        _sum,
        True,
        "a weight per layer (LoRA Soups' CAT without its softmax, arXiv:2410.13025)",
        per_adapter=None,
        at=lambda own, layer, depth: own[layer],
        takes="a weight of every layer for each adapter",
        search="fit",
        needs_weights=True,
    ),
    "sum_truncated": Method(
        _sum_truncated,
        False,
        "the sum at a given rank (Eckart and Young 1936): QR, SVD of the core",
        reads=("rank",),
    ),
    "ties": Method(
        _ties,
        False,
        "trim, elect signs, disjoint mean of true deltas (Yadav et al. 2023, arXiv:2306.01708)",
        reads=("rank", "density"),
    ),
    "dare": Method(
        _dare,
        False,
        "drop and rescale entries of true deltas (Yu et al. 2023, arXiv:2311.03099)",
        reads=("rank", "density"),
    ),
    "factor_sum": Method(
        _factor_sum, False, "A's and B's summed apart, cross terms and all: PEFT's `linear`, a reference"
    ),
}


def choices() -> dict[str, dict[str, str]]:
    """Setting -> its choices, each with a line of help."""

    def line(method: Method) -> str:
        also = f", {' and '.join(f'compose.{name}' for name in method.reads)}" if method.reads else ""
        return f"{'exact' if method.exact else 'approximate'}; takes {method.takes}{also}; {method.source}"

    return {
        "compose.method": {name: line(method) for name, method in METHODS.items()},
        "compose.search_methods": {name: "" for name, method in METHODS.items() if method.search},
    }


def problems(section: ComposeSection) -> list[Problem]:
    """What is wrong with the settings of a composition as far as methods decide it."""
    names, searchable = choices().values()
    findings = [
        _no_choice("compose.search_methods: no method whose weights can be searched", name, searchable)
        for name in section.search_methods
        if name not in searchable
    ]
    name = section.method or SUM
    if name not in names:
        return [_no_choice("compose.method: no such method", name, names), *findings]
    method, adapters = METHODS[name], 2 + len(section.also)
    # a weight per layer is checked where the number of layers is known
    # and one adapter, where only that one is there, takes its own
    each = method.per_adapter or 0
    takes, alone = adapters * each, each if adapters == 2 else 0
    if section.weights and takes and len(section.weights) not in (takes, alone):
        given = len(section.weights)
        what = f"compose.weights has {given} numbers, {name} of {adapters} adapters takes {takes}"
        findings.append(Problem(what, fix=_as_typed(adapters, each)))
    if method.needs_weights and not section.weights and not section.search:
        findings.append(Problem(f"compose.method {name} needs compose.weights, or --compose.search to find them"))
    if section.search and name not in (SUM, *section.search_methods):
        findings.append(Problem(f"compose.search cannot choose weights for {name}: see compose.search_methods"))
    return findings


def recipe_of(section: ComposeSection, seed: int) -> Recipe:
    """What the settings ask for. Raises ConfigError, for those that no command line has checked."""
    if findings := problems(section):
        raise ConfigError(findings)
    return Recipe(seed=seed, **{name: value for name in OPEN if (value := getattr(section, name)) is not None})


def asks_for_itself(section: ComposeSection) -> bool:
    """Whether the settings say how to compose; otherwise the newest composed run of the same adapters does."""
    return any(getattr(section, name) is not None for name in OPEN)


def _no_choice(what: str, name: str, known: Iterable[str]) -> Problem:
    listed = ", ".join(known)
    return Problem(what, name, " ".join(filter(None, (did_you_mean(name, known), f"choices: {listed}"))))


def _as_typed(adapters: int, numbers: int) -> str:
    """The flag with as many weights as are taken, each 1."""
    each = "one number" if numbers == 1 else f"{numbers} numbers, from the first layer to the last,"
    return f"{each} for each adapter, domain before task: --weights {','.join('1' * (adapters * numbers))}"


def depth(adapters: Sequence[Factors]) -> int:
    """Number of layers up to the deepest that any adapter changes; at least 1."""
    layers = [layer for adapter in adapters for name in adapter if (layer := layer_of(name)) is not None]
    return 1 + max(layers, default=0)


def weights_at(module: str, recipe: Recipe, adapters: int, layers: int, *, layer: int | None = None) -> list[float]:
    """The weight of each adapter at a module; what lies outside the layers counts as the last one.

    `layer` is the module's layer where that is known otherwise than by its name.
    Raises ValueError when the recipe's weights are not as many as its method takes; without weights each is 1.
    """
    method = METHODS[recipe.method]
    numbers = method.numbers(layers)
    given = recipe.weights or (1.0,) * (adapters * numbers)
    if len(given) != adapters * numbers:
        what = f"{recipe.method} of {adapters} adapters takes {adapters * numbers} weights, got {len(given)}"
        raise ValueError(f"{what}; {_as_typed(adapters, numbers)}")
    place = layer_of(module) if layer is None else layer
    place = layers - 1 if place is None else place
    return [method.at(given[i * numbers : (i + 1) * numbers], place, layers) for i in range(adapters)]


def weighted(
    adapters: Sequence[Factors], recipe: Recipe, layers: int = 0, places: Mapping[str, int] | None = None
) -> list[dict[str, ModuleFactors]]:
    """The adapters with their weights folded in; a weight of 0 is absence, so its modules are left out.

    `layers` is the depth where these are only some layers of the adapters, `places` a module's layer where that is
    not to be read off its name. Raises ValueError for a wrong number of weights.
    """
    from utils.adapters.factors import scaled

    layers = layers or depth(adapters)
    folded: list[dict[str, ModuleFactors]] = [{} for _ in adapters]
    for module in dict.fromkeys(name for adapter in adapters for name in adapter):
        weights = weights_at(module, recipe, len(adapters), layers, layer=(places or {}).get(module))
        for kept, adapter, weight in zip(folded, adapters, weights, strict=True):
            if module in adapter and weight != 0.0:
                kept[module] = scaled(adapter[module], weight)
    return folded


def compose(adapters: Sequence[Factors], recipe: Recipe) -> dict[str, ModuleFactors]:
    """The adapters as one adapter, in float32. A weight of 0 is absence: that adapter adds no rank there.

    Raises ValueError for a wrong number of weights, unequal shapes at a module, or when nothing is left.
    """
    parts = weighted(adapters, recipe)
    composed: dict[str, ModuleFactors] = {}
    for module in dict.fromkeys(name for adapter in adapters for name in adapter):
        if present := [part[module] for part in parts if module in part]:
            try:
                composed[module] = METHODS[recipe.method].combine(present, recipe, module)
            except ValueError as error:
                raise ValueError(f"{module}: {error}") from error
    if not composed:
        raise ValueError("every weight is 0: that is the base model, not a composition")
    return composed
