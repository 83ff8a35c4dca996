"""What a run is: runs of earlier versions are found, what decides nothing is outside, a raised method says why."""

from __future__ import annotations

import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from config import ComposeSection, DataSection, EvaluateSection, LoraSection, TaskSection, TrainSection, smollm2_135m
from tests.support import saved_model, temporary_directory
from utils.artifacts import files, identity, runs
from utils.artifacts.identity import MARK, METHOD, Identity, settings_of
from utils.artifacts.runs import Run
from utils.benchmarks import benchmark_identity
from utils.composition import composed_identity
from utils.data import prepared_identity
from utils.data.domains.built_in import BuiltIn
from utils.evaluation import evaluation_identity
from utils.models.base_model import BaseModel
from utils.training import training_identity

DATA, DOMAIN = "1" * 64, "2" * 64
# as a default run of 929f95e recorded it
OLD_TRAIN: dict[str, Any] = {
    "learning_rate": 0.001,
    "epochs": 3,
    "max_steps": 0,
    "sequence_tokens": 256,
    "batch_tokens": 1024,
    "micro_batch_tokens": 1024,
    "warmup_share": 0.05,
    "final_learning_rate_share": 0.1,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "evals_per_epoch": 1,
    "keep": "last",
    "max_dev_tokens": 65536,
    "save_every_steps": 20,
    "keep_checkpoints": 2,
    "gradient_checkpointing": False,
}
OLD_LORA: dict[str, Any] = {
    "rank": 16,
    "alpha": 32.0,
    "dropout": 0.0,
    "use_rslora": False,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "experts": False,
}
OLD_TASK_TRAIN = OLD_TRAIN | {
    "learning_rate": 0.0005,
    "epochs": 1,
    "batch_tokens": 768,
    "micro_batch_tokens": 768,
    "keep": "best",
}


def run_of(kind: str, digest: str) -> Run:
    return Run(Path(f"models/{kind}/r"), {"kind": kind, "digest": digest, "parents": []})


