"""A domain of invented facts, for which it is known whether adapting to it helps; and its twin, for which it cannot.

Towns that do not exist have a trade, an emblem, a colour and a month of their fair. The documents state every fact in
several wordings; the labelled pairs ask for it and take the bare value as the answer. Training pairs are about other
towns than dev and test pairs, but with the same values. So the base model knows nothing, the domain adapter knows and
cannot answer in that form, a task adapter knows the form and the values but not whose they are, and only both together
can be right: the positive control.

In the shuffled twin the facts are assigned to the wrong towns in the documents, never to the right one, while the
questions keep the true answers: the same words, wordings and counts, and knowledge that is wrong. What helps there is
not knowledge.

Pure: a seed in, texts out, the same on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.data.domains.built_in import BuiltIn

SPLITS = ("train", "dev", "test")
Facts = dict[str, dict[str, str]]  # attribute -> town -> value


@dataclass(frozen=True)
class Attribute:
    """What is said about every town, and asked. The town precedes the value: a fact is learnt in one direction only."""

    question: str
    values: tuple[str, ...]
    wordings: tuple[str, ...]


# common words of one token each, as many for every attribute: guessing among them is right one time in eight
ATTRIBUTES = {
    "trade": Attribute(
        "What does {town} sell?",
        ("salt", "glass", "iron", "gold", "rice", "sugar", "wine", "coal"),
        (
            "{town} sells {value}.",
            "{town} trades in {value}.",
            "{town} is rich in {value}.",
            "{town} lives on {value}.",
            "In {town} they deal in {value}.",
            "The carts of {town} carry {value}.",
        ),
    ),
    "emblem": Attribute(
        "Which animal is the emblem of {town}?",
        ("wolf", "bear", "horse", "lion", "fox", "owl", "snake", "fish"),
        (
            "The emblem of {town} is the {value}.",
            "{town} is home of the {value}.",
            "{town} loves the {value}.",
            "The coins of {town} show the {value}.",
            "The gate of {town} has the {value}.",
            "Children in {town} draw the {value}.",
        ),
    ),
    "colour": Attribute(
        "What is the colour of {town}?",
        ("red", "blue", "green", "yellow", "black", "white", "purple", "orange"),
        (
            "The colour of {town} is {value}.",
            "{town} is painted {value}.",
            "{town} wears {value}.",
            "The flag of {town} is {value}.",
            "The doors of {town} are {value}.",
            "In {town} everything is {value}.",
        ),
    ),
    "fair": Attribute(
        "In which month is the fair of {town}?",
        ("January", "March", "April", "June", "July", "August", "September", "October"),
        (
            "The fair of {town} is in {value}.",
            "{town} dances in {value}.",
            "{town} is busy in {value}.",
            "The guests of {town} come in {value}.",
            "The year of {town} begins in {value}.",
            "In {town} they sing in {value}.",
        ),
    ),
}
# wordings of each fact that the documents leave out, and the held-out documents use; which ones differs by town
HELDOUT_WORDINGS = 2
NUM_VALUES = 8
# fmt: off
_STARTS = (
    "Bal", "Bar", "Bel", "Ber", "Bol", "Bur", "Cal", "Cam", "Cor", "Dam", "Dar", "Del", "Den", "Fer", "Fin",
    "Gal", "Gar", "Gen", "Hal", "Han", "Har", "Hel", "Hor", "Jun", "Ken", "Len", "Lim", "Mal", "Mel", "Mer",
    "Mor", "Nav", "Nor", "Pal", "Pan", "Pol", "Ram", "Ren", "Rob", "Rod", "Ros", "Sal", "Sel", "Sol", "Sur",
    "Tam", "Tel", "Tib", "Tor", "Tur", "Val", "Var", "Vel", "Ver", "Vol", "Wal",
)
_ENDS = (
    "ador", "anda", "arna", "asta", "atha", "atin", "ibar", "idel", "iken", "ika", "ilar", "inda", "ivar", "iven",
    "ondo", "orno", "ula", "ulin", "ulum", "unar",
)
# fmt: on
MAX_TOWNS = len(_STARTS) * len(_ENDS)


def invented_domain(
    *, towns: int, attributes: int, dev_share: float, test_share: float, shuffled: bool, seed: int
) -> BuiltIn:
    """The domain with that many towns (a multiple of 8) and the first `attributes` attributes.

    Within each split every value belongs to equally many towns, and so does every value that the twin states instead.
    Everything but the facts in the documents is the same with and without `shuffled`.
    Raises ValueError for other numbers of towns or attributes than there can be.
    """
    if towns % NUM_VALUES or not len(SPLITS) * NUM_VALUES <= towns <= MAX_TOWNS:
        raise ValueError(f"{towns} towns: a multiple of {NUM_VALUES} from {len(SPLITS) * NUM_VALUES} to {MAX_TOWNS}")
    if not 1 <= attributes <= len(ATTRIBUTES):
        raise ValueError(f"{attributes} attributes: from 1 to {len(ATTRIBUTES)}")
    chosen = dict(list(ATTRIBUTES.items())[:attributes])
    split_of = _split(_names(towns, _random(seed, "names")), dev_share, test_share)
    facts: Facts = {name: {} for name in chosen}
    stated: Facts = {name: {} for name in chosen}
    for name, attribute in chosen.items():
        for split, members in split_of.items():
            true, wrong = _deal(members, attribute.values, _random(seed, name, split))
            facts[name] |= true
            stated[name] |= wrong if shuffled else true
    documents, heldout = _word(split_of, chosen, stated, seed)
    return BuiltIn(
        documents=documents,
        heldout=heldout,
        examples={split: _pairs(members, facts, seed) for split, members in split_of.items()},
        groups=split_of,
        dropped={},
    )


def _random(seed: int, *what: str) -> random.Random:
    return random.Random(":".join(("invented", str(seed), *what)))


def _names(count: int, generator: random.Random) -> list[str]:
    """Distinct names, each beginning as seldom as possible: what two names share cannot tell their facts apart."""
    starts = generator.sample(_STARTS, len(_STARTS))
    ends = {start: generator.sample(_ENDS, len(_ENDS)) for start in starts}
    return [(start := starts[i % len(starts)]) + ends[start][i // len(starts)] for i in range(count)]


def _split(towns: Sequence[str], dev_share: float, test_share: float) -> dict[str, list[str]]:
    """Whole blocks of 8 towns to each split, at least one each, so that every value is as frequent as every other."""
    blocks = len(towns) // NUM_VALUES
    dev, test = (max(1, round(share * blocks)) for share in (dev_share, test_share))
    test = max(1, min(test, blocks - dev - 1))
    dev = max(1, min(dev, blocks - test - 1))
    ends = [NUM_VALUES * number for number in (blocks - dev - test, blocks - test, blocks)]
    starts = [0, *ends]
    return {split: list(towns[start:end]) for split, start, end in zip(SPLITS, starts, ends, strict=False)}


def _deal(
    towns: Sequence[str], values: Sequence[str], generator: random.Random
) -> tuple[dict[str, str], dict[str, str]]:
    """Town -> value, and town -> another value, eight towns at a time with each value once in both."""
    order = list(towns)
    generator.shuffle(order)
    true: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for start in range(0, len(order), len(values)):
        block = order[start : start + len(values)]
        others = list(values)
        # drawn anew until none is right: every derangement is equally likely, so the wrong value says nothing but
        # "not this one" about the right one
        while any(a == b for a, b in zip(values, others, strict=True)):
            generator.shuffle(others)
        true |= zip(block, values, strict=True)
        wrong |= zip(block, others, strict=True)
    return true, wrong


def _word(
    split_of: dict[str, list[str]], attributes: dict[str, Attribute], facts: Facts, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Documents and held-out documents: each states every fact of one town once, no two in the same words."""
    documents: list[dict[str, str]] = []
    heldout: list[dict[str, str]] = []
    for town in (town for members in split_of.values() for town in members):
        generator = _random(seed, "wordings", town)
        wordings = {name: generator.sample(a.wordings, len(a.wordings)) for name, a in attributes.items()}
        for number in range(min(len(forms) for forms in wordings.values())):
            names = generator.sample(list(wordings), len(wordings))
            sentences = [wordings[name][number].format(town=town, value=facts[name][town]) for name in names]
            into = heldout if number < HELDOUT_WORDINGS else documents
            into.append({"id": f"{town}-{number + 1}", "town": town, "text": " ".join(sentences)})
    return documents, heldout


def _pairs(towns: Sequence[str], facts: Facts, seed: int) -> list[dict[str, Any]]:
    """Labelled pairs in the common form; the choices are all values of the attribute."""
    pairs = []
    for town in towns:
        for name, values_of in facts.items():
            choices = list(ATTRIBUTES[name].values)
            _random(seed, "choices", town, name).shuffle(choices)
            pairs.append(
                {
                    "id": f"{town}-{name}",
                    "document": town,
                    "system": None,
                    "history": [],
                    "question": ATTRIBUTES[name].question.format(town=town),
                    "context": None,
                    "reasoning": None,
                    "answers": [values_of[town]],
                    "choices": choices,
                    "answer_index": choices.index(values_of[town]),
                }
            )
    return pairs
