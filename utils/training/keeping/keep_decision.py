"""Whether a task adapter undoes its domain, looked at once while it is trained, and what is then done about it.

A function of numbers and of the step alone: a resumed run decides as an uninterrupted one, and the decision lies in
its checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from utils.data.batches import Batch
from utils.data.mixed_in_documents import DomainKeeping, How
from utils.logger import event

# of the run's steps: late enough to have passed the warm-up, early enough to win back what was lost
LOOK_SHARE = 0.25
# of the tokens of the pairs: three passes over them are 3% of a training, which costs two passes over every token
LOOK_TOKENS_SHARE = 1 / 50
FEWEST_WINDOWS, MOST_WINDOWS = 4, 256
# one-sided
SURE = 0.95
OFF = DomainKeeping()


@dataclass(frozen=True)
class KeepDomain:
    """What was asked for (`task.keep_domain`), and what `auto` looks at.

    `dev` are windows of dev documents; `why_not` is why nothing can be looked at, where that is so; `retention` the
    share of the domain's gain that has to be left.
    """

    requested: Literal["auto", "replay", "kl"]
    share: float
    from_step: int = 0
    retention: float = 0.9
    has_documents: bool = False
    dev: tuple[Batch, ...] = ()
    why_not: str = ""

    def look_step(self, total: int) -> int:
        """The step after which `auto` looks, of `total`; 0 where it does not."""
        step = max(1, round(LOOK_SHARE * total))
        return step if self.requested == "auto" and not self.why_not and step < total else 0

    def at_start(self, total: int) -> dict[str, Any] | None:
        """The decision where it is made before the first step; None where a look decides."""
        if self.requested != "auto":
            return _decision(self.requested, self.from_step, self.share, "as asked", decided_itself=False)
        if self.look_step(total):
            return None
        return _decision("off", 0, self.share, self.why_not or f"{total} steps are too few to look in between")


@dataclass(frozen=True)
class DomainLook:
    """NLL sums of each window of dev documents: of the base, with the domain adapter, and with the task adapter too."""

    base: Sequence[float]
    domain: Sequence[float]
    now: Sequence[float]
    tokens: int

    @property
    def gain(self) -> float:
        """Nats per token that the domain adapter gains."""
        return (sum(self.base) - sum(self.domain)) / self.tokens

    def kept(self) -> tuple[float, float]:
        """(share of the gain that is left, its standard error over windows), a linearised ratio of sums."""
        gains = [b - d for b, d in zip(self.base, self.domain, strict=True)]
        kept = [b - n for b, n in zip(self.base, self.now, strict=True)]
        share = sum(kept) / sum(gains)
        residuals = [k - share * g for k, g in zip(kept, gains, strict=True)]
        count = len(residuals)
        error = math.sqrt(count / max(1, count - 1) * sum(r * r for r in residuals)) / abs(sum(gains))
        return share, error


def decide(look: DomainLook, settings: KeepDomain, step: int) -> dict[str, Any]:
    """What is done from `step` on, and why, as JSON values: nothing, unless the domain is shown to be lost.

    Replay where there are documents, because they are what has to be kept; else predictions on prompts stand for them.
    """
    if not look.gain > 0:
        why = f"the domain adapter does not gain on these dev documents ({look.gain:+.3f} nats per token)"
        return _decision("off", 0, settings.share, why, step=step, gain=look.gain)
    from scipy.stats import t

    share, error = look.kept()
    at_most = share + float(t.ppf(SURE, len(look.base) - 1)) * error  # there may be few windows
    facts = {"step": step, "gain": look.gain, "kept": share, "kept_error": error, "windows": len(look.base)}
    left = f"after {step} steps {share:.0%} +- {error:.0%} of the domain's gain is left on dev"
    if at_most >= settings.retention:
        return _decision("off", 0, settings.share, f"{left}: not shown to be below {settings.retention:.0%}", **facts)
    how: How = "replay" if settings.has_documents else "kl"
    what = "its documents are mixed in" if how == "replay" else "without its documents, predictions on prompts are held"
    return _decision(how, step, settings.share, f"{left}, below {settings.retention:.0%}: {what}", **facts)


def keeping_of(decision: dict[str, Any] | None) -> DomainKeeping:
    """What a decision does; nothing before there is one."""
    return DomainKeeping(decision["how"], int(decision["from_step"])) if decision else OFF


def say(what: str, decision: dict[str, Any] | None) -> None:
    """One line about a decision, if there is one."""
    if decision:
        event(f"{what}: what keeps the domain", **{key: decision[key] for key in ("how", "share", "from_step", "why")})


def _decision(
    how: How, from_step: int, share: float, why: str, *, decided_itself: bool = True, **facts: Any
) -> dict[str, Any]:
    keeping = asdict(DomainKeeping(how, from_step))
    return {**keeping, "share": share, "decided_itself": decided_itself, "why": why, **facts}
