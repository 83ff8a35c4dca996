"""`scripts/runs.py` as a person types it, on sealed runs that were not trained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

from utils.artifacts import files, locks, run_list, run_tables, runs
from utils.artifacts.identity import Identity
from utils.artifacts.runs import Run

ROOT = Path(__file__).resolve().parents[1]
BASE = {"source": "toy:minimax_m2", "digest": "b" * 64, "tokenizer_digest": "c" * 64, "directory": "models/base/toy"}


def made(
    root: Path, stage: str, name: str, parents: tuple[Run, ...] = (), loss: float | None = None, **facts: Any
) -> Run:
    """A complete run, sealed as the stages seal theirs."""
    directory = root / ("data" if stage == "prepared" else "models") / stage / name
    directory.mkdir(parents=True)
    (directory / "contents.bin").write_bytes(f"{name}{loss}".encode() * 1000)
    settings = {"on": "domain", "tokenizer": "t", "base": "b", "adapters": [], **facts.pop("settings", {})}
    identity = Identity({"stage": stage, "method": 1, **settings, "name": name})
    measured = {} if loss is None else {"best_dev_loss": loss, "steps": 7}
    more: dict[str, Any] = {"counts": {}, "system_prompt": "", **facts}
    if stage == "composed":
        more["composition"] = {"recipe": {"weights": []}, "searched": False, "exact": True}
    if "results" in more:
        files.write_json(directory / "results.json", more.pop("results"))
    recorded = runs.manifest(stage, identity, base=BASE, parents=list(parents), measured=measured, **more)
    return Run(directory, files.seal(directory, recorded))


class Runs(unittest.TestCase):
    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="adapter-tests-"))
        self.addCleanup(shutil.rmtree, self.root)
        self.data = made(self.root, "prepared", "docs")
        self.first = made(self.root, "domain", "first", (self.data,), 2.5, settings={"lora": {"rank": 8}})
        self.second = made(self.root, "domain", "second", (self.data,), 2.25, settings={"lora": {"rank": 16}})
        self.task = made(self.root, "task", "legal", (self.data, self.second), 0.75)
        self.composed = made(self.root, "composed", "both", (self.second, self.task))
        results = {"verdict": "helps", "contrasts": {"H3": {"estimate": 0.5}}}
        self.judged = made(self.root, "evaluation", "proof", (self.composed, self.task), results=results)

    def run_script(self, *words: str, root: Path | None = None) -> subprocess.CompletedProcess[str]:
        place = root or self.root
        roots = ["--run.data_dir", str(place / "data"), "--run.models_dir", str(place / "models")]
        command = [sys.executable, str(ROOT / "scripts" / "runs.py"), *words, *roots]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("DTA_")}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=kept)

    def said(self, *words: str, root: Path | None = None) -> tuple[dict[str, Any], str]:
        done = self.run_script(*words, root=root)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout.splitlines()[-1]), done.stdout

    def unfinished(self, name: str, *, days: float) -> Path:
        directory = self.root / "models" / "task" / name
        (directory / "checkpoints" / "step-1").mkdir(parents=True)
        files.write_json(directory / runs.IDENTITY, {"stage": "task", "method": 1, "on": "base"})
        old = time.time() - days * 86_400
        for path in [*directory.rglob("*"), directory]:
            os.utime(path, (old, old))
        return directory

    def test_list_says_what_there_is_and_what_differs(self) -> None:
        self.unfinished("begun", days=1)
        found, text = self.said("list")
        by_name = {one["name"]: one for one in found["runs"]}
        self.assertEqual(by_name["domain/second"]["children"], ["task/legal", "composed/both"])
        self.assertEqual(by_name["domain/first"]["dev_loss"], 2.5)
        self.assertEqual((by_name["composed/both"]["verdict"], by_name["task/legal"]["data"]), ("helps", "docs"))
        self.assertEqual(by_name["task/begun"]["state"], "unfinished")
        line = next(line for line in text.splitlines() if line.startswith("domain/first"))
        self.assertIn("lora.rank=8", line)
        self.assertNotIn("on=", line)

    def test_an_unreadable_run_is_listed_with_the_reason_and_hides_no_other(self) -> None:
        (self.first.directory / files.MANIFEST).write_text("{")
        found, _ = self.said("list")
        states = {one["name"]: one["state"] for one in found["runs"]}
        self.assertIn("unreadable", states["domain/first"])
        self.assertEqual(states["domain/second"], "complete")

    def test_a_line_of_the_list_has_what_a_run_does_not_share_with_most_of_its_stage(self) -> None:
        for name, rank, started in (("a", 8, ""), ("b", 8, ""), ("c", 8, "f" * 64), ("d", 4, "")):
            made(self.root, "task", name, (self.data,), settings={"lora": {"rank": rank}, "init_from": started})
        lines = run_tables.listing(run_list.entries(self.root / "data", self.root / "models")).splitlines()
        own = {line.split()[0]: line for line in lines}
        self.assertTrue(own["task/c"].endswith(" init_from=ffffffff, name=c"), own["task/c"])
        self.assertTrue(own["task/d"].endswith(" lora.rank=4, name=d"), own["task/d"])
        self.assertTrue(own["task/a"].endswith(" name=a"), own["task/a"])

    def test_show_compare_and_best(self) -> None:
        shown, text = self.said("show", "domain/second")
        self.assertEqual(shown["settings"]["lora"], {"rank": 16})
        self.assertIn("child      task/legal", text)
        compared, text = self.said("compare", "first", "second")
        self.assertEqual(compared["differing"]["lora.rank"], [8, 16])
        self.assertRegex(text, r"dev loss +2\.5 +2\.25")
        found, _ = self.said("best")
        self.assertEqual(
            {b["name"] for b in found["best"]}, {"domain/second", "task/legal", "composed/both", "evaluation/proof"}
        )

    def test_a_matrix_hides_no_verdict_and_one_adapter_is_ranked_by_its_own_gain(self) -> None:
        made(self.root, "evaluation", "matrix", (self.composed, self.task), results={"matrix": {"pairs": []}})
        for name, gain in (("little", 0.1), ("much", 0.4)):
            results = {"verdict": "helps", "alone": "task", "contrasts": {"T1": {"estimate": gain}}}
            made(self.root, "evaluation", name, (self.data, self.task), results=results)
        bare = {"verdict": "undecided", "alone": "domain", "contrasts": {}}
        made(self.root, "evaluation", "bare", (self.data, self.task), results=bare)
        listed = run_list.entries(self.root / "data", self.root / "models")
        self.assertEqual({one.name: one.verdict for one in listed}["composed/both"], "helps")
        best = {one.name: why for one, why in run_list.best(listed) if one.stage in ("composed", "evaluation")}
        gained = "gain {} nats per token".format
        self.assertEqual(set(best), {"composed/both", "evaluation/proof", "evaluation/much", "evaluation/bare"})
        self.assertEqual(best["evaluation/bare"], "undecided, gain not measured")
        self.assertIn(gained("+0.500"), best["composed/both"])
        self.assertIn(gained("+0.400"), best["evaluation/much"])

    def test_names_that_are_none_or_several_are_refused_together(self) -> None:
        made(self.root, "task", "first")
        done = self.run_script("compare", "first", "domain/secnd")
        self.assertEqual(done.returncode, 2)
        self.assertIn("say domain/first or task/first", done.stderr)
        self.assertIn("did you mean domain/second", done.stderr)
        for words, part in (
            (("compare", "legal"), "two or more"),
            (("show",), "one run"),
            (("export", "both"), "--runs.archive"),
        ):
            done = self.run_script(*words)
            self.assertEqual((done.returncode, "Traceback" in done.stderr), (2, False), done.stderr)
            self.assertIn(part, done.stderr)

    def test_rm_says_what_goes_and_removes_only_with_yes(self) -> None:
        found, text = self.said("rm", "domain/second")
        for child in ("task/legal", "composed/both", "evaluation/proof"):
            self.assertIn(f"{child} was made from domain/second: verify will no longer trust it", text)
        self.assertTrue(self.second.directory.is_dir())
        self.assertEqual(len(found["would_remove"]), 1)
        found, text = self.said("rm", "domain/first", "--yes")
        self.assertNotIn("warning: ", text)
        self.assertFalse(self.first.directory.exists())
        _, text = self.said("rm", "evaluation/proof", "composed/both")  # children that go too are no warning
        self.assertNotIn("warning: ", text)

    def test_a_live_run_is_refused_before_anything_is_gone(self) -> None:
        with locks.locked(self.second.directory, "the run"):
            done = self.run_script("rm", "domain/first", "domain/second", "--yes")
        self.assertEqual(done.returncode, 2)
        self.assertIn("is in use by process", done.stderr)
        self.assertIn("wait for it, or stop that process", done.stderr)
        self.assertTrue(self.first.directory.is_dir() and self.second.directory.is_dir())

    def test_prune_takes_old_leftovers_and_no_complete_run(self) -> None:
        old, new = self.unfinished("old", days=20), self.unfinished("new", days=2)
        kept = self.first.directory / "checkpoints"
        kept.mkdir()
        (kept / "weights").write_bytes(b"x" * 10)
        long_ago = time.time() - 30 * 86_400
        for path in (kept / "weights", kept):
            os.utime(path, (long_ago, long_ago))
        found, _ = self.said("prune")
        self.assertEqual({one["path"] for one in found["would_remove"]}, {str(old), str(kept)})
        self.assertTrue(old.is_dir() and kept.is_dir())
        self.said("prune", "--yes")
        self.assertFalse(old.exists() or kept.exists())
        self.assertTrue(new.is_dir() and self.first.directory.is_dir())
        files.verify(self.first.directory)
        found, _ = self.said("prune", "--runs.older_than_days", "1")
        self.assertEqual([one["path"] for one in found["would_remove"]], [str(new)])

    def test_export_and_import_carry_a_run_with_its_parents(self) -> None:
        archive, other = self.root / "both.tar", self.root / "other machine"
        found, _ = self.said("export", "composed/both", "--runs.archive", str(archive))
        self.assertEqual(set(found["runs"]), {"composed/both", "domain/second", "task/legal", "prepared/docs"})
        brought, _ = self.said("import", "--runs.archive", str(archive), root=other)
        self.assertEqual(len(brought["imported"]), 4)
        for run in (self.composed, self.second, self.task, self.data):
            there = other / run.directory.relative_to(self.root)
            self.assertEqual(files.verify(there)["digest"], run.digest)
        again, _ = self.said("import", "--runs.archive", str(archive), root=other)
        self.assertEqual((again["imported"], len(again["already_here"])), ([], 4))
        shutil.rmtree(other / "models" / "task" / "legal")
        made(other, "task", "legal", loss=1.0)
        done = self.run_script("import", "--runs.archive", str(archive), root=other)
        self.assertEqual(done.returncode, 2)
        self.assertIn("another run is called", done.stderr)

    def test_a_damaged_or_hostile_archive_leaves_nothing(self) -> None:
        archive, other = self.root / "both.tar", self.root / "other"
        self.said("export", "composed/both", "--runs.archive", str(archive))
        content = archive.read_bytes()
        at = content.index(b"second2.25second")
        flipped, cut = self.root / "flipped.tar", self.root / "cut.tar"
        flipped.write_bytes(content[:at] + b"X" + content[at + 1 :])
        cut.write_bytes(content[: len(content) // 2])
        header, shorn = self.root / "header.tar", self.root / "shorn.tar"
        with tarfile.open(archive) as tar:  # the run itself is whole, its parents are lost
            parent = next(one.offset for one in tar if not one.name.startswith("models/composed/"))
        header.write_bytes(content[: parent + 3] + b"X" + content[parent + 4 :])
        shorn.write_bytes(content[:parent])
        hostile = self.root / "hostile.tar"
        with tarfile.open(hostile, "w") as tar:
            tar.add(archive, "models/task/../../../evil")
        again = "copy it again, or write it again where the run is: python scripts/runs.py export"
        said = {flipped: again, cut: again, header: again, shorn: again, hostile: "no archive of `runs.py export`"}
        for path, fix in {**said, self.root / "bot.tar": f"did you mean {archive} "}.items():
            with self.subTest(path.name):
                done = self.run_script("import", "--runs.archive", str(path), root=other)
                self.assertEqual((done.returncode, "Traceback" in done.stderr), (2, False), done.stderr)
                self.assertIn(fix, done.stderr)
                self.assertNotIn(".import.tmp", done.stderr)
                self.assertEqual([p for p in other.rglob("*") if p.is_file()], [])


if __name__ == "__main__":
    unittest.main()
