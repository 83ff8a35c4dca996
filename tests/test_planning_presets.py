"""Presets by size and by node: what they hold follows a source or the plan, and a model gets the one for its size."""

from __future__ import annotations

import json
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from config import AUTO, PRESETS, Config, reason_of
from tests.support import temporary_directory
from utils import cli
from utils.exceptions import ArtefactError, ConfigError
from utils.models.architectures import minimax_m2, qwen3_moe, size_class
from utils.planning import fitting_settings, plan_report, planned_data, preflight
from utils.planning.memory import native_fp8

M2 = minimax_m2.sizes(minimax_m2.PUBLISHED)
SIZES = ("size_0_5b", "size_2b", "size_8b", "size_30b_a3b", "size_70b")
# hidden, inner, layers, heads, key heads, vocabulary, tied: published shapes, and the preset for them
DENSE = {
    "SmolLM2 135M": (576, 1536, 30, 9, 3, 49_152, True, None),
    "Qwen2.5 0.5B": (896, 4864, 24, 14, 2, 151_936, True, "size_0_5b"),
    "Llama 3.2 1B": (2048, 8192, 16, 32, 8, 128_256, True, "size_2b"),
    "Qwen3 1.7B": (2048, 6144, 28, 16, 8, 151_936, True, "size_2b"),
    "Qwen3 4B": (2560, 9728, 36, 32, 8, 151_936, True, "size_8b"),
    "Llama 3.1 8B": (4096, 14_336, 32, 32, 8, 128_256, False, "size_8b"),
    "Qwen3 14B": (5120, 17_408, 40, 40, 8, 151_936, False, "size_8b"),
    "Qwen3 32B": (5120, 25_600, 64, 64, 8, 151_936, False, "size_70b"),
    "Llama 3.3 70B": (8192, 28_672, 80, 64, 8, 128_256, False, "size_70b"),
}
QWEN_30B: dict[str, Any] = {
    **{"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768},
    **{"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
    **{"num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151_936, "norm_topk_prob": True},
}


def dense(hidden: int, inner: int, layers: int, heads: int, keys: int, words: int, tied: bool) -> dict[str, Any]:
    return {
        **{"model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": words, "tie_word_embeddings": tied},
    }


def directory_with(settings: dict[str, Any]) -> Path:
    directory = temporary_directory()
    (directory / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


class BySize(unittest.TestCase):
    def test_published_shapes_get_the_preset_of_their_size(self) -> None:
        for name, (*shape, preset) in DENSE.items():
            self.assertEqual(size_class.preset_for(dense(*shape)), preset, name)
        self.assertEqual(size_class.preset_for(QWEN_30B), "size_30b_a3b")
        self.assertEqual(size_class.preset_for(minimax_m2.PUBLISHED), "minimax_m2")
        self.assertEqual(size_class.preset_for({"text_config": dense(*DENSE["Llama 3.1 8B"][:-1])}), "size_8b")
        for broken in ({}, {"hidden_size": "x"}, {"hidden_size": 8, "num_hidden_layers": 0, "num_attention_heads": 0}):
            self.assertIsNone(size_class.preset_for(broken), broken)

    def test_counts_are_close_to_the_exact_ones(self) -> None:
        for exact, settings in (
            (M2.total, minimax_m2.PUBLISHED | {"moe_intermediate_size": None}),
            (qwen3_moe.sizes(QWEN_30B).total, QWEN_30B),
        ):
            billions, is_mixture = size_class.parameters(settings)
            self.assertTrue(is_mixture)
            self.assertLess(abs(billions * 1e9 / exact - 1), 0.02)

    def test_a_directory_of_one_s_own_gets_its_preset_and_a_named_one_wins(self) -> None:
        large = directory_with(dense(*DENSE["Llama 3.1 8B"][:-1]))
        found = cli.resolve([f"--base.source={large}"], {})
        self.assertEqual((found.preset, found.domain.train.learning_rate), ("size_8b", 2e-4))
        self.assertEqual(cli.resolve([], {"DTA_BASE__SOURCE": str(large)}).preset, "size_8b")
        named = cli.resolve([f"--base.source={large}", "--preset=smollm2_135m"], {})
        self.assertEqual((named.preset, named.domain.train.learning_rate), ("smollm2_135m", 1e-3))
        small = directory_with(dense(*DENSE["SmolLM2 135M"][:-1]))
        self.assertEqual(cli.resolve([f"--base.source={small}"], {}).preset, "smollm2_135m")

    def test_a_hub_id_that_was_fetched_before_is_read_in_the_cache(self) -> None:
        cache, commit = temporary_directory(), "a" * 40
        snapshot = cache / "models--some--model" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps(QWEN_30B))
        self.assertEqual(size_class.config_of("some/model", commit, {"HF_HUB_CACHE": str(cache)}), QWEN_30B)
        self.assertIsNone(size_class.config_of("some/model", "b" * 40, {"HF_HUB_CACHE": str(cache)}))
        self.assertIsNone(size_class.config_of("wheel:some==1", "", {"HF_HUB_CACHE": str(cache)}))

    def test_a_hub_id_that_is_counted_only_when_it_is_fetched_is_not_trained_like_the_laptop_s(self) -> None:
        config = cli.resolve(["--base.source=some/model", f"--base.revision={'a' * 40}"], {})
        self.assertEqual(config.preset, "smollm2_135m")
        with mock.patch.object(preflight, "_quick", return_value=qwen3_moe.sizes(QWEN_30B)):
            with self.assertRaisesRegex(ConfigError, "--preset size_30b_a3b"):
                preflight.check(config, loads_model=False, stage="domain")
            preflight.check(config, loads_model=False)  # what does not train is not concerned
            own = cli.resolve(["--base.source=some/model", "--domain.train.learning_rate=3e-4"], {})
            preflight.check(own, loads_model=False, stage="domain")

    def test_a_size_needs_a_base_model(self) -> None:
        for name in SIZES:
            with self.assertRaisesRegex(ConfigError, f"--preset {name} is for any base model.*\n.*--base.source"):
                cli.resolve(["--preset", name], {})
            found = cli.resolve(["--preset", name, "--base.source", "somewhere"], {})
            self.assertEqual(found.base.source, "somewhere")
            with self.assertRaisesRegex(ConfigError, "names no base model"):
                preflight.start(PRESETS[name]())

    def test_larger_models_learn_in_smaller_and_longer_steps_and_say_why(self) -> None:
        rates = [PRESETS[name]().domain.train.learning_rate for name in SIZES]
        tokens = [PRESETS[name]().domain.train.batch_tokens for name in SIZES]
        self.assertEqual((rates, tokens), (sorted(rates, reverse=True), sorted(tokens)))
        self.assertEqual(PRESETS["size_30b_a3b"]().domain.lora.target_modules, (AUTO,))
        for name in SIZES:
            found = PRESETS[name]()
            for stage in ("domain", "task"):
                self.assertIn(f"{getattr(found, stage).train.batch_tokens:,}", reason_of(name))
            self.assertRegex(reason_of(name), "learning rate .*(QLoRA|small models|dense models)")

    def test_the_laptop_s_values_are_kept(self) -> None:
        found = Config().domain.train
        # 0: the row length is the one that prepare_data chose, 256 for the demo
        self.assertEqual((found.learning_rate, found.batch_tokens, found.max_sequence_tokens), (1e-3, 1024, 0))

    def test_the_revision_of_a_preset_is_not_taken_for_another_repository(self) -> None:
        self.assertEqual(len(cli.resolve(["--preset=minimax_m2"], {}).base.revision), 40)
        later = cli.resolve(["--preset=minimax_m2", "--base.source=MiniMaxAI/MiniMax-M2.5"], {})
        self.assertEqual(later.base.revision, "")
        same = cli.resolve(["--preset=minimax_m2", "--base.source=MiniMaxAI/MiniMax-M2"], {})
        self.assertEqual(len(same.base.revision), 40)


class Fp8(unittest.TestCase):
    def test_the_package_that_is_missing_is_named_in_a_version_that_transformers_takes(self) -> None:
        from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION

        self.assertEqual(native_fp8.KERNELS, f"kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}")
        facts = native_fp8.Facts(capability=(9, 0), kernels="no kernels", on_experts=False, computes_in="bfloat16")
        with self.assertRaisesRegex(ArtefactError, "pip install 'kernels>=") as caught:
            native_fp8.choose("native", facts)
        self.assertIn("no kernels", str(caught.exception))
        self.assertFalse(native_fp8.choose("auto", facts).native)


class ByNode(unittest.TestCase):
    def test_the_presets_of_nodes_hold_what_the_plan_chooses(self) -> None:
        for name, gpus in (("minimax_m2_8x80", 8), ("minimax_m2_8x141", 8), ("minimax_m2_2x8", 16)):
            config = PRESETS[name]()
            self.assertEqual(config.plan.gpus * config.plan.nodes, gpus)
            hardware = [
                f"--plan.{field}={getattr(config.plan, field)}" for field in ("nodes", "gpus", "gpu_memory_gib")
            ]
            chosen = fitting_settings.find(cli.resolve(["--preset=minimax_m2", *hardware], {}), M2).config
            ours = config.model_dump(exclude={"preset", "overrides"})
            self.assertEqual(chosen.model_dump(exclude={"preset", "overrides"}), ours, name)
            again = plan_report.report(config, M2, planned_data.of(config))[1]
            self.assertEqual(again["stages"]["domain"]["settings"], [], name)
            self.assertNotEqual(again["verdict"], "no")


if __name__ == "__main__":
    unittest.main()
