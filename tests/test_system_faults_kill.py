"""SIGKILL at seeded random moments, restarted until done: the same bytes, nothing half-written, no step by hand.

`make test` kills often enough to see a break; `FAULT_TESTS=long` kills every stage twenty times.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.fault_support import (
    ADAPTER,
    LONG,
    SAVE_EVERY,
    All,
    Killer,
    Place,
    SlowWriting,
    contents,
    rubbish,
    trained,
    training_flags,
    while_writing,
    with_both_adapters,
    within,
)
from tests.support import ROOT, Script, clean_environment, last_json, temporary_directory
from utils.artifacts import files, runs
from utils.artifacts.runs import IDENTITY

SLOW = SlowWriting(0.02)


def metrics(directory: Path) -> list[dict[str, float]]:
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if "loss" in row]


def resumed_at(stderr: str) -> int | None:
    found = re.search(r"resumed +step=(\d+)", stderr)
    return int(found[1]) if found else None


def last_written(directory: Path) -> int:
    """When the metrics were written to, in nanoseconds; 0 before."""
    path = directory / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def newest_checkpoint(directory: Path) -> int:
    return max((int(path.name[5:]) for path in directory.glob("checkpoints/step-*")), default=0)


def processes_about(text: str) -> list[str]:
    """The numbers of processes with this in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if text.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def absent_or_whole(directory: Path) -> None:
    """What is published by a rename is not there, or (killed after it) all there."""
    if directory.exists():
        files.verify(directory)


class Training(unittest.TestCase):
    place: Place

    @classmethod
    def setUpClass(cls) -> None:
        cls.place = trained()

    def assert_same_as_reference(self, directory: Path) -> None:
        reference = self.place.run_of("reference")
        self.assertEqual((directory / ADAPTER).read_bytes(), (reference / ADAPTER).read_bytes())
        for key in ("step", "loss", "grad_norm", "learning_rate"):
            self.assertEqual([m[key] for m in metrics(directory)], [m[key] for m in metrics(reference)], key)
        files.verify(directory)
        self.assertEqual(rubbish(directory), [])

    def assert_nothing_half_written(self, directory: Path) -> None:
        if (directory / files.MANIFEST).exists():  # killed after the last rename
            files.verify(directory)
        for checkpoint in directory.glob("checkpoints/step-*"):
            files.verify(checkpoint)

    def test_killed_at_many_moments_of_which_several_inside_a_save(self) -> None:
        aims = [True, False] * (10 if LONG else 3)
        random.Random(7).shuffle(aims)
        killer, inside, number = Killer(20, len(aims)), 0, 0
        while killer.left:
            watched = Watched(self, f"killed-{number}")

            def moment(script: Script, generator: random.Random, watched: Watched = watched) -> None:
                if not aims[killer.killed]:
                    within(2.5)(script, generator)
                    return
                for _ in range(generator.randint(1, 2)):
                    script.wait_until(lambda: not watched.is_saving())
                    script.wait_until(watched.is_saving)
                time.sleep(generator.uniform(0.0, 0.25))

            last = killer.run(watched.start, moment, watched.after_a_kill)
            if not last_json(last)["reused"]:
                self.assertEqual(resumed_at(last.stderr) or 0, watched.newest)
            self.assert_same_as_reference(watched.directory)
            inside, number = inside + watched.inside, number + 1
        self.assertEqual(killer.killed, len(aims))
        self.assertGreaterEqual(inside, 8 if LONG else 2)

    @unittest.skipUnless(LONG, "a longer one of its kind: make fault-test")
    def test_killed_as_a_person_runs_it(self) -> None:
        generator = random.Random(3)
        script = str(ROOT / "scripts" / "train_domain_adapter.py")
        command = [sys.executable, script, *self.place.flags, "--run.name", "by-hand", *training_flags("domain")]
        directory = self.place.run_of("by-hand")
        for kill in range(5 if LONG else 1):
            process = subprocess.Popen(command, env=clean_environment(), stderr=subprocess.DEVNULL)
            wanted = generator.randint(6, 12) + 6 * kill
            while process.poll() is None and len(metrics(directory)) < wanted:
                time.sleep(0.005)
            time.sleep(generator.uniform(0, 0.05))
            process.kill()
            self.assertEqual(process.wait(), -signal.SIGKILL)
            self.assert_nothing_half_written(directory)
        newest = newest_checkpoint(directory)
        done = subprocess.run(command, env=clean_environment(), check=True, capture_output=True, text=True)
        self.assertEqual(resumed_at(done.stderr), newest)
        self.assert_same_as_reference(directory)


