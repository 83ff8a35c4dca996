"""Sharing experts as it is planned: figures follow experts, ranks, bandwidth and imbalance, and the plan compares."""

from __future__ import annotations

import math
import unittest
from dataclasses import replace
from statistics import NormalDist

import torch

from tests.support import ROOT
from tests.test_planning_presets import QWEN_30B
from tests.test_planning_stages import M2, resolve
from utils.exceptions import ConfigError
from utils.models.architectures import minimax_m2, qwen3_moe
from utils.models.model_shapes import GIB, ModelSizes
from utils.models.process_layout import ProcessLayout
from utils.planning import (
    base_checks,
    estimates,
    expert_imbalance,
    hardware,
    pass_times,
    plan_report,
    planned_data,
    stage_commands,
    training_plan,
)
from utils.planning.pass_times import ARITHMETIC, EXCHANGE, GATHERS, GRADIENTS, PassTime

QWEN = qwen3_moe.sizes(QWEN_30B)
GATHERED, SHARED = ProcessLayout(1, 8), ProcessLayout(1, 8, 8)


def time(*flags: str, layout: ProcessLayout = SHARED, sizes: ModelSizes = M2) -> PassTime:
    config = resolve("--plan.gpu_memory_gib=141", *flags)
    what = training_plan.step(config, "domain", "bfloat16")
    return pass_times.training_pass(sizes, what, layout, hardware.of(config.plan), passes_per_step=2)


class Figures(unittest.TestCase):
    def test_an_exchange_by_hand(self) -> None:
        # 3 passes x there and back x tokens x experts x layers x hidden x 2 bytes x imbalance x 7/8, at 400 GB/s
        imbalance = 1 + 1.4342 * math.sqrt(7 / 255)
        expected = 3 * 2 * 4096 * 8 * 62 * 3072 * 2 * imbalance * 7 / 8 / 400e9
        self.assertAlmostEqual(time().sent[EXCHANGE] / expected, 1, places=4)
        dense = estimates.weight_bytes(M2, "bfloat16") - 2 * M2.parameters["experts"] + 4 * 26_411_008
        self.assertAlmostEqual(time().sent[GATHERS] / (2 * dense * 7 / 8 / 400e9), 1)

    def test_they_follow_ranks_bandwidth_experts_and_imbalance(self) -> None:
        usual = time()
        self.assertAlmostEqual(time("--plan.node_bandwidth_gbs=200").sent[EXCHANGE] / usual.sent[EXCHANGE], 2)
        unequal = time("--plan.expert_imbalance=2.5").sent[EXCHANGE]
        self.assertAlmostEqual(unequal / time("--plan.expert_imbalance=1.25").sent[EXCHANGE], 2)
        self.assertGreater(sum(time("--plan.expert_imbalance=3").own.values()), sum(usual.own.values()))
        four = time(layout=ProcessLayout(1, 8, 4))
        fewer = expert_imbalance.expected(256, 4) / expert_imbalance.expected(256, 8)
        self.assertAlmostEqual(four.sent[EXCHANGE] / usual.sent[EXCHANGE], fewer * (3 / 4) / (7 / 8))
        # a shard of two groups gathers half of a quarter of the experts, and a shard of one none
        more = 2 * (2 * M2.parameters["experts"] / 4) / 2 / 400e9
        self.assertAlmostEqual(four.sent[GATHERS] - usual.sent[GATHERS], more)
        half = minimax_m2.sizes({**minimax_m2.PUBLISHED, "num_local_experts": 128})
        equal = [time("--plan.expert_imbalance=1", sizes=sizes).sent[EXCHANGE] for sizes in (half, M2)]
        self.assertEqual(*equal)
        self.assertGreater(time(sizes=half).sent[EXCHANGE], 1.05 * usual.sent[EXCHANGE])  # fewer experts even out less
        gathers = [time(layout=GATHERED, sizes=sizes).sent[GATHERS] for sizes in (half, M2)]
        self.assertLess(gathers[0], 0.6 * gathers[1])
        nodes = ProcessLayout(1, 16, 16)
        self.assertGreater(time("--plan.nodes=2", layout=nodes).sent[EXCHANGE], 7 * usual.sent[EXCHANGE])

    def test_factors_of_experts_stay_where_they_are_and_are_added_over_copies(self) -> None:
        experts = ("--domain.lora.experts=true",)
        self.assertAlmostEqual(time(*experts).sent[GATHERS], time().sent[GATHERS])
        self.assertAlmostEqual(time(*experts).sent[GRADIENTS], time().sent[GRADIENTS])  # one copy of each
        copies = time(*experts, "--plan.nodes=2", layout=ProcessLayout(2, 8, 8)).sent[GRADIENTS]
        without = time("--plan.nodes=2", layout=ProcessLayout(2, 8, 8)).sent[GRADIENTS]
        factors = 2_756_902_912 - 26_411_008
        self.assertAlmostEqual(copies - without, 2 * 4 * factors / 8 / 2 / 50e9 / 2)

    def test_memory_of_the_busiest_rank(self) -> None:
        what = training_plan.step(resolve("--domain.lora.experts=true"), "domain", "bfloat16")

        def memory(imbalance: float = 1.0, ranks: int = 8, shards: int = 8) -> estimates.TrainingMemory:
            how = {"shards": shards, "expert_ranks": ranks, "imbalance": imbalance}
            return estimates.training_memory(M2, what, **how)

        gathered, shared = estimates.training_memory(M2, what, shards=8), memory()
        self.assertEqual((shared.weights, shared.expert_weights), (gathered.weights, 0))
        self.assertLess(shared.gathered, gathered.gathered - 6 * GIB)
        self.assertEqual(shared.adapters, gathered.adapters)
        self.assertGreater(memory(2.0).workspace, 1.5 * shared.workspace)
        own = 2 * M2.parameters["experts"] // M2.num_layers // 8
        self.assertAlmostEqual(memory(shards=16).gathered - shared.gathered, own, delta=8)

    def test_the_tables_of_the_documentation_are_what_is_calculated(self) -> None:
        page = (ROOT / "docs" / "multi_gpu.md").read_text(encoding="utf-8")
        for row in table():
            self.assertIn(row, page)
        # the example of each formula
        shared, gathered = time(), time(layout=GATHERED)
        busiest = shared.own[ARITHMETIC] - gathered.own[ARITHMETIC]
        for said in (
            f"= {gathered.own[ARITHMETIC]:.2f} s",
            f"= {busiest:.3f} s",
            f"= {gathered.sent[GATHERS]:.2f} s",
            f"= {shared.sent[GATHERS]:.3f} s",
            f"= {shared.sent[EXCHANGE]:.3f} s",
            f"= {shared.sent[GRADIENTS]:.5f} s",
            *(f"= {rate:,.0f} tokens/s on each GPU" for rate in shared.rates(1)),
            *(f"= {expert_imbalance.expected(*of):.2f}\n" for of in ((256, 8), (128, 8), (256, 16))),
            f"{expert_imbalance.worst(expert_imbalance.expected(256, 8), 8, 62):.2f} for MiniMax-M2 on 8 GPUs",
        ):
            self.assertIn(said, page)


