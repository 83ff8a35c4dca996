"""Ranks that share experts: losses, adapters and scores of one process, on every layout, architecture and resume.

All of it is `make launch-test`; in `make test` are one layout, and in tests/test_system_launch.py two steps and scores.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import unittest
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests import toy_architectures
from tests.fault_support import At, Send
from tests.launch_support import EXPERTS, different, launch, read, result
from tests.support import Completed, Workspace, last_json, relative
from utils import logger
from utils.adapters import adapter_files

ALL = os.environ.get("LAUNCH_TESTS") == "all"
KILLED, UNEQUAL = -signal.SIGKILL, 4
# adapters on what every toy calls so; most_used has one rank do two micro-batches and the other three
TRAIN = {"max_steps": 10, "micro_batch_tokens": 128, "batch_tokens": 512, "epochs": 20, "save_every_steps": 2}
FROZEN = ("--domain.lora.target_modules=o_proj", "--domain.lora.experts=true", "--domain.train.max_steps=2")
EVALUATE = ("--evaluate.max_heldout_documents=4", "--evaluate.batch_tokens=400", "--evaluate.generated_answers=4")
# a second pass of the model within the first, whose exchanges every rank has to make too
KEPT = ("--task.keep_domain=kl", "--task.replay_share=0.2")
KILL = At("utils.training.training_loop._TrainingLoop._save", Send(signal.SIGKILL), 3)


class Place(Workspace):
    """A workspace on a toy mixture, with a domain adapter on its experts, and what one process makes of it."""

    def __init__(self, architecture: str, router_bias: float = 0.0):
        super().__init__()
        self.base = toy_architectures.build(architecture, self.root / "base")
        if router_bias:
            prefer_first_experts(self.base, router_bias)
        self.prepare()
        self.domain = last_json(self.run("train_domain_adapter", *FROZEN))["run"]

    @property
    def flags(self) -> list[str]:
        return [*super().flags, f"--base.source={self.base}", "--task.lora.target_modules=o_proj"]

    def train_task(self, way: str, *more: str, experts: bool, **how: Any) -> list[Completed[str]]:
        """The task adapter on the frozen domain adapter, started in a way."""
        settings = [f"--task.train.{name}={value}" for name, value in TRAIN.items()]
        # where experts are not adapted their exchange is computed again in the backward pass
        settings.append(f"--task.train.gradient_checkpointing={not experts}")
        words = [f"--task.lora.experts={experts}", f"--domain_adapter={self.domain}", *settings, *more]
        name = how.pop("name", "-".join([way, str(experts), *(flag.rpartition("=")[2] for flag in more)]))
        return launch(self, way, "train_task_adapter", "--run.name", name, *words, **how)

    @functools.cache  # noqa: B019 - places live as long as the tests
    def alone(self, experts: bool, *more: str) -> Path:
        return Path(result(self.train_task("python", *more, experts=experts))["run"])


@functools.cache
def place(architecture: str, router_bias: float = 0.0) -> Place:
    return Place(architecture, router_bias)


def prefer_first_experts(base: Path, bias: float) -> None:
    """Every token of every layer chooses experts 0 and 1, which the first rank has."""
    from transformers import AutoModelForCausalLM

    with logger.quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(base)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer[:2] += bias
        model.save_pretrained(base)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Same(unittest.TestCase):
    def assert_same(self, found: Path, expected: Path, steps: int = 10) -> None:
        ours, theirs = metrics(found), metrics(expected)
        losses = [[line.get("loss", line.get("dev_loss")) for line in lines] for lines in (ours, theirs)]
        self.assertGreaterEqual(len(losses[1]), steps)
        self.assertEqual(different(*losses), [])
        norms = [[line.get("grad_norm", 0) for line in lines] for lines in (ours, theirs)]
        self.assertEqual(different(*norms, 1e-3), [])
        one, other = (adapter_files.load(run / "adapter") for run in (expected, found))
        self.assertEqual(one.keys(), other.keys())
        for name, f in one.items():
            self.assertLess(max(relative(other[name].a_rI, f.a_rI), relative(other[name].b_Or, f.b_Or)), 1e-3, name)


class TenSteps(Same):
    def test_on_a_frozen_adapter_with_and_without_adapted_experts(self) -> None:
        architectures, ways = (("minimax_m2", "qwen3_moe"), EXPERTS) if ALL else (("qwen3_moe",), ("experts_in_four",))
        for architecture in architectures:
            for experts in (True, False) if ALL else (True,):
                for way in ways:
                    with self.subTest(f"{architecture} {way} {experts}"):
                        here = place(architecture)
                        done = result(here.train_task(way, experts=experts))
                        self.assert_same(Path(done["run"]), here.alone(experts))
                        manifest = read(Path(done["run"]) / "manifest.json")
                        self.assertEqual(manifest["ranks"]["layout"]["expert"], 2)
                        rows = [line for line in metrics(Path(done["run"])) if "loss" in line]
                        for line in rows:
                            self.assertGreaterEqual(line["expert_rows_largest"], line["expert_rows_mean"])
                            self.assertGreater(line["expert_rows_mean"], 0)


@unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
class AsOneProcess(Same):
    def test_what_keeps_the_domain_is_held_to_the_same_predictions(self) -> None:
        here = place("minimax_m2")
        expected, plain = here.alone(True, *KEPT), here.alone(True)
        last = [[line["loss"] for line in metrics(run) if "loss" in line][-1] for run in (expected, plain)]
        self.assertGreater(abs(last[0] / last[1] - 1), 1e-3)
        for way in EXPERTS:
            with self.subTest(way):
                self.assert_same(Path(result(here.train_task(way, *KEPT, experts=True))["run"]), expected)

    def test_an_evaluation_that_trains_its_controls(self) -> None:
        here = place("minimax_m2")
        pinned = [f"--domain_adapter={here.domain}", f"--task_adapter={here.alone(True)}", "--evaluate.controls"]

        def cells(way: str) -> dict[str, Any]:
            # what the way before trained is not taken by this one
            shutil.rmtree(here.models / "controls", ignore_errors=True)
            done = result(launch(here, way, "evaluate", f"--run.name=controls-{way}", *pinned, *EVALUATE))
            trained = [read(path) for path in (here.models / "controls").glob("*/*/manifest.json")]
            made = {tuple(one["ranks"]["layout"].values()) for one in trained if "ranks" in one}
            self.assertEqual(len(made), 0 if way == "python" else 1, made)
            return {path.name: read(path) for path in Path(done["run"]).glob("cell_*.json")}

        expected = cells("python")
        self.assertGreater(len(expected), 5)
        for way in EXPERTS:
            with self.subTest(way):
                self.assertEqual(different(cells(way), expected), [])

    def test_scores_and_answers_of_an_evaluation_and_its_weight_search(self) -> None:
        for architecture in ("minimax_m2", "qwen3_moe"):
            here = place(architecture)
            pinned = [f"--domain_adapter={here.domain}", f"--task_adapter={here.alone(True)}"]
            search = ("--compose.search", "--compose.max_dev_items=6", "--compose.search_methods=sum,per_layer")

            def cells(way: str, here: Place = here, pinned: list[str] = pinned) -> Any:
                done = result(launch(here, way, "evaluate", "--run.name", f"e-{way}", *pinned, *EVALUATE))
                return {path.name: read(path) for path in Path(done["run"]).glob("cell_*.json")}

            def searched(way: str, here: Place = here, pinned: list[str] = pinned, search: Any = search) -> Any:
                run = Path(result(launch(here, way, "compose", "--run.name", f"c-{way}", *pinned, *search))["composed"])
                return {name: read(run / name) for name in ("search.json", "interference.json")}

            # a search leaves weights that later evaluations of the same adapters take
            for what, found, tolerance in (("evaluate", cells, 1e-5), ("search", searched, 1e-4)):
                expected = found("python")
                self.assertGreaterEqual(len(expected), 2)
                for way in EXPERTS:
                    with self.subTest(f"{architecture} {way} {what}"):
                        self.assertEqual(different(found(way), expected, tolerance), [])

    def test_the_first_rank_reads_for_all_where_ranks_cannot_read_their_part(self) -> None:
        here = place("minimax_m2")
        done = result(
            here.train_task("experts_in_four", experts=True, name="sent", before=dict.fromkeys(range(4), FirstReads()))
        )
        self.assert_same(Path(done["run"]), here.alone(True))

    def test_a_rank_that_is_sent_nothing_and_a_rank_that_is_sent_everything(self) -> None:
        here = place("minimax_m2", 100.0)
        done = result(here.train_task("experts", experts=True))
        self.assert_same(Path(done["run"]), here.alone(True))
        for line in metrics(Path(done["run"])):
            if "loss" in line:
                self.assertEqual(line["expert_rows_largest"], 2 * line["expert_rows_mean"])


@unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
class Resumed(Same):
    def test_a_run_that_is_killed_goes_on_in_any_layout_with_the_losses_of_the_undisturbed_one(self) -> None:
        here = place("minimax_m2")
        for first, second in (("experts", "sharded"), ("sharded", "experts_in_four"), ("experts_hybrid", "python")):
            with self.subTest(f"{first} then {second}"):
                name = f"{first}-{second}"
                ended = here.train_task(first, experts=True, name=name, before={0: KILL})
                self.assertEqual(ended[0].returncode, KILLED, ended[0].stderr[-2000:])
                again = here.train_task(second, experts=True, name=name)
                done = result(again)
                self.assertRegex(again[0].stderr, r"resumed +step=4\b")
                self.assertIn("ranks that share experts", again[0].stderr)
                self.assert_same(Path(done["run"]), here.alone(True))


class Diverged(unittest.TestCase):
    """One rank of those that hold the same goes astray: all stop, and nothing is written."""

    def assert_refused(self, way: str, rank: int, experts: bool, said: str) -> None:
        here = place("qwen3_moe")
        name = f"drifts-{way}-{experts}"
        drift = At("utils.training.training_loop.learning_rate", Drift(experts), 1)
        ended = here.train_task(way, experts=True, name=name, before={rank: drift})
        self.assertEqual([done.returncode for done in ended], [UNEQUAL] * 4, ended[0].stderr[-2000:])
        self.assertRegex(ended[0].stderr, f"task adapter, after step 2, differs between {said}")
        self.assertNotIn("Traceback", ended[0].stderr)
        run = here.models / "task" / name
        self.assertFalse((run / "manifest.json").exists() or list(run.glob("checkpoints/step-*")))

    def test_factors_in_one_of_the_ranks_that_have_the_same_experts(self) -> None:
        # ranks 1 and 3 have the second half of the experts, in one shard of four or in two copies
        for way in ("experts_in_four", "experts_hybrid") if ALL else ("experts_hybrid",):
            with self.subTest(way):
                self.assert_refused(way, 3, True, r"ranks that share the same experts: 1 tensors .*experts.*lora_A")

    @unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
    def test_a_shard_in_one_of_the_copies_of_the_model(self) -> None:
        self.assert_refused("experts_hybrid", 2, False, r"copies of the model: 1 tensors .*o_proj.*lora_A")


@unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
class Architectures(Same):
    def test_every_mixture_with_a_plan_is_trained_and_scored_as_by_one_process(self) -> None:
        for architecture in ("mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "qwen2_moe", "olmoe"):
            with self.subTest(architecture):
                here = place(architecture)
                done = result(here.train_task("experts", experts=True))
                self.assert_same(Path(done["run"]), here.alone(True))
                pinned = [f"--domain_adapter={here.domain}", f"--task_adapter={here.alone(True)}"]
                scores = [
                    {path.name: read(path) for path in Path(run["run"]).glob("cell_*.json")}
                    for run in (
                        result(launch(here, way, "evaluate", "--run.name", f"e-{way}", *pinned, *EVALUATE))
                        for way in ("experts", "python")
                    )
                ]
                self.assertEqual(different(*scores), [])


@unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
class Refused(unittest.TestCase):
    def test_what_cannot_be_shared_is_one_message_with_every_reason(self) -> None:
        here = place("minimax_m2")
        for way, script, flags, said in (
            ("sharded", "evaluate", ["--run.expert_parallel=3"], r"(?s)2 problems.*whole number of groups.*4 experts"),
            ("whole", "train_domain_adapter", ["--run.expert_parallel=2"], "each has all of it"),
            ("python", "train_domain_adapter", ["--run.expert_parallel=2"], "each has all of it"),
        ):
            with self.subTest(way):
                ended = launch(here, way, script, *flags)
                self.assertEqual({done.returncode for done in ended}, {2}, ended[0].stderr[-2000:])
                self.assertRegex(ended[0].stderr, said)
                self.assertNotIn("Traceback", "".join(done.stderr for done in ended))


@dataclass(frozen=True)
class FirstReads:
    def __call__(self) -> None:
        from utils.models.parallel import shard_reading

        shard_reading.reader = lambda base, model: None


@dataclass(frozen=True)
class Drift:
    """The first factor of experts, or of attention, is in this rank no longer what it was, by little."""

    experts: bool

    def __call__(self) -> None:
        import gc

        from utils.models.parallel import expert_parallel, sharding

        (optimizer,) = (found for found in gc.get_objects() if isinstance(found, torch.optim.AdamW))
        trained = optimizer.param_groups[0]["params"]
        with torch.no_grad():
            next(sharding.own(p).add_(1e-4) for p in trained if expert_parallel.is_factor(p) == self.experts)


if __name__ == "__main__":
    unittest.main()
