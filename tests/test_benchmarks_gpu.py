"""The gpu suite without a GPU: its whole path at toy size, its shapes and its arithmetic at real size."""

from __future__ import annotations

import json
import unittest
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from config import tiny_minimax_m2
from tests.support import Workspace, last_json
from utils.benchmarks import suite_gpu
from utils.benchmarks.gpu_scale import REAL, ROOM, TOY, extrapolation, most_layers, predicted, sizes
from utils.exceptions import ConfigError
from utils.models.model_shapes import GIB
from utils.planning import estimates, pass_times, training_plan


class Shapes(unittest.TestCase):
    def test_real_scale_is_minimax_m2_at_its_width_and_a_dense_model_of_a_billion(self) -> None:
        self.assertEqual(sizes(REAL, 62).total, 228_689_748_992)
        self.assertEqual((REAL.sequence_tokens, REAL.most_layers, REAL.experts.rank), (4096, 16, 8))
        with torch.device("meta"):
            dense = LlamaForCausalLM(LlamaConfig(**REAL.dense))
        self.assertEqual(sum(p.numel() for p in dense.parameters()), 1_235_814_400)

    def test_layers_are_the_most_whose_prediction_fits_and_experts_get_fewer(self) -> None:
        found = {}
        for memory in (40, 79, 139, 500):
            for name, lora in (("attention", REAL.attention), ("experts", REAL.experts)):
                layers = found[memory, name] = most_layers(REAL, lora, memory * GIB)
                room = ROOM * memory * GIB
                self.assertLessEqual(predicted(REAL, layers, lora, "bfloat16", careful=True).total, room)
                if layers < REAL.most_layers:
                    self.assertGreater(predicted(REAL, layers + 1, lora, "bfloat16", careful=True).total, room)
        self.assertEqual(found[500, "attention"], 16)
        self.assertTrue(all(found[memory, "experts"] < found[memory, "attention"] for memory in (40, 79, 139)), found)
        with self.assertRaises(ConfigError):
            most_layers(REAL, REAL.attention, 8 * GIB)

    def test_extrapolation_is_the_reached_share_of_the_peak_over_the_whole_model_s_operations(self) -> None:
        found = extrapolation({"hardware_utilisation": 0.2, "measured_to_predicted": 1.0}, tflops=1000.0)
        per_token = pass_times.flops_per_token(sizes(REAL, 62), row_tokens=4096, checkpointing=True)
        computing = 4096 * per_token / 0.2e15
        gathering = 2 * 7 / 8 * estimates.weight_bytes(sizes(REAL, 62), "bfloat16") / 400e9
        rates = found["tokens_per_second"]
        self.assertAlmostEqual(rates["hidden"] / (8 * 4096 / max(computing, gathering)), 1, delta=2e-3)
        self.assertAlmostEqual(rates["not_hidden"] / (8 * 4096 / (computing + gathering)), 1, delta=2e-3)
        self.assertLess(rates["not_hidden"], rates["hidden"])

    def test_without_a_gpu_it_says_what_it_needs_and_what_fp8_lacks(self) -> None:
        with self.assertRaises(ConfigError) as caught:
            suite_gpu.refuse(tiny_minimax_m2())
        self.assertRegex(str(caught.exception), r"a GPU with at least \d+ GiB.*none is visible")
        self.assertIn("--benchmark.gpu_toy true", str(caught.exception))
        self.assertIn("no GPU", suite_gpu.fp8_missing())


class Script(unittest.TestCase):
    def test_refused_without_a_gpu_before_anything_is_made(self) -> None:
        place = Workspace()
        refused = place.run("benchmark", "--benchmark.suite", "gpu")
        self.assertEqual(refused.returncode, 2)
        self.assertIn("the gpu suite needs a GPU", refused.stderr)
        self.assertFalse((place.models / "benchmark").exists())

    def test_at_toy_size_every_part_is_measured(self) -> None:
        place = Workspace()
        flags = ["--benchmark.suite", "gpu", "--benchmark.gpu_toy", "true", "--benchmark.gpu_steps", "2"]
        completed = place.run("benchmark", *flags)
        found = json.loads((Path(last_json(completed)["report"]) / "results.json").read_text())["gpu"]
        self.assertTrue(found["toy"])
        for name, lora in (("attention", TOY.attention), ("experts", TOY.experts)):
            run = found["minimax_m2"][name]
            wanted = estimates.lora_parameters(sizes(TOY, 2), training_plan.adapter(lora))
            self.assertEqual(
                (run["layers"], run["counted_steps"], run["trainable_parameters"]), (2, 2, sum(wanted.values()))
            )
            self.assertGreater(run["hardware_utilisation"], run["model_utilisation"])
            self.assertGreater(run["model_utilisation"], 0)
            low, high = run["predicted_bytes"]
            self.assertTrue(0 < low <= high < run["peak_memory_bytes"], "a process on a CPU holds the libraries too")
        self.assertIn("no GPU", found["minimax_m2"]["fp8"]["skipped"])
        for parity in (found["parity_minimax_m2"], found["parity_dense"]):
            self.assertLess(parity["parts_active_to_composed"], 1e-4)
            self.assertGreater(parity["composed_to_base"], 1e-3)
        self.assertLess(found["merge"]["max_logit_difference"], 1e-4 * found["merge"]["largest_logit"])
        self.assertLessEqual({"ours", "plain"}, found["training"]["contenders"].keys())
        self.assertEqual(set(found["inference"]["cells"][0]["models"]), {"base", "two active", "composed", "merged"})
        for said in ("these numbers mean nothing", "not measured: no GPU", "62 layers on 8 GPUs", "float32 parity"):
            self.assertIn(said, completed.stdout)


if __name__ == "__main__":
    unittest.main()
