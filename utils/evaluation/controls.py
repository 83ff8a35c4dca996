"""Training what a comparison lacks: the baseline, the controls, further seeds.

Everything is made as the pipeline's own scripts make it, with the settings of the run it stands beside, by all ranks of
this command, before the model that is judged is loaded. It lies under `models/controls/` and `data/controls/`, so that
no later stage takes it for the newest run of a person. What exists with the same identity is used instead, wherever it
lies. Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import PRESETS, Config, LoraSection, TrainSection, run_label
from utils.adapters import adapter_files, parent_runs
from utils.adapters.factors import random_like
from utils.artifacts import files, runs
from utils.artifacts.identity import Identity, settings_of
from utils.artifacts.runs import Run
from utils.data import prepared, prepared_identity
from utils.exceptions import ArtefactError, Problem
from utils.logger import event
from utils.models import devices
from utils.models.base_model import BaseModel
from utils.models.parallel import ranks
from utils.training import training_identity
from utils.training.domain_adapter import train_domain
from utils.training.keeping import keeping_data
from utils.training.task_adapter import train_task
from utils.training.training_identity import keep_facts, task_facts

FOLDER = "controls"
# built-in domains have a wrong one of the same form; for a person's own documents it is Python's documentation
WRONG_FOR = {"python_docs": "python_docs_other", "invented": "invented_shuffled"}
# what decides the built-in domains' sizes and splits
SIZES = ("invented_towns", "invented_attributes", "dev_share", "test_share")

# sections of this command that a sibling's settings change in part
CHANGED = ("task", "compose")


@dataclass(frozen=True)
class PartOfData:
    """Prepared data that is a `share` of those that a run was trained on."""

    data: Run
    share: float

    def steps(self, train: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of as many passes: where steps are counted, as large a share of them."""
        return {**train, "max_steps": math.ceil(train["max_steps"] * self.share)}


