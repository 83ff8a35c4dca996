"""What goes wrong with MiniMax-M2 without an error in the libraries: provoked here in them, and caught by our checks.

Each test first shows the failure in the transformers or PEFT that is installed, loosely: when a later one mends it, the
test says so and that part of it can go. Then it shows which of our checks stops it, and by which words.
"""

from __future__ import annotations

import json
import shutil
import unittest
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MiniMaxM2ForCausalLM

from config import ATTENTION, LoraSection
from tests import minimax_support
from tests.support import expert_factors, random_factors, relative, temporary_directory
from utils import cli, logger
from utils.adapters import adapter_files, peft_model
from utils.exceptions import ArtefactError, ConfigError, NonFiniteError, VerificationError
from utils.models import loading, sources
from utils.models.architectures import registry, toy
from utils.models.structure import load_checks
from utils.planning import preflight
from utils.training import guards, training_run

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
DOMAIN, TASK, BOTH = "domain", "task", ["domain", "task"]
IDS = torch.randint(8, 700, (2, 16), generator=torch.Generator().manual_seed(3))
LORA = LoraSection(rank=2, alpha=4, target_modules=ATTENTION)
# what counts as a failure of a library: measured ones are above 0.3
WRONG = 0.1


def setUpModule() -> None:
    unittest.enterModuleContext(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    unittest.enterModuleContext(logger.quiet_transformers())


def loaded_by_transformers(directory: Path) -> torch.nn.Module:
    """As anyone would load it."""
    with mock.patch.object(MiniMaxM2ForCausalLM, "_keep_in_fp32_modules_strict", None):
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def fresh() -> torch.nn.Module:
    return toy.tiny_minimax_m2()[0].requires_grad_(False).eval()


def stock(**settings: Any) -> PeftModel:
    return get_peft_model(fresh(), LoraConfig(task_type="CAUSAL_LM", r=2, **settings))


def refused_by_config(*arguments: str) -> str:
    try:
        cli.resolve(["--preset", "tiny_minimax_m2", *arguments], {})
    except ConfigError as error:
        return str(error)
    raise AssertionError(f"{arguments} is accepted")


def two(*, experts: bool = False) -> PeftModel:
    """Our own model with a frozen domain adapter under the task adapter that is trained, equal in size."""
    model = fresh()
    factors = random_factors(model, ATTENTION, 2, 4, seed=1)
    if experts:
        factors |= expert_factors(model, 2, 4, seed=2)
    return training_run.new_adapter(peft_model.add(model, DOMAIN, factors), TASK, LORA, 0, [DOMAIN])


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).logits.float()


def trainable(model: torch.nn.Module) -> set[str]:
    return set(peft_model.trainable_parameters(model))


