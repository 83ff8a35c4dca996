"""The whole pipeline on the toy preset, script by script; and wrong inputs: exit 2, a clear message, no traceback."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.support import (
    Completed,
    Workspace,
    last_json,
    pair_row,
    plain_logits,
    run_script,
    saved_model,
    temporary_directory,
    write_jsonl,
)
from utils.artifacts import files
from utils.data import prepared_identity

ANSWERED = {"prompt", "answer", "reasoning", "adapters"}
TRAINED = {"stage", "run", "adapter", "digest", "reused", "steps", "seconds", "tokens_per_second", "best_dev_loss"}


@functools.cache
def built() -> tuple[Workspace, dict[str, dict[str, Any]]]:
    """A workspace with data, a domain adapter and both task adapters, and what each script reported."""
    place = Workspace()
    reported = {
        "prepared": place.prepare(),
        "domain": last_json(place.run("train_domain_adapter")),
        "base task": last_json(place.run("train_task_adapter", "--task.on", "base")),
        "task": last_json(place.run("train_task_adapter")),
    }
    return place, reported


class Pipeline(unittest.TestCase):
    place: Workspace
    reported: dict[str, dict[str, Any]]

    @classmethod
    def setUpClass(cls) -> None:
        cls.place, cls.reported = built()

    def test_each_stage_reports_its_artefact_and_the_artefact_is_complete(self) -> None:
        for name, found in self.reported.items():
            with self.subTest(name):
                self.assertFalse(found["reused"])
                self.assertEqual(files.verify(Path(found["run"]))["digest"], found["digest"])
        for name in ("domain", "task", "base task"):
            self.assertLessEqual(TRAINED, set(self.reported[name]))
            self.assertGreater(self.reported[name]["steps"], 0)

    def test_lineage_goes_from_the_data_to_the_task_adapter_by_digest(self) -> None:
        def parents(name: str) -> dict[str, str]:
            manifest = files.read_json(Path(self.reported[name]["run"]) / "manifest.json")
            return {parent["kind"]: parent["digest"] for parent in manifest["parents"]}

        data, domain = self.reported["prepared"]["digest"], self.reported["domain"]["digest"]
        self.assertEqual(parents("domain"), {"prepared": data})
        self.assertEqual(parents("task"), {"prepared": data, "domain": domain})
        self.assertEqual(parents("base task"), {"prepared": data})

    def test_running_a_stage_again_reuses_it(self) -> None:
        again = {
            "prepared": self.place.run("prepare_data", *self.place.sources),
            "domain": self.place.run("train_domain_adapter"),
            "base task": self.place.run("train_task_adapter", "--task.on", "base"),
            "task": self.place.run("train_task_adapter"),
        }
        for name, completed in again.items():
            with self.subTest(name):
                found, before = last_json(completed), self.reported[name]
                self.assertTrue(found["reused"])
                self.assertEqual((found["run"], found["digest"]), (before["run"], before["digest"]))

    def test_the_same_data_prepared_again_has_the_same_digest_and_nothing_is_trained_again(self) -> None:
        directory = Path(self.reported["prepared"]["run"])
        shutil.rmtree(directory)
        again = self.place.prepare()
        self.assertEqual((again["reused"], again["digest"]), (False, self.reported["prepared"]["digest"]))
        self.assertTrue(last_json(self.place.run("train_domain_adapter"))["reused"])

    def test_prompt_is_answered_with_both_adapters_in_a_fresh_interpreter(self) -> None:
        completed = run_script("inference", *self.place.flags, "--prompt", "What does f1 do?")
        found = last_json(completed)
        self.assertEqual(set(found), ANSWERED)
        streamed = completed.stdout.splitlines()[:-1]
        self.assertEqual((found["answer"], "".join(streamed)), ("", ""))
        self.assertIn(found["reasoning"], completed.stderr)
        self.assertIn("cut while still thinking: raise --inference.max_new_tokens", completed.stderr)
        self.assertEqual(found["adapters"], [self.reported["domain"]["run"], self.reported["task"]["run"]])

    def test_prompts_file_is_answered_line_by_line_in_order(self) -> None:
        rows: list[dict[str, Any]] = [{"id": f"p{i}", "prompt": "word " * (10 - i)} for i in range(10)]
        rows.append({"id": "p10", "question": "What?", "context": "A text."})
        prompts, output = write_jsonl(self.place.root / "prompts.jsonl", rows), self.place.root / "answers.jsonl"
        flags = ["--prompts_file", str(prompts), "--output_file", str(output)]
        found = last_json(self.place.run("inference", *flags))
        self.assertEqual((found["answered"], found["output_file"]), (11, str(output)))
        answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        self.assertEqual([a["id"] for a in answers], [row["id"] for row in rows])
        self.assertEqual([set(a) for a in answers], [{"id", "prompt", "answer", "reasoning"}] * 11)
        one = last_json(self.place.run("inference", "--prompt", rows[3]["prompt"]))
        for key in ("answer", "reasoning"):
            self.assertEqual(one[key], answers[3][key], "batched and alone differ")
        self.assertTrue(one["reasoning"], "the toy never closes its think block, so all it says stands there")

    def test_adapters_are_chosen_by_name(self) -> None:
        expected = {
            "none": [],
            "domain": [self.reported["domain"]["run"]],
            "task": [self.reported["task"]["run"]],
            "both": [self.reported["domain"]["run"], self.reported["task"]["run"]],
        }
        for which, adapters in expected.items():
            found = last_json(self.place.run("inference", "--prompt", "x", "--adapters", which))
            self.assertEqual(found["adapters"], adapters, which)

    def test_merged_model_loads_without_peft_and_is_never_overwritten(self) -> None:
        target = self.place.root / "merged"
        found = last_json(self.place.run("inference", "--merge_path", str(target), "--weights", "1,0.5"))
        # q, k, v and o in each of two layers
        self.assertEqual((found["merged"], found["tensors_changed"]), (str(target), 8))
        self.assertLessEqual(found["max_logit_difference"], 1e-4 * max(1.0, found["largest_logit"]))
        parents = [self.reported["domain"], self.reported["task"]]
        self.assertEqual(found["adapters"], [parent["run"] for parent in parents])
        self.assertEqual([p["digest"] for p in files.verify(target)["parents"]], [p["digest"] for p in parents])
        self.assertFalse((target / "adapter_config.json").exists())
        self.assertEqual(files.verify(target)["identity"]["recipe"]["weights"], [1.0, 0.5])
        self.assertIn("MiniMaxM2ForCausalLM", json.loads((target / "config.json").read_text())["architectures"])
        plain_logits(torch.arange(8)[None], str(target), flags=["--tokenizer"])
        before = files.sha256_file(target / "model.safetensors")
        refused = self.place.run("inference", "--merge_path", str(target))
        self.assertEqual(refused.returncode, 2)
        self.assertIn("holds another merged model: recipe.weights was [1.0, 0.5]", refused.stderr)
        self.assertEqual(files.sha256_file(target / "model.safetensors"), before)


class WrongInputs(unittest.TestCase):
    def setUp(self) -> None:
        self.place, self.reported = built()
        self.scratch = temporary_directory()

    def assert_refused(self, *parts: str, completed: Completed[str]) -> None:
        self.assertEqual(completed.returncode, 2, completed.stderr[-2000:])
        self.assertNotIn("Traceback", completed.stderr)
        for part in parts:
            self.assertIn(part, completed.stderr)

    def prepare(self, corpus: Path | str = "none", task: Path | str = "none", *more: str) -> Completed[str]:
        return self.place.run("prepare_data", "--data.corpus", str(corpus), "--data.task", str(task), *more)

    def test_unknown_setting(self) -> None:
        completed = self.place.run("prepare_data", "--task.lora.rnk", "3")
        self.assert_refused("--task.lora.rnk", "did you mean --task.lora.rank", completed=completed)

    def test_corpus_that_does_not_exist_or_is_empty(self) -> None:
        missing = self.scratch / "missing"
        self.assert_refused(f"'{missing}' does not exist", completed=self.prepare(missing))
        empty = self.scratch / "empty"
        empty.mkdir()
        self.assert_refused("empty", completed=self.prepare(empty))

    def test_malformed_row_is_named_by_file_and_line(self) -> None:
        path = self.scratch / "pairs.jsonl"
        path.write_text(json.dumps(pair_row(0)) + "\n" + json.dumps(pair_row(1)) + "\n{broken\n", encoding="utf-8")
        self.assert_refused("pairs.jsonl:3", completed=self.prepare(task=path))

    def test_questions_without_answers(self) -> None:
        path = write_jsonl(self.scratch / "pairs.jsonl", [pair_row(0), {"question": "What?", "document": "m"}])
        self.assert_refused("pairs.jsonl:2", "answer", completed=self.prepare(task=path))

    def test_adapter_of_another_base_model(self) -> None:
        other = saved_model("minimax_m2", seed=1).directory
        flags = ["--base.source", str(other), "--task_adapter", self.reported["task"]["run"], "--prompt", "x"]
        self.assert_refused("made for another base model", completed=self.place.run("inference", *flags))
        newest = self.place.run("inference", *flags[:2], *flags[4:])
        self.assert_refused("made for another base model", "train_task_adapter", completed=newest)

    def test_base_model_that_cannot_be_loaded(self) -> None:
        for damaged in ("model.safetensors", "config.json", "tokenizer.json"):
            directory = self.scratch / damaged.partition(".")[0]
            shutil.copytree(self.place.models / "base" / "tiny-minimax-m2", directory)
            content = (directory / damaged).read_bytes()
            (directory / damaged).write_bytes(content[: len(content) // 2])
            with self.subTest(damaged):
                flags = ["--base.source", str(directory), "--prompt", "x", "--adapters", "none"]
                self.assert_refused(str(directory), completed=self.place.run("inference", *flags))

    def test_an_edited_source_is_other_data_also_when_it_is_written_with_a_tilde(self) -> None:
        with mock.patch.dict(os.environ, HOME=str(self.scratch)):
            found = []
            for text in ("before", "after"):
                (self.scratch / "doc.txt").write_text(text)
                found.append(prepared_identity._content("~/doc.txt", None))
        self.assertNotEqual(*found)

    def test_binary_prompt_file(self) -> None:
        path = self.scratch / "prompts.jsonl"
        path.write_bytes(bytes(range(256)))
        self.assert_refused("prompts.jsonl", completed=self.place.run("inference", "--prompts_file", str(path)))

    def test_merge_path_that_is_not_empty(self) -> None:
        (self.scratch / "mine.txt").write_text("mine")
        flags = ["--merge_path", str(self.scratch)]
        self.assert_refused("is not empty", str(self.scratch), completed=self.place.run("inference", *flags))
        self.assertEqual([p.name for p in self.scratch.iterdir()], ["mine.txt"])

    def test_output_below_a_regular_file(self) -> None:
        (self.scratch / "file").write_text("a file")
        below = str(self.scratch / "file" / "below")
        prompts = str(write_jsonl(self.scratch / "prompts.jsonl", [{"prompt": "x"}]))
        with self.subTest("merge_path"):
            completed = self.place.run("inference", "--merge_path", below)
            self.assert_refused(f"cannot write {Path(below).parent}", completed=completed)
        with self.subTest("output_file"):
            flags = ["--prompts_file", prompts, "--output_file", below]
            completed = self.place.run("inference", *flags)
            self.assert_refused(f"cannot write {Path(below).parent}", completed=completed)
        with self.subTest("data_dir"):
            flags = [*self.place.sources, "--run.data_dir", below]
            self.assert_refused(below, completed=self.place.run("prepare_data", *flags))
        with self.subTest("models_dir"):
            self.assert_refused(below, completed=self.place.run("prepare_data", "--run.models_dir", below))

    def test_damaged_adapter_file(self) -> None:
        copy = self.scratch / "task"
        shutil.copytree(self.reported["task"]["run"], copy)
        weights = copy / "adapter" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
        completed = self.place.run("inference", "--task_adapter", str(copy), "--prompt", "x")
        self.assert_refused(str(weights), "was changed", completed=completed)

    def test_a_domain_adapter_that_is_not_there_is_not_taken_for_none(self) -> None:
        missing = ["--task.on", "base", "--domain_adapter", str(self.scratch / "missing")]
        self.assert_refused(
            "no adapter in PEFT's format", "no such directory", completed=self.place.run("evaluate", *missing)
        )

    def test_attention_implementation_that_is_not_installed(self) -> None:
        if importlib.util.find_spec("flash_attn"):
            self.skipTest("flash_attn is installed")
        flags = ["--base.attention", "flash_attention_2", "--prompt", "x", "--adapters", "none"]
        self.assert_refused("FlashAttention2", completed=self.place.run("inference", *flags))

    def test_nothing_to_answer(self) -> None:
        self.assert_refused("nothing to answer", completed=self.place.run("inference"))

    def test_a_stage_without_its_parent_says_how_to_make_it(self) -> None:
        empty = ["--run.models_dir", str(self.scratch / "models"), "--prompt", "x"]
        shutil.copytree(self.place.models / "base", self.scratch / "models" / "base")
        self.assert_refused("scripts/train_task_adapter.py", completed=self.place.run("inference", *empty))

    def test_a_seed_of_any_size_trains_or_is_refused(self) -> None:
        for seed in (2**31 - 1, 2**31, 10**18):
            completed = self.place.run("train_domain_adapter", "--run.seed", str(seed), "--domain.train.max_steps", "1")
            if completed.returncode:
                self.assert_refused("--run.seed", completed=completed)


if __name__ == "__main__":
    unittest.main()
