"""The verdict on every pair of a matrix, as `scripts/evaluate.py` shows it.

All pairs are one family of tests (Holm): at most one matrix in twenty says more than its data do, however many pairs it
has. H4 needs controls, which one pair's evaluation makes; so a pair that helps reads *coexists* here, with its gain.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from config import Config
from utils import flags
from utils.artifacts import files, runs
from utils.artifacts.identity import Identity
from utils.data.prepared import Prepared
from utils.evaluation import measures, test_reads, verdict
from utils.evaluation.intervals import holm
from utils.evaluation.matrix import matrix_scores
from utils.evaluation.matrix.matrix_runs import AdapterPair, MatrixRuns
from utils.evaluation.matrix.matrix_scores import BASE, DOCUMENTS, QUESTIONS, Scored, name_of
from utils.evaluation.metrics.primary import ANSWER_NLL
from utils.evaluation.verdict import Scores, Verdict
from utils.models import devices
from utils.models.base_model import BaseModel

Raw = Mapping[Scored, Mapping[str, Any]]


def identity_of(config: Config, base: BaseModel, members: MatrixRuns, turn: Mapping[str, Any]) -> Identity:
    """What decides a matrix's numbers; `turn` is what stands around answers (`turn_format.deciding`)."""
    section = config.evaluate
    scored = ("margin", "batch_tokens", "max_heldout_documents", "resamples")
    judged_tasks = [task for task in members.tasks if task.digest in members.metrics]
    metrics = {task.digest: members.metric_of(task) for task in judged_tasks}
    if any(metric.generates for metric in metrics.values()):
        scored = (*scored, "max_new_tokens")
    kinds = {task: kind.deciding() for task, kind in members.kinds.items() if kind.deciding()}
    searched = {name_of(pair): of for pair in members.pairs if not pair.why_empty and (of := members.search_of(pair))}
    return Identity.of(
        "evaluation",
        {
            "matrix": [[run.digest for run in members.domains], [run.digest for run in members.tasks]],
            "runs": [run.digest for run in members.runs()],
            "base": base.digest,
            "dtype": str(devices.compute_dtype(config.base.dtype)),
            "quantization": base.quantization,
            "evaluate": {name: getattr(section, name) for name in scored},
            "primary": {task: [one.recorded or one.name, one.margin] for task, one in metrics.items()},
            **({"task_kinds": kinds} if kinds else {}),
            **({"baseline_weights": searched} if searched else {}),
            "seed": config.run.seed,
            **turn,
            **base.deciding_tokenizer(),
        },
    )


def compare(config: Config, base: BaseModel, members: MatrixRuns, directory: Path) -> dict[str, Any]:
    """Score every pair and conclude. Returns what `results.json` holds."""
    began = time.perf_counter()
    reads = _reads(members, directory)
    weights = matrix_scores.baseline_weights(config, base, members, directory)
    raw = matrix_scores.scores(config, base, members, weights, directory)
    judged = _judged(config, members, raw, weights)
    metric = next(iter(members.metrics.values()), ANSWER_NLL)
    return {
        "matrix": {
            "domains": [_described(run) for run in members.domains],
            "tasks": [{**_described(run), "alone": _alone(members, run)} for run in members.tasks],
            "pairs": [_result(pair, judged.get(name_of(pair)), weights.get(name_of(pair))) for pair in members.pairs],
            "primary": metric.to_json(),
        },
        "cautions": _cautions(members, reads),
        "reads": reads,
        "command": flags.command(),
        "versions": runs.versions(),
        "measured": {
            "seconds": round(time.perf_counter() - began, 1),
            "peak_memory_bytes": devices.peak_memory_bytes(),
        },
    }


def table(results: Mapping[str, Any]) -> str:
    """For a terminal: one line for each pair, task by task."""
    matrix = results["matrix"]
    wide = max(len(one["name"]) for one in [*matrix["domains"], *matrix["tasks"]]) + 2
    head = f"{'task':<{wide}}{'domain':<{wide}}{'verdict':<12}{'gain over the task alone':<32}keeps of the domain"
    lines = ["", head]
    for pair in sorted(matrix["pairs"], key=lambda one: (one["task"], one["domain"])):
        start = f"{pair['task']:<{wide}}{pair['domain']:<{wide}}"
        if pair["why_empty"]:
            lines.append(f"{start}{'-':<12}{pair['why_empty']}")
            continue
        kept = _interval(pair["retention"], "{:.0%}") if pair["retention"] else "not tested"
        lines.append(f"{start}{pair['verdict']:<12}{_interval(pair['gain'], '{:+.3f}'):<32}{kept}")
    primary = matrix["primary"]
    lines += ["", f"Gains in {primary['title']}, {primary['unit']}. All pairs share one 5% level (Holm)."]
    for caution in results["cautions"]:
        lines += textwrap.wrap(caution, 110, initial_indent="  * ", subsequent_indent="    ")
    return "\n".join(lines)


