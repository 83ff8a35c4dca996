"""Composed updates against dense sums written out, for every method, on plain modules and on fused experts."""

from __future__ import annotations

import math
import unittest
from collections.abc import Sequence

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support import relative, temporary_directory, toy
from utils.adapters import adapter_files, fused_experts
from utils.adapters.factors import Factors, ModuleFactors, delta, distance, inner, norm, scaled, stacked, zero_modules
from utils.composition.checks import check, relative_errors
from utils.composition.collisions import collisions
from utils.composition.methods import METHODS, Recipe, compose, depth, weighted, weights_at
from utils.composition.truncation import tail, truncated

LAYERS = 3
Q, V, E = "model.layers.{}.q_proj", "model.layers.{}.v_proj", "model.layers.{}.mlp.experts.down_proj"
SHAPES = {name.format(layer): shape for layer in range(LAYERS) for name, shape in ((Q, (12, 8)), (V, (6, 8)))}
EXPERTS = {E.format(layer): (4, 7, 9) for layer in range(LAYERS)}
EXACT = [name for name, method in METHODS.items() if method.exact]
WEIGHTS = st.floats(-2.0, 2.0, width=32).filter(lambda weight: weight == 0 or abs(weight) > 1e-3)


def adapter(rank: int, alpha: float, seed: int, modules: Sequence[str] | None = None) -> dict[str, ModuleFactors]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (*lead, out_features, in_features) in {**SHAPES, **EXPERTS}.items():
        a = torch.randn(*lead, rank, in_features, generator=generator)
        b = torch.randn(*lead, out_features, rank, generator=generator)
        if modules is None or name in modules:
            found[name] = ModuleFactors(a, b, alpha / rank)
    return found


def dense(f: ModuleFactors) -> torch.Tensor:
    """s B A in float64, expert by expert where there are experts."""
    if not f.is_experts:
        return f.scale * (f.b_Or.double() @ f.a_rI.double())
    return torch.stack([f.scale * (b.double() @ a.double()) for b, a in zip(f.b_Or, f.a_rI, strict=True)])


def by_hand(parts: Sequence[Factors], weights: Sequence[Sequence[float]], module: str) -> torch.Tensor:
    """sum_i a_i(layer) D_i, from the weights of each adapter in each layer."""
    layer = int(module.split(".")[2])
    shape = {**SHAPES, **EXPERTS}[module]
    total = torch.zeros(shape, dtype=torch.float64)
    for part, own in zip(parts, weights, strict=True):
        if module in part:
            total += own[layer] * dense(part[module])
    return total


def numbers(method: str, weights: Sequence[float]) -> tuple[tuple[float, ...], list[list[float]]]:
    """(what the recipe takes, weight of each adapter in each layer) for one leading weight per adapter."""
    if method == "depth_gate":
        ends = [(w, -0.5 * w + 0.25) for w in weights]
        per_layer = [[a + (b - a) * layer / (LAYERS - 1) for layer in range(LAYERS)] for a, b in ends]
        return tuple(w for pair in ends for w in pair), per_layer
    if method == "per_layer":
        per_layer = [[w, 0.0, -w][:LAYERS] for w in weights]
        return tuple(w for own in per_layer for w in own), per_layer
    return tuple(weights), [[w] * LAYERS for w in weights]


