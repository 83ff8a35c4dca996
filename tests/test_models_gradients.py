"""What cannot be trained is refused by the first script with the reason and a way on; all else goes on working."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from config import Config
from scripts import prepare_data, verify
from tests import odd_architecture, toy_architectures
from tests.support import temporary_directory
from utils import cli, logger
from utils.exceptions import ArtefactError
from utils.models import sources
from utils.models.base_model import BaseModel
from utils.models.rows import gradient_measures, row_probe, row_support
from utils.models.rows.row_support import RowSupport
from utils.planning import base_checks
from utils.training.guards import refuse_without_gradient


class Floor(odd_architecture.OddFloor):
    """One that can be spoilt in ways that no forward pass shows; how is said for the class."""

    fault = ""

    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        if self.fault == "in place":
            raised = torch.sigmoid(self.widen(self.between(x_BTH)))
            return super().forward(x_BTH) + self.narrow(raised.mul_(2.0))
        if self.fault == "square root":  # of zero where a token's embedding is
            moved = self.leave(x_BTH) - self.leave.bias
            return super().forward(x_BTH) + moved * (moved.pow(2).mean(-1, keepdim=True) ** 0.5)
        if self.fault == "detached":
            with mock.patch.object(self, "narrow", Detached(self.narrow)):
                return super().forward(x_BTH)
        if self.fault == "no kernel":
            return super().forward(x_BTH) + WithoutGradient.apply(self.narrow(torch.tanh(self.widen(x_BTH))))
        return super().forward(x_BTH)


class Detached(torch.nn.Module):
    """A module whose result takes no part in the gradient, but is connected to it."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.inner(x)
        return found.detach() + 0.0 * found


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("the kernel has no backward pass\nand more")


def spoilt(fault: str, **sizes: Any) -> BaseModel:
    """A base model whose layers have this fault, in a directory of its own; the class stays so until the next one."""
    odd_architecture.register()
    Floor.fault = fault
    directory = temporary_directory() / "odd"
    torch.manual_seed(0)
    model = toy_architectures.awake(odd_architecture.OddForCausalLM(odd_architecture.OddConfig(eos_token_id=1)))
    with torch.no_grad():
        model.trunk.words.weight[2].zero_()  # the pad token
    with logger.quiet_transformers():
        model.save_pretrained(directory)
        toy_architectures.tokenizer().save_pretrained(directory)
    return fetched(directory)


def fetched(directory: Path) -> BaseModel:
    return sources.fetch(settings(directory).base, directory.parent / "models")


def settings(directory: Path, *flags: str) -> Config:
    return cli.resolve(["--base.source", str(directory), "--base.dtype", "float32", *flags], {})


def measured(base: BaseModel) -> RowSupport:
    return row_probe.measured(base, settings(base.directory).base)


class Refused(unittest.TestCase):
    def setUp(self) -> None:
        row_probe._mentioned.clear()
        swapped = mock.patch.object(odd_architecture, "OddFloor", Floor)
        swapped.start()
        self.addCleanup(swapped.stop)

    def refusal(self, base: BaseModel, *flags: str) -> str:
        with self.assertRaises(ArtefactError) as caught:
            base_checks.measured_rows(settings(base.directory, *flags), base, ("domain", "task"))
        return str(caught.exception)

    def test_what_a_training_step_would_meet_is_named_with_a_way_on(self) -> None:
        another = "give another --base.source"
        for fault, reason, way in (
            ("in place", "stops with RuntimeError: one of the variables needed", another),
            ("no kernel", "stops with NotImplementedError: the kernel has no backward pass (", another),
            ("square root", "NaN where a row is padded", "set pad_token in its tokenizer_config.json to another"),
        ):
            with self.subTest(fault):
                said = self.refusal(spoilt(fault))
                self.assertIn(reason, said)
                self.assertIn(way, said)
                self.assertIn("domain.lora.target_modules", said)
                self.assertIn("task.lora.target_modules", said)
        self.assertEqual(measured(spoilt("")).untrained, {})

    def test_another_pad_token_is_a_way(self) -> None:
        base = spoilt("square root")
        self.assertTrue(measured(base).untrained)
        path = base.directory / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|im_end|>"}))
        self.assertEqual(measured(fetched(base.directory)).untrained, {})

    def test_leaving_out_the_modules_without_a_gradient_is_a_way(self) -> None:
        """Explicit names are asked for themselves."""
        base, on = spoilt("detached"), "--{}.lora.target_modules={}"
        said = self.refusal(base)
        self.assertIn("its gradient is zero (got ['widen', 'narrow'])", said)
        self.assertIn("--domain.lora.target_modules wqkv,leave", said)
        flags = [on.format(stage, "wqkv,leave") for stage in ("domain", "task")]
        self.assertTrue(base_checks.measured_rows(settings(base.directory, *flags), base, ("domain", "task")).untrained)
        self.assertNotIn("domain.lora", self.refusal(base, flags[0]))

    def test_prepare_data_and_verify_refuse_and_the_rest_goes_on(self) -> None:
        base = spoilt("in place")
        config = settings(base.directory, "--run.models_dir", str(base.directory.parent / "models"))
        with self.assertRaisesRegex(ArtefactError, "cannot be trained"):
            prepare_data.main(config)
        shown = settings(
            base.directory, "--verify.path", str(base.directory), "--run.models_dir", str(temporary_directory())
        )
        with contextlib.redirect_stdout(io.StringIO()):
            row = verify.main(shown)["support"]
        self.assertTrue(all(said.startswith("refused: ") for said in row.values()), row)
        model = row_probe.load_model(base, config.base)
        self.assertTrue(torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all())


