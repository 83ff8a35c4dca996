"""The weighted sum of adapters is the weighted sum of their dense updates: claims are checked against that formula."""

from __future__ import annotations

import math
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.support import relative, temporary_directory, toy  # noqa: E402
from utils import adapters  # noqa: E402
from utils.composition import Factors, ModuleFactors, delta, relative_error, weighted_sum, zero_modules  # noqa: E402

SHAPES = {"q_proj": (12, 8), "v_proj": (6, 8), "down_proj": (8, 10)}
WEIGHTS = st.floats(-2.0, 2.0, width=32).filter(lambda weight: weight == 0 or abs(weight) > 1e-3)


def adapter(rank: int, alpha: float, seed: int, modules: tuple[str, ...] = tuple(SHAPES)) -> dict[str, ModuleFactors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: ModuleFactors(
            torch.randn(rank, SHAPES[name][1], generator=generator),
            torch.randn(SHAPES[name][0], rank, generator=generator),
            alpha / rank,
        )
        for name in modules
    }


def dense(parts: list[Factors], weights: list[float], module: str) -> torch.Tensor:
    """sum_i a_i s_i B_i A_i in float64, written out."""
    total = torch.zeros(SHAPES[module], dtype=torch.float64)
    for part, weight in zip(parts, weights, strict=True):
        if module in part:
            f = part[module]
            total += weight * f.scale * (f.b_Or.double() @ f.a_rI.double())
    return total


class WeightedSum(unittest.TestCase):
    @settings(max_examples=60, deadline=None)
    @given(
        ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
        alphas=st.tuples(st.floats(0.5, 64), st.floats(0.5, 64)),
        weights=st.tuples(WEIGHTS, WEIGHTS).filter(any),
        modules=st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True),
        seed=st.integers(0, 2**31),
    )
    def test_weighted_sum_is_the_sum_of_dense_updates_for_any_rank_alpha_weight_and_target(
        self,
        ranks: tuple[int, int],
        alphas: tuple[float, float],
        weights: tuple[float, float],
        modules: list[str],
        seed: int,
    ) -> None:
        parts = [adapter(ranks[0], alphas[0], seed), adapter(ranks[1], alphas[1], seed + 1, tuple(modules))]
        composed = weighted_sum(parts, weights)
        for module in SHAPES:
            expected = dense(parts, list(weights), module)
            found = delta(composed[module]).double() if module in composed else torch.zeros_like(expected)
            size = sum(abs(w) * float(dense([p], [1.0], module).norm()) for p, w in zip(parts, weights, strict=True))
            self.assertLessEqual(float((found - expected).norm()), 1e-5 * max(size, 1e-12), module)

    def test_rank_of_the_sum_is_the_sum_of_the_ranks_of_those_with_a_weight(self) -> None:
        parts = [adapter(2, 8, 0), adapter(3, 8, 1), adapter(4, 8, 2, ("q_proj",))]
        composed = weighted_sum(parts, [1.0, 0.0, -0.5])
        self.assertEqual({name: f.rank for name, f in composed.items()}, {"q_proj": 6, "v_proj": 2, "down_proj": 2})
        self.assertEqual({f.scale for f in composed.values()}, {1.0})

    def test_order_does_not_matter(self) -> None:
        first, second = adapter(2, 8, 0), adapter(3, 16, 1, ("q_proj", "v_proj"))
        one, other = weighted_sum([first, second], [0.7, -1.3]), weighted_sum([second, first], [-1.3, 0.7])
        for module in SHAPES:
            torch.testing.assert_close(delta(one[module]), delta(other[module]), rtol=1e-5, atol=1e-5)

    def test_one_adapter_at_weight_one_is_itself(self) -> None:
        alone = adapter(3, 12, 0)
        for module, f in weighted_sum([alone], [1.0]).items():
            torch.testing.assert_close(delta(f), delta(alone[module]), rtol=1e-5, atol=1e-5)

    def test_an_adapter_and_its_negative_leave_nothing(self) -> None:
        alone = adapter(3, 12, 0)
        for f in weighted_sum([alone, alone], [1.0, -1.0]).values():
            self.assertLess(float(delta(f).norm()), 1e-4)

    def test_sum_does_not_depend_on_how_the_factors_are_written(self) -> None:
        first, second = adapter(4, 8, 0), adapter(3, 16, 1)
        q_rr = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(5)))[0]
        rewritten = {m: ModuleFactors(q_rr.t() @ f.a_rI, f.b_Or @ q_rr, f.scale) for m, f in first.items()}
        moved = {m: ModuleFactors(f.a_rI * f.scale, f.b_Or, 1.0) for m, f in first.items()}
        expected = weighted_sum([first, second], [0.5, 2.0])
        for same in (rewritten, moved):
            found = weighted_sum([same, second], [0.5, 2.0])
            for module in SHAPES:
                self.assertLess(relative(delta(found[module]), delta(expected[module])), 1e-5)

    def test_bfloat16_factors_are_summed_in_float32(self) -> None:
        half = {m: ModuleFactors(f.a_rI.bfloat16(), f.b_Or.bfloat16(), f.scale) for m, f in adapter(2, 8, 0).items()}
        for module, f in weighted_sum([half], [1 / 3]).items():
            self.assertEqual((f.a_rI.dtype, f.b_Or.dtype), (torch.float32, torch.float32))
            self.assertLess(relative(delta(f).double(), dense([half], [1 / 3], module)), 1e-6)

    def test_inputs_are_not_changed(self) -> None:
        part = adapter(2, 8, 0)
        before = {m: (f.a_rI.clone(), f.b_Or.clone()) for m, f in part.items()}
        weighted_sum([part, part], [3.0, -2.0])["q_proj"].a_rI.zero_()
        self.assertTrue(
            all(torch.equal(part[m].a_rI, a) and torch.equal(part[m].b_Or, b) for m, (a, b) in before.items())
        )

    def test_numbers_of_adapters_and_weights_must_agree(self) -> None:
        with self.assertRaisesRegex(ValueError, "1 adapters but 2 weights"):
            weighted_sum([adapter(2, 8, 0)], [1.0, 1.0])

    def test_different_shapes_of_one_module_are_refused_and_named(self) -> None:
        other = {"q_proj": ModuleFactors(torch.ones(2, 9), torch.ones(12, 2), 1.0)}
        with self.assertRaisesRegex(ValueError, r"q_proj: .*\(12, 8\), \(12, 9\)"):
            weighted_sum([adapter(2, 8, 0), other], [1.0, 1.0])

    def test_all_weights_zero_is_no_composition(self) -> None:
        with self.assertRaisesRegex(ValueError, "every weight is 0"):
            weighted_sum([adapter(2, 8, 0), adapter(2, 8, 1)], [0.0, 0.0])


