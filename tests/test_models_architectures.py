"""What is peculiar to an architecture stands in its own module, and every hook decides something that is seen here."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
import subprocess
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from config import ATTENTION, BaseModelSection
from tests.support import expert_factors, random_factors, relative, temporary_directory
from tests.test_architecture import ROOT, House, imports, our_house, sources
from utils import cli, logger
from utils.exceptions import ArtefactError
from utils.export import merge, merge_plan
from utils.models import directory_checks, loading
from utils.models.architectures import minimax_m2, qwen3_moe, registry, toy
from utils.models.base_model import BaseModel
from utils.planning import dry_run, preflight
from utils.planning.memory import count_parameters

HOME = ROOT / "utils" / "models" / "architectures"
# the benchmarks' subject is MiniMax-M2 itself: they build it, whatever model the settings name
BUILDS_ONE = {"benchmarks.gpu_scale"}
QWEN3_30B = {  # Qwen/Qwen3-30B-A3B's config.json, its shape part
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
IDS = torch.randint(8, 700, (2, 16), generator=torch.Generator().manual_seed(3))


def saved(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
    """A toy Qwen3-MoE on disk, with these settings changed in its config.json; None removes one."""
    directory = temporary_directory() / "qwen3-moe"
    model, tokenizer = toy.tiny_qwen3_moe()
    with logger.quiet_transformers():
        model.to(dtype).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    found = json.loads((directory / "config.json").read_text()) | settings
    kept = {key: value for key, value in found.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


def by_name(path: Path) -> Iterator[str]:
    """Where a file asks which architecture a model has: comparisons, cases and module-level tables with its name."""

    def names(node: ast.AST | None) -> bool:
        found = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant)) if node else ()
        return any(
            isinstance(value, str) and (value in registry.KNOWN or "minimax" in value.lower()) for value in found
        )

    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        asks = called and node.func.attr in ("startswith", "endswith", "fullmatch", "match", "search")
        if (isinstance(node, (ast.Compare, ast.MatchValue)) or asks) and names(node):
            yield f"{path.name}:{node.lineno}"
    for node in tree.body:
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if isinstance(value, ast.Dict) and any(names(key) for key in value.keys):
            yield f"{path.name}:{node.lineno}"


class OneHome(unittest.TestCase):
    def test_every_row_is_an_architecture_of_transformers_in_a_module_of_its_name(self) -> None:
        for model_type, architecture in registry.KNOWN.items():
            self.assertIn(model_type, CONFIG_MAPPING_NAMES)
            self.assertTrue((HOME / f"{model_type}.py").is_file(), model_type)
            self.assertNotEqual(architecture, registry.USUAL)
            self.assertIs(registry.of(model_type), architecture)
        for other in ("llama", "", None, 3, ["minimax_m2"], {}):
            self.assertIs(registry.of(other), registry.USUAL)

    def test_nothing_outside_asks_for_an_architecture_by_its_name(self) -> None:
        outside = [path for path in (*sources("utils"), *sources("scripts")) if HOME not in path.parents]
        self.assertGreater(len(outside), 100)
        self.assertEqual([place for path in outside for place in by_name(path)], [])
        house: House = our_house()
        own = {f"models.architectures.{model_type}" for model_type in registry.KNOWN}
        used = {m for m, targets in house.edges.items() if own & set(targets) and "architectures" not in m}
        self.assertEqual(used, BUILDS_ONE)
        self.assertEqual([path for path in outside if "config.is_minimax_m2" in set(imports(path))], [])

    def test_asking_by_name_is_found(self) -> None:
        path = temporary_directory() / "asks.py"
        for text in (
            'if settings.get("model_type") == "minimax_m2":\n    pass\n',
            'def f(kind):\n    return kind in ("llama", "qwen3_moe")\n',
            'wraps = sizes.layer_class != "MiniMaxM2DecoderLayer"\n',
            'match kind:\n    case "minimax_m2":\n        pass\n',
            'FLOAT32 = {"minimax_m2": ("gate",)}\n',
            'found = name.startswith("MiniMax")\n',
        ):
            path.write_text(text)
            self.assertEqual(len(list(by_name(path))), 1, text)
        path.write_text('results = {}\nresults["minimax_m2"] = 1\nsettings = f(model_type="minimax_m2")\n')
        self.assertEqual(list(by_name(path)), [])

    def test_a_dry_run_asks_the_registry_without_torch(self) -> None:
        code = (
            "import sys; from utils.models.architectures import registry; from utils.planning import dry_run; "
            "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout.strip(), "[]")


class Qwen3Moe(unittest.TestCase):
    """The toy has a dense layer first, heads wider than hidden / heads, and experts narrower than the dense layer."""

    def test_sizes_are_those_of_the_model_that_transformers_builds(self) -> None:
        model, _ = toy.tiny_qwen3_moe()
        parameters = dict(model.named_parameters())
        in_experts = sum(p.numel() for name, p in parameters.items() if ".experts." in name)
        directory = saved()
        found = preflight._understood(json.loads((directory / "config.json").read_text()))
        self.assertEqual(found.total, sum(p.numel() for p in parameters.values()))
        self.assertEqual(found.active, found.total - in_experts * 4 // 6)
        self.assertEqual(found, count_parameters.of_config(model.config))
        self.assertEqual(type(model.model.layers[0]).__name__, found.layer_class)

    def test_sizes_follow_every_setting_that_changes_them(self) -> None:
        shape = toy.tiny_qwen3_moe()[0].config.to_dict()
        for changed in (
            {"mlp_only_layers": []},
            {"mlp_only_layers": [], "decoder_sparse_step": 2},
            {"mlp_only_layers": [0, 2]},
            {"mlp_only_layers": [0, 1, 2]},
            {"num_local_experts": 0},
            {"attention_bias": True},
            {"tie_word_embeddings": True},
            {"head_dim": 16, "intermediate_size": 512},
        ):
            with self.subTest(changed):
                settings = shape | changed
                self.assertEqual(qwen3_moe.sizes(settings), count_parameters.of_settings(settings))

    def test_the_published_model_is_counted_from_its_file_as_qwen_names_it(self) -> None:
        found = qwen3_moe.sizes(QWEN3_30B)
        self.assertEqual(found, count_parameters.of_config(Qwen3MoeConfig(**QWEN3_30B)))
        # hence its name, 30B-A3B
        self.assertEqual((found.total, found.active), (30_532_122_624, 3_353_032_704))

    def test_a_dry_run_says_its_size_from_config_json_alone(self) -> None:
        directory = saved()
        sizes = count_parameters.of_config(toy.tiny_qwen3_moe()[0].config)
        config = cli.resolve(["--preset", "tiny_minimax_m2", "--base.source", str(directory)], {})
        says = f"qwen3_moe: {sizes.total:,} parameters ({sizes.active:,} active per token)"
        with mock.patch.object(torch.nn.Linear, "__init__", side_effect=AssertionError("a model was built")):
            self.assertIn(says, dry_run.lines(config, "train_domain_adapter")[0])
        # sizes are not MiniMax-M2's arithmetic, and nothing is said of an architecture without the hook
        other = minimax_m2.sizes(QWEN3_30B | {"num_local_experts": 128})
        self.assertNotEqual(other.parameters, qwen3_moe.sizes(QWEN3_30B).parameters)
        with mock.patch.dict(registry.KNOWN, {"qwen3_moe": registry.USUAL}):
            self.assertEqual(dry_run.lines(config, "train_domain_adapter"), [])
        for broken in ({"hidden_size": None}, {"num_attention_heads": "four"}):
            damaged = cli.resolve(["--preset", "tiny_minimax_m2", "--base.source", str(saved(**broken))], {})
            with self.assertRaisesRegex(ArtefactError, "do not follow from its config.json"):
                dry_run.lines(damaged, "plan")

    def test_routers_are_loaded_and_merged_in_the_dtype_of_the_rest(self) -> None:
        base = BaseModel(saved(torch.bfloat16), "qwen", "", "d" * 64, "e" * 64)
        section = BaseModelSection(source=str(base.directory), name="qwen", dtype="bfloat16")
        model = loading.load_model(base, section)
        self.assertEqual(model.model.layers[1].mlp.gate.weight.dtype, torch.bfloat16)
        factors = random_factors(model, ATTENTION, 2, 4.0, seed=1) | expert_factors(model, 2, 4.0, seed=2)
        for dtype, stored in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("base", torch.bfloat16)):
            with self.subTest(dtype):
                found = merged(base, factors, dtype)
                self.assertEqual(len([name for name in found if name.endswith("mlp.gate.weight")]), 2)
                self.assertEqual({name: tensor.dtype for name, tensor in found.items() if tensor.dtype != stored}, {})
        with mock.patch.dict(registry.KNOWN, {"qwen3_moe": registry.USUAL}):
            usual = merged(base, factors, "float32")  # a router of an unknown architecture stays as it was stored
        self.assertEqual(usual["model.layers.1.mlp.gate.weight"].dtype, torch.bfloat16)

    def test_without_norm_topk_prob_another_model_is_built_and_the_directory_is_refused(self) -> None:
        directory = saved(torch.float32)
        right = AutoModelForCausalLM.from_pretrained(directory)
        self.assertEqual(directory_checks.problems(directory), [])
        lacking = temporary_directory() / "lacking"
        shutil.copytree(directory, lacking)
        settings = json.loads((lacking / "config.json").read_text())
        del settings["norm_topk_prob"]
        (lacking / "config.json").write_text(json.dumps(settings))
        wrong = AutoModelForCausalLM.from_pretrained(lacking)
        with torch.no_grad():
            self.assertGreater(relative(wrong(IDS).logits, right(IDS).logits), 0.1, "mended in transformers")
        (problem,) = directory_checks.problems(lacking)
        self.assertIn("config.json has no norm_topk_prob", problem.what)
        with mock.patch.dict(registry.KNOWN, {"qwen3_moe": registry.USUAL}):
            self.assertEqual(directory_checks.problems(lacking), [])


class MiniMaxM2(unittest.TestCase):
    def test_hooks_that_other_tests_hold_are_not_the_usual_ones(self) -> None:
        """Held by test_models_silent_failures (loading), test_planning_plan and test_data_label_masks (pad)."""
        usual = {field.name: getattr(registry.USUAL, field.name) for field in dataclasses.fields(registry.USUAL)}
        own = {name for name, value in usual.items() if getattr(registry.of("minimax_m2"), name) != value}
        self.assertEqual(own, set(usual) - {"kept_in_merge", "older_names"})
        qwen = {name for name, value in usual.items() if getattr(registry.of("qwen3_moe"), name) != value}
        self.assertEqual(qwen, {"sizes", "missing_settings", "kept_in_merge", "older_names"})
        for name in qwen:
            self.assertNotEqual(getattr(registry.of("qwen3_moe"), name), getattr(registry.of("minimax_m2"), name))

    def test_its_published_model_is_known_by_its_source(self) -> None:
        for source in ("MiniMaxAI/MiniMax-M2", "/models/minimax-m2"):
            self.assertEqual(registry.published(source).title, "MiniMax-M2")
        for source in ("toy:minimax_m2", "MiniMaxAI/MiniMax-M25", "Qwen/Qwen3-30B-A3B", "wheel:x==1"):
            self.assertIsNone(registry.published(source), source)


def merged(base: Any, factors: Any, dtype: str) -> dict[str, torch.Tensor]:
    """The tensors that a merge writes."""
    directory = temporary_directory()
    merge.write(merge_plan.plan(base, factors, dtype), directory, card="")
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


if __name__ == "__main__":
    unittest.main()
