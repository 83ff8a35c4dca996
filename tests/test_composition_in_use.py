"""The composition that was made is the one that is used, through the commands a person types (toy MiniMax-M2)."""

from __future__ import annotations

import shutil
import unittest
from pathlib import Path
from typing import Any

from config import BaseModelSection
from tests.support import Workspace, last_json, random_factors, temporary_directory
from utils.adapters import adapter_files
from utils.artifacts import files, runs
from utils.artifacts.identity import Identity
from utils.models import loading, sources
from utils.models.base_model import BaseModel

SECTION = BaseModelSection(source="toy:minimax_m2", name="tiny-minimax-m2", dtype="float32")


class InUse(unittest.TestCase):
    """Two folders of another tool were composed by hand; a pair of runs of ours lies there too, made before."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.place = Workspace()
        cls.base = sources.fetch(SECTION, cls.place.models)
        model = loading.load_model(cls.base, SECTION)
        cls.factors = [random_factors(model, ("q_proj", "v_proj"), 3, 6.0, seed) for seed in range(5)]
        trained(cls.place.models / "domain" / "own", "domain", cls.base, cls.factors[0])
        trained(cls.place.models / "task" / "own", "task", cls.base, cls.factors[1])
        cls.a, cls.b = cls.place.root / "legal, v2", cls.place.root / "b"
        adapter_files.save(cls.a, cls.factors[2], cls.base)
        adapter_files.save(cls.b, cls.factors[3], cls.base)
        named = ("--domain_adapter", str(cls.a), "--task_adapter", str(cls.b))
        cls.composed = last_json(cls.place.run("compose", *named, "--weights", "0.7,0.3"))["composed"]

    def ask(self, *flags: str) -> tuple[dict[str, Any], str]:
        done = self.place.run("inference", "--prompt", "hi", *flags)
        return last_json(done), done.stderr

    def test_the_newest_composed_run_answers_and_says_so_first(self) -> None:
        found, said = self.ask()
        self.assertEqual(found["adapters"], [str(self.a), str(self.b)])
        first = next(
            line for line in said.splitlines() if "using" in line and "base model" not in line.split("why=")[0]
        )
        self.assertIn(f"using the composed run  path={self.composed}", first)
        self.assertIn("weights=(0.7, 0.3)", said)
        self.assertNotIn("using the newest complete", said)  # the others were only looked at

    def test_weights_apply_to_the_parts_of_the_chosen_composition(self) -> None:
        found, said = self.ask("--weights", "0.2,0.9")
        self.assertEqual(found["adapters"], [str(self.a), str(self.b)])
        self.assertIn("weights=(0.2, 0.9)", said)
        alone, _ = self.ask("--adapters", "domain")
        self.assertEqual(alone["adapters"], [str(self.a)])

    def test_named_adapters_win(self) -> None:
        found, _ = self.ask("--task_adapter", str(self.place.models / "task" / "own"))
        self.assertEqual(found["adapters"], [str(self.place.models / kind / "own") for kind in ("domain", "task")])

    def test_an_adapter_that_is_not_used_is_not_named(self) -> None:
        found, said = self.ask("--task_adapter", str(self.b), "--adapters", "task")
        self.assertEqual(found["adapters"], [str(self.b)])
        self.assertNotIn("domain", said)

    def test_a_composed_run_is_named_or_its_adapter_folder_or_a_bare_copy(self) -> None:
        for path in (self.composed, f"{self.composed}/adapter"):
            with self.subTest(path):
                found, said = self.ask("--composed", path)
                self.assertEqual(found["adapters"], [str(self.a), str(self.b)])
                self.assertIn("why=--composed names it", said)
        bare = temporary_directory() / "composed adapter"
        shutil.copytree(f"{self.composed}/adapter", bare)
        expected, _ = self.ask("--composed", self.composed)
        found, _ = self.ask("--composed", str(bare))
        self.assertEqual(found["adapters"], [str(bare)])
        self.assertEqual(*(answer["reasoning"] for answer in (found, expected)))
        merged = last_json(self.place.run("inference", "--composed", str(bare), "--merge_path", str(bare.parent / "m")))
        self.assertGreater(merged["adapter_effect_on_logits"], 1e-3)
        refused = self.place.run("evaluate", "--composed", str(bare))
        self.assertEqual(refused.returncode, 2, refused.stderr)
        self.assertIn("was made of are not known", refused.stderr)

    def test_contradictions_and_wrong_kinds_are_refused(self) -> None:
        both = self.place.run(
            "inference", "--prompt", "x", "--composed", self.composed, "--domain_adapter", str(self.a)
        )
        self.assertEqual(both.returncode, 2)
        self.assertIn("leave out --domain_adapter", both.stderr)
        kind = self.place.run("inference", "--prompt", "x", "--composed", str(self.place.models / "task" / "own"))
        self.assertEqual(kind.returncode, 2)
        self.assertIn("this is a task run", kind.stderr)

    def test_a_path_where_nothing_is_names_what_is_there(self) -> None:
        for flag in ("--composed", "--domain_adapter"):
            refused = self.place.run(
                "inference", "--prompt", "x", flag, str(self.place.models / "domain" / "nothing_here")
            )
            self.assertEqual(refused.returncode, 2, refused.stderr)
            self.assertIn("no such directory", refused.stderr)
            self.assertIn(f"{self.place.models / 'domain'} has ", refused.stderr)
        near = self.place.run("inference", "--prompt", "x", "--base.source", str(self.place.models / "domai"))
        self.assertEqual(near.returncode, 2)
        self.assertRegex(near.stderr, f"no such directory .*\n.*did you mean {self.place.models / 'domain'}")

    def test_the_name_of_a_run_where_a_path_is_wanted_is_told_as_its_path(self) -> None:
        run = next((self.place.models / "domain").glob("*/manifest.json")).parent
        for name in (run.name, f"domain/{run.name}"):
            refused = self.place.run("inference", "--prompt", "x", "--domain_adapter", name, "--composed", "nowhere")
            self.assertEqual(refused.returncode, 2, refused.stderr)
            self.assertIn(f"did you mean {run}?", refused.stderr)
            self.assertIn("--composed nowhere: ", refused.stderr, "both at once")

    def test_exchanged_adapters_are_exchanged_back(self) -> None:
        domain, task = (next((self.place.models / one).glob("*/manifest.json")).parent for one in ("domain", "task"))
        refused = self.place.run("compose", "--domain_adapter", str(task), "--task_adapter", str(domain))
        self.assertEqual(refused.returncode, 2, refused.stderr)
        self.assertIn("give it as --domain_adapter", refused.stderr)

    def test_answers_never_replace_a_file(self) -> None:
        questions, there = self.place.root / "questions.txt", self.place.root / "answers.jsonl"
        questions.write_text("What?\n")
        there.write_text("by hand")
        refused = self.place.run("inference", "--prompts_file", str(questions), "--output_file", str(there))
        self.assertEqual(refused.returncode, 2, refused.stderr)
        self.assertIn("nothing is ever overwritten", refused.stderr)
        self.assertEqual(there.read_text(), "by hand")

    def test_an_adapter_trained_since_is_not_guessed_at(self) -> None:
        later = trained(self.place.models / "task" / "later", "task", self.base, self.factors[4])
        self.addCleanup(shutil.rmtree, later)
        refused = self.place.run("inference", "--prompt", "x")
        self.assertEqual(refused.returncode, 2, refused.stderr)
        for part in (f"--composed {self.composed}", f"--task_adapter {later}", "which is meant?"):
            self.assertIn(part, refused.stderr)
        self.assertEqual(self.ask("--composed", self.composed)[0]["adapters"], [str(self.a), str(self.b)])

    def test_a_composed_adapter_whose_parts_are_gone_still_answers(self) -> None:
        gone = self.place.root / "gone"
        shutil.move(self.b, gone)
        self.addCleanup(shutil.move, gone, self.b)
        found, said = self.ask()
        self.assertEqual(found["adapters"], [self.composed])
        self.assertIn("its parts are not there", said)
        refused = self.place.run("inference", "--prompt", "x", "--weights", "1,1")
        self.assertEqual(refused.returncode, 2)
        self.assertIn(f"task adapter {self.b}, which is gone or was changed", refused.stderr)


def trained(directory: Path, kind: str, base: BaseModel, factors: Any) -> Path:
    """A complete run of ours that was not trained: what the search for parents reads of one."""
    adapter_files.save(directory / "adapter", factors, base)
    identity = Identity({"stage": kind, "base": base.digest, "name": directory.name, "on": "domain"})
    manifest = runs.manifest(kind, identity, base=base.record(), parents=[], measured={}, system_prompt="")
    files.seal(directory, manifest)
    return directory


if __name__ == "__main__":
    unittest.main()
