"""compose.py through its command: what it writes, what the later stages make of it, and what it refuses."""

from __future__ import annotations

import json
import stat
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from config import BaseModelSection, ComposeSection, Config
from tests.support import (
    Workspace,
    expert_factors,
    last_json,
    plain_logits,
    random_factors,
    relative,
    temporary_directory,
)
from tests.test_system_pipeline import built
from utils import cli
from utils.adapters import adapter_files, inference_layers
from utils.adapters.factors import Factors, delta
from utils.artifacts import files
from utils.artifacts.runs import Run
from utils.composition import composed_adapter, dev_losses, methods
from utils.composition.methods import Recipe
from utils.composition.weights import measured_points
from utils.composition.weights.points import Point
from utils.exceptions import ConfigError, DataError, VerificationError
from utils.models import float32_model, loading, sources
from utils.models.weights import layer_sample
from utils.models.weights.safetensors_io import Checkpoint

IDS = torch.randint(8, 700, (2, 24), generator=torch.Generator().manual_seed(3))
SECTION = BaseModelSection(source="toy:minimax_m2", name="tiny-minimax-m2", dtype="float32")


class Composing(unittest.TestCase):
    """The trained toy adapters, composed in a models directory of their own."""

    place: Workspace

    @classmethod
    def setUpClass(cls) -> None:
        cls.place, cls.reported = built()

    def compose(self, *flags: str) -> tuple[dict[str, Any], str]:
        done = self.place.run("compose", *flags)
        return last_json(done), done.stderr + done.stdout

    def test_search_that_is_proposed_is_about_the_adapters_that_were_named(self) -> None:
        named = [word for n in ("domain", "task") for word in (f"--{n}_adapter", str(self.reported[n]["run"]))]
        done = self.place.run("inference", *named, "--prompt", "What?", "--inference.max_new_tokens", "1")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(f"compose.py --compose.search {' '.join(named)} --preset tiny_minimax_m2", done.stderr)

    def test_composed_adapter_is_an_ordinary_one_that_equals_both_and_is_used_from_then_on(self) -> None:
        found, said = self.compose("--weights", "1,0.5")
        self.assertEqual((found["method"], found["weights"], found["searched"]), ("sum", [1.0, 0.5], False))
        self.assertLess(found["relative_error"], 1e-5)
        self.assertLess(found["parts_active_to_composed"], 1e-4)
        self.assertGreater(found["composed_to_last_part"], 1e-3)
        told = f"compose.py --compose.search --preset tiny_minimax_m2 --run.data_dir {self.place.data} --run.models_dir"
        self.assertIn("the weights were not chosen on dev", said)
        self.assertIn(told, said)
        self.assertIn("exact: relative error", said)
        base = sources.fetch(SECTION, self.place.models)
        composed = adapter_files.load(Path(found["adapter"]), base)
        domain, task = (adapter_files.load(Path(self.reported[n]["run"]) / "adapter", base) for n in ("domain", "task"))
        for name, f in composed.items():
            self.assertLess(relative(delta(f), delta(domain[name]) + 0.5 * delta(task[name])), 1e-5)
        settings = files.read_json(Path(found["adapter"]) / "adapter_config.json")
        self.assertEqual((settings["r"], settings["lora_alpha"], settings["use_rslora"]), (8, 8, False))
        manifest = files.verify(Path(found["composed"]))
        digests = [self.reported[n]["digest"] for n in ("domain", "task", "prepared")]
        self.assertEqual([p["digest"] for p in manifest["parents"]], digests)
        self.assertIn("base_model_relation: adapter", (Path(found["adapter"]) / "README.md").read_text())
        answered = self.place.run("inference", "--prompt", "x")
        self.assertIn(f"using the composed run  path={found['composed']}", answered.stderr)
        self.assertIn("weights=(1.0, 0.5)", answered.stderr)
        by_hand = self.place.run("inference", "--prompt", "x", "--weights", "1,0.5")
        self.assertNotIn("as it was composed", by_hand.stderr)
        for key in ("answer", "reasoning"):  # all that the toy says stands in its think block
            self.assertEqual(last_json(answered)[key], last_json(by_hand)[key])
        again, _ = self.compose("--weights", "1,0.5")
        self.assertEqual(again, found)

    def test_what_a_preset_or_python_says_wins_over_a_composed_run_as_a_flag_does(self) -> None:
        self.compose("--weights", "1,0.5")
        base = sources.fetch(SECTION, self.place.models)
        plain = cli.resolve(self.place.flags, {})

        def used(**said: Any) -> composed_adapter.Composition:
            config = Config.model_validate(plain.model_dump() | {"compose": said, "overrides": {}})
            return composed_adapter.composition(config, base)

        self.assertEqual(used().recipe.weights, (1.0, 0.5))
        self.assertIsNotNone(used().run)
        for said, recipe in (
            ({"weights": (1.0, 0.25)}, Recipe(weights=(1.0, 0.25))),
            ({"weights": ()}, Recipe()),
            ({"method": "sum"}, Recipe()),
            ({"method": "sum_truncated", "rank": 3}, Recipe("sum_truncated", rank=3)),
            ({"method": "dare", "density": 0.9}, Recipe("dare", density=0.9)),
        ):
            with self.subTest(said):
                found = used(**said)
                self.assertEqual((found.recipe, found.run), (recipe, None))

    def test_a_method_that_is_none_is_refused_where_no_command_line_has_looked(self) -> None:
        config = Config(compose=ComposeSection(method="tis"))
        with self.assertRaisesRegex(ConfigError, "did you mean ties"):
            composed_adapter.recipe_of(config)

    def test_searched_weights_are_recorded_with_their_reason_pictured_and_used_without_a_warning(self) -> None:
        found, _ = self.compose("--compose.search", "--compose.search_methods", "sum,depth_gate")
        self.assertTrue(found["searched"])
        directory = Path(found["composed"])
        search = files.read_json(directory / "search.json")
        self.assertEqual(list(search["chosen"]["weights"]), found["weights"])
        self.assertIn("within one standard error", search["reason"])
        plain = next(p for p in search["points"] if p["weights"] == [1.0, 1.0])
        self.assertLessEqual(search["chosen"]["answer_nll"], plain["answer_nll"])
        self.assertGreater(len(search["points"]), 7)
        points = [json.loads(line) for line in (directory / "search_points.jsonl").read_text().splitlines()]
        scored: dict[str, list[Any]] = {}
        for point in points:
            scored.setdefault(point["items"], []).append(point["weights"])
        self.assertEqual(len(scored["a part"]), len(search["points"]))
        whole = [p["weights"] for p in search["points"] if p["items"] == "all"]
        self.assertEqual(scored["the rest"], whole)
        self.assertIn(found["weights"], whole)
        for picture in ("search.html", "interference.html"):
            self.assertIn("<polyline", (directory / picture).read_text(encoding="utf-8"))
        explained = files.read_json(directory / "interference.json")
        self.assertEqual(set(explained["derivatives"]), {"answer", "domain"})
        answered = self.place.run("inference", "--prompt", "x")
        self.assertNotIn("not chosen on dev", answered.stderr)
        merged = last_json(self.place.run("inference", "--merge_path", str(temporary_directory() / "merged")))
        self.assertEqual(files.verify(Path(merged["merged"]))["composition"]["recipe"]["weights"], found["weights"])
        compared = last_json(self.place.run("evaluate"))
        self.assertTrue(compared["composition"]["searched"])
        _, said = self.compose("--weights", "0.25,0.125")
        self.assertIn(f"a search chose other weights for these adapters; to take those: --composed {directory}", said)

    def test_approximate_methods_state_their_error_and_keep_the_rank_asked_for(self) -> None:
        found, said = self.compose("--compose.method", "sum_truncated", "--compose.rank", "5")
        self.assertFalse(found["exact"])
        self.assertGreater(found["relative_error"], 1e-3)
        self.assertRegex(said, r"approximate: \d+\.\d% from the exact sum")
        self.assertEqual(files.read_json(Path(found["adapter"]) / "adapter_config.json")["r"], 5)
        seeded, _ = self.compose("--compose.method", "dare", "--run.name", "dare")
        self.assertFalse(seeded["exact"])

    def test_published_files_are_readable_by_others(self) -> None:
        found, _ = self.compose()
        mode = stat.S_IMODE((Path(found["adapter"]) / "adapter_model.safetensors").stat().st_mode)
        self.assertEqual(mode, 0o666 & ~files.current_umask())

    def test_a_switch_needs_no_value_and_takes_one(self) -> None:
        for value in ([], ["true"], ["false"]):
            done = self.place.run("compose", "--compose.search", *value, "--dry-run")
            settings = json.loads(done.stdout.strip().splitlines()[-1])["config"]
            self.assertEqual(settings["compose"]["search"], value != ["false"])

    def test_wrong_settings_are_refused_together(self) -> None:
        done = self.place.run("compose", "--weights", "1,2,3", "--compose.search", "--push_to_hub")
        self.assertEqual(done.returncode, 2)
        for part in ("compose.weights has 3 numbers", "leave out compose.weights", "write owner/name"):
            self.assertIn(part, done.stderr)
        layers = self.place.run("compose", "--compose.method", "per_layer", "--weights", "1,1,1")
        self.assertEqual(layers.returncode, 2)
        self.assertIn("per_layer of 2 adapters takes 4 weights, got 3", layers.stderr)

    def test_a_push_without_a_token_is_refused_before_any_work(self) -> None:
        flags = ["--push_to_hub", "--hub_model_id", "me/mine", "--run.name", "pushed"]
        nobody = {"HF_TOKEN": "", "HF_HOME": str(temporary_directory())}
        done = self.place.start("compose", *flags, env=nobody).wait()
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn("needs a token", done.stderr)
        self.assertFalse((self.place.models / "composed" / "pushed").exists())

    def test_a_complete_merge_is_reused_by_the_same_command_and_refused_by_another(self) -> None:
        target = str(temporary_directory() / "merged")
        first = last_json(self.place.run("inference", "--merge_path", target, "--weights", "1,1"))
        again = last_json(self.place.run("inference", "--merge_path", target, "--weights", "1,1"))
        self.assertEqual((first["reused"], again["reused"]), (False, True))
        self.assertEqual(self.place.run("inference", "--merge_path", target, "--weights", "1,2").returncode, 2)


