"""A base in 4 and 8 bits: what its bits mean, what is refused, and the whole pipeline on it.

Some tests show what bitsandbytes 0.50.2 and PEFT do by themselves, and fail when that changes, so that a new version is
read again before it is trusted.
"""

from __future__ import annotations

import unittest
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bitsandbytes import functional
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from config import ATTENTION, PRESETS, BaseModelSection, Config, LoraSection, smollm2_135m
from tests.support import (
    Workspace,
    expert_factors,
    last_json,
    random_factors,
    relative,
    saved_model,
    temporary_directory,
    toy,
)
from utils import logger
from utils.adapters import inference_layers, peft_model
from utils.artifacts import files
from utils.composition.methods import Recipe, compose
from utils.exceptions import ArtefactError, VerificationError
from utils.models import loading, model_shapes, quantization, sources
from utils.models.architectures import minimax_m2
from utils.models.base_model import BaseModel
from utils.models.weights.safetensors_io import Checkpoint
from utils.planning import base_checks, estimates, hardware, preflight, training_plan
from utils.planning.memory import count_parameters

KINDS = ("nf4", "int8")
IDS = torch.randint(0, 700, (2, 24), generator=torch.Generator().manual_seed(1))


def dense(directory: Path, *, inner: int = 128, dtype: torch.dtype = torch.float32) -> Path:
    """A toy Llama as a model directory."""
    model, tokenizer = toy.tiny_llama()
    model.config.intermediate_size = inner
    torch.manual_seed(0)
    with logger.quiet_transformers():
        toy._awake(LlamaForCausalLM(model.config)).to(dtype).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return directory


def section(source: Path, kind: str) -> BaseModelSection:
    return BaseModelSection(source=str(source), quantization=kind, dtype="float32")


