"""PEFT's own ways of combining adapters go wrong as documented, and ours give the exact sum or refuse with a reason.

Each test first shows the defect in the PEFT that is installed, loosely: when a later PEFT mends it, the test says so
and that part of it can go. Then our composition is held against dense sums, or logits against weights merged by hand.
"""

from __future__ import annotations

import copy
import math
import unittest
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

from config import ComposeSection
from tests.support import ARCHITECTURES, relative, saved_model, temporary_directory
from utils.adapters import adapter_files, inference_layers, other_tools, peft_model
from utils.adapters.factors import Factors, ModuleFactors, delta, stacked
from utils.composition.checks import check, relative_errors
from utils.composition.methods import METHODS, Recipe, compose, recipe_of, weighted
from utils.composition.truncation import tail
from utils.exceptions import ArtefactError

Dense = dict[str, torch.Tensor]

IDS = torch.randint(8, 700, (2, 24), generator=torch.Generator().manual_seed(3))
DOMAIN, TASK, BOTH = "domain", "task", ["domain", "task"]
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
# what counts as a defect, and what as rounding: measured defects are above 0.3, measured rounding below 2e-6
WRONG, ROUNDING = 0.1, 1e-5


def lora(rank: int = 4, alpha: float = 8, targets: Sequence[str] = ("q_proj", "v_proj"), **more: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=list(targets), **more)


def fresh(architecture: str) -> torch.nn.Module:
    return ARCHITECTURES[architecture]()[0].eval()


def stock(architecture: str, *configs: LoraConfig) -> PeftModel:
    """Stock PEFT with adapters `domain` and `task` as training leaves them: A and B random, neither small."""
    torch.manual_seed(1)
    model = get_peft_model(fresh(architecture), configs[0], adapter_name=DOMAIN)
    for config in configs[1:]:
        model.add_adapter(TASK, config)
    trained(model)
    return model.eval()


@torch.no_grad()
def trained(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).logits


@torch.no_grad()
def deltas(model: PeftModel, name: str) -> Dense:
    """What PEFT itself says one adapter adds to each weight (for a single adapter it is right)."""
    return {path: layer.get_delta_weight(name).double() for path, layer in peft_model.lora_layers(model, name).items()}


def added(parts: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float] = (1.0, 1.0)) -> Dense:
    total: Dense = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, update in part.items():
            total[name] = total.get(name, 0.0) + weight * update
    return total


def dense(factors: Factors) -> Dense:
    """scale * B A in float64."""
    return {name: f.scale * (f.b_Or.double() @ f.a_rI.double()) for name, f in factors.items()}


