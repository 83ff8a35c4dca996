"""Layers are found in the model, whatever its lists are called; a composed adapter has one rank for every reader."""

from __future__ import annotations

import json
import unittest
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import scripts.compose
from config import BaseModelSection
from tests import odd_architecture
from tests.support import (
    PRESET,
    expert_factors,
    plain_tokenizer,
    random_factors,
    relative,
    temporary_directory,
)
from utils import cli, logger
from utils.adapters import adapter_files, peft_model
from utils.adapters.factors import Factors, ModuleFactors, delta
from utils.artifacts import files
from utils.composition import composed_adapter, methods
from utils.exceptions import VerificationError
from utils.models import loading, sources
from utils.models.base_model import BaseModel
from utils.models.structure import layer_kinds, model_class
from utils.models.weights import layer_sample, tensor_names
from utils.models.weights.safetensors_io import Checkpoint

SHAPE = {"vocab_size": 768, "hidden_size": 32, "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 1}


def saved(model: torch.nn.Module) -> BaseModel:
    directory = temporary_directory() / "base"
    with logger.quiet_transformers():
        model.save_pretrained(directory)
        plain_tokenizer().save_pretrained(directory)
    return sources.fetch(BaseModelSection(source=str(directory), dtype="float32"), directory.parent)


def falcon(layers: int = 3) -> FalconForCausalLM:
    torch.manual_seed(5)
    return FalconForCausalLM(FalconConfig(**SHAPE, num_hidden_layers=layers))


def bloom() -> BloomForCausalLM:
    """Its config.json counts layers as n_layer."""
    torch.manual_seed(5)
    return BloomForCausalLM(BloomConfig(vocab_size=768, hidden_size=32, n_layer=3, n_head=4, eos_token_id=1))


def composed(base: BaseModel, parts: list[Factors], *flags: str) -> Path:
    """`scripts/compose.py` on these adapters, as folders of another tool; the adapter that it made."""
    root = temporary_directory()
    for name, factors in zip(("first", "second"), parts, strict=True):
        adapter_files.save(root / name, factors, base)
    given = ["--base.source", str(base.directory), "--base.dtype", "float32", "--run.models_dir", str(root / "models")]
    given += ["--domain_adapter", str(root / "first"), "--task_adapter", str(root / "second")]
    config = cli.resolve(["--preset", PRESET, *given, "--run.data_dir", str(root / "data"), *flags], {})
    return Path(scripts.compose.main(config)["adapter"])


class Layers(unittest.TestCase):
    def test_layers_of_a_list_with_another_name_get_the_weights_that_were_asked_for(self) -> None:
        weights = {0: (0.2, 1.5), 1: (0.6, 1.0), 2: (1.0, 0.5)}
        for model, *flags in (
            (falcon(), "--compose.method", "depth_gate", "--weights", "0.2,1.0,1.5,0.5"),
            (falcon(), "--compose.method", "per_layer", "--weights", "0.2,0.6,1.0,1.5,1.0,0.5"),
            (bloom(), "--compose.method", "depth_gate", "--weights", "0.2,1.0,1.5,0.5"),
        ):
            base = saved(model)
            parts = [
                random_factors(model, ("query_key_value", "dense_h_to_4h"), 4, 8, 1),
                random_factors(model, ("query_key_value",), 4, 4, 2),
            ]
            found = adapter_files.load(composed(base, parts, *flags), base)
            for place, layer in enumerate(model.transformer.h):  # by the model's own list
                for name in (f"transformer.h.{place}.{n}" for n, _ in layer.named_modules()):
                    if name in parts[0]:
                        expected = weights[place][0] * delta(parts[0][name])
                        if name in parts[1]:
                            expected = expected + weights[place][1] * delta(parts[1][name])
                        self.assertLess(relative(delta(found[name]), expected), 1e-6, name)
        self.assertEqual(len(found), 6)

    def test_the_check_on_the_model_does_not_share_the_rule_that_names_are_read_by(self) -> None:
        model = falcon()
        base = saved(model)
        parts = [random_factors(model, ("query_key_value",), 4, 8, seed) for seed in (1, 2)]
        # as it was: nothing is in a layer, so all of it is in the last one
        with (
            mock.patch.object(methods, "layer_of", return_value=None),
            mock.patch.object(methods, "depth", return_value=3),
            self.assertRaisesRegex(VerificationError, "all adapters active and the composed one differ"),
        ):
            composed(base, parts, "--compose.method", "depth_gate", "--weights", "0.2,1.0,1.5,0.5")

    def test_the_decoders_list_is_told_from_experts_towers_and_appended_layers(self) -> None:
        experts = [f"net.blocks.{i}.mlp.experts.{e}.w{w}" for i in range(3) for e in range(4) for w in range(3)]
        tower = [f"visual.blocks.{i}.part{p}" for i in range(3) for p in range(40)]
        appended = [*experts, "net.blocks.3.draft.weight", "embed.weight"]
        for names, count, path in (
            ([*experts, *tower], 3, "net.blocks"),
            (appended, 3, "net.blocks"),
            ([f"h.{i}.attn.c_attn.weight" for i in range(2)], 2, "h"),
        ):
            self.assertEqual(tensor_names.decoder_list(names, count), path)
        self.assertEqual(tensor_names.number_in("net.blocks", "net.blocks.2.mlp.experts.0.w1"), 2)
        self.assertIsNone(tensor_names.number_in("net.blocks", "net.blocks_norm.2"))
        with self.assertRaisesRegex(Exception, "numbered lists has its 5 layers"):
            tensor_names.decoder_list(experts, 5)

    def test_layers_in_several_lists_compose_and_are_not_weighed_by_their_number(self) -> None:
        odd_architecture.register()
        for houses, floors, street in (([2, 2], 4, True), ([2, 2], 2, False)):
            torch.manual_seed(2)
            config = odd_architecture.OddConfig(
                vocab_size=768, floors=floors, houses=houses, street=street, eos_token_id=1
            )
            model = odd_architecture.OddForCausalLM(config)
            base = saved(model)
            parts = [random_factors(model, ("wqkv",), 4, 8, seed) for seed in (1, 2)]
            self.assertEqual(len(adapter_files.load(composed(base, parts), base)), 4)
            with self.assertRaisesRegex(VerificationError, "per_layer weighs layers, .*does not hold 4 modules"):
                composed(base, parts, "--compose.method", "per_layer", "--weights", "1,2,3,4")

    def test_a_model_without_sdpa_composes_with_eager_attention_asked_for_or_not(self) -> None:
        model = Gemma2ForCausalLM(
            Gemma2Config(**SHAPE, head_dim=8, num_hidden_layers=2, num_key_value_heads=2, intermediate_size=48)
        )
        base = saved(model)
        self.assertFalse(type(model)._supports_sdpa)
        parts = [random_factors(model, ("q_proj",), 4, 8, seed) for seed in (1, 2)]
        for flags in ((), ("--base.attention", "eager")):
            self.assertEqual(len(adapter_files.load(composed(base, parts, *flags), base)), 2)

    def test_kinds_of_layers_are_told_by_what_they_do(self) -> None:
        odd_architecture.register()

        def kinds(config: Any) -> list[Any]:
            return layer_kinds.layer_kinds(model_class.without_values(config), config.num_hidden_layers)

        neo = GPTNeoConfig(num_layers=4, attention_types=[[["global", "local"], 2]], hidden_size=32, num_heads=4)
        first, second, *rest = kinds(neo)
        self.assertNotEqual(first, second)
        self.assertEqual(rest, [first, second])
        self.assertEqual(
            len(set(kinds(FalconConfig(**SHAPE, num_hidden_layers=3)))), 1, "the number of a layer is none"
        )
        self.assertEqual(kinds(odd_architecture.OddConfig(floors=4, houses=[2, 2], street=True)), [])

    def test_settings_of_a_sample_are_cut_where_they_have_an_entry_per_layer_and_only_there(self) -> None:
        small = temporary_directory()
        window = {"sliding_window": 8, "head_dim": 8, "num_hidden_layers": 4, "intermediate_size": 64}
        model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, **window))
        base = saved(model)
        settings = json.loads((base.directory / "config.json").read_text())
        del settings["layer_types"]  # as files of 2024 have it
        (base.directory / "config.json").write_text(json.dumps(settings))
        layer_sample.write(Checkpoint(base.directory), [1, 3], small / "gemma2")
        written = json.loads((small / "gemma2" / "config.json").read_text())
        self.assertEqual(written["layer_types"], ["full_attention"] * 2)
        scan = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "vocab_size": 768}
        base = saved(Mamba2ForCausalLM(Mamba2Config(**scan, num_hidden_layers=2, eos_token_id=1)))
        layer_sample.write(Checkpoint(base.directory), [0], small / "mamba2")
        self.assertEqual(len(json.loads((small / "mamba2" / "config.json").read_text())["time_step_limit"]), 2)

    def test_a_sample_of_layers_of_another_name_is_that_model_with_those_layers(self) -> None:
        torch.manual_seed(3)
        shape = {"vocab_size": 768, "hidden_size": 32, "num_heads": 4, "window_size": 8, "intermediate_size": 64}
        settings = GPTNeoConfig(**shape, num_layers=4, attention_types=[[["global", "local"], 2]], eos_token_id=1)
        model = GPTNeoForCausalLM(settings).eval()
        base, small = saved(model), temporary_directory() / "small"
        layer_sample.write(Checkpoint(base.directory), [0, 1], small)
        section = BaseModelSection(source=str(small), dtype="float32", attention="eager")
        sampled = loading.load_model(replace(base, directory=small), section)
        ids = torch.arange(12)[None]
        model.transformer.h = model.transformer.h[:2]
        with torch.no_grad():
            self.assertLess(relative(sampled(ids).logits, model(ids).logits), 1e-6)