class Loading(unittest.TestCase):
    def copied(self, **settings: Any) -> Path:
        """A copy of the checkpoint with these settings changed; None removes one."""
        directory = temporary_directory() / "model"
        shutil.copytree(minimax_support.checkpoint("bfloat16"), directory)
        found = json.loads((directory / "config.json").read_text()) | settings
        kept = {key: value for key, value in found.items() if value is not None}
        (directory / "config.json").write_text(json.dumps(kept))
        return directory

    def test_without_rotary_dim_whole_heads_are_rotated_and_the_model_is_refused(self) -> None:
        right = loaded_by_transformers(minimax_support.checkpoint("bfloat16"))
        directory = self.copied(rotary_dim=None)
        wrong = loaded_by_transformers(directory)
        self.assertEqual([len(m.model.rotary_emb.inv_freq) for m in (right, wrong)], [16, 32], "mended in transformers")
        self.assertGreater(relative(logits(wrong), logits(right)), WRONG)
        with self.assertRaisesRegex(ArtefactError, r"config\.json has no rotary_dim: whole heads would be rotated"):
            sources.fetch(minimax_support.section("bfloat16", source=str(directory)), directory.parent)
        # and once more after loading, whatever config.json says
        (problem,) = load_checks._wrong_rotation(wrong, directory)
        self.assertIn("64 of the 64 values of a head are rotated, its config.json says nothing", problem.what)
        wrong.config.rotary_dim = 32
        (problem,) = load_checks._wrong_rotation(wrong, directory)
        self.assertIn("64 of the 64 values of a head are rotated, its config.json says 32", problem.what)
        self.assertEqual(load_checks.problems(loading.load_model(*self.ours("bfloat16")), directory), [])

    def test_a_router_that_is_rounded_to_bfloat16_is_refused_and_ours_is_bit_equal_to_the_file(self) -> None:
        directory = minimax_support.checkpoint("bfloat16")
        wrong = loaded_by_transformers(directory)
        self.assertEqual(wrong.model.layers[0].mlp.gate.weight.dtype, torch.bfloat16, "mended in transformers")
        told = "; ".join(str(problem) for problem in load_checks.problems(wrong, directory))
        self.assertIn("4 router tensors were not loaded as float32", told)
        self.assertIn("model.layers.0.mlp.gate.weight torch.bfloat16", told)
        with (
            mock.patch.object(loading, "registry", mock.Mock(of=lambda model_type: registry.USUAL)),
            mock.patch.object(MiniMaxM2ForCausalLM, "_keep_in_fp32_modules_strict", None),
            self.assertRaisesRegex(ArtefactError, "router tensors were not loaded as float32"),
        ):
            loading.load_model(*self.ours("bfloat16"))
        for kind in ("bfloat16", "fp8"):
            with self.subTest(kind):
                right, directory = loading.load_model(*self.ours(kind)), minimax_support.checkpoint(kind)
                state = {n: t for p in directory.glob("*.safetensors") for n, t in load_file(p).items()}
                for layer, module in enumerate(right.model.layers):
                    place = f"model.layers.{layer}.block_sparse_moe"
                    self.assertTrue(torch.equal(module.mlp.gate.weight, state[f"{place}.gate.weight"]))
                    bias = state[f"{place}.e_score_correction_bias"]
                    self.assertTrue(torch.equal(module.mlp.e_score_correction_bias, bias))
                    self.assertTrue(bias.any())
                # one buffer alone is seen too
                right.model.layers[1].mlp.e_score_correction_bias.data = bias.bfloat16()
                (problem,) = load_checks.problems(right, directory)
                self.assertIn("1 router tensors", problem.what)

    def test_an_fp8_checkpoint_that_is_de_quantised_unasked_or_left_as_codes_is_refused(self) -> None:
        directory = minimax_support.checkpoint("fp8")
        unasked = loaded_by_transformers(directory)  # no GPU: transformers de-quantises, with a warning at most
        self.assertEqual(unasked.model.layers[0].self_attn.q_proj.weight.dtype, torch.bfloat16, "mended")
        with self.assertRaisesRegex(ArtefactError, "were to stay FP8, and transformers de-quantised them"):
            loading.load_model(*self.ours("fp8"), native_fp8=True)
        with minimax_support.fp8_on_this_cpu():
            codes = loaded_by_transformers(directory)
        told = " ".join(problem.what for problem in load_checks.problems(codes, directory))
        # four of attention and two of the experts in each of two layers
        self.assertIn("12 weights are FP8 values and should be dequantized", told)

    def ours(self, kind: Any) -> tuple[Any, Any]:
        return minimax_support.fetched(kind), minimax_support.section(kind)