def distance(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """||found - expected|| / ||expected|| over all modules; a module that is not there counts as zero."""
    zero = torch.zeros(())
    names = {*found, *expected}
    off = sum(float((found.get(n, zero) - expected.get(n, zero)).square().sum()) for n in names)
    return math.sqrt(off / sum(float(update.square().sum()) for update in expected.values()))


def loaded(model: PeftModel, name: str, base: Any = None) -> dict[str, ModuleFactors]:
    """An adapter as we get it: written by PEFT, found and read by us."""
    directory = temporary_directory()
    model.save_pretrained(directory, selected_adapters=[name])
    return adapter_files.load(adapter_files.find(directory), base)


def both(model: PeftModel) -> list[dict[str, ModuleFactors]]:
    return [loaded(model, name) for name in BOTH]


@torch.no_grad()
def by_hand(architecture: str, *updates: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the base with these updates added to its weights."""
    model = fresh(architecture)
    weights = {name.removesuffix(".weight"): parameter for name, parameter in model.named_parameters()}
    for name, update in added(updates, [1.0] * len(updates)).items():
        weights[name].copy_(weights[name].double() + update)
    return logits(model)


def ours(architecture: str, factors: Factors) -> torch.Tensor:
    return logits(peft_model.add(fresh(architecture), "composed", factors))


def setUpModule() -> None:
    unittest.enterModuleContext(warnings.catch_warnings())
    warnings.simplefilter("ignore")  # of PEFT's, that it ignores rank patterns of experts: it does not


class Defects(unittest.TestCase):
    def assert_defect(self, size: float, what: str) -> None:
        self.assertGreater(size, WRONG, f"PEFT no longer has this defect: {what}")

    def assert_sum(self, factors: Factors, parts: Sequence[Dense], weights: Sequence[float] = (1.0, 1.0)) -> None:
        self.assertLess(distance(dense(factors), added(parts, weights)), ROUNDING)


class WeightedAdapter(Defects):
    """`add_weighted_adapter` on Llama."""

    def test_cat_is_exact_and_is_what_ours_gives(self) -> None:
        model = stock("llama", lora(), lora(3, 5, ("q_proj", "o_proj")))
        parts = [deltas(model, name) for name in BOTH]
        model.add_weighted_adapter(BOTH, [0.7, 1.3], "cat", "cat")
        self.assertLess(distance(deltas(model, "cat"), added(parts, [0.7, 1.3])), ROUNDING)
        composed = compose(both(model), Recipe(weights=(0.7, 1.3)))
        self.assert_sum(composed, parts, [0.7, 1.3])
        self.assertEqual({f.rank for name, f in composed.items() if name.endswith("q_proj")}, {4 + 3})
        self.assertLess(relative(ours("llama", composed), by_hand("llama", added(parts, [0.7, 1.3]))), ROUNDING)

    def test_svd_truncates_to_the_larger_rank_and_the_sum_has_both_ranks(self) -> None:
        model = stock("llama", lora(4), lora(3, 5))
        parts = [deltas(model, name) for name in BOTH]
        model.add_weighted_adapter(BOTH, [1.0, 1.0], "svd")  # the default combination type
        truncated = deltas(model, "svd")
        self.assert_defect(distance(truncated, added(parts)), "svd truncates to max(r)")
        factors = both(model)
        exact, cut = compose(factors, Recipe()), compose(factors, Recipe("sum_truncated", rank=4))
        self.assert_sum(exact, parts)
        stated = relative_errors(cut, weighted(factors, Recipe("sum_truncated", rank=4)))
        for name, update in added(parts).items():
            self.assertEqual((exact[name].rank, int(torch.linalg.matrix_rank(dense(exact)[name]))), (7, 7))
            self.assertEqual((cut[name].rank, int(torch.linalg.matrix_rank(dense(cut)[name]))), (4, 4))
            values = torch.linalg.svdvals(update)
            expected = float(values[4:].norm() / values.norm())
            self.assertAlmostEqual(stated[name], expected, places=6)
            self.assertAlmostEqual(tail(stacked([f[name] for f in factors]), 4), expected, places=6)
            self.assertAlmostEqual(float((truncated[name] - update).norm() / update.norm()), expected, places=5)
        found = check(cut, weighted(factors, Recipe("sum_truncated", rank=4)), exact=False)
        self.assertFalse(found.exact)
        self.assertGreater(found.mean_relative_error, WRONG, "the truncation is not stated")

    def test_linear_brings_cross_terms_and_only_factor_sum_repeats_it(self) -> None:
        model = stock("llama", lora(), lora(4, 6))
        parts = [deltas(model, name) for name in BOTH]
        for weights in ([1.0, 1.0], [0.8, -0.6]):
            name = f"linear{len(model.peft_config)}"
            model.add_weighted_adapter(BOTH, weights, name, "linear")
            self.assert_defect(distance(deltas(model, name), added(parts, weights)), "linear has cross terms")
            factors = both(model)
            self.assert_sum(compose(factors, Recipe(weights=tuple(weights))), parts, weights)
            # sum_ij sqrt|w_i s_i| sign_j sqrt|w_j s_j| B_i A_j: with i = j it is the sum, the others are cross terms
            roots = [math.sqrt(abs(w) * s) for w, s in zip(weights, (8 / 4, 6 / 4), strict=True)]
            signed = [math.copysign(root, w) for root, w in zip(roots, weights, strict=True)]
            expected = {
                module: sum(
                    roots[i] * signed[j] * factors[i][module].b_Or.double() @ factors[j][module].a_rI.double()
                    for i in range(2)
                    for j in range(2)
                )
                for module in factors[0]
            }
            self.assertLess(distance(deltas(model, name), expected), ROUNDING)
            reference = compose(factors, Recipe("factor_sum", tuple(weights)))
            self.assertLess(distance(dense(reference), expected), ROUNDING)

    def test_ties_and_pruning_act_on_factors_and_ours_on_true_deltas(self) -> None:
        model = stock("llama", lora(), lora(4, 6))
        parts, weights, density = [deltas(model, name) for name in BOTH], (0.9, 0.6), 0.3
        expected = {
            module: ties([w * p[module] for p, w in zip(parts, weights, strict=True)], density) for module in parts[0]
        }
        model.add_weighted_adapter(BOTH, list(weights), "ties", "ties", density=density)
        self.assert_defect(distance(deltas(model, "ties"), expected), "ties acts on the factors")
        model.add_weighted_adapter(BOTH, list(weights), "pruned", "magnitude_prune", density=density)
        kept = {m: sum(largest(w * p[m], density) for p, w in zip(parts, weights, strict=True)) for m in parts[0]}
        self.assert_defect(distance(deltas(model, "pruned"), kept), "magnitude_prune acts on the factors")
        factors = both(model)
        whole = compose(factors, Recipe("ties", weights, rank=64, density=density))  # 64: nothing is truncated
        self.assertLess(distance(dense(whole), expected), ROUNDING)
        cut = compose(factors, Recipe("ties", weights, density=density))
        for module, update in expected.items():
            values = torch.linalg.svdvals(update)
            self.assertEqual(cut[module].rank, 4 + 4)
            found = float((dense(cut)[module] - update).norm() / update.norm())
            self.assertAlmostEqual(found, float(values[8:].norm() / values.norm()), places=5)

    def test_dare_acts_on_factors_without_a_seed_and_ours_on_true_deltas_with_one(self) -> None:
        model = stock("llama", lora(), lora(4, 6))
        parts, density = [deltas(model, name) for name in BOTH], 0.4
        for at in range(2):
            model.add_weighted_adapter(BOTH, [1.0, 1.0], f"dare{at}", "dare_linear", density=density)
        self.assert_defect(distance(deltas(model, "dare1"), deltas(model, "dare0")), "dare depends on the global state")
        factors = both(model)
        recipe = Recipe("dare", rank=64, density=density, seed=7)
        first, again = compose(factors, recipe), compose(factors, recipe)
        other = compose(factors, Recipe("dare", rank=64, density=density, seed=8))
        self.assertTrue(all(torch.equal(first[m].a_rI, again[m].a_rI) for m in first))
        self.assertTrue(all(torch.equal(first[m].b_Or, again[m].b_Or) for m in first))
        self.assertGreater(distance(dense(other), dense(first)), WRONG)
        # every entry is (kept or not) d / density + (kept or not) t / density, each kept by itself with p = density
        kept, entries, patterns = [0, 0, 0], 0, set()
        for module, update in dense(first).items():
            d, t = (part[module] / density for part in parts)
            options = torch.stack([torch.zeros_like(d), d, t, d + t])
            nearest = (options - update).abs().min(0)
            self.assertLess(float(nearest.values.norm() / update.norm()), ROUNDING, module)
            # entries that could be told apart only by rounding say nothing about what was kept
            clear = torch.minimum(d.abs(), t.abs()) > 1e-3
            clear &= (d - t).abs() > 1e-3
            clear &= (d + t).abs() > 1e-3
            choice = nearest.indices[clear]
            kept[0] += int(((choice == 1) | (choice == 3)).sum())
            kept[1] += int(((choice == 2) | (choice == 3)).sum())
            kept[2] += int((choice == 3).sum())
            entries += len(choice)
            patterns.add(tuple(nearest.indices.flatten()[:64].tolist()))
        for number, expected in zip(kept, (density, density, density**2), strict=True):
            deviation = math.sqrt(expected * (1 - expected) / entries)
            self.assertLess(abs(number / entries - expected), 5 * deviation)
        self.assertEqual(len(patterns), len(first), "every module draws its own entries")
        # rescaling keeps the mean on true deltas; on factors cross terms remain however much is kept
        model.add_weighted_adapter(BOTH, [1.0, 1.0], "most", "dare_linear", density=0.9)
        self.assert_defect(distance(deltas(model, "most"), added(parts)), "dare acts on the factors")

    def test_rslora_results_are_too_large_by_the_root_of_the_rank_and_ours_are_exact(self) -> None:
        model = stock("llama", lora(use_rslora=True), lora(5, 6, use_rslora=True))
        parts = [deltas(model, name) for name in BOTH]
        model.add_weighted_adapter(BOTH, [1.0, 1.0], "cat", "cat")
        ratio = math.sqrt(sum(float(u.square().sum()) for u in deltas(model, "cat").values()))
        ratio /= math.sqrt(sum(float(u.square().sum()) for u in added(parts).values()))
        self.assert_defect(abs(ratio - 1), "rsLoRA results are too large")
        self.assertAlmostEqual(ratio, math.sqrt(4 + 5), places=4)
        factors = both(model)
        self.assertEqual({round(f.scale, 6) for f in factors[0].values()}, {round(8 / math.sqrt(4), 6)})
        composed = compose(factors, Recipe())
        self.assert_sum(composed, parts)
        # and again in stock PEFT, from disk: written as an ordinary adapter, whose scale is alpha / r
        base, directory = saved_model("llama"), temporary_directory()
        adapter_files.save(directory, composed, base)
        self.assertFalse(other_tools.read(directory)["use_rslora"])
        plain = PeftModel.from_pretrained(fresh("llama"), str(directory))
        self.assertLess(relative(logits(plain), by_hand("llama", *parts)), ROUNDING)

    def test_dora_magnitudes_are_dropped_and_ours_refuse_dora(self) -> None:
        model = stock("llama", lora(use_dora=True))
        with torch.no_grad():
            for layer in peft_model.lora_layers(model, DOMAIN).values():
                layer.lora_magnitude_vector[DOMAIN].weight.mul_(1.5)
        alone = logits(model)
        model.add_weighted_adapter([DOMAIN], [1.0], "copy", "cat")
        model.set_adapter("copy")
        self.assert_defect(relative(logits(model), alone), "DoRA at weight 1 is not itself")
        with self.assertRaisesRegex(ArtefactError, "use_dora is set: DoRA rescales the whole weight"):
            loaded(model, DOMAIN)

    def test_lora_bias_is_dropped_and_ours_refuse_it(self) -> None:
        model = stock("llama", lora(lora_bias=True))
        with torch.no_grad():
            for layer in peft_model.lora_layers(model, DOMAIN).values():
                layer.lora_B[DOMAIN].bias.fill_(0.5)
        alone = logits(model)
        model.add_weighted_adapter([DOMAIN], [1.0], "copy", "cat")
        model.set_adapter("copy")
        self.assert_defect(relative(logits(model), alone), "lora_bias at weight 1 is not itself")
        with self.assertRaisesRegex(ArtefactError, "lora_bias is set: the bias of B is not part of a low-rank update"):
            loaded(model, DOMAIN)

    def test_layers_and_exclusions_of_the_first_adapter_drop_deltas_of_the_second(self) -> None:
        for limit in ({"layers_to_transform": [0]}, {"exclude_modules": ["v_proj"]}):
            with self.subTest(limit):
                model = stock("llama", lora(**limit), lora(3, 5))
                parts = [deltas(model, name) for name in BOTH]
                self.assertLess(set(parts[0]), set(parts[1]))
                model.add_weighted_adapter(BOTH, [1.0, 1.0], "cat", "cat")
                self.assertEqual(set(deltas(model, "cat")), set(parts[0]))
                self.assert_defect(distance(deltas(model, "cat"), added(parts)), f"{limit} of the first drops deltas")
                composed = compose(both(model), Recipe())
                self.assertEqual(set(composed), set(parts[1]))
                self.assert_sum(composed, parts)
                self.assertLess(relative(ours("llama", composed), by_hand("llama", *parts)), ROUNDING)

    def test_an_existing_name_returns_without_doing_anything_and_ours_replaces_it(self) -> None:
        model = stock("llama", lora(), lora(3, 5))
        parts = [deltas(model, name) for name in BOTH]
        model.add_weighted_adapter(BOTH, [1.0, 1.0], "sum", "cat")
        self.assertIsNone(model.add_weighted_adapter(BOTH, [0.5, 2.0], "sum", "cat"))
        self.assert_defect(distance(deltas(model, "sum"), added(parts, [0.5, 2.0])), "a second call does nothing")
        factors = both(model)
        mine = peft_model.add(fresh("llama"), "sum", compose(factors, Recipe()))
        mine = peft_model.add(mine, "sum", compose(factors, Recipe(weights=(0.5, 2.0))))
        peft_model.activate(mine, ["sum"])
        self.assertLess(distance(deltas(mine, "sum"), added(parts, [0.5, 2.0])), ROUNDING)
        self.assertLess(relative(logits(mine), by_hand("llama", added(parts, [0.5, 2.0]))), ROUNDING)

    def test_too_few_weights_drop_an_adapter_and_ours_refuse_them(self) -> None:
        model = stock("llama", lora(), lora(3, 5))
        model.add_weighted_adapter(BOTH, [1.0], "few", "cat")
        self.assert_defect(
            distance(deltas(model, "few"), added([deltas(model, n) for n in BOTH])), "too few weights are accepted"
        )
        self.assertLess(distance(deltas(model, "few"), deltas(model, DOMAIN)), ROUNDING, "the task adapter is gone")
        factors = both(model)
        for weights in ((1.0,), (1.0, 1.0, 1.0)):
            for method, each in (("sum", 1), ("ties", 1), ("dare", 1), ("depth_gate", 2), ("per_layer", 2)):
                with self.assertRaisesRegex(
                    ValueError, f"{method} of 2 adapters takes {2 * each} weights, got {len(weights)}"
                ):
                    compose(factors, Recipe(method, weights))

    def test_a_missing_density_leaves_a_half_built_adapter_and_ours_always_has_one(self) -> None:
        model = stock("llama", lora(), lora(4, 6))
        with self.assertRaises(TypeError):
            model.add_weighted_adapter(BOTH, [1.0, 1.0], "ties", "ties")
        self.assertIn(
            "ties", model.peft_config, "PEFT no longer has this defect: a failed call leaves an adapter behind"
        )
        model.add_weighted_adapter(BOTH, [1.0, 1.0], "ties", "ties", density=0.5)  # the mended call does nothing
        self.assertEqual({float(update.norm()) for update in deltas(model, "ties").values()}, {0.0})
        factors = both(model)
        self.assertEqual((Recipe("ties").density, recipe_of(ComposeSection(), 0).density), (0.5, 0.5))
        self.assertTrue(all(float(delta(f).norm()) > 0 for f in compose(factors, Recipe("ties")).values()))
        # whatever is composed, or fails to be, leaves its inputs as they were, and no model is touched
        before = copy.deepcopy(factors)
        for method in METHODS:
            compose(factors, Recipe(method))
        with self.assertRaisesRegex(ValueError, "unequal ranks"):
            compose([factors[0], loaded(stock("llama", lora(3)), DOMAIN)], Recipe("factor_sum"))
        for part, old in zip(factors, before, strict=True):
            for module, f in old.items():
                self.assertTrue(torch.equal(part[module].a_rI, f.a_rI) and torch.equal(part[module].b_Or, f.b_Or))


class ChangedBase(Defects):
    def test_pissa_and_olora_change_the_base_under_the_other_adapter_and_ours_refuse_them(self) -> None:
        for kind in ("pissa", "pissa_niter_4", "olora"):
            with self.subTest(kind):
                model = get_peft_model(fresh("llama"), lora(), adapter_name=DOMAIN)
                trained(model)
                alone = logits(model)
                model.add_adapter(TASK, lora(init_lora_weights=kind))
                model.set_adapter(DOMAIN)
                self.assert_defect(relative(logits(model), alone), f"{kind} changes the base of the other adapter")
                with self.assertRaisesRegex(ArtefactError, "its initialisation changed the base") as caught:
                    loaded(model, TASK)
                self.assertIn("path_initial_model_for_weight_conversion", str(caught.exception))

    def test_a_converted_pissa_adapter_is_composed_exactly_on_the_original_base(self) -> None:
        for kind in ("pissa", "olora"):
            with self.subTest(kind):
                model = get_peft_model(fresh("llama"), lora(init_lora_weights=kind))
                start, directory = temporary_directory(), temporary_directory()
                model.peft_config["default"].init_lora_weights = True  # PEFT's recipe for the first state
                model.save_pretrained(start)
                model.peft_config["default"].init_lora_weights = kind
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if "lora_" in name:
                            parameter.mul_(1.5)
                model.save_pretrained(directory, path_initial_model_for_weight_conversion=str(start))
                factors = adapter_files.load(directory)
                self.assertEqual({f.rank for f in factors.values()}, {2 * 4})
                composed = compose([factors], Recipe())
                self.assertGreater(relative(logits(model), logits(fresh("llama"))), WRONG)
                self.assertLess(relative(ours("llama", composed), logits(model)), ROUNDING)


class Experts(Defects):
    """Fused experts of the tiny MiniMax-M2. The truth is PEFT's own merge of one adapter alone into the base."""

    # domain, task, and whether PEFT allows both on one model at all
    CASES = (
        (
            "attention only, and experts",
            lora(4, 8, ("q_proj", "o_proj")),
            lora(2, 6, (), target_parameters=[GATE_UP, DOWN]),
            True,
        ),
        (
            "experts of different ranks",
            lora(3, 5, ("q_proj",), target_parameters=[GATE_UP, DOWN]),
            lora(2, 6, ("v_proj",), target_parameters=[GATE_UP, DOWN]),
            True,
        ),
        (
            "only down_proj, and both",
            lora(3, 5, (), target_parameters=[DOWN]),
            lora(2, 6, (), target_parameters=[DOWN, GATE_UP]),
            False,
        ),
    )

    def test_experts_are_refused_by_peft_and_composed_exactly_by_ours(self) -> None:
        for what, domain, task, together in self.CASES:
            with self.subTest(what):
                self.assert_peft_refuses(domain, task, together)
                truths, parts = [], []
                for config in (domain, task):
                    model = stock("minimax_m2", config)
                    parts.append(loaded(model, DOMAIN))
                    truths.append(merged_by_peft(model))
                for part, truth in zip(parts, truths, strict=True):
                    self.assertEqual(set(part), set(truth))
                    self.assertLess(distance(dense(part), truth), ROUNDING)
                for weights in ((1.0, 1.0), (0.6, -0.8)):
                    composed = compose(parts, Recipe(weights=weights))
                    self.assert_sum(composed, truths, weights)
                    self.assertEqual(check(composed, weighted(parts, Recipe(weights=weights)), exact=True).problems, ())
                    expected = by_hand("minimax_m2", added(truths, weights))
                    self.assertGreater(relative(expected, logits(fresh("minimax_m2"))), WRONG)
                    self.assertLess(relative(ours("minimax_m2", composed), expected), ROUNDING)
                    model = inference_layers.attach(fresh("minimax_m2"), dict(zip(BOTH, parts, strict=True)))
                    inference_layers.select(model, dict(zip(BOTH, weights, strict=True)))
                    self.assertLess(relative(logits(model), expected), ROUNDING)

    def assert_peft_refuses(self, domain: LoraConfig, task: LoraConfig, together: bool) -> None:
        if not together:
            with self.assertRaisesRegex(ValueError, "all adapters must target the same set"):
                stock("minimax_m2", copy.deepcopy(domain), copy.deepcopy(task))
            return
        model = stock("minimax_m2", copy.deepcopy(domain), copy.deepcopy(task))
        for kind in ("cat", "svd", "linear"):
            with self.assertRaisesRegex(ValueError, "does not support targeting nn.Parameter"):
                model.add_weighted_adapter(BOTH, [1.0, 1.0], "sum", kind)

    def test_a_composed_expert_adapter_is_one_that_stock_peft_loads(self) -> None:
        base = saved_model("minimax_m2")
        for what, *configs, _ in self.CASES:
            with self.subTest(what):
                models = [stock("minimax_m2", config) for config in configs]
                composed = compose([loaded(model, DOMAIN, base) for model in models], Recipe())
                directory = temporary_directory()
                adapter_files.save(directory, composed, base)
                plain = PeftModel.from_pretrained(fresh("minimax_m2"), str(directory))
                expected = by_hand("minimax_m2", *map(merged_by_peft, models))
                self.assertLess(relative(logits(plain), expected), ROUNDING)


class Switching(Defects):
    def test_merging_one_of_two_active_adapters_drops_the_other_and_ours_selects_any_subset(self) -> None:
        for architecture in ARCHITECTURES:
            with self.subTest(architecture):
                model = stock(architecture, lora(), lora(3, 5))
                parts = {name: deltas(model, name) for name in BOTH}
                factors = dict(zip(BOTH, both(model), strict=True))
                expected = by_hand(architecture, *parts.values())
                model.base_model.set_adapter(BOTH)
                self.assertLess(relative(logits(model), expected), ROUNDING)
                model.merge_adapter([DOMAIN])
                self.assert_defect(relative(logits(model), expected), "merging one active adapter drops the other")
                self.assertLess(relative(logits(model), by_hand(architecture, parts[DOMAIN])), ROUNDING)
                mine = inference_layers.attach(fresh(architecture), factors)
                for names in ([DOMAIN], BOTH, [TASK], [], BOTH):
                    inference_layers.select(mine, dict.fromkeys(names, 1.0))
                    wanted = by_hand(architecture, *(parts[name] for name in names))
                    self.assertLess(relative(logits(mine), wanted), ROUNDING, names)

    def test_hotswapping_experts_of_another_rank_is_wrong_and_ours_selects_them_exactly(self) -> None:
        configs = [lora(rank, 6, ("q_proj",), target_parameters=[GATE_UP, DOWN]) for rank in (3, 2)]
        models = [stock("minimax_m2", config) for config in configs]
        truths = [merged_by_peft(model) for model in models]
        factors = {name: loaded(model, DOMAIN) for name, model in zip(BOTH, models, strict=True)}
        directory = temporary_directory()
        models[1].save_pretrained(directory)
        running, expected = stock("minimax_m2", lora(3, 6, ("q_proj",), target_parameters=[GATE_UP, DOWN])), by_hand(
            "minimax_m2", truths[1]
        )
        self.assertLess(relative(logits(running), by_hand("minimax_m2", truths[0])), ROUNDING)
        hotswap_adapter(running, str(directory / DOMAIN), adapter_name=DOMAIN)
        self.assert_defect(relative(logits(running), expected), "hotswapping experts of another rank is wrong")
        mine = inference_layers.attach(fresh("minimax_m2"), factors)
        for at, name in enumerate(BOTH):
            inference_layers.select(mine, {name: 1.0})
            self.assertLess(relative(logits(mine), by_hand("minimax_m2", truths[at])), ROUNDING)


class Rewriting(Defects):
    """B A = (B Q)(Q^T A) for any rotation Q: the same adapter, so every method has to give the same result."""

    @classmethod
    def setUpClass(cls) -> None:
        base = saved_model("minimax_m2")
        configs = [lora(4, alpha, ("q_proj", "v_proj"), target_parameters=[GATE_UP, DOWN]) for alpha in (8, 6)]
        cls.parts = [loaded(stock("minimax_m2", configs[0]), DOMAIN, base)]
        other = stock("minimax_m2", configs[1])
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if "lora_" in name:
                    parameter.copy_(parameter.flatten().roll(11).view_as(parameter))
        cls.parts.append(loaded(other, DOMAIN, base))
        cls.rewritten = [rotated(cls.parts[0], 5), cls.parts[1]]

    def test_the_rewritten_adapter_is_another_spelling_of_the_same(self) -> None:
        for name, f in self.parts[0].items():
            self.assertGreater(relative(self.rewritten[0][name].a_rI, f.a_rI), WRONG)
            self.assertLess(relative(delta(self.rewritten[0][name]), delta(f)), ROUNDING)
        self.assertTrue(any(f.is_experts for f in self.parts[0].values()))

    def test_rewriting_an_adapter_changes_no_result_but_that_of_factor_sum(self) -> None:
        for recipe in self.recipes():
            one, other = compose(self.parts, recipe), compose(self.rewritten, recipe)
            for experts in (False, True):
                found, expected = (
                    {n: u for n, u in dense(c).items() if (u.ndim == 3) == experts} for c in (other, one)
                )
                with self.subTest(recipe.method, rank=recipe.rank, experts=experts):
                    change = distance(found, expected)
                    if recipe.method == "factor_sum":
                        self.assertGreater(change, 0.5, "the exception is no longer one")
                    else:
                        self.assertLess(change, 1e-4)

    def test_rewriting_changes_pefts_linear_and_ties(self) -> None:
        plain = [{n: f for n, f in part.items() if not f.is_experts} for part in self.parts]
        spelled = [{n: f for n, f in self.rewritten[0].items() if not f.is_experts}, plain[1]]
        for kind in ("linear", "ties"):
            results = []
            for parts in (plain, spelled):
                model = peft_model.add(peft_model.add(fresh("minimax_m2"), DOMAIN, parts[0]), TASK, parts[1])
                model.add_weighted_adapter(BOTH, [1.0, 1.0], "sum", kind, density=0.5)
                results.append(deltas(model, "sum"))
            self.assert_defect(distance(results[1], results[0]), f"{kind} depends on how an adapter is written")

    def test_a_scale_may_sit_in_either_factor_or_beside_them(self) -> None:
        parts = [
            {n: ModuleFactors(f.a_rI, 0.5 * f.b_Or, 2.0 * f.scale) for n, f in part.items()} for part in self.parts
        ]
        for recipe in self.recipes():
            if recipe.method != "factor_sum":
                with self.subTest(recipe.method, rank=recipe.rank):
                    change = distance(dense(compose(parts, recipe)), dense(compose(self.parts, recipe)))
                    self.assertLess(change, 1e-4)

    def recipes(self) -> list[Recipe]:
        """Every row of the registry, at the full rank and, where the rank is a choice, truncated below it."""
        weights = (0.9, 0.7, 1.2, -0.8)
        return [
            Recipe(method, weights[: 2 * row.numbers(2)], rank=rank, density=0.4, seed=3)
            for method, row in METHODS.items()
            for rank in ((0,) if row.exact else (0, 3))
        ]


def rotated(factors: Factors, seed: int) -> dict[str, ModuleFactors]:
    """(B Q, Q^T A) with a rotation Q of its own for each module and each expert."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, f in factors.items():
        square = torch.randn(*f.a_rI.shape[:-2], f.rank, f.rank, generator=generator, dtype=torch.float64)
        q, _ = torch.linalg.qr(square)
        found[name] = ModuleFactors((q.mT @ f.a_rI.double()).float(), (f.b_Or.double() @ q).float(), f.scale)
    return found


@torch.no_grad()
def merged_by_peft(model: PeftModel) -> Dense:
    """What PEFT's merge of its one adapter changes in the base's weights."""
    merged = copy.deepcopy(model).merge_and_unload()
    before = dict(fresh("minimax_m2").named_parameters())
    changes = {name: parameter.double() - before[name].double() for name, parameter in merged.named_parameters()}
    return {name.removesuffix(".weight"): change for name, change in changes.items() if change.any()}


def largest(update: torch.Tensor, density: float) -> torch.Tensor:
    """The largest share of the entries, by sorting."""
    keep = round(density * update.numel())
    order = update.abs().flatten().argsort(descending=True)
    kept = torch.zeros(update.numel(), dtype=update.dtype)
    kept[order[:keep]] = update.flatten()[order[:keep]]
    return kept.view_as(update)


def ties(updates: Sequence[torch.Tensor], density: float) -> torch.Tensor:
    """TIES as published: trim each, elect each entry's sign by total mass, mean of those with the elected sign."""
    trimmed = [largest(update, density) for update in updates]
    positive = sum(t.clamp(min=0) for t in trimmed)
    negative = sum((-t).clamp(min=0) for t in trimmed)
    total, count = torch.zeros_like(updates[0]), torch.zeros_like(updates[0])
    for t in trimmed:
        agrees = torch.where(positive > negative, t > 0, t < 0)
        total += torch.where(agrees, t, torch.zeros_like(t))
        count += agrees
    return torch.where(count > 0, total / count.clamp(min=1), torch.zeros_like(total))


if __name__ == "__main__":
    unittest.main()