class ExactMethods(unittest.TestCase):
    @settings(max_examples=60, deadline=None)
    @given(
        method=st.sampled_from(EXACT),
        ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
        alphas=st.tuples(st.floats(0.5, 64), st.floats(0.5, 64)),
        weights=st.tuples(WEIGHTS, WEIGHTS).filter(any),
        modules=st.lists(st.sampled_from(sorted({**SHAPES, **EXPERTS})), min_size=1, unique=True),
        seed=st.integers(0, 2**31),
    )
    def test_composition_is_the_sum_of_dense_updates_for_any_rank_alpha_weight_and_target(
        self,
        method: str,
        ranks: tuple[int, int],
        alphas: tuple[float, float],
        weights: tuple[float, float],
        modules: list[str],
        seed: int,
    ) -> None:
        parts = [adapter(ranks[0], alphas[0], seed), adapter(ranks[1], alphas[1], seed + 1, modules)]
        given_weights, per_layer = numbers(method, weights)
        recipe = Recipe(method, given_weights)
        # a weight per layer may be 0 in the only layer that an adapter has
        assume(any(own[int(m.split(".")[2])] for part, own in zip(parts, per_layer, strict=True) for m in part))
        composed = compose(parts, recipe)
        for module in {**SHAPES, **EXPERTS}:
            expected = by_hand(parts, per_layer, module)
            found = delta(composed[module]).double() if module in composed else torch.zeros_like(expected)
            size = sum(
                abs(own[int(module.split(".")[2])]) * float(dense(p[module]).norm())
                for p, own in zip(parts, per_layer, strict=True)
                if module in p
            )
            self.assertLessEqual(float((found - expected).norm()), 1e-5 * max(size, 1e-12), module)
        self.assertEqual(check(composed, weighted(parts, recipe), exact=METHODS[recipe.method].exact).problems, ())

    def test_rank_of_the_sum_is_the_sum_of_the_ranks_of_those_with_a_weight(self) -> None:
        first, second = Q.format(0), V.format(0)
        parts = [adapter(2, 8, 0, [first, second]), adapter(3, 8, 1, [first]), adapter(4, 8, 2, [first])]
        composed = compose(parts, Recipe(weights=(1.0, 0.0, -0.5)))
        self.assertEqual({name: f.rank for name, f in composed.items()}, {first: 6, second: 2})
        self.assertEqual({f.scale for f in composed.values()}, {1.0})

    def test_order_does_not_matter_and_one_adapter_at_weight_one_is_itself(self) -> None:
        first, second = adapter(2, 8, 0), adapter(3, 16, 1)
        one = compose([first, second], Recipe(weights=(0.7, -1.3)))
        other = compose([second, first], Recipe(weights=(-1.3, 0.7)))
        for module in one:
            torch.testing.assert_close(delta(one[module]), delta(other[module]), rtol=1e-5, atol=1e-5)
        for method in EXACT:
            alone = compose([first], Recipe(method))
            for module, f in alone.items():
                torch.testing.assert_close(delta(f), delta(first[module]), rtol=1e-6, atol=1e-6)

    def test_an_adapter_and_its_negative_leave_nothing(self) -> None:
        alone = adapter(3, 12, 0)
        for f in compose([alone, alone], Recipe(weights=(1.0, -1.0))).values():
            self.assertLess(float(delta(f).norm()), 1e-4)

    def test_weights_of_zero_in_a_layer_leave_that_layer_out(self) -> None:
        part = adapter(2, 8, 0)
        composed = compose([part], Recipe("per_layer", (1.0, 0.0, 2.0)))
        self.assertEqual({int(name.split(".")[2]) for name in composed}, {0, 2})

    def test_bfloat16_factors_are_summed_in_float32(self) -> None:
        half = {m: ModuleFactors(f.a_rI.bfloat16(), f.b_Or.bfloat16(), f.scale) for m, f in adapter(2, 8, 0).items()}
        for module, f in compose([half], Recipe(weights=(1 / 3,))).items():
            self.assertEqual((f.a_rI.dtype, f.b_Or.dtype), (torch.float32, torch.float32))
            self.assertLess(relative(delta(f).double(), dense(half[module]) / 3), 1e-6)

    def test_inputs_are_not_changed(self) -> None:
        part = adapter(2, 8, 0)
        before = {m: (f.a_rI.clone(), f.b_Or.clone()) for m, f in part.items()}
        for method in METHODS:
            for f in compose([part], Recipe(method)).values():
                f.a_rI.zero_()
                f.b_Or.zero_()
        self.assertTrue(
            all(torch.equal(part[m].a_rI, a) and torch.equal(part[m].b_Or, b) for m, (a, b) in before.items())
        )

    def test_wrong_numbers_of_weights_shapes_and_empty_results_are_refused(self) -> None:
        for method, count in (("sum", 1), ("depth_gate", 2), ("per_layer", LAYERS), ("ties", 1)):
            with self.assertRaisesRegex(ValueError, f"{method} of 1 adapters takes {count} weights, got 7"):
                compose([adapter(2, 8, 0)], Recipe(method, (1.0,) * 7))
        other = {Q.format(0): ModuleFactors(torch.ones(2, 9), torch.ones(12, 2), 1.0)}
        with self.assertRaisesRegex(ValueError, r"layers.0.q_proj: .*\(12, 8\), \(12, 9\)"):
            compose([adapter(2, 8, 0), other], Recipe())
        with self.assertRaisesRegex(ValueError, "every weight is 0"):
            compose([adapter(2, 8, 0), adapter(2, 8, 1)], Recipe(weights=(0.0, 0.0)))

    def test_what_lies_outside_the_layers_has_the_last_layers_weight(self) -> None:
        recipe = Recipe("depth_gate", (0.0, 1.0))
        self.assertEqual(weights_at("lm_head", recipe, 1, 4), [1.0])
        self.assertEqual([weights_at(Q.format(i), recipe, 1, 3)[0] for i in range(3)], [0.0, 0.5, 1.0])
        self.assertEqual(depth([adapter(2, 8, 0)]), LAYERS)