def _judged(config: Config, members: MatrixRuns, raw: Raw, weights: Mapping[str, float]) -> dict[str, Verdict]:
    """The verdict on each pair, by its name, with p-values of one family over all of them."""
    how: dict[str, Any] = {"resamples": config.evaluate.resamples, "seed": config.run.seed}
    metrics = {name_of(pair): members.metric_of(pair.task) for pair in members.pairs if not pair.why_empty}
    single = {
        name_of(pair): verdict.judge(
            *_cells(members, pair, raw, weights),
            margin=metrics[name_of(pair)].margin,
            unit=metrics[name_of(pair)].unit,
            **how,
        )
        for pair in members.pairs
        if not pair.why_empty
    }
    together = holm({f"{name} {h}": one.p for name, v in single.items() for h, one in v.contrasts.items()})
    judged = {}
    for name, alone in single.items():
        shared = replace(alone, p_holm={h: together[f"{name} {h}"] for h in alone.contrasts})
        word, sentence = verdict.conclude(shared, metrics[name].margin, metrics[name].unit)
        judged[name] = replace(shared, verdict=word, sentence=sentence)
    return judged


def _cells(
    members: MatrixRuns, pair: AdapterPair, raw: Raw, weights: Mapping[str, float]
) -> tuple[dict[str, Scores], dict[str, Scores]]:
    """(answers, documents) of the rows that a pair is judged by."""
    rows = {BASE: BASE, "domain": name_of(pair.domain), "composed": name_of(pair)}
    if baseline := matrix_scores.baseline_row(members, pair, weights):
        rows["task"] = baseline
    questions = matrix_scores.questions_of(pair.task, members.data[pair.task.digest])
    metric = members.metric_of(pair.task)
    read = members.data.get(pair.domain.digest)
    answers, documents = {}, {}
    for cell, row in rows.items():
        if scored := raw.get(Scored(row, QUESTIONS, questions)):
            answers[cell] = metric.scores([scored])
        if scored := raw.get(Scored(row, DOCUMENTS, read.digest[:8])) if read else None:
            documents[cell] = measures.of_documents(scored["items"])
    return answers, documents


def _result(pair: AdapterPair, judged: Verdict | None, weight: float | None) -> dict[str, Any]:
    names = {"domain": pair.domain.directory.name, "task": pair.task.directory.name, "why_empty": pair.why_empty}
    if judged is None:
        return names
    contrasts = judged.to_json()
    return {
        **names,
        "verdict": judged.verdict,
        "sentence": judged.sentence,
        "gain": contrasts.get("H3"),
        "retention": contrasts.get("H1"),
        "contrasts": contrasts,
        "untested": judged.untested,
        "weights": list(pair.recipe.weights) or [1.0, 1.0],
        "baseline_weight": 1.0 if weight is None else weight,
        "method": pair.recipe.method,
        "composed_run": str(pair.composed.directory) if pair.composed else None,
    }


def _described(run: Any) -> dict[str, Any]:
    identity = run.manifest["identity"]
    return {
        "name": run.directory.name,
        "path": str(run.directory),
        "digest": run.digest,
        "on": identity.get("on"),
        "seed": identity.get("seed"),
    }


def _alone(members: MatrixRuns, task: Any) -> str:
    """What the task adapter alone is, for the reader."""
    baseline = members.baselines[task.digest]
    if baseline is None:
        return "none was trained on the base with the same settings: train it with --task.on base"
    return "itself" if baseline is task else f"{baseline.directory.name}, trained on the base with the same settings"


def _reads(members: MatrixRuns, directory: Path) -> dict[str, Any]:
    """Each pair's reading of its test split is counted. Returns the record of the split that was read most."""
    read = {**test_reads.NONE, "sentence": ""}
    for pair in members.pairs:
        if pair.why_empty:
            continue
        examples = Prepared(members.data[pair.task.digest].directory).examples("test")
        known = test_reads.record(
            directory.parent,
            test=test_reads.digest([str(e["id"]) for e in examples], [str(e["question"]) for e in examples]),
            composed=files.fingerprint([pair.domain.digest, pair.task.digest]),
            run=f"{directory.name}/{name_of(pair)}",
            primary=Path(members.metric_of(pair.task).name).name,
        )
        if known["reads"] >= read["reads"]:
            read = {**known, "sentence": test_reads.sentence(known)}
    return read


def _cautions(members: MatrixRuns, reads: Mapping[str, Any]) -> list[str]:
    judged = sum(not pair.why_empty for pair in members.pairs)
    notes = [str(reads["sentence"])]
    if judged > 1:
        notes.append(
            f"{judged} pairs were judged on the same test questions: the best of them looks better than it is. "
            "Evaluate the pair that you choose with --evaluate.controls, on questions that it was not chosen by."
        )
    if any(not pair.composed for pair in members.pairs if not pair.why_empty):
        notes.append(
            "Pairs that were never composed have weights of 1; python scripts/compose.py --compose.search chooses them."
        )
    return [sentence for sentence in notes if sentence]


def _interval(interval: Mapping[str, Any] | None, form: str) -> str:
    if not interval:
        return "not tested"
    ends = ", ".join("?" if interval[end] is None else form.format(interval[end]) for end in ("low", "high"))
    return f"{form.format(interval['estimate'])} [{ends}]"
