"""Folders as Unsloth, torchtune, NeMo, MLX-LM and PEFT's other methods leave them: read as PEFT reads them, or refused
with a command that works."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.support import relative, temporary_directory
from tests.test_adapters_other_tools import (
    AN_EFFECT,
    CONFIG,
    LLAMA,
    ROUNDING,
    WEIGHTS,
    base_of,
    by_hand,
    changed,
    foreign,
    fresh,
    good_adapter,
    logits,
    lora,
    made_by_peft,
    written,
)
from utils.adapters import adapter_files, other_tools, parent_runs
from utils.exceptions import ArtefactError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
UNSLOTH_TARGETS = (
    r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"
)


class Read(unittest.TestCase):
    """Each configuration as the tool writes it, beside tensors of stock PEFT: logits of PEFT's own loading."""

    def test_configurations_that_other_tools_write(self) -> None:
        everything = json.loads((good_adapter(LLAMA) / CONFIG).read_text())
        mapping = {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        }
        paths = [f"model.layers.{layer}.self_attn.{leaf}" for layer in (0, 1) for leaf in ("q_proj", "v_proj")]
        minimal = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
        cases: dict[str, dict[str, Any]] = {
            "Unsloth": {**everything, "auto_mapping": mapping, "task_type": None, "target_modules": UNSLOTH_TARGETS},
            "torchtune": {**minimal, "base_model_name_or_path": "org/model"},
            "NeMo AutoModel": {**minimal, "task_type": "CAUSAL_LM", "bias": "none", "target_modules": paths},
            "NeMo, from a dictionary of PEFT": {**everything, "base_model_name_or_path": None, "revision": None},
            "Axolotl": {**everything, "fan_in_fan_out": None, "lora_dropout": 0.05, "modules_to_save": []},
            "LLaMA-Factory, rsLoRA": {**everything, "use_rslora": True, "layers_to_transform": None},
        }
        plain = logits(fresh(base_of(LLAMA)))
        for tool, settings in cases.items():
            with self.subTest(tool):
                directory = changed(good_adapter(LLAMA))
                (directory / CONFIG).write_text(json.dumps(settings))
                expected = logits(PeftModel.from_pretrained(fresh(base_of(LLAMA)), str(directory)))
                self.assertGreater(relative(expected, plain), AN_EFFECT)
                found = adapter_files.load(directory, base_of(LLAMA))
                self.assertLess(relative(by_hand(base_of(LLAMA), found), expected), ROUNDING)
                self.assertEqual(foreign(base_of(LLAMA), directory).manifest["identity"]["on"], parent_runs.EXTERNAL)


class Refused(unittest.TestCase):
    def refusal(self, directory: Path) -> str:
        with self.assertRaises(ArtefactError) as caught:
            foreign(base_of(LLAMA), directory)
        self.assertEqual(len(caught.exception.problems), 1, str(caught.exception))
        return str(caught.exception)

    def test_the_command_for_pickled_weights_makes_the_adapter_that_they_hold(self) -> None:
        directory = temporary_directory() / "pickled weights"
        made_by_peft(base_of(LLAMA), lora()).save_pretrained(directory, safe_serialization=False)
        command = self.refusal(directory).partition("no code of them: ")[2]
        self.assertTrue(command.startswith("python -c "), command)
        done = subprocess.run([sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        expected = load_file(good_adapter(LLAMA) / WEIGHTS)
        for name, tensor in load_file(directory / WEIGHTS).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
        self.assertEqual(
            set(adapter_files.load(directory, base_of(LLAMA))), set(adapter_files.load(good_adapter(LLAMA)))
        )

    def test_the_command_runs_no_code_of_a_pickle(self) -> None:
        directory = changed(good_adapter(LLAMA))
        (directory / WEIGHTS).unlink()
        harm = directory / "harm"
        torch.save({"x": _Harm(harm)}, directory / other_tools.PICKLED)
        command = shlex.split(self.refusal(directory).partition("no code of them: ")[2])
        done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
        self.assertIn("Unsupported", done.stderr)
        self.assertFalse(harm.exists() or (directory / WEIGHTS).exists())

    def test_adapters_of_mlx_lm_are_named_as_that(self) -> None:
        directory = temporary_directory() / "adapters"
        directory.mkdir()
        pair = {f"{Q}.lora_a": torch.randn(64, 4), f"{Q}.lora_b": torch.randn(4, 64)}
        save_file(pair, directory / "adapters.safetensors")
        settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 20.0}}
        (directory / CONFIG).write_text(json.dumps(settings))
        said = self.refusal(directory)
        self.assertIn("an adapter of MLX-LM", said)
        self.assertIn(f"mlx_lm.fuse --model BASE --adapter-path {directory} --save-path NEW", said)

    def test_other_methods_of_peft_are_one_problem_with_a_way_on(self) -> None:
        targets = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        for config in (
            peft.VeraConfig(r=4, **targets),
            peft.IA3Config(feedforward_modules=[], **targets),
            peft.LoKrConfig(r=4, **targets),
            peft.LoHaConfig(r=4, **targets),
            peft.AdaLoraConfig(total_step=10, **targets),
            peft.OFTConfig(oft_block_size=4, **targets),
        ):
            directory = temporary_directory() / "adapter"
            get_peft_model(fresh(base_of(LLAMA)), config).save_pretrained(directory)
            with self.subTest(config.peft_type):
                said = self.refusal(directory)
                self.assertIn(f"peft_type is not LORA (got '{config.peft_type.value}')", said)
                self.assertIn("merge_and_unload", said)

    def test_what_cannot_be_added_is_refused_with_the_merge_as_a_way_on(self) -> None:
        for config in (lora(use_dora=True), lora(bias="lora_only"), lora(trainable_token_indices=[1, 2])):
            with self.subTest(config):
                self.assertIn("give the result as --base.source", self.refusal(written(base_of(LLAMA), config)))

    def test_an_adapter_of_another_task_is_not_said_to_be_damaged(self) -> None:
        directory = changed(good_adapter(LLAMA), {"task_type": "SEQ_CLS"})
        self.assertIn("another task has another head", self.refusal(directory))


class _Harm:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


if __name__ == "__main__":
    unittest.main()
