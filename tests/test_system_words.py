"""Names, messages, help and pages use the field's words: what is on these lists is written otherwise."""

from __future__ import annotations

import ast
import re
import unittest
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.support import ROOT, temporary_directory

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
# what says what was done and not what it is; a name is the noun that is meant (findings, settings, examples, ...)
VERBS = ("found", "told", "asked", "wanted", "said", "odd", "made")


def problems(root: Path) -> Iterator[str]:
    """Each line of the places with a word of the list: `FILE:LINE: WORD -> INSTEAD`."""
    paths = sorted({path for place in PLACES for path in root.glob(place)})
    for path in (path for path in paths if path.is_file() and path.suffix in SUFFIXES):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for pattern, instead in WORDS.items():
                if (word := re.search(pattern, line)) and not any(one in line for one in RECORDED):
                    yield f"{path.relative_to(root)}:{number}: {word.group()!r} -> {instead}"


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a module names: functions, classes, parameters, variables, attributes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def unclear(paths: Iterable[Path]) -> Iterator[str]:
    """Each name that is one of VERBS: `FILE:LINE: NAME`."""
    for path in sorted(paths):
        for number, name in names(path):
            if name.strip("_").lower() in VERBS:
                yield f"{path.name}:{number}: {name}"


class Words(unittest.TestCase):
    def test_words_of_the_list_are_written_otherwise(self) -> None:
        self.assertEqual(list(problems(ROOT)), [])

    def test_every_place_is_looked_at(self) -> None:
        for place in PLACES:
            self.assertTrue(list(ROOT.glob(place)), place)

    def test_names_are_the_nouns_that_are_meant(self) -> None:
        paths = [ROOT / "config.py", *(ROOT / "scripts").glob("*.py"), *(ROOT / "utils").rglob("*.py")]
        self.assertGreater(len(paths), 200)
        self.assertEqual(list(unclear(paths)), [])

    def test_each_kind_of_name_is_seen(self) -> None:
        path = temporary_directory() / "module.py"
        path.write_text(
            "class Asked:\n    def told(self, said):\n        self.made = odd = said\n"
            "        return [found for found in odd]\n"
        )
        expected = ["1: Asked", "2: said", "2: told", "3: made", "3: odd", "4: found"]
        self.assertEqual(sorted(text.partition(":")[2] for text in unclear([path])), expected)


if __name__ == "__main__":
    unittest.main()
