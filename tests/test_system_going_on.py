"""Starting from an adapter that is there: a run of ours or another tool's, with other data or settings (toy preset)."""

from __future__ import annotations

import json
import unittest
from pathlib import Path
from typing import Any

from tests.support import Workspace, last_json, relative, temporary_directory
from utils.adapters import adapter_files
from utils.adapters.factors import delta
from utils.artifacts import files

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
        self.assertIn("give the run the same lora.rank", rank.stderr)
        names = ("--domain.lora.target_modules", "q_proj")
        modules = self.place.run("train_domain_adapter", "--domain.init_from", self.first["run"], *names)
        self.assertEqual(modules.returncode, 2, modules.stderr)
        self.assertIn("same lora.target_modules", modules.stderr)
        ignored = self.place.run("train_domain_adapter", "--domain_adapter", self.first["run"])
        self.assertEqual(ignored.returncode, 2)
        self.assertIn("--domain.init_from PATH", ignored.stderr)
        self.assertEqual(sorted((self.place.models / "domain").iterdir()), before)


if __name__ == "__main__":
    unittest.main()
