"""An evaluation in a model card: `model-index` metadata as a hub reads it, and a section for people.

The format is the hub's own (huggingface/hub-docs, modelcard.md), written by its library. The numbers are those of the
composed row, measured with the adapters on the base model; no path of this machine gets into a card.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from utils.evaluation.evaluation_for_card import Evaluation

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# measure -> (what it was measured on, the hub's name of the metric, its name for people)
METRICS = {
    "answer_nll": ("test", "nll", "loss of the gold answer, nats per token"),
    "em": ("test", "exact_match", "exact match of generated answers"),
    "f1": ("test", "f1", "token F1 of generated answers"),
    "choice_accuracy": ("test", "accuracy", "accuracy by likelihood of the choices"),
    "choice_accuracy_per_token": ("test", "accuracy", "accuracy by likelihood per token of the choices"),
    "domain_ppl": ("heldout", "perplexity", "perplexity per token on held-out documents of the domain"),
    "general_ppl": ("general", "perplexity", "perplexity per token on general text (forgetting)"),
}
ROWS = {"base": "base model", "task": "task adapter alone", "composed": "**this**"}
_SECTION = re.compile(r"\n## Evaluation\n.*?(?=\n## |\Z)", re.DOTALL)
_HUB_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")


def with_evaluation(card: str, name: str, evaluation: Evaluation) -> str:
    """The card with the evaluation's numbers, instead of those of an earlier one; `name` is the model's."""
    from huggingface_hub import ModelCard

    model_card = ModelCard(_SECTION.sub("", card))
    model_card.data.model_name = re.sub(r"[^A-Za-z0-9._-]+", "-", name.rpartition("/")[2]).strip("-.") or "model"
    model_card.data.eval_results = eval_results(evaluation.results)
    return str(model_card).rstrip("\n") + "\n" + "\n".join(_section(evaluation)) + "\n"


def eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """The composed row of a results.json."""
    from huggingface_hub import EvalResult

    dataset, cell = results.get("dataset") or {}, results["cells"]["composed"]
    datasets = {
        "test": _dataset(dataset.get("task"), dataset.get("task_revision"), "test"),
        "heldout": _dataset(dataset.get("corpus"), dataset.get("corpus_revision"), "heldout"),
        "general": {"dataset_type": "text", "dataset_name": "general text"},
    }
    return [
        EvalResult(
            task_type="text-generation",
            **datasets[where],
            metric_type=metric,
            metric_name=title,
            metric_value=cell[key],
            metric_args={"interval_95": cell["intervals"][key]} if key in cell.get("intervals", {}) else None,
        )
        for key, (where, metric, title) in METRICS.items()
        if key in cell
    ]


def _dataset(source: Any, revision: Any, split: str) -> dict[str, Any]:
    """A dataset of the hub by its id, anything else by its last name: a path of this machine says nothing elsewhere."""
    sources = [source] if isinstance(source, str) else list(source or [])
    if revision and len(sources) == 1 and _HUB_DATASET.fullmatch(sources[0]):
        named, _, subset = sources[0].partition(":")
        facts = {"dataset_config": subset or None, "dataset_revision": revision, "dataset_split": split}
        return {"dataset_type": named, "dataset_name": named, **facts}
    named = ", ".join(PurePath(one).name for one in sources) or "not said"
    return {"dataset_type": "private", "dataset_name": named, "dataset_split": split}


def _section(evaluation: Evaluation) -> list[str]:
    results, run = evaluation.results, evaluation.run
    cells = {name: results["cells"][name] for name in ROWS if name in results["cells"]}
    measures = [key for key in METRICS if key in cells["composed"]]
    heads = [key.replace("_ppl", " perplexity").replace("_nll", " NLL").replace("_", " ") for key in measures]
    seeds = len(results["seeds"])
    dtype = str(run.manifest["identity"]["dtype"]).removeprefix("torch.")
    return [
        "",
        "## Evaluation",
        "",
        results["sentence"],
        "",
        f"| | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
        *(f"| {ROWS[name]} | {' | '.join(_figure(cell, key) for key in measures)} |" for name, cell in cells.items()),
        "",
        f"{results['test_items']} test questions about {results['test_documents']} documents, {seeds} training "
        f"seed{'' if seeds == 1 else 's'}; 95% intervals by document. Losses and perplexities: lower is better. "
        f"Measured with the adapters on the base model in {dtype}. "
        f"Evaluation `{run.directory.name}`, digest `{run.digest}`.",
    ]


def _figure(cell: dict[str, Any], key: str) -> str:
    if key not in cell:
        return "–"
    form = "{:.2f}" if key.endswith("_ppl") else "{:.3f}"
    ends = cell.get("intervals", {}).get(key)
    return form.format(cell[key]) + (f" [{form.format(ends[0])}, {form.format(ends[1])}]" if ends else "")
