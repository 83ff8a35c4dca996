"""What a resumed run believes: nothing that was edited, damaged, or moved here from elsewhere."""

import json
import shutil
import unittest
from pathlib import Path
from typing import Any

from tests.support import temporary_directory
from utils.artifacts import files, resumable
from utils.exceptions import ArtefactError
from utils.models import base_model


class Results(unittest.TestCase):
    def setUp(self) -> None:
        self.directory, self.asked = temporary_directory(), 0
        self.path = self.directory / "cell.json"

    def measure(self) -> dict[str, Any]:
        self.asked += 1
        return {"nll": [3.35, 1e-300], "at": self.asked, "tuple": (1, 2), "name": "ä\u2028"}

    def result(self, of: str = "run") -> dict[str, Any]:
        return resumable.result(self.path, of, self.measure)

    def test_what_is_as_it_was_written_is_read_and_nothing_is_measured(self) -> None:
        first = self.result()
        self.assertEqual(self.result(), first)
        self.assertEqual((self.asked, first["tuple"]), (1, [1, 2]))
        self.assertNotIn("seal", first)

    def test_what_is_not_is_measured_again(self) -> None:
        whole = self.result() and self.path.read_text()
        changed = {
            "a number": whole.replace("3.35", "1.67"),
            "the seal": whole.replace('"seal": "', '"seal": "0'),
            "no seal": json.dumps({"nll": [1.67]}),
            "half": whole[: len(whole) // 2],
            "a list": "[1]",
            "empty": "",
        }
        for what, text in changed.items():
            self.path.write_text(text)
            before = self.asked
            self.assertEqual(self.result()["at"], before + 1, what)
            self.assertEqual(self.result()["at"], before + 1, what)

    def test_one_of_another_run_or_under_another_name_is_measured_again(self) -> None:
        self.result("another")
        self.assertEqual(self.result()["at"], 2)
        shutil.move(self.path, self.directory / "other.json")
        self.path = self.directory / "other.json"
        self.assertEqual(self.result()["at"], 3)

    def test_lines_of_a_journal_say_whether_they_are_as_they_were_written(self) -> None:
        journal = self.directory / "points.jsonl"
        for number in range(3):
            resumable.append(journal, {"number": number, "values": (1.5,)}, "run")
        text = journal.read_bytes().replace(b'"number": 1', b'"number": 7').replace(b"\n", b'\n[2]\n{"half\n\xff\n', 1)
        journal.write_bytes(text)
        expected = [({"number": n, "values": [1.5]}, n != 7) for n in (0, 7, 2)]
        self.assertEqual(list(resumable.lines(journal, "run")), expected)
        self.assertFalse(any(sealed for _, sealed in resumable.lines(journal, "another")))
        self.assertEqual(list(resumable.lines(self.directory / "none", "run")), [])

    def test_halves_of_characters_and_what_is_no_file_are_said_and_no_traceback(self) -> None:
        path = self.path
        resumable.write(path, {"text": "whole"}, "own")
        path.write_text(path.read_text().replace("whole", "\\ud800"))
        self.assertIsNone(resumable.read(path, "own"))
        journal = self.directory / "journal.jsonl"
        journal.write_text('{"text": "\\ud800"}\n')
        self.assertEqual(list(resumable.lines(journal, "own")), [({"text": "\ud800"}, False)])
        journal.unlink()
        journal.mkdir()
        with self.assertRaisesRegex(ArtefactError, "journal.jsonl"):
            list(resumable.lines(journal, "own"))


class DigestCache(unittest.TestCase):
    """`models/base/.digests` saves reading 230 GB; what it says is believed only as it was written."""

    def setUp(self) -> None:
        self.model, self.cache = temporary_directory(), temporary_directory() / "digests"
        self.file = self.model / "config.json"
        self.file.write_text("{}")

    def digest(self) -> str:
        return base_model._digest([self.file], self.cache)

    def entry(self) -> Path:
        (entry,) = self.cache.glob("*.json")
        return entry

    def test_a_damaged_or_forged_entry_makes_the_file_be_read_anew(self) -> None:
        right = self.digest()
        whole = self.entry().read_text()
        for text in (whole.replace(right, "0" * 64), whole[:30], "", "[]", json.dumps({"digest": "0" * 64})):
            self.entry().write_text(text)
            self.assertEqual(self.digest(), right, text)
            self.assertEqual(files.read_json(self.entry())["digest"], right)

    def test_an_entry_of_other_files_is_not_taken_for_these(self) -> None:
        before = self.digest()
        entry = self.entry()
        self.file.write_text("[]")
        after = self.digest()
        self.assertNotEqual(after, before)
        (new,) = set(self.cache.glob("*.json")) - {entry}
        shutil.copy(entry, new)
        self.assertEqual(self.digest(), after)

    def test_a_place_that_cannot_be_written_to_only_costs_reading_again(self) -> None:
        right = self.digest()
        self.cache = self.file / "digests"
        self.assertEqual(self.digest(), right)

    def test_nothing_temporary_stays_behind(self) -> None:
        self.cache.mkdir()
        (self.cache / ".a.json.tmp-4194304").write_text("{")  # of a process that is dead
        self.digest()
        self.assertEqual([path.name for path in self.cache.glob(".*")], [])
