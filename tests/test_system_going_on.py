"""Starting from an adapter that is there: a run of ours or another tool's, with other data or settings (toy preset)."""

from __future__ import annotations

import json
import shutil
import unittest
from pathlib import Path
from typing import Any

import torch

from tests.support import Workspace, last_json, long_walk, relative, temporary_directory
from tests.test_evaluation_one_adapter import typed
from utils.adapters import adapter_files
from utils.adapters.factors import delta
from utils.artifacts import files
from utils.exceptions import PipelineError

STILL = ("--domain.train.learning_rate", "1e-9", "--domain.train.max_steps", "1")


class StartingFrom(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.place = Workspace()
        cls.place.prepare()
        cls.first = last_json(cls.place.run("train_domain_adapter"))

    def started(self, *flags: str) -> dict[str, Any]:
        return last_json(self.place.run("train_domain_adapter", *flags))

    def assert_same(self, one: Path, other: Path) -> None:
        ours, theirs = adapter_files.load(one), adapter_files.load(other)
        self.assertEqual(set(ours), set(theirs))
        for module, factors in ours.items():
            self.assertLess(relative(delta(factors), delta(theirs[module])), 1e-4, module)

    def test_a_run_that_hardly_learns_is_what_it_started_from(self) -> None:
        found = self.started("--domain.init_from", self.first["run"], *STILL)
        self.assertNotEqual(found["run"], self.first["run"])
        self.assert_same(Path(found["adapter"]), Path(self.first["adapter"]))
        manifest = files.verify(Path(found["run"]))
        self.assertEqual(manifest["identity"]["init_from"], self.first["digest"])
        self.assertIn(self.first["digest"], [parent["digest"] for parent in manifest["parents"]])
        trusted = self.place.run("verify", found["run"])
        self.assertEqual(trusted.returncode, 0, trusted.stdout)
        fresh = self.started(*STILL)
        with self.assertRaises(AssertionError):
            self.assert_same(Path(fresh["adapter"]), Path(self.first["adapter"]))

    def test_an_adapter_of_another_tool_with_another_scale_has_the_same_effect(self) -> None:
        foreign = temporary_directory() / "peft"
        foreign.mkdir()
        source = Path(self.first["adapter"])
        settings = files.read_json(source / "adapter_config.json")
        settings["lora_alpha"] *= 2.0
        (foreign / "adapter_config.json").write_text(json.dumps(settings))
        (foreign / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
        found = self.started("--domain.init_from", str(foreign), *STILL)
        self.assert_same(Path(found["adapter"]), foreign)

    def test_what_does_not_fit_is_refused_before_training_and_leaves_nothing(self) -> None:
        before = sorted((self.place.models / "domain").iterdir())
        rank = self.place.run(
            "train_domain_adapter", "--domain.init_from", self.first["run"], "--domain.lora.rank", "3"
        )
        self.assertEqual(rank.returncode, 2, rank.stderr)
        self.assertIn("give the run the same: --domain.lora.rank ", rank.stderr)
        names = ("--domain.lora.target_modules", "q_proj")
        modules = self.place.run("train_domain_adapter", "--domain.init_from", self.first["run"], *names)
        self.assertEqual(modules.returncode, 2, modules.stderr)
        self.assertIn("--domain.lora.target_modules k_proj,o_proj,q_proj,v_proj", modules.stderr)
        ignored = self.place.run("train_domain_adapter", "--domain_adapter", self.first["run"])
        self.assertEqual(ignored.returncode, 2)
        self.assertIn("--domain.init_from PATH", ignored.stderr)
        self.assertEqual(sorted((self.place.models / "domain").iterdir()), before)


class LongerRun(unittest.TestCase):
    """More epochs of a finished run. With a constant learning rate that is the longer run itself, bit for bit."""

    CONSTANT = ("--domain.train.warmup_ratio", "0", "--domain.train.min_learning_rate_ratio", "1")

    @classmethod
    def setUpClass(cls) -> None:
        cls.place = Workspace()
        typed(cls.place, "prepare_data", *cls.place.sources)
        cls.first, _ = typed(cls.place, "train_domain_adapter", *cls.CONSTANT, "--domain.train.epochs", "1")

    def longer(self, *flags: str) -> dict[str, Any]:
        found, _ = typed(self.place, "train_domain_adapter", "--domain.continue_from", self.first["run"], *flags)
        return found

    def test_it_is_the_longer_run(self) -> None:
        whole, _ = typed(self.place, "train_domain_adapter", *self.CONSTANT, "--domain.train.epochs", "2")
        found = self.longer("--domain.train.epochs", "2")
        self.assertNotEqual(found["run"], whole["run"])
        self.assertEqual(found["steps"], whole["steps"])
        self.assertGreater(found["steps"], self.first["steps"])
        ours, theirs = (adapter_files.load(Path(one["adapter"])) for one in (found, whole))
        before = adapter_files.load(Path(self.first["adapter"]))
        for module, factors in ours.items():
            self.assertTrue(torch.equal(factors.b_Or, theirs[module].b_Or), module)
            self.assertFalse(torch.equal(factors.b_Or, before[module].b_Or), module)
        manifest = files.verify(Path(found["run"]))
        self.assertIn(self.first["digest"], [parent["digest"] for parent in manifest["parents"]])
        self.assertTrue(self.longer("--domain.train.epochs", "2")["reused"])
        files.verify(Path(self.first["run"]))  # it stays as it was

    @long_walk
    def test_a_task_adapter_that_keeps_its_domain_is_the_longer_run_too(self) -> None:
        constant = [flag.replace("--domain.", "--task.") for flag in self.CONSTANT]
        keep = (*constant, "--task.keep_domain", "replay", "--domain_adapter", self.first["run"])
        short, _ = typed(self.place, "train_task_adapter", *keep, "--task.train.epochs", "1")
        whole, _ = typed(self.place, "train_task_adapter", *keep, "--task.train.epochs", "2")
        longer = ("--task.continue_from", short["run"], "--task.train.epochs", "2")
        found, _ = typed(self.place, "train_task_adapter", *longer)
        ours, theirs = (adapter_files.load(Path(one["adapter"])) for one in (found, whole))
        for module, factors in ours.items():
            self.assertTrue(torch.equal(factors.b_Or, theirs[module].b_Or), module)
        with self.assertRaises(PipelineError) as caught:
            typed(self.place, "train_task_adapter", *longer, "--task.keep_domain", "kl")
        self.assertIn("which has replay (got 'kl')", str(caught.exception))
        self.assertIn(f"start anew from the adapter: --task.init_from {short['run']}", str(caught.exception))
        with self.assertRaises(PipelineError) as caught:
            typed(self.place, "train_task_adapter", *longer, "--task.lora.rank", "3")
        self.assertRegex(str(caught.exception), r"which has \d+ \(got 3\)")
        self.assertIn("train a new adapter: without --task.continue_from", str(caught.exception))

    def test_what_is_no_longer_run_is_refused_and_leaves_nothing(self) -> None:
        before = sorted((self.place.models / "domain").iterdir())
        for flags, said in (
            (("--domain.train.epochs", "1"), "ask for more"),
            (("--domain.train.epochs", "2", "--domain.lora.rank", "3"), "--domain.lora.rank (flag) differs"),
            (("--domain.train.epochs", "2", "--domain.init_from", self.first["run"]), "exclude each other"),
        ):
            with self.assertRaises(PipelineError) as caught:
                self.longer(*flags)
            self.assertEqual(caught.exception.exit_code, 2)
            self.assertIn(said, str(caught.exception))
        other = Path(self.first["run"]).with_name("copied")
        shutil.copytree(self.first["run"], other, ignore=shutil.ignore_patterns(".last_state"))
        with self.assertRaises(PipelineError) as caught:
            typed(self.place, "train_domain_adapter", "--domain.continue_from", str(other))
        shutil.rmtree(other)
        self.assertIn("--domain.init_from", str(caught.exception))
        self.assertEqual(sorted((self.place.models / "domain").iterdir()), before)


if __name__ == "__main__":
    unittest.main()
