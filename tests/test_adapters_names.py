"""Adapters by whatever names they were saved, on models of many kinds: read as stock PEFT reads them, or refused."""

from __future__ import annotations

import functools
import json
import unittest
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

from config import AUTO, BaseModelSection, LoraSection
from tests import toy_architectures
from tests.support import relative, temporary_directory
from utils import cli
from utils.adapters import adapter_config, adapter_files, cards, inference_layers, own_modules, parent_runs, peft_model
from utils.adapters.factors import Factors, delta
from utils.composition.methods import Recipe, compose
from utils.exceptions import ArtefactError
from utils.models import loading, sources
from utils.models.base_model import BaseModel
from utils.models.structure import linear_modules, model_class
from utils.models.weights import tensor_names

State = dict[str, torch.Tensor]
CONFIG, WEIGHTS = adapter_config.CONFIG, adapter_config.WEIGHTS
IDS = torch.randint(8, 600, (2, 24), generator=torch.Generator().manual_seed(3))
ROUNDING, AN_EFFECT = 1e-5, 0.02


def setUpModule() -> None:
    unittest.enterModuleContext(warnings.catch_warnings())
    warnings.simplefilter("ignore")


@functools.cache
def base_of(name: str) -> BaseModel:
    directory = toy_architectures.build(name, temporary_directory() / name)
    return sources.fetch(BaseModelSection(source=str(directory), dtype="float32"), directory.parent)


def fresh(name: str) -> Any:
    base = base_of(name)
    return loading.load_model(base, BaseModelSection(source=str(base.directory), dtype="float32"))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).logits


@torch.no_grad()
def by_hand(name: str, factors: Factors) -> torch.Tensor:
    """Logits of the model with every update added to its weight."""
    model = fresh(name)
    parameters, lying = dict(model.named_parameters()), tensor_names.transposed_parameters(model)
    for path, f in factors.items():
        own = path if path in parameters else f"{path}.weight"
        parameters[own].add_(delta(f).mT if own in lying else delta(f))
    return logits(model)


def random_factors(name: str, rank: int = 3, seed: int = 1) -> Factors:
    """Random factors for every module that auto finds."""
    model = peft_model.attach(fresh(name), "a", LoraSection(rank=rank, alpha=2 * rank, target_modules=(AUTO,)))
    shake(model, seed)
    return peft_model.factors_of(model, "a")


@torch.no_grad()
def shake(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if "lora_A" in path or "lora_B" in path:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def written(name: str, targets: Sequence[str] | str | None, seed: int = 1, **more: Any) -> Path:
    """What stock PEFT writes."""
    model = get_peft_model(fresh(name), LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=targets, **more))
    shake(model, seed)
    model.save_pretrained(directory := temporary_directory() / "adapter")
    return directory


def renamed(source: Path, change: Callable[[str], str], **settings: Any) -> Path:
    """A copy of an adapter with other names of its tensors."""
    directory = temporary_directory() / "renamed"
    directory.mkdir()
    state = load_file(source / WEIGHTS)
    save_file({change(key): tensor for key, tensor in state.items()}, directory / WEIGHTS)
    found = json.loads((source / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**found, **settings}))
    return directory


