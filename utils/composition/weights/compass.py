"""Walking to good weights: a coarse grid, then steps in one weight at a time, on whatever says the losses.

The same walk on real losses is exhaustive (26 to 40 settings), on a model of them it is free.
"""

from __future__ import annotations

import itertools

from utils.composition.methods import SUM
from utils.composition.weights.points import Allows, Evaluate, Keeping, Point, best_of

COARSE = (0.0, 0.5, 1.0, 1.5)
STEPS = (0.25, 0.125)
# a refinement that still improves after so many evaluations has left what a dev split can tell
MAX_REFINEMENTS = 32


def best_sum(measure: Evaluate, adapters: int, keeping: Keeping) -> tuple[Point, Allows]:
    """(best weights of a sum, the rule by which points keep enough of the domain)."""
    grid = _grid(measure, adapters)
    if not any(map(keeping.likely, grid)):
        grid.append(_towards_keeping(measure, max(grid, key=lambda p: keeping.share(p)[0]), keeping))
    allows = keeping.rule(grid)
    return refined(measure, SUM, best_of(grid, allows), allows), allows


def refined(measure: Evaluate, method: str, start: Point, allows: Allows) -> Point:
    """Compass search: the best neighbour in one weight, while it improves, with ever smaller steps."""
    here, spent = start, 0
    for step in STEPS:
        while spent < MAX_REFINEMENTS:
            around = neighbours(measure, method, here, step)
            spent += len(around)
            better = [p for p in around if p.answer_nll < here.answer_nll and (allows(p) or not allows(here))]
            if not better:
                break
            here = best_of(better)
    return here


def neighbours(measure: Evaluate, method: str, here: Point, step: float) -> list[Point]:
    """One weight a step lower or higher; none is negative."""
    points = []
    for i, sign in itertools.product(range(len(here.weights)), (-1, 1)):
        weights = (*here.weights[:i], round(here.weights[i] + sign * step, 6), *here.weights[i + 1 :])
        if weights[i] >= 0:
            points.append(measure(method, weights))
    return points


def _grid(measure: Evaluate, adapters: int) -> list[Point]:
    """A grid over two weights; with more adapters, the others stay at 1 and refinement moves them."""
    return [measure(SUM, (a, b) + (1.0,) * (adapters - 2)) for a, b in itertools.product(COARSE, COARSE[1:])]


def _towards_keeping(measure: Evaluate, start: Point, keeping: Keeping) -> Point:
    """From weights that lose too much of the domain, on a grid too coarse to hold better ones, to ones that keep it."""
    here, spent = start, 0
    for step in STEPS:
        while spent < MAX_REFINEMENTS and not keeping.likely(here):
            around = neighbours(measure, SUM, here, step)
            spent += len(around)
            best = max(around, key=lambda p: keeping.share(p)[0])
            if keeping.share(best)[0] <= keeping.share(here)[0]:
                break
            here = best
    return here
