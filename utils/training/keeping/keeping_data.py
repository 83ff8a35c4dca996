"""What a task adapter's training reads to keep the domain: whose documents are replayed, which ones are looked at.

A domain adapter brings its own documents, by the data that it was made from: a wrong-domain control replays the wrong
domain's, and a random one those of the adapter that it stands for. An adapter on the base does what the adapter that
it is the baseline of does, or the comparison would be with one that read less.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from config import Config
from utils.adapters import adapter_tokenizer, parent_runs
from utils.artifacts import files, runs
from utils.artifacts.runs import Run
from utils.data.batches import BucketedPairs
from utils.data.mixed_in_documents import WINDOW_TOKENS, DocumentWindows, KeptPairs
from utils.data.prepared import Prepared
from utils.exceptions import ArtefactError, Problem
from utils.logger import event
from utils.models import chat
from utils.models.base_model import BaseModel
from utils.training import steps, training_identity
from utils.training.keeping import keep_decision
from utils.training.keeping.keep_decision import KeepDomain

if TYPE_CHECKING:
    from datasets import Dataset

CORPUS, DEV = "corpus", "dev_documents"
# in what an adapter on the base differs from the stacked one that it is the baseline of
_OTHERWISE = {"on", "domain_adapter", "keep_domain", "rows", "turn", "tokenizer_choice"}


def resolved(config: Config, base: BaseModel, data: Run, domain: Run | None) -> tuple[Config, Run | None]:
    """(settings in which only what a look can decide is still `auto`, prepared data whose documents are replayed).

    Raises ArtefactError when documents are asked for and there are none.
    """
    if config.task.keep_domain == "auto" and config.task.on == "base":
        config = _as_its_sibling(config, base, data)
    setting = config.task.keep_domain
    if setting in ("off", "kl"):
        return config, None
    if domain is None and config.inputs.domain_adapter:
        domain = parent_runs.domain_run(config, base)
    source = documents_of(domain, config) if domain else None
    # an adapter of another tool does not say what it read: what was prepared beside the pairs has to stand for it
    if source is None and (data.directory / CORPUS).is_dir():
        source = data
    if source is None and setting == "replay":
        what = "task.keep_domain replay: there are no documents of the domain to mix in"
        fix = "prepare them with --data.corpus PATH, or --task.keep_domain kl, which needs none"
        raise ArtefactError(Problem(what, str(data.directory), fix))
    return config, source


def documents_of(domain: Run, config: Config) -> Run | None:
    """The prepared data that a domain adapter was made from, of a random one that of its original; None if not here."""
    for parent in domain.manifest["parents"]:
        run = _run_of(parent, config)
        if run is not None and parent["kind"] == "domain":
            return documents_of(run, config)
        if run is not None and (run.directory / CORPUS).is_dir():
            return run
    return None


def kept(
    config: Config, base: BaseModel, data: Run, source: Run | None, pairs: BucketedPairs, *, packs: bool
) -> tuple[KeptPairs, KeepDomain]:
    """The pairs with what may be added to their steps, and what decides about it; not for `task.keep_domain off`."""
    task, settings = config.task, config.task.train
    pad = chat.pad_id(adapter_tokenizer.of(base))
    size = min(WINDOW_TOKENS, settings.max_sequence_tokens)

    def windows(documents: Dataset, seed: int) -> DocumentWindows:
        return DocumentWindows(documents, size, seed, pad, packs=packs)

    replayed = windows(Prepared(source.directory).documents(CORPUS), config.run.seed) if source else None
    together = KeptPairs(pairs, replayed, task.replay_share)
    watched, why_not = [], ""
    if task.keep_domain == "auto" and not (data.directory / DEV).is_dir():
        why_not = "there are no dev documents to look at"
    elif task.keep_domain == "auto":
        total = steps.total(pairs, settings, "task adapter")
        look_count = round(keep_decision.LOOK_TOKENS_SHARE * total * together.step_tokens / size)
        count = max(keep_decision.FEWEST_WINDOWS, min(keep_decision.MOST_WINDOWS, look_count))
        dev = windows(Prepared(data.directory).documents(DEV), 0)
        watched = [dev.batch([number]) for number in range(count)]
    return together, KeepDomain(
        task.keep_domain,
        task.replay_share,
        from_step=task.keep_from_step,
        retention=config.compose.domain_retention,
        has_documents=source is not None,
        dev=tuple(watched),
        why_not=why_not,
    )


def _as_its_sibling(config: Config, base: BaseModel, data: Run) -> Config:
    """For an adapter on the base: what the newest stacked adapter of the same data and settings decided."""
    plain = config.task.model_copy(update={"keep_domain": "off"})
    ours = training_identity.identity_of(config, "task", base, data, **training_identity.task_facts(plain, None)).values
    for run in runs.complete_runs(config.run.models_dir, "task"):
        recorded = run.manifest["identity"]
        keys = {*ours, *recorded} - _OTHERWISE
        if recorded.get("on") in ("domain", "domain_ready") and all(ours.get(k) == recorded.get(k) for k in keys):
            decided = training_identity.decided(run)
            event("as the adapter whose baseline this is", path=run.directory, **decided)
            return config.model_copy(update={"task": config.task.model_copy(update=decided)})
    event("there is no domain adapter below this one, so there is nothing to keep", keep_domain="off")
    return config.model_copy(update={"task": plain})


def _run_of(parent: dict[str, str], config: Config) -> Run | None:
    """The run that a manifest names as a parent: where it was, or wherever it is now."""
    place = Path(parent["path"])
    with suppress(ArtefactError):
        if (place / files.MANIFEST).is_file() and files.read_manifest(place).get("digest") == parent["digest"]:
            return Run(place, files.verify(place))
    for root in (config.run.data_dir, config.run.models_dir):
        for run in runs.complete_runs(root, parent["kind"]):
            if run.digest == parent["digest"]:
                return Run(run.directory, files.verify(run.directory))
    return None
