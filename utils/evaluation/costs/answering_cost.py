"""What answering every test question in every row and with every seed costs, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from config import LIKELIHOOD_METRICS, EvaluateSection, RunSection
from utils.artifacts import files, runs
from utils.exceptions import ArtefactError

# rows that are trained once for each seed: domain, task, composed, and composed's task adapter without its domain
TRAINED_ROWS, CONTROL_ROWS = 4, 3
# task and composed with passages; the base with them is there once
RETRIEVED_ROWS = 2


def lines(evaluate: EvaluateSection, run: RunSection, prepared: str = "") -> list[str]:
    """How many answers of how many tokens a dry run announces, and how long at the rate of the newest evaluation.

    Empty where the primary metric needs no answers. `prepared` names the data; empty is the newest.
    """
    if evaluate.primary in LIKELIHOOD_METRICS:
        return []
    seeds = 1 + len(evaluate.seeds)
    rows = 1 + seeds * (TRAINED_ROWS + CONTROL_ROWS * evaluate.controls) + len(evaluate.also)
    if evaluate.retrieval:
        rows += 1 + seeds * RETRIEVED_ROWS
    questions = _questions(run.data_dir, prepared)
    if questions is None:
        return [f"answer every test question in up to {rows} rows and seeds ({evaluate.primary} needs answers)"]
    answers = rows * questions
    sentence = (
        f"answer all {questions:,} test questions in up to {rows} rows and seeds ({evaluate.primary} needs answers): "
    )
    sentence += f"{answers:,} answers of at most {evaluate.max_new_tokens} tokens"
    if rate := _seconds_per_answer(run.models_dir):
        sentence += (
            f", about {answers * rate / 60:,.0f} minutes at the {rate:.2g} s an answer took in the newest evaluation"
        )
    return [sentence]


def _questions(data_dir: Path, prepared: str) -> int | None:
    """Test questions of prepared data; None where there are none yet."""
    try:
        directories = (
            [Path(prepared)] if prepared else [run.directory for run in runs.complete_runs(data_dir, "prepared")]
        )
        counts = files.read_manifest(directories[0]).get("counts", {}) if directories else {}
    except ArtefactError:
        return None
    number = counts.get("examples", {}).get("test", {}).get("examples")
    return number if isinstance(number, int) else None


def _seconds_per_answer(models_dir: Path) -> float | None:
    """As the newest evaluation that generated answers measured it."""
    for run in runs.complete_runs(models_dir, "evaluation"):
        measured = run.manifest.get("measured", {})
        if measured.get("answers"):
            return float(measured["answering_seconds"]) / measured["answers"]
    return None
