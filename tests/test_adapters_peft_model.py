"""Adapters on toy Llama and MiniMax-M2: composed, stacked and merged are one model; damaged ones are refused."""

from __future__ import annotations

import json
import shutil
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from config import ATTENTION, LoraSection
from tests.support import ARCHITECTURES, random_factors, relative, saved_model, temporary_directory
from utils.adapters import adapter_config, adapter_files, peft_model
from utils.adapters.factors import Factors, delta
from utils.composition.methods import Recipe, compose
from utils.exceptions import ArtefactError

IDS = torch.randint(8, 700, (2, 24), generator=torch.Generator().manual_seed(3))
# of unequal rank and alpha, on different modules: what only works for equal ones is not exact
DOMAIN, TASK = (("q_proj", "k_proj", "v_proj", "o_proj"), 4, 8.0, 1), (("q_proj", "o_proj"), 3, 5.0, 2)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).logits


def fresh(architecture: str) -> torch.nn.Module:
    return ARCHITECTURES[architecture]()[0].eval()


def two(model: torch.nn.Module) -> list[Factors]:
    return [random_factors(model, *DOMAIN), random_factors(model, *TASK)]


def merged_by_hand(architecture: str, parts: list[Factors], weights: list[float]) -> torch.nn.Module:
    model = fresh(architecture)
    with torch.no_grad():
        for part, weight in zip(parts, weights, strict=True):
            for name, f in part.items():
                model.get_submodule(name).weight += weight * delta(f)
    return model