class TwoProcesses(unittest.TestCase):
    @unittest.skipUnless(LONG, "a longer one of its kind: make fault-test")
    def test_one_of_two_processes_killed_ends_the_other_and_the_run_ends_in_the_same_bytes(self) -> None:
        place, generator = trained(), random.Random(12)
        for done in [script.wait() for script in place.pair("two")]:
            self.assertEqual(done.returncode, 0, done.stderr)
        kills = 20 if LONG else 2
        number = 0
        while kills:
            directory = place.run_of(f"two-{number}")
            while True:
                newest, written = newest_checkpoint(directory), last_written(directory)
                scripts = place.pair(f"two-{number}", before=(SLOW, None))
                if kills:
                    wanted = newest + generator.randint(1, 12)
                    # a new line: before the two have met, only their launcher could tell one that the other is gone
                    scripts[0].wait_until(lambda d=directory, old=written: last_written(d) != old)
                    scripts[0].wait_until(lambda wanted=wanted, d=directory: len(metrics(d)) >= wanted)
                    time.sleep(generator.uniform(0.0, 0.2))
                    victim = generator.randint(0, 1)
                    scripts[victim].signal(signal.SIGKILL)
                ended = [script.wait() for script in scripts]
                if not any(done.returncode for done in ended):
                    break
                self.assertEqual(ended[victim].returncode, -signal.SIGKILL)
                other = ended[1 - victim]
                self.assertEqual(other.returncode, 75, other.stderr[-1000:])
                self.assertIn("another process of this run ended", other.stderr)
                self.assertNotIn("Traceback", other.stderr)
                kills -= 1
                for checkpoint in directory.glob("checkpoints/step-*"):
                    files.verify(checkpoint)
            self.assertEqual(resumed_at(ended[0].stderr) or 0, newest)
            self.assertEqual((directory / ADAPTER).read_bytes(), (place.run_of("two") / ADAPTER).read_bytes())
            number += 1


class Watched:
    """A run of the domain adapter with slow saves, and what is looked at whenever it was killed."""

    def __init__(self, test: Training, name: str):
        self.test, self.name, self.directory = test, name, test.place.run_of(name)
        self.inside = self.newest = 0

    def start(self) -> Script:
        self.newest = newest_checkpoint(self.directory)
        self.script = self.test.place.train(self.name, before=SLOW)
        return self.script

    def is_saving(self) -> bool:
        return any((self.directory / "checkpoints").glob(".*"))

    def after_a_kill(self) -> None:
        self.inside += self.is_saving()
        self.test.assert_nothing_half_written(self.directory)
        self.test.assertIn(resumed_at(self.script.stderr), (None, self.newest))
        if (self.directory / files.MANIFEST).exists():
            return
        done = max((m["step"] for m in metrics(self.directory)), default=0)
        self.test.assertLessEqual(done - newest_checkpoint(self.directory), SAVE_EVERY, "more than an interval is lost")


class Preparation(unittest.TestCase):
    def test_killed_preparation_shows_nothing_and_ends_in_the_same_data(self) -> None:
        place = trained()
        command = ["prepare_data", *place.sources, "--run.name", "killed"]
        directory = place.data / "prepared" / "killed"
        reference = last_json(place.run(*command[:-1], "whole"))
        killer = Killer(5, 20 if LONG else 2)

        def after() -> None:
            absent_or_whole(directory)
            seen = [run.directory.name for run in runs.complete_runs(place.data, "prepared")]
            self.assertEqual("killed" in seen, directory.exists())

        while killer.left:
            last_json(killer.run(lambda: place.start(*command, before=SLOW), within(1.2), after))
            self.assertEqual(contents(directory, "state.json"), contents(Path(reference["run"]), "state.json"))
            files.verify(directory)
            self.assertEqual(rubbish(place.data), [])
            directory.rename(directory.with_name(f"done-{len(list(directory.parent.glob('done-*')))}"))


class Merge(unittest.TestCase):
    def test_killed_merge_goes_on_at_the_next_file_and_ends_in_the_same_bytes(self) -> None:
        place = with_both_adapters()
        whole, killed = place.root / "whole", place.root / "killed"
        last_json(place.run("inference", "--merge_path", str(whole)))
        self.assertGreater(len(list(whole.glob("*.safetensors"))), 3)
        killer = Killer(6, 20 if LONG else 2)
        while killer.left:
            found = killer.run(
                lambda: place.start("inference", "--merge_path", str(killed), before=SLOW),
                within(2.5),
                lambda: absent_or_whole(killed),
            )
            last_json(found)
            # the card has the newest evaluation of these adapters, which may have been made in between
            self.assertEqual(contents(killed, "README.md"), contents(whole, "README.md"))
            files.verify(killed)
            self.assertEqual([p.name for p in place.root.iterdir() if p.name.startswith(".killed")], [])
            killed.rename(killed.with_name(f"killed-{len(list(killed.parent.glob('killed-*')))}"))

    def test_a_killed_merge_leaves_no_process_that_goes_on_loading_its_model(self) -> None:
        place = with_both_adapters()
        target = place.root / "orphaned"
        script = place.start("inference", "--merge_path", str(target), new_interpreter=True)
        script.wait_until(lambda: bool(processes_about("orphaned.partial")))
        time.sleep(0.3)
        script.signal(signal.SIGKILL)
        self.assertEqual(script.wait().returncode, -signal.SIGKILL)
        time.sleep(0.3)
        self.assertEqual(processes_about("orphaned.partial"), [])


