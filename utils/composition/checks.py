"""What every composition must pass before it is used: pure numbers on factors; the checks on logits are elsewhere.

1. one adapter at weight 1 comes back as itself, weight 0 is absence, order does not matter (exact methods);
2. per module ||D_composed - sum a_i D_i|| / ||.|| stays below EXACT for exact methods and is stated for the others;
5. everything is finite, and not all of the update is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from utils.adapters.factors import Factors, distance, norm, zero_modules
from utils.composition.methods import Recipe, compose

# float32 rounding of a sum of a few rank-r products, with room
EXACT = 1e-5
# modules on which identity, absence and order are tried out; the sum itself is checked on all of them
SAMPLED_MODULES = 24


@dataclass(frozen=True)
class FactorCheck:
    """Relative errors, the largest over modules; the last three only mean something for exact methods."""

    exact: bool
    relative_error: float
    mean_relative_error: float
    worst_module: str
    identity_error: float
    absence_error: float
    order_error: float
    problems: tuple[str, ...]


def check(composed: Factors, weighted: Sequence[Factors], *, exact: bool) -> FactorCheck:
    """Points 1, 2 and 5 on adapters with their weights folded in. Problems are sentences; none means passed."""
    errors = relative_errors(composed, weighted)
    worst = max(errors, key=lambda module: errors[module])
    by_law = {"relative": errors[worst], "identity": 0.0, "absence": 0.0, "order": 0.0}
    if exact:
        by_law |= _laws(weighted)
    problems = [
        f"{name} error {error:.2g} is above {EXACT:g}" for name, error in by_law.items() if exact and not error <= EXACT
    ]
    not_finite = [n for n, f in composed.items() if not (torch.isfinite(f.a_rI).all() and torch.isfinite(f.b_Or).all())]
    if not_finite:
        problems.append(f"{', '.join(not_finite[:3])}: not finite")
    if len(zero_modules(composed)) == len(composed):
        problems.append("the composed update is zero everywhere")
    return FactorCheck(
        exact=exact,
        relative_error=errors[worst],
        mean_relative_error=sum(errors.values()) / len(errors),
        worst_module=worst,
        identity_error=by_law["identity"],
        absence_error=by_law["absence"],
        order_error=by_law["order"],
        problems=tuple(problems),
    )


def relative_errors(composed: Factors, weighted: Sequence[Factors]) -> dict[str, float]:
    """Per module ||D_composed - sum a_i D_i||_F / ||sum a_i D_i||_F; the weights a_i are folded into the adapters."""
    errors = {}
    for module in dict.fromkeys([*composed, *(name for adapter in weighted for name in adapter)]):
        parts = [adapter[module] for adapter in weighted if module in adapter]
        # when the parts cancel, their own sizes are what rounding is relative to
        size = max(distance(None, parts), 1e-3 * sum(map(norm, parts)))
        errors[module] = distance(composed.get(module), parts) / (size or 1.0)
    return errors


def _laws(adapters: Sequence[Factors]) -> dict[str, float]:
    """Largest relative error of identity, absence and order of the exact sum, on some modules of these adapters."""
    modules = list(dict.fromkeys(name for adapter in adapters for name in adapter))
    modules = modules[:: max(1, len(modules) // SAMPLED_MODULES)]
    some = [kept for a in adapters if (kept := {name: a[name] for name in modules if name in a})]
    identity = max(_largest(compose([adapter], Recipe()), [adapter]) for adapter in some)
    absence = 0.0
    for i, adapter in enumerate(some):
        alone = tuple(float(i == j) for j in range(len(some)))
        absence = max(absence, _largest(compose(some, Recipe(weights=alone)), [adapter]))
    order = _largest(compose(some[::-1], Recipe()), some)
    return {"identity": identity, "absence": absence, "order": order}


def _largest(composed: Factors, weighted: Sequence[Factors]) -> float:
    return max(relative_errors(composed, weighted).values())
