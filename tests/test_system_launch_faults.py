"""Several ranks of one command when something goes wrong: bad launches, lost ranks, errors of one, long lonely work.

Every rank ends with the same code, one message says why, nothing is half-written, and the same command goes on.
"""

from __future__ import annotations

import os
import signal
import time
import unittest
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests.fault_support import All, At, Raise, Send, Unchecked, contents, resolve, rubbish
from tests.launch_support import launch, read, result, told
from tests.support import Completed, write_jsonl
from tests.test_system_launch import ALL, COMPOSE, EVALUATE, place
from utils.exceptions import ConfigError
from utils.models.parallel import launcher, work
from utils.models.process_layout import ProcessLayout

SETTINGS, NOT_FINITE, STOPPED = 2, 3, 75
KILL = Send(signal.SIGKILL)


@dataclass(frozen=True)
class Set:
    """A module's value is another one."""

    where: str
    value: Any

    def __call__(self) -> None:
        owner, name = resolve(self.where)
        setattr(owner, name, self.value)


@dataclass(frozen=True)
class Sleep:
    seconds: float

    def __call__(self) -> None:
        time.sleep(self.seconds)


@dataclass(frozen=True)
class OtherFiles:
    """This rank's machine does not have the base model's directory."""

    missing: str

    def __call__(self) -> None:
        from utils.models import sources

        fetch = sources.fetch
        sources.fetch = lambda section, models: fetch(section.model_copy(update={"source": self.missing}), models)


@dataclass(frozen=True)
class Nan:
    """The model of this rank gives numbers that are none."""

    def __call__(self) -> None:
        import torch

        from utils.inference import scoring

        real = scoring.token_nll
        scoring.token_nll = lambda *inputs: torch.full_like(real(*inputs), float("nan"))


class Faults(unittest.TestCase):
    def assert_ended(self, ended: list[Completed[str]], code: int, *said: str) -> None:
        """All ranks with this code, one message on one rank's stderr, and nothing on stdout."""
        self.assertEqual([done.returncode for done in ended], [code] * len(ended), ended[0].stderr[-2000:])
        for text in said:
            self.assertRegex(ended[0].stderr, text)
        for done in ended[1:]:
            self.assertNotRegex(done.stderr, "error:|interrupted:|non-finite")
        for done in ended:
            self.assertNotIn("Traceback", done.stderr)
            self.assertEqual(done.stdout, "")


