"""What is measured, how much error is allowed over all of it, and the steps: plain frozen values, JSON in and out.

The error budget: `alpha` is the probability that a candidate which is no worse is ever rolled back by a metric, over
the whole rollout and all metrics together. Each metric has its part; the parts must not exceed the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from utils.exceptions import ConfigError, Problem

FULL_BP = 10_000
UNITS = "units"
# units that no earlier step has seen: the others may come back more or less often, depending on their model
NEW_UNITS = "new_units"


@dataclass(frozen=True)
class Metric:
    """One thing that can be worse. `rate`: events among users' sessions; `pair`: one prompt asked of both models."""

    name: str
    kind: Literal["rate", "pair"]
    alpha: float
    meaning: str = ""

    @property
    def limit(self) -> float:
        """The e-value at which it raises the alarm."""
        return 1 / self.alpha


@dataclass(frozen=True)
class RampStep:
    """A share of the traffic in basis points, and what must be ruled out before the next one."""

    share_bp: int
    ratio: float
    margin: float

    @property
    def share(self) -> float:
        return self.share_bp / FULL_BP


METRICS = (
    Metric("errors", "rate", 0.002, "5xx, time-outs, cut responses, retries in users' traffic"),
    Metric("client_errors", "rate", 0.001, "4xx in users' traffic, e.g. another model name"),
    Metric("slow", "rate", 0.002, "requests slower than production's recent 95th percentile and a tolerance"),
    Metric("probe_errors", "pair", 0.001, "a prompt fails on one model only, errors inside a 200 stream included"),
    Metric("first_token", "pair", 0.0005, "time to first token longer on one model"),
    Metric("per_token", "pair", 0.0005, "time per output token longer on one model"),
    Metric("output", "pair", 0.001, "empty, runaway, repetitive or refusing answer from one model only"),
    Metric("quality", "pair", 0.002, "score of the answer against the expected one, in pairs"),
)
STEPS = (RampStep(100, 5.0, 0.3), RampStep(1000, 3.0, 0.25), RampStep(5000, 2.0, 0.2))


@dataclass(frozen=True)
class Policy:
    """Everything a decision depends on besides the counts. Times are seconds."""

    metrics: tuple[Metric, ...] = METRICS
    steps: tuple[RampStep, ...] = STEPS
    alpha: float = 0.01
    evidence: float = 20.0
    """An e-value of 20 rules a hypothesis out at 5%."""
    objective: float = 0.01
    """A step also advances when the canary's error rate is shown to be below this; 0 switches the rule off."""
    needs_quality: bool = True
    """Without golden prompts nothing is known about answers; the person has to say that this is accepted."""
    share_alpha: float = 1e-4
    incident_rate: float = 0.2
    """Production's own recent error rate above which nothing advances."""
    step_deadline_s: float = 3600.0
    rollout_deadline_s: float = 86_400.0
    bake_s: float = 600.0
    bake_units: int = 100
    """Units that must have been served at 100% before the candidate becomes production."""
    min_step_s: float = 5.0
    max_interruptions: int = 3

    def __post_init__(self) -> None:
        problems = []
        spent = math.fsum(metric.alpha for metric in self.metrics)
        if spent > self.alpha * (1 + 1e-9):
            fix = "lower the parts or raise the whole"
            problems.append(Problem(f"the metrics' alphas add up to {spent:g}, allowed is {self.alpha:g}", fix=fix))
        shares = [step.share_bp for step in self.steps]
        if not shares or shares != sorted(set(shares)) or shares[0] < 1 or shares[-1] >= FULL_BP:
            problems.append(Problem("steps must rise, from 0.01% to below 100%", shares))
        for step in self.steps:
            if step.ratio <= 1 or not 0 < step.margin < 1:
                problems.append(Problem("a step's ratio is above 1 and its margin between 0 and 1", step))
        if not self.evidence > 1:
            problems.append(Problem("evidence must be above 1", self.evidence))
        if problems:
            raise ConfigError(problems)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Policy:
        """Raises ConfigError for unknown or missing names."""
        known = dict(values)
        try:
            if "metrics" in known:
                known["metrics"] = tuple(Metric(**metric) for metric in known["metrics"])
            if "steps" in known:
                known["steps"] = tuple(RampStep(**step) for step in known["steps"])
            return Policy(**known)
        except TypeError as error:
            raise ConfigError(
                Problem(f"the policy cannot be read: {error}", fix="see utils/rollout/policy.py")
            ) from error

    @property
    def rates(self) -> list[Metric]:
        return [metric for metric in self.metrics if metric.kind == "rate"]

    @property
    def paired(self) -> list[Metric]:
        return [metric for metric in self.metrics if metric.kind == "pair"]
