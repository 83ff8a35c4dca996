"""Trackers are told which run it is, or refused before anything is made; each read again by its own program."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from tests.support import forked
from utils.exceptions import ConfigError
from utils.training import trackers

RATE = 0.0123


class Trackers(unittest.TestCase):
    def setUp(self) -> None:
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.run = Path(scratch.name) / "models" / "domain" / "second-try"

    def train(self, *names: str) -> None:
        """What the loop does with a tracker, without the loop."""
        trackers.check(names)
        project = ProjectConfiguration(project_dir=str(self.run), logging_dir=str(self.run / trackers.FOLDER))
        accelerator = Accelerator(cpu=True, log_with=list(names), project_config=project)
        settings = {
            "seed": 3,
            "domain": {"train": {"learning_rate": RATE, "epochs": None}, "target_modules": ["q", "v"]},
        }
        trackers.start(accelerator, "domain-adapter", settings, self.run)
        for step in (1, 2):
            accelerator.log({"loss": 3.0 / step}, step=step)
        for tracker in accelerator.trackers:
            tracker.finish()

    def test_tensorboard_shows_the_curve_and_the_settings(self) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self.train("tensorboard")
        events = sorted((self.run / trackers.FOLDER).rglob("events.out.*"))
        curves, texts = {}, ""
        for path in events:
            found = EventAccumulator(str(path)).Reload()
            for name in found.Tags()["scalars"]:
                curves[name] = [(one.step, one.value) for one in found.Scalars(name)]
        for path in (self.run / trackers.FOLDER).rglob("hparams.yml"):
            texts += path.read_text()
        self.assertEqual(curves["loss"], [(1, 3.0), (2, 1.5)])
        self.assertIn(f"domain.train.learning_rate: {RATE}", texts)

    def test_all_that_cannot_work_is_said_at_once(self) -> None:
        with (
            mock.patch("accelerate.tracking.get_available_trackers", return_value=["tensorboard", "wandb"]),
            mock.patch.dict(os.environ, {"NETRC": "/nowhere", "WANDB_MODE": "online"}),
        ):
            os.environ.pop("WANDB_API_KEY", None)
            with self.assertRaises(ConfigError) as caught:
                trackers.check(["tensorboard", "wandb", "trackio", "tensorbord"])
        said = str(caught.exception)
        for part in ("wandb has no key", "WANDB_MODE=offline", "pip install trackio", "no such tracker", "tensorbord"):
            self.assertIn(part, said)

    def test_a_script_refuses_before_it_makes_a_folder(self) -> None:
        models = self.run.parents[1]
        done = forked(
            "train_domain_adapter", "--preset=tiny_minimax_m2", "--run.trackers=nothing", f"--run.models_dir={models}"
        )
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("no such tracker", done.stderr)
        self.assertFalse((models / "domain").exists())

    @unittest.skipUnless(importlib.util.find_spec("wandb"), "wandb is not installed: make interop-test")
    def test_wandb_offline_has_the_runs_name_and_settings_and_writes_in_its_folder(self) -> None:
        import wandb

        with tempfile.TemporaryDirectory() as elsewhere, mock.patch.dict(os.environ, {"WANDB_MODE": "offline"}):
            before = os.getcwd()
            os.chdir(elsewhere)
            try:
                self.train("wandb")
                wandb.teardown()  # it writes the rest
            finally:
                os.chdir(before)
            self.assertEqual(os.listdir(elsewhere), [])
        (path,) = (self.run / trackers.FOLDER).rglob("*.wandb")
        written = path.read_bytes()  # its records are protobuf messages, not compressed
        for part in (b"second-try", b"domain.train.learning_rate", str(RATE).encode(), b"loss", b"1.5"):
            self.assertIn(part, written)

    @unittest.skipUnless(importlib.util.find_spec("trackio"), "trackio is not installed: make interop-test")
    def test_trackio_has_the_runs_name_and_curve(self) -> None:
        import trackio

        with mock.patch.dict(os.environ, {"TRACKIO_DIR": str(self.run.parent)}):
            self.train("trackio")
            run = trackio.Api().runs("domain-adapter")[0]
        self.assertEqual(run.name, "second-try")


if __name__ == "__main__":
    unittest.main()