class Trainer:
    """Finds a run by what decides it, or makes it."""

    def __init__(self, config: Config, base: BaseModel):
        self.config, self.base = config, base
        self.models, self.data = config.run.models_dir / FOLDER, config.run.data_dir / FOLDER

    def wrong_data(self, of: Run) -> Run:
        """Prepared documents of another domain than those that `of` (prepared data) holds."""
        corpus, own = self.config.evaluate.wrong_corpus, settings_of(of.manifest)["data"]
        if not corpus:
            corpus = (WRONG_FOR.get(own["corpus"][0], "python_docs"),)
        section = {key: own[key] for key in SIZES if key in own} | {"corpus": corpus, "task": prepared.NONE}
        config = self._config({"data": section}, int(of.manifest["identity"]["seed"]))
        identity = prepared_identity.identity(config.data, self.base, config.run.seed)
        return self._find_or_make("prepared", identity, config, "the wrong domain's documents")

    def domain(self, like: Run, seed: int, data: Run | None = None) -> Run:
        """A domain adapter with the settings and the number of steps of `like`: another seed, or other documents."""
        settings = settings_of(like.manifest)
        lora, train = LoraSection.model_validate(settings["lora"]), dict(settings["train"])
        what = f"a domain adapter with seed {seed}"
        if data is not None:
            what = f"a wrong-domain adapter with seed {seed}"
            train |= {"max_steps": like.manifest["measured"]["steps"]}
        source = data or parent_runs.parent_by_digest(like, "prepared", self._roots(True))
        section = {"lora": lora, "train": TrainSection.model_validate(train)}
        config = self._config({"domain": section, "inputs": {"prepared": str(source.directory)}}, seed, like)
        return self._find_or_make("domain", self._trained("domain", like, source, config), config, what)

    def random_domain(self, like: Run, seed: int) -> Run:
        """An adapter of random numbers with the shapes of `like` and its norm in every module."""
        identity = Identity.of("domain", {"control": "random", "like": like.digest, "seed": seed})
        directory = runs.directory_for(self.models, "domain", "", "random", identity)
        if (run := runs.open_run(directory, identity)) is not None:
            return run
        factors = random_like(adapter_files.load(like.adapter, self.base), seed)

        def manifest() -> dict[str, Any]:
            return runs.manifest("domain", identity, base=self.base.record(), parents=[like], measured={})

        with files.publish(directory, manifest) as temporary:
            adapter_files.save(temporary / "adapter", factors, self.base)
        return Run(directory, files.verify(directory))

    def task(
        self,
        like: Run,
        seed: int,
        domain: Run | None,
        *,
        rank: int = 0,
        keeping: Mapping[str, Any] | None = None,
        documents_of: Run | None = None,
    ) -> Run:
        """A task adapter with the settings of `like`: another seed, another domain adapter (None: the base), a rank.

        `keeping` says how it keeps its domain (`training_identity.decided`), where it is not told what `like` was told;
        on the base it replays the documents of `documents_of`.
        """
        what = f"a task adapter on {domain.directory.name if domain else 'the base'} with seed {seed}"
        if rank:
            what = f"a task adapter of rank {rank} with seed {seed}"
        config, identity = self._of_task(like, seed, domain, rank, keeping, documents_of)
        return self._find_or_make("task", identity, config, what)

    def on_base(self, like: Run, documents_of: Run | None) -> Run | None:
        """The complete run trained on the base with the data, steps and settings of `like`, or None."""
        seed = int(like.manifest["identity"]["seed"])
        _, identity = self._of_task(like, seed, None, 0, training_identity.decided(like), documents_of)
        return self.existing("task", identity)

    def existing(self, stage: str, identity: Identity) -> Run | None:
        """The complete run with this identity, the person's own first."""
        for root in self._roots(stage == "prepared"):
            for run in runs.complete_runs(root, stage):
                if identity.is_of(run.manifest["identity"]):
                    files.verify(run.directory)
                    return run
        return None

    def _of_task(
        self,
        like: Run,
        seed: int,
        domain: Run | None,
        rank: int,
        keeping: Mapping[str, Any] | None,
        documents_of: Run | None,
        part: PartOfData | None = None,
    ) -> tuple[Config, Identity]:
        """The settings with which a sibling of `like` is trained, on a part of its data where one is given, and what
        decides it."""
        identity, settings = like.manifest["identity"], settings_of(like.manifest)
        lora = dict(settings["lora"])
        if rank:
            # the same scale, so that the rank is all that differs
            lora |= {"rank": rank, "alpha": lora["alpha"] * _scale_ratio(lora, rank)}
        section = {
            "on": identity["on"] if domain else "base",
            "lora": LoraSection.model_validate(lora),
            "train": TrainSection.model_validate(part.steps(settings["train"]) if part else settings["train"]),
            "system_prompt": identity["system_prompt"],
            "prompt_loss_weight": identity.get("prompt_loss_weight", 0.0),
            # joined turns are all turns, in rows of their own form
            "turns": "last" if identity.get("turns") == "last" else "all",
            "retrieval": bool(identity.get("retrieval")),
            "max_unusable_share": self.config.task.max_unusable_share,
            **(training_identity.keep_settings(like) if keeping is None else keeping),
        }
        source = part.data if part else parent_runs.parent_by_digest(like, "prepared", self._roots(True))
        inputs = {"prepared": str(source.directory)}
        if below := domain or documents_of:
            inputs["domain_adapter"] = str(below.directory)
        retention = identity.get("keep_domain", {}).get("retention", self.config.compose.domain_retention)
        sections = {"task": section, "inputs": inputs, "compose": {"domain_retention": retention}}
        config, documents = keeping_data.resolved(self._config(sections, seed, like), self.base, source, domain)
        facts = task_facts(config.task, domain) | keep_facts(config.task, retention, documents)
        return config, self._trained("task", like, source, config, packs=documents is not None, **facts)

    def _trained(
        self, stage: str, like: Run, data: Run, config: Config, *, packs: bool = True, **facts: Any
    ) -> Identity:
        """`packs`: whether documents are read, which a model may not keep apart in a row."""
        section, recorded = getattr(config, stage), like.manifest["identity"]
        # of the model and its prompts, the same for every sibling
        facts |= {name: recorded[name] for name in ("turn", "tokenizer_choice") if name in recorded and stage == "task"}
        if rows := {name: way for name, way in recorded.get("rows", {}).items() if packs or name != "packing"}:
            facts["rows"] = rows
        return training_identity.training_identity(
            stage,
            self.base,
            data,
            section.lora,
            section.train,
            seed=config.run.seed,
            dtype=config.base.dtype,
            native_fp8=recorded.get("fp8") == "native",
            facts=facts,
        )

    def _roots(self, of_data: bool) -> tuple[Path, Path]:
        return (self.config.run.data_dir, self.data) if of_data else (self.config.run.models_dir, self.models)

    def _find_or_make(self, stage: str, identity: Identity, config: Config, what: str) -> Run:
        if (run := self.existing(stage, identity)) is not None:
            return run
        event(f"making {what}")
        if stage == "prepared":
            directory = runs.directory_for(self.data, stage, "", run_label(self.config), identity)
            run, _ = prepared.make(config.data, self.base, config.run.seed, directory, identity)
        else:
            directory = Path(ranks.everywhere(_trained, stage, config)["run"])
            run = Run(directory, files.verify(directory))
        if not identity.is_of(run.manifest["identity"]):
            raise ArtefactError(Problem(f"{directory} was made with other settings than asked for", fix="report this"))
        return run

    def _config(self, sections: dict[str, Any], seed: int, like: Run | None = None) -> Config:
        """This command's settings with these sections instead, writing to the controls' own folders."""
        values = self.config.model_dump()
        base = {"source": str(self.base.directory.resolve()), "revision": ""}
        if like:
            dtype = str(like.manifest["identity"]["dtype"]).removeprefix("torch.")
            base |= {"dtype": dtype, "attention": settings_of(like.manifest)["attention"]}
        run = {"seed": seed, "name": "", "trackers": (), "models_dir": self.models, "data_dir": self.data}
        changed = {
            "base": values["base"] | base,
            "run": values["run"] | run,
            "inputs": {},
            # what this command says of data is about the person's own; what is made here is pinned
            "data": PRESETS[self.config.preset]().data,
            "overrides": {},
            **{name: values[name] | section if name in CHANGED else section for name, section in sections.items()},
        }
        return Config.model_validate(values | changed)


def _scale_ratio(lora: dict[str, Any], rank: int) -> float:
    """By what alpha grows with the rank for an unchanged scale."""
    return (rank / lora["rank"]) ** (0.5 if lora["use_rslora"] else 1.0)


def _trained(stage: str, config: Config) -> dict[str, Any]:
    """Train an adapter on every rank; its model's memory is free again afterwards."""
    devices.forget_peak_memory()
    result = train_domain(config) if stage == "domain" else train_task(config)
    devices.free_memory()
    return result
