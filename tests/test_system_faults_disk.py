"""A full disk at every artefact: the path and the bytes are named, what was there still verifies, no half of anything
can be seen, and once there is space again the same command goes on.

Two routes: a small file system of its own, where one may be mounted, and a limit on file sizes everywhere.
"""

from __future__ import annotations

import shutil
import unittest
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.fault_support import (
    ADAPTER,
    LONG,
    All,
    At,
    FillDisk,
    LimitFiles,
    Place,
    Raise,
    Unchecked,
    contents,
    rubbish,
    small_disk,
    trained,
    with_both_adapters,
)
from tests.support import Completed, Script, last_json
from utils import disk
from utils.artifacts import files, runs
from utils.data import prepared
from utils.data.corpus import prepared_documents
from utils.exceptions import ArtefactError
from utils.models import chat
from utils.training import checkpoints


@dataclass(frozen=True)
class WhenWriting:
    """Before a file of this name is written by `files.write_text`, `act` is called."""

    name: str
    act: Callable[[], None]

    def __call__(self) -> None:
        original = files.write_text

        def write(path: Path, text: str) -> None:
            if path.name == self.name:
                self.act()
            original(path, text)

        files.write_text = write


class OnASmallDisk(unittest.TestCase):
    """Data and models are on a file system that is filled to its last byte at one place of each command."""

    place: Place

    @classmethod
    def setUpClass(cls) -> None:
        cls.root = cls.enterClassContext(small_disk("64m"))
        source = with_both_adapters()
        cls.place = Place()
        for name in ("data", "models"):
            shutil.copytree(getattr(source, name), cls.root / name)
            setattr(cls.place, name, cls.root / name)
        cls.ballast = cls.root / "ballast"

    def fails_then_works(
        self,
        start: Callable[[Callable[[], None] | None], Script],
        fault: Callable[[Callable[[], None]], object],
        at: str,
    ) -> Completed:
        """Run out of space there: refused with path and bytes; with space again the same command ends well."""
        intact = {run.directory: run.digest for stage in ("domain", "task") for run in self.runs(stage)}
        done = start(fault(FillDisk(self.ballast))).wait()
        self.assertEqual(done.returncode, 2, done.stderr[-3000:])
        self.assertNotIn("Traceback", done.stderr)
        self.assertRegex(done.stderr, rf"cannot write {self.root}/\S*{at}\S*: No space left on device \(\d[\d,]* bytes")
        self.assertIn("free space on the disk that holds", done.stderr)
        for directory, digest in intact.items():
            self.assertEqual(files.verify(directory)["digest"], digest)
        self.ballast.unlink()
        found = start(None).wait()
        last_json(found)
        return found

    def runs(self, stage: str) -> list[runs.Run]:
        return runs.complete_runs(self.place.models, stage)

    def test_training_at_its_checkpoint_adapter_manifest_and_record(self) -> None:
        reference = contents(self.place.run_of("reference"))[ADAPTER]
        for name, at, fault in (
            ("checkpoint", "step-00000008", lambda fill: At("safetensors.torch.save_file", fill, 4)),
            ("adapter", "adapter_model.safetensors", lambda fill: At("utils.adapters.adapter_files._write", fill)),
            ("manifest", "manifest.json", lambda fill: At("utils.artifacts.files.seal", fill, 12)),
            ("identity", r"(identity\.json|run\.log)", lambda fill: At("utils.artifacts.runs.start", fill)),
        ):
            with self.subTest(name):

                def start(act: Callable[[], None] | None, name: str = name) -> Script:
                    return self.place.train(f"full-{name}", before=act)

                done = self.fails_then_works(start, fault, at)
                directory = self.place.run_of(f"full-{name}")
                if name != "identity":
                    self.assertIn("resumed", done.stderr)
                self.assertEqual(contents(directory)[ADAPTER], reference)
                self.assertEqual(rubbish(directory), [])

    def test_prepared_data_in_the_middle_and_at_its_manifest(self) -> None:
        for name, fault in (
            ("tokens", lambda fill: At("datasets.Dataset.save_to_disk", fill)),
            ("reading", lambda fill: At("datasets.arrow_writer.ArrowWriter.finalize", fill)),
            ("pairs", lambda fill: WhenWriting("task_dev.jsonl", fill)),
            ("sealed", lambda fill: At("utils.artifacts.files.seal", fill)),
        ):
            with self.subTest(name):

                def start(act: Callable[[], None] | None, name: str = name) -> Script:
                    return self.place.start(
                        "prepare_data", *self.place.sources, "--run.name", f"full-{name}", before=act
                    )

                self.fails_then_works(start, fault, "")
                self.assertEqual(rubbish(self.place.data), [])
                files.verify(self.place.data / "prepared" / f"full-{name}")

    def test_merge_keeps_its_files_and_goes_on(self) -> None:
        target = self.root / "merged"

        def start(act: Callable[[], None] | None) -> Script:
            faults = All((Unchecked(), *([act] if act else [])))
            return self.place.start("inference", "--merge_path", str(target), before=faults)

        self.fails_then_works(start, lambda fill: At("utils.export.merge._write_companions", fill), "merged")
        files.verify(target)
        self.assertEqual([path.name for path in self.root.iterdir() if path.name.startswith(".")], [])

    @unittest.skipUnless(LONG, "a longer one of its kind: make fault-test")
    def test_evaluation_and_composition_at_their_report(self) -> None:
        for script, stage, at in (("evaluate", "evaluation", "results.json"), ("compose", "composed", "config.json")):
            with self.subTest(script):

                def start(act: Callable[[], None] | None, script: str = script) -> Script:
                    return self.place.start(script, "--run.name", "full", before=act)

                self.fails_then_works(start, lambda fill, at=at: WhenWriting(at, fill), at)
                files.verify(self.place.run_of("full", stage))


