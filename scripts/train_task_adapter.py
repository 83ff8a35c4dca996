"""Train the task adapter: LoRA on the labelled pairs, loss on the answer and its end-of-turn token only.

--task.on domain (the default) trains it on the frozen domain adapter. --task.on base trains on the base model: the
baseline of an evaluation. --task.on domain_ready switches the domain adapter on or off at random each step, for a task
adapter that must answer both with it and without it. --task.keep_domain keeps the domain meanwhile. Reads the newest
prepared data and domain run; writes models/task/<run>/. Killed at any moment, repeat the command: it resumes.

    accelerate launch --config_file scripts/launch/one_gpu.yaml scripts/train_task_adapter.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config, run_label
from utils import cli

SECTIONS = ("task", "base", "inputs", "run")
MOST_USED = (
    "task.on",
    "task.keep_domain",
    "task.lora.rank",
    "task.train.learning_rate",
    "task.train.epochs",
    "inputs.domain_adapter",
)


def main(config: Config) -> dict[str, Any]:
    """Base model, frozen domain adapter, fresh task adapter, bucketed pairs, training loop, artefact."""
    from utils.training.task_adapter import train_task

    return train_task(config)


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    from utils.planning import dry_run

    train, lora = config.task.train, config.task.lora
    below = {
        "domain": "the newest domain adapter, frozen",
        "domain_ready": "the newest domain adapter, frozen and on in half of the steps",
        "base": "the base model alone",
    }[config.task.on]
    share = f"{config.task.replay_share:.0%}"
    kept = {
        "off": [],
        "replay": [f"mix documents of the domain into every step, {share} of its tokens"],
        "kl": [f"hold the predictions on {share} of the prompts to those without the task adapter"],
        "auto": [
            f"after a quarter of the steps see whether less than {config.compose.domain_retention:.0%} of the domain's "
            f"gain is left on dev, and if so mix {share} of its documents in"
        ],
    }[config.task.keep_domain]
    return [
        *dry_run.lines(config, "train_task_adapter"),
        f"load {config.base.source} and the newest prepared data under {config.run.data_dir / 'prepared'}",
        f"train LoRA rank {lora.rank} on {dry_run.targets(config, 'task')} on {below}, for {dry_run.passes(train)}, "
        f"answers only, at most {train.max_sequence_tokens or 'as many as prepare_data chose'} tokens a pair",
        *kept,
        f"write {config.run.models_dir / 'task'}/{config.run.name or run_label(config) + '-<fingerprint>'}/adapter",
    ]


if __name__ == "__main__":
    cli.run(main, plan, sections=SECTIONS, most_used=MOST_USED, description=__doc__, ranks="all")