class Bits(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.models = temporary_directory()
        cls.source = dense(cls.models / "llama")
        cls.plain = cls.base("none")

    @classmethod
    def base(cls, kind: str) -> BaseModel:
        return sources.fetch(section(cls.source, kind), cls.models)

    def loaded(self, kind: str, *, in_bits: bool = True) -> Any:
        base = self.base(kind)
        base = base if in_bits else replace(base, quantization="none")
        return loading.load_model(base, section(self.source, kind))

    def test_the_directory_holds_what_the_bits_mean_and_everything_else_as_it_was(self) -> None:
        before = Checkpoint(self.plain.directory)
        for kind in KINDS:
            base = self.base(kind)
            self.assertNotEqual(base.digest, self.plain.digest)
            self.assertEqual(base.tokenizer_digest, self.plain.tokenizer_digest)
            after, changed = Checkpoint(base.directory), set()
            for name in before.homes:
                (old,), (new,) = (
                    [torch.cat([piece for *_, piece in c.rows(c.homes[name], name)])] for c in (before, after)
                )
                if torch.equal(old, new):
                    continue
                changed.add(name)
                self.assertTrue(torch.equal(new, quantization.rounded(old, kind)))
                self.assertTrue(torch.equal(new, quantization.rounded(new, kind)), "not what the same bits mean")
                self.assertLess(float((new - old).norm() / old.norm()), 0.12 if kind == "nf4" else 0.02)
            self.assertEqual(len(changed), 2 * 7, "the linear modules of both layers")
            self.assertFalse([name for name in changed if "lm_head" in name or "embed" in name or "norm" in name])

    def test_in_four_bits_the_model_and_its_adapters_compute_what_the_directory_does(self) -> None:
        parts = [
            random_factors(self.loaded("nf4", in_bits=False), ("q_proj", "down_proj"), 4, 8.0, seed, 0.1)
            for seed in (1, 2)
        ]
        composed = compose(parts, Recipe())
        logits: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for in_bits in (True, False):
                model = self.loaded("nf4", in_bits=in_bits)
                size = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "proj" in n)
                self.assertEqual(size, 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) * (0.5 if in_bits else 4))
                logits[f"base {in_bits}"] = model(IDS).logits
                logits[f"two {in_bits}"] = inference_layers.attach(
                    self.loaded("nf4", in_bits=in_bits), dict(zip("dt", parts, strict=True))
                )(IDS).logits
                logits[f"peft {in_bits}"] = peft_model.add(model, "composed", composed)(IDS).logits
        self.assertTrue(torch.equal(logits["base True"], logits["base False"]))
        for way in ("two", "peft"):
            self.assertLess(relative(logits[f"{way} True"], logits["two False"]), 1e-5)
        self.assertGreater(relative(logits["two True"], logits["base True"]), 0.1)

    def test_the_planner_knows_the_bytes_that_are_held(self) -> None:
        shapes = count_parameters.of_settings(files.read_object(self.plain.directory / "config.json"))
        for kind in KINDS:
            settings = BaseModelSection(source=str(self.source), quantization=kind, dtype="bfloat16")
            model = loading.load_model(self.base(kind), settings)
            held = sum(p.numel() * p.element_size() for p in model.parameters())
            for module in filter(quantization.is_quantised, model.modules()):
                scales = module.weight.quant_state.absmax if kind == "nf4" else module.weight.SCB
                held += scales.numel() * scales.element_size()
            self.assertEqual(held, estimates.weight_bytes(shapes, preflight.loaded_dtype(settings)))

    def test_in_eight_bits_only_the_rounding_of_activations_is_left(self) -> None:
        with torch.no_grad():
            in_bits, plain = (self.loaded("int8", in_bits=value)(IDS).logits for value in (True, False))
        self.assertGreater(relative(in_bits, plain), 0.0)
        self.assertLess(relative(in_bits, plain), 0.05)

    def test_gradients_are_the_same_after_a_measurement_as_before_it(self) -> None:
        for kind in KINDS:
            model = self.loaded(kind)
            factors = random_factors(model, ("q_proj", "down_proj"), 4, 8.0, 1, 0.1)
            model = peft_model.add(model, "task", factors)
            peft_model.activate(model, ["task"], trainable="task")
            before = gradients(model)
            with torch.no_grad():
                model.eval()(IDS)
            self.assertEqual(gradients(model).keys(), before.keys())
            for name, gradient in gradients(model).items():
                self.assertTrue(torch.equal(gradient, before[name]), name)

    def test_bits_that_mean_other_weights_than_the_directory_are_noticed(self) -> None:
        model = self.loaded("nf4")
        quantization.check_loaded(model, self.base("nf4").directory)
        with self.assertRaises(VerificationError):
            quantization.check_loaded(model, self.plain.directory)
        model.model.layers[0].mlp.up_proj.weight.data[3] ^= 0x70
        with self.assertRaises(VerificationError):
            quantization.check_loaded(model, self.base("nf4").directory)

    def test_weights_of_sixteen_bits_are_quantised_from_what_they_are(self) -> None:
        source = dense(temporary_directory() / "llama", dtype=torch.bfloat16)
        for kind in KINDS:
            base = sources.fetch(section(source, kind), source.parent)
            self.assertEqual(
                {t.dtype for h in Checkpoint(base.directory).headers.values() for t in h.tensors.values()}, {"BF16"}
            )
            model = loading.load_model(base, BaseModelSection(source=str(source), dtype="bfloat16"))
            found = quantization.weights_of(model.model.layers[1].mlp.down_proj).float()
            name = "model.layers.1.mlp.down_proj.weight"
            files = Checkpoint(base.directory)
            held = torch.cat([piece for *_, piece in files.rows(files.homes[name], name)])
            self.assertLess(relative(found, held), 2**-8)


