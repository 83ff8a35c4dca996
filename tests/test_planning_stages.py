"""The plan of every stage: what it says follows from the hardware and the shapes, and it finds a way where one is."""

from __future__ import annotations

import contextlib
import functools
import io
import runpy
import unittest
from typing import Any, ClassVar

from config import Config
from tests.support import ROOT, temporary_directory
from utils import cli
from utils.composition import search
from utils.composition.weights.points import Point
from utils.models.architectures import minimax_m2, qwen3_moe
from utils.models.model_shapes import GIB, ModelSizes
from utils.models.process_layout import ProcessLayout
from utils.planning import (
    estimates,
    fitting_settings,
    hardware,
    pass_times,
    plan_report,
    planned_data,
    smallest_hardware,
    stage_costs,
    training_plan,
)
from utils.planning.pass_times import ARITHMETIC, GATHERS, GRADIENTS
from utils.planning.stage_costs import StageCost

M2 = minimax_m2.sizes(minimax_m2.PUBLISHED)
STAGES = ("prepare", "domain", "task", "search", "evaluate", "asking", "merge", "serving")
NODES = {"8x80": [], "8x141": ["--plan.gpu_memory_gib=141"], "2x8": ["--plan.nodes=2"]}


def resolve(*flags: str, preset: str = "minimax_m2") -> Config:
    return cli.resolve(["--preset", preset, *flags], {})


def costs(*flags: str, sizes: ModelSizes = M2) -> dict[str, StageCost]:
    config = resolve(*flags)
    found = stage_costs.every_stage(fitting_settings.find(config, sizes), sizes, planned_data.of(config))
    return {cost.stage: cost for cost in found}


class EveryStage(unittest.TestCase):
    def test_minimax_m2_on_each_node_has_a_command_memory_and_time_for_every_stage_and_nothing_says_no(self) -> None:
        for name, flags in NODES.items():
            config = resolve(*flags)
            lines, facts = plan_report.report(config, M2, planned_data.of(config))
            self.assertEqual(tuple(facts["stages"]), STAGES, name)
            self.assertNotEqual(facts["verdict"], "no")
            for stage, found in facts["stages"].items():
                with self.subTest(f"{name}: {stage}"):
                    self.assertNotEqual(found["verdict"], "no")
                    self.assertIn(f"{stage}: {found['command']}", lines)
                    low, high = found["peak_bytes"]
                    if stage not in ("prepare", "merge"):
                        self.assertTrue(30 * GIB < low <= high)
                        self.assertLessEqual(low, hardware.of(config.plan).memory_bytes)
                    least, most = found["hours"]
                    self.assertTrue(0 < least <= most)
                    self.assertTrue(found["bound"])

    def test_the_commands_parse_and_name_files_that_exist(self) -> None:
        for flags in NODES.values():
            for stage, cost in costs(*flags).items():
                if stage == "serving":
                    continue
                words = cost.command.split()
                script = next(word for word in words if word.startswith("scripts/") and word.endswith(".py"))
                self.assertTrue((ROOT / script).is_file(), script)
                again = cli.resolve(words[words.index(script) + 1 :], {})
                self.assertEqual(again.preset, "minimax_m2")
                if "--config_file" in words:
                    self.assertTrue((ROOT / words[words.index("--config_file") + 1]).is_file())

    def test_one_gpu_says_no_with_exit_code_2_and_names_hardware_that_does(self) -> None:
        places = [f"--run.{name}={temporary_directory()}" for name in ("data_dir", "models_dir")]
        script = runpy.run_path(str(ROOT / "scripts" / "plan.py"))
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            result = script["main"](resolve("--plan.gpus=1", *places))
        self.assertEqual(script["status"](result), 2)
        self.assertIsNone(result["stages"]["domain"]["command"])
        self.assertIn("these GPUs cannot do it", told.getvalue())
        self.assertIn("--plan.gpus 8 --plan.gpu_memory_gib 80", told.getvalue())

    def test_the_form_of_the_weights_follows_the_hardware(self) -> None:
        expected = {"8x80": "fp8", "8x141": "bfloat16", "2x8": "bfloat16"}
        for name, flags in NODES.items():
            way = fitting_settings.find(resolve(*flags, "--run.expert_parallel=off"), M2)
            self.assertEqual((way.form.trained, way.form.scored), (expected[name], "bfloat16"), name)
            self.assertTrue(way.why[0])
            # with nothing of the experts gathered, bfloat16 fits on all of them
            self.assertEqual(fitting_settings.find(resolve(*flags), M2).form.trained, "bfloat16")
        self.assertIn("pip install 'kernels", fitting_settings.find(resolve("--run.expert_parallel=off"), M2).why[0])
        asked = fitting_settings.find(resolve("--base.fp8=dequantise"), M2)
        self.assertEqual(asked.form.trained, "bfloat16")  # what a person set stays
        old = fitting_settings.find(resolve("--plan.nodes=2", "--plan.gpu_memory_gib=40", "--plan.gpus=8"), M2)
        self.assertNotEqual(old.form.trained, "fp8")

    def test_prepared_data_and_settings_say_how_much_there_is(self) -> None:
        counts = {
            "documents": {
                "corpus": {"tokens": 5_000},
                "heldout_documents": {"documents": 4, "tokens": 4_000},
            },
            "examples": {split: {"examples": number} for split, number in (("train", 7), ("dev", 3), ("test", 9))},
        }
        found = planned_data.of(resolve("--plan.item_tokens=100"), counts)
        self.assertEqual((found.domain_tokens, found.task_tokens, found.document_tokens), (5_000, 700, 1_000))
        self.assertEqual((found.dev_items, found.test_items, found.heldout_documents), (3, 9, 4))
        given = planned_data.of(resolve("--plan.domain_tokens=11", "--plan.test_items=12"), counts)
        self.assertEqual((given.domain_tokens, given.test_items), (11, 12))


