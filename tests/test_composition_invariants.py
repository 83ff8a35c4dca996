"""Composed = all parts active = merged = reloaded, in float32, for every exact method, on every kind of target.

Adapters are drawn by hypothesis: ranks, alphas and weights, zero and negative ones too. Every token visits every
expert (top-k of all), because a routing flip by rounding would be a difference of another kind.
"""

from __future__ import annotations

import unittest
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from config import ALL_LINEAR_LLAMA, ATTENTION, BaseModelSection
from tests.support import (
    ARCHITECTURES,
    FUSED,
    expert_factors,
    random_factors,
    relative,
    saved_model,
    temporary_directory,
)
from utils import logger
from utils.adapters import adapter_files, inference_layers, peft_model
from utils.adapters.factors import Factors, delta, scaled
from utils.composition.checks import check
from utils.composition.methods import METHODS, Recipe, compose, depth, weights_at
from utils.export import merge, merge_plan
from utils.models import sources

IDS = torch.randint(8, 700, (2, 16), generator=torch.Generator().manual_seed(3))
EXACT = [name for name, method in METHODS.items() if method.exact]
LAYERS = 2
SAME = 1e-5
WEIGHTS = st.floats(-1.5, 1.5, width=32).map(lambda weight: 0.0 if abs(weight) < 0.05 else round(weight, 3))
# architecture, then the targets of the first and of the second adapter
KINDS = {
    "llama": ("llama", ALL_LINEAR_LLAMA, ("q_proj", "o_proj", "down_proj")),
    "attention": ("minimax_m2", ATTENTION, ("q_proj", "v_proj")),
    "experts": ("minimax_m2", ("gate_up_proj", "down_proj"), ("gate_up_proj", "down_proj")),
    "mixed": ("minimax_m2", ATTENTION, ("q_proj", "o_proj", "gate_up_proj", "down_proj")),
}


def fresh(architecture: str) -> torch.nn.Module:
    return all_experts(ARCHITECTURES[architecture]()[0].eval())


def all_experts(model: Any) -> Any:
    for module in model.modules():
        if type(module).__name__ == "MiniMaxM2TopKRouter":
            module.top_k = module.num_experts
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).logits


def part(model: torch.nn.Module, targets: Sequence[str], rank: int, alpha: float, seed: int) -> Factors:
    return {
        **random_factors(model, targets, rank, alpha, seed, 0.1),
        **expert_factors(model, rank, alpha, seed, targets, 0.1),
    }


class Invariants(unittest.TestCase):
    def check_kind(self, kind: str, method: str, ranks: Any, alphas: Any, numbers: list[float]) -> None:
        architecture, *targets = KINDS[kind]
        model, base = fresh(architecture), saved_model(architecture)
        parts = [part(model, t, r, a, i) for i, (t, r, a) in enumerate(zip(targets, ranks, alphas, strict=True))]
        count = 2 * METHODS[method].numbers(LAYERS)
        recipe = Recipe(method, tuple((numbers * 4)[:count]))
        if not any(recipe.weights):
            return
        weighted = [
            {name: scaled(f, weights_at(name, recipe, 2, LAYERS)[i]) for name, f in own.items()}
            for i, own in enumerate(parts)
        ]
        self.assertEqual(depth(parts), LAYERS)
        with torch.no_grad():
            for own in weighted:
                for name, f in own.items():
                    weight = model.get_parameter(name) if f.is_experts else model.get_submodule(name).weight
                    weight += delta(f)
        expected = logits(model)
        composed = compose(parts, recipe)
        self.assertEqual(check(composed, weighted, exact=METHODS[recipe.method].exact).problems, ())
        found = {"composed": logits(peft_model.add(fresh(architecture), "composed", composed))}
        both = peft_model.add(fresh(architecture), "first", weighted[0])
        both = peft_model.add(both, "second", weighted[1])
        peft_model.activate(both, ["first", "second"])
        found["two active"] = logits(both)
        ours = inference_layers.attach(fresh(architecture), {"a": parts[0], "b": parts[1]})
        inference_layers.select(
            ours, lambda module: dict(zip("ab", weights_at(module, recipe, 2, LAYERS), strict=True))
        )
        found["selected"] = logits(ours)
        place = temporary_directory()
        adapter_files.save(place / "adapter", composed, base)
        found["reloaded adapter"] = logits(PeftModel.from_pretrained(fresh(architecture), str(place / "adapter")))
        (place / "merged").mkdir()
        merge.write(merge_plan.plan(base, composed, "base"), place / "merged", "card")
        with logger.quiet_transformers():
            merged = AutoModelForCausalLM.from_pretrained(place / "merged", dtype=torch.float32)
        found["merged, reloaded"] = logits(all_experts(merged))
        for name, other in found.items():
            self.assertLess(relative(other, expected), SAME, f"{kind} {recipe} {name}")


