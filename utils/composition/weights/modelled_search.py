"""The walk to good weights on a model of the losses, which really measured settings confirm and correct.

A handful of settings around weights of 1 are measured; the walk on the model through them (`Surface`) ends somewhere;
that is measured, too. Where the model was right within a standard error, the search is over. Where it was not, the
model gets the new point and walks again, and after `ROUNDS` of that it is not believed any more: the walk then goes
on real losses, as it would have without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from utils.composition.methods import METHODS, SUM
from utils.composition.weights import compass
from utils.composition.weights.points import Allows, Evaluate, Keeping, Point, best_of, one, paired
from utils.composition.weights.surface import Surface

# around weights of 1: with those, the base and the domain adapter alone, the six numbers of a quadratic in two weights
DESIGN = ((0.5, 1.0), (1.5, 1.0), (1.0, 0.5), (1.5, 0.5))
ASIDE, TILT = 0.5, 0.25
ROUNDS = 4
# nats per token, what a model may be wrong by where items do not differ at all
NOTHING = 1e-3


class ModelledSearch:
    """Good weights of each method on one set of items, by few measured settings."""

    def __init__(
        self,
        measure: Evaluate,
        adapters: int,
        say: Callable[[str], None],
        corrected: Callable[[Point], Point] = lambda point: point,
    ):
        """`measure` remembers what it has measured; `say` is told where the model was not enough.

        `corrected` makes of a point what it is taken for; it may know better at every call.
        """
        self.adapters, self.say, self.corrected = adapters, say, corrected
        self.seen: dict[tuple[str, tuple[float, ...]], Point] = {}
        # methods whose model was right about a setting that it did not know
        self.confirmed: set[str] = set()
        self.given_up: set[str] = set()
        self._evaluate = measure
        for weights in self._around_one():
            self.measure(SUM, weights)

    def measure(self, method: str, weights: tuple[float, ...]) -> Point:
        """Really measured losses."""
        self.seen[method, weights] = self._evaluate(method, weights)
        return self.corrected(self.seen[method, weights])

    def best_sums(self, keeping: Keeping) -> list[Point]:
        """The measured points of the sum: those that keep the domain first, best answers first."""
        allows = self._walked(SUM, lambda evaluate: compass.best_sum(evaluate, self.adapters, keeping))
        return self._ranked(SUM, allows)

    def best_of_method(self, name: str, start: Point, keeping: Keeping) -> Point:
        """The best measured point of a method that steps away from the sum's best weights, held to what those keep."""
        allows, numbers = keeping.rule([start]), METHODS[name].per_adapter or 1
        around = tuple(weight for weight in start.weights for _ in range(numbers))
        for weights in self._tilted(around, numbers):
            self.measure(name, weights)

        def walk(evaluate: Evaluate) -> tuple[Point, Allows]:
            return compass.refined(evaluate, name, evaluate(name, around), allows), allows

        self._walked(name, walk)
        return self._ranked(name, allows)[0]

    def _walked(self, name: str, walk: Callable[[Evaluate], tuple[Point, Allows]]) -> Allows:
        """Settings are measured until the model knows the one at which it ends, or is given up; returns the rule."""
        plain = self.measure(SUM, (1.0,) * self.adapters)
        for _ in range(0 if name in self.given_up else ROUNDS):
            model = Surface(name, [self.corrected(point) for point in self.seen.values()])
            expected, allows = walk(model.near)
            if model.knows(expected):
                if name in self.confirmed:
                    return allows
                # what it says of the best that it does not know yet is put to the test
                others = compass.neighbours(model.near, name, expected, compass.STEPS[0])
                expected = best_of([p for p in others if not model.knows(p)] or [expected], allows)
            measurement = self.measure(name, expected.weights)
            error = one(paired(measurement, plain)[1])
            is_right = abs(measurement.answer_nll - expected.answer_nll) <= max(error, NOTHING)
            if is_right and allows(measurement) == allows(expected):
                self.confirmed.add(name)
                return allows
        before = len(self.seen)
        _, allows = walk(self.measure)
        if name not in self.given_up:
            self.given_up.add(name)
            self.say(
                f"{name}: {ROUNDS} settings in a row were not within a standard error of what the quadratic model "
                f"expected: {len(self.seen) - before} more were scored instead of modelled"
            )
        return allows

    def _ranked(self, name: str, allows: Allows) -> list[Point]:
        """What was measured of a method, what is allowed first, by its answers."""
        single = {(1.0,) + (0.0,) * (self.adapters - 1), (0.0,) * self.adapters}
        own = [p for p in self.seen.values() if p.method == name and not (name == SUM and p.weights in single)]
        return sorted(map(self.corrected, own), key=lambda p: (not allows(p), p.answer_nll))

    def _around_one(self) -> Iterator[tuple[float, ...]]:
        rest = (1.0,) * (self.adapters - 2)
        yield from ((0.0,) * self.adapters, (1.0,) + (0.0,) * (self.adapters - 1), (1.0,) * self.adapters)
        yield from ((*pair, *rest) for pair in DESIGN)
        for further in range(2, self.adapters):
            for weight in (1 - ASIDE, 1 + ASIDE):
                yield tuple(weight if at == further else 1.0 for at in range(self.adapters))

    def _tilted(self, around: tuple[float, ...], numbers: int) -> Iterator[tuple[float, ...]]:
        """For each adapter and two neighbours of its weights: one more and the other less, both ways."""
        for first in range(len(around) - 1):
            if first % numbers == numbers - 1:
                continue
            for sign in (-1, 1):
                moved = list(around)
                moved[first] = max(0.0, round(moved[first] - sign * TILT, 6))
                moved[first + 1] = max(0.0, round(moved[first + 1] + sign * TILT, 6))
                yield tuple(moved)
