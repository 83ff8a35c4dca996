"""The proof: does the adaptation help? Base, domain, task and composed on held-out data, with a verdict.

The task row is always an adapter trained on the base with the same data and settings, whatever the composed model's
task adapter was trained on. Four contrasts are tested (keeps the domain, no worse, better, better than with a wrong
domain); the fourth needs --evaluate.controls, which trains them. A task or a domain adapter alone is judged against
the base model; --evaluate.matrix judges every pair of several. Reads the newest composed run and what it was made of,
or the newest task run and the runs it belongs to, and their test data; writes models/evaluation/<run>/ with
report.html, results.json and every item's scores. Interrupted, it goes on.

    python scripts/evaluate.py --evaluate.controls
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config, run_label
from utils import cli

SECTIONS = ("evaluate", "compose", "inference", "inputs", "base", "run")
MOST_USED = (
    "evaluate.controls",
    "evaluate.seeds",
    "evaluate.primary",
    "evaluate.also",
    "compose.weights",
    "inference.engine",
)


def main(config: Config) -> dict[str, Any]:
    """Find or make what belongs together, score every cell, conclude, write down, show."""
    from utils import logger
    from utils.adapters import adapter_tokenizer, unmeant_base
    from utils.artifacts import files, runs
    from utils.evaluation import comparison, run_groups, scored_rows
    from utils.evaluation.evaluation_identity import evaluation_identity
    from utils.evaluation.learning_curve import curve_runs
    from utils.evaluation.matrix import matrix_runs
    from utils.evaluation.report import evaluation_report
    from utils.evaluation.report.summary_table import table
    from utils.models import turn_format
    from utils.models.parallel import sharding
    from utils.planning import preflight

    if matrix_runs.is_asked(config):
        return _matrix(config)
    base = preflight.start(config, reads=unmeant_base.ADAPTERS)
    parts = run_groups.gather(config, base)
    base = adapter_tokenizer.with_chosen(base, parts.runs())
    supports = scored_rows.row_supports(config, base, parts)
    curve = curve_runs.gather(config, base, parts) if config.evaluate.learning_curve else None
    turn = turn_format.deciding(adapter_tokenizer.of(base))
    identity = evaluation_identity(config, base, parts, supports, turn, curve)
    directory = runs.directory_for(config.run.models_dir, "evaluation", config.run.name, run_label(config), identity)

    def fill() -> dict[str, Any]:
        results = comparison.compare(config, base, parts, directory, curve)
        files.write_json(directory / "results.json", results)
        files.write_text(directory / "summary.txt", table(results) + "\n")
        evaluation_report.write(directory, results, parts.runs(), parts.composed.run if parts.composed else None)
        facts = {"measured": results["measured"], "test": results["reads"]["test"]}
        facts["rows"] = {name: support.to_json() for name, support in supports.items()}
        return runs.manifest(
            "evaluation",
            identity,
            base=base.record(),
            parents=[*parts.runs(), *(curve.runs() if curve else [])],
            **facts,
            **sharding.loaded(),
        )

    _, is_there = runs.make(directory, identity, "the evaluation", fill)
    if is_there:
        logger.event("this comparison is already complete", path=directory)
    results = files.read_json(directory / "results.json")
    runs.mark_latest(config.run.models_dir, "evaluation", directory)
    print(table(results))
    shown = ("verdict", "sentence", "primary", "contrasts", "untested", "composition", "learning_curve", "test_items")
    shown = (*shown, "left_out")
    return {
        "report": str(directory / "report.html"),
        "run": str(directory),
        "reused": is_there,
        **{key: results[key] for key in shown if key in results},
        "cells": {
            cell: {key: value for key, value in numbers.items() if key not in ("meaning", "intervals", "seeds")}
            for cell, numbers in results["cells"].items()
        },
    }


def _matrix(config: Config) -> dict[str, Any]:
    """Every pair of several domain and task adapters."""
    from utils import logger
    from utils.adapters import adapter_tokenizer, unmeant_base
    from utils.artifacts import files, runs
    from utils.evaluation.matrix import matrix, matrix_report, matrix_runs
    from utils.models import turn_format
    from utils.models.parallel import sharding
    from utils.planning import preflight

    matrix_runs.refuse_flags(config)
    base = preflight.start(config, reads=unmeant_base.ADAPTERS)
    members = matrix_runs.gather(config, base)
    base = adapter_tokenizer.with_chosen(base, members.runs())
    identity = matrix.identity_of(config, base, members, turn_format.deciding(adapter_tokenizer.of(base)))
    directory = runs.directory_for(config.run.models_dir, "evaluation", config.run.name, run_label(config), identity)

    def fill() -> dict[str, Any]:
        results = matrix.compare(config, base, members, directory)
        files.write_json(directory / "results.json", results)
        files.write_text(directory / "summary.txt", matrix.table(results) + "\n")
        matrix_report.write(directory, results)
        facts = {"measured": results["measured"], "test": results["reads"]["test"]}
        return runs.manifest(
            "evaluation", identity, base=base.record(), parents=members.runs(), **facts, **sharding.loaded()
        )

    _, is_there = runs.make(directory, identity, "the matrix", fill)
    if is_there:
        logger.event("this matrix is already complete", path=directory)
    results = files.read_json(directory / "results.json")
    print(matrix.table(results))
    page = str(directory / "report.html")
    return {"report": page, "run": str(directory), "reused": is_there, "pairs": results["matrix"]["pairs"]}


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    from utils.evaluation.costs import answering_cost, control_cost, curve_cost
    from utils.planning import dry_run

    name = config.run.name or run_label(config) + "-<fingerprint>"
    settings = config.evaluate
    if settings.matrix or settings.matrix_domain or settings.matrix_task:
        named = {"domain": settings.matrix_domain, "task": settings.matrix_task}
        taken = " and ".join(f"{', '.join(named[kind]) or f'every complete {kind} run'}" for kind in named)
        return [
            *dry_run.lines(config, "evaluate"),
            f"load {config.base.source} once with the adapters of {taken}",
            "score the base, each adapter and each pair that can be composed on the pair's own test data",
            f"write {config.run.models_dir / 'evaluation' / name}/report.html with a heat map, and results.json",
        ]
    trainings = [f"train what is missing for seeds {', '.join(map(str, settings.seeds))}"] if settings.seeds else []
    if settings.controls:
        trainings.append(
            "train what is missing of the controls: wrong-domain and random adapter, each with a task adapter on it, a "
            "task adapter of the ranks together, the baseline on the base"
        )
    trainings += control_cost.lines(settings, config.run)
    engine, count = config.inference.engine, settings.generated_answers
    server = "start vLLM" if engine == "vllm" else f"attach to {config.inference.engine_url}"
    answering = (
        [f"free that memory, {server}, and ask {count} test questions of every cell"] if engine != "local" else []
    )
    if settings.learning_curve:
        trainings += curve_cost.lines(config.run, settings.primary)
    return [
        *dry_run.lines(config, "evaluate"),
        *trainings,
        f"load {config.base.source} once and attach the newest domain, task and base-trained task adapters",
        "score every cell on the test pairs, the held-out documents and general text",
        *(
            [f"find passages ({settings.retrieval}), and score base, task and composed with them"]
            if settings.retrieval
            else []
        ),
        *([f"ask the judge at {settings.judge} about each pair of answers, twice"] if settings.judge else []),
        *answering,
        *answering_cost.lines(settings, config.run, config.inputs.prepared),
        f"write {config.run.models_dir / 'evaluation' / name}/report.html and results.json",
    ]


if __name__ == "__main__":
    cli.run(main, plan, sections=SECTIONS, most_used=MOST_USED, description=__doc__)