class EachArchitecture(unittest.TestCase):
    def for_each(self, check: Callable[[str], None]) -> None:
        for architecture in ARCHITECTURES:
            with self.subTest(architecture):
                check(architecture)

    def test_two_active_adapters_equal_composed_equal_merged_by_hand(self) -> None:
        def check(architecture: str) -> None:
            parts = two(fresh(architecture))
            model = peft_model.add(peft_model.add(fresh(architecture), "domain", parts[0]), "task", parts[1])
            peft_model.activate(model, ["domain", "task"])
            active = logits(model)
            composed = logits(peft_model.add(fresh(architecture), "composed", compose(parts, Recipe())))
            expected = logits(merged_by_hand(architecture, parts, [1.0, 1.0]))
            self.assertGreater(relative(logits(fresh(architecture)), expected), 0.1, "the adapters do nothing")
            self.assertLess(relative(active, expected), 1e-5)
            self.assertLess(relative(composed, expected), 1e-5)

        self.for_each(check)

    def test_weighted_composition_equals_merged_by_hand(self) -> None:
        def check(architecture: str) -> None:
            parts, weights = two(fresh(architecture)), [0.5, -0.7]
            composed = logits(
                peft_model.add(fresh(architecture), "composed", compose(parts, Recipe(weights=tuple(weights))))
            )
            self.assertLess(relative(composed, logits(merged_by_hand(architecture, parts, weights))), 1e-5)

        self.for_each(check)

    def test_saved_adapter_gives_the_same_logits_in_plain_peft(self) -> None:
        def check(architecture: str) -> None:
            composed = compose(two(fresh(architecture)), Recipe(weights=(1.0, 0.8)))  # two ranks in one adapter
            directory = temporary_directory()
            adapter_files.save(directory, composed, saved_model(architecture))
            plain = PeftModel.from_pretrained(fresh(architecture), str(directory))
            expected = logits(peft_model.add(fresh(architecture), "composed", composed))
            self.assertLess(relative(logits(plain), expected), 1e-6)
            again = adapter_files.load(directory)
            self.assertEqual({n: f.scale for n, f in again.items()}, {n: f.scale for n, f in composed.items()})
            self.assertTrue(all(torch.equal(again[n].a_rI, f.a_rI) for n, f in composed.items()))

        self.for_each(check)

    def test_training_a_task_adapter_changes_nothing_but_the_task_adapter(self) -> None:
        def check(architecture: str) -> None:
            model = peft_model.add(fresh(architecture), "domain", two(fresh(architecture))[0])
            model = peft_model.attach(model, "task", LoraSection(rank=2, target_modules=ATTENTION))
            peft_model.activate(model, ["domain", "task"], trainable="task")
            names = [n for n, p in model.named_parameters() if p.requires_grad]
            self.assertEqual(names, [n for n, _ in model.named_parameters() if ".task." in n])
            # A and B of four modules in two layers
            self.assertEqual(len(names), 2 * 4 * 2)
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            optimizer = torch.optim.AdamW(peft_model.trainable_parameters(model).values(), lr=0.1)
            for _ in range(2):
                model(IDS, labels=IDS, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
            self.assertEqual(changed, set(names))

        self.for_each(check)

    def test_fresh_adapter_does_not_change_the_output(self) -> None:
        def check(architecture: str) -> None:
            lora = LoraSection(rank=2, target_modules=ATTENTION)
            model = peft_model.attach(fresh(architecture), "domain", lora)
            self.assertTrue(torch.equal(logits(model), logits(fresh(architecture))))

        self.for_each(check)

    def test_no_active_adapter_is_the_base_and_one_active_is_that_one(self) -> None:
        def check(architecture: str) -> None:
            parts = two(fresh(architecture))
            model = peft_model.add(peft_model.add(fresh(architecture), "domain", parts[0]), "task", parts[1])
            peft_model.activate(model, [])
            self.assertTrue(torch.equal(logits(model), logits(fresh(architecture))))
            for at, name in enumerate(("domain", "task")):
                peft_model.activate(model, [name])
                self.assertLess(relative(logits(model), logits(merged_by_hand(architecture, [parts[at]], [1]))), 1e-5)

        self.for_each(check)

    def test_adapter_for_other_modules_or_more_layers_is_refused(self) -> None:
        def check(architecture: str) -> None:
            deeper = two(ARCHITECTURES[architecture](layers=3)[0])[0]
            foreign = {name.replace("q_proj", "query"): f for name, f in deeper.items() if "q_proj" in name}
            for factors in (deeper, foreign):
                with self.assertRaises(ArtefactError):
                    peft_model.add(fresh(architecture), "domain", factors)
            lora = LoraSection(rank=2, target_modules=("q_proj", "query_key_value"))
            with self.assertRaisesRegex(ArtefactError, "query_key_value: the base model has no such module"):
                peft_model.attach(fresh(architecture), "domain", lora)

        self.for_each(check)

    def test_adapter_on_some_layers_only_is_put_on_those_layers(self) -> None:
        def check(architecture: str) -> None:
            first = {n: f for n, f in two(fresh(architecture))[0].items() if ".0." in n}
            found = logits(peft_model.add(fresh(architecture), "domain", first))
            self.assertLess(relative(found, logits(merged_by_hand(architecture, [first], [1.0]))), 1e-5)

        self.for_each(check)


class Refused(unittest.TestCase):
    """Each case damages a copy of one good adapter, saved by PEFT itself."""

    good: Path

    @classmethod
    def setUpClass(cls) -> None:
        cls.good = temporary_directory()
        shape = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(fresh("llama"), shape).save_pretrained(cls.good)
        adapter_files.load(cls.good)

    def refused(
        self,
        reason: str,
        *,
        settings: dict[str, Any] | None = None,
        tensors: Callable[[dict[str, torch.Tensor]], object] | None = None,
    ) -> None:
        directory = temporary_directory() / "adapter"
        shutil.copytree(self.good, directory)
        if settings:
            path = directory / adapter_config.CONFIG
            path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        if tensors:
            state = load_file(directory / adapter_config.WEIGHTS)
            tensors(state)
            save_file(state, directory / adapter_config.WEIGHTS)
        with self.assertRaisesRegex(ArtefactError, reason):
            adapter_files.load(directory)

    def test_what_is_not_scale_times_b_times_a_is_refused(self) -> None:
        self.refused("use_dora is set", settings={"use_dora": True})
        self.refused("lora_bias is set", settings={"lora_bias": True})
        self.refused("peft_type is not LORA", settings={"peft_type": "LOHA"})
        for initialisation in ("pissa", "pissa_niter_16", "olora", "corda"):
            self.refused("initialisation changed the base", settings={"init_lora_weights": initialisation})

    def test_adapter_that_does_nothing_or_holds_nan_is_refused(self) -> None:
        def zero(state: dict[str, torch.Tensor]) -> None:
            for name in state:
                state[name] = state[name] * (0.0 if "lora_B" in name else 1.0)

        self.refused("every B .* is zero", tensors=zero)
        for value in (float("nan"), float("inf")):
            self.refused("NaN or infinity", tensors=lambda s, v=value: next(iter(s.values())).view(-1)[3:4].fill_(v))

    def test_missing_unknown_and_wrongly_shaped_tensors_are_refused(self) -> None:
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        self.refused("q_proj has A or B but not both", tensors=lambda s: s.pop(key))
        self.refused("unknown tensor", tensors=lambda s: s.update({"lm_head.weight": torch.ones(2)}))
        self.refused("has rank 4, its config says 8", settings={"r": 8})
        self.refused("q_proj has rank 4, its config says 2", settings={"rank_pattern": {"q_proj": 2}})
        self.refused("has rank 3", tensors=lambda s: s.update({key: s[key][:3].contiguous()}))
        self.refused("no LoRA tensors", tensors=lambda s: s.clear())

    def test_damaged_and_pickled_files_are_refused(self) -> None:
        directory = temporary_directory() / "adapter"
        shutil.copytree(self.good, directory)
        weights = directory / adapter_config.WEIGHTS
        for size in (0, 5, weights.stat().st_size // 2, weights.stat().st_size - 1):
            weights.write_bytes((self.good / adapter_config.WEIGHTS).read_bytes()[:size])
            with self.assertRaisesRegex(ArtefactError, "damaged"):
                adapter_files.load(directory)
        weights.rename(directory / "adapter_model.bin")
        with self.assertRaisesRegex(ArtefactError, "it needs adapter_config.json and adapter_model.safetensors"):
            adapter_files.load(directory)
        with self.assertRaisesRegex(ArtefactError, "no such directory"):
            adapter_files.load(directory / "missing")
        shutil.copyfile(self.good / adapter_config.WEIGHTS, weights)
        (directory / adapter_config.CONFIG).write_text('{"r": 4')
        with self.assertRaisesRegex(ArtefactError, "not valid JSON"):
            adapter_files.load(directory)


class LocalBase(unittest.TestCase):
    def test_base_directory_with_an_adapter_config_or_without_safetensors_is_refused(self) -> None:
        base = saved_model("llama")
        self.assertEqual(saved_model("llama").digest, base.digest, "the same weights have the same digest")
        self.assertNotEqual(saved_model("llama", seed=1).digest, base.digest)
        (base.directory / "adapter_config.json").write_text("{}")
        with self.assertRaisesRegex(ArtefactError, "contains adapter_config.json"):
            saved_model("llama", base.directory)
        with self.assertRaisesRegex(ArtefactError, "contains adapter_config.json"):
            saved_model("llama", base.directory)


if __name__ == "__main__":
    unittest.main()