def _claim(kind: str) -> Any:
    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        method=st.sampled_from(EXACT),
        ranks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        alphas=st.tuples(st.floats(1, 16), st.floats(1, 16)),
        numbers=st.lists(WEIGHTS, min_size=2, max_size=4).filter(any),
    )
    def claim(self: Invariants, method: str, ranks: Any, alphas: Any, numbers: list[float]) -> None:
        self.check_kind(kind, method, ranks, alphas, numbers)

    return claim


for _kind in KINDS:
    setattr(Invariants, f"test_every_way_to_use_a_composition_is_the_same_model_on_{_kind}", _claim(_kind))


class OtherExperts(unittest.TestCase):
    """The other fused architectures that the README names."""

    def test_qwen3_moe_and_mixtral_are_composed_merged_and_exported_expert_by_expert(self) -> None:
        shape = {
            **{"vocab_size": 768, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4},
            **{"num_key_value_heads": 2, "max_position_embeddings": 256, "num_experts_per_tok": 4},
        }
        made = {
            "qwen3_moe": Qwen3MoeConfig(
                **shape, head_dim=16, intermediate_size=96, moe_intermediate_size=48, num_experts=4
            ),
            "mixtral": MixtralConfig(**shape, intermediate_size=48, num_local_experts=4),
        }
        for name, settings_ in made.items():
            with self.subTest(name), logger.quiet_transformers():
                torch.manual_seed(0)
                place = temporary_directory()
                model = AutoModelForCausalLM.from_config(settings_).eval()
                model.save_pretrained(place / "base")
                base = sources.fetch(BaseModelSection(source=str(place / "base")), place)
                parts = [
                    part(model, ("q_proj", *FUSED), 2, 4.0, 1),
                    expert_factors(model, 3, 5.0, 2, size=0.1),
                ]
                composed = compose(parts, Recipe(weights=(0.7, -1.2)))
                expected = self.load(place / "base")
                with torch.no_grad():
                    for own, weight in zip(parts, (0.7, -1.2), strict=True):
                        for module, f in own.items():
                            held = expected.get_parameter(module) if f.is_experts else None
                            held = expected.get_submodule(module).weight if held is None else held
                            held += weight * delta(f)
                (place / "merged").mkdir()
                merge.write(merge_plan.plan(base, composed, "base"), place / "merged", "card")
                adapter_files.save(place / "adapter", composed, base)
                adapter_files.save_per_expert(place / "per_expert", composed, base)
                for saved in ("adapter", "per_expert"):
                    adapter_files.load(place / saved, base)
                found = {
                    "merged": self.load(place / "merged"),
                    "ours": inference_layers.attach(self.load(place / "base"), {"composed": composed}),
                    **{
                        saved: PeftModel.from_pretrained(self.load(place / "base"), str(place / saved))
                        for saved in ("adapter", "per_expert")
                    },
                }
                for way, other in found.items():
                    self.assertLess(relative(logits(other), logits(expected)), SAME, way)

    @staticmethod
    def load(directory: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


if __name__ == "__main__":
    unittest.main()