class Trained(unittest.TestCase):
    base: BaseModel

    @classmethod
    def setUpClass(cls) -> None:
        cls.base = saved_model("llama")

    def old(self, stage: str, **changed: Any) -> dict[str, Any]:
        """What 929f95e recorded of a default run on this base."""
        task = {"on": "domain", "domain_adapter": DOMAIN, "system_prompt": TaskSection().system_prompt}
        return {
            "stage": stage,
            "base": self.base.digest,
            "data": DATA,
            "lora": OLD_LORA,
            "train": OLD_TRAIN if stage == "domain" else OLD_TASK_TRAIN,
            "seed": 0,
            "dtype": "torch.float32",
            "attention": "sdpa",
            **(task if stage == "task" else {}),
            **changed,
        }

    def now(self, stage: str, *, lora: LoraSection | None = None, **train: Any) -> Identity:
        preset = smollm2_135m()
        section = getattr(preset, stage)
        facts = training_identity.task_facts(preset.task, run_of("domain", DOMAIN)) if stage == "task" else None
        settings = TrainSection.model_validate(section.train.model_dump() | train)
        return training_identity.training_identity(
            stage,
            self.base,
            run_of("prepared", DATA),
            lora or section.lora,
            settings,
            seed=0,
            dtype="float32",
            facts=facts,
        )

    def test_default_runs_of_929f95e_are_these_runs(self) -> None:
        for stage in ("domain", "task"):
            self.assertEqual(self.now(stage).differences(self.old(stage)), [])
            self.assertEqual(len(self.now(stage).differences(self.old(stage, seed=1))), 1)
            changed = getattr(smollm2_135m(), stage).train.learning_rate * 2
            self.assertEqual(len(self.now(stage, learning_rate=changed).differences(self.old(stage))), 1)

    def test_settings_that_were_renamed_since_are_read_under_their_names_of_today(self) -> None:
        for manifest in ({"settings": {"train": OLD_TRAIN}}, {"identity": {"train": OLD_TRAIN}}):
            train = TrainSection.model_validate(settings_of(manifest)["train"])
            self.assertEqual(
                (train.warmup_ratio, train.min_learning_rate_ratio, train.max_sequence_tokens), (0.05, 0.1, 256)
            )

    def test_what_decides_nothing_or_trades_memory_for_time_is_outside(self) -> None:
        for stage in ("domain", "task"):
            for other in (
                {"keep_checkpoints": 7, "save_every_steps": 3},
                {"gradient_checkpointing": True},
                {"micro_batch_tokens": 256},
                {"micro_batch_tokens": 4096},
            ):
                self.assertEqual(self.now(stage, **other).values, self.now(stage).values, (stage, other))
        self.assertTrue(self.now("domain").is_of(self.old("domain", attention="eager")))
        # what the best is chosen by decides which adapter is kept; the last one is not chosen
        self.assertEqual(self.now("domain", evals_per_epoch=3).values, self.now("domain").values)
        self.assertNotEqual(self.now("task", evals_per_epoch=3).values, self.now("task").values)

    def test_every_training_setting_either_decides_or_is_known_not_to(self) -> None:
        outside = {"micro_batch_tokens", "save_every_steps", "keep_checkpoints", "gradient_checkpointing"}
        decides = {*training_identity.TRAIN.values(), *training_identity.CHOICE.values()}
        self.assertEqual(set(TrainSection.model_fields), decides | outside)
        self.assertFalse(decides & outside)
        resolved = {"target_modules", "experts"}
        self.assertEqual(set(LoraSection.model_fields), {*training_identity.LORA.values()} | resolved)
        # refusals decide no result
        self.assertEqual(
            set(TaskSection.model_fields),
            {"on", "lora", "train", "system_prompt", "prompt_loss_weight", "max_unusable_share", "turns", "init_from"}
            | {"retrieval", "continue_from"}
            | {"keep_domain", "replay_share", "keep_from_step"},
        )

    def test_what_keeps_the_domain_decides_and_off_is_as_before(self) -> None:
        documents, other = run_of("prepared", "3" * 64), run_of("prepared", "4" * 64)

        def facts(how: str, *, of: Run = documents, retention: float = 0.9, **task: Any) -> dict[str, Any]:
            section = TaskSection(keep_domain=how, **task)
            return training_identity.keep_facts(section, retention, of)

        self.assertEqual(facts("off"), {})
        self.assertEqual(facts("off", replay_share=0.3, of=other, retention=0.5), {})
        for how, changed in (
            ("auto", [{"retention": 0.8}, {"of": other}, {"replay_share": 0.2}]),
            ("replay", [{"of": other}, {"replay_share": 0.2}, {"keep_from_step": 5}]),
            ("kl", [{"replay_share": 0.2}, {"keep_from_step": 5}]),
        ):
            for values in changed:
                self.assertNotEqual(facts(how), facts(how, **values), (how, values))
        # what is not read decides nothing
        self.assertEqual(facts("kl"), facts("kl", of=other, retention=0.8))
        self.assertEqual(facts("replay"), facts("replay", retention=0.8))

    def test_a_target_name_counts_by_the_modules_that_it_finds(self) -> None:
        def with_targets(*targets: str) -> Identity:
            return self.now("domain", lora=LoraSection(target_modules=targets))

        self.assertEqual(with_targets("q_proj", "v_proj").values, with_targets("v_proj", "q_proj").values)
        self.assertNotEqual(with_targets("q_proj").values, with_targets("v_proj").values)
        self.assertEqual(
            with_targets("q_proj", "up_proj").values["lora"]["modules"],
            {"model.layers.*.self_attn.q_proj": "0-1", "model.layers.*.mlp.up_proj": "0-1"},
        )
        experts = training_identity.adapted_modules(saved_model("minimax_m2"), ["q_proj"], experts=True)
        self.assertEqual(set(experts.values()), {"0-1"})
        self.assertEqual({path.rpartition(".")[2] for path in experts}, {"q_proj", "gate_up_proj", "down_proj"})

    def test_pairs_that_were_bundled_by_the_micro_batch_are_another_method(self) -> None:
        old = self.old("task", train=OLD_TASK_TRAIN | {"micro_batch_tokens": 384})
        self.assertEqual(self.now("task").differences(old), [f"{MARK} was 0, now {METHOD['task']}"])
        self.assertTrue(self.now("domain").is_of(self.old("domain", train=OLD_TRAIN | {"micro_batch_tokens": 512})))

    def test_ranges_of_layers_are_readable_and_exact(self) -> None:
        self.assertEqual(training_identity._ranges([0, 1, 2, 5, 7, 8]), "0-2,5,7-8")
        self.assertEqual(training_identity._ranges([3]), "3")


