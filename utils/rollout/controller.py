"""The rollout as a fold: `advance(state, observation, policy) -> decision`. No clock, no disk, no balancer in here.

The loop in `utils/rollout/edge/rollout_loop.py` makes one observation a tick, asks for a decision, writes it to the
journal, and only then acts. Replaying the journal's observations gives the same state, so what was decided and why can
be checked by anyone afterwards. Terminal phases are never left: a rolled-back candidate does not come back by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from utils.rollout.gate import Counts, GateVerdict, judge
from utils.rollout.policy import FULL_BP, UNITS, Policy, RampStep

Phase = Literal["ramp", "bake", "promoted", "rolled_back"]
Cause = Literal["", "worse", "unsafe", "undecided", "incident", "person"]
# weight of the past per tick in production's recent error rate, and the units below which it says nothing
MEMORY, ENOUGH_UNITS = 0.95, 10.0


@dataclass(frozen=True)
class Observation:
    """What one tick saw. `at` is in seconds since the epoch; counts are what was new since the last tick."""

    at: float
    counts: Counts = field(default_factory=Counts)
    blind: str = ""
    """Why the data of this tick cannot be trusted; empty when they can."""
    interrupted: str = ""
    """What made the ramp start again: the balancer or the controller was away."""
    unsafe: str = ""
    """A fact that ends the rollout at once: the canary is down, another model answers, someone changed the share."""
    command: Literal["", "promote", "abort"] = ""

    def to_json(self) -> dict[str, Any]:
        shown = {name: value for name, value in asdict(self).items() if value != "" and name != "counts"}
        return {**shown, "counts": self.counts.to_json()}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Observation:
        return Observation(**{**values, "counts": Counts.from_json(values.get("counts") or {}, whole=False)})


@dataclass(frozen=True)
class State:
    """Everything the next decision depends on, besides the policy."""

    started_at: float
    step_at: float
    phase: Phase = "ramp"
    step: int = 0
    total: Counts = field(default_factory=Counts)
    here: Counts = field(default_factory=Counts)
    interruptions: int = 0
    blind: str = ""
    incident: bool = False
    recent: tuple[float, float] = (0.0, 0.0)
    """Production's errors and units, decaying."""
    reason: str = ""
    cause: Cause = ""
    ended_at: float = 0.0

    @property
    def is_over(self) -> bool:
        return self.phase in ("promoted", "rolled_back")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total.to_json(), "here": self.here.to_json(), "recent": list(self.recent)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> State:
        counts = {name: Counts.from_json(values[name], whole=False) for name in ("total", "here")}
        return State(**{**values, **counts, "recent": tuple(values["recent"])})


@dataclass(frozen=True)
class Decision:
    """What to do now. The lease may be renewed only when `renew`; `share_bp` is what the balancer must hold."""

    action: Literal["hold", "advance", "rollback", "promote", "restart"]
    state: State
    reason: str
    share_bp: int
    renew: bool
    verdict: GateVerdict | None = None


def begin(at: float) -> State:
    """The first state: nothing seen, first step."""
    return State(started_at=at, step_at=at)


def share_of(state: State, policy: Policy) -> int:
    """The share in basis points that belongs to a state."""
    if state.phase == "ramp":
        return policy.steps[state.step].share_bp
    return FULL_BP if state.phase == "bake" else 0


def advance(state: State, seen: Observation, policy: Policy) -> Decision:
    """The next state and what to do about it. Order of precedence: stop, alarm, deadline, hold, go on."""
    if state.is_over:
        return Decision("hold", state, state.reason, 0, False)
    state = _absorbed(state, seen, policy)
    step = policy.steps[state.step] if state.phase == "ramp" else None
    if seen.command == "abort":
        return _rollback(state, seen, "aborted by a person", "person")
    if seen.unsafe:
        return _rollback(state, seen, seen.unsafe, "unsafe")
    verdict = judge(state.total, state.here, policy, step)
    if verdict.action == "rollback":
        return _rollback(state, seen, verdict.reason, "worse", verdict)
    if seen.interrupted:
        return _restart(state, seen, policy, verdict)
    late = _deadline(state, seen, policy, verdict, step)
    if late:
        return late
    if seen.blind:
        return Decision("hold", state, f"no trustworthy data: {seen.blind}", share_of(state, policy), False, verdict)
    if seen.command == "promote":
        return _next(state, seen, policy, verdict, "a person asked for the next step")
    if seen.at - state.step_at < policy.min_step_s:
        return _hold(state, policy, verdict, verdict.reason)
    if state.incident:
        return _hold(state, policy, verdict, "production itself is failing: nothing advances")
    if step is None:
        served = state.here.at(FULL_BP, UNITS)[0]
        if seen.at - state.step_at < policy.bake_s or served < policy.bake_units:
            return _hold(state, policy, verdict, f"baking at 100%: {served} units served")
        return _next(state, seen, policy, verdict, "no alarm during the bake at 100%")
    if verdict.action == "advance":
        return _next(state, seen, policy, verdict, verdict.reason)
    return _hold(state, policy, verdict, verdict.reason)