class Effects(unittest.TestCase):
    def test_a_small_effect_is_composed_and_none_is_refused_with_what_it_takes(self) -> None:
        """In float32 rounding moves a logit by 1e-6 of the largest; a merge refuses below 1e-4, and so does this."""
        model = falcon(2)
        base = saved(model)

        def effect(size: float) -> float:
            parts = [random_factors(model, ("query_key_value",), 2, 4, seed, size) for seed in (1, 2)]
            return files.read_json(composed(base, parts).parent / "manifest.json")["measured"]["composed_to_base"]

        size = 0.03
        size *= (4e-4 / effect(size)) ** 0.5  # an update grows with its square
        self.assertLess(abs(effect(size) - 4e-4), 1e-4)
        with self.assertRaisesRegex(VerificationError, "does not change the model(.|\n)*it takes 0.0001: train longer"):
            effect(size / 5)


class Experts(unittest.TestCase):
    def test_experts_that_are_one_tensor_on_disk_are_composed_without_names_of_single_ones(self) -> None:
        torch.manual_seed(6)
        sizes = {"num_hidden_layers": 2, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 3}
        base = saved(GraniteMoeForCausalLM(GraniteMoeConfig(**SHAPE, **sizes, num_experts_per_tok=2)))
        section = BaseModelSection(source=str(base.directory), dtype="float32")
        parts = [expert_factors(loading.load_model(base, section), 2, 4, seed) for seed in (1, 2)]
        self.assertEqual(len(parts[0]), 4)
        directory = composed(base, parts, "--weights", "0.6,1.3")
        self.assertEqual([path.name for path in directory.parent.glob("adapter*")], ["adapter"])
        found = adapter_files.load(directory, base)
        for name, f in found.items():
            expected = 0.6 * delta(parts[0][name]) + 1.3 * delta(parts[1][name])
            self.assertLess(relative(delta(f), expected), 1e-6)

    def test_routers_are_composed_like_any_other_module(self) -> None:
        torch.manual_seed(7)
        sizes = {"num_hidden_layers": 2, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 3}
        model = MixtralForCausalLM(MixtralConfig(**SHAPE, **sizes, num_experts_per_tok=2))
        base = saved(model)
        parts = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            routers = {f"model.layers.{n}.mlp.gate": (torch.randn(2, 32), torch.randn(3, 2)) for n in (0, 1)}
            routers = {name: ModuleFactors(a_rI, b_Or, 0.5) for name, (a_rI, b_Or) in routers.items()}
            parts.append({**random_factors(model, ("q_proj",), 3, 6, seed), **routers})
        found = adapter_files.load(composed(base, parts, "--weights", "0.6,1.3"), base)
        self.assertEqual(set(found), set(parts[0]))


