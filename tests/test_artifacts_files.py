"""Files and directories appear whole or not at all, damage is named, and one process at a time holds a run."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from tests.support import ROOT, clean_environment, run_program, temporary_directory
from utils.artifacts import files, locks
from utils.exceptions import ArtefactError

WAITING = "waiting for the base model, which another process makes"


class Base(unittest.TestCase):
    def setUp(self) -> None:
        self.root = temporary_directory()

    def artefact(self) -> Path:
        target = self.root / "artefact"
        with files.publish(target, lambda: {"kind": "test"}) as directory:
            (directory / "a.txt").write_text("first")
            (directory / "sub").mkdir()
            (directory / "sub" / "b.bin").write_bytes(bytes(100))
        return target

    def nothing_but(self, *names: str) -> None:
        self.assertEqual(sorted(p.name for p in self.root.iterdir()), sorted(names))


class Writing(Base):
    def test_written_text_is_read_back_and_leaves_no_temporary_file(self) -> None:
        path = self.root / "x.json"
        for value in ({"a": 1}, {"ä": [1.5, None]}):
            files.write_json(path, value)
            self.assertEqual(files.read_json(path), value)
        self.nothing_but("x.json")

    def test_failed_write_leaves_the_old_content(self) -> None:
        path = self.root / "x.txt"
        files.write_text(path, "old")
        full = mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with full, self.assertRaisesRegex(ArtefactError, "No space left on device.*\n.*free space"):
            files.write_text(path, "new")
        self.assertEqual(path.read_text(), "old")
        self.nothing_but("x.txt")

    def test_full_disk_leaves_the_old_content_and_no_artefact(self) -> None:
        if not hasattr(resource, "RLIMIT_FSIZE"):
            self.skipTest("no RLIMIT_FSIZE here")
        (self.root / "kept.txt").write_text("old")
        done = run_program("limited_writes", str(self.root), "text", "artefact")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(f"cannot write {self.root / 'kept.txt'}: File too large", done.stdout)
        self.assertIn(f"cannot write {self.root / 'artefact'}: File too large", done.stdout)
        self.assertEqual((self.root / "kept.txt").read_text(), "old")
        self.nothing_but("kept.txt")

    def test_path_below_a_regular_file_is_an_artefact_error_that_says_so(self) -> None:
        (self.root / "file").write_text("x")
        below = self.root / "file" / "below"
        for write in (
            lambda: files.write_text(below, "x"),
            lambda: files.make_directory(below),
            lambda: files.publish(below, dict).__enter__(),
            lambda: files.locked(below, "the run").__enter__(),
        ):
            with self.assertRaisesRegex(ArtefactError, "a file stands where a directory is needed"):
                write()

    def test_directory_without_write_permission_is_an_artefact_error(self) -> None:
        if os.geteuid() == 0:
            self.skipTest("root may write anywhere")
        self.root.chmod(0o500)
        self.addCleanup(self.root.chmod, 0o700)
        with self.assertRaisesRegex(ArtefactError, "choose a writable place"):
            files.write_text(self.root / "x", "x")

    def test_reading_what_is_missing_or_no_json_names_the_file(self) -> None:
        (self.root / "broken.json").write_text("{")
        (self.root / "binary.json").write_bytes(b"\xff\xfe")
        with self.assertRaisesRegex(ArtefactError, "missing.json does not exist"):
            files.read_json(self.root / "missing.json")
        for name in ("broken.json", "binary.json"):
            with self.assertRaisesRegex(ArtefactError, f"{name} is not valid JSON"):
                files.read_json(self.root / name)

    def test_equal_values_have_equal_fingerprints(self) -> None:
        self.assertEqual(files.fingerprint({"a": 1, "b": [1, 2]}), files.fingerprint({"b": [1, 2], "a": 1}))
        self.assertNotEqual(files.fingerprint({"a": [1, 2]}), files.fingerprint({"a": [2, 1]}))


class Publishing(Base):
    def test_manifest_covers_every_file_and_is_written_last(self) -> None:
        order: list[str] = []
        original = files.write_text
        with mock.patch.object(files, "write_text", lambda p, t: (order.extend(files_in(p.parent)), original(p, t))):
            target = self.artefact()
        self.assertEqual(order, [".lock", "a.txt", "sub/b.bin"])
        self.assertFalse((target / ".lock").exists())
        manifest = files.read_json(target / files.MANIFEST)
        self.assertEqual({n: f["bytes"] for n, f in manifest["files"].items()}, {"a.txt": 5, "sub/b.bin": 100})
        self.assertEqual(manifest["files"]["a.txt"]["sha256"], files.sha256_file(target / "a.txt"))
        self.assertEqual(files.verify(target), manifest)

    def test_nothing_is_visible_while_an_artefact_is_written_or_after_an_error(self) -> None:
        target = self.root / "artefact"
        with self.assertRaises(KeyboardInterrupt), files.publish(target, dict) as directory:
            (directory / "a.txt").write_text("half")
            self.assertFalse(target.exists())
            self.assertTrue(directory.name.startswith("."))
            raise KeyboardInterrupt
        self.nothing_but()

    def test_a_failing_manifest_publishes_nothing(self) -> None:
        with self.assertRaises(ZeroDivisionError), files.publish(self.root / "artefact", lambda: {"x": 1 // 0}):
            pass
        self.nothing_but()

    def test_target_that_is_not_empty_is_refused_and_left_as_it_was(self) -> None:
        target = self.artefact()
        before = files.verify(target)
        with self.assertRaisesRegex(ArtefactError, "already exists and is not empty"):
            files.publish(target, dict).__enter__()
        self.assertEqual(files.verify(target), before)
        (self.root / "file").write_text("x")
        with self.assertRaisesRegex(ArtefactError, "already exists"):
            files.publish(self.root / "file", dict).__enter__()

    def test_empty_target_is_taken(self) -> None:
        (self.root / "artefact").mkdir()
        files.verify(self.artefact())

    def test_permissions_are_what_the_umask_allows(self) -> None:
        for mask in (0o022, 0o027, 0o077, 0o777):
            before = os.umask(mask)
            try:
                path = self.root / f"{mask:o}"
                path.mkdir(mode=0o700)
                path.chmod(0o700)
                (path / "weights").touch()
                (path / "weights").chmod(0o600)
                files.seal(path, {})
                self.assertEqual(files.current_umask(), mask)
            finally:
                os.umask(before)
            self.assertEqual((path / "weights").stat().st_mode & 0o777, 0o666 & ~mask | 0o600)


class Verifying(Base):
    def damaged(self, pattern: str, target: Path, **options: bool) -> None:
        with self.assertRaisesRegex(ArtefactError, pattern):
            files.verify(target, **options)

    def test_each_kind_of_damage_is_named(self) -> None:
        target = self.artefact()
        path = target / "sub" / "b.bin"
        path.write_bytes(bytes(99))
        self.damaged(r"sub/b\.bin has 99 bytes, its manifest says 100", target)
        path.write_bytes(bytes(99) + b"\1")
        self.damaged(r"sub/b\.bin was changed after it was written", target)
        files.verify(target, hash_files=False)
        path.unlink()
        self.damaged(r"sub/b\.bin is missing", target, hash_files=False)
        (target / "a.txt").write_text("First")
        self.damaged(r"(?s)2 problems.*a\.txt was changed.*b\.bin is missing.*restore", target)
        (target / files.MANIFEST).unlink()
        self.damaged("manifest.json does not exist", target)

    def test_a_manifest_that_leads_out_of_its_directory_is_refused(self) -> None:
        target = self.artefact()
        (self.root / "outside").write_text("secret")
        manifest = files.read_json(target / files.MANIFEST)
        for name in ("../outside", str(self.root / "outside"), "link"):
            manifest["files"] = {name: {"bytes": 6, "sha256": files.sha256_file(self.root / "outside")}}
            files.write_json(target / files.MANIFEST, manifest)
            (target / "link").unlink(missing_ok=True)
            (target / "link").symlink_to(self.root / "outside")
            self.damaged("leads out of", target)


class Scratch(Base):
    def test_what_a_killed_process_left_is_removed_and_what_another_uses_stays(self) -> None:
        with mock.patch.object(tempfile, "tempdir", str(self.root)):
            left, foreign = self.root / ".corpora-left.tmp", self.root / ".corpora-notours.tmp"
            for folder in (left, foreign):
                folder.mkdir()
                (folder / "large").write_text("x")
            (left / locks.LOCK).touch()
            (self.root / ".corpora-link.tmp").symlink_to(self.root)
            with locks.scratch("corpora") as mine:
                (mine / "mine").touch()
                with locks.scratch("corpora") as other:
                    self.assertTrue((mine / "mine").exists(), "it is in use")
                    self.assertNotEqual(mine, other)
                self.assertEqual([left.exists(), foreign.exists(), other.exists()], [False, True, False])
            self.assertFalse(mine.exists())


class Locking(Base):
    def test_second_holder_is_refused_and_told_who_holds_it_until_that_one_dies(self) -> None:
        directory = self.root / "run"
        holder = subprocess.Popen(
            [sys.executable, "-m", "tests.programs.hold_lock", str(directory)],
            cwd=ROOT,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdout is not None
        self.addCleanup(holder.wait)
        self.addCleanup(holder.kill)
        self.assertEqual(holder.stdout.readline(), "held\n")
        with self.assertRaisesRegex(ArtefactError, f"in use by process {holder.pid}\\b"):
            files.locked(directory, "the run").__enter__()

        def take_when_free() -> None:
            with files.locked(directory, "the base model", waits=True):
                pass

        with self.assertLogs("adapters", "INFO") as logged, ThreadPoolExecutor() as pool:
            taken = pool.submit(take_when_free)
            with self.assertRaises(TimeoutError):
                taken.result(timeout=4 * locks.POLL_SECONDS)
            holder.kill()
            taken.result(timeout=60)
        self.assertEqual([record.getMessage() for record in logged.records], [WAITING])
        self.assertTrue(logged.records[0].facts["by"].startswith(f"process {holder.pid} "))
        holder.wait()
        holder.stdout.close()
        with files.locked(directory, "the run"):
            self.assertTrue((directory / ".lock").read_text().startswith(f"process {os.getpid()} on "))
        with files.locked(directory, "the run"):
            pass


def files_in(directory: Path) -> list[str]:
    return [p.relative_to(directory).as_posix() for p in sorted(directory.rglob("*")) if p.is_file()]


if __name__ == "__main__":
    unittest.main()
