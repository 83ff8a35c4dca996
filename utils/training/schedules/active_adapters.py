"""Which adapters are switched on in a step: by its number alone, so that a resumed run does the same."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class AdapterSchedule:
    """Which adapters are on while one of them is trained: the frozen ones below it and itself.

    With `alternates` the frozen ones are switched on in about half of the steps, drawn from `seed`.
    """

    trained: str
    frozen: tuple[str, ...] = ()
    alternates: bool = False
    seed: int = 0

    def active(self, step: int | None) -> list[str]:
        """Names of the adapters that are on in this step or, with None, while dev is measured."""
        return [*self.below(step), self.trained]

    def below(self, step: int | None) -> list[str]:
        """Those of them that are frozen."""
        return list(self.frozen) if not self.alternates or domain_is_on(self.seed, step) else []


def domain_is_on(seed: int, step: int | None) -> bool:
    """Whether a domain-ready step sees the domain adapter (Parovic et al. 2023, doi:10.18653/v1/2023.findings-acl.13).

    A function of the step alone; dev (None) is measured with it on.
    """
    return step is None or Random(f"{seed}:domain:{step}").random() < 0.5