class ApproximateMethods(unittest.TestCase):
    def test_truncation_is_the_closest_of_its_rank_and_its_error_comes_from_the_singular_values(self) -> None:
        whole = stacked([adapter(3, 6, 0)[E.format(0)], adapter(4, 8, 1)[E.format(0)]])
        for rank in range(1, 8):
            dropped = [torch.linalg.svdvals(dense(whole)[e])[rank:].square().sum() for e in range(4)]
            expected = math.sqrt(float(sum(dropped))) / float(dense(whole).norm())
            cut = truncated(whole, rank)
            self.assertEqual(cut.rank, rank)
            self.assertAlmostEqual(float((dense(cut) - dense(whole)).norm() / dense(whole).norm()), expected, places=5)
            self.assertAlmostEqual(tail(whole, rank), expected, places=5)

    def test_stated_error_of_every_approximate_method_is_its_distance_from_the_exact_sum(self) -> None:
        parts, weights = [adapter(4, 8, 0), adapter(4, 16, 1)], (0.8, -0.6)
        for method in METHODS:
            if METHODS[method].exact:
                continue
            recipe = Recipe(method, weights, rank=5)
            composed = compose(parts, recipe)
            errors = relative_errors(composed, weighted(parts, recipe))
            for module, f in composed.items():
                exact = by_hand(parts, [[w] * LAYERS for w in weights], module)
                self.assertAlmostEqual(
                    errors[module], float((dense(f) - exact).norm() / exact.norm()), places=4, msg=method
                )
            found = check(composed, weighted(parts, recipe), exact=METHODS[recipe.method].exact)
            self.assertFalse(found.exact)
            self.assertEqual(found.problems, ())
            self.assertEqual(found.relative_error, max(errors.values()))
            self.assertGreater(found.relative_error, 0.01)

    def test_methods_that_keep_everything_are_the_sum(self) -> None:
        parts = [adapter(2, 8, 0), adapter(3, 16, 1)]
        for recipe in (Recipe("sum_truncated"), Recipe("dare", density=1.0)):
            self.assertLess(
                max(relative_errors(compose(parts, recipe), weighted(parts, recipe)).values()), 1e-5, recipe.method
            )
        alone = Recipe("ties", density=1.0)
        self.assertLess(max(relative_errors(compose(parts[:1], alone), weighted(parts[:1], alone)).values()), 1e-5)

    def test_dare_depends_on_its_seed_and_on_nothing_else(self) -> None:
        parts = [adapter(2, 8, 0), adapter(3, 16, 1)]
        made = [compose(parts, Recipe("dare", seed=seed)) for seed in (1, 1, 2)]
        torch.manual_seed(99)
        self.assertTrue(all(torch.equal(made[0][m].a_rI, made[1][m].a_rI) for m in made[0]))
        self.assertFalse(any(torch.equal(made[0][m].a_rI, made[2][m].a_rI) for m in made[0]))

    def test_every_row_names_its_source(self) -> None:
        for name, method in METHODS.items():
            self.assertRegex(method.source, r"arXiv:\d{4}\.\d{5}|Eckart|PEFT", name)


