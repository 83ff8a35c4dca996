"""Prepare data: documents and labelled pairs in, counted and tokenised datasets out.

Reads what --data.* names (the documentation of the running Python by default); writes data/prepared/<run>/.

    python scripts/prepare_data.py --data.corpus my_docs/ --data.task my_pairs.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config, run_label, with_row_tokens
from utils import cli

if TYPE_CHECKING:
    from utils.models.base_model import BaseModel

SECTIONS = ("data", "base", "run")
MOST_USED = ("data.corpus", "data.task", "data.columns", "data.max_documents")
# characters of a prompt or an answer that are shown
MOST_SHOWN = 1200


def main(config: Config) -> dict[str, Any]:
    """Read, clean, split, tokenise, publish."""
    from utils import logger
    from utils.artifacts import runs
    from utils.data import prepared, prepared_identity
    from utils.data.labelled import labelled_pairs
    from utils.evaluation.lm_eval import lm_eval_tasks
    from utils.models import chat
    from utils.models.structure import model_class
    from utils.planning import base_checks, preflight

    base, prompt = preflight.start(config, loads_model=False), config.task.system_prompt
    base_checks.check(config, base, ("domain", "task"))
    base_checks.measured_rows(config, base, ("domain", "task"))
    identity = prepared_identity.identity(config.data, base, config.run.seed)
    directory = runs.directory_for(config.run.data_dir, "prepared", config.run.name, run_label(config), identity)
    has_task = config.data.task != prepared.NONE

    def harness_tasks(temporary: Path, counts: dict[str, Any]) -> None:
        counts[lm_eval_tasks.FOLDER] = lm_eval_tasks.write(
            temporary / lm_eval_tasks.FOLDER,
            prepared.Prepared(temporary).examples("test"),
            chat.load_tokenizer(base.directory),
            prompt,
            max_tokens=model_class.longest_row(base.directory, config.evaluate.batch_tokens),
            max_new_tokens=config.evaluate.max_new_tokens,
        )
        counts["memory"] = _memory(config, base, counts["sequence_tokens"])

    run, reused = prepared.make(
        config.data, base, config.run.seed, directory, identity, harness_tasks if has_task else None, config.task
    )
    if reused and has_task and not lm_eval_tasks.is_for(run.manifest["counts"], prompt):
        logger.warning("its tasks for lm-evaluation-harness use another system prompt", path=directory)
    runs.mark_latest(config.run.data_dir, "prepared", directory)
    print(summary(run.manifest["counts"]))
    if has_task and config.data.show:
        examples = prepared.Prepared(run.directory).examples("train")
        shown = labelled_pairs.shown(examples, chat.load_tokenizer(base.directory), prompt, config.data.show)
        print("\n".join(["", *(line for one in shown for line in as_seen(one))]))
    return {
        "stage": "prepared",
        "run": str(directory),
        "digest": run.digest,
        "reused": reused,
        **run.manifest["counts"],
    }


def summary(counts: dict[str, Any]) -> str:
    """The counts as a table for people, and what became of every file, page, column and row."""
    from utils.data.corpus.read_report import document_lines
    from utils.data.labelled import report as pair_report
    from utils.data.labelled import token_lengths

    lines = []
    for name, part in counts.get("documents", {}).items():
        if isinstance(part, dict) and "tokens" in part:
            lines.append(
                f"{name:<18} {part['documents']:>9,} documents {part['tokens']:>12,} tokens {part['bytes']:>13,} bytes"
            )
    lines += document_lines(counts.get("documents", {}))
    for name, part in counts.get("examples", {}).items():
        if isinstance(part, dict) and "examples" in part and "documents" in part:
            lines.append(f"task {name:<13} {part['examples']:>9,} examples of {part['documents']:,} documents")
    dropped = {
        **counts.get("documents", {}).get("read", {}).get("dropped", {}),
        **counts.get("examples", {}).get("dropped", {}),
    }
    lines += [f"dropped {number:,}: {why}" for why, number in dropped.items() if number]
    for report in counts.get("examples", {}).get("read", {}).values():
        lines += pair_report.lines(report["source"], report)
    lines += token_lengths.lines(counts.get("examples", {}).get("lengths", {}))
    if memory := counts.get("memory"):
        lines.append(f"memory of a step   {memory / 2**30:,.1f} GiB are predicted for the task adapter at that length")
    return "\n".join(lines)


def as_seen(shown: dict[str, str]) -> Iterator[str]:
    """One labelled pair for people, as the model will see it; what is long is cut in its middle."""
    yield f"--- pair {shown['id']}: prompt, then what is trained"
    for part in ("prompt", "answer"):
        text = shown[part]
        over = len(text) - MOST_SHOWN
        head, tail = text[: MOST_SHOWN // 2], text[-MOST_SHOWN // 2 :]
        text = f"{head}\n[... {over:,} characters ...]\n{tail}" if over > 0 else text
        yield from (f"{'  | ' if part == 'prompt' else '  > '}{line}" for line in text.strip("\n").split("\n"))


def _memory(config: Config, base: BaseModel, tokens: int) -> int | None:
    """Bytes that a training step of the task adapter is predicted to take on rows of this length."""
    from utils.planning import preflight

    memory = preflight.predicted(with_row_tokens(config, tokens), "task", base)
    return memory.total if memory else None


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    from utils.data import tables
    from utils.planning import dry_run

    name = config.run.name or run_label(config) + "-<fingerprint>"
    return [
        *dry_run.lines(config, "prepare_data"),
        f"read documents from {', '.join(config.data.corpus)} and labelled pairs from {config.data.task}",
        f"split by document with seed {config.run.seed}, drop duplicates and leaks, tokenise for {config.base.source}",
        f"write {config.run.data_dir / 'prepared' / name}/",
        *(f"but now it would stop: {problem.what}; {problem.fix}" for problem in tables.missing(config.data)),
    ]


if __name__ == "__main__":
    cli.run(main, plan, sections=SECTIONS, most_used=MOST_USED, description=__doc__)
