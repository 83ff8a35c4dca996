"""Which modules are adapted, which class a checkpoint is and which attention it gets: asked of models of many kinds."""

from __future__ import annotations

import functools
import json
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Gemma3ForConditionalGeneration

from config import AUTO, BaseModelSection, EvaluateSection, LoraSection
from tests import toy_architectures
from tests.support import saved_model, temporary_directory
from utils import cli
from utils.adapters import peft_model
from utils.evaluation.documents import document_sets
from utils.exceptions import ArtefactError
from utils.models import base_model, chat, directory_checks, float32_model, loading, sources
from utils.models.base_model import BaseModel
from utils.models.structure import linear_modules, model_class
from utils.models.weights import tensor_names
from utils.planning import base_checks, preflight
from utils.planning.memory import count_parameters
from utils.training import training_identity

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# what auto has to find, written down from the modelling code
EXPECTED = {
    "llama": {*ATTENTION, *MLP},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "falcon": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "minimax_m2": set(ATTENTION),
    "phimoe": set(ATTENTION),
    "qwen2_moe": {*ATTENTION, *MLP},
    "llama4_text": {*ATTENTION, *MLP},
    "mamba": {"in_proj"},
    "jamba": {*ATTENTION, *MLP, "in_proj", "x_proj", "out_proj"},
    "gemma3": {*ATTENTION, *MLP},
    "mistral3": {*ATTENTION, *MLP},
    "jetmoe": {"kv_proj"},
    "deepseek_v32": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *MLP},
    "gemma3n_text": {*ATTENTION, *MLP, "linear_left", "linear_right", "per_layer_input_gate", "per_layer_projection"},
    "qwen3_5_moe": {*ATTENTION, *MLP, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"},
}
NEVER = ("vision", "visual", "lm_head", "router", "embed", "shared_expert_gate", "projector", ".experts.")


@functools.cache
def base_of(name: str) -> BaseModel:
    directory = toy_architectures.build(name, temporary_directory() / name)
    return sources.fetch(BaseModelSection(source=str(directory), dtype="float32"), directory.parent)


class Auto(unittest.TestCase):
    def test_every_linear_module_of_attention_and_mlp_and_nothing_else(self) -> None:
        for name, wanted in EXPECTED.items():
            with self.subTest(name):
                model = model_class.outline(base_of(name).directory)
                found = linear_modules.named(model, (AUTO,))
                self.assertEqual(set(linear_modules.leaves(found)), wanted)
                self.assertEqual([path for path in found if any(word in path for word in NEVER)], [])
                self.assertEqual(linear_modules.unplaced(base_of(name).directory, found), [])

    def test_what_is_attached_is_what_is_named_and_stays_the_same_with_adapters_on_it(self) -> None:
        model = toy_architectures.model("qwen2_moe").requires_grad_(False)
        wanted = linear_modules.named(model, (AUTO,))
        adapted = peft_model.attach(model, "domain", LoraSection(rank=2))
        self.assertEqual(set(peft_model.lora_layers(adapted, "domain")), set(wanted))
        self.assertEqual(linear_modules.named(adapted, (AUTO,)), wanted)

    def test_a_name_that_a_vision_tower_has_too_adapts_the_language_model_alone(self) -> None:
        settings = toy_architectures.SPECS["gemma3"][0]()
        settings.vision_config.hidden_size = settings.text_config.hidden_size  # so its width does not tell it
        model = Gemma3ForConditionalGeneration(settings).requires_grad_(False)
        there = [name for name, _ in model.named_modules() if name.endswith("self_attn.q_proj")]
        self.assertTrue(any("vision" in name for name in there))
        adapted = peft_model.attach(model, "domain", LoraSection(rank=2, target_modules=("q_proj", "v_proj")))
        layers = [f"model.language_model.layers.{n}.self_attn.{leaf}" for n in (0, 1) for leaf in ("q_proj", "v_proj")]
        self.assertEqual(sorted(peft_model.lora_layers(adapted, "domain")), layers)

    def test_auto_and_its_names_are_one_run(self) -> None:
        base = saved_model("llama")
        named = training_identity.adapted_modules(base, [*ATTENTION, *MLP], experts=False)
        self.assertEqual(training_identity.adapted_modules(base, [AUTO], experts=False), named)
        fewer = training_identity.adapted_modules(base, ATTENTION, experts=False)
        self.assertNotEqual(fewer, named)

    def test_a_name_that_cannot_be_adapted_is_refused_with_the_reason_and_what_there_is(self) -> None:
        for name, target, reason in (
            ("llama", "w1", "has no such module"),
            ("mamba", "out_proj", "also reads its weight itself"),
            ("phimoe", "router", "it is a router"),
        ):
            model = model_class.outline(base_of(name).directory)
            with self.subTest(name):
                (problem,) = linear_modules.problems(model, (target,))
                self.assertIn(reason, problem.what)
                self.assertTrue(problem.fix)
        self.assertEqual(linear_modules.problems(model_class.outline(base_of("llama").directory), ("q_proj",)), [])

    def test_plans_count_what_is_adapted(self) -> None:
        for name in ("gemma3", "gemma4_text", "gpt2", "qwen2_moe"):
            with self.subTest(name):
                base = base_of(name)
                sizes = count_parameters.of_settings(json.loads((base.directory / "config.json").read_text()))
                config = cli.resolve(["--base.source", str(base.directory)], {})
                adapted = peft_model.attach(toy_architectures.model(name).requires_grad_(False), "d", LoraSection())
                preflight.check_trainable(adapted, config, "domain", base)
                self.assertEqual(sizes.vocabulary, toy_architectures.VOCABULARY)


