"""decision_document.md: the newest entry first, an outcome in every title, and contents that name each entry once."""

from __future__ import annotations

import itertools
import re
import unittest

from tests.support import ROOT
from tests.test_system_documents import anchors

PATH = ROOT / "decision_document.md"
# `## DATE Question (outcome)`; a title may have brackets of its own before
TITLE = re.compile(r"^## (\d{4}-\d\d-\d\d) (.+) \(([^()]+)\)$")
LINE = re.compile(r"^\* (\d{4}-\d\d-\d\d) \[(.+)\]\(#([^)]+)\): (.+)$")
OUTCOMES = ("adopted", "rejected", "open", "superseded")


def titles(text: str) -> list[str]:
    """The headings that begin with a date, in order."""
    return re.findall(r"(?m)^## \d{4}.*$", text)


def problems(text: str) -> list[str]:
    """What is wrong with entries and contents, each named; empty when nothing is."""
    entries = [(title, TITLE.match(title)) for title in titles(text)]
    wrong = [f"no date, question and outcome: {title}" for title, match in entries if match is None]
    parts = [match.groups() for _, match in entries if match is not None]
    wrong += [f"no outcome: {name} ({end})" for _, name, end in parts if not end.startswith(OUTCOMES)]
    dates = [date for date, _, _ in parts]
    wrong += [f"{later} stands below {date}" for date, later in itertools.pairwise(dates) if later > date]
    listed = [match.groups() for line in text.splitlines() if (match := LINE.match(line))]
    in_contents = [(date, name, end) for date, name, _, end in listed]
    wrong += [f"not in the contents: {entry}" for entry in parts if entry not in in_contents]
    wrong += [f"no such entry: {entry}" for entry in in_contents if entry not in parts]
    wrong += [f"twice in the contents: {entry}" for entry in {e for e in in_contents if in_contents.count(e) > 1}]
    return wrong


class Decisions(unittest.TestCase):
    def test_entries_are_newest_first_end_in_their_outcome_and_stand_in_the_contents(self) -> None:
        text = PATH.read_text(encoding="utf-8")
        self.assertEqual(problems(text), [])
        self.assertGreater(len(titles(text)), 100)

    def test_links_of_the_contents_lead_to_their_entries(self) -> None:
        known = anchors(PATH)
        for line in PATH.read_text(encoding="utf-8").splitlines():
            if match := LINE.match(line):
                self.assertIn(match[3], known)

    def test_what_is_wrong_is_seen(self) -> None:
        first = "## 2026-11-24 One thing (adopted)"
        contents = "* 2026-11-24 [One thing](#2026-11-24-one-thing-adopted): adopted"
        for text, what in (
            (f"{contents}\n{first}", None),
            (first, "not in the contents"),
            (contents, "no such entry"),
            (f"{contents}\n{contents}\n{first}", "twice in the contents"),
            (f"{contents}\n{first}\n## 2026-11-25 Another (open)", "2026-11-25 stands below 2026-11-24"),
            ("## 2026-11-24 One thing", "no date, question and outcome"),
            ("## 2026-11-24 One thing (done)", "no outcome"),
        ):
            with self.subTest(text):
                self.assertEqual(bool(problems(text)), what is not None)
                self.assertIn(what or "", " ".join(problems(text)))


if __name__ == "__main__":
    unittest.main()