class WithALimitOnFiles(unittest.TestCase):
    """RLIMIT_FSIZE: no file may grow beyond so many bytes. Needs no rights, so it is tried everywhere."""

    def fails(self, script: Script, at: str) -> None:
        done = script.wait()
        self.assertEqual(done.returncode, 2, done.stderr[-3000:])
        self.assertNotIn("Traceback", done.stderr)
        self.assertRegex(done.stderr, rf"cannot write \S*{at}: File too large")
        self.assertIn("ulimit -f", done.stderr)

    def test_log_metrics_checkpoint_and_adapter_name_their_file_and_the_run_goes_on(self) -> None:
        place = trained()
        for name, at, fault in (
            ("log", r"run\.log", At("utils.artifacts.runs.start", LimitFiles(4000))),
            ("metrics", r"metrics\.jsonl", At("utils.training.guards.disk.append_line", LimitFiles(3600), 30)),
            ("checkpoint", "step-00000008", At("safetensors.torch.save_file", LimitFiles(8000), 4)),
            ("adapter", r"adapter_model\.safetensors", At("utils.adapters.adapter_files._write", LimitFiles(8000))),
        ):
            with self.subTest(name):
                directory = place.run_of(f"limit-{name}")
                if name == "log":  # one that earlier attempts have filled
                    directory.mkdir()
                    (directory / "run.log").write_text("{}\n" * 1330)
                self.fails(place.train(f"limit-{name}", before=fault), at)
                self.assertFalse((directory / files.MANIFEST).exists())
                for path in directory.glob("*.jsonl"):
                    self.assertTrue(path.read_text().endswith("\n"), "half a line")
                last_json(place.train(f"limit-{name}").wait())
                self.assertEqual(contents(directory)[ADAPTER], contents(place.run_of("reference"))[ADAPTER])

    @unittest.skipUnless(LONG, "a longer one of its kind: make fault-test")
    def test_merge_names_its_target_and_goes_on(self) -> None:
        place = with_both_adapters()
        target = place.root / "limited"
        flags = ["--merge_path", str(target)]
        self.fails(
            place.start(
                "inference", *flags, before=At("utils.models.weights.safetensors_io.write", LimitFiles(100_000))
            ),
            "/limited",
        )
        self.assertFalse(target.exists())
        last_json(place.start("inference", *flags, before=Unchecked()).wait())
        files.verify(target)


