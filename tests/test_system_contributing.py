"""The recipes of CONTRIBUTING.md, followed literally in a copy of the project."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import unittest
from pathlib import Path

from tests.support import ROOT, clean_environment, temporary_directory

PAGE = ROOT / "CONTRIBUTING.md"
BLOCK = re.compile(r"^```(\w+)(?: (\S+?)(?: (before|instead of) \"([^\n]*)\")?)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COPIED = ("config.py", "scripts", "utils", "tests", "pyproject.toml")


class Recipes(unittest.TestCase):
    def test_each_recipe_works_as_it_is_written(self) -> None:
        recipes = PAGE.read_text(encoding="utf-8").split("\n### ")[1:]
        self.assertGreaterEqual(len(recipes), 4)
        for recipe in recipes:
            with self.subTest(recipe.splitlines()[0]):
                self.follow(recipe)

    def follow(self, recipe: str) -> None:
        place = temporary_directory() / "project"
        place.mkdir()
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, place / name)
        commands, changed = [], set()
        for language, file, where, line, text in BLOCK.findall(recipe):
            if language == "sh":
                commands += text.strip().splitlines()
                continue
            path = place / file
            changed.add(file)
            if not line:
                self.assertFalse(path.exists(), file)
                path.write_text(text, encoding="utf-8")
                continue
            before = path.read_text(encoding="utf-8")
            self.assertEqual(before.count(f"\n{line}"), 1, f"{file} has no line that begins with {line!r}")
            path.write_text(
                before.replace(f"\n{line}", f"\n{text}{line}" if where == "before" else f"\n{text.rstrip()}"),
                encoding="utf-8",
            )
        self.assertTrue(commands)
        checks = [f"python -m {tool}" for tool in ("black --check --quiet", "ruff check --quiet")]
        for command in [*commands, *(f"{check} {' '.join(sorted(changed))}" for check in checks)]:
            self.run_in(place, command)

    def run_in(self, place: Path, command: str) -> None:
        program, *words = shlex.split(command)
        self.assertEqual(program, "python")
        done = subprocess.run(
            [sys.executable, *words], cwd=place, capture_output=True, text=True, check=False, env=clean_environment()
        )
        self.assertEqual(done.returncode, 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    unittest.main()