class Time(unittest.TestCase):
    """FSDP2 on eight GPUs as it was worked out by hand before this model was written."""

    def rates(self, tokens: int, *flags: str) -> tuple[float, float]:
        config = resolve(f"--domain.train.micro_batch_tokens={tokens}", *flags)
        what = training_plan.step(config, "domain", "bfloat16")
        machine = hardware.of(config.plan)
        return pass_times.training_pass(M2, what, ProcessLayout(1, 8), machine).rates(1)

    def test_minimax_m2_s_known_rates_per_gpu(self) -> None:
        for tokens, slow, fast in ((4096, 1_280, 2_050), (32_768, 2_840, 3_440)):
            for found, expected in zip(self.rates(tokens), (slow, fast), strict=True):
                self.assertLess(abs(found / expected - 1), 0.01, f"{found} instead of {expected}")

    def test_the_table_of_the_documentation_is_what_is_calculated(self) -> None:
        page = (ROOT / "docs" / "multi_gpu.md").read_text(encoding="utf-8")
        for flags, base, layout, tokens in (
            (["--plan.gpu_memory_gib=141"], "bfloat16", ProcessLayout(1, 8), 4_096),
            (["--plan.gpu_memory_gib=141"], "bfloat16", ProcessLayout(1, 8), 32_768),
            ([], "fp8", ProcessLayout(1, 8), 32_768),
            (["--plan.nodes=2"], "bfloat16", ProcessLayout(1, 16), 16_384),
        ):
            config = resolve(f"--domain.train.micro_batch_tokens={tokens}", *flags)
            machine, what = hardware.of(config.plan), training_plan.step(config, "domain", base)
            time = pass_times.training_pass(M2, what, layout, machine)
            low, high = (
                estimates.training_memory(M2, what, shards=layout.shard, careful=careful).total / GIB
                for careful in (False, True)
            )
            slow, fast = time.rates(1)
            row = f"| {tokens:,} | {slow:,.0f} to {fast:,.0f} | {low:.0f} to {high:.0f} | {time.bound} |"
            self.assertIn(row, page)

    def test_time_and_memory_follow_bandwidth_experts_and_memory(self) -> None:
        at_once = self.rates(4096, "--plan.node_bandwidth_gbs=1e9")
        self.assertAlmostEqual(at_once[0], at_once[1], delta=1)
        self.assertAlmostEqual(at_once[0], 3_441, delta=1)  # only arithmetic is left
        slower = self.rates(4096, "--plan.node_bandwidth_gbs=200")
        self.assertAlmostEqual(slower[1], self.rates(4096)[1] / 2, delta=1)  # gathers bound it
        half = minimax_m2.sizes({**minimax_m2.PUBLISHED, "num_local_experts": 128})
        machine, layout = hardware.of(resolve().plan), ProcessLayout(1, 8)
        what = training_plan.step(resolve(), "domain", "bfloat16")
        gathers = [pass_times.training_pass(s, what, layout, machine).sent[GATHERS] for s in (M2, half)]
        self.assertAlmostEqual(gathers[1] / gathers[0], half.total / M2.total, places=3)
        self.assertNotEqual(fitting_settings.find(resolve("--plan.gpus=4"), half).verdict, "no")
        self.assertEqual(fitting_settings.find(resolve("--plan.gpus=4"), M2).verdict, "no")
        tokens = [
            fitting_settings.find(resolve(f"--plan.gpu_memory_gib={gib}", "--base.fp8=dequantise"), M2)
            .trainings["domain"]
            .step
            for gib in (80, 100, 141)
        ]
        self.assertEqual([step.tokens for step in tokens], sorted(step.tokens for step in tokens))
        self.assertLess(tokens[0].tokens, tokens[2].tokens)

    def test_what_bounds_a_pass_is_said(self) -> None:
        machine, layout = hardware.of(resolve().plan), ProcessLayout(1, 8)
        for tokens, bound in ((4096, GATHERS), (65_536, ARITHMETIC)):
            what = training_plan.step(resolve(f"--domain.train.micro_batch_tokens={tokens}"), "domain", "bfloat16")
            found = pass_times.training_pass(M2, what, layout, machine)
            self.assertEqual(found.bound, bound)
            self.assertLessEqual(found.least, found.most)

    def test_between_slow_nodes_the_model_is_sharded_inside_each_and_copied(self) -> None:
        nodes = ("--plan.nodes=2", "--run.expert_parallel=off")
        fast = fitting_settings.find(resolve(*nodes), M2)
        slow = fitting_settings.find(
            resolve(*nodes, "--plan.gpu_memory_gib=141", "--plan.network_bandwidth_gbs=12.5"), M2
        )
        self.assertEqual(fast.trainings["domain"].layout.shard, 16)
        self.assertEqual(slow.trainings["domain"].layout, ProcessLayout(2, 8))
        command = stage_costs.every_stage(slow, M2, planned_data.of(slow.config))[1].command
        self.assertIn("minimax_m2_2x8_hsdp.yaml", command)

    def test_copies_exchange_their_gradients(self) -> None:
        config = resolve("--plan.nodes=2")
        what, machine = training_plan.step(config, "domain", "bfloat16"), hardware.of(config.plan)
        every = pass_times.training_pass(M2, what, ProcessLayout(16, 1), machine, passes_per_step=1).sent
        rare = pass_times.training_pass(M2, what, ProcessLayout(16, 1), machine, passes_per_step=4).sent
        self.assertAlmostEqual(rare[GRADIENTS], every[GRADIENTS] / 4)
        self.assertNotIn(GATHERS, every)

    def test_gpus_that_a_step_has_no_rows_for_add_nothing(self) -> None:
        rates = []
        for gpus in (1, 2, 4, 8):
            config = cli.resolve([*FindsAWay.rows(), "--plan.gpu_memory_gib=80", f"--plan.gpus={gpus}"], {})
            what = training_plan.step(config, "domain", "bfloat16")
            plan = training_plan.choice(DENSE_8B, hardware.of(config.plan), "domain", what, batch_tokens=8_192)
            rates.append(plan.rates[0])  # four rows a step
        self.assertAlmostEqual(rates[1] / rates[0], 2, places=1)
        self.assertAlmostEqual(rates[2] / rates[0], 4, places=1)
        self.assertAlmostEqual(rates[3] / rates[2], 1, places=2)

    def test_the_points_of_a_real_search_lie_between_the_planned_ones(self) -> None:
        for seed in range(4):
            seen: dict[str, set[Any]] = {"all": set(), "part": set()}

            def evaluate(method: str, weights: tuple[float, ...], items: str, seed: int, seen: Any) -> Point:
                seen[items].add((method, weights))
                own = weights if method == "depth_gate" else [w for w in weights for _ in range(2)]
                best = [0.3 + 0.35 * ((seed + at) % 4) for at in range(4)]
                loss = 1 + sum((w - b) ** 2 for w, b in zip(own, best, strict=True))
                count = 4 if items == "all" else 1
                documents = tuple(2 - 0.5 * weights[0] + 0.01 * at for at in range(4 * count))
                return Point(
                    method,
                    weights,
                    (loss,) * 4 * count,
                    (1,) * 4 * count,
                    tuple("abcd") * count,
                    documents,
                    (1,) * len(documents),
                )

            on_all, on_part = (
                functools.partial(evaluate, items=items, seed=seed, seen=seen) for items in ("all", "part")
            )
            search.search(on_all, 2, ("sum", "depth_gate"), retention=0.5, on_part=on_part)
            spent = len(seen["all"]) + len(seen["part"] - seen["all"]) / 4
            least, most = stage_costs.SEARCHED_POINTS
            self.assertTrue(least <= spent <= most, spent)