class Checks(unittest.TestCase):
    def test_a_wrong_composition_is_caught_by_the_size_of_the_mistake(self) -> None:
        parts, recipe = [adapter(2, 8, 0), adapter(3, 16, 1)], Recipe(weights=(1.0, -0.5))
        composed = compose(parts, recipe)
        name = V.format(1)
        right = composed[name]
        composed[name] = scaled(right, 1.25)
        self.assertAlmostEqual(relative_errors(composed, weighted(parts, recipe))[name], 0.25, places=5)
        found = check(composed, weighted(parts, recipe), exact=METHODS[recipe.method].exact)
        self.assertEqual(found.worst_module, name)
        self.assertRegex(found.problems[0], "relative error 0.25 is above 1e-05")
        del composed[name]
        self.assertAlmostEqual(relative_errors(composed, weighted(parts, recipe))[name], 1.0, places=6)
        composed[name] = ModuleFactors(right.a_rI * float("nan"), right.b_Or, 1.0)
        self.assertIn(
            "not finite",
            " ".join(check(composed, weighted(parts, recipe), exact=METHODS[recipe.method].exact).problems),
        )
        composed["model.layers.0.k_proj"] = right  # a module that no adapter changes
        self.assertGreater(relative_errors(composed, weighted(parts, recipe))["model.layers.0.k_proj"], 1.0)

    def test_concatenating_expert_tensors_as_they_lie_on_disk_is_caught(self) -> None:
        name = E.format(0)
        parts = [adapter(2, 2, 0, [name]), adapter(2, 2, 1, [name])]
        on_disk = [fused_experts.to_peft(part[name]) for part in parts]
        wrong = fused_experts.from_peft(
            torch.cat([a for a, _ in on_disk]), torch.cat([b for _, b in on_disk], dim=1), rank=4, scale=1.0
        )
        self.assertGreater(check({name: wrong}, weighted(parts, Recipe()), exact=True).relative_error, 0.5)

    def test_norms_and_inner_products_are_those_of_the_dense_updates(self) -> None:
        first, second = adapter(2, 8, 0), adapter(5, 3, 1)
        for module in first:
            d, t = dense(first[module]), dense(second[module])
            self.assertAlmostEqual(norm(first[module]), float(d.norm()), places=5)
            self.assertAlmostEqual(inner(first[module], second[module]), float((d * t).sum()), places=4)
            self.assertAlmostEqual(distance(first[module], [second[module]]), float((d - t).norm()), places=4)
            self.assertAlmostEqual(distance(None, [first[module], second[module]]), float((d + t).norm()), places=4)

    def test_zero_modules_are_those_with_a_zero_factor(self) -> None:
        part = adapter(2, 8, 0)
        name = V.format(0)
        part[name] = ModuleFactors(part[name].a_rI, torch.zeros(6, 2), 1.0)
        self.assertEqual(zero_modules(part), [name])


class Collisions(unittest.TestCase):
    def test_an_update_agrees_with_itself_and_opposes_its_negative(self) -> None:
        part = adapter(2, 8, 0)
        for factor, cosine, conflict in ((2.0, 1.0, 0.0), (-0.5, -1.0, 1.0)):
            other = {name: scaled(f, factor) for name, f in part.items()}
            for found in collisions(part, other).values():
                self.assertAlmostEqual(found.cosine, cosine, places=6)
                self.assertAlmostEqual(found.sign_conflict, conflict, places=6)
                self.assertAlmostEqual(found.norm_ratio, 1 / abs(factor), places=6)
                self.assertAlmostEqual(found.input_overlap, 1.0, places=5)

    def test_updates_of_orthogonal_subspaces_do_not_overlap(self) -> None:
        a, b = torch.eye(8)[:2], torch.eye(12)[:, :2]
        first = {"x": ModuleFactors(a, b, 1.0)}
        second = {"x": ModuleFactors(torch.eye(8)[2:4], torch.eye(12)[:, 4:6], 1.0)}
        found = collisions(first, second)["x"]
        self.assertEqual((found.cosine, found.input_overlap, found.output_overlap), (0.0, 0.0, 0.0))


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
            loaded = adapter_files.load(directory)
            self.assertEqual(len(loaded), 4)
            for name, f in loaded.items():
                self.assertAlmostEqual(f.scale, expected)
                layer = model.base_model.model.get_submodule(name)
                self.assertLess(relative(delta(f), layer.get_delta_weight("default")), 1e-6)


if __name__ == "__main__":
    unittest.main()
