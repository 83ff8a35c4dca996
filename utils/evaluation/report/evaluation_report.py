"""report.html: what an evaluation found, for people who decide whether the adaptation was worth it.

Made from results.json, the runs behind it and nothing else; one file that needs no network and no script. The numbers
are those of results.json: each stands in a `<data>` element with its exact value. What is said where is in
report.html.jinja; what is computed for it is here, and no number of an evaluation is.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.artifacts import files
from utils.artifacts.runs import Run
from utils.composition import pictures
from utils.evaluation import one_adapter
from utils.evaluation.report import interval_groups, report_facts, report_figures
from utils.evaluation.verdict import CLAIMS, LEVEL
from utils.html import numbers, pages

COMMAND = "scripts/evaluate.py"
# verdict -> its colour, and what it means for somebody who has to decide
WORDS = {
    "helps": ("good", "Composed keeps the domain, answers better, and does so because of this domain."),
    "coexists": (
        "calm",
        "Composed keeps the domain and answers no worse than the task adapter alone; more than that is not shown.",
    ),
    "interferes": ("bad", "One adapter spoils the other: composed is shown to be worse, or to have lost the domain."),
    "undecided": (
        "warn",
        "These data cannot tell; more of them would: test questions about more documents, held-out documents, seeds.",
    ),
}
# of one adapter without the other
ALONE: dict[str, dict[str, tuple[str, str]]] = {
    "": {},
    "task": {
        "helps": ("good", "The task adapter answers better than the base model. Nothing is composed: it is alone."),
        "hurts": ("bad", "The task adapter answers worse than the base model."),
    },
    "domain": {
        "helps": ("good", "The domain adapter knows more of these documents than the base model; it is alone."),
        "hurts": ("bad", "The domain adapter knows less of these documents than the base model."),
        "undecided": ("warn", "These data cannot tell; more held-out documents would."),
    },
}
GAIN = "gain in {title}{unit}; above 0 when {who} is the better"
# of results of before there was a choice
USUAL = {"name": "answer_nll", "title": "answer NLL", "unit": "nats per token"}
# what the sizes of a learning curve are counted in
SIZES = {"pairs": "training pairs"}
STYLES = {"domain": "domain", "task": "task", "composed": "composed"}


@dataclass(frozen=True)
class Measure:
    """A column: where its number is, how it reads, which way is better, and why it may be absent."""

    key: str
    title: str
    meaning: str
    form: Callable[[float], str]
    better: str = "low"
    absent: str = ""

    def of(self, cell: Mapping[str, Any]) -> float | None:
        if self.key in cell.get("format", {}):
            return cell["format"][self.key]
        return cell.get(self.key)

    def interval(self, cell: Mapping[str, Any]) -> list[float] | None:
        return cell.get("intervals", {}).get(self.key)


NO_HELDOUT = "the prepared data has no held-out documents"
NO_CORPUS = "the prepared data has no corpus"
NO_CHOICES = "the test questions come without choices"
NO_ANSWERS = "no answers were generated (--evaluate.generated_answers is 0)"
LIKELIHOODS = (
    Measure("answer_nll", "answer NLL", "loss of the gold answer, nats per token", numbers.nats),
    Measure("choice_accuracy", "choice accuracy", "the right choice is likeliest", numbers.share, "high", NO_CHOICES),
    Measure(
        "choice_accuracy_per_token",
        "choice accuracy by token",
        "the same by loss per token",
        numbers.share,
        "high",
        NO_CHOICES,
    ),
    Measure("domain_ppl", "held-out perplexity", "documents nobody trained on", numbers.perplexity, "low", NO_HELDOUT),
    Measure(
        "corpus_ppl",
        "corpus perplexity",
        "the domain adapter trained on these",
        numbers.perplexity,
        "low",
        NO_CORPUS,
    ),
    Measure("general_ppl", "general perplexity", "ordinary prose: forgetting", numbers.perplexity),
)
ANSWERS = (
    Measure("em", "exact match", "after SQuAD's normalisation", numbers.share, "high", NO_ANSWERS),
    Measure("f1", "token F1", "words shared with the gold answer", numbers.share, "high", NO_ANSWERS),
    Measure("ended", "ends by itself", "before the longest length", numbers.share, "high", NO_ANSWERS),
    Measure("repetitive", "repeats itself", "goes round in circles", numbers.share, "low", NO_ANSWERS),
    Measure("thinking_left", "thinking left", "reasoning inside the answer", numbers.share, "low", NO_ANSWERS),
    Measure("tokens", "length", "mean tokens", numbers.general, "", NO_ANSWERS),
)
# measured where the pairs are of such a kind, and no column otherwise
OF_KINDS = (
    Measure("chrf", "chrF", "character n-grams shared with the gold answer", numbers.share, "high"),
    Measure("rouge_l", "ROUGE-L", "words in the gold answer's order", numbers.share, "high"),
    Measure("json_valid", "valid JSON", "by the schema", numbers.share, "high"),
    Measure("field_f1", "field F1", "fields with their values", numbers.share, "high"),
)
LOSSES = (
    Measure("domain_nll", "held-out NLL", "nats per token", numbers.nats, "low", NO_HELDOUT),
    Measure("domain_nll_per_byte", "held-out NLL per byte", "nats per byte", numbers.nats, "low", NO_HELDOUT),
    Measure("corpus_nll", "corpus NLL", "nats per token", numbers.nats, "low", NO_CORPUS),
    Measure("general_nll", "general NLL", "nats per token", numbers.nats),
    Measure("end_of_turn_nll", "end of turn", "loss of ending there, nats", numbers.nats),
)
# a metric's name -> its column's, where they differ; and the column of a person's own
KEYS, OWN = {"exact_match": "em"}, "own_metric"
TILES = ("answer_nll", "f1", "choice_accuracy", "domain_ppl", "general_ppl")


def write(directory: Path, results: dict[str, Any], runs: Sequence[Run], composed: Run | None) -> Path:
    """report.html in the evaluation's directory. Raises ArtefactError when it cannot be written or a run is damaged."""
    target, identity = directory / "report.html", directory / "identity.json"
    settings = files.read_json(identity) if identity.exists() else {}
    files.write_text(target, page(directory.name, results, runs, composed, settings))
    return target