class Ours(unittest.TestCase):
    """What we write, stock PEFT reads, whatever the architecture calls its modules and however they lie."""

    def test_an_adapter_on_everything_is_read_by_peft_and_by_us_as_it_was_made(self) -> None:
        for name in ("glm4_moe", "qwen2_moe", "gpt2", "gemma3", "qwen3_5", "deepseek_v3", "falcon"):
            factors = random_factors(name)
            adapter_files.save(directory := temporary_directory() / "adapter", factors, base_of(name))
            expected = by_hand(name, factors)
            # the delta rule of linear attention adds up rounding
            rounding = 10 * ROUNDING if name == "qwen3_5" else ROUNDING
            with self.subTest(name):
                self.assertGreater(relative(expected, logits(fresh(name))), AN_EFFECT)
                stock = logits(PeftModel.from_pretrained(fresh(name), str(directory)))
                self.assertLess(relative(stock, expected), rounding)
                again = by_hand(name, adapter_files.load(directory, base_of(name)))
                self.assertLess(relative(again, expected), rounding)
                ours = logits(inference_layers.attach(fresh(name), {"a": factors}))
                self.assertLess(relative(ours, expected), rounding)

    def test_leaf_names_are_written_where_they_find_exactly_these_modules(self) -> None:
        for name, leaf in (("falcon", True), ("gemma3", False), ("glm4_moe", True)):
            found = adapter_config.config_for(random_factors(name), model_class.outline(base_of(name).directory))
            with self.subTest(name):
                self.assertEqual(all("." not in target for target in found.target_modules), leaf)

    def test_experts_that_lie_with_their_inputs_first(self) -> None:
        model = peft_model.attach(fresh("gpt_oss"), "a", LoraSection(rank=2, alpha=4, experts=True))
        shake(model, 3)
        factors, expected = peft_model.factors_of(model, "a"), logits(model)
        adapter_files.save(directory := temporary_directory() / "adapter", factors, base_of("gpt_oss"))
        self.assertLess(relative(by_hand("gpt_oss", factors), expected), ROUNDING)
        self.assertLess(
            relative(logits(PeftModel.from_pretrained(fresh("gpt_oss"), str(directory))), expected), ROUNDING
        )
        again = adapter_files.load(directory, base_of("gpt_oss"))
        for model in (
            inference_layers.attach(fresh("gpt_oss"), {"a": again}),
            peft_model.add(fresh("gpt_oss"), "a", again),
        ):
            self.assertLess(relative(logits(model), expected), ROUNDING)
        self.assertFalse(adapter_files.save_per_expert(temporary_directory() / "x", factors, base_of("gpt_oss")))
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        of_peft = written("gpt_oss", ["q_proj"], target_parameters=parameters)
        expected = logits(PeftModel.from_pretrained(fresh("gpt_oss"), str(of_peft)))
        read = by_hand("gpt_oss", adapter_files.load(of_peft, base_of("gpt_oss")))
        self.assertLess(relative(read, expected), ROUNDING)

    def test_a_router_of_another_rank_than_the_rest(self) -> None:
        directory = written(
            "qwen3_moe", ["q_proj"], target_parameters=["mlp.gate.weight"], rank_pattern={".*gate.weight": 2}
        )
        found = adapter_files.load(directory, base_of("qwen3_moe"))
        other = adapter_files.load(written("qwen3_moe", ["q_proj", "v_proj"], seed=2), base_of("qwen3_moe"))
        composed = compose([found, other], Recipe(weights=(1.0, 0.5)))
        expected = by_hand("qwen3_moe", composed)
        self.assertLess(relative(logits(peft_model.add(fresh("qwen3_moe"), "c", composed)), expected), ROUNDING)
        for model in (fresh("qwen3_moe"), inference_layers.sharing_weights(fresh("qwen3_moe"))):
            self.assertLess(relative(logits(inference_layers.attach(model, {"c": composed})), expected), ROUNDING)