def replay(begun: State, observations: Iterable[Observation], policy: Policy) -> State:
    """The state after these observations; what a journal is read with."""
    for seen in observations:
        begun = advance(begun, seen, policy).state
    return begun


def _absorbed(state: State, seen: Observation, policy: Policy) -> State:
    errors = units = 0
    for metrics in seen.counts.rates.values():
        errors, units = errors + metrics.get("errors", (0, 0))[1], units + metrics.get(UNITS, (0, 0))[1]
    bad, all_ = (MEMORY * old + new for old, new in zip(state.recent, (errors, units), strict=True))
    return replace(
        state,
        total=state.total + seen.counts,
        here=state.here + seen.counts,
        recent=(bad, all_),
        blind=seen.blind,
        incident=all_ >= ENOUGH_UNITS and bad > policy.incident_rate * all_,
    )


def _hold(state: State, policy: Policy, verdict: GateVerdict, reason: str) -> Decision:
    return Decision("hold", state, reason, share_of(state, policy), True, verdict)


def _rollback(
    state: State, seen: Observation, reason: str, cause: Cause, verdict: GateVerdict | None = None
) -> Decision:
    ended = replace(state, phase="rolled_back", reason=reason, cause=cause, ended_at=seen.at)
    return Decision("rollback", ended, reason, 0, False, verdict)


def _restart(state: State, seen: Observation, policy: Policy, verdict: GateVerdict) -> Decision:
    again = state.interruptions + 1
    if again > policy.max_interruptions:
        return _rollback(state, seen, f"interrupted {again} times, last: {seen.interrupted}", "unsafe", verdict)
    first = replace(state, phase="ramp", step=0, step_at=seen.at, here=Counts(), interruptions=again)
    reason = f"back to the first step: {seen.interrupted}"
    return Decision("restart", first, reason, share_of(first, policy), True, verdict)


def _deadline(
    state: State, seen: Observation, policy: Policy, verdict: GateVerdict, step: RampStep | None
) -> Decision | None:
    bake = policy.bake_s if step is None else 0.0
    late_step = seen.at - state.step_at > policy.step_deadline_s + bake
    if not late_step and seen.at - state.started_at <= policy.rollout_deadline_s:
        return None
    which = "step" if late_step else "rollout"
    units = state.here.at(step.share_bp if step else FULL_BP, UNITS)[0]
    if seen.blind:
        why, cause = f"no trustworthy data: {seen.blind}", "undecided"
    elif state.incident:
        why, cause = "production itself was failing, the candidate is not to blame", "incident"
    else:
        why, cause = f"insufficient data: {units} canary units at this step; {verdict.reason}", "undecided"
    return _rollback(state, seen, f"the {which}'s deadline passed; {why}", cause, verdict)  # type: ignore[arg-type]


def _next(state: State, seen: Observation, policy: Policy, verdict: GateVerdict, reason: str) -> Decision:
    if state.phase == "bake":
        done = replace(state, phase="promoted", reason=reason, ended_at=seen.at)
        return Decision("promote", done, reason, 0, False, verdict)
    last = state.step + 1 == len(policy.steps)
    moved = replace(
        state,
        phase="bake" if last else "ramp",
        step=state.step if last else state.step + 1,
        step_at=seen.at,
        here=Counts(),
    )
    return Decision("advance", moved, reason, share_of(moved, policy), True, verdict)
