"""Plan before loading: what the model is, and for every stage the command, the memory of each GPU and the time.

Chooses micro-batch, recomputation, sharding and the form of the weights for the hardware of --plan, the cheapest for
the result first, and says why; where nothing fits it names hardware that does and ends with exit code 2. Counts the
model from its own config.json on the meta device, so no weight is read or fetched (MiniMax-M2's shapes are
built in, for when the hub cannot be reached); writes nothing.

    python scripts/plan.py --preset minimax_m2 --plan.gpus 8 --plan.gpu_memory_gib 80
    python scripts/plan.py --preset minimax_m2 --plan.gpu_memory_gib 141 --task.lora.experts true
    python scripts/plan.py --preset size_8b --base.source DIRECTORY --plan.gpus 1 --plan.gpu_memory_gib 16
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config
from utils import cli

SECTIONS = ("plan", "domain", "task", "base", "run")
MOST_USED = ("plan.gpus", "plan.nodes", "plan.gpu_memory_gib", "task.lora.experts")


def main(config: Config) -> dict[str, Any]:
    """Count, calculate, find a way, print. The exit code is 2 where there is none on this hardware."""
    from utils.artifacts import runs
    from utils.logger import event
    from utils.planning import plan_report, planned_data, preflight

    sizes = preflight.exact(config.base, config.run.models_dir)
    prepared = runs.complete_runs(config.run.data_dir, "prepared")
    counts = prepared[0].manifest["counts"] if prepared else None
    if prepared:
        event("counting with the newest prepared data", path=prepared[0].directory)
    lines, facts = plan_report.report(config, sizes, planned_data.of(config, counts))
    print("\n".join(lines))
    return facts


def status(result: dict[str, Any]) -> int:
    """2 where some stage cannot be done."""
    return 2 if result["verdict"] == "no" else 0


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    from utils.planning import dry_run

    counted = f"count {config.base.source} from its config.json on the meta device"
    return [*dry_run.lines(config, "plan"), counted, "write nothing"]


if __name__ == "__main__":
    cli.run(main, plan, status=status, sections=SECTIONS, most_used=MOST_USED, description=__doc__, ranks="first")