class Evaluation(unittest.TestCase):
    def test_killed_evaluation_goes_on_at_the_next_cell_and_ends_in_the_same_numbers(self) -> None:
        place = with_both_adapters()
        whole = last_json(place.run("evaluate", "--run.name", "whole"))
        directory = place.run_of("killed", "evaluation")
        killer = Killer(8, 20 if LONG else 2)
        while killer.left:
            found = last_json(
                killer.run(
                    lambda: place.start("evaluate", "--run.name", "killed", before=SLOW),
                    while_writing(directory, 1.5),
                    lambda: absent_or_whole(directory) if (directory / files.MANIFEST).exists() else None,
                )
            )
            self.assertEqual(found["cells"], whole["cells"])
            files.verify(directory)
            self.assertEqual(rubbish(directory), [])
            directory.rename(directory.with_name(f"done-{killer.left}"))


class Composition(unittest.TestCase):
    def test_killed_composition_is_not_there_or_whole_and_ends_in_the_same_files(self) -> None:
        place = with_both_adapters()
        whole = Path(last_json(place.run("compose", "--run.name", "whole"))["composed"])
        directory = place.run_of("killed", "composed")
        killer = Killer(9, 20 if LONG else 2)
        while killer.left:
            killed = killer.killed
            last_json(
                killer.run(
                    lambda: place.start("compose", "--run.name", "killed", before=SLOW),
                    while_writing(directory, 2.0),
                    lambda: absent_or_whole(directory) if (directory / files.MANIFEST).exists() else None,
                )
            )
            without = ("config.json", "run.log")  # they name the run and the hour
            self.assertEqual(contents(directory, *without), contents(whole, *without))
            files.verify(directory)
            self.assertEqual(rubbish(place.models), [])
            directory.rename(directory.with_name(f"done-{killed}-{killer.left}"))


@dataclass(frozen=True)
class TemporaryFilesIn:
    """TMPDIR of a process that has already asked for it."""

    directory: Path

    def __call__(self) -> None:
        tempfile.tempdir = str(self.directory)


class Benchmark(unittest.TestCase):
    # merging starts four programs, which takes too long for a sample
    SUITES = ("merge", "inference") if LONG else ("inference", "training")
    FLAGS = (
        *("--benchmark.suite", ",".join(SUITES), "--benchmark.merge_gigabytes", "0.002"),
        *("--benchmark.repeats", "1", "--benchmark.prompt_tokens", "16", "--benchmark.new_tokens", "2"),
        *("--benchmark.batch_sizes", "1", "--benchmark.training_tokens", "2048"),
    )

    def test_killed_benchmark_goes_on_at_the_next_suite_and_leaves_nothing_behind(self) -> None:
        place, directory = with_both_adapters(), with_both_adapters().run_of("killed", "benchmark")
        aside = temporary_directory()
        first, killer = directory / f"suite_{self.SUITES[0]}.json", Killer(10, 20 if LONG else 2)
        measured: list[str] = []

        def after() -> None:
            if first.exists():
                measured.append(first.read_text(encoding="utf-8"))
            if (directory / files.MANIFEST).exists():
                files.verify(directory)

        def moment(script: Script, generator: random.Random) -> None:
            """In the first suite, and in the one behind it, in turn."""
            if killer.killed % 2:
                script.wait_until(first.exists)
                within(0.5)(script, generator)
            else:
                script.wait_until((directory / IDENTITY).exists)
                within(1.0)(script, generator)

        def start() -> Script:
            command = ["benchmark", "--run.name", "killed", *self.FLAGS]
            return place.start(*command, before=All((SLOW, TemporaryFilesIn(aside))))

        while killer.left:
            last_json(killer.run(start, moment, after))
            if measured:
                self.assertEqual(first.read_text(encoding="utf-8"), measured[-1], "a suite was measured again")
            self.assertEqual(set(files.read_object(directory / "results.json")), {"machine", *self.SUITES})
            files.verify(directory)
            self.assertEqual((rubbish(directory), list(aside.iterdir())), ([], []))
            directory.rename(directory.with_name(f"done-{killer.left}"))
            measured.clear()


if __name__ == "__main__":
    unittest.main()
