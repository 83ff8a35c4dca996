"""SIGTERM and SIGINT: a checkpoint or a clean place, a documented exit code, and the same result afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import unittest
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fault_support import (
    ADAPTER,
    LONG,
    All,
    At,
    Send,
    contents,
    rubbish,
    trained,
    training_flags,
    with_both_adapters,
)
from tests.support import ROOT, Script, clean_environment, last_json
from utils.artifacts import files
from utils.exceptions import ArtefactError

STOPPED = 75
TERM, INT = Send(signal.SIGTERM), Send(signal.SIGINT)


@dataclass(frozen=True)
class UnderALauncher:
    """This process becomes a launcher as accelerate's: it starts the script in a child and passes no signal on."""

    pid_file: Path

    def __call__(self) -> None:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            os._exit(0)
        self.pid_file.write_text(str(os.getpid()))
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"


class Training(unittest.TestCase):
    def assert_resumes_to_the_reference(self, name: str, at: int) -> None:
        place = trained()
        done = place.train(name).wait()
        last_json(done)
        self.assertRegex(done.stderr, rf"resumed +step={at}\b")
        self.assertEqual(contents(place.run_of(name))[ADAPTER], contents(place.run_of("reference"))[ADAPTER])

    def test_either_signal_in_a_step_writes_its_checkpoint_exits_75_and_resumes_exactly(self) -> None:
        for name, fault in (("sigterm", TERM), ("sigint", INT)):
            with self.subTest(name):
                done = trained().train(name, before=At("utils.training.micro_batches.batch_loss", fault, 21)).wait()
                self.assertEqual(done.returncode, STOPPED, done.stderr)
                step = max(int(p.name[5:]) for p in trained().run_of(name).glob("checkpoints/step-*"))
                self.assertNotEqual(step % 4, 0, "this checkpoint was due anyway: the test tells nothing")
                self.assertIn(f"stopped at step {step} of ", done.stderr)
                self.assertIn("stopping after this step", done.stderr)
                self.assert_resumes_to_the_reference(name, step)

    @unittest.skipUnless(LONG, "a longer one of its kind: make fault-test")
    def test_a_second_sigint_stops_at_once_and_the_checkpoint_before_is_used(self) -> None:
        done = (
            trained()
            .train("impatient", before=At("utils.training.micro_batches.batch_loss", All((INT, INT)), 21))
            .wait()
        )
        self.assertEqual(done.returncode, 130, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assert_resumes_to_the_reference("impatient", 8)

    def test_sigterm_before_the_first_step_and_after_the_last_leaves_a_run_that_goes_on(self) -> None:
        place = trained()
        for name, where, at in (
            ("loading", "utils.models.loading.load_model", None),
            ("saving", "utils.adapters.adapter_files.save", 44),
            ("sealing", "utils.artifacts.files.seal", 40),
        ):
            with self.subTest(name):
                # the last checkpoint is sealed before the run is
                fault = At(where, TERM, 11 if name == "sealing" else 1)
                done = place.train(name, before=fault).wait()
                self.assertEqual(done.returncode, STOPPED, done.stderr)
                self.assertNotIn("Traceback", done.stderr)
                self.assertFalse((place.run_of(name) / files.MANIFEST).exists())
                if at:
                    self.assert_resumes_to_the_reference(name, at)

    @unittest.skipUnless(LONG, "a longer one of its kind: make fault-test")
    def test_two_processes_are_both_stopped_by_a_signal_to_one(self) -> None:
        place = trained()
        fault = At("utils.training.micro_batches.batch_loss", TERM, 7)
        ended = [script.wait() for script in place.pair("both", before=(None, fault))]
        self.assertEqual([done.returncode for done in ended], [STOPPED, STOPPED], ended[0].stderr)
        steps = [path.name for path in place.run_of("both").glob("checkpoints/step-*")]
        self.assertEqual(len(steps), 2, steps)

    def test_a_launcher_that_is_killed_takes_its_training_with_it_after_a_checkpoint(self) -> None:
        place = trained()
        directory, pid_file = place.run_of("orphan"), place.root / "orphan.pid"
        script = place.train("orphan", "--run.threads=1", before=UnderALauncher(pid_file))  # as the reference
        script.wait_until(lambda: (directory / "checkpoints" / "step-00000004").exists())
        script.signal(signal.SIGKILL)
        script.wait()
        end = time.monotonic() + 30
        while Path(f"/proc/{pid_file.read_text()}").exists() and time.monotonic() < end:
            time.sleep(0.02)
        self.assertIn("stopped at step", script.stderr)
        step = max(int(p.name[5:]) for p in directory.glob("checkpoints/step-*"))
        self.assert_resumes_to_the_reference("orphan", step)

    @unittest.skipUnless(LONG, "three real launches: FAULT_TESTS=long")
    def test_accelerate_launch_that_gets_sigterm_takes_its_training_with_it_after_a_checkpoint(self) -> None:
        place = trained()
        for kind in ("cpu", "cpu_two_processes"):
            directory = place.run_of(f"launched-{kind}")
            script = [str(ROOT / "scripts" / "train_domain_adapter.py"), *place.flags, "--run.name", directory.name]
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
            command = [*launch, str(ROOT / "scripts" / "launch" / f"{kind}.yaml"), *script, *training_flags("domain")]
            process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stderr=subprocess.DEVNULL)
            while process.poll() is None and not (directory / "checkpoints" / "step-00000008").exists():
                time.sleep(0.01)
            self.assertIsNone(process.poll(), "it ended before it was stopped")
            process.terminate()
            self.assertNotEqual(process.wait(), 0)
            end = time.monotonic() + 60
            while is_held(directory) and time.monotonic() < end:
                time.sleep(0.1)
            self.assertFalse(is_held(directory), "an orphan trains on")
            self.assertFalse((directory / files.MANIFEST).exists())
            subprocess.run(command, cwd=ROOT, env=clean_environment(), check=True, capture_output=True)
            files.verify(directory)