class OneRank(unittest.TestCase):
    def test_a_composed_adapter_has_one_rank_and_one_scale_by_the_rules_of_every_reader(self) -> None:
        torch.manual_seed(4)
        sizes = {"num_hidden_layers": 2, "intermediate_size": 48, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, **sizes))
        base = saved(model)
        parts = [
            random_factors(model, ("q_proj", "v_proj"), 4, 8, 1),
            random_factors(model, ("q_proj", "k_proj", "down_proj"), 3, 5, 2),
        ]
        directory = composed(base, parts, "--weights", "1,0.5")
        settings = files.read_json(directory / "adapter_config.json")
        self.assertEqual((settings["r"], settings["rank_pattern"], settings["alpha_pattern"]), (7, {}, {}))
        state = load_file(directory / "adapter_model.safetensors")
        factors = methods.compose(parts, methods.Recipe(weights=(1.0, 0.5)))
        self.assertEqual(len(state), 2 * len(factors))
        for name, f in factors.items():
            a, b = (state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            # llama.cpp: one alpha over the tensor's own rank; vLLM: one alpha over the configuration's r
            for scale in (settings["lora_alpha"] / a.shape[0], settings["lora_alpha"] / settings["r"]):
                self.assertLess(relative(scale * b @ a, delta(f)), 1e-6)
        again = peft_model.add(model, "composed", adapter_files.load(directory, base))
        self.assertEqual(set(peft_model.lora_layers(again, "composed")), set(factors))

    def test_equal_ranks_stay_as_they_are(self) -> None:
        model = falcon(1)
        even = [random_factors(model, ("dense",), 2, 4, seed) for seed in (1, 2)]
        self.assertFalse(composed_adapter.ranks_differ(even))
        self.assertTrue(composed_adapter.ranks_differ([even[0], random_factors(model, ("query_key_value",), 3, 4, 3)]))


if __name__ == "__main__":
    unittest.main()
