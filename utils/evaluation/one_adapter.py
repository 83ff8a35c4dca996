"""Does one adapter help on its own? The task adapter by its answers, the domain adapter by held-out documents.

Where only one half was trained there is nothing to compose, and one claim is tested against the base model:

    T1  the task adapter answers better than the base model, by the primary metric
    D1  the domain adapter predicts held-out documents better than the base model

`helps`: the claim is shown. `hurts`: the opposite is. `undecided`: the data cannot tell. What else changed (documents
that were trained on, plain prose) is given with its interval and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from utils.evaluation.intervals import Interval
from utils.evaluation.verdict import LEVEL, Scores, Verdict, gain, tied

TASK, DOMAIN = "task", "domain"
CLAIM_OF = {TASK: "T1", DOMAIN: "D1"}
MEANING = {TASK: "the task adapter", DOMAIN: "the domain adapter"}
# what is scored of every model, as the report calls it
ANSWERS, HELD_OUT, OWN, PROSE = "answers", "held-out documents", "documents of the corpus", "plain prose"
ABOUT = {TASK: ANSWERS, DOMAIN: HELD_OUT}
MISSING = {TASK: "no test question has a value in the primary metric", DOMAIN: "there are no held-out documents"}
NATS = "nats per token"


def changes(
    base: Mapping[str, Scores], ours: Mapping[str, Scores], *, resamples: int, seed: int
) -> dict[str, Interval]:
    """Loss of the base minus the adapter's, for everything that both were scored on (ANSWERS, HELD_OUT ...).

    Answers in the primary metric, documents in NLL per token; above 0 the adapter is the better. Raises
    ValueError when both were scored on different items.
    """
    return {
        what: gain(base[what], ours[what], resamples=resamples, seed=seed) for what in base if len(base[what].clusters)
    }


def judge(
    which: str,
    gains: Mapping[str, Interval],
    base: Mapping[str, Scores],
    ours: Mapping[str, Scores],
    *,
    unit: str = NATS,
) -> Verdict:
    """The verdict on the adapter `which` (TASK or DOMAIN) from its `changes` against the base.

    `unit` is what gains in answers are counted in; those of documents are nats per token.
    """
    name, about = CLAIM_OF[which], ABOUT[which]
    if about not in gains:
        missing = MISSING[which]
        return Verdict("undecided", f"Undecided: {missing}.", {}, {}, {name: missing})
    if tied(base[about], ours[about]):
        missing = f"every answer of the base model and of the {which} adapter has the same value"
        return Verdict("undecided", f"Undecided: {missing}, so nothing is told apart.", {}, {}, {name: missing})
    claim, unit = gains[about], unit if which == TASK else NATS
    size = f"{claim.estimate:+.3f} {unit}, 95% [{claim.low:+.3f}, {claim.high:+.3f}]"
    contrasts, p = {name: claim}, {name: claim.p}
    if not np.isfinite(claim.low):
        what = {TASK: "the test questions are about", DOMAIN: "it was scored on"}[which]
        documents = f"{claim.clusters} {'held-out ' * (which == DOMAIN)}document{'s' * (claim.clusters != 1)}"
        sentence = f"Undecided: {what} {documents}, too few for an interval ({claim.estimate:+.3f} {unit})."
        return Verdict("undecided", sentence, contrasts, p, {})
    does = {TASK: "answers {} than the base model", DOMAIN: "predicts held-out documents {} than the base model"}[which]
    rest = _rest(which, gains, base)
    if claim.p < LEVEL:
        sentence = f"The {which} adapter helps: it {does.format('better')} ({size}){rest}."
        return Verdict("helps", sentence, contrasts, p, {})
    if claim.high < 0:
        sentence = f"The {which} adapter hurts: it {does.format('worse')} ({size}){rest}."
        return Verdict("hurts", sentence, contrasts, p, {})
    sentence = f"Undecided: the {which} adapter is not shown to be better or worse than the base model ({size}; "
    return Verdict("undecided", f"{sentence}{claim.detectable:.3f} could have been seen){rest}.", contrasts, p, {})


def _rest(which: str, gains: Mapping[str, Interval], base: Mapping[str, Scores]) -> str:
    """What it cost or brought besides: perplexity gained, kept and forgotten."""
    sentences = []
    if which == DOMAIN:
        sentences.append(f"perplexity {_perplexities(gains[HELD_OUT], base[HELD_OUT])}")
        if OWN in gains and gains[OWN].estimate > 0:
            kept = gains[HELD_OUT].estimate / gains[OWN].estimate
            sentences.append(f"{kept:.0%} of its gain on the documents it was trained on")
    for what in (HELD_OUT, PROSE):
        if what in gains and not (which == DOMAIN and what == HELD_OUT):
            change = gains[what]
            does = "gains" if change.estimate > 0 else "forgets"
            known = "" if change.low > 0 or change.high < 0 else ", which may be nothing"
            sentences.append(f"of {what} it {does} {_perplexities(change, base[what])} in perplexity{known}")
    return "".join(f"; {one}" for one in sentences)


def _perplexities(change: Interval, base: Scores) -> str:
    """28.30 to 14.96"""
    before = float(np.atleast_2d(base.loss_SN).mean(0).sum() / sum(base.weights))
    return " to ".join(f"{math.exp(min(nll, 700.0)):.2f}" for nll in (before, before - change.estimate))