def is_held(directory: Path) -> bool:
    """Whether a process has the lock of a run."""
    try:
        with files.locked(directory, "the run"):
            return False
    except ArtefactError:
        return True


class OtherScripts(unittest.TestCase):
    """Each is stopped in the middle of what it writes, and run again."""

    def stopped_then_done(self, start: Callable[[Callable[[], None] | None], Script], where: str, call: int) -> str:
        done = start(At(where, TERM, call)).wait()
        self.assertEqual(done.returncode, STOPPED, done.stderr)
        self.assertIn("stopped by SIGTERM", done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        return done.stderr

    def test_sigterm_leaves_nothing_of_prepared_data(self) -> None:
        place = trained()
        for number, where in enumerate(
            ("datasets.Dataset.map", "utils.artifacts.files.write_text", "utils.artifacts.files.seal")
        ):
            name = f"terminated-{number}"

            def start(fault: Callable[[], None] | None, name: str = name) -> Script:
                return place.start("prepare_data", *place.sources, "--run.name", name, before=fault)

            with self.subTest(where):
                self.stopped_then_done(start, where, 1)
                left = [path.name for path in (place.data / "prepared").iterdir() if name in path.name]
                self.assertEqual(left, [])
        self.assertFalse(last_json(start(None).wait())["reused"])

    def test_sigterm_leaves_no_merged_model_and_the_next_call_goes_on(self) -> None:
        place = with_both_adapters()
        target = place.root / "terminated"

        def start(fault: Callable[[], None] | None) -> Script:
            return place.start("inference", "--merge_path", str(target), before=fault)

        self.stopped_then_done(start, "utils.export.merge_check.merged_equals_composed", 1)
        self.assertFalse(target.exists())
        done = start(None).wait()
        last_json(done)
        self.assertIn("going on with an interrupted merge", done.stderr)
        files.verify(target)
        self.assertEqual(list(place.root.glob(".terminated*")), [])

    @unittest.skipUnless(LONG, "a longer one of its kind: make fault-test")
    def test_sigterm_leaves_an_evaluation_and_a_composition_that_go_on(self) -> None:
        place = with_both_adapters()
        for script, stage, where in (
            ("evaluate", "evaluation", "utils.inference.generation.answer_all"),
            ("compose", "composed", "utils.adapters.adapter_files.save"),
        ):

            def start(fault: Callable[[], None] | None, script: str = script) -> Script:
                return place.start(script, "--run.name", "terminated", before=fault)

            with self.subTest(script):
                self.stopped_then_done(start, where, 3 if script == "evaluate" else 1)
                directory = place.run_of("terminated", stage)
                self.assertFalse((directory / files.MANIFEST).exists())
                last_json(start(None).wait())
                files.verify(directory)
                self.assertEqual(rubbish(directory), [])


if __name__ == "__main__":
    unittest.main()