class OnTheModel(unittest.TestCase):
    """The logits check of a composition, on experts and attention, in whole models and in some layers of one."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.place = built()[0]
        cls.base = sources.fetch(SECTION, cls.place.models)
        model = loading.load_model(cls.base, SECTION)
        attention = random_factors(model, ("q_proj", "v_proj"), 3, 6.0, 1)
        cls.parts: list[Factors] = [attention, {**attention, **expert_factors(model, 2, 4.0, 2)}]
        cls.runs = [Run(temporary_directory(), {"kind": kind, "digest": kind}) for kind in ("domain", "task")]

    def made(self, recipe: Recipe | None = None) -> composed_adapter.Composition:
        return composed_adapter.checked_composition(self.parts, self.runs, recipe or Recipe(), searched=False)

    def check(self, found: composed_adapter.Composition) -> dict[str, Any]:
        return composed_adapter.check_on_model(self.base, found, SECTION, temporary_directory() / "small")

    def test_a_right_composition_passes_and_says_which_layers_it_was_checked_on(self) -> None:
        whole = self.check(self.made(Recipe("depth_gate", (1.0, 0.0, 0.5, 1.0))))
        self.assertEqual(whole["checked_layers"], [0, 1])
        self.assertLess(whole["parts_active_to_composed"], 1e-5)
        shared, largest = layer_sample._float32_bytes(Checkpoint(self.base.directory))
        for_one = shared + (1 + layer_sample.TRANSIENT_LAYERS) * largest + largest // 2
        with mock.patch.object(float32_model, "available", return_value=for_one):
            some = self.check(self.made())
        self.assertEqual(len(some["checked_layers"]), 1)
        self.assertLess(some["parts_active_to_composed"], 1e-5)
        self.assertGreater(some["composed_to_base"], 1e-2)

    def test_a_model_larger_than_memory_is_composed_but_not_searched(self) -> None:
        self.assertTrue(float32_model.fits(self.base))
        with mock.patch.object(float32_model, "available", return_value=10):
            self.assertFalse(float32_model.fits(self.base))
        with self.assertRaisesRegex(DataError, "too little memory"):
            dev_losses.search(None, ComposeSection(search=True), temporary_directory() / "points.jsonl")

    def test_an_interrupted_search_goes_on_from_the_points_it_has(self) -> None:
        points = temporary_directory() / "points.jsonl"
        asked: list[tuple[float, ...]] = []

        class Asked:
            data, parts = mock.Mock(questions=["q"], documents=None, has=lambda items: True), self.parts

            def point(self, method: str, weights: tuple[float, ...], items: str) -> Point:
                asked.append(weights)
                loss = 2.0 + (weights[0] - 1.0) ** 2 + (weights[1] - 1.0) ** 2
                return Point(method, weights, (loss, loss), (1, 1), ("a", "b"), (3.0 - 0.5 * weights[0],), (1,))

        section = ComposeSection(search=True, search_methods=("sum",))
        whole = dev_losses.search(Asked(), section, points)  # type: ignore[arg-type]
        lines = points.read_text().splitlines(keepends=True)
        self.assertEqual(len(lines), len(asked))
        points.write_text("".join(lines[:5]) + lines[5][:20])  # killed while it wrote the sixth
        before = len(asked)
        self.assertEqual(dev_losses.search(Asked(), section, points), whole)  # type: ignore[arg-type]
        self.assertEqual(len(asked) - before, before - 5)
        self.assertEqual(len(measured_points._points(points, "")), before)
        changed = points.read_text().replace("[2.0", "[0.1", 1).replace("(2.0", "(0.1", 1)
        points.write_text(changed)
        self.assertEqual(len(measured_points._points(points, "")), before - (changed.count("0.1") > 0))

    def test_a_wrong_composition_fails_on_its_logits(self) -> None:
        right = self.made()
        name = "model.layers.1.mlp.experts.down_proj"
        without = {n: f for n, f in right.factors.items() if n != name}
        for wrong, reason in (
            (without, "all adapters active and the composed one differ"),
            (dict(self.parts[1]), "only the last adapter has an effect"),
        ):
            model = float32_model.in_float32(self.base, SECTION)
            with self.assertRaisesRegex(VerificationError, reason):
                composed_adapter.check_logits(
                    methods.weighted(right.parts, right.recipe), wrong, model, IDS, exact=True
                )

    def test_composed_adapter_per_expert_export_and_merged_model_are_one_model_in_a_fresh_process(self) -> None:
        root = temporary_directory()
        adapter_files.save(root / "first", self.parts[0], self.base)
        adapter_files.save(root / "second", self.parts[1], self.base)
        flags = ["--domain_adapter", str(root / "first"), "--task_adapter", str(root / "second")]
        found = last_json(self.place.run("compose", *flags))
        answered = last_json(self.place.run("inference", "--prompt", "x", *flags))
        self.assertEqual(answered["adapters"], [str(root / "first"), str(root / "second")])
        merged = last_json(self.place.run("inference", "--merge_path", str(root / "merged"), *flags))
        # q and v, and per expert w1, w3 and w2, in each of two layers
        self.assertEqual(merged["tensors_changed"], 2 * (2 + 4 * 3))
        run = Path(found["composed"])
        ours = inference_layers.attach(
            float32_model.in_float32(self.base, SECTION), {"composed": adapter_files.load(run / "adapter", self.base)}
        )
        with torch.no_grad():
            expected = ours(IDS).logits
        base = self.base.directory
        models = [str(root / "merged"), f"{base}={run / 'adapter'}", f"{base}={run / 'adapter_per_expert'}"]
        for name, logits in plain_logits(IDS, *models, flags=["--every-expert"]).items():
            self.assertLess(relative(logits, expected), 1e-5, name)


if __name__ == "__main__":
    unittest.main()