class Kinds(unittest.TestCase):
    """What is no part of attention or MLP, whatever it is called."""

    def test_blocks_that_weigh_lists_beside_the_layers_and_blocks_without_gradients_are_left_out(self) -> None:
        model = Streams(torch.nn.Module())
        reasons = linear_modules._judged(model)  # type: ignore[arg-type]
        for name, said in {
            "parts.0": "outside the decoder's layers",
            "parts.1": "outside the decoder's layers",
            "layers.0.mixing.share": "only weighs",
            "layers.0.attention.chooser.score": "Chooser computes without gradients",
            "layers.0.moe.gate.rank": "it is a router",
        }.items():
            self.assertIn(said, reasons[name])
        self.assertEqual(
            linear_modules.named(model, (AUTO,)),  # type: ignore[arg-type]
            ["layers.0.near", "layers.0.attention.into", "layers.0.attention.back", "layers.0.moe.into"],
        )


class Streams(torch.nn.Module):
    """Modules of a decoder that keeps several streams, chooses tokens, and routes through a gate of its own."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=32))
        self.words, self.parts = torch.nn.Embedding(8, 32), torch.nn.ModuleList([torch.nn.Linear(32, 32) for _ in "ab"])
        layer.near, layer.mixing = torch.nn.Linear(32, 6), torch.nn.Module()
        layer.mixing.share = torch.nn.Linear(32, 3)
        layer.attention, layer.moe = torch.nn.Module(), torch.nn.Module()
        layer.attention.into, layer.attention.back = torch.nn.Linear(32, 20), torch.nn.Linear(20, 32)
        layer.attention.chooser = Chooser()
        layer.moe.gate, layer.moe.into = torch.nn.Module(), torch.nn.Linear(32, 32)
        layer.moe.gate.rank, layer.moe.stack = torch.nn.Linear(32, 5), torch.nn.Module()
        layer.moe.stack.weight = torch.nn.Parameter(torch.zeros(5, 32, 7))
        self.layers = torch.nn.ModuleList([layer])

    def get_decoder(self) -> torch.nn.Module:
        return self

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.words

    def get_output_embeddings(self) -> None:
        return None


class Chooser(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = torch.nn.Linear(32, 4)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(x).topk(2, dim=-1).indices


class Classes(unittest.TestCase):
    def test_the_class_is_the_one_that_the_checkpoint_names(self) -> None:
        for name in ("gemma3", "mistral3", "qwen3_5_moe", "llama"):
            base = base_of(name)
            model = loading.load_model(base, BaseModelSection(source=str(base.directory), dtype="float32"))
            with self.subTest(name):
                self.assertEqual(type(model).__name__, toy_architectures.SPECS[name][1])
                own = {
                    n: p
                    for n, p in model.named_parameters()
                    if n in dict(toy_architectures.model(name).named_parameters())
                }
                self.assertEqual(set(own), {n for n, _ in toy_architectures.model(name).named_parameters()})

    def test_an_encoder_decoder_and_what_no_library_knows_are_refused(self) -> None:
        for settings, reason in (
            ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 32}, "has an encoder"),
            ({"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}, "reads in both directions"),
            ({"model_type": "electra", "architectures": ["ElectraForCausalLM"]}, "reads in both directions"),
            ({"model_type": "vit", "architectures": ["ViTModel"]}, "no language model for a vit"),
        ):
            directory = temporary_directory()
            (directory / "config.json").write_text(json.dumps(settings))
            with self.subTest(reason), self.assertRaisesRegex(ArtefactError, reason):
                model_class.skeleton(directory)

    def test_a_template_that_fails_is_named(self) -> None:
        from jinja2 import UndefinedError

        said = self.assertRaisesRegex(ArtefactError, "the chat template of the model in .* fails: 'bos_token'")
        with said, directory_checks.readable(temporary_directory()):
            raise UndefinedError("'bos_token' is undefined")


class Attention(unittest.TestCase):
    def test_auto_is_what_the_model_supports_in_checks_too(self) -> None:
        for name, wanted in (("gemma2", "eager"), ("gpt_oss", "eager"), ("llama", "sdpa")):
            base = base_of(name)
            section = BaseModelSection(source=str(base.directory), dtype="float32")
            with self.subTest(name):
                self.assertEqual(loading.attention_of(base, section), wanted)
                self.assertEqual(float32_model.in_float32(base, section).config._attn_implementation, wanted)

    def test_what_was_asked_for_is_kept_and_what_is_not_supported_is_refused_by_its_flag(self) -> None:
        base = base_of("llama")
        eager = BaseModelSection(source=str(base.directory), dtype="float32", attention="eager")
        self.assertEqual(float32_model.in_float32(base, eager).config._attn_implementation, "eager")
        config = cli.resolve(["--base.source", str(base_of("gemma2").directory), "--base.attention", "sdpa"], {})
        with self.assertRaisesRegex(ArtefactError, "base.attention sdpa(.|\n)*--base.attention auto"):
            base_checks.check(config, base_of("gemma2"), ())


class Refused(unittest.TestCase):
    def test_a_base_in_bits_of_another_tool_is_refused_at_once_with_the_way(self) -> None:
        for said, fix in (
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "--base.quantization nf4"),
            ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "--base.quantization int8"),
            ({"load_in_4bit": True}, "--base.quantization nf4"),
            ({"quant_method": "mxfp4"}, "16-bit model"),
            ({"quant_method": "gptq", "bits": 4}, "16-bit model"),
        ):
            directory = changed_settings("llama", quantization_config=said)
            with self.subTest(said), self.assertRaisesRegex(ArtefactError, f"is quantised already(.|\n)*{fix}"):
                base_model.identify(directory, str(directory), "", None)
        fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        self.assertEqual(directory_checks.quantised({"quantization_config": fp8}, "x"), [])

    def test_weights_that_layers_share_are_refused_with_the_names_that_remain(self) -> None:
        base = base_of("zamba2")
        with self.assertRaisesRegex(ArtefactError, "--domain.lora.target_modules in_proj,linear"):
            base_checks.check(cli.resolve(["--base.source", str(base.directory)], {}), base, ("domain",))

    def test_rows_longer_than_position_table_are_refused_before_training(self) -> None:
        base = base_of("gpt2")
        config = cli.resolve(["--base.source", str(base.directory), "--task.train.max_sequence_tokens", "600"], {})
        config = config.model_copy(update={"task": config.task})
        with self.assertRaisesRegex(ArtefactError, "task.train.max_sequence_tokens(.|\n)*512"):
            base_checks.check(config, base, ("task",))
        self.assertEqual(model_class.longest_row(base.directory, 4096), 512)
        opt = base_of("opt")  # its table has two rows more
        self.assertEqual(model_class.longest_row(opt.directory, 4096), 512)
        tokenizer = chat.load_tokenizer(opt.directory)
        texts = document_sets.general(EvaluateSection(), opt, tokenizer, 2, temporary_directory())
        self.assertEqual(max(texts.row_lengths(0)), 512)
        self.assertEqual(model_class.longest_row(base_of("llama").directory, 4096), 4096)

    def test_a_model_that_cannot_be_counted_is_said_and_goes_on(self) -> None:
        with self.assertLogs("adapters", "INFO") as said:
            self.assertIsNone(preflight._understood({"model_type": "llama", "hidden_size": -3}))
        self.assertIn("cannot be counted", " ".join(said.output))

    def test_numbers_that_json_spells_oddly_are_read(self) -> None:
        directory = changed_settings("falcon_h1", mlp_multipliers=[{"__float__": "Infinity"}, 1.0])
        settings = json.loads((directory / "config.json").read_text())
        self.assertEqual(count_parameters.of_settings(settings).num_layers, 2)


class Padding(unittest.TestCase):
    def test_a_pad_token_that_the_model_has_no_row_for_is_not_used(self) -> None:
        directory = changed_settings("llama")
        tokenizer = toy_architectures.tokenizer()
        tokenizer.add_special_tokens({"pad_token": "<added>"})
        tokenizer.save_pretrained(directory)
        self.assertEqual(tokenizer.pad_token_id, toy_architectures.VOCABULARY)
        found = chat.load_tokenizer(directory)
        self.assertEqual(chat.pad_id(found), found.eos_token_id)

    def test_a_token_that_every_prompt_needs_and_the_model_has_no_row_for_is_refused_by_name(self) -> None:
        directory = changed_settings("llama")
        for role, template in (
            ("additional_special_tokens", toy_architectures.CHATML.replace("<|im_start|>", "<added>")),
            ("eos_token", toy_architectures.CHATML),
        ):
            tokenizer = toy_architectures.tokenizer(template)
            tokenizer.add_special_tokens({role: ["<added>"] if role.endswith("s") else "<added>"})
            tokenizer.save_pretrained(directory)
            with self.subTest(role), self.assertRaisesRegex(ArtefactError, r"640 rows of embeddings(.|\n)*'<added>'"):
                chat.load_tokenizer(directory)


class Names(unittest.TestCase):
    def test_every_tensor_of_the_files_has_its_place_in_the_model(self) -> None:
        for name in ("gemma3", "mistral3", "qwen3_5", "granitemoe", "deepseek_v3", "gpt_oss", "bloom"):
            directory = base_of(name).directory
            there = tensor_names.tensor_shapes(directory)
            places = tensor_names.places(directory, there)
            model = dict(model_class.outline(directory).state_dict())
            with self.subTest(name):
                self.assertEqual([n for n, place in places.items() if not place.known], [])
                self.assertTrue({place.parameter for place in places.values()} <= set(model))

    def test_inputs_before_outputs_are_known(self) -> None:
        shapes = tensor_names.weight_shapes(base_of("gpt2").directory)
        self.assertEqual(shapes["transformer.h.0.attn.c_attn"], (192, 64))
        experts = tensor_names.weight_shapes(base_of("gpt_oss").directory)
        self.assertEqual(experts["model.layers.0.mlp.experts.gate_up_proj"], (4, 192, 64))


def changed_settings(name: str, **changed: Any) -> Path:
    """A directory with the toy's config.json, some settings changed, and its files."""
    source, directory = base_of(name).directory, temporary_directory() / name
    directory.mkdir()
    for path in source.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    settings = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, **changed}))
    return directory


if __name__ == "__main__":
    unittest.main()