class Widened(unittest.TestCase):
    """PEFT adapts more than was asked for."""

    def attach(self, **instead: Any) -> None:
        """Our `attach`, with a PEFT that is asked for these targets: what it adapts is looked at afterwards."""
        real = peft.get_peft_model

        def asked(model: torch.nn.Module, settings: LoraConfig, **names: str) -> PeftModel:
            for key, value in instead.items():
                setattr(settings, key, value)
            return real(model, settings, **names)

        with mock.patch("peft.get_peft_model", asked):
            peft_model.attach(fresh(), DOMAIN, LORA)

    def test_all_linear_takes_the_experts_and_the_router_and_is_refused_or_taken_exactly(self) -> None:
        wide = stock(target_modules="all-linear")
        for part in ("mlp.experts", "mlp.gate"):
            self.assertTrue(any(part in name for name in trainable(wide)), f"PEFT no longer adapts {part}")
        self.assertIn("'all-linear'", refused_by_config('--domain.lora.target_modules=["all-linear"]'))
        self.attach(target_modules="all-linear")  # here PEFT takes names as they are: the linear modules alone
        config = cli.resolve(["--preset", "tiny_minimax_m2", "--domain.lora.rank=2"], {})
        base = sources.fetch(config.base, temporary_directory())
        counted = sum(p.numel() for p in wide.parameters() if p.requires_grad)
        with self.assertRaisesRegex(ArtefactError, f"{counted:,} parameters are trainable, the domain adapter's"):
            preflight.check_trainable(wide, config, DOMAIN, base)
        preflight.check_trainable(stock(target_modules=list(ATTENTION)), config, DOMAIN, base)

    def test_a_pattern_for_one_layer_takes_them_all_and_is_refused(self) -> None:
        pattern = r".*layers\.0\.self_attn\.(q|v)_proj"
        layers = {name.split(".layers.")[1][0] for name in trainable(stock(target_modules=pattern))}
        self.assertEqual(layers, {"0", "1"}, "PEFT no longer widens patterns")
        found = refused_by_config(f"--task.lora.target_modules={json.dumps([pattern])}")
        self.assertIn("patterns widen silently", found)
        with self.assertRaisesRegex(ArtefactError, "PEFT adapted other modules than asked"):
            self.attach(target_modules=pattern)

    def test_a_restriction_to_layers_is_ignored_for_experts_and_is_seen(self) -> None:
        settings = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "layers_to_transform": [0]}
        wide = stock(**settings)
        of_layer_1 = {name for name in trainable(wide) if ".layers.1." in name}
        self.assertTrue(of_layer_1 and all(".experts." in n for n in of_layer_1), "PEFT no longer ignores it")

        # factors for layer 0, put on by PEFT with that restriction instead of by full paths
        wanted = {n: f for n, f in expert_factors(fresh(), 2, 4, seed=1).items() if ".layers.0." in n}
        real = peft.get_peft_model

        def restricted(model: torch.nn.Module, asked: LoraConfig, **names: str) -> PeftModel:
            asked.target_parameters, asked.layers_to_transform = EXPERTS, [0]
            return real(model, asked, **names)

        with (
            mock.patch("peft.get_peft_model", restricted),
            self.assertRaisesRegex(ArtefactError, r"PEFT adapted other modules than asked .*layers\.1\.mlp\.experts"),
        ):
            peft_model.add(fresh(), DOMAIN, wanted)
        self.assertEqual(set(peft_model.factors_of(peft_model.add(fresh(), DOMAIN, wanted), DOMAIN)), set(wanted))
        # such an adapter of another tool is read as what PEFT trained: the experts of both layers
        with torch.no_grad():
            for name, parameter in wide.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        directory = temporary_directory()
        wide.save_pretrained(directory)
        config = cli.resolve(["--preset", "tiny_minimax_m2"], {})
        base = sources.fetch(config.base, temporary_directory())
        read = peft_model.add(fresh(), DOMAIN, adapter_files.load(directory, base))
        self.assertLess(relative(logits(read), logits(wide)), 1e-5)


class Untrained(unittest.TestCase):
    """Tensors that are called trainable and get no gradient."""

    def gradients(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        return peft_model.trainable_parameters(model)

    def test_adapters_on_fp8_experts_get_no_gradient_and_are_refused_before_and_after(self) -> None:
        with minimax_support.fp8_on_this_cpu():
            settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=list(ATTENTION), target_parameters=EXPERTS)
            wrong = self.gradients(get_peft_model(minimax_support.load_native_fp8(), settings))
            without = {name for name, parameter in wrong.items() if parameter.grad is None}
            self.assertEqual(without, {name for name in wrong if ".experts." in name}, "mended in PEFT or transformers")
            self.assertTrue(without)
            with self.assertRaises(NonFiniteError) as caught:
                guards.refuse_without_gradient(wrong)
            # A and B of two parameters in two layers, of the 8 x 4 + 8 tensors
            self.assertIn("8 of 24 tensors are trainable and got no gradient", str(caught.exception))
            self.assertIn("layers.0.mlp.experts.base_layer.lora_A", str(caught.exception))
            # ours is refused before that, by what is there and by the settings
            for name, refused in (
                ("attach", lambda m: peft_model.attach(m, TASK, LORA.model_copy(update={"experts": True}))),
                ("add", lambda m: peft_model.add(m, DOMAIN, expert_factors(m, 2, 4, seed=1))),
            ):
                with self.subTest(name), self.assertRaisesRegex(ArtefactError, "FP8 experts would be silently wrong"):
                    refused(minimax_support.load_native_fp8())
            with self.subTest("attention alone"):
                right = self.gradients(training_run.new_adapter(minimax_support.load_native_fp8(), TASK, LORA, 0))
                self.assertEqual(len(right), 2 * 4 * 2)
                guards.refuse_without_gradient(right)
        found = refused_by_config("--base.fp8=native", "--base.dtype=bfloat16", "--task.lora.experts=true")
        self.assertIn("task.lora.experts with base.fp8 native", found)

    def test_a_dead_or_infinite_gradient_is_named(self) -> None:
        model = two(experts=True)
        found = self.gradients(model)
        guards.refuse_without_gradient(found)
        name = next(name for name in found if "lora_B" in name)
        for value, said in ((0.0, "1 of 16 tensors are a B whose gradient is all zero"), (float("nan"), "with NaN")):
            found[name].grad.fill_(value)
            with self.assertRaises(NonFiniteError) as caught:
                guards.refuse_without_gradient(found)
            self.assertIn(said, str(caught.exception))
            self.assertIn(name, str(caught.exception))


