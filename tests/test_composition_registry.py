"""The rows of METHODS are the only list of methods: a new one is accepted, shown, searched, held to the invariants."""

from __future__ import annotations

import ast
import unittest
from collections.abc import Sequence
from unittest import mock

from config import ComposeSection
from tests import test_composition_invariants
from tests.support import ROOT
from tests.test_composition_search import losses
from utils import cli
from utils.adapters.factors import ModuleFactors, stacked
from utils.cli import help_text
from utils.composition.methods import METHODS, Method, Recipe, problems
from utils.composition.search import search
from utils.exceptions import ConfigError


def _sum(parts: Sequence[ModuleFactors], recipe: Recipe, module: str) -> ModuleFactors:
    return stacked(parts)


# a weight for the first layer, and one for all others
STEP = Method(
    _sum,
    exact=True,
    source="a step in depth",
    per_adapter=2,
    at=lambda own, layer, depth: own[min(layer, 1)],
    takes="weights of the first and of the other layers",
    search="steps",
)


class NewRow(unittest.TestCase):
    def setUp(self) -> None:
        patched = mock.patch.dict(METHODS, {"step": STEP, "rough": Method(_sum, False, "rough", reads=("rank",))})
        patched.start()
        self.addCleanup(patched.stop)

    def test_it_is_accepted_and_held_to_what_its_row_says(self) -> None:
        found = cli.resolve(["--compose.method", "step", "--weights", "1,2,3,4"], {})
        self.assertEqual((found.compose.method, found.compose.weights), ("step", (1.0, 2.0, 3.0, 4.0)))
        with self.assertRaisesRegex(ConfigError, "step of 2 adapters takes 4"):
            cli.resolve(["--compose.method", "step", "--weights", "1,2,3"], {})
        self.assertEqual(cli.resolve(["--compose.search_methods=sum,step"], {}).compose.search_methods, ("sum", "step"))
        with self.assertRaisesRegex(ConfigError, "(?s)'rough'.*choices: sum, depth_gate, per_layer, step"):
            cli.resolve(["--compose.search_methods=rough"], {})

    def test_it_is_in_the_help(self) -> None:
        shown = " ".join(help_text.page("", ("compose",), (), ["compose"]).split())
        self.assertIn(f"--compose.method {'|'.join(METHODS)}", shown)
        self.assertIn("|step|rough", shown)
        self.assertIn("--compose.search_methods sum|depth_gate|per_layer|step, ...", shown)
        self.assertIn("step exact; takes weights of the first and of the other layers; a step in depth", shown)
        self.assertIn("rough approximate; takes a weight for each adapter, compose.rank; rough", shown)

    def test_it_is_searched_when_its_row_says_how(self) -> None:
        def loss(method: str, weights: tuple[float, ...]) -> float:
            first, last = (weights[0], weights[1]) if method == "step" else (weights[0], weights[0])
            return 2.0 + (first - 0.5) ** 2 + (last - 1.5) ** 2

        found = search(losses(loss), 2, ("sum", "step", "rough"), retention=0.8)
        self.assertEqual((found.chosen.method, found.chosen.weights[:2]), ("step", (0.5, 1.5)))
        self.assertEqual([c.label for c in found.champions], ["sum at 1", "sum", "step"])

    def test_it_is_the_same_model_in_every_way_to_use_it(self) -> None:
        case = test_composition_invariants.Invariants()
        case.check_kind("attention", "step", (2, 3), (4.0, 6.0), [0.5, -1.0, 1.5, 0.25])


class Rows(unittest.TestCase):
    def test_only_an_exact_method_is_searched_and_only_weights_per_layer_are_fitted(self) -> None:
        for wrong in ({"exact": False, "search": "steps"}, {"exact": True, "search": "fit"}):
            with self.assertRaises(ValueError):
                Method(_sum, source="x", **wrong)  # type: ignore[arg-type]

    def test_what_a_method_needs_is_refused_by_its_row(self) -> None:
        self.assertEqual(problems(ComposeSection()), [])
        for section, part in (
            (ComposeSection(method="per_layer"), "per_layer needs compose.weights"),
            (ComposeSection(method="depth_gate", weights=(1.0, 1.0, 1.0)), "depth_gate of 2 adapters takes 4"),
            (ComposeSection(method="ties", search=True), "cannot choose weights for ties"),
            (ComposeSection(search_methods=("sum", "dare")), "no method whose weights can be searched"),
        ):
            self.assertIn(part, str(problems(section)[0]))

    def test_no_other_module_decides_by_a_method_s_name(self) -> None:
        # `per_layer` is also a key of what interference.json says about layers
        named = set(METHODS) - {"sum", "per_layer"}
        for path in [ROOT / "config.py", *(ROOT / "scripts").glob("*.py"), *(ROOT / "utils").rglob("*.py")]:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            compared = [node for node in ast.walk(tree) if isinstance(node, (ast.Compare, ast.Subscript, ast.Dict))]
            texts = {n.value for node in compared for n in ast.walk(node) if isinstance(n, ast.Constant)}
            if path.name != "methods.py":
                self.assertEqual(named & {t for t in texts if isinstance(t, str)}, set(), path)


if __name__ == "__main__":
    unittest.main()
