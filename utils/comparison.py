"""The comparison that `scripts/evaluate.py` runs: which runs take part, the cells, the contrasts, the table."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from config import Config, InferenceSection, TrainSection
from utils import (
    adapter_files,
    base_model,
    chat,
    composing,
    evaluation,
    files,
    frozen_lora,
    generation,
    lineage,
    runs,
    stages,
    training,
)
from utils.base_model import BaseModel
from utils.composing import Composition
from utils.corpus.splits import hash_share
from utils.evaluation import DocumentScore, ItemScore
from utils.exceptions import ArtefactError, DataError, Problem
from utils.logger import event, warning
from utils.prepared import Prepared
from utils.runs import Run
from utils.statistics import Interval, ratio_interval
from utils.training_data import PackedDocuments

CELLS = ("base", "domain", "task", "composed")
CONTRASTS = ("base", "domain", "task")
WINDOW_TOKENS = 1024
SEEN_DOCUMENTS = 60


@dataclass(frozen=True)
class Participants:
    """The runs that are compared; `task` belongs to the composed model, `baseline` was trained on the base."""

    domain: Run | None
    task: Run
    baseline: Run | None
    data: Run
    composed: Composition | None

    def runs(self) -> list[Run]:
        made = self.composed.run if self.composed else None
        return [run for run in (self.domain, self.task, self.baseline, self.data, made) if run is not None]


def participants(config: Config, base: BaseModel) -> Participants:
    """The task run, its domain adapter, its data, and the fair baseline if it was trained."""
    domain, task = lineage.pair(config, base)
    data = lineage.data_of(config, base, [task])
    if data is None:
        raise ArtefactError(
            Problem(
                f"{task.directory} does not say which data it was trained on",
                fix="prepare data: scripts/prepare_data.py",
            )
        )
    composed = composing.composition(config, base) if domain else None
    return Participants(domain, task, _baseline(config, base, task), data, composed)


def identity(config: Config, base: BaseModel, parts: Participants) -> dict[str, Any]:
    """Everything that decides the numbers."""
    return {
        "stage": "evaluation",
        "base": base.digest,
        "runs": {run.manifest["kind"] + str(i): run.digest for i, run in enumerate(parts.runs())},
        "recipe": asdict(parts.composed.recipe) if parts.composed else None,
        "evaluate": config.evaluate.model_dump(mode="json"),
        "dtype": str(base_model.compute_dtype(config.base.dtype)),
        "seed": config.run.seed,
    }


def compare(config: Config, base: BaseModel, parts: Participants, directory: Path) -> dict[str, Any]:
    """Score every cell on the same tokens and compare composed with each of the others."""
    began = time.perf_counter()
    tokenizer = base_model.load_tokenizer(base.directory)
    prompt = parts.task.manifest["system_prompt"]
    source = Prepared(parts.data.directory)
    examples = source.examples("test")
    items, left_out = evaluation.questions(examples, tokenizer, prompt, config.evaluate.batch_tokens)
    if left_out:
        warning("test items that do not fit evaluate.batch_tokens are left out", count=len(left_out))
    if not items:
        raise DataError(Problem("no test item can be scored", len(left_out), "raise --evaluate.batch_tokens"))
    documents = _document_sets(config, parts, source, stages.pad_id(tokenizer))
    model, cells = _cells(config, base, parts)
    shown = _spread(examples, config.evaluate.generated_answers, config.run.seed)
    raw: dict[str, dict[str, Any]] = {}
    for cell, active in cells.items():
        path = directory / f"cell_{cell}.json"
        if not path.exists():  # a cell is written whole or not at all, so an interrupted evaluation goes on here
            frozen_lora.select(model, dict.fromkeys(active, 1.0))
            files.write_json(path, _score_cell(config, model, tokenizer, cell, items, documents, shown, prompt))
        raw[cell] = files.read_json(path)
    scores = {cell: [ItemScore(**score) for score in found["items"]] for cell, found in raw.items()}
    heldout = {cell: [DocumentScore(**score) for score in found["heldout"]] for cell, found in raw.items()}
    results: dict[str, Any] = {"cells": {}, "contrasts": {}}
    for cell in cells:
        results["cells"][cell] = evaluation.summary(scores[cell], heldout[cell])
        seen = [DocumentScore(**score) for score in raw[cell]["seen"]]
        if seen:
            results["cells"][cell]["corpus_ppl"] = evaluation.summary([], seen)["domain_ppl"]
    for other in CONTRASTS:
        if "composed" in scores and other in scores:
            interval = contrast(scores["composed"], scores[other], config.evaluate.resamples, config.run.seed)
            results["contrasts"][f"composed - {other}"] = asdict(interval)
    results["finding"] = finding(results["contrasts"])
    results["test_items"] = len(items)
    results["test_documents"] = len({item.document for item in items})
    results["left_out"] = len(left_out)
    if parts.composed:
        recorded = composing.record(parts.composed)
        results["composition"] = {key: recorded[key] for key in ("recipe", "exact", "searched")}
    results["task_trained_on"] = parts.task.manifest["identity"]["on"]
    results["samples"] = [
        {
            "question": chat.user_text(example),
            "gold": example["answers"][0],
            **{cell: raw[cell]["answers"][at] for cell in cells},
        }
        for at, example in enumerate(shown)
    ]
    results["measured"] = {
        "seconds": round(time.perf_counter() - began, 1),
        "peak_memory_bytes": training.peak_memory_bytes(),
    }
    return results


def contrast(ours: Sequence[ItemScore], others: Sequence[ItemScore], resamples: int, seed: int) -> Interval:
    """Paired difference of answer NLL per token, ours minus theirs (negative is better), by document."""
    if [i.name for i in ours] != [i.name for i in others]:
        raise ValueError("the cells were scored on different items")
    differences = [a.answer_nll - b.answer_nll for a, b in zip(ours, others, strict=True)]
    tokens = [float(a.answer_tokens) for a in ours]
    return ratio_interval(differences, tokens, [a.document for a in ours], resamples=resamples, seed=seed)


def finding(contrasts: dict[str, dict[str, Any]]) -> str:
    """One honest sentence about composed against the others, on answer NLL."""
    if not contrasts:
        return "nothing is composed without a domain adapter: `accelerate launch scripts/train_domain_adapter.py`"
    if "composed - task" not in contrasts:
        return "no fair baseline: train it with `accelerate launch scripts/train_task_adapter.py --task.on base`"
    better = [name.removeprefix("composed - ") for name, c in contrasts.items() if c["high"] < 0]
    worse = [name.removeprefix("composed - ") for name, c in contrasts.items() if c["low"] > 0]
    open_ones = [n for n in (k.removeprefix("composed - ") for k in contrasts) if n not in (*better, *worse)]
    parts = []
    if better:
        parts.append(f"better than {', '.join(better)}")
    if worse:
        parts.append(f"worse than {', '.join(worse)}")
    if open_ones:
        parts.append(f"not distinguishable from {', '.join(open_ones)}")
    return f"on answer NLL, composed is {' and '.join(parts)} (95% intervals, by document)"


def table(results: dict[str, Any]) -> str:
    """The comparison for a terminal."""
    columns = [
        ("domain_ppl", "held-out ppl", "{:.2f}"),
        ("corpus_ppl", "corpus ppl", "{:.2f}"),
        ("answer_nll", "answer NLL", "{:.3f}"),
        ("choice_accuracy", "choice acc.", "{:.3f}"),
        ("choice_accuracy_per_token", "acc. per token", "{:.3f}"),
    ]
    columns = [column for column in columns if any(column[0] in cell for cell in results["cells"].values())]
    lines = ["", f"{'':<10}" + "".join(f"{title:>16}" for _, title, _ in columns)]
    for cell, numbers in results["cells"].items():
        row = (f"{form.format(numbers[key]) if key in numbers else '-':>16}" for key, _, form in columns)
        lines.append(f"{cell:<10}" + "".join(row))
    lines += [
        "",
        f"{results['test_items']} test questions about {results['test_documents']} documents; "
        f"{_composed_by(results)}its task adapter was trained on the {results['task_trained_on']}; "
        "the task row was trained on the base.",
    ]
    for name, c in results["contrasts"].items():
        lines.append(f"  answer NLL, {name:<18} {c['estimate']:+.3f}   95% [{c['low']:+.3f}, {c['high']:+.3f}]")
    lines.append(f"  {results['finding']}")
    for sample in results["samples"]:
        lines += ["", f"Q: {textwrap.shorten(sample['question'], 160)}", f"  {'gold':<9} {sample['gold']}"]
        lines += [f"  {cell:<9} {textwrap.shorten(sample[cell], 160) or '(empty)'}" for cell in results["cells"]]
    return "\n".join(lines)


def _baseline(config: Config, base: BaseModel, task: Run) -> Run | None:
    """The adapter trained on the base with the same data, steps and settings as `task`; None when there is none."""
    regime = ("on", "domain_adapter")
    same = {key: value for key, value in task.manifest["identity"].items() if key not in regime}
    if task.manifest["identity"]["on"] == "base":
        return task
    for run in runs.complete_runs(config.run.models_dir, "task"):
        found = run.manifest["identity"]
        if found["on"] == "base" and {k: v for k, v in found.items() if k not in regime} == same:
            files.verify(run.directory)
            event("the task row is the adapter trained on the base", path=run.directory)
            return run
    warning("no task adapter trained on the base with the same settings: the task row is left out")
    return None


def _document_sets(config: Config, parts: Participants, source: Prepared, pad_id: int) -> dict[str, PackedDocuments]:
    settings = TrainSection(
        sequence_tokens=WINDOW_TOKENS, micro_batch_tokens=max(WINDOW_TOKENS, config.evaluate.batch_tokens)
    )
    found = {}
    for name, which, limit in (
        ("heldout", "heldout_documents", config.evaluate.max_heldout_documents),
        ("seen", "corpus", SEEN_DOCUMENTS),
    ):
        if not (parts.data.directory / which).is_dir():
            continue
        documents = source.documents(which)
        if limit and len(documents) > limit:
            ids = documents["id"][:]
            order = sorted(range(len(ids)), key=lambda i, ids=ids: hash_share(ids[i], config.run.seed))
            documents = documents.select(sorted(order[:limit]))
        found[name] = PackedDocuments(documents, settings, 0, pad_id)
    return found


def _cells(config: Config, base: BaseModel, parts: Participants) -> tuple[Any, dict[str, list[str]]]:
    """One loaded base with every adapter on it, and which are active in each cell."""
    adapters = {
        name: adapter_files.load(run.adapter, base)
        for name, run in (("domain", parts.domain), ("task", parts.baseline))
        if run is not None
    }
    if parts.composed:
        composing.say(parts.composed)
        adapters["composed"] = parts.composed.factors
    model = frozen_lora.attach(base_model.load_model(base, config.base), adapters)
    return model.eval(), {"base": [], **{name: [name] for name in adapters}}


def _composed_by(results: dict[str, Any]) -> str:
    if "composition" not in results:
        return ""
    recipe, searched = results["composition"]["recipe"], results["composition"]["searched"]
    weights = f"weights {tuple(recipe['weights'])}" if recipe["weights"] else "weights of 1"
    return f"composed by {recipe['method']} with {weights} ({'chosen on dev' if searched else 'untested'}), "


def _score_cell(
    config: Config,
    model: Any,
    tokenizer: Any,
    cell: str,
    items: Sequence[evaluation.Question],
    documents: dict[str, PackedDocuments],
    shown: Sequence[dict[str, Any]],
    prompt: str,
) -> dict[str, Any]:
    settings = config.evaluate
    pad, device = stages.pad_id(tokenizer), next(model.parameters()).device
    scored = evaluation.score_questions(
        model, items, batch_tokens=settings.batch_tokens, pad_id=pad, device=device, what=f"{cell}: questions"
    )
    found: dict[str, Any] = {"items": evaluation.to_json(scored), "heldout": [], "seen": []}
    for name, packed in documents.items():
        found[name] = evaluation.to_json(
            evaluation.score_documents(
                model, packed, batch_tokens=settings.batch_tokens, device=device, what=f"{cell}: {name} documents"
            )
        )
    how = InferenceSection(max_new_tokens=settings.max_new_tokens)  # greedy, with the evaluation's own length
    found["answers"] = (
        [chat.spoken(text) for text in generation.answer_all(model, tokenizer, shown, prompt, how)] if shown else []
    )
    event(f"{cell} scored", answer_nll=evaluation.summary(scored, [])["answer_nll"])
    return found


def _spread(examples: Sequence[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """Examples to show, chosen by hash and from different documents first: by rule, not by hand."""
    order = sorted(examples, key=lambda e: hash_share(str(e["id"]), seed))
    firsts = list({e["document"]: e for e in reversed(order)}.values())[::-1]
    rest = [e for e in order if not any(e is f for f in firsts)]
    return [*sorted(firsts, key=lambda e: hash_share(str(e["id"]), seed)), *rest][:count]
