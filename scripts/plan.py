"""Plan before loading: what the model is, what fits on which GPUs, how long it takes, and how to launch it.

Counts the model from its own config.json on the meta device, so no weight is read or fetched (MiniMax-M2's shapes are
known by heart where the hub cannot be reached); writes nothing.

    python scripts/plan.py --preset minimax_m2 --plan.gpus 8 --plan.gpu_memory_gib 80
    python scripts/plan.py --preset minimax_m2 --plan.gpu_memory_gib 141 --task.lora.experts true
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
    """Count, calculate, print."""
    from utils.artifacts import runs
    from utils.logger import event
    from utils.planning import plan_report, preflight

    sizes, base = preflight.exact(config.base, config.run.models_dir), preflight.loaded_dtype(config.base)
    base = plan_report.trained_in(config, sizes, base)
    tokens = plan_report.planned_tokens(config)
    prepared = runs.complete_runs(config.run.data_dir, "prepared")
    if prepared and not config.plan.domain_tokens:
        counts = prepared[0].manifest["counts"].get("documents", {}).get("corpus", {})
        tokens["domain"] = counts.get("tokens") or tokens["domain"]
        event("tokens of the newest prepared data", path=prepared[0].directory, tokens=tokens["domain"])
    lines, facts = plan_report.report(config, sizes, base, tokens)
    print("\n".join(lines))
    return facts


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    from utils.planning import dry_run

    counted = f"count {config.base.source} from its config.json on the meta device"
    return [*dry_run.lines(config, "plan"), counted, "write nothing"]


if __name__ == "__main__":
    cli.run(main, plan, sections=SECTIONS, most_used=MOST_USED, description=__doc__)
