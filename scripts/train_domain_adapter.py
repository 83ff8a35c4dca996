"""Train the domain adapter: LoRA by next-token prediction on the unlabelled documents (DAPT).

Reads the newest prepared data; writes models/domain/<run>/ with adapter/, metrics.jsonl and manifest.json. Killed at
any moment, the same command goes on from the last checkpoint.

    accelerate launch --config_file scripts/launch/one_gpu.yaml scripts/train_domain_adapter.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config, run_label
from utils import cli

SECTIONS = ("domain", "base", "inputs", "run")
MOST_USED = (
    "domain.lora.rank",
    "domain.train.learning_rate",
    "domain.train.epochs",
    "domain.init_from",
    "inputs.prepared",
)


def main(config: Config) -> dict[str, Any]:
    """Base model, fresh adapter, packed documents, training loop, artefact."""
    from utils.exceptions import ConfigError, Problem
    from utils.training.domain_adapter import train_domain

    if config.overrides.get("inputs.domain_adapter") == "flag":
        what = "--domain_adapter is not read here: this trains one"
        raise ConfigError(Problem(what, config.inputs.domain_adapter, "to start from it: --domain.init_from PATH"))
    return train_domain(config)


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    from utils.planning import dry_run

    train, lora = config.domain.train, config.domain.lora
    return [
        *dry_run.lines(config, "train_domain_adapter"),
        f"load {config.base.source} and the newest prepared data under {config.run.data_dir / 'prepared'}",
        f"train LoRA rank {lora.rank} on {dry_run.targets(config, 'domain')} for {dry_run.passes(train)} of packed "
        f"rows of {train.max_sequence_tokens or 'as many as prepare_data chose'} tokens, "
        f"{train.batch_tokens:,} tokens a step over all processes",
        f"write {config.run.models_dir / 'domain'}/{config.run.name or run_label(config) + '-<fingerprint>'}/adapter",
    ]


if __name__ == "__main__":
    cli.run(main, plan, sections=SECTIONS, most_used=MOST_USED, description=__doc__, ranks="all")