class Others(unittest.TestCase):
    """Stock PEFT's adapters, and what wrappers and earlier versions make of their names."""

    def refused(self, directory: Path, name: str, *parts: str) -> None:
        with self.assertRaises(ArtefactError) as caught:
            adapter_files.load(directory, base_of(name))
        for part in parts:
            self.assertIn(part, str(caught.exception))

    def test_names_that_wrappers_changed_are_those_they_were(self) -> None:
        source = written("llama", ["q_proj", "down_proj"])
        wanted = adapter_files.load(source, base_of("llama"))
        changes: dict[str, Callable[[str], str]] = {
            "torch.compile": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
            "compiled layers": lambda key: key.replace(".self_attn.", ".self_attn._orig_mod."),
            "DDP": lambda key: f"module.{key}",
            "FSDP": lambda key: key.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
            "doubled": lambda key: f"base_model.model.{key}",
            "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
            "a part of another model": lambda key: key.replace(".model.model.", ".model.thinker.model."),
        }
        for what, change in changes.items():
            with self.subTest(what):
                found = adapter_files.load(renamed(source, change), base_of("llama"))
                self.assertEqual(set(found), set(wanted))
                self.assertTrue(all(torch.equal(found[n].b_Or, wanted[n].b_Or) for n in wanted))

    def test_two_adapters_in_one_file_are_refused(self) -> None:
        source = written("llama", ["q_proj"])
        state = load_file(source / WEIGHTS)
        state |= {key.replace(".weight", ".second.weight"): tensor.clone() for key, tensor in state.items()}
        save_file(state, source / WEIGHTS)
        self.refused(source, "llama", "more than one adapter", "save one adapter alone")

    def test_a_square_matrix_with_its_inputs_first_is_read_so_whatever_the_settings_say_of_it(self) -> None:
        source = written("gpt2", r".*attn\.c_proj")
        expected = logits(PeftModel.from_pretrained(fresh("gpt2"), str(source)))
        settings = json.loads((source / CONFIG).read_text())
        for said in (False, True):
            (source / CONFIG).write_text(json.dumps({**settings, "fan_in_fan_out": said}))
            found = adapter_files.load(source, base_of("gpt2"))
            self.assertEqual({f.shape for f in found.values()}, {(64, 64)})
            self.assertLess(relative(by_hand("gpt2", found), expected), ROUNDING)

    def test_text_model_adapters_are_read_on_the_whole_checkpoint(self) -> None:
        factors = {n.replace("model.language_model.", "model."): f for n, f in random_factors("gemma3").items()}
        state = adapter_files.to_state(factors)
        directory = temporary_directory()
        save_file(state, directory / WEIGHTS)
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6}
        leaves = linear_modules.leaves(factors)
        regex = rf".*language_model\.layers\.\d+\.\w+\.({'|'.join(leaves)})"
        for targets in (regex, leaves):  # the tower has modules of the same leaf names
            (directory / CONFIG).write_text(json.dumps({**settings, "target_modules": targets}))
            found = adapter_files.load(directory, base_of("gemma3"))
            self.assertTrue(all(name.startswith("model.language_model.") for name in found))

    def test_an_unchanged_copy_of_the_head_is_dropped_and_a_changed_one_is_another_base(self) -> None:
        source = written("llama", ["q_proj", "lm_head"])
        self.assertTrue([key for key in load_file(source / WEIGHTS) if "base_layer" in key])
        found = adapter_files.load(source, base_of("llama"))
        expected = logits(PeftModel.from_pretrained(fresh("llama"), str(source)))
        self.assertLess(relative(by_hand("llama", found), expected), ROUNDING)
        state = load_file(source / WEIGHTS)
        save_file({k: t + 0.1 if "base_layer" in k else t for k, t in state.items()}, source / WEIGHTS)
        self.refused(source, "llama", "lm_head.base_layer.weight was trained whole", "--domain_adapter")

    def test_what_cannot_be_read_is_called_what_it_is(self) -> None:
        source = written("llama", ["q_proj"])
        state = load_file(source / WEIGHTS)
        save_file({key: tensor[:0] for key, tensor in state.items()}, source / WEIGHTS)
        self.refused(source, "llama", "is empty", "ZeRO-3")
        self.refused(written("llama", ["embed_tokens", "q_proj"]), "llama", "adapts embeddings")

    def test_adapters_of_transformers_4_on_experts_dense_layers_and_shared_experts(self) -> None:
        model = fresh("deepseek_v3")
        names = [
            n
            for n, m in model.named_modules()
            if linear_modules.is_linear(m) and n.endswith(("gate_proj", "down_proj", "up_proj"))
        ]
        names += [
            f"model.layers.1.mlp.experts.{e}.{leaf}" for e in range(4) for leaf in ("gate_proj", "up_proj", "down_proj")
        ]
        generator, state = torch.Generator().manual_seed(1), {}
        for name in names:
            shape = dict(model.named_parameters())[f"{name}.weight"].shape if ".experts." not in name else (48, 64)
            out, inside = shape if "down" not in name or ".experts." not in name else (64, 48)
            state[f"base_model.model.{name}.lora_A.weight"] = 0.2 * torch.randn(2, inside, generator=generator)
            state[f"base_model.model.{name}.lora_B.weight"] = 0.2 * torch.randn(out, 2, generator=generator)
        directory = temporary_directory()
        save_file(state, directory / WEIGHTS)
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}
        targets = ["gate_proj", "up_proj", "down_proj"]
        (directory / CONFIG).write_text(json.dumps({**settings, "target_modules": targets}))
        found = adapter_files.load(directory, base_of("deepseek_v3"))
        self.assertEqual({n for n in found if ".experts." in n}, set(tensor_names.fused_parameters(model)))
        self.assertEqual({n for n in found if ".experts." not in n}, {n for n in names if ".experts." not in n})
        adapter_files.save(again := temporary_directory() / "again", found, base_of("deepseek_v3"))
        stock = logits(PeftModel.from_pretrained(fresh("deepseek_v3"), str(again)))
        self.assertLess(relative(stock, by_hand("deepseek_v3", found)), ROUNDING)

    def test_a_router_of_transformers_4_goes_by_its_name_of_today(self) -> None:
        """The reference adds the updates to the files, which still have those names."""
        generator, state, own = torch.Generator().manual_seed(2), {}, temporary_directory() / "base"
        toy_architectures.build("mixtral", own)
        tensors = load_file(own / "model.safetensors")
        for name in [n for n in tensors if "block_sparse_moe" in n]:
            outputs, inputs = tensors[name].shape
            a = 0.2 * torch.randn(2, inputs, generator=generator)
            b = 0.2 * torch.randn(outputs, 2, generator=generator)
            path = name.removesuffix(".weight")
            state |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
            tensors[name] += 2 * b @ a
        save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
        save_file(state, (directory := temporary_directory()) / WEIGHTS)
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}
        (directory / CONFIG).write_text(json.dumps({**settings, "target_modules": ["gate", "w1", "w2", "w3"]}))
        found = adapter_files.load(directory, base_of("mixtral"))
        routers = [name for name in found if name.endswith("gate")]
        self.assertEqual(routers, [f"model.layers.{n}.mlp.gate" for n in (0, 1)])
        expected = logits(MixtralForCausalLM.from_pretrained(own, dtype=torch.float32))
        self.assertLess(relative(by_hand("mixtral", found), expected), ROUNDING)


