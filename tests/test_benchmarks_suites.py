"""The benchmark: the lean composed model is exact, shares the base's weights, and the script measures a toy."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from transformers import AutoModelForCausalLM

from config import ALL_LINEAR_LLAMA, ATTENTION, LoraSection, TrainSection, tiny_minimax_m2
from tests.report_support import soup
from tests.support import Workspace, forked, last_json, temporary_directory
from utils.adapters import inference_layers
from utils.adapters.factors import scaled
from utils.benchmarks import (
    benchmark_report,
    inputs,
    suite_data,
    suite_evaluation,
    suite_inference,
    suite_merge,
    suite_training,
)
from utils.composition.methods import Recipe, compose
from utils.exceptions import ArtefactError
from utils.models.architectures import toy

EXACT = 1e-5


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def pair_for(model: torch.nn.Module, targets: tuple[str, ...]) -> tuple[dict, dict]:
    """Two adapters of different rank and scale, strong enough to be seen."""
    first = inputs.random_factors(model, LoraSection(rank=4, alpha=16, target_modules=targets), seed=1)
    second = inputs.random_factors(model, LoraSection(rank=6, alpha=18, target_modules=targets[:2]), seed=2)
    return {n: scaled(f, 5.0) for n, f in first.items()}, {n: scaled(f, -3.0) for n, f in second.items()}


class FrozenLora(unittest.TestCase):
    def test_composed_and_merged_equal_two_active_adapters_in_float32(self) -> None:
        for make, targets in ((toy.tiny_llama, ALL_LINEAR_LLAMA), (toy.tiny_minimax_m2, ATTENTION)):
            model = make()[0].eval().requires_grad_(False)
            pair = pair_for(model, targets)
            models = suite_inference.variants(model, pair, compose(pair, Recipe()))
            # one row, few rows, many rows: each takes its own way through the factors
            for shape in ((1, 1), (2, 3), (3, 20)):
                ids = torch.randint(0, 700, shape, generator=torch.Generator().manual_seed(3))
                with torch.no_grad():
                    logits = {name: one(input_ids=ids).logits for name, one in models.items()}
                with self.subTest(make.__name__, shape=shape):
                    self.assertLess(relative(logits["composed"], logits["two active"]), EXACT)
                    self.assertLess(relative(logits["merged"], logits["two active"]), EXACT)
                    self.assertGreater(relative(logits["base"], logits["two active"]), 1e-2)

    def test_every_way_through_the_factors_rounds_like_bfloat16(self) -> None:
        torch.manual_seed(0)
        for bias in (False, True):
            linear = torch.nn.Linear(48, 40, bias=bias).requires_grad_(False)
            factors = inputs.random_factors(
                torch.nn.ModuleDict({"q": linear}), LoraSection(rank=4, target_modules=("q",)), seed=1
            )["q"]
            strong = scaled(factors, 10.0)
            exact = inference_layers.FrozenLoraLinear(linear, {"x": strong})
            low = inference_layers.FrozenLoraLinear(
                torch.nn.Linear(48, 40, bias=bias, dtype=torch.bfloat16).requires_grad_(False), {"x": strong}
            )
            low.base.load_state_dict(linear.state_dict())
            for shape in ((48,), (1, 1, 48), (2, 3, 48), (4, 30, 48)):
                x = torch.randn(shape)
                with self.subTest(bias=bias, shape=shape):
                    found = low(x.bfloat16())
                    self.assertEqual(found.dtype, torch.bfloat16)
                    self.assertEqual(found.shape, exact(x).shape)
                    self.assertLess(relative(found, exact(x)), 0.02)
                    self.assertLess(
                        relative(exact(x), linear(x) + strong.scale * x @ strong.a_rI.T @ strong.b_Or.T), EXACT
                    )

    def test_variants_share_the_weights_and_leave_the_base_as_it_was(self) -> None:
        model = toy.tiny_llama()[0].eval().requires_grad_(False)
        ids = torch.arange(20)[None]
        with torch.no_grad():
            before = model(input_ids=ids).logits
        pair = pair_for(model, ALL_LINEAR_LLAMA)
        models = suite_inference.variants(model, pair, compose(pair, Recipe()))
        own = {id(p) for p in model.parameters()}
        self.assertEqual({id(p) for p in models["composed"].parameters()}, own)
        with torch.no_grad():
            self.assertTrue(torch.equal(model(input_ids=ids).logits, before))
            merged = models["merged"](input_ids=ids).logits
            suite_inference.merge_in_place(model, compose(pair, Recipe()))
            self.assertTrue(torch.equal(model(input_ids=ids).logits, merged))

    def test_factors_of_another_model_are_refused(self) -> None:
        model = toy.tiny_llama()[0]
        factors = pair_for(model, ALL_LINEAR_LLAMA)[0]
        with self.assertRaises(ArtefactError):
            inference_layers.attach(toy.tiny_minimax_m2()[0], {"x": factors})


class Training(unittest.TestCase):
    def test_flops_follow_the_formula(self) -> None:
        from utils.adapters import peft_model

        model = toy.tiny_llama()[0]
        linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        lora = LoraSection(rank=2, target_modules=("q_proj",))
        added = sum(2 * (m.in_features + m.out_features) for n, m in model.named_modules() if n.endswith("q_proj"))
        adapted = peft_model.attach(model, "probe", lora)
        self.assertEqual(suite_training.flops_per_token(model, adapted), 4 * linear + 6 * added)

    def test_a_document_that_continues_in_the_next_row_starts_at_position_0(self) -> None:
        positions = torch.cat([torch.arange(20), torch.arange(28)])
        stream = inputs.TokenStream(torch.arange(48), positions, "")
        train = TrainSection(max_sequence_tokens=16, batch_tokens=32, micro_batch_tokens=16)
        rows = suite_training.make_rows(stream, train)
        self.assertEqual(rows.positions_NT[1].tolist(), [*range(4), *range(12)])
        self.assertEqual(rows.positions_NT[2].tolist(), list(range(16)))
        self.assertEqual(rows.ids_NT.flatten().tolist(), list(range(48)))
        self.assertEqual((rows.steps, rows.micro_batches(0)), (1, [slice(0, 1), slice(1, 2)]))


class Data(unittest.TestCase):
    def test_linear_time_and_flat_memory_are_recognised(self) -> None:
        flat = [suite_data.Preparation(n * 10**6, 1, 2.0 * n, 2000.0, 10**9, 3 * 10**8) for n in (100, 300, 1000)]
        self.assertEqual(suite_data.growth(flat), {"time_exponent": 1.0, "anonymous_bytes_per_byte": 0.0})

    def test_synthetic_documents_are_distinct_and_of_the_size_asked_for(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "corpus.jsonl"
            count = suite_data.write_corpus(path, 200_000, seed=0)
            texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        self.assertEqual(len(texts), count)
        self.assertEqual(len(set(texts)), count)
        self.assertAlmostEqual(sum(map(len, texts)) / 200_000, 1, delta=0.05)


class Merging(unittest.TestCase):
    def test_a_synthetic_checkpoint_has_a_file_per_layer_and_at_least_the_size_asked_for(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / "base"
            layers = suite_merge.write_checkpoint(directory, suite_merge.TOY, 1_000_000, seed=0)
            sizes = [path.stat().st_size for path in directory.glob("*.safetensors")]
            self.assertEqual(len(sizes), layers)
            self.assertGreaterEqual(sum(sizes), 1_000_000)
            self.assertLess(sum(sizes), 1_300_000)
            model = AutoModelForCausalLM.from_pretrained(directory)
        self.assertEqual(len(model.model.layers), layers)
        self.assertEqual(model.config.rope_parameters["partial_rotary_factor"], 0.5)
        expert = model.model.layers[1].mlp.experts.down_proj[2].float()
        self.assertAlmostEqual(float(expert.std()), 0.02, places=3)

    def test_too_little_disk_or_memory_is_told_before_anything_is_written(self) -> None:
        size = 10**15
        with self.assertRaises(ArtefactError) as caught:
            suite_merge._refuse_too_small(size, Path(tempfile.gettempdir()))
        self.assertEqual(len(caught.exception.problems), 2)
        self.assertIn("--benchmark.merge_gigabytes", str(caught.exception))


class Scoring(unittest.TestCase):
    def test_ratio_is_of_the_same_slices_without_the_warm_up(self) -> None:
        clock = [0.0]

        def scorer(seconds: list[float], score: float) -> Callable[[int], list[float | None]]:
            def score_part(part: int) -> list[float | None]:
                clock[0] += seconds[part]
                return [score, None if score == 10.0 else 5.0]

            return score_part

        def now() -> float:
            return clock[0]

        contenders = {"ours": scorer([50, 1, 2, 1], 10.0), "lm_eval": scorer([1, 3, 4, 8], 10.1)}
        with mock.patch.object(suite_evaluation.time, "perf_counter", now):
            found = suite_evaluation._race("x", contenders, range(4), [100, 10, 20, 30])["contenders"]
        self.assertEqual((found["ours"]["per_second"], found["lm_eval"]["per_second"]), (15.0, 4.0))
        self.assertEqual((found["lm_eval"]["time_to_ours"], found["lm_eval"]["median_time_to_ours"]), (3.75, 3.0))
        self.assertAlmostEqual(found["lm_eval"]["largest_relative_difference"], 0.1 / 10.1, places=4)

    def test_suite_scores_prepared_data_and_agrees_with_lm_eval_where_that_is_installed(self) -> None:
        place = Workspace()
        place.prepare()
        done = place.run("benchmark", "--benchmark.suite", "evaluation")
        found = json.loads((Path(last_json(done)["report"]) / "results.json").read_text())["evaluation"]
        self.assertEqual({part["unit"] for part in found["parts"].values()}, {"items", "tokens"})
        installed = importlib.util.find_spec("lm_eval") is not None
        for part in found["parts"].values():
            self.assertGreater(part["contenders"]["ours"]["per_second"], 0)
            self.assertEqual("lm_eval" in part["contenders"], installed)
            if installed:
                self.assertLess(part["contenders"]["lm_eval"]["largest_relative_difference"], 1e-3)
        self.assertIn(found["lm_eval"], done.stdout)
        self.assertEqual(found["lm_eval"] == suite_evaluation.NO_LM_EVAL, not installed)

    def test_too_little_data_is_told_before_a_model_is_loaded(self) -> None:
        directory = temporary_directory()
        (directory / "task_test.jsonl").write_text("")
        run = SimpleNamespace(directory=directory)
        with (
            mock.patch.object(suite_evaluation.parent_runs, "prepared_run", return_value=run),
            mock.patch.object(suite_evaluation.chat, "load_tokenizer", return_value=toy.tiny_tokenizer()),
            self.assertRaises(ArtefactError) as caught,
        ):
            suite_evaluation.measure(tiny_minimax_m2(), SimpleNamespace(directory=directory))
        self.assertIn("needs 5 test pairs and 5 documents (got '0 pairs and 0 documents')", str(caught.exception))


class Plots(unittest.TestCase):
    def test_lines_and_speeds_of_the_suites_that_have_them(self) -> None:
        speeds = {"ours": {"per_second": 80.0}, "lm_eval": {"per_second": 40.0, "time_to_ours": 2.0}}
        prepared = [
            {"corpus_bytes": n * 1e6, "seconds": 0.2 * n, "peak_memory_bytes": 3e8, "peak_anonymous_bytes": 2e8}
            for n in (10, 100)
        ]
        results = {
            "machine": {"device": "<cpu>", "threads": 2, "load_before": None, "load_after": None},
            "training": {"contenders": {"ours": {"tokens_per_second": 1234.5, "share_of_peak": 0.41}}},
            "data": {"preparations": prepared},
            "evaluation": {"parts": {"answers": {"unit": "items", "contenders": speeds}}},
        }
        path = temporary_directory() / "plots.html"
        benchmark_report.write_plots(results, path)
        page = soup(path.read_text(encoding="utf-8"))
        self.assertEqual([one.get_text() for one in page.find_all("h2")], ["Training", "Data", "Evaluation"])
        hovers = {title.get_text() for title in page.select("svg title")}
        self.assertLessEqual({"ours: 1,234, 41% of the machine's peak", "lm_eval: 40, 2.0 x our time"}, hovers)
        self.assertEqual(len(page.select(".plot polyline")), 3)

    def test_suites_without_plots_make_no_page(self) -> None:
        path = temporary_directory() / "plots.html"
        benchmark_report.write_plots({"machine": {}, "gpu": {}}, path)
        self.assertFalse(path.exists())


class Script(unittest.TestCase):
    def test_a_toy_run_writes_results_plot_and_manifest_and_is_reused(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            flags = ["--preset", "tiny_minimax_m2", "--benchmark.suite", "inference,merge"]
            flags += ["--run.models_dir", f"{scratch}/models", "--run.data_dir", f"{scratch}/data"]
            lines = [last_json(forked("benchmark", *flags, patience=900.0)) for _ in range(2)]
            directory = Path(lines[0]["report"])
            results = json.loads((directory / "results.json").read_text())
            plots = soup((directory / "plots.html").read_text(encoding="utf-8"))
            for name in ("summary.txt", "plots.html", "manifest.json"):
                self.assertTrue((directory / name).is_file(), name)
        self.assertEqual([line["reused"] for line in lines], [False, True])
        titles = [caption.get_text() for caption in plots.find_all("figcaption")]
        self.assertEqual(titles[:2], ["Time to first token", "Time per further token"])
        self.assertEqual(titles[2:], ["Time of a merge", "Memory of a merge, without mapped files"])
        drawn = {bar.title.get_text() for bar in plots.select("g:has(.bar)")}
        models = results["inference"]["cells"][0]["models"]
        self.assertTrue(any(f"merged: {models['merged']['decode_to_base']:.2f}" in text for text in drawn), drawn)
        self.assertEqual(tuple(models), suite_inference.MODELS)
        self.assertEqual(models["base"]["decode_to_base"], 1.0)
        contenders = results["merge"]["contenders"]
        self.assertEqual(tuple(contenders), ("cp", "ours", "self-check", "peft"))
        self.assertEqual(contenders["ours"]["facts"]["tensors_changed"], 4 * results["merge"]["checkpoint"]["layers"])
        self.assertEqual(contenders["self-check"]["facts"]["max_weight_difference"], 0.0)


if __name__ == "__main__":
    unittest.main()
