"""Who may import whom (the layout's rules), read off the source with `ast`."""

from __future__ import annotations

import ast
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = {"config", "utils", "scripts", "tests"}
PLUMBING = {
    "exceptions",
    "secrets",
    "manifests",
    "disk",
    "logger",
    "signals",
    "locks",
    "files",
    "runs",
    "cli",
    "progress",
}
PURE = {
    "composition",
    "planning",
    "fp8_choice",
    "known_models",
    "statistics",
    "verdict",
    "corpus.splits",
    "corpus.invented",
    "corpus.built_in",
    "rollout",
    "answers",
    "overlap",
}
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "numpy", "safetensors", "tokenizers"}


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; those for type checkers only do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from utils import files` and `from utils.files import seal` both name utils.files
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not (top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            waiting += ast.iter_child_nodes(node)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def subject(path: Path) -> str:
    """`utils/corpus/splits.py` -> `corpus.splits`; a package's own file -> the package."""
    return ".".join(path.relative_to(ROOT / "utils").with_suffix("").parts).removesuffix(".__init__")


def belongs(name: str, subjects: set[str]) -> bool:
    return any(name == s or name.startswith(s + ".") for s in subjects)


class Imports(unittest.TestCase):
    def test_config_imports_nothing_of_ours(self) -> None:
        self.assertEqual([n for n in imports(ROOT / "config.py") if n.partition(".")[0] in OURS], [])

    def test_scripts_do_not_import_scripts_and_nothing_imports_tests(self) -> None:
        for path in [ROOT / "config.py", *sources("utils"), *sources("scripts")]:
            found = [n for n in imports(path) if n.partition(".")[0] in ("scripts", "tests")]
            self.assertEqual(found, [], path)

    def test_plumbing_imports_only_plumbing(self) -> None:
        for path in sources("utils"):
            if subject(path) in PLUMBING:
                ours = [n.removeprefix("utils.") for n in imports(path) if n.startswith("utils.")]
                self.assertEqual([n for n in ours if not belongs(n, PLUMBING)], [], path)

    def test_pure_subjects_import_no_engine_and_no_model_library(self) -> None:
        for path in sources("utils"):
            if belongs(subject(path), PURE):
                names = list(imports(path))
                ours = [n.removeprefix("utils.") for n in names if n.startswith("utils.")]
                self.assertEqual([n for n in ours if not belongs(n, PURE | {"exceptions"})], [], path)
                libraries = [n for n in names if n.partition(".")[0] in {"transformers", "peft", "accelerate"}]
                self.assertEqual(libraries, [], path)

    def test_scripts_and_plumbing_import_no_heavy_library_at_module_level(self) -> None:
        plumbing = [path for path in sources("utils") if subject(path) in PLUMBING]
        for path in [ROOT / "config.py", *sources("scripts"), *plumbing]:
            found = [n for n in imports(path, top_level=True) if n.partition(".")[0] in HEAVY]
            self.assertEqual(found, [], path)

    def test_scripts_import_only_config_and_plumbing_at_module_level(self) -> None:
        for path in sources("scripts"):
            ours = [n for n in imports(path, top_level=True) if n.startswith("utils.")]
            self.assertEqual([n for n in ours if not belongs(n.removeprefix("utils."), PLUMBING)], [], path)

    def test_the_rules_look_at_files_that_are_there(self) -> None:
        subjects = {subject(path) for path in sources("utils")}
        self.assertLessEqual(PLUMBING | PURE, subjects)
        self.assertGreaterEqual(len(sources("scripts")), 5)


class Reader(unittest.TestCase):
    def test_imports_are_found_in_functions_and_under_either_spelling(self) -> None:
        names = set(imports(Path(__file__)))
        self.assertLessEqual({"ast", "pathlib.Path", "json"}, names | self.inner())
        self.assertNotIn("json", set(imports(Path(__file__), top_level=True)))

    @staticmethod
    def inner() -> set[str]:
        import json

        return {json.__name__} & sys.modules.keys()


if __name__ == "__main__":
    unittest.main()