def _dense(hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> ModelSizes:
    """A Llama's shapes."""
    settings = {
        **{"model_type": "qwen3_moe", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": vocabulary},
        **{"num_experts": 0, "moe_intermediate_size": 0, "num_experts_per_tok": 0},
    }
    return qwen3_moe.sizes(settings)


DENSE_8B = _dense(4096, 14_336, 32, 32, 8, 128_256)


class FindsAWay(unittest.TestCase):
    GPU: ClassVar = ["--plan.gpus=1", "--plan.gpu_memory_gib=16"]

    def test_eight_billion_parameters_on_16_gib_are_trained_in_4_bits(self) -> None:
        way = fitting_settings.find(cli.resolve([*self.rows(), *self.GPU], {}), DENSE_8B)
        self.assertEqual(way.verdict, "fits")
        self.assertEqual(way.form.trained, "nf4")
        self.assertLess(way.trainings["domain"].high.total, 12 * GIB)
        every = stage_costs.every_stage(way, DENSE_8B, planned_data.of(way.config))
        self.assertEqual([cost.stage for cost in every if cost.verdict == "no"], [])
        self.assertIn("--quantization", every[-1].command)
        self.assertIn(
            "--base.quantization=nf4", stage_costs.every_stage(way, DENSE_8B, planned_data.of(way.config))[1].command
        )

    @staticmethod
    def rows(tokens: int = 2048) -> list[str]:
        return [
            f"--{stage}.train.{name}={value}"
            for stage in ("domain", "task")
            for name, value in (
                ("max_sequence_tokens", tokens),
                ("micro_batch_tokens", tokens),
                ("batch_tokens", 16_384),
            )
        ]

    def test_what_costs_the_result_nothing_comes_first(self) -> None:
        for gib, form in ((80, "bfloat16"), (24, "bfloat16"), (16, "nf4")):
            way = fitting_settings.find(
                cli.resolve([*self.rows(), "--plan.gpus=1", f"--plan.gpu_memory_gib={gib}"], {}), DENSE_8B
            )
            self.assertEqual(way.form.trained, form, gib)
            self.assertNotEqual(way.verdict, "no")
            rows = {getattr(way.config, stage).train.max_sequence_tokens for stage in ("domain", "task")}
            self.assertEqual(rows, {2048})  # what is learnt is the same

    def test_shorter_rows_only_where_no_form_helps_and_then_it_is_said(self) -> None:
        rows, said = [], []
        for room in (14, 9, 8, 7.5, 7, 6.5):
            flags = [*self.rows(8192), "--plan.gpus=1", f"--plan.gpu_memory_gib={room}", "--plan.headroom_gib=1"]
            way = fitting_settings.find(cli.resolve(flags, {}), DENSE_8B)
            rows.append(way.config.domain.train.max_sequence_tokens if way.verdict != "no" else 0)
            said.append(any("rows of" in reason for reason in way.why))
        self.assertEqual(rows, sorted(rows, reverse=True))
        self.assertEqual((rows[0], rows[-1]), (8192, 0))
        self.assertTrue(any(0 < tokens < 8192 for tokens in rows), rows)
        self.assertEqual([0 < tokens < 8192 for tokens in rows[:-1]], said[:-1])

    def test_adapters_on_experts_that_do_not_fit_are_dropped_with_a_reason(self) -> None:
        way = fitting_settings.find(resolve("--task.lora.experts=true", "--run.expert_parallel=off"), M2)
        self.assertFalse(way.config.task.lora.experts)
        self.assertIn("adapters on the attention alone", way.why)
        roomy = fitting_settings.find(resolve("--task.lora.experts=true", "--plan.gpu_memory_gib=141"), M2)
        self.assertTrue(roomy.config.task.lora.experts)

    def test_other_hardware_is_the_smallest_that_does(self) -> None:
        config = cli.resolve([*self.rows(), "--plan.gpus=1", "--plan.gpu_memory_gib=8", "--plan.headroom_gib=2"], {})
        self.assertEqual(fitting_settings.find(config, DENSE_8B).verdict, "no")
        found = smallest_hardware.smallest(config, DENSE_8B)
        self.assertEqual(len(found), 3)
        totals = [way.config.plan.gpus * way.config.plan.nodes * way.config.plan.gpu_memory_gib for _, way in found]
        self.assertEqual(totals, sorted(totals))
        self.assertGreater(min(totals), 8)


if __name__ == "__main__":
    unittest.main()