class Estimates(unittest.TestCase):
    """What is needed is asked for before anything is written."""

    def test_a_disk_too_small_for_the_checkpoints_of_a_run_is_refused_before_its_first_step(self) -> None:
        place = trained()
        done = place.train("no-space", before=SmallDisk(200_000)).wait()
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertRegex(
            done.stderr, r"training with 2 kept checkpoints needs [\d,]{6,} more bytes .* 200,000 are free"
        )
        self.assertFalse((place.run_of("no-space") / "metrics.jsonl").exists())
        last_json(place.train("no-space").wait())

    def test_the_estimate_of_a_checkpoint_is_what_it_takes(self) -> None:
        place = trained()
        ended = At("utils.adapters.adapter_files.save", Raise("builtins.KeyboardInterrupt", ""))
        place.train("measured", "--domain.train.max_steps=12", before=ended).wait()
        checkpoint = place.run_of("measured") / "checkpoints" / "step-00000008"
        taken = sum(path.stat().st_size for path in checkpoint.iterdir())
        estimate = checkpoints.size_bytes(load_file(place.run_of("reference") / ADAPTER))
        self.assertLessEqual(taken, estimate)
        self.assertLessEqual(estimate, taken + 2 * checkpoints._SMALL_FILES)

    def test_the_estimate_of_prepared_data_is_what_it_takes(self) -> None:
        place = trained()
        run = runs.complete_runs(place.data, "prepared")[0]
        data = prepared.Prepared(run.directory)
        parts = [data.documents(name).select_columns(["id", "text"]) for name in ("corpus", "dev_documents")]
        tokenizer = chat.load_tokenizer(place.models / "base" / "tiny-minimax-m2")
        estimate = (prepared_documents.space_bytes(parts, tokenizer) - prepared_documents.SMALL_FILES) / 2
        arrow = [p for name in ("corpus", "dev_documents") for p in (run.directory / name).glob("*.arrow")]
        taken = sum(path.stat().st_size for path in arrow)
        self.assertLess(abs(estimate / taken - 1), 0.15, (estimate, taken))

    def test_a_disk_too_small_for_prepared_data_is_refused_before_tokenising(self) -> None:
        place = trained()
        command = ["prepare_data", *place.sources, "--run.name", "no-space"]
        done = place.start(*command, before=SmallDisk(1000)).wait()
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertRegex(done.stderr, r"preparing these documents needs [\d,]{6,} more bytes .* 1,000 are free")
        self.assertNotIn("tokenising", done.stderr)
        self.assertEqual([p.name for p in (place.data / "prepared").iterdir() if "no-space" in p.name], [])

    def test_an_interrupted_merge_with_other_settings_is_kept_and_mentioned_until_the_target_is_there(self) -> None:
        place = with_both_adapters()
        target = place.root / "changed"
        stop = At("utils.export.merge._write_companions", LimitFiles(10))
        place.start("inference", "--merge_path", str(target), "--merge.dtype", "bfloat16", before=stop).wait()
        kept = next(place.root.glob(".changed.partial-*"))
        flags = ["--merge_path", str(target), "--merge.dtype", "float32"]
        done = place.start("inference", *flags, before=Unchecked()).wait()
        last_json(done)
        self.assertIn("an interrupted merge with other settings is kept", done.stderr)
        self.assertFalse(kept.exists(), "the target is taken: it cannot be gone on from")


@dataclass(frozen=True)
class SmallDisk:
    """The disk says that this many bytes are free."""

    free: int

    def __call__(self) -> None:
        disk.shutil.disk_usage = lambda path: mock.Mock(free=self.free)


class Translation(unittest.TestCase):
    """Whichever library met the full disk, it is recognised; what is no fault of the disk is left alone."""

    def test_the_words_of_each_library_become_one_error(self) -> None:
        full = OSError(28, "No space left on device")
        generating = DatasetGenerationError("An error occurred while generating the dataset")
        generating.__cause__ = full
        said = [
            full,
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            OSError("Not enough disk space. Needed: Unknown size"),
            generating,
        ]
        for error in said:
            refused = self.assertRaisesRegex(ArtefactError, "cannot write x: No space")
            with self.subTest(type(error).__name__), refused, disk.errors(Path("x")):
                raise error

    def test_other_errors_pass(self) -> None:
        cause = ValueError("a bug")
        cause.__cause__ = OSError(2, "No such file or directory")
        for error in (cause, SafetensorError("header too large"), RuntimeError("os error 28"), KeyboardInterrupt()):
            with self.assertRaises(type(error)) as caught, disk.errors(Path("x")):
                raise error
            self.assertIs(caught.exception, error)

    def test_safetensors_and_datasets_still_say_it_in_these_words(self) -> None:

        with small_disk("1m") as full:
            FillDisk(full / "ballast")()
            for name, write in (
                ("safetensors", lambda path: save_file({"x": torch.zeros(100_000)}, path)),
                ("datasets", lambda path: Dataset.from_dict({"x": ["y" * 1000] * 100}).save_to_disk(str(path))),
            ):
                refused = self.assertRaisesRegex(ArtefactError, f"{full / name}: No space left")
                with self.subTest(name), refused, disk.errors(full / name):
                    write(full / name)


if __name__ == "__main__":
    unittest.main()