class Kinds(unittest.TestCase):
    def untrained(self, name: str, change: Any = None) -> dict[str, str]:
        directory = temporary_directory() / name
        model = toy_architectures.model(name)
        if change:
            with torch.no_grad():
                change(model)
        with logger.quiet_transformers():
            model.save_pretrained(directory)
            toy_architectures.tokenizer().save_pretrained(directory)
        return measured(fetched(directory)).untrained

    def test_a_module_whose_gradient_is_zero_is_named_and_what_is_adaptable_is_not(self) -> None:
        def silent(model: Any) -> None:
            for layer in model.model.layers:
                layer.mlp.down_proj.weight.zero_()

        zero = gradient_measures.ZERO
        self.assertEqual(self.untrained("llama", silent), {"gate_proj": zero, "up_proj": zero})
        self.assertEqual(self.untrained("llama"), {})

        def one_layer(model: Any) -> None:
            model.model.layers[1].mlp.down_proj.weight.zero_()

        self.assertEqual(self.untrained("llama", one_layer), {}, "what one layer lacks others have")

    def test_what_is_said_is_what_the_training_loop_would_find(self) -> None:
        """By PEFT's own layers, after the first step."""
        from config import LoraSection
        from utils.adapters import peft_model
        from utils.models.losses import NextTokenLoss

        for name in ("qwen2_moe", "jamba", "gpt2", "gpt_oss"):
            with self.subTest(name):
                self.assertEqual(self.untrained(name), {})
                model = peft_model.attach(toy_architectures.model(name).requires_grad_(False), "d", LoraSection(rank=2))
                row_support.attach(model, row_support.ALONE)
                ids = torch.randint(3, 600, (1, 60), generator=torch.Generator().manual_seed(0))
                NextTokenLoss(model)(ids, torch.arange(60)[None], ids.roll(-1, 1)).backward()
                refuse_without_gradient(peft_model.trainable_parameters(model))

    def test_layers_counted_in_other_words_and_attention_over_experts_are_probed(self) -> None:
        """Two words for the number of layers, none but the list of their kinds, `top_k` above the experts."""
        for name in ("xlstm", "nemotron_h", "jetmoe"):
            with self.subTest(name):
                found = measured(fetched(toy_architectures.build(name, temporary_directory() / name)))
                self.assertEqual((found.why, found.untrained), ("", {}))

    def test_memory_that_runs_out_and_what_is_no_model_of_modules_refuse_nothing(self) -> None:
        for error in (MemoryError(), RuntimeError("can't allocate memory: 8 bytes"), AttributeError("x")):
            with mock.patch.object(gradient_measures, "_step", side_effect=error):
                self.assertEqual(self.untrained("llama"), {})

    def test_the_probe_leaves_no_trace(self) -> None:
        model = toy_architectures.model("llama").requires_grad_(False)
        state, before = torch.random.get_rng_state(), {n: p.clone() for n, p in model.named_parameters()}
        gradient_measures.untrained(model, RowSupport(), [[[5, 6, 7], [8, 9]], [[4, 3]]], 2)
        self.assertTrue(torch.equal(state, torch.random.get_rng_state()))
        self.assertFalse(any(module._forward_hooks for module in model.modules()))
        self.assertFalse(model.training or any(p.grad is not None or p.requires_grad for p in model.parameters()))
        self.assertTrue(all(torch.equal(p, before[n]) for n, p in model.named_parameters()))


class Remembered(unittest.TestCase):
    def test_what_an_earlier_version_remembered_is_measured_anew(self) -> None:
        directory = toy_architectures.build("llama", temporary_directory() / "llama")
        base = fetched(directory)
        with mock.patch.object(row_probe, "METHOD", 2):
            old = measured(base)
        values = dataclasses.asdict(old)
        del values["untrained"]
        self.assertEqual(RowSupport(**values), old)
        self.assertEqual(measured(base), old)


if __name__ == "__main__":
    unittest.main()
