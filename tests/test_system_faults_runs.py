"""Two runs on one directory, directories nobody may write to, umask 077, clocks set back, copies with other times, and
what killed processes leave: the second is refused, the first goes on, and nothing that is in use is ever removed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import unittest
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tests.fault_support import (
    ADAPTER,
    LONG,
    All,
    At,
    Send,
    Unchecked,
    contents,
    obey_permissions,
    trained,
    with_both_adapters,
)
from tests.support import Script, last_json, run_program, saved_model, temporary_directory
from utils.artifacts import files, locks, runs
from utils.exceptions import ArtefactError
from utils.training import checkpoints

STOP = Send(signal.SIGSTOP)
REFUSED = 2


class TwoAtOnce(unittest.TestCase):
    def assert_second_is_refused(self, start: Callable[..., Script], where: str, directory: Path) -> None:
        """The first is stopped in the middle; the second says who it is; then the first goes on to its end."""
        first = start(before=All((Unchecked(), At(where, STOP))))
        first.wait_until(lambda: is_stopped(first))
        try:
            second = start().wait()
            self.assertEqual(second.returncode, REFUSED, second.stderr)
            self.assertNotIn("Traceback", second.stderr)
            self.assertRegex(second.stderr, rf"is in use by process {first.process.pid} on \S+ since ")
            self.assertIn(first.command[0], second.stderr, "it does not say what the holder runs")
        finally:
            first.signal(signal.SIGCONT)
        last_json(first.wait())
        files.verify(directory)

    def test_the_second_is_refused_by_every_kind_of_artefact_and_the_first_is_not_disturbed(self) -> None:
        place = with_both_adapters()
        for command, where, directory in (
            (["prepare_data", *place.sources], "datasets.Dataset.map", place.data / "prepared" / "held"),
            (["compose"], "utils.adapters.adapter_files.save", place.run_of("held", "composed")),
            (["evaluate"], "utils.inference.generation.answer_all", place.run_of("held", "evaluation")),
        ):
            with self.subTest(command[0]):

                def start(command: list[str] = command, **how: Callable[[], None]) -> Script:
                    return place.start(*command, "--run.name", "held", **how)

                self.assert_second_is_refused(start, where, directory)

    @unittest.skipUnless(LONG, "a longer one of its kind: make fault-test")
    def test_two_merges_to_one_path(self) -> None:
        place = with_both_adapters()
        target = place.root / "held"
        self.assert_second_is_refused(
            lambda **how: place.start("inference", "--merge_path", str(target), **how),
            "utils.models.weights.safetensors_io.write",
            target,
        )

    def test_the_one_that_waited_at_the_door_does_not_write_into_what_the_other_has_finished(self) -> None:
        place = trained()
        # it has looked, found nothing, and is asleep before the run's lock; the first is the probe's
        late = place.train("late", before=At("utils.artifacts.files.locked", STOP, 2))
        late.wait_until(lambda: is_stopped(late))
        last_json(place.train("late").wait())
        before = contents(place.run_of("late"))
        late.signal(signal.SIGCONT)
        done = late.wait()
        self.assertEqual(done.returncode, REFUSED, done.stderr)
        self.assertIn("was finished by another process", done.stderr)
        files.verify(place.run_of("late"))
        self.assertEqual(contents(place.run_of("late")), before)
        self.assertTrue(last_json(place.train("late").wait())["reused"])

    def test_a_lock_whose_holder_is_dead_holds_nobody_up(self) -> None:
        place = trained()
        first = place.train("stale", before=At("utils.training.micro_batches.batch_loss", Send(signal.SIGKILL), 11))
        self.assertEqual(first.wait().returncode, -signal.SIGKILL)
        self.assertIn(f"process {first.process.pid} ", (place.run_of("stale") / ".lock").read_text())
        last_json(place.train("stale").wait())


class Changed(unittest.TestCase):
    def test_changed_settings_under_a_name_are_refused_with_what_changed_and_how_to_start_anew(self) -> None:
        place = trained()
        first = place.train("changed", before=At("utils.training.micro_batches.batch_loss", Send(signal.SIGTERM), 11))
        self.assertEqual(first.wait().returncode, 75)
        left = contents(place.run_of("changed"))
        other = place.root / "other.jsonl"
        other.write_text(
            place.corpus.read_text() + json.dumps({"id": "new", "text": "One more document. " * 20}) + "\n"
        )
        last_json(place.run("prepare_data", "--data.corpus", str(other), "--data.task", str(place.task)))
        data = place.train("changed").wait()
        last_json(place.run("prepare_data", *place.sources))
        seed = place.train("changed", "--run.seed=5").wait()
        base = place.train("changed", "--base.source", str(saved_model("minimax_m2", seed=1).directory)).wait()
        for done, said in (
            (data, r"data was '\w{64}', now '\w{64}'"),
            (base, r"base was '\w{64}', now '\w{64}'"),
            (seed, "seed was 0, now 5"),
        ):
            self.assertEqual(done.returncode, REFUSED, done.stderr)
            self.assertRegex(done.stderr, said)
            self.assertIn("remove that directory to start anew", done.stderr)
        self.assertEqual(contents(place.run_of("changed")), left)

    def test_a_run_that_starts_anew_beside_an_unfinished_one_says_what_differs(self) -> None:
        place = trained()
        flags = ["--domain.train.max_steps=6", "--domain.train.warmup_ratio=0.25"]
        stop = At("utils.training.micro_batches.batch_loss", Send(signal.SIGTERM), 5)
        self.assertEqual(place.start("train_domain_adapter", *flags, before=stop).wait().returncode, 75)
        done = place.run("train_domain_adapter", flags[0], "--domain.train.warmup_ratio=0.5")
        self.assertIn("starting anew: the unfinished run that is most like this one", done.stderr)
        self.assertIn("train.warmup_share was 0.25, now 0.5", done.stderr)

    def test_a_stopped_run_goes_on_with_other_memory_settings_and_says_so(self) -> None:
        place = trained()
        flags = ["--domain.train.max_steps=7", "--domain.train.warmup_ratio=0.3"]
        stop = At("utils.training.micro_batches.batch_loss", Send(signal.SIGTERM), 5)
        self.assertEqual(place.start("train_domain_adapter", *flags, before=stop).wait().returncode, 75)
        smaller = ["--domain.train.micro_batch_tokens=128", "--domain.train.gradient_checkpointing=true"]
        done = place.run("train_domain_adapter", *flags, *smaller)
        self.assertIn("domain adapter: resumed", done.stderr)
        self.assertIn("micro_batch_tokens 512 -> 128, gradient_checkpointing False -> True", done.stderr)
        manifest = files.read_manifest(Path(last_json(done)["run"]))
        self.assertEqual(manifest["settings"]["train"]["micro_batch_tokens"], 128)
        again = last_json(place.run("train_domain_adapter", *flags))
        self.assertEqual((again["reused"], again["digest"]), (True, manifest["digest"]))


class Permissions(unittest.TestCase):
    def test_a_directory_that_may_not_be_written_is_named_and_nothing_is_left(self) -> None:
        place = with_both_adapters()
        readonly = temporary_directory()
        shutil.copytree(place.models, readonly / "models")
        shutil.copytree(place.data, readonly / "data")
        closed = [readonly / "models" / stage for stage in ("domain", "evaluation")] + [readonly / "data" / "prepared"]
        for directory in closed:
            directory.mkdir(exist_ok=True)
            directory.chmod(0o555)
            self.addCleanup(directory.chmod, 0o755)
        where = ["--run.data_dir", str(readonly / "data"), "--run.models_dir", str(readonly / "models")]
        for command in (["train_domain_adapter"], ["evaluate"], ["prepare_data", *place.sources]):
            with self.subTest(command[0]):
                done = place.start(*command, *where, "--run.name", "closed", before=as_a_user).wait()
                self.assertEqual(done.returncode, REFUSED, done.stderr)
                self.assertNotIn("Traceback", done.stderr)
                self.assertRegex(done.stderr, rf"cannot write {readonly}/\S+: Permission denied")
                self.assertIn("choose a writable place", done.stderr)
        for directory in closed:
            self.assertEqual([path.name for path in directory.iterdir() if "closed" in path.name], [])

    def test_published_files_have_what_the_umask_allows_for_every_stage(self) -> None:
        place = with_both_adapters()
        merged = place.root / "umask"
        mask = All((Unchecked(), At("utils.planning.preflight.start", SetUmask(0o027))))
        for command, directory in (
            (["train_domain_adapter", "--domain.train.max_steps=2"], place.run_of("umask")),
            (["prepare_data", *place.sources], place.data / "prepared" / "umask"),
            (["inference", "--merge_path", str(merged)], merged),
        ):
            with self.subTest(command[0]):
                last_json(place.start(*command, "--run.name", "umask", before=mask).wait())
                for path in [directory, *directory.rglob("*")]:
                    if not path.name.startswith("."):
                        wanted = 0o750 if path.is_dir() else 0o640
                        self.assertEqual(stat.S_IMODE(path.stat().st_mode), wanted, path)
        with_077 = At("utils.planning.preflight.start", SetUmask(0o077))
        flags = ["--run.name", "umask-077", "--domain.train.max_steps=2"]
        last_json(place.start("train_domain_adapter", *flags, before=with_077).wait())
        self.assertEqual(stat.S_IMODE((place.run_of("umask-077") / ADAPTER).stat().st_mode), 0o600)


class Clocks(unittest.TestCase):
    def test_a_clock_that_is_set_back_changes_neither_a_resumed_run_nor_which_run_is_the_newest(self) -> None:
        place = trained()
        stop = At("utils.training.micro_batches.batch_loss", Send(signal.SIGKILL), 23)
        place.train("clock", before=stop).wait()
        done = place.train("clock", before=SetClockBack(10 * 365 * 86_400)).wait()
        last_json(done)
        self.assertRegex(done.stderr, r"resumed +step=8\b")
        self.assertEqual(contents(place.run_of("clock"))[ADAPTER], contents(place.run_of("reference"))[ADAPTER])
        self.assertEqual(runs.complete_runs(place.models, "domain")[0].directory.name, "clock")

    def test_the_newest_checkpoint_is_the_highest_step_whatever_the_times_and_the_order_of_copies_say(self) -> None:
        place = trained()
        place.train("copied", before=At("utils.training.micro_batches.batch_loss", Send(signal.SIGKILL), 41)).wait()
        root = place.run_of("copied") / "checkpoints"
        names = sorted(path.name for path in root.glob("step-*"))
        self.assertEqual(len(names), 2)
        moved = root.with_name("moved")
        root.rename(moved)
        generator = random.Random(1)
        for number, name in enumerate(sorted(names, reverse=True)):  # the newest is copied first
            shutil.copytree(moved / name, root / name)
            for path in [root / name, *(root / name).iterdir()]:
                moment = 1_000_000_000 + number * 1000 + generator.randint(0, 900)
                os.utime(path, (moment, moment))
        shutil.rmtree(moved)
        newest = checkpoints.newest_valid(root)
        self.assertEqual(newest and newest.name, names[-1])
        # one under the name of a later step is not what its manifest says
        shutil.copytree(root / names[0], root / "step-00000400")
        done = place.train("copied").wait()
        last_json(done)
        self.assertIn("a damaged checkpoint was set aside", done.stderr)
        self.assertRegex(done.stderr, rf"resumed +step={int(names[-1][5:])}\b")
        self.assertEqual(contents(place.run_of("copied"))[ADAPTER], contents(place.run_of("reference"))[ADAPTER])

    def test_the_same_step_damaged_twice_in_a_process_of_the_same_number_is_set_aside_twice(self) -> None:
        root = temporary_directory()
        for _ in range(3):
            (root / "step-00000004").mkdir()
            self.assertIsNone(checkpoints.newest_valid(root))
        self.assertEqual(len(list(root.glob("invalid-step-00000004*"))), 3)


class LeftBehind(unittest.TestCase):
    def setUp(self) -> None:
        self.root = temporary_directory()

    def left_by_a_killed_publish(self, name: str, resume: str = "") -> Path:
        done = run_program("killed_publish", str(self.root / name), resume)
        self.assertEqual(done.returncode, -signal.SIGKILL, done.stderr)
        (left,) = self.root.glob(f".{name}.*")
        return left

    def test_what_a_killed_process_left_goes_and_what_is_held_or_can_be_gone_on_from_or_is_not_ours_stays(self) -> None:
        dead, resumable = self.left_by_a_killed_publish("dead"), self.left_by_a_killed_publish("partial", "f" * 64)
        foreign = self.root / ".foreign.tmp"
        foreign.mkdir()
        (foreign / "work").write_text("another program's")
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        file_of_dead, file_of_living = (self.root / f".x.json.tmp-{pid}" for pid in (ended.pid, os.getppid()))
        for path in (file_of_dead, file_of_living):
            path.write_text("{")
        with files.publish(self.root / "held", dict) as held:
            (held / "weights").write_text("x")
            elsewhere = self.root / f".y.json.tmp-{ended.pid}@another-host"
            elsewhere.write_text("{")
            locks.sweep(self.root)
            self.assertTrue(elsewhere.exists(), "its process may live there")
            elsewhere.unlink()
            kept = {path.name for path in self.root.iterdir()}
        self.assertEqual(kept, {held.name, resumable.name, foreign.name, file_of_living.name})
        self.assertNotIn(dead.name, kept)
        self.assertTrue((self.root / "held" / "weights").is_file())

    def test_a_partial_of_other_settings_goes_once_its_target_is_there_and_not_before(self) -> None:
        other = self.left_by_a_killed_publish("model", "a" * 64)
        stopped = self.assertRaises(KeyboardInterrupt)
        with stopped, files.publish(self.root / "model", dict, resume="b" * 64):
            raise KeyboardInterrupt
        self.assertTrue(other.is_dir())
        with files.publish(self.root / "model", dict, resume="b" * 64) as directory:
            (directory / "weights").write_text("x")
        self.assertEqual([path.name for path in self.root.iterdir()], ["model"])

    def test_the_next_publish_does_not_take_over_what_a_killed_one_wrote(self) -> None:
        self.left_by_a_killed_publish("data")
        with files.publish(self.root / "data", dict) as directory:
            (directory / "whole").write_text("whole")
        self.assertEqual(sorted(path.name for path in (self.root / "data").iterdir()), ["manifest.json", "whole"])

    def test_a_publish_that_finds_its_target_finished_under_the_lock_is_refused(self) -> None:
        target = self.root / "model"

        def finished_meanwhile(path: Path) -> object:
            target.mkdir(exist_ok=True)
            (target / "weights").write_text("the other's")
            return lock(path)

        lock = locks._lock
        with mock.patch.object(locks, "_lock", finished_meanwhile), self.assertRaisesRegex(ArtefactError, "exists"):
            files.publish(target, dict, resume="f" * 64).__enter__()
        self.assertEqual((target / "weights").read_text(), "the other's")

    def test_a_damaged_pointer_or_manifest_of_one_run_does_not_stand_in_the_way_of_the_others(self) -> None:
        place = trained()
        models = self.root / "models"
        shutil.copytree(place.run_of("reference"), models / "domain" / "good")
        shutil.copytree(place.run_of("reference"), models / "domain" / "bad")
        (models / "domain" / "bad" / "manifest.json").write_text("{")
        for pointer in ("{", "[]", '{"run": 3}'):
            (models / "domain" / runs.LATEST).write_text(pointer)
            self.assertEqual([run.directory.name for run in runs.complete_runs(models, "domain")], ["good"])


def as_a_user() -> None:
    """Root's right to write anywhere goes; others have none."""
    if os.geteuid() == 0:
        obey_permissions()


def is_stopped(script: Script) -> bool:
    try:
        status = Path(f"/proc/{script.process.pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] == "T"


@dataclass(frozen=True)
class SetUmask:
    mask: int

    def __call__(self) -> None:
        os.umask(self.mask)


@dataclass(frozen=True)
class SetClockBack:
    """For this process it is so many seconds earlier."""

    seconds: float

    def __call__(self) -> None:
        import time

        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() - self.seconds
        time.time_ns = lambda: now_ns() - int(self.seconds * 1e9)


if __name__ == "__main__":
    unittest.main()
