"""What a stage says when none of the runs fits: the reason for each, and a command that makes the right one."""

import shlex
import tempfile
import unittest
from pathlib import Path

from config import Config
from utils import cli, flags
from utils.adapters import parent_runs
from utils.artifacts import files, runs
from utils.artifacts.identity import Identity
from utils.artifacts.runs import Run
from utils.exceptions import ArtefactError
from utils.models.base_model import BaseModel

OWN_DATA = ("--data.corpus", '"legal, volume 2",notes.md', "--data.task", "none")


class NothingFits(unittest.TestCase):
    def setUp(self) -> None:
        place = tempfile.TemporaryDirectory()
        self.addCleanup(place.cleanup)
        self.root = Path(place.name)
        self.base = BaseModel(self.root, "bases/mine", "", "d1", "t1")

    def config(self, *words: str) -> Config:
        where = ("--run.data_dir", str(self.root), "--run.models_dir", str(self.root))
        return cli.resolve([*where, *words], {})

    def refusal(self, call, config: Config) -> ArtefactError:  # type: ignore[no-untyped-def]
        with self.assertRaises(ArtefactError) as caught:
            call(config, self.base)
        return caught.exception

    def test_the_command_is_about_the_same_base_model_and_data(self) -> None:
        config = self.config("--base.source", "bases/my model", *OWN_DATA)
        fix = self.refusal(parent_runs.prepared_run, config).problems[-1].fix
        again = cli.resolve(shlex.split(fix.split("prepare_data.py", 1)[1]), {})
        self.assertEqual((again.base, again.data), (config.base, config.data))
        self.assertEqual((again.run.data_dir, again.run.models_dir), (self.root, self.root))

    def test_every_stage_names_the_base_model(self) -> None:
        config = self.config("--base.source", "bases/mine", "--base.quantization", "nf4")
        for call in (parent_runs.domain_run, parent_runs.task_run, parent_runs.pair, parent_runs.prepared_run):
            problems = self.refusal(call, config).problems
            for fix in (problem.fix for problem in problems if "scripts/" in problem.fix):
                with self.subTest(fix):
                    self.assertIn("--base.source bases/mine --base.quantization nf4", fix)

    def test_the_default_needs_no_flag(self) -> None:
        self.assertEqual(flags.given(cli.resolve([], {}), "base", "data"), "")

    def prepared(self, tokenizer: str, counts: dict[str, object]) -> None:
        first = self.root / "prepared" / "first"
        first.mkdir(parents=True)
        (first / "contents.bin").write_bytes(b"documents")
        identity = Identity({"stage": "prepared", "method": 1, "tokenizer": tokenizer})
        base = {"source": "bases/other one", "revision": "", "quantization": "nf4", "digest": "d2"}
        files.seal(first, runs.manifest("prepared", identity, base=base, parents=[], measured={}, counts=counts))

    def test_data_of_another_base_model_names_its_flag(self) -> None:
        self.prepared("t2", {})
        said = str(self.refusal(parent_runs.prepared_run, self.config()))
        self.assertIn("first: prepared with another tokenizer\n      -> to use it, repeat your command with", said)
        words = next(line for line in said.splitlines() if "to use it" in line).partition(" with --")[2]
        again = self.config(*shlex.split(f"--{words}")).base
        self.assertEqual((again.source, again.quantization), ("bases/other one", "nf4"))

    def test_an_adapter_of_another_base_model_names_its_flag(self) -> None:
        run = Run(self.root, {"base": {"source": "bases/other one", "quantization": "none", "digest": "d2"}})
        reason = parent_runs.for_base(self.config(), self.base)(run)
        self.assertIn("repeat your command with --base.source 'bases/other one'; if it is the same", reason)

    def test_a_training_passes_over_data_without_what_it_trains_on(self) -> None:
        self.prepared("t1", {"documents": {}})
        self.assertEqual(parent_runs.prepared_run(self.config(), self.base, "domain").directory.name, "first")
        said = str(self.refusal(lambda config, base: parent_runs.prepared_run(config, base, "task"), self.config()))
        self.assertIn("first: prepared without labelled pairs (--data.task)", said)

    def test_one_adapter_alone_names_the_command_for_the_other(self) -> None:
        run = Run(self.root, {"kind": "task", "identity": {"on": "base"}})
        with self.assertLogs("adapters", "INFO") as logged:
            parent_runs.say_alone(self.config("--base.source", "bases/mine"), run)
        self.assertIn("train_domain_adapter.py --base.source bases/mine", str(vars(logged.records[0])))
