"""Train the task adapter: LoRA on the labelled pairs, loss on the answer and its end-of-turn token only.

By default it is trained on the frozen domain adapter (--task.on domain); --task.on domain_ready switches that one on
or off at random each step, so that the result works with and without it; --task.on base trains the independent adapter
that is the fair baseline in the evaluation. Reads the newest prepared data and domain run; writes models/task/<run>/.
Killed at any moment, the same command goes on from the last checkpoint.

    accelerate launch scripts/train_task_adapter.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config
from utils import cli

SECTIONS = ("task", "base", "inputs", "run")
MOST_USED = ("task.on", "task.lora.rank", "task.train.learning_rate", "task.train.epochs", "inputs.domain_adapter")


def main(config: Config) -> dict[str, Any]:
    """Base model, frozen domain adapter, fresh task adapter, bucketed pairs, training loop, artefact."""
    from utils.adapters import adapter_files, find, peft_model
    from utils.data import batches
    from utils.data.batches import BucketedPairs, check_usable, tokenise_pairs
    from utils.data.prepared import Prepared
    from utils.models import chat
    from utils.planning import preflight
    from utils.training import training_run

    base = preflight.start(config, stage="task")
    data = find.prepared_run(config, base)
    domain = find.domain_run(config, base) if config.task.on != "base" else None
    shared = training_run.training_identity(config, "task", base, data, system_prompt=config.task.system_prompt)
    identity = {**shared, "on": config.task.on, "domain_adapter": domain.digest if domain else None}
    if config.task.prompt_loss_weight:  # left out at 0, which is what adapters of before have
        identity["prompt_loss_weight"] = config.task.prompt_loss_weight

    def build() -> tuple[Any, Any, list[Any], dict[str, Any]]:
        source, settings, seed = Prepared(data.directory), config.task.train, config.run.seed
        tokenizer = chat.load_tokenizer(base.directory)
        pad = chat.pad_id(tokenizer)
        prompt, longest = config.task.system_prompt, settings.sequence_tokens
        pairs, report = tokenise_pairs(source.examples("train"), tokenizer, prompt, longest)
        check_usable(report, config.task.max_unusable_share, longest)
        dev_pairs, _ = tokenise_pairs(source.examples("dev"), tokenizer, prompt, longest)
        dev = batches.dev_batches(BucketedPairs(dev_pairs, settings, 0, pad), settings)
        model, frozen = training_run.load_base(config, "task", base), []
        if domain:
            model, frozen = peft_model.add(model, "domain", adapter_files.load(domain.adapter, base)), ["domain"]
        model = training_run.new_adapter(model, "task", config.task.lora, seed, frozen)
        facts = {
            "usable": report.usable,
            "answer_does_not_fit": report.answer_does_not_fit,
            "contexts_shortened": report.contexts_shortened,
        }
        trained = BucketedPairs(pairs, settings, seed, pad, prompt_loss_weight=config.task.prompt_loss_weight)
        return model, trained, dev, facts

    def each_step(model: Any, step: int | None) -> list[str]:
        if config.task.on == "domain_ready":
            on = ["domain", "task"] if training_run.domain_is_on(config.run.seed, step) else ["task"]
            peft_model.activate(model, on, trainable="task")
            return on
        return ["domain", "task"] if domain else ["task"]

    parents = [data, domain] if domain else [data]
    facts = {"system_prompt": config.task.system_prompt}
    return training_run.train_adapter(config, "task", base, identity, parents, build, each_step, **facts)


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    from utils.planning import dry_run

    train, lora = config.task.train, config.task.lora
    below = {
        "domain": "the newest domain adapter, frozen",
        "domain_ready": "the newest domain adapter, frozen and on in half of the steps",
        "base": "the base model alone",
    }[config.task.on]
    return [
        *dry_run.lines(config, "train_task_adapter"),
        f"load {config.base.source} and the newest prepared data under {config.run.data_dir / 'prepared'}",
        f"train LoRA rank {lora.rank} on {', '.join(lora.target_modules)} on {below}, for {train.epochs} epochs, "
        f"answers only, at most {train.sequence_tokens} tokens a pair",
        f"write {config.run.models_dir / 'task'}/{config.run.name or config.preset + '-<fingerprint>'}/adapter",
    ]


if __name__ == "__main__":
    cli.run(main, plan, sections=SECTIONS, most_used=MOST_USED, description=__doc__)
