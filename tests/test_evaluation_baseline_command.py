"""The command that trains a missing baseline is one for the same data and settings as the composed task adapter."""

import shlex
import tempfile
import unittest
from pathlib import Path

from utils import cli
from utils.artifacts import files, runs
from utils.artifacts.identity import Identity
from utils.artifacts.runs import Run
from utils.evaluation import run_groups


class BaselineCommand(unittest.TestCase):
    def setUp(self) -> None:
        place = tempfile.TemporaryDirectory()
        self.addCleanup(place.cleanup)
        self.root = Path(place.name) / "my models"
        where = ("--run.data_dir", str(self.root), "--run.models_dir", str(self.root))
        self.config = cli.resolve([*where, "--base.source", "bases/mine"], {})

    def sealed(self, stage: str, parents: list[Run], **more: str) -> Run:
        directory = self.root / stage / "first"
        directory.mkdir(parents=True)
        for name, text in more.items():
            (directory / f"{name}.json").write_text(text)
        base = {"source": "bases/mine", "digest": "d1"}
        identity = Identity({"stage": stage, "method": 1, "tokenizer": "t1", "on": "domain"})
        manifest = runs.manifest(stage, identity, base=base, parents=parents, measured={}, counts={})
        files.seal(directory, manifest)
        return Run(directory, files.verify(directory))

    def test_it_has_the_settings_and_the_data_of_the_task_adapter(self) -> None:
        trained = cli.resolve(["--task.lora.rank", "8", "--task.train.max_steps", "25", "--run.name", "first"], {})
        data = self.sealed("prepared", [], contents="{}")
        task = self.sealed("task", [data], config=trained.model_dump_json())
        again = cli.resolve(shlex.split(run_groups._as_trained(self.config, task)), {})
        self.assertEqual((again.task.lora, again.task.train), (trained.task.lora, trained.task.train))
        self.assertEqual((again.inputs.prepared, again.run.name), (str(data.directory), "first-on-base"))

    def test_an_adapter_of_another_tool_leaves_the_base_model(self) -> None:
        task = Run(self.root, {"kind": "task", "identity": {"on": "elsewhere"}, "parents": []})
        again = cli.resolve(shlex.split(run_groups._as_trained(self.config, task)), {})
        self.assertEqual((again.base, again.run.models_dir), (self.config.base, self.root))


if __name__ == "__main__":
    unittest.main()
