"""The proof: base, domain, task and composed on held-out data, side by side, with paired intervals.

The task cell is always an adapter trained on the base with the same data and settings (--task.on base), whatever
the composed model's task adapter was trained on. Reads the newest task run, the runs it belongs to and its test data;
writes models/evaluation/<run>/ with results.json and every item's scores. Interrupted, it goes on at the next cell.

    python scripts/evaluate.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config
from utils import cli

SECTIONS = ("evaluate", "compose", "inputs", "base", "run")


def main(config: Config) -> dict[str, Any]:
    """Find what belongs together, score every cell, compare, write down, show."""
    from utils import comparison, files, logger, runs, stages

    base = stages.start(config)
    parts = comparison.participants(config, base)
    identity = comparison.identity(config, base, parts)
    directory = runs.directory_for(config.run.models_dir, "evaluation", config.run.name, config.preset, identity)
    run = runs.open_run(directory, identity)
    if run is None:
        with files.locked(directory, "the evaluation"):
            with logger.to_file(directory / "run.log"):  # closed before the manifest takes the digest of the log
                runs.start(directory, identity)
                results = comparison.compare(config, base, parts, directory)
                files.write_json(directory / "results.json", results)
                files.write_text(directory / "summary.txt", comparison.table(results) + "\n")
            measured = results["measured"]
            facts = runs.manifest("evaluation", identity, base=base.record(), parents=parts.runs(), measured=measured)
            files.seal(directory, facts)
    else:
        logger.event("this comparison is already complete", path=directory)
    results = files.read_json(directory / "results.json")
    runs.mark_latest(config.run.models_dir, "evaluation", directory)
    print(comparison.table(results))
    shown = ("cells", "contrasts", "finding", "composition", "test_items", "left_out")
    return {"report": str(directory), "reused": run is not None, **{k: results[k] for k in shown if k in results}}


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    name = config.run.name or config.preset + "-<fingerprint>"
    return [
        f"load {config.base.source} once and attach the newest domain, task and base-trained task adapters",
        "score base, domain, task and composed on the test pairs and the held-out documents",
        f"write {config.run.models_dir / 'evaluation' / name}/results.json",
    ]


if __name__ == "__main__":
    cli.run(main, plan, sections=SECTIONS, description=__doc__)