class WholeModules(unittest.TestCase):
    """An adapter that trained modules whole brings them: the base with them is the base, for all adapters."""

    def made(self, name: str, rows: int = 0, **more: Any) -> tuple[Path, torch.Tensor]:
        """What stock PEFT writes of a model whose modules were trained whole, and that model's logits."""
        model = fresh(name)
        if rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], **more))
        shake(model, 4)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "modules_to_save" in path or (rows and path.endswith(("embed_tokens.weight", "lm_head.weight"))):
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(directory := temporary_directory() / "adapter", save_embedding_layers=bool(rows))
        return directory, logits(model)

    def on(self, base: BaseModel, directory: Path) -> torch.Tensor:
        factors = adapter_files.load(directory, base)
        model = loading.load_model(base, BaseModelSection(source=str(base.directory), dtype="float32"))
        return logits(inference_layers.attach(model, {"a": factors}))

    def test_a_head_that_was_trained_whole_replaces_the_bases(self) -> None:
        directory, expected = self.made("llama", modules_to_save=["lm_head"])
        models = temporary_directory()
        base = own_modules.base_with(base_of("llama"), [directory], models)
        self.assertEqual(base.made_from, base_of("llama").digest)
        self.assertLess(relative(self.on(base, directory), expected), ROUNDING)
        self.assertGreater(relative(logits(fresh("llama")), expected), AN_EFFECT)
        other = written("llama", ["v_proj"], seed=7)
        self.assertEqual(own_modules.base_with(base_of("llama"), [other, directory], models).digest, base.digest)
        composed = compose([adapter_files.load(d, base) for d in (directory, other)], Recipe(weights=(0.5, 2.0)))
        self.assertEqual(len(composed), 4)
        self.assertEqual(own_modules.base_with(base_of("llama"), [other], models), base_of("llama"))

    def test_a_resized_vocabulary_comes_with_its_adapter(self) -> None:
        for name in ("llama", "qwen3"):  # a head of its own, and one tied to the embeddings
            directory, expected = self.made(name, rows=648)
            toy_architectures.tokenizer(eos_token="<new>").save_pretrained(directory)
            base = own_modules.base_with(base_of(name), [directory], temporary_directory())
            with self.subTest(name):
                self.assertEqual(json.loads((base.directory / "config.json").read_text())["vocab_size"], 648)
                self.assertLess(relative(self.on(base, directory), expected), ROUNDING)
                self.assertNotEqual(base.tokenizer_digest, base_of(name).tokenizer_digest)

    def test_two_adapters_with_such_modules_are_refused(self) -> None:
        folders = [self.made("llama", modules_to_save=["lm_head"])[0] for _ in range(2)]
        with self.assertRaisesRegex(ArtefactError, "only one adapter can bring them"):
            own_modules.base_with(base_of("llama"), folders, temporary_directory())


class SameBase(unittest.TestCase):
    def test_another_copy_of_the_base_can_be_asserted_and_is_said(self) -> None:
        base, other = base_of("llama"), temporary_directory() / "copy"
        toy_architectures.build("llama", other)
        settings = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**settings, "use_cache": not settings.get("use_cache", True)}))
        adapter = written("llama", ["q_proj"])
        named = json.loads((adapter / CONFIG).read_text()) | {"base_model_name_or_path": str(other)}
        (adapter / CONFIG).write_text(json.dumps(named))

        def run(*flags: str) -> Any:
            config = cli.resolve(["--base.source", str(base.directory), *flags], {})
            config = config.model_copy(update={"run": config.run.model_copy(update={"models_dir": other.parent})})
            return parent_runs.external_run(config, base, "domain", adapter)

        with self.assertRaisesRegex(ArtefactError, "made for another base model(.|\n)*--inputs.same_base true"):
            run()
        found = run("--inputs.same_base", "true")
        (sentence,) = cards.asserted(base, [found])
        self.assertIn("was asserted, not verified", sentence)


if __name__ == "__main__":
    unittest.main()
