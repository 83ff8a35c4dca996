"""Who may import whom, read off the source with `ast` and held to the table in utils/__init__.py.

python -m tests.test_architecture --floors     prints the longest chain of packages
"""

from __future__ import annotations

import ast
import functools
import sys
import tempfile
import unittest
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import utils

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "numpy", "safetensors", "tokenizers"}
MODEL_LIBRARIES = {"transformers", "peft", "accelerate"}
LONGEST_CHAIN = 12
MOST_FILES, MOST_LINES = 15, 350


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, in functions and for type checkers too unless `top_level` asks for less."""
    waiting: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from utils.artifacts import files` and `from utils.artifacts.files import seal` both name the module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif top_level and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not (top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            waiting += ast.iter_child_nodes(node)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_of(path: Path, top: Path) -> str:
    """`utils/data/splits.py` -> `data.splits`; a package's own file -> the package; utils/__init__.py -> ``."""
    return ".".join(path.relative_to(top).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def belongs(name: str, modules: Sequence[str] | set[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


class House:
    """The modules below a folder named utils, and what each imports of the others."""

    def __init__(self, top: Path, plumbing: Sequence[str], rows: Sequence[Mapping[str, str]]):
        self.top, self.plumbing, self.rows = top, plumbing, rows
        self.paths = {module_of(path, top): path for path in sorted(top.rglob("*.py"))}
        self.floor = {package: at for at, row in enumerate(rows, 1) for package in row}
        self.edges = {module: sorted(self._targets(path)) for module, path in self.paths.items()}

    def _targets(self, path: Path) -> set[str]:
        names = [name.removeprefix("utils.") for name in imports(path) if name.startswith("utils.")]
        return {found for name in names if (found := self._module(name)) and found != module_of(path, self.top)}

    def _module(self, name: str) -> str:
        """The module that an imported name is, or is in."""
        return name if name in self.paths else name.rpartition(".")[0]

    def package(self, module: str) -> str:
        """The package of a module; what lies in utils/ itself is plumbing."""
        first, _, rest = module.partition(".")
        return first if rest or (self.top / first).is_dir() else "plumbing"

    def problems(self) -> list[str]:
        """Every breach of the table, as a sentence."""
        found = []
        for module in filter(None, self.paths):
            package = self.package(module)
            if package == "plumbing" and module not in self.plumbing:
                found.append(f"{module} lies in utils/ and is not in PLUMBING")
            if package != "plumbing" and package not in self.floor:
                found.append(f"{package} is in no row of the table")
            for target in self.edges[module]:
                below, here = self.floor.get(self.package(target), 0), self.floor.get(package, 0)
                if self.package(target) != package and below >= here:
                    way = "up to" if below > here else "sideways to"
                    found.append(f"{module} imports {way} {target}")
        listed = [name for name in (*self.plumbing, *self.floor) if not belongs(name, set(self.paths))]
        found += [f"{name} is in the table and not there" for name in listed]
        return sorted(set(found)) + [f"circle: {' -> '.join(circle)}" for circle in self.circles()]

    def circles(self) -> list[list[str]]:
        """Circles of imports inside a package, each once."""
        found: dict[frozenset[str], list[str]] = {}
        seen: set[str] = set()

        def visit(module: str, path: list[str]) -> None:
            for target in self.edges.get(module, []):
                if target in path:
                    circle = path[path.index(target) :]
                    found.setdefault(frozenset(circle), [*circle, target])
                elif target not in seen and self.package(target) == self.package(module):
                    seen.add(target)
                    visit(target, [*path, target])

        for module in self.paths:
            visit(module, [module])
        return list(found.values())

    def longest_chain(self) -> list[str]:
        """The longest chain of packages, from the top down."""
        below: dict[str, set[str]] = defaultdict(set)
        for module, targets in self.edges.items():
            below[self.package(module)] |= {self.package(t) for t in targets} - {self.package(module)}

        @functools.cache
        def chain(package: str) -> tuple[str, ...]:
            return (package, *max((chain(other) for other in sorted(below[package])), key=len, default=()))

        return list(max((chain(package) for package in [*self.floor, "plumbing"]), key=len))


@functools.cache
def our_house() -> House:
    return House(ROOT / "utils", utils.PLUMBING, utils.ROWS)


class Table(unittest.TestCase):
    def test_every_module_keeps_to_the_table(self) -> None:
        self.assertEqual(our_house().problems(), [])

    def test_every_module_is_looked_at(self) -> None:
        house = our_house()
        self.assertEqual(set(house.paths), {module_of(path, ROOT / "utils") for path in sources("utils")})
        self.assertGreater(sum(map(len, house.edges.values())), 400)

    def test_no_chain_of_packages_is_longer_than_twelve(self) -> None:
        self.assertLessEqual(len(our_house().longest_chain()), LONGEST_CHAIN)

    def test_config_imports_nothing_of_ours(self) -> None:
        ours = {"config", "utils", "scripts", "tests"}
        self.assertEqual([n for n in imports(ROOT / "config.py") if n.partition(".")[0] in ours], [])

    def test_scripts_do_not_import_scripts_and_nothing_imports_tests(self) -> None:
        for path in [ROOT / "config.py", *sources("utils"), *sources("scripts")]:
            self.assertEqual([n for n in imports(path) if n.partition(".")[0] in ("scripts", "tests")], [], path)

    def test_pure_modules_import_pure_modules_and_no_model_library(self) -> None:
        house = our_house()
        self.assertLessEqual(set(utils.PURE), set(house.paths))
        # `layer_of` reads a layer off a name: text in, number out
        allowed = {*utils.PURE, "exceptions", "models.weights.tensor_names"}
        for module in utils.PURE:
            self.assertEqual(set(house.edges[module]) - allowed, set(), module)
            libraries = {n.partition(".")[0] for n in imports(house.paths[module])} & MODEL_LIBRARIES
            self.assertEqual(libraries, set(), module)

    def test_only_the_named_modules_take_the_whole_config(self) -> None:
        house = our_house()
        found = {module for module, path in house.paths.items() if "config.Config" in set(imports(path))}
        self.assertEqual(found - set(utils.TAKES_CONFIG), set())
        self.assertEqual(set(utils.TAKES_CONFIG) - found, set(), "listed, and takes sections by now")

    def test_scripts_plumbing_artifacts_and_cli_import_no_heavy_library_at_module_level(self) -> None:
        house = our_house()
        light = [p for m, p in house.paths.items() if house.package(m) in ("plumbing", "artifacts", "cli")]
        for path in [ROOT / "config.py", *sources("scripts"), *light]:
            found = [n for n in imports(path, top_level=True) if n.partition(".")[0] in HEAVY]
            self.assertEqual(found, [], path)

    def test_scripts_import_only_config_plumbing_and_cli_at_module_level(self) -> None:
        for path in sources("scripts"):
            ours = [n.removeprefix("utils.") for n in imports(path, top_level=True) if n.startswith("utils.")]
            self.assertEqual([n for n in ours if not belongs(n, (*utils.PLUMBING, "cli"))], [], path)


class Sizes(unittest.TestCase):
    def test_no_folder_is_crowded_and_no_file_is_long(self) -> None:
        folders: dict[Path, int] = defaultdict(int)
        for path in (ROOT / "utils").rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                folders[path.parent] += 1
        self.assertEqual({str(f): count for f, count in folders.items() if count > MOST_FILES}, {})
        lengths = {str(p): len(p.read_text().splitlines()) for p in [*sources("utils"), *sources("scripts")]}
        self.assertEqual({path: lines for path, lines in lengths.items() if lines > MOST_LINES}, {})

    def test_no_two_modules_and_no_two_classes_share_a_name(self) -> None:
        modules: dict[str, list[str]] = defaultdict(list)
        classes: dict[str, list[str]] = defaultdict(list)
        for module, path in our_house().paths.items():
            if path.name != "__init__.py":
                modules[path.stem].append(module)
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    classes[node.name.lstrip("_")].append(module)
        shared = {name: where for name, where in (modules | classes).items() if len(where) > 1}
        self.assertEqual(shared, {})


class Breaches(unittest.TestCase):
    """The rules are seen to fail, on a small house of their own."""

    def setUp(self) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        self.addCleanup(self.scratch.cleanup)

    def house(self, **files: str) -> House:
        top = Path(tempfile.mkdtemp(dir=self.scratch.name)) / "utils"
        usual = {"exceptions": "", "low/__init__": "", "low/base": "", "mid/__init__": "", "beside/__init__": ""}
        for name, text in {**usual, "mid/user": "from utils.low import base\n", **files}.items():
            path = top / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return House(top, ("exceptions",), ({"low": ""}, {"mid": "", "beside": ""}))

    def test_a_house_that_keeps_to_its_table_has_no_problem(self) -> None:
        self.assertEqual(self.house().problems(), [])
        self.assertEqual(self.house().longest_chain(), ["mid", "low"])

    def test_an_import_up_is_found_at_the_top_of_a_file_in_a_function_and_for_types(self) -> None:
        for text in (
            "from utils.mid import user\n",
            "def f():\n    from utils.mid.user import g\n",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from utils.mid import user\n",
        ):
            self.assertEqual(self.house(**{"low/odd": text}).problems(), ["low.odd imports up to mid.user"])

    def test_plumbing_imports_no_package(self) -> None:
        found = self.house(exceptions="from utils.low import base\n").problems()
        self.assertEqual(found, ["exceptions imports up to low.base"])

    def test_an_import_sideways_is_found(self) -> None:
        found = self.house(**{"beside/other": "from utils.mid import user\n"}).problems()
        self.assertEqual(found, ["beside.other imports sideways to mid.user"])

    def test_a_circle_inside_a_package_is_found(self) -> None:
        found = self.house(
            **{"low/one": "from utils.low import two\n", "low/two": "def f():\n    from utils.low.one import g\n"}
        ).problems()
        self.assertEqual(found, ["circle: low.one -> low.two -> low.one"])

    def test_an_unlisted_package_and_an_unlisted_module_are_found(self) -> None:
        self.assertEqual(self.house(**{"odd/__init__": ""}).problems(), ["odd is in no row of the table"])
        self.assertEqual(self.house(drawer="").problems(), ["drawer lies in utils/ and is not in PLUMBING"])

    def test_a_row_without_its_package_is_found(self) -> None:
        house = self.house()
        gone = House(house.top, ("exceptions",), (*house.rows, {"attic": ""}))
        self.assertEqual(gone.problems(), ["attic is in the table and not there"])


if __name__ == "__main__":
    if "--floors" in sys.argv:
        chain = our_house().longest_chain()
        print(f"{len(chain)} packages: {' -> '.join(chain)}")
    else:
        unittest.main()