class Refusals(unittest.TestCase):
    def test_minimax_m2_is_refused_by_its_settings_with_the_numbers_that_the_plan_has(self) -> None:
        with self.assertRaises(ValidationError) as caught:
            Config(base=PRESETS["minimax_m2"]().base.model_copy(update={"quantization": "nf4"}))
        shapes = minimax_m2.sizes(minimax_m2.PUBLISHED)
        kept, whole = (estimates.weight_bytes(shapes, dtype) / model_shapes.GIB for dtype in ("nf4", "bfloat16"))
        self.assertIn(f"nf4 would leave {kept:.1f} of {whole:.1f} GiB", str(caught.exception))
        (problem,) = base_checks.quantization_refusals(shapes, "nf4")
        self.assertIn(f"{kept:.1f} of {whole:.1f} GiB", problem.what)
        self.assertIn("FP8", problem.what)

    def test_processes_that_would_deal_the_weights_out_are_refused_and_never_planned(self) -> None:
        large = count_parameters.of_config(
            LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=200)
        )
        for kind, shards in (("bfloat16", 8), ("nf4", 1)):
            step, machine = training_plan.step(smollm2_135m(), "domain", kind), hardware.of(smollm2_135m().plan)
            chosen = training_plan.choice(large, machine, "domain", step, step.tokens)
            self.assertEqual(chosen.layout.shard, shards)
        source = dense(temporary_directory() / "llama")
        wanted = Config(base=section(source, "nf4"))
        preflight.check(wanted)
        machine = preflight.Machine(shards=8, local=8, gpu_bytes=2**36, host_bytes=2**40)
        with mock.patch.object(preflight.Machine, "here", return_value=machine), self.assertRaises(ArtefactError) as no:
            preflight.check(wanted)
        self.assertIn("FSDP does not shard", str(no.exception))

    def test_a_mixture_of_experts_is_refused_before_anything_is_loaded_or_written(self) -> None:
        base = saved_model("minimax_m2")
        wanted = Config(base=section(base.directory, "nf4"))
        with self.assertRaises(ArtefactError) as caught:
            preflight.check(wanted)
        self.assertIn("fused experts", str(caught.exception))
        with self.assertRaises(ArtefactError):
            sources.fetch(wanted.base, base.directory.parent)
        self.assertFalse(list(base.directory.parent.glob("base/*nf4*/manifest.json")))

    def test_matrices_that_bitsandbytes_reads_wrongly_are_refused(self) -> None:
        weights = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
        codes, state = functional.quantize_4bit(weights, quant_type="nf4", blocksize=64)
        wrong = functional.dequantize_4bit(codes, state) - weights
        error = float(wrong.norm() / weights.norm())
        if torch.backends.cpu.get_cpu_capability() == "AVX512":  # the kernel that is wrong; without it torch is asked
            self.assertGreater(error, 0.2, "bitsandbytes reads them rightly now")
        else:
            self.assertLess(error, 0.1)
        source = dense(temporary_directory() / "odd", inner=96)
        with self.assertRaises(ArtefactError) as caught:
            sources.fetch(section(source, "nf4"), source.parent)
        self.assertIn("down_proj has 96 inputs", str(caught.exception))
        self.assertFalse(list(source.parent.glob("base/*nf4*/manifest.json")))
        sources.fetch(section(source, "int8"), source.parent)


class Experts(unittest.TestCase):
    """bitsandbytes' way to experts in 4 bits, under which PEFT adds an update again at every forward pass."""

    def test_an_update_of_experts_in_four_bits_grows_and_no_adapter_of_ours_gets_there(self) -> None:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit
        from peft import LoraConfig, get_peft_model

        def quantised() -> Any:
            model = toy.tiny_minimax_m2()[0].eval()
            for layer in model.model.layers:
                for name in ("gate_up_proj", "down_proj"):
                    replace_parameter_4bit(layer.mlp.experts, name, quant_type="nf4")
            return model.requires_grad_(False)

        names = [f"model.layers.{i}.mlp.experts.{leaf}" for i in range(2) for leaf in ("gate_up_proj", "down_proj")]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT prints the whole layer
            model = get_peft_model(
                quantised(),
                LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=names),
            ).eval()
            for name, parameter in model.named_parameters():
                if "lora_B" in name and "experts" in name:
                    parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
            first, second = (model(IDS).logits for _ in range(2))
        self.assertGreater(relative(second, first), 0.01, "PEFT's update no longer grows")
        plain = toy.tiny_minimax_m2()[0]
        factors = expert_factors(plain, 2, 4.0, seed=0)
        lora = LoraSection(rank=2, alpha=4, target_modules=ATTENTION, experts=True)
        ways: tuple[Callable[[], Any], ...] = (
            lambda: peft_model.attach(quantised(), "task", lora),
            lambda: peft_model.add(quantised(), "task", factors),
            lambda: inference_layers.attach(quantised(), {"task": factors}),
        )
        for way in ways:
            with self.assertRaises(ArtefactError):
                way()


