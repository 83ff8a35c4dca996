"""The comparison for a terminal."""

from __future__ import annotations

import textwrap
from typing import Any

from utils.evaluation.learning_curve import curve
from utils.evaluation.one_adapter import ANSWERS, NATS

COLUMNS = (
    ("domain_ppl", "held-out ppl", "{:.2f}"),
    ("corpus_ppl", "corpus ppl", "{:.2f}"),
    ("general_ppl", "general ppl", "{:.2f}"),
    ("answer_nll", "answer NLL", "{:.3f}"),
    ("em", "exact match", "{:.3f}"),
    ("f1", "token F1", "{:.3f}"),
    ("chrf", "chrF", "{:.3f}"),
    ("rouge_l", "ROUGE-L", "{:.3f}"),
    ("json_valid", "valid JSON", "{:.3f}"),
    ("field_f1", "field F1", "{:.3f}"),
    ("choice_accuracy", "choice acc.", "{:.3f}"),
    ("choice_accuracy_per_token", "per token", "{:.3f}"),
)
# a person's own metric, where one decides
OWN = "own_metric"
SAMPLES = 3


TRAINED_ON = {
    "domain": "Composed's task adapter was trained on the domain adapter.",
    "base": "Composed's task adapter was trained on the base.",
    "domain_ready": "Composed's task adapter was trained on the base, with the domain adapter on in half of the steps.",
    "elsewhere": "Composed's task adapter is external.",
}


def counted(number: int, what: str) -> str:
    """3 documents, 1 document."""
    return f"{number} {what}{'s' * (number != 1)}"


def table(results: dict[str, Any]) -> str:
    """The matrix, the contrasts, the verdict and a few answers."""
    cells = results["cells"]
    own = [(OWN, results["primary"]["title"][:13], "{:.3f}")] if results.get("primary") else []
    columns = [column for column in (*COLUMNS, *own) if any(column[0] in cell for cell in cells.values())]
    first = max(10, *(len(name) + 2 for name in cells))
    lines = ["", " " * first + "".join(f"{title:>14}" for _, title, _ in columns)]
    for name, numbers in cells.items():
        row = (f"{form.format(numbers[key]) if key in numbers else '-':>14}" for key, _, form in columns)
        lines.append(f"{name:<{first}}" + "".join(row))
    for cell, report in ((results.get("task") or {}).get("cells") or {}).items():
        ends = report["interval"]
        lines.append(
            f"  macro F1 of {cell}: {report['macro_f1']:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")
        )
    lines += ["", *textwrap.wrap(_about(results), 110), ""]
    unit = (results.get("primary") or {}).get("unit", NATS)
    for name, contrast in results["contrasts"].items():
        lines.append(f"  {name} {contrast['claim']}: {'yes' if contrast['holds'] else 'not shown'}")
        lines.append(f"     {_interval(name, contrast, unit)}")
    for name, why in results["untested"].items():
        lines.append(f"  {name} not tested: {why}")
    lines += ["", *textwrap.wrap(results["sentence"], 110)]
    changes = {what: change for what, change in results.get("changes", {}).items() if what != ANSWERS}
    for what, change in changes.items():
        lines += ["", f"  {what}, base minus {results['alone']}:", f"     {_interval(what, change, NATS)}"]
    if retrieval := results.get("retrieval"):
        lines += ["", *textwrap.wrap(retrieval["sentence"], 110), *_costs(retrieval)]
    if judge := results.get("judge"):
        lines += ["", *textwrap.wrap(judge["sentence"], 110)]
    if results["contamination"]:
        lines += ["", *results["contamination"]["lines"]]
    if rest := results["contamination"].get("without_flagged"):
        lines += textwrap.wrap(f"Without the flagged items ({rest['items']} are left): {rest['sentence']}", 110)
    if more := curve.lines(results):
        lines += ["", *more, ""]
    for caution in results["cautions"]:
        lines += textwrap.wrap(caution, 110, initial_indent="  * ", subsequent_indent="    ")
    for sample in (results["examples"].get("won") or [])[:SAMPLES]:
        lines += ["", f"Q: {textwrap.shorten(sample['question'], 160)}", f"  {'gold':<9} {sample['gold']}"]
        lines += [f"  {cell:<9} {textwrap.shorten(text, 160) or '(empty)'}" for cell, text in sample["said"].items()]
    return "\n".join(lines)


def _about(results: dict[str, Any]) -> str:
    sentences = [results["task"]["sentence"]] if "task" in results else []
    if results["test_items"]:
        of = counted(results["test_documents"], "document")
        sentences.append(f"{counted(results['test_items'], 'test question')} about {of}.")
    if composition := results.get("composition"):
        weights = composition["recipe"]["weights"]
        how = f"weights {tuple(weights)}" if weights else "weights of 1"
        chosen = "chosen on dev" if composition["searched"] else "not chosen on dev"
        sentences.append(f"Composed by {composition['recipe']['method']} with {how} ({chosen}).")
    if alone := results.get("alone"):
        sentences.append(f"The {alone} adapter is judged against the base model: there is no other to compose it with.")
    else:
        sentences.append(TRAINED_ON[results["task_trained_on"]])
    if "task" in results["cells"] and not alone:
        sentences.append("The task row was trained on the base.")
    primary = results.get("primary") or {}
    if primary.get("name", "answer_nll") != "answer_nll":
        decided = "T1 is decided on" if alone else "H2 to H4 are decided on"
        margin = "" if alone else f", with a margin of {primary['margin']:g}"
        sentences.append(f"{decided} {primary['title']}{margin}.")
    return " ".join([*sentences, f"Seeds: {len(results['seeds'])}."])


def _costs(retrieval: dict[str, Any]) -> list[str]:
    """What an answer takes in each row that was asked with and without passages."""
    lines = []
    for name, cost in retrieval["costs"].items():
        taken = "" if cost["seconds"] is None else f", {cost['seconds']:.2f} s"
        lines.append(f"  {name}: {cost['prompt_tokens']:.0f} prompt tokens an answer{taken}")
    return lines


def _interval(name: str, interval: dict[str, Any], unit: str) -> str:
    form = (lambda x: "?" if x is None else f"{x:.0%}") if name == "H1" else lambda x: "?" if x is None else f"{x:+.3f}"
    unit = "" if name == "H1" else f" {unit}"
    return (
        f"{form(interval['estimate'])}{unit}  95% [{form(interval['low'])}, {form(interval['high'])}]  "
        f"p {interval.get('p_holm', interval['p']):.3g}{' (Holm)' if 'p_holm' in interval else ''}, "
        f"could have seen {form(interval['detectable'])}"
    )