class Prepared(unittest.TestCase):
    def setUp(self) -> None:
        self.base, self.root = saved_model("llama"), temporary_directory()
        (self.root / "docs").mkdir()
        (self.root / "docs" / "a.txt").write_text("Some text.")
        (self.root / "pairs.jsonl").write_text('{"question": "a", "answer": "b"}\n')
        self.section = DataSection(corpus=(str(self.root / "docs"),), task=str(self.root / "pairs.jsonl"))

    def now(self, section: DataSection) -> Identity:
        return prepared_identity.identity(section, self.base, 0)

    def test_a_run_of_929f95e_is_found_and_one_of_changed_contents_is_not(self) -> None:
        digest = files.fingerprint({"a.txt": files.sha256_file(self.root / "docs" / "a.txt")})
        dump = self.section.model_dump(mode="json")
        sources = {"corpus": [{"sha256": digest}], "task": [{"sha256": files.sha256_file(self.root / "pairs.jsonl")}]}
        old = {"data": dump, "sources": sources, "tokenizer": self.base.tokenizer_digest, "seed": 0}
        # documents and pairs are read otherwise since; a run without files is still the same
        differing = self.now(self.section).differences(old)
        self.assertEqual(len(differing), 2, differing)
        self.assertRegex(differing[0], r"^documents was None, now \{'method': 5[^\n]*$")
        self.assertEqual(differing[1], "reading was 1, now 4")
        alone = self.section.model_copy(update={"task": "none", "corpus": ("none",)})
        bare = old | {"data": alone.model_dump(mode="json"), "sources": {n: [{"name": "none"}] for n in sources}}
        self.assertEqual(self.now(alone).differences(bare), [])
        (self.root / "docs" / "a.txt").write_text("Another text.")
        self.assertFalse(self.now(alone).is_of(old))

    def test_a_moved_folder_is_the_same_and_a_renamed_file_is_not(self) -> None:
        before = self.now(self.section)
        (self.root / "docs").rename(self.root / "documents")
        moved = self.section.model_copy(update={"corpus": (str(self.root / "documents"),)})
        self.assertEqual(self.now(moved).values, before.values)
        (self.root / "pairs.jsonl").rename(self.root / "other.jsonl")  # rows are called after their file
        renamed = moved.model_copy(update={"task": str(self.root / "other.jsonl")})
        self.assertNotEqual(self.now(renamed).values, before.values)

    def test_every_data_setting_decides_where_it_is_used(self) -> None:
        named = {*prepared_identity.SOURCES, *prepared_identity.SOURCES.values()}
        groups = (
            *(prepared_identity.LIMITS, prepared_identity.INVENTED, prepared_identity.SHARES),
            prepared_identity.READING,
        )
        # what is skipped is known by the contents, what stops a run leaves none
        decided = named.union(*(group.values() for group in groups), {"on_unreadable", "columns"})
        self.assertEqual(set(DataSection.model_fields), decided | {"show"})
        mapped = self.section.model_copy(update={"columns": ("question=ask",)})
        self.assertNotEqual(self.now(mapped).values, self.now(self.section).values)

    def test_counting_personal_data_of_a_built_in_corpus_makes_other_prepared_data(self) -> None:
        # the manifest holds the counts: data that were prepared without them are not reused
        domain = BuiltIn([{"id": "a", "text": "t"}], [], {}, {}, {})
        with mock.patch.object(prepared_identity, "built_in_domain", return_value=domain):
            built_in = DataSection(corpus=("invented",), task="invented")
            counted = built_in.model_copy(update={"personal_data": True})
            self.assertNotEqual(self.now(counted).values, self.now(built_in).values)
            self.assertNotIn("documents", self.now(built_in).values)


