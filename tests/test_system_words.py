"""Names, messages, help and pages use the field's words: what is on this list is written otherwise."""

from __future__ import annotations

import re
import unittest
from collections.abc import Iterator
from pathlib import Path

from tests.support import ROOT

# pattern -> what to write instead
WORDS = {
    r"\bdealt\b|\bdeal(s|ing)?\b.{0,12}\bout\b|deal_out": "shard, sharded; assigned, split",
    r"\b(in|by) (its|their) bits\b|\bbits mean\b": "quantized; dequantized weights",
    r"\bblock factors?\b": "block scales",
    r"\bFP8 codes\b": "FP8 values",
    r"\bby heart\b": "built in, built-in constants; overfitting",
    r"\b[Mm]end(s|ed|ing)?\b": "fix, fixes",
    r"\bspoken\b": "answer",
    r"\bparted\b|\bParting\b": "split_reasoning, ThinkSplitter",
    r"(?i)\bforeign\b|\bfrom elsewhere\b|foreign_": "external, of another tool",
    r"\bmisloaded\b|\bprobing\b": "load checks, dev losses",
    r"(?i)\bnobody (is )?let in\b": "security",
    r"\bstranger's text\b": "special tokens in user text are escaped",
    r"(?i)never decides|works with and without it\b|Give it to every command": "what is meant",
    r"own processes and sharding|as leaf names of its|Take 2\.6\.22": "what is meant",
}
# lines whose words are names on disk: what older runs recorded is read again
RECORDED = ('"dealt out": is_dealt_out',)
PLACES = ("README.md", "CONTRIBUTING.md", "Makefile", "config.py", "docs/**/*.md", "scripts/**/*", "utils/**/*")
SUFFIXES = (".py", ".md", ".jinja", ".css", ".yaml", ".slurm", ".sh", "")


def problems(root: Path) -> Iterator[str]:
    """Each line of the places with a word of the list: `FILE:LINE: WORD -> INSTEAD`."""
    paths = sorted({path for place in PLACES for path in root.glob(place)})
    for path in (path for path in paths if path.is_file() and path.suffix in SUFFIXES):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for pattern, instead in WORDS.items():
                if (word := re.search(pattern, line)) and not any(one in line for one in RECORDED):
                    yield f"{path.relative_to(root)}:{number}: {word.group()!r} -> {instead}"


class Words(unittest.TestCase):
    def test_words_of_the_list_are_written_otherwise(self) -> None:
        self.assertEqual(list(problems(ROOT)), [])

    def test_every_place_is_looked_at(self) -> None:
        for place in PLACES:
            self.assertTrue(list(ROOT.glob(place)), place)


if __name__ == "__main__":
    unittest.main()
