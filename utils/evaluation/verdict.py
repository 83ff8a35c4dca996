"""Does the adaptation help? Four contrasts on per-item scores, and one of four verdicts.

    H1  domain retention: composed keeps at least 70% of what the domain adapter gained on held-out documents
    H2  not worse: composed answers no worse than the task adapter alone, within a margin
    H3  better: composed answers better than the task adapter alone
    H4  for the right reason: better than the same with a wrong-domain adapter and with a random one

Everything is a gain in the primary metric (by default the gold answer's NLL, nats per token), above 0 when composed is
the better, paired by item, with documents as clusters. Tests are one family (Holm). The verdict: `helps` (H1, H3, H4),
`coexists` (H1, H2), `interferes` (composed is shown to be worse than the margin, or to have lost the domain),
`undecided` (the data cannot tell).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from utils.evaluation.intervals import LEVEL, Interval, holm, ratio_interval

RETENTION = 0.7
CONTROLS = ("wrong_domain", "random")
CLAIMS = {
    "H1": "keeps at least 70% of the domain adapter's gain on held-out documents",
    "H2": "answers no worse than the task adapter alone, within the margin",
    "H3": "answers better than the task adapter alone",
    "H4": "answers better than with a wrong-domain and with a random adapter in the domain adapter's place",
    # of one adapter without the other (one_adapter.py)
    "T1": "answers better than the base model",
    "D1": "predicts held-out documents better than the base model",
}


@dataclass(frozen=True)
class Scores:
    """Losses of one cell, weighted: (S, N), a row for each seed; `weights` (N,) and `clusters` (N,) are the items'.

    NLL sums with numbers of tokens, or -F1 with weights of 1. `span` is the largest difference that two values of an
    item may have: 0 where it has no bound, None where it follows from the values of all cells. `ties`: whether equal
    values are to be expected.
    """

    loss_SN: np.ndarray
    weights: Sequence[float]
    clusters: Sequence[str]
    span: float | None = 0.0
    ties: bool = False


@dataclass(frozen=True)
class Verdict:
    """What was found: the word, the sentence, and each contrast; a claim that was not tested is in `untested`."""

    verdict: str
    sentence: str
    contrasts: dict[str, Interval]
    p_holm: dict[str, float]
    untested: dict[str, str]
    closest_control: str = ""

    def to_json(self) -> dict[str, Any]:
        """As the results say it: estimate, low, high, p, p_holm, detectable and holds of each contrast."""
        return {
            name: {
                **{k: v if not isinstance(v, float) or np.isfinite(v) else None for k, v in asdict(contrast).items()},
                "p_holm": self.p_holm[name],
                "holds": self.holds(name),
                "claim": CLAIMS[name],
            }
            for name, contrast in self.contrasts.items()
        }

    def holds(self, name: str) -> bool:
        """Whether the claim is shown at 5% over the whole family."""
        return self.p_holm.get(name, 1.0) < LEVEL


def judge(
    answers: Mapping[str, Scores],
    documents: Mapping[str, Scores],
    *,
    margin: float,
    resamples: int,
    seed: int,
    unit: str = "nats per token",
) -> Verdict:
    """The verdict from the cells `base`, `domain`, `task`, `composed` and the controls, whatever of them is there.

    `answers` are scores of gold answers in the primary metric, whose gains are counted in `unit`; `documents` of
    held-out documents. Raises ValueError when cells were scored on different items.
    """
    answers = with_spans(answers)
    common: dict[str, Any] = {"resamples": resamples, "seed": seed}
    contrasts: dict[str, Interval] = {}
    untested: dict[str, str] = {}
    retention = _retention(documents, common)
    if isinstance(retention, str):
        untested["H1"] = retention
    else:
        contrasts["H1"] = retention
    if "composed" not in answers or "task" not in answers:
        untested["H2"] = untested["H3"] = "there is no task adapter trained on the base to compare with"
    elif not len(answers["composed"].weights):
        untested["H2"] = untested["H3"] = "no test question has a value in the primary metric"
    elif tied(answers["task"], answers["composed"]):
        untested["H2"] = untested["H3"] = (
            "every answer of task and composed has the same value, so nothing is told apart"
        )
    else:
        contrasts["H2"] = gain(answers["task"], answers["composed"], null=-margin, **common)
        contrasts["H3"] = gain(answers["task"], answers["composed"], **common)
    closest = ""
    if missing := [name for name in CONTROLS if name not in answers]:
        untested["H4"] = f"without the controls ({', '.join(missing)}): --evaluate.controls makes them"
    elif not len(answers["composed"].weights):
        untested["H4"] = untested["H3"]
    else:
        against = {name: gain(answers[name], answers["composed"], **common) for name in CONTROLS}
        # both must be shown, so the less convincing one speaks (intersection-union test)
        closest = max(CONTROLS, key=lambda name: (against[name].p, -against[name].low))
        contrasts["H4"] = against[closest]
    p_holm = holm({name: contrast.p for name, contrast in contrasts.items()})
    judged = Verdict("", "", contrasts, p_holm, untested, closest)
    word, sentence = conclude(judged, margin, unit)
    return Verdict(word, sentence, contrasts, p_holm, untested, closest)


def gain(other: Scores, ours: Scores, *, resamples: int, seed: int, null: float = 0.0) -> Interval:
    """Mean loss of the other cell minus ours: above 0 when ours is the better."""
    if list(other.clusters) != list(ours.clusters) or list(other.weights) != list(ours.weights):
        raise ValueError("the cells were scored on different items")
    return ratio_interval(
        _minus(other.loss_SN, ours.loss_SN),
        ours.weights,
        ours.clusters,
        resamples=resamples,
        seed=seed,
        null=null,
        unseen=max(other.span or 0.0, ours.span or 0.0),
    )


def with_spans(cells: Mapping[str, Scores]) -> dict[str, Scores]:
    """Where a span follows from the values, the range over all cells, for every item alike."""
    open_ones = [s for s in cells.values() if s.span is None and len(s.weights)]
    span = _range(open_ones) if open_ones else 0.0
    return {name: replace(s, span=span) if s.span is None else s for name, s in cells.items()}


def tied(one: Scores, other: Scores) -> bool:
    """Whether equal values are to be expected, and there are no others: then nothing is told apart."""
    return one.ties and not _range([one, other])


def _range(cells: Sequence[Scores]) -> float:
    values = [s.loss_SN / np.asarray(s.weights, dtype=float) for s in cells]
    return float(max(v.max() for v in values) - min(v.min() for v in values))


def _retention(documents: Mapping[str, Scores], common: dict[str, Any]) -> Interval | str:
    """H1, or why it cannot be tested."""
    if missing := [cell for cell in ("base", "domain", "composed") if cell not in documents]:
        return f"there are no scores of held-out documents for {', '.join(missing)}"
    base, domain, composed = (documents[cell] for cell in ("base", "domain", "composed"))
    learnt = gain(base, domain, **common)
    if not np.isfinite(learnt.low):
        count = f"{learnt.clusters} held-out document{'s' * (learnt.clusters != 1)}"
        return f"what the domain adapter gained ({learnt.estimate:+.3f} nats per token) has no interval over {count}"
    if learnt.p >= LEVEL:
        return (
            f"the domain adapter itself is not shown to help on held-out documents ({learnt.estimate:+.3f} nats per "
            f"token, 95% [{learnt.low:+.3f}, {learnt.high:+.3f}], over {learnt.clusters})"
        )
    kept, gained = _minus(base.loss_SN, composed.loss_SN), _minus(base.loss_SN, domain.loss_SN)
    return ratio_interval(kept, gained, base.clusters, null=RETENTION, **common)


def _minus(first_SN: np.ndarray, second_SN: np.ndarray) -> np.ndarray:
    """Difference by seed; a cell without seeds (the base) is the same for each."""
    return np.atleast_2d(first_SN) - np.atleast_2d(second_SN)


def conclude(judged: Verdict, margin: float, unit: str) -> tuple[str, str]:
    """(word, sentence) that follow from the contrasts and their corrected p-values."""
    holds, contrasts = judged.holds, judged.contrasts
    h1, h2, h3, h4 = (contrasts.get(name) for name in ("H1", "H2", "H3", "H4"))
    if h2 is None or h3 is None:
        return "undecided", f"Undecided: {judged.untested['H2']}."
    size = f"{h3.estimate:+.3f} {unit}, 95% [{h3.low:+.3f}, {h3.high:+.3f}]"
    if h3.clusters < 2 or not np.isfinite(h3.low):
        few = f"{h3.clusters} document{'s' if h3.clusters != 1 else ''}"
        return "undecided", f"Undecided: the test questions are about {few}, too few for an interval."
    if h2.high < -margin:
        return "interferes", f"Composed answers worse than the task adapter alone ({size}; margin {margin:g})."
    if h1 is not None and h1.high < RETENTION:
        kept = f"{h1.estimate:.0%}, 95% [{h1.low:.0%}, {h1.high:.0%}]"
        return "interferes", f"Composed loses the domain: it keeps {kept} of what the domain adapter gained."
    if holds("H1") and holds("H3") and holds("H4"):
        return "helps", f"The adaptation helps: composed answers better than the task adapter alone ({size})."
    if holds("H1") and holds("H2"):
        if not holds("H3"):
            why = f"it is not shown to answer better ({size}; {h3.detectable:.3f} could have been seen)"
        elif h4 is None:
            why = (
                f"it answers better ({size}); that this is because of the domain is not shown: {judged.untested['H4']}"
            )
        else:
            control = f"{h4.estimate:+.3f} [{h4.low:+.3f}, {h4.high:+.3f}]"
            why = (
                f"it answers better than the task adapter alone ({size}), but not shown to be better than with the "
                f"{judged.closest_control.replace('_', '-')} adapter ({control})"
            )
        return "coexists", f"The adapters coexist: composed keeps the domain and answers no worse; {why}."
    reasons = [judged.untested["H1"]] if h1 is None else []
    if h1 is not None and not holds("H1"):
        reasons.append(f"it is open whether the domain is kept ({h1.estimate:.0%}, 95% [{h1.low:.0%}, {h1.high:.0%}])")
    if not holds("H2"):
        reasons.append(f"the difference to the task adapter alone may lie on either side of the margin ({size})")
    elif holds("H3"):
        reasons.append(f"composed answers better than the task adapter alone ({size})")
    return "undecided", f"Undecided: {'; '.join(reasons)}."