def page(
    name: str,
    results: Mapping[str, Any],
    runs: Sequence[Run],
    composed: Run | None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The page as text; `settings` is the evaluation's identity."""
    cells, primary, alone = results["cells"], results.get("primary") or USUAL, results.get("alone", "")
    colour, gloss = ALONE[alone].get(results["verdict"]) or WORDS[results["verdict"]]
    ours, curve = alone or "composed", results.get("learning_curve", {})
    return pages.render(
        "evaluation/report/report.html.jinja",
        title=f"{results['verdict'].capitalize()}: {name}",
        name=name,
        results=results,
        colour=colour,
        sentence=_without_word(results["sentence"], results["verdict"]),
        gloss=gloss,
        primary=primary,
        retrieval=interval_groups.retrieval(results, primary),
        task=interval_groups.task(results, (*LIKELIHOODS, *OF_KINDS, *ANSWERS)),
        tiles=tiles(cells.get(ours, {}), primary),
        ours=ours,
        untested=list(untested(results)),
        forests=forests(results),
        matrices=[
            ("What the models know", matrix(cells, LIKELIHOODS)),
            ("What they say when asked", matrix(cells, [*own_measure(primary), *of_kind(cells), *ANSWERS])),
            ("The same as losses", matrix(cells, LOSSES)),
        ],
        answers=next((cell["format"]["answers"] for cell in cells.values() if "format" in cell), 0),
        more_data=[
            report_figures.learning_curve(doubling, kind, SIZES.get(kind, f"tokens of {kind}"), curve["loss"])
            for kind, doubling in curve.get("kinds", {}).items()
        ],
        curves=[
            picture
            for kind, title in (("domain", "Domain adapter"), ("task", "Task adapters"))
            if (picture := report_figures.losses(title, report_facts.trained(runs, kind)))
        ],
        training=report_facts.training_rows(runs),
        search=_read(composed, "search.json"),
        interference=_read(composed, "interference.json"),
        pictures=pictures,
        composed=composed,
        data=report_facts.data_of(runs, alone),
        lineage=report_facts.lineage_rows(results, runs),
        settings={k: v for k, v in (settings or {}).items() if k in ("evaluate", "dtype", "seed")},
        figures=numbers,
        command=command,
        level=LEVEL,
    )


def tiles(composed: Mapping[str, Any], primary: Mapping[str, Any]) -> list[Measure]:
    """The figures on top of the page, that which decides first."""
    known = {measure.key: measure for measure in (*LIKELIHOODS, *OF_KINDS, *ANSWERS)}
    own = own_measure(primary)
    known |= {measure.key: measure for measure in own}
    first = own[0].key if own else KEYS.get(primary["name"], primary["name"])
    return [known[key] for key in dict.fromkeys((first, *TILES)) if key in known and key in composed]


def own_measure(primary: Mapping[str, Any]) -> list[Measure]:
    """The column of a person's own metric; none for one of ours."""
    if KEYS.get(primary["name"], primary["name"]) in {m.key for m in (*LIKELIHOODS, *OF_KINDS, *ANSWERS)}:
        return []
    return [Measure(OWN, primary["title"], "the metric that decides, your own", numbers.nats, "high")]


def of_kind(cells: Mapping[str, Any]) -> list[Measure]:
    """The columns that the kind of task adds."""
    return [measure for measure in OF_KINDS if any(measure.of(cell) is not None for cell in cells.values())]


def command(results: Mapping[str, Any], flag: str = "") -> str:
    """The command of this evaluation with one more flag."""
    typed = results.get("command") or COMMAND
    if "python " not in typed:  # as earlier results have it
        typed = f"python {typed}"
    return f"{typed} {flag}".strip() if flag.partition(" ")[0] not in shlex.split(typed) else typed


def untested(results: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """What the verdict does not rest on: the claim or the row, why, and the command that would test it."""
    controls = command(results, "--evaluate.controls")
    for name, why in results["untested"].items():
        yield {
            "what": f"{name}: {subject(results)} {CLAIMS[name]}",
            "why": why,
            "command": "" if name == "H1" else controls,
        }
    for cell, why in results["missing"].items():
        yield {"what": f"the row {cell}", "why": why, "command": ""}
    cells = results["cells"]
    if "composed" in cells and "rank_matched" not in cells and "H4" not in results["untested"]:
        why = "whether more rank alone would have done it"
        yield {"what": "a task adapter of the ranks together", "why": why, "command": controls}
    if len(results["seeds"]) < 2:
        why = "everything was trained once, so what another training run would give is not known"
        yield {"what": "other seeds", "why": why, "command": command(results, "--evaluate.seeds 1,2")}


def subject(results: Mapping[str, Any]) -> str:
    """What the claims are about."""
    return f"the {results['alone']} adapter" if results.get("alone") else "composed"


def forests(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups of intervals that share an axis: H1; H2 to H4; composed against every other row.

    Of one adapter alone: its claim; what else it changed against the base model.
    """
    contrasts, cells, primary = results["contrasts"], results["cells"], results.get("primary") or USUAL
    unit = "" if primary["unit"] in primary["title"] else f", {primary['unit']}"
    gained = GAIN.format(title=primary["title"], unit=unit, who=subject(results))
    if results.get("alone"):
        return _of_one(results, gained)
    others = [
        {
            "name": (other := key.removesuffix(" - composed")),
            "text": cells.get(other, {}).get("meaning", ""),
            "found": difference,
            "style": STYLES.get(other, "other"),
            **interval_groups.against(difference),
        }
        for key, difference in results["differences"].items()
    ]
    groups = (
        ("Is the domain kept?", "share of the domain adapter's gain that composed keeps", ["H1"], numbers.share),
        ("Are the answers better?", gained, [name for name in CLAIMS if name != "H1"], numbers.gain),
    )
    drawn = [
        interval_groups.group(title, axis, [_claim(name, contrasts[name]) for name in names if name in contrasts], form)
        for title, axis, names, form in groups
    ]
    drawn.append(interval_groups.group("Composed against every other row", gained, others, numbers.gain))
    return [group for group in drawn if group["rows"]]


def matrix(cells: Mapping[str, Any], measures: Sequence[Measure]) -> dict[str, Any]:
    """Cells by the measures that the data support, the best of each column, and why the others are absent."""
    shown = [m for m in measures if any(m.of(cell) is not None for cell in cells.values())]
    best = {}
    for measure in shown:
        values = [value for cell in cells.values() if (value := measure.of(cell)) is not None]
        if measure.better and len(set(values)) > 1:
            best[measure.key] = min(values) if measure.better == "low" else max(values)
    absent: dict[str, list[str]] = {}
    for measure in measures:
        if measure not in shown:
            absent.setdefault(measure.absent or "not measured", []).append(measure.title)
    return {"measures": shown, "best": best, "absent": absent, "cells": cells}


def _of_one(results: Mapping[str, Any], gained: str) -> list[dict[str, Any]]:
    """The claim of one adapter alone, and what else it changed, which is counted in nats."""
    alone, about = results["alone"], subject(results)
    documents = f"gain in NLL, nats per token; above 0 when {about} is the better"
    changed = [
        {
            "name": name,
            "text": "base minus adapter",
            "found": interval,
            "style": alone,
            **interval_groups.against(interval),
        }
        for name, interval in results["changes"].items()
        if name not in (one_adapter.ANSWERS, one_adapter.ABOUT[alone])
    ]
    claims = [_claim(name, interval, about) for name, interval in results["contrasts"].items()]
    titled = (
        ("Does it help?", gained if alone == one_adapter.TASK else documents, claims),
        ("What else it changed", documents, changed),
    )
    return [interval_groups.group(title, axis, rows, numbers.gain) for title, axis, rows in titled if rows]


def _claim(name: str, contrast: Mapping[str, Any], about: str = "composed") -> dict[str, Any]:
    holds = contrast["holds"]
    return {
        "name": name,
        "text": f"{about} {contrast['claim']}",
        "found": contrast,
        "style": "composed" if holds else "other",
        "filled": holds,
        "result": "shown" if holds else "not shown",
        "colour": "good" if holds else "warn",
    }


def _without_word(sentence: str, word: str) -> str:
    """The sentence without the verdict in front of it, which stands there already."""
    rest = sentence.removeprefix(f"{word.capitalize()}: ")
    return rest[:1].upper() + rest[1:]


def _read(run: Run | None, name: str) -> dict[str, Any] | None:
    path = run.directory / name if run else None
    return files.read_json(path) if path and path.exists() else None