class RelativeError(unittest.TestCase):
    def test_relative_error_is_zero_for_the_sum_and_one_for_a_missing_module(self) -> None:
        parts, weights = [adapter(2, 8, 0), adapter(3, 16, 1)], [1.0, -0.5]
        composed = weighted_sum(parts, weights)
        self.assertLess(relative_error(composed, parts, weights), 1e-6)
        del composed["v_proj"]
        self.assertAlmostEqual(relative_error(composed, parts, weights), 1.0, places=6)

    def test_relative_error_is_the_size_of_the_mistake(self) -> None:
        part = adapter(2, 8, 0)
        wrong = {m: ModuleFactors(f.a_rI, f.b_Or, f.scale * 1.25) for m, f in part.items()}
        self.assertAlmostEqual(relative_error(wrong, [part], [1.0]), 0.25, places=5)

    def test_zero_modules_are_those_with_a_zero_factor(self) -> None:
        part = adapter(2, 8, 0)
        part["v_proj"] = ModuleFactors(part["v_proj"].a_rI, torch.zeros(6, 2), 1.0)
        self.assertEqual(zero_modules(part), ["v_proj"])


class Scale(unittest.TestCase):
    def test_scale_of_a_peft_adapter_is_alpha_over_rank_or_over_its_root_with_rslora(self) -> None:
        from peft import LoraConfig, get_peft_model

        for use_rslora, expected in ((False, 12 / 9), (True, 12 / math.sqrt(9))):
            settings_ = LoraConfig(
                task_type="CAUSAL_LM",
                r=9,
                lora_alpha=12,
                use_rslora=use_rslora,
                target_modules=["q_proj", "v_proj"],
                init_lora_weights=False,
            )
            model = get_peft_model(toy.tiny_llama()[0], settings_)
            directory = temporary_directory()
            model.save_pretrained(directory)
            loaded = adapters.load(directory)
            self.assertEqual(len(loaded), 4)
            for name, f in loaded.items():
                self.assertAlmostEqual(f.scale, expected)
                layer = model.base_model.model.get_submodule(name)
                self.assertLess(relative(delta(f), layer.get_delta_weight("default")), 1e-6)


if __name__ == "__main__":
    unittest.main()
