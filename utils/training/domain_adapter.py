"""The domain adapter from beginning to end: next-token prediction on the unlabelled documents."""

from __future__ import annotations

from typing import Any

from config import Config
from utils.adapters import adapter_files, parent_runs
from utils.artifacts.runs import Run
from utils.data import batches
from utils.data.batches import Batch, PackedDocuments
from utils.data.prepared import Prepared
from utils.models import chat
from utils.models.base_model import BaseModel
from utils.planning import base_checks, preflight
from utils.training import going_on, trackers, training_identity, training_run
from utils.training.schedules.active_adapters import AdapterSchedule


def train_domain(config: Config) -> dict[str, Any]:
    """On every rank at once: base model, fresh adapter, packed documents, training loop, artefact."""
    trackers.check(config.run.trackers)
    base = preflight.start(config, stage="domain")
    if finished := going_on.finished_run(config, base, "domain"):
        config = going_on.settings_of(config, "domain", finished)
    data = going_on.data_of(config, finished) if finished else parent_runs.prepared_run(config, base, "domain")
    config = training_run.with_length(config, data)
    initial = parent_runs.initial_run(config, base, "domain")
    rows = base_checks.measured_rows(config, base, ("domain",))
    facts = training_identity.start_facts(initial, finished) | rows.deciding("packing", "head")
    identity = training_identity.identity_of(config, "domain", base, data, **facts)
    if finished:
        going_on.refuse_other(finished, identity, "domain")
        going_on.say(finished, "domain")
    parents = [data, *filter(None, (initial, finished))]
    with training_run.opened(config, "domain", base, identity, parents) as run:
        if run.complete:
            return training_run.result(run, reused=True)
        documents, dev = _documents(config, base, data, packs=rows.packs)
        model = training_run.load_base(config, "domain", base)
        start = adapter_files.load(initial.adapter, base) if initial else None
        model = training_run.new_adapter(model, "domain", config.domain.lora, config.run.seed, initial=start)
        outcome = training_run.train(run, model, documents, dev, AdapterSchedule("domain"), finished=finished)
        training_run.save(run, model, outcome)
        counts = data.manifest["counts"].get("documents", {})
        run = training_run.record(run, outcome, data=counts, rows=rows.to_json())
    return training_run.result(run, reused=False)


def _documents(config: Config, base: BaseModel, data: Run, *, packs: bool) -> tuple[PackedDocuments, list[Batch]]:
    """The documents that are trained on, packed or each in its row, and the dev batches; none without dev documents."""
    prepared, settings = Prepared(data.directory), config.domain.train
    pad = chat.pad_id(chat.load_tokenizer(base.directory))
    documents = PackedDocuments(prepared.documents("corpus"), settings, config.run.seed, pad, packs=packs)
    if not (data.directory / "dev_documents").is_dir():
        return documents, []
    dev = PackedDocuments(prepared.documents("dev_documents"), settings, 0, pad, packs=packs)
    return documents, batches.dev_batches(dev, settings)