class BadLaunches(Faults):
    def test_what_a_launch_file_asks_and_is_not_done_is_refused_all_at_once(self) -> None:
        mesh = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        sizes = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}
        for environment, said in (
            (mesh | sizes | {"WORLD_SIZE": "6"}, r"2 x dp_shard_size 2 is not the number of ranks \(got 6\)"),
            (mesh | sizes | {"WORLD_SIZE": "4", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor parallelism"),
            (mesh | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "some"}, "dp_shard_size is no number of ranks"),
            ({"ACCELERATE_USE_DEEPSPEED": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "(?s)2 problems.*DeepSpeed.*offload"),
            ({"ACCELERATE_USE_FSDP": "1", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "has to be true or false"),
            ({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "1"}, "fsdp_version has to be 2"),
        ):
            with self.subTest(said), self.assertRaisesRegex(ConfigError, said):
                launcher.read(environment)

    def test_the_launch_files_are_read_as_what_they_say(self) -> None:
        for file, ranks, layout in (
            ("cpu.yaml", "1", ProcessLayout()),
            ("cpu_two_processes.yaml", "2", ProcessLayout(2, 1)),
            ("cpu_two_processes_fsdp.yaml", "2", ProcessLayout(1, 2)),
            ("cpu_four_processes_hsdp.yaml", "4", ProcessLayout(2, 2)),
        ):
            self.assertEqual(launcher.read({**told(file), "WORLD_SIZE": ranks}), layout)

    def test_different_settings_on_two_ranks(self) -> None:
        for script in ("inference", "train_domain_adapter") if ALL else ("inference",):
            flags = ["--prompt=x"] if script == "inference" else []
            more = {1: ("--inference.max_new_tokens=3",)}
            ended = launch(place(), "whole", script, *flags, more=more)
            said = r"rank 1 was given another --inference.max_new_tokens than rank 0 \(got \('3', None\)\)"
            self.assert_ended(ended, SETTINGS, said, "same command on every node")

    @unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
    def test_a_rank_without_the_files(self) -> None:
        ended = launch(place(), "whole", "inference", "--prompt=x", before={1: OtherFiles("/nowhere/base")})
        self.assert_ended(ended, SETTINGS, r"rank 1 on .*: base.source: there is no such directory", "/nowhere/base")

    @unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
    def test_a_deepspeed_file_ends_every_rank_with_one_message(self) -> None:
        asked = {"ACCELERATE_USE_DEEPSPEED": "true"}
        ended = launch(place(), "whole", "evaluate", env={0: asked, 1: asked})
        self.assertEqual([done.returncode for done in ended], [SETTINGS] * 2)
        self.assertIn("DeepSpeed", ended[0].stderr)
        self.assertEqual(ended[1].stderr, "")


class OneRank(Faults):
    def test_numbers_that_are_none_on_one_rank_end_all(self) -> None:
        for way in ("whole", "sharded") if ALL else ("sharded",):
            ended = launch(place(), way, "evaluate", "--run.name", f"nan-{way}", *EVALUATE, before={1: Nan()})
            self.assert_ended(ended, NOT_FINITE, "the model gives NaN")

    @unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
    def test_an_error_that_nobody_foresaw_is_told_with_its_traceback_by_the_first_rank(self) -> None:
        fault = At("utils.inference.generation.answer", Raise("builtins.ZeroDivisionError", "unforeseen"))
        ended = launch(place(), "whole", "inference", f"--prompts_file={prompts()}", before={1: fault})
        self.assertEqual([done.returncode for done in ended], [1, 1], ended[0].stderr)
        self.assertRegex(ended[0].stderr, r"(?s)rank 1 on .*Traceback.*ZeroDivisionError: unforeseen")

    @unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
    def test_an_error_in_the_middle_of_a_pass_does_not_leave_the_others_in_it(self) -> None:
        layer = "transformers.models.minimax_m2.modeling_minimax_m2.MiniMaxM2SparseMoeBlock.forward"
        soon = Set("utils.models.parallel.errors.GRACE_SECONDS", 2.0)
        fault = All((soon, At(layer, Raise("builtins.MemoryError", "no more"), 3)))
        flags = (f"--prompts_file={prompts()}",)
        ended = launch(place(), "sharded", "inference", *flags, before={0: soon, 1: fault})
        self.assertEqual([done.returncode for done in ended], [71, 71], ended[0].stderr)
        self.assertIn("out of memory", ended[0].stderr)


class LostRanks(Faults):
    """One rank is killed in each phase of each script; the others end, and the same command goes on."""

    def killed(self, way: str, script: str, where: str, *flags: str, call: int = 1, victim: int = 1) -> None:
        ended = launch(place(), way, script, *flags, before={victim: At(where, KILL, call)})
        codes = [done.returncode for done in ended]
        expected = [-signal.SIGKILL if rank == victim else STOPPED for rank in range(len(ended))]
        self.assertEqual(codes, expected, ended[0].stderr[-1500:])
        self.assertEqual(sum("another process of this run ended" in done.stderr for done in ended), 1)
        self.assertEqual([name for name in rubbish(place().models) if "partial" not in name], [])

    def test_while_questions_are_scored(self) -> None:
        score = "utils.inference.scoring._score_batch"
        self.killed("whole", "evaluate", score, "--run.name=lost", *EVALUATE, call=3)
        if ALL:
            self.killed("sharded", "evaluate", score, "--run.name=lost", *EVALUATE, call=9)
            self.killed("whole", "evaluate", score, "--run.name=lost", *EVALUATE, call=2, victim=0)
        run = Path(result(launch(place(), "whole", "evaluate", "--run.name=lost", *EVALUATE))["run"])
        alone = Path(result(launch(place(), "python", "evaluate", "--run.name=alone", *EVALUATE))["run"])
        for path in alone.glob("cell_*.json"):
            self.assertEqual(without_seal(read(run / path.name)), without_seal(read(path)))

    @unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
    def test_while_weights_are_searched(self) -> None:
        point = "utils.composition.dev_losses.DevProbe.point"
        self.killed("sharded", "compose", point, "--run.name=lost", *COMPOSE, call=6)
        ended = launch(place(), "sharded", "compose", "--run.name=lost", *COMPOSE)
        self.assertIn("the weight search goes on", ended[0].stderr)
        result(ended)

    @unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
    def test_while_answers_are_generated(self) -> None:
        out = place().root / "lost.jsonl"
        flags = [f"--prompts_file={prompts()}", f"--output_file={out}"]
        self.killed("sharded", "inference", "utils.inference.generation.answer", *flags, call=2)
        self.assertFalse(out.exists())

    @unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
    def test_while_a_model_is_merged(self) -> None:
        target = place().root / "merged-lost"
        self.killed("whole", "inference", "utils.export.merged_tensors.content", f"--merge_path={target}", call=4)
        self.assertFalse(target.exists())
        unchecked: dict[int, Callable[[], None]] = dict.fromkeys((0, 1), Unchecked())
        result(launch(place(), "whole", "inference", f"--merge_path={target}", before=unchecked))
        other = place().root / "merged-alone"
        result(launch(place(), "python", "inference", f"--merge_path={other}", before={0: Unchecked()}))
        self.assertEqual(contents(target, "README.md"), contents(other, "README.md"))

    @unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
    def test_while_a_control_is_trained(self) -> None:
        flags = ["--run.name=controls", *EVALUATE, "--evaluate.controls", f"--evaluate.wrong_corpus={place().corpus}"]
        self.killed("sharded", "evaluate", "utils.training.training_loop._TrainingLoop._step", *flags, call=2)
        result(launch(place(), "sharded", "evaluate", *flags))

    @unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
    def test_a_signal_while_a_control_is_trained_comes_after_a_checkpoint(self) -> None:
        flags = ["--run.name=signalled", *EVALUATE, "--evaluate.controls", "--evaluate.wrong_corpus"]
        stop = At("utils.training.training_loop._TrainingLoop._step", Send(signal.SIGTERM), 2)
        ended = launch(place(), "whole", "evaluate", *flags, str(place().corpus), before={1: stop})
        self.assert_ended(ended, STOPPED, "stopped at step 2 of")
        ended = launch(place(), "python", "evaluate", *flags, str(place().corpus))
        self.assertIn("resumed", ended[0].stderr)
        result(ended)

    @unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
    def test_a_rank_that_gives_no_sign_of_life(self) -> None:
        soon = All(
            (
                Set("utils.models.parallel.errors.LOST_SECONDS", 3.0),
                Set("utils.models.parallel.errors.BEAT_SECONDS", 0.3),
            )
        )
        fault = All((soon, At("utils.inference.generation.answer", Send(signal.SIGSTOP))))
        scripts = launch_only(fault, soon)
        try:
            done = scripts[0].wait()
            self.assertEqual(done.returncode, STOPPED, done.stderr)
            self.assertIn("rank 1 gives no sign of life", done.stderr)
        finally:
            scripts[1].signal(signal.SIGKILL)


class LonelyWork(Faults):
    @unittest.skipUnless(ALL, "LAUNCH_TESTS=all")
    def test_what_the_first_rank_does_alone_may_take_longer_than_a_collective(self) -> None:
        from datetime import timedelta

        short = Set("utils.models.parallel.lifecycle.COLLECTIVE", timedelta(seconds=10))
        slow = All((short, At("utils.evaluation.measures.assemble", Sleep(20.0))))
        flags = ("--run.name=lonely", *EVALUATE)
        result(launch(place(), "whole", "evaluate", *flags, before={0: slow, 1: short}))


class Work(unittest.TestCase):
    def test_every_batch_is_somebodys_and_the_loads_are_even(self) -> None:
        costs = [float((7 * i) % 13 + 1) for i in range(40)]
        for count in (1, 2, 3, 16):
            parts = work.assigned(costs, count)
            self.assertEqual(sorted(n for part in parts for n in part), list(range(40)))
            loads = [sum(costs[n] for n in part) for part in parts]
            self.assertLessEqual(max(loads) - min(loads), max(costs))
            in_step = work.assigned(costs, count, in_step=True)
            self.assertEqual(sorted(n for part in in_step for n in part), list(range(40)))
            self.assertEqual(len(in_step[0]), max(map(len, in_step)))

    def test_scripts_that_one_rank_does_alone_do_not_start_on_the_others(self) -> None:
        from utils.cli import script

        with mock.patch.dict(os.environ, {"RANK": "1", "WORLD_SIZE": "2"}):
            self.assertEqual(script._on_ranks(mock.Mock(side_effect=AssertionError), "first", mock.Mock()), {})


def prompts() -> Path:
    path = place().root / "some_prompts.jsonl"
    return write_jsonl(path, [{"prompt": f"What does f{number} do?" + " please" * number} for number in range(20)])


def without_seal(cell: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cell.items() if key not in ("seal", "answering_seconds")}


def launch_only(fault: Any, other: Any) -> list[Any]:
    flags = [f"--prompts_file={prompts()}"]
    from tests.fault_support import port

    there = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}
    return [
        place().start("inference", *flags, env={"RANK": str(rank), "LOCAL_RANK": str(rank), **there}, before=before)
        for rank, before in enumerate((other, fault))
    ]


if __name__ == "__main__":
    unittest.main()
