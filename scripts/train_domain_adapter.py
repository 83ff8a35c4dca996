"""Train the domain adapter: LoRA by next-token prediction on the unlabelled documents (DAPT).

Reads the newest prepared data; writes models/domain/<run>/ with adapter/, metrics.jsonl and manifest.json. Killed at
any moment, the same command goes on from the last checkpoint.

    accelerate launch --config_file scripts/launch/one_gpu.yaml scripts/train_domain_adapter.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config
from utils import cli

if TYPE_CHECKING:
    from utils.artifacts.runs import Run
    from utils.data.batches import Batch, PackedDocuments
    from utils.models.base_model import BaseModel

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
    from utils.adapters import adapter_files, find
    from utils.exceptions import ConfigError, Problem
    from utils.models.rows import row_probe
    from utils.planning import preflight
    from utils.training import training_identity, training_run
    from utils.training.schedules import AdapterSchedule

    if config.overrides.get("inputs.domain_adapter") == "flag":
        what = "--domain_adapter is not read here: this trains one"
        raise ConfigError(Problem(what, config.inputs.domain_adapter, "to start from it: --domain.init_from PATH"))
    base = preflight.start(config, stage="domain")
    data = find.prepared_run(config, base)
    initial = find.initial_run(config, base, "domain")
    rows = row_probe.measured(base, config.base)
    facts = training_identity.start_facts(initial) | rows.deciding("packing", "head")
    identity = training_identity.identity_of(config, "domain", base, data, **facts)
    parents = [data, *([initial] if initial else [])]
    with training_run.opened(config, "domain", base, identity, parents) as run:
        if run.complete:
            return training_run.result(run, reused=True)
        documents, dev = _documents(config, base, data, packs=rows.packs)
        model = training_run.load_base(config, "domain", base)
        start = adapter_files.load(initial.adapter, base) if initial else None
        model = training_run.new_adapter(model, "domain", config.domain.lora, config.run.seed, initial=start)
        outcome = training_run.train(run, model, documents, dev, AdapterSchedule("domain"))
        training_run.save(run, model, outcome)
        counts = data.manifest["counts"].get("documents", {})
        run = training_run.record(run, outcome, data=counts, rows=rows.to_json())
    return training_run.result(run, reused=False)


def _documents(config: Config, base: BaseModel, data: Run, *, packs: bool) -> tuple[PackedDocuments, list[Batch]]:
    """The documents that are trained on, packed or each in its row, and the dev batches; none without dev documents."""
    from utils.data import batches
    from utils.data.batches import PackedDocuments
    from utils.data.prepared import Prepared
    from utils.models import chat

    prepared, settings = Prepared(data.directory), config.domain.train
    pad = chat.pad_id(chat.load_tokenizer(base.directory))
    documents = PackedDocuments(prepared.documents("corpus"), settings, config.run.seed, pad, packs=packs)
    if not (data.directory / "dev_documents").is_dir():
        return documents, []
    dev = PackedDocuments(prepared.documents("dev_documents"), settings, 0, pad, packs=packs)
    return documents, batches.dev_batches(dev, settings)


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    from utils.planning import dry_run

    train, lora = config.domain.train, config.domain.lora
    return [
        *dry_run.lines(config, "train_domain_adapter"),
        f"load {config.base.source} and the newest prepared data under {config.run.data_dir / 'prepared'}",
        f"train LoRA rank {lora.rank} on {', '.join(lora.target_modules)} for {train.epochs} epochs of packed "
        f"{train.sequence_tokens}-token rows, {train.batch_tokens:,} tokens a step over all processes",
        f"write {config.run.models_dir / 'domain'}/{config.run.name or config.preset + '-<fingerprint>'}/adapter",
    ]


if __name__ == "__main__":
    cli.run(main, plan, sections=SECTIONS, most_used=MOST_USED, description=__doc__)