class Imbalance(unittest.TestCase):
    def drawn(self, experts: int, ranks: int, layers: int = 1) -> float:
        """The mean over 20,000 draws of popularities, as waiting times are: the busiest of `ranks` over the mean."""
        popularity = torch.distributions.Exponential(1.0).sample((20_000 // layers * layers, experts))
        rank_DR = popularity.view(len(popularity), ranks, -1).sum(-1)
        return float((rank_DR.amax(1) / rank_DR.mean(1)).view(-1, layers).amax(1).mean())

    def test_what_is_expected_is_what_drawn_popularities_give(self) -> None:
        torch.manual_seed(0)
        for experts, ranks in ((256, 2), (256, 4), (256, 8), (256, 16), (128, 8), (64, 8)):
            expected = expert_imbalance.expected(experts, ranks)
            self.assertTrue(0.94 < expected / self.drawn(experts, ranks) < 1.0, (experts, ranks, expected))
        worst = expert_imbalance.worst(expert_imbalance.expected(256, 8), 8, 62)
        self.assertTrue(0.94 < worst / self.drawn(256, 8, 62) < 1.0, worst)

    def test_chance_alone_is_one_percent(self) -> None:
        torch.manual_seed(0)
        chosen = torch.rand(8 * 4096, 256).topk(8).indices // 32  # tokens of 8 ranks, 32 experts on each
        rows_R = torch.bincount(chosen.flatten(), minlength=8).double()
        self.assertTrue(1.0 < float(rows_R.max() / rows_R.mean()) < 1.02)

    def test_no_rank_has_more_than_all_and_none_below_the_mean(self) -> None:
        self.assertEqual((expert_imbalance.expected(256, 1), expert_imbalance.worst(3, 1, 62)), (1, 1))
        self.assertEqual(expert_imbalance.expected(2, 2), 1 + NormalDist().inv_cdf(1.625 / 2.25))
        self.assertEqual(expert_imbalance.worst(1.9, 2, 62), 2)
        with self.assertRaisesRegex(ConfigError, "expert_imbalance 0.5: the busiest rank has at least the mean"):
            resolve("--plan.expert_imbalance=0.5")


class Plan(unittest.TestCase):
    def test_minimax_m2_with_and_without_and_the_command_that_asks_for_what_was_chosen(self) -> None:
        chosen = []
        for flags in (["--plan.gpus=8"], ["--plan.gpu_memory_gib=141"], ["--plan.nodes=2"]):
            config = resolve(*flags, "--base.fp8=dequantise")
            lines, facts = plan_report.report(config, M2, planned_data.of(config))
            domain = facts["stages"]["domain"]
            fitting = [one for one in domain["layouts"] if one["verdict"] == "fits"]
            self.assertEqual({one["layout"]["expert"] for one in domain["layouts"]}, {1, 8})
            fastest = max(fitting, key=lambda one: one["tokens_per_second_per_gpu"][0])
            self.assertEqual(fastest["layout"], domain["layout"])
            chosen.append(domain["layout"]["expert"])
            asked = f"--run.expert_parallel={chosen[-1] if chosen[-1] > 1 else 'off'}"
            self.assertIn(asked, domain["command"])
            said = "\n".join(lines)
            self.assertRegex(said, r"sharded over \d+, each expert once in 8.*tokens/s a GPU.*GiB")
            self.assertRegex(said, r"sharded over \d+: [\d,]+ to [\d,]+ tokens/s a GPU.*GiB")
            self.assertEqual(said.count(", chosen\n"), 2)
        # where memory allows passes long enough to hide the gathers, they cost less than the busiest rank does
        self.assertEqual(chosen[:2], [8, 1])

    def test_fp8_that_stays_and_gpus_that_do_not_divide_the_experts_gather(self) -> None:
        for flags, form in (([], "fp8"), (["--plan.gpus=6"], "bfloat16")):
            layouts = hardware.of(resolve(*flags).plan).layouts_of(M2, form)  # type: ignore[arg-type]
            self.assertEqual({one.expert for one in layouts}, {1})
        config = resolve("--plan.gpus=6", "--plan.gpu_memory_gib=180")
        self.assertIn("expert_parallel=off", stage_commands.command(config, M2, "domain", ProcessLayout(1, 6)))
        self.assertNotIn("expert_parallel", stage_commands.command(config, M2, "domain", ProcessLayout(6, 1)))
        self.assertNotIn(
            "expert_parallel", stage_commands.command(config, replace(M2, expert_plan=False), "domain", GATHERED)
        )

    def test_it_pays_where_the_pass_is_faster(self) -> None:
        config = resolve("--plan.gpu_memory_gib=141", "--evaluate.batch_tokens=4096")
        for stage in ("domain", ""):
            self.assertTrue(base_checks.pays(config, M2, GATHERED, 8, stage))
        many = resolve("--domain.train.micro_batch_tokens=1048576", "--plan.expert_imbalance=8")
        self.assertFalse(base_checks.pays(many, M2, GATHERED, 8, "domain"))


def table() -> list[str]:
    """Rows of docs/multi_gpu.md: model, layout, tokens a pass, tokens/s a GPU, GiB a GPU, what bounds it."""
    rows = []
    cases = (
        ("MiniMax-M2", M2, [], ProcessLayout(1, 8, 8), 4_096),
        ("MiniMax-M2", M2, [], ProcessLayout(1, 8, 8), 16_384),
        ("MiniMax-M2", M2, ["--plan.nodes=2", "--plan.gpu_memory_gib=80"], ProcessLayout(1, 16, 8), 8_192),
        ("MiniMax-M2, experts adapted", M2, ["--domain.lora.experts=true"], ProcessLayout(1, 8), 4_096),
        ("MiniMax-M2, experts adapted", M2, ["--domain.lora.experts=true"], ProcessLayout(1, 8, 8), 4_096),
        ("Qwen3-30B-A3B", QWEN, ["--plan.gpu_memory_gib=80"], ProcessLayout(8, 1), 16_384),
        ("Qwen3-30B-A3B", QWEN, ["--plan.gpu_memory_gib=80"], ProcessLayout(1, 8), 16_384),
        ("Qwen3-30B-A3B", QWEN, ["--plan.gpu_memory_gib=80"], ProcessLayout(1, 8, 8), 16_384),
    )
    for name, sizes, flags, layout, tokens in cases:
        config = resolve("--plan.gpu_memory_gib=141", *flags, f"--domain.train.micro_batch_tokens={tokens}")
        machine, what = hardware.of(config.plan), training_plan.step(config, "domain", "bfloat16")
        found = pass_times.training_pass(sizes, what, layout, machine)
        low, high = (
            estimates.training_memory(
                *(sizes, what),
                shards=layout.shard,
                expert_ranks=layout.expert,
                imbalance=machine.imbalance(sizes, layout),
                careful=careful,
            ).total
            / GIB
            for careful in (False, True)
        )
        rate = plan_report.between(*(f"{rate:,.0f}" for rate in found.rates(1)))
        peak = plan_report.between(f"{low:.0f}", f"{high:.0f}")
        memory = f"{config.plan.nodes * 8} x {config.plan.gpu_memory_gib:g} GB"
        rows.append(f"| {name} | {memory} | {layout} | {tokens:,} | {rate} | {peak} | {found.bound} |")
    return rows


if __name__ == "__main__":
    unittest.main()