class Pipeline(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.place = Workspace(documents=10)
        cls.source = dense(cls.place.root / "llama")
        cls.base = ["--base.source", str(cls.source), "--base.quantization"]
        last_json(cls.place.run("prepare_data", *cls.place.sources, *cls.base, "nf4"))
        cls.made = {
            stage: last_json(cls.place.run(f"train_{stage}_adapter", *cls.base, "nf4", *flags))
            for stage, flags in (("domain", []), ("task", []))
        }

    def test_adapters_train_compose_answer_evaluate_and_merge_on_four_bits(self) -> None:
        composed = last_json(self.place.run("compose", *self.base, "nf4"))
        evaluated = self.place.run("evaluate", *self.base, "nf4")
        self.assertIn("verdict", last_json(evaluated))
        answered = last_json(self.place.run("inference", *self.base, "nf4", "--prompt", "What does f1 do?"))
        self.assertEqual(answered["adapters"], [self.made[s]["run"] for s in ("domain", "task")])
        target = self.place.models / "merged"
        merged = last_json(self.place.run("inference", *self.base, "nf4", "--merge_path", str(target)))
        self.assertLess(merged["max_logit_difference"], 1e-4 * max(1.0, merged["largest_logit"]))
        self.assertGreater(merged["adapter_effect_on_logits"], 100 * merged["max_logit_difference"])
        self.assert_is_sum_of_dequantised_and_deltas(target, Path(composed["adapter"]))
        for path in (target, Path(composed["adapter"]).parent):
            verified = self.place.run("verify", str(path))
            self.assertEqual(verified.returncode, 0, verified.stderr[-1000:])

    def assert_is_sum_of_dequantised_and_deltas(self, target: Path, adapter: Path) -> None:
        """The merged files, a composed model in 4 bits, and one on the de-quantised base say the same in float32."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = sources.fetch(section(self.source, "nf4"), self.place.models)
        merged = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        in_bits = PeftModel.from_pretrained(loading.load_model(base, section(self.source, "nf4")), adapter)
        original = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32), adapter
        )
        with torch.no_grad():
            expected = merged(IDS).logits
            self.assertLess(relative(in_bits(IDS).logits, expected), 1e-4)
            self.assertGreater(relative(original(IDS).logits, expected), 1e-2, "the original would have done as well")

    def test_adapters_of_one_form_of_the_base_are_refused_on_another_and_told_which(self) -> None:
        for kind in ("none", "int8"):
            for script in ("evaluate", "inference"):
                flags = ["--prompt", "x"] if script == "inference" else []
                pinned = ["--task_adapter", self.made["task"]["run"]]
                for how in (pinned, []):
                    refused = self.place.run(script, *self.base, kind, *how, *flags)
                    self.assertEqual(refused.returncode, 2, refused.stderr[-1000:])
                    self.assertIn("--base.quantization nf4", refused.stderr)

    def test_eight_bits_train_and_answer_too(self) -> None:
        last_json(self.place.run("train_domain_adapter", *self.base, "int8"))
        found = last_json(self.place.run("inference", *self.base, "int8", "--adapters", "domain", "--prompt", "What?"))
        self.assertEqual(len(found["adapters"]), 1)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


if __name__ == "__main__":
    unittest.main()
