"""The task adapter from beginning to end: supervised pairs, loss on the answers, on the domain adapter or the base."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from config import Config
from utils.adapters import adapter_files, adapter_tokenizer, parent_runs, peft_model
from utils.artifacts.runs import Run
from utils.data import batches, pair_rows
from utils.data.batches import Batch, BucketedPairs
from utils.data.prepared import Prepared
from utils.data.retrieval.retrieved_prompts import for_training
from utils.models import chat, turn_format
from utils.models.base_model import BaseModel
from utils.planning import base_checks, preflight
from utils.training import going_on, trackers, training_identity, training_run
from utils.training.keeping import keeping_data
from utils.training.schedules.active_adapters import AdapterSchedule
from utils.training.training_identity import task_facts


def train_task(config: Config) -> dict[str, Any]:
    """On every rank at once: base model, frozen domain adapter, fresh task adapter, bucketed pairs, artefact."""
    trackers.check(config.run.trackers)
    base = preflight.start(config, stage="task")
    if finished := going_on.finished_run(config, base, "task"):
        config = going_on.settings_of(config, "task", finished)
    data = going_on.data_of(config, finished) if finished else parent_runs.prepared_run(config, base, "task")
    config = training_run.with_length(config, data)
    domain = None
    if config.task.on != "base":
        below = going_on.domain_of(config, finished) if finished else None
        domain = below or parent_runs.domain_run(config, base, below=True)
    initial = parent_runs.initial_run(config, base, "task")
    base = adapter_tokenizer.with_chosen(base, [run for run in (domain, initial) if run])
    parents, frozen = [data, *filter(None, (domain, initial, finished))], ["domain"] if domain else []
    schedule = AdapterSchedule("task", tuple(frozen), alternates=config.task.on == "domain_ready", seed=config.run.seed)
    rows = base_checks.measured_rows(config, base, ("task",))
    config, source = keeping_data.resolved(config, base, data, domain)
    if source and source.digest != data.digest:
        parents.append(source)
    deciding = rows.deciding("packing", "head") if source else rows.deciding("head")
    facts = task_facts(config.task, domain) | training_identity.start_facts(initial, finished) | deciding
    facts |= training_identity.keep_facts(config.task, config.compose.domain_retention, source)
    facts |= turn_format.deciding(adapter_tokenizer.of(base)) | base.deciding_tokenizer()
    if config.task.turns == "all" and pair_rows.trains_earlier_turns(data.manifest["counts"]):
        facts |= {"turns": "joined"}  # how turns make rows decides which of them make a step
    identity = training_identity.identity_of(config, "task", base, data, **facts)
    if finished:
        going_on.refuse_other(finished, identity, "task")
        going_on.say(finished, "task")
    with training_run.opened(config, "task", base, identity, parents) as run:
        if run.complete:
            return training_run.result(run, reused=True)
        trained, dev, counts = _pairs(config, base, data)
        keep = None
        if config.task.keep_domain != "off":
            trained, keep = keeping_data.kept(config, base, data, source, trained, packs=rows.packs)
        model = training_run.load_base(config, "task", base)
        if domain:
            model = peft_model.add(model, "domain", adapter_files.load(domain.adapter, base))
        start = adapter_files.load(initial.adapter, base) if initial else None
        model = training_run.new_adapter(model, "task", config.task.lora, config.run.seed, frozen, initial=start)
        outcome = training_run.train(run, model, trained, dev, schedule, keep, finished=finished)
        training_run.save(run, model, outcome, system_prompt=config.task.system_prompt)
        prompt = config.task.system_prompt
        run = training_run.record(run, outcome, data=counts, system_prompt=prompt, rows=rows.to_json())
    return training_run.result(run, reused=False)


def _pairs(config: Config, base: BaseModel, data: Run) -> tuple[BucketedPairs, list[Batch], dict[str, Any]]:
    """The pairs that are trained on, the dev batches, and how many pairs could be used and how."""
    prepared, task, settings = Prepared(data.directory), config.task, config.task.train
    tokenizer = adapter_tokenizer.of(base)
    pad, longest = chat.pad_id(tokenizer), settings.max_sequence_tokens
    examples, dev, turns = prepared.examples("train"), prepared.examples("dev"), task.turns == "all"
    if task.retrieval:
        splits = (examples, dev)
        examples, dev = for_training(prepared, splits, tokenizer, task.system_prompt, longest)
    trained, report = pair_rows.tokenise_pairs(examples, tokenizer, task.system_prompt, longest, all_turns=turns)
    pair_rows.check_usable(report, task.max_unusable_share, longest)
    trained = BucketedPairs(trained, settings, config.run.seed, pad, prompt_loss_weight=task.prompt_loss_weight)
    dev_pairs, of_dev = pair_rows.tokenise_pairs(dev, tokenizer, task.system_prompt, longest)
    pair_rows.warn_of_cuts(report, of_dev, longest)
    counts = asdict(report) | {"dev": asdict(of_dev)}
    return trained, batches.dev_batches(BucketedPairs(dev_pairs, settings, 0, pad), settings), counts