class Others(unittest.TestCase):
    def test_a_composition_of_929f95e_is_found_and_search_settings_decide_only_a_search(self) -> None:
        base, adapters = saved_model("llama"), [run_of("domain", DOMAIN), run_of("task", "3" * 64)]

        def now(**settings: Any) -> Identity:
            section = ComposeSection(**settings)
            return composed_identity.composed_identity(section, base, adapters, run_of("prepared", DATA), 0)

        old = {
            "stage": "composed",
            "base": base.digest,
            "adapters": [DOMAIN, "3" * 64],
            "data": DATA,
            "compose": {
                "method": "sum",
                "weights": [],
                "rank": 0,
                "density": 0.5,
                "search": False,
                "search_methods": ["sum", "depth_gate"],
                "domain_retention": 0.9,
                "max_dev_items": 200,
                "max_dev_documents": 60,
            },
            "seed": 0,
        }
        self.assertEqual(now().differences(old), [])
        self.assertEqual(now(weights=(1.0, 1.0)).values, now().values)
        self.assertEqual(now(max_dev_items=3).values, now().values)
        self.assertNotEqual(now(search=True, max_dev_items=3).values, now(search=True).values)
        searched = old | {"compose": {**old["compose"], "search": True}}
        self.assertEqual(now(search=True).differences(searched), ["search_method was None, now 2"])
        self.assertEqual(now(density=0.1).values, now().values)
        self.assertNotEqual(now(method="ties", density=0.1).values, now(method="ties").values)
        named = {"method", "weights", "rank", "density", "search", "also", *composed_identity.SEARCH.values()}
        self.assertEqual(set(ComposeSection.model_fields), named)

    def test_every_evaluation_setting_decides_or_is_known_by_the_runs_that_take_part(self) -> None:
        by_runs = {"controls", "seeds", "also", "wrong_corpus", "learning_curve"}
        by_runs |= {"matrix", "matrix_domain", "matrix_task"}
        named = {*evaluation_identity.SCORED.values(), *evaluation_identity.ANSWERED.values()}
        named |= {"general_text", "primary", "retrieval", "json_schema", "judge", "judge_labels"}  # by their contents
        self.assertEqual(set(EvaluateSection.model_fields), named | by_runs)

    def test_every_benchmark_setting_decides(self) -> None:
        fields = type(smollm2_135m().benchmark).model_fields
        self.assertEqual(set(fields), set(benchmark_identity.MEASURED.values()))


class Directories(unittest.TestCase):
    def setUp(self) -> None:
        self.root = temporary_directory()
        self.identity = Identity.of("composed", {"base": "b", "adapters": []}, lambda old: {"base": "b", **old["new"]})

    def made(self, values: dict[str, Any], name: str) -> Path:
        directory = self.root / "composed" / name
        directory.mkdir(parents=True)
        files.write_json(directory / runs.IDENTITY, values)
        return directory

    def directory(self, wanted: Identity) -> Path:
        return runs.directory_for(self.root, "composed", "", "toy", wanted)

    def test_a_run_is_found_by_what_it_is_and_not_by_what_it_is_called(self) -> None:
        usual = self.directory(self.identity)
        self.assertEqual(usual.name, f"toy-{self.identity.fingerprint[:8]}")
        self.made({"base": "another"}, "toy-00000000")
        kept = self.made({"new": {"adapters": []}}, "toy-12345678")
        self.assertEqual(self.directory(self.identity), kept)
        self.assertIsNone(runs.open_run(kept, self.identity))  # begun and not complete: it goes on

    def test_a_resumed_run_keeps_what_the_version_that_began_it_recorded(self) -> None:
        kept = self.made({"new": {"adapters": []}}, "toy-12345678")
        runs.start(kept, self.identity)
        self.assertEqual(files.read_json(kept / runs.IDENTITY), {"new": {"adapters": []}})

    def test_a_raised_method_makes_a_new_run_and_the_log_says_why(self) -> None:
        self.made(self.identity.values, "toy-old")
        with mock.patch.dict(METHOD, composed=METHOD["composed"] + 1):
            raised = Identity.of("composed", {"base": "b", "adapters": []})
        directory = self.directory(raised)
        self.assertNotEqual(directory.name, "toy-old")
        with self.assertLogs("adapters", "INFO") as logged:
            runs.start(directory, raised)
        (record,) = logged.records
        self.assertIn("the same settings give another result", record.getMessage())
        self.assertEqual(record.facts["changed"], f"{MARK} was 1, now 2")
        self.assertEqual(record.facts["kept"].name, "toy-old")

    def test_other_settings_in_a_named_directory_are_refused_by_name_and_value(self) -> None:
        directory = self.made(self.identity.values, "mine")
        other = Identity.of("composed", {"base": "c", "adapters": []})
        with self.assertRaisesRegex(runs.ArtefactError, "base was 'b', now 'c'"):
            runs.open_run(directory, other)

    def test_what_cannot_be_understood_is_another_run(self) -> None:
        for recorded in (None, [], "text", {}, {"new": 3}, {MARK: 1}):
            self.assertFalse(self.identity.is_of(recorded), recorded)

    def test_settings_are_read_from_manifests_of_both_kinds(self) -> None:
        self.assertEqual(identity.settings_of({"identity": {"train": 1}}), {"train": 1})
        self.assertEqual(identity.settings_of({"identity": {}, "settings": {"train": 2}}), {"train": 2})


if __name__ == "__main__":
    unittest.main()