class State(unittest.TestCase):
    """Which adapters take part, and which is trained."""

    def refused(self, model: PeftModel, active: Sequence[str] = BOTH) -> str:
        with self.assertRaises(VerificationError) as caught:
            peft_model.refuse_other_state(model, active, trainable=TASK)
        return str(caught.exception)

    def test_switching_both_on_trains_the_domain_adapter_and_is_refused(self) -> None:
        model = two()
        peft_model.refuse_other_state(model, BOTH, trainable=TASK)
        before = guards.frozen_adapters(model)
        own = trainable(model)
        model.base_model.set_adapter(BOTH)
        accident = trainable(model) - own
        self.assertTrue(accident and all(".domain." in name for name in accident), "PEFT no longer trains both")
        found = self.refused(model)
        self.assertIn(f"{len(accident)} tensors are trained beside the task adapter", found)
        self.assertIn(min(accident), found)
        # and were it trained all the same, the digest that is compared before anything is published has changed
        optimizer = torch.optim.AdamW(peft_model.trainable_parameters(model).values(), lr=0.1)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        peft_model.activate(model, BOTH, trainable=TASK)
        with self.assertRaisesRegex(VerificationError, "the frozen adapter below it changed"):
            guards.refuse_changed(before, guards.frozen_adapters(model), "task adapter")

    def test_an_adapter_that_is_switched_off_merged_or_missing_is_refused(self) -> None:
        model = two()
        with_both = logits(model)
        model.set_adapter(TASK)  # PEFT's own way to choose what is trained
        self.assertGreater(relative(logits(model), with_both), WRONG, "PEFT no longer switches the other one off")
        self.assertIn("domain is off and should not be, in 8 modules", self.refused(model))
        peft_model.refuse_other_state(model, [TASK], trainable=TASK)
        model = two()
        model.merge_adapter([DOMAIN])
        self.assertIn("domain is merged into the weights, in 8 modules", self.refused(model))
        model = two()
        model.base_model.disable_adapter_layers()
        self.assertIn("task is off and should not be", self.refused(model))
        alone = training_run.new_adapter(fresh(), TASK, LORA, 0)
        self.assertIn("the model does not carry the adapter domain", self.refused(alone))
        frozen = two()
        frozen.requires_grad_(False)
        self.assertIn("16 tensors of the task adapter are not trained", self.refused(frozen))

    def test_resuming_with_a_trainer_drops_or_overwrites_an_adapter_and_is_refused(self) -> None:
        from datasets import Dataset
        from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

        def trained(model: PeftModel, root: Path, steps: int, *, resumes: bool) -> None:
            arguments = TrainingArguments(
                output_dir=str(root),
                max_steps=steps,
                per_device_train_batch_size=1,
                learning_rate=0.1,
                save_steps=1,
                use_cpu=True,
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            data = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})
            trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=default_data_collator)
            trainer.remove_callback(PrinterCallback)
            trainer.train(resume_from_checkpoint=resumes)

        for order, said in (
            ((DOMAIN, TASK), ("task is off", "tensors are trained beside the task adapter")),
            ((TASK, DOMAIN), ("domain is off",)),
        ):
            with self.subTest(order=order):
                root, model = temporary_directory(), two()
                peft_model.activate(model, order, trainable=TASK)
                trained(model, root, 1, resumes=False)
                peft_model.refuse_other_state(model, BOTH, trainable=TASK)
                again = two()
                peft_model.activate(again, order, trainable=TASK)
                trained(again, root, 2, resumes=True)
                self.assertEqual(len(again.active_adapters), 1, "transformers no longer drops one of two adapters")
                found = self.refused(again)
                for part in said:
                    self.assertIn(part, found)


if __name__ == "__main__":
    unittest.main()
