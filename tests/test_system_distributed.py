"""Several ranks: a model that is sharded (FSDP2) or whole on each rank (DDP) trains what one process trains, goes on
with any number of ranks, and stops when the ranks no longer hold the same."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import unittest
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from config import BaseModelSection
from tests.fault_support import ADAPTER, LONG, All, At, Place, Send, port, resolve
from tests.support import (
    ROOT,
    Completed,
    clean_environment,
    last_json,
    relative,
    saved_model,
    temporary_directory,
    toy,
)
from tests.test_export_merge import fp8_checkpoint
from tests.test_planning_plan import LAUNCH, SHARDED, told_by
from tests.test_training_loop import losses, metrics, newest_checkpoint
from utils import logger
from utils.adapters import adapter_files
from utils.artifacts import files
from utils.exceptions import ConfigError
from utils.models import loading
from utils.models.parallel import launcher, sharding
from utils.models.process_layout import ProcessLayout
from utils.models.weights import safetensors_io

FSDP_FILE, HSDP_FILE = LAUNCH / "cpu_two_processes_fsdp.yaml", LAUNCH / "cpu_four_processes_hsdp.yaml"
# three micro-batches a step: two processes have an uneven share of them
TRAIN = {"epochs": 1, "batch_tokens": 384, "micro_batch_tokens": 128, "save_every_steps": 4, "evals_per_epoch": 2}
FLAGS = [f"--domain.train.{name}={value}" for name, value in TRAIN.items()]
TASK = ["--task.on=domain_ready", "--task.lora.experts=true", "--task.train.gradient_checkpointing=true"]
TASK += ["--base.dtype=bfloat16", "--task.train.batch_tokens=384", "--task.train.micro_batch_tokens=128"]
# a second pass of the model within the first, whose number has to be the same on every rank
TASK += ["--task.keep_domain=kl", "--task.replay_share=0.2"]
REPLAY = ["--task.keep_domain=auto", "--compose.domain_retention=1", "--task.train.learning_rate=0.03"]
REPLAY += ["--task.train.batch_tokens=384", "--task.train.micro_batch_tokens=128", "--task.train.epochs=2"]
STOPPED, UNEQUAL = 75, 4


class SameAsOneProcess(unittest.TestCase):
    def assert_same(self, found: Path, expected: Path, loss_tolerance: float = 1e-4) -> None:
        """The same losses of steps and dev, the same gradients (AdamW forgets their scale), and the same adapter."""
        self.assertEqual([m["step"] for m in metrics(found)], [m["step"] for m in metrics(expected)])
        for one, two in zip(all_losses(expected), all_losses(found), strict=True):
            self.assertAlmostEqual(one, two, delta=loss_tolerance)
        for one, two in zip(metrics(expected), metrics(found), strict=True):
            self.assertAlmostEqual(two["grad_norm"] / one["grad_norm"], 1, delta=1e-3)
        self.assertEqual(files.read_manifest(found)["measured"]["kept_step"], kept_step(expected))
        alone, both = (adapter_files.load(run / "adapter") for run in (expected, found))
        self.assertEqual(alone.keys(), both.keys())
        for name, factors in alone.items():
            self.assertLess(max(relative(both[name].a_rI, factors.a_rI), relative(both[name].b_Or, factors.b_Or)), 1e-3)

    def test_launched_as_the_readme_says_the_model_is_sharded_and_the_adapter_is_the_same(self) -> None:
        place, run = reference(), reference().run_of("launched")
        (done,) = launched("launched", [])
        self.assertEqual(last_json(done)["run"], str(run))
        self.assert_same(run, place.run_of("reference"))
        measured = files.read_manifest(run)["measured"]
        self.assertEqual((measured["world_size"], measured["is_dealt_out"]), (2, True))
        lines = [json.loads(line) for line in (run / "run.log").read_text().splitlines()]
        (sharded,) = [line for line in lines if line["event"] == "the model is sharded"]
        model = sum(path.stat().st_size for path in (place.models / "base" / "tiny-minimax-m2").glob("*.safetensors"))
        self.assertEqual(sharded["layers"], 2)
        self.assertLess(sharded["part_gib"] * 2**30, 0.6 * model, "a process holds more than its part")

    @unittest.skipUnless(LONG, "another real launch: FAULT_TESTS=long")
    def test_launched_as_the_readme_says_with_the_model_whole_in_both(self) -> None:
        (done,) = launched("whole", [], file="cpu_two_processes.yaml")
        measured = files.read_manifest(Path(last_json(done)["run"]))["measured"]
        self.assertEqual((measured["world_size"], measured["is_dealt_out"]), (2, False))
        self.assert_same(reference().run_of("whole"), reference().run_of("reference"))

    @unittest.skipUnless(LONG, "two real launches of two processes each: FAULT_TESTS=long")
    def test_two_launchers_as_on_two_nodes_of_two_processes(self) -> None:
        node = ["--num_machines=2", "--num_processes=4", "--main_process_ip=127.0.0.1", f"--main_process_port={port()}"]
        first, second = launched("nodes", *([*node, f"--machine_rank={rank}"] for rank in (0, 1)))
        self.assertEqual(second.returncode, 0, second.stderr)
        self.assertEqual(files.read_manifest(Path(last_json(first)["run"]))["measured"]["world_size"], 4)
        # one process of the four has no micro-batch of its own
        self.assert_same(reference().run_of("nodes"), reference().run_of("reference"))

    def test_a_run_that_is_stopped_goes_on_with_any_number_of_processes_sharded_or_not(self) -> None:
        for name, ways in (("fewer", ("ddp", "fsdp", "one")), ("more", ("one", "fsdp", "ddp"))):
            for part, way in enumerate(ways):
                stop = (
                    At("utils.training.training_loop._TrainingLoop._step", Send(signal.SIGTERM), 3)
                    if part + 1 < len(ways)
                    else None
                )
                ended = start(way, name, before=(stop, None))
                self.assertEqual({done.returncode for done in ended}, {STOPPED if stop else 0}, ended[0].stderr)
                if part:
                    self.assertRegex(ended[0].stderr, rf"resumed +step={3 * part}\b")
                    warned = "resumed under other conditions" in ended[0].stderr
                    self.assertEqual(warned, ways[part - 1] != way)
                if stop:
                    newest = newest_checkpoint(reference().run_of(name))
                    self.assertEqual(newest.name, f"step-{3 * part + 3:08d}")
            self.assert_same(reference().run_of(name), reference().run_of("reference"))

    def test_on_a_frozen_adapter_with_experts_in_bfloat16_recomputed_and_switched_on_and_off(self) -> None:
        place = reference()
        place.run("train_task_adapter", "--run.name", "one", *TASK)
        ended = together(place, "train_task_adapter", "--run.name", "two", *TASK)
        self.assertEqual([done.returncode for done in ended], [0, 0], ended[0].stderr)
        self.assertIn("the model is sharded", ended[0].stderr)
        self.assert_same(place.run_of("two", "task"), place.run_of("one", "task"))

    @unittest.skipUnless(LONG, "a task adapter in one process and in two, both ways: FAULT_TESTS=long")
    def test_ranks_look_at_the_domain_together_and_read_its_documents(self) -> None:
        place = reference()
        place.run("train_task_adapter", "--run.name", "looked-one", *REPLAY)
        expected = place.run_of("looked-one", "task")
        keeping = files.read_manifest(expected)["measured"]["keeping"]
        self.assertEqual(keeping["how"], "replay", keeping)
        for way in ("fsdp", "ddp"):
            ended = together(place, "train_task_adapter", "--run.name", f"looked-{way}", *REPLAY, way=way)
            self.assertEqual([done.returncode for done in ended], [0, 0], ended[0].stderr)
            found = place.run_of(f"looked-{way}", "task")
            self.assert_same(found, expected)
            decided = files.read_manifest(found)["measured"]["keeping"]
            self.assertEqual((decided["how"], decided["from_step"]), (keeping["how"], keeping["from_step"]))
            self.assertAlmostEqual(decided["kept"], keeping["kept"], places=3)

    def test_a_llama_whose_embeddings_are_its_output_head(self) -> None:
        place, base = reference(), temporary_directory() / "tied"
        model, tokenizer = toy.tiny_llama()
        model.config.tie_word_embeddings, model.lm_head.weight = True, model.model.embed_tokens.weight
        with logger.quiet_transformers():
            model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        self.assertNotIn("lm_head.weight", safetensors_io.Checkpoint(base).homes)
        flags = [*FLAGS, f"--base.source={base}", "--domain.train.max_steps=3"]
        last_json(place.start("train_domain_adapter", "--run.name", "tied-one", *flags).wait())
        ended = together(place, "train_domain_adapter", "--run.name", "tied-two", *flags)
        self.assertEqual([done.returncode for done in ended], [0, 0], ended[0].stderr)
        self.assert_same(place.run_of("tied-two"), place.run_of("tied-one"))


class Lost(unittest.TestCase):
    def test_a_process_killed_while_the_model_is_sharded_or_saved_ends_the_other_and_the_run_goes_on(self) -> None:
        place = reference()
        for name, where, call in (
            ("sharding", "utils.models.parallel.sharding._from_main", 9),
            ("saving", "utils.training.checkpoints.whole", 4),
        ):
            with self.subTest(name):
                killed = All((FirstReads(), At(where, Send(signal.SIGKILL), call)))
                first, second = start("fsdp", name, before=(FirstReads(), killed))
                self.assertEqual((first.returncode, second.returncode), (STOPPED, -signal.SIGKILL), first.stderr)
                self.assertIn("another process of this run ended", first.stderr)
                first, second = start("fsdp", name)
                self.assertEqual((first.returncode, second.returncode), (0, 0), first.stderr)
                self.assertEqual("resumed" in first.stderr, name == "saving")
                adapters = [(place.run_of(run) / ADAPTER).read_bytes() for run in (name, "reference")]
                self.assertEqual(adapters[0], adapters[1])


class Unequal(unittest.TestCase):
    """One process of two goes astray: both stop with the code of a failed check, and nothing is published."""

    def assert_refused(self, name: str, ended: Sequence[Completed[str]], said: str) -> None:
        self.assertEqual([done.returncode for done in ended], [UNEQUAL, UNEQUAL], ended[0].stderr)
        self.assertRegex(ended[0].stderr, said)
        self.assertNotIn("Traceback", ended[0].stderr)
        run = reference().run_of(name)
        self.assertFalse((run / files.MANIFEST).exists() or list(run.glob("checkpoints/step-*")))

    def test_an_adapter_that_drifts_in_one_process_is_not_written(self) -> None:
        ended = start("ddp", "drifting", before=(None, At("utils.training.training_loop.learning_rate", Drift(), 1)))
        said = r"domain adapter, after step 4, differs between rank 0 and 1, in 1 of \d+ values: .*lora_A"
        self.assert_refused("drifting", ended, said)

    def test_a_buffer_that_changes_in_one_process_of_a_model_that_is_sharded(self) -> None:
        ended = start("fsdp", "buffer", before=(None, AfterDealing("buffer")))
        said = r"after step 4, differs between rank 0 and 1, in 1 of \d+ values: .*e_score_correction_bias"
        self.assert_refused("buffer", ended, said)

    def test_weights_or_buffers_that_do_not_arrive(self) -> None:
        for name, size, said in (
            ("bias", 4 * 4, r"4 of \d+ values: .*e_score_correction_bias.*inv_freq"),  # persistent and not
            ("bit", 0, r"4 of \d+ values: .*lm_head.*embed_tokens.*gate_up_proj"),
        ):
            with self.subTest(name):
                ended = start("fsdp", name, before=(FirstReads(), All((FirstReads(), Deaf(size)))))
                self.assert_refused(name, ended, f"the model, while it was sharded, differs .*{said}")

    def test_a_model_of_another_dtype_in_one_process(self) -> None:
        ended = start("fsdp", "dtype", before=(None, At("utils.models.parallel.sharding._refuse_unlike", Halve(), 1)))
        self.assert_refused("dtype", ended, r"the model differs between rank 0 and 1, .*norm\.weight")


class Loading(unittest.TestCase):
    def test_without_values_it_is_the_same_model_and_no_weights_are_read(self) -> None:
        for base in (saved_model("minimax_m2"), saved_model("llama"), fp8_checkpoint()):
            for dtype in ("float32", "bfloat16"):
                section = BaseModelSection(source=str(base.directory), dtype=dtype)
                with self.subTest(f"{base.directory.name} {dtype}"):
                    whole = loading.load_model(base, section)
                    with mock.patch("transformers.modeling_utils.safe_open", side_effect=AssertionError("was read")):
                        empty = loading.load_model(base, section, place=torch.device("meta"))
                    self.assertEqual(described(empty), described(whole))
                    tensors = [*empty.parameters(), *empty.buffers()]
                    self.assertEqual({tensor.device.type for tensor in tensors}, {"meta"})


class Asked(unittest.TestCase):
    def told(self, *arguments: str, **more: str) -> Any:
        told = {k: v for k, v in told_by(*arguments).items() if k.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))}
        return mock.patch.dict(os.environ, told | more)

    def test_the_launch_files_ask_for_what_is_done_and_the_others_for_nothing(self) -> None:
        copies = {HSDP_FILE.name: 2, "minimax_m2_2x8_hsdp.yaml": 2}
        for path in sorted(LAUNCH.glob("*.yaml")):
            count = int(told_by("--config_file", str(path))["processes"])
            with self.subTest(path.name), self.told("--config_file", str(path), WORLD_SIZE=str(count)):
                replicate = copies.get(path.name, 1 if path in [*SHARDED, FSDP_FILE] else count)
                self.assertEqual(launcher.read(os.environ), ProcessLayout(replicate, count // replicate))
        with self.told("--config_file", str(FSDP_FILE), WORLD_SIZE="1"):
            self.assertEqual(launcher.read(os.environ), ProcessLayout(), "there is no other rank")

    def test_what_would_be_ignored_is_refused_all_at_once(self) -> None:
        more = {"FSDP_VERSION": "1", "FSDP_OFFLOAD_PARAMS": "true", "ACCELERATE_USE_DEEPSPEED": "true"}
        with self.told("--config_file", str(FSDP_FILE), **more), self.assertRaises(ConfigError) as caught:
            launcher.read(os.environ)
        text = str(caught.exception)
        for said in ("3 problems", "fsdp_version has to be 2 (got '1')", "fsdp_offload_params", "DeepSpeed"):
            self.assertIn(said, text)

    def test_quantised_weights_are_refused(self) -> None:
        model = torch.nn.Linear(4, 4)
        model.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
        with self.assertRaisesRegex(ConfigError, r"quantised weights cannot be sharded \(got \['weight'\]\)"):
            sharding._refuse_unlike(model)

    def test_a_layer_that_the_model_does_not_have_is_refused_before_weights_are_read(self) -> None:
        base = saved_model("llama")
        with (
            self.told("--config_file", str(SHARDED[0]), WORLD_SIZE="2"),
            mock.patch("transformers.modeling_utils.safe_open", side_effect=AssertionError("was read")),
            self.assertRaisesRegex(ConfigError, r"no layer of class MiniMaxM2DecoderLayer .*'LlamaDecoderLayer'"),
        ):
            sharding._layer_classes(loading.skeleton(base))


# ------------------------------------------------------------------------------------------------ runs


@functools.cache
def reference() -> Place:
    """Prepared data and a run of one process, `reference`."""
    place = Place()
    place.prepare()
    last_json(place.start("train_domain_adapter", *training("reference")).wait())
    return place


def training(name: str) -> list[str]:
    return ["--run.name", name, *FLAGS, "--domain.lora.dropout=0.1"]


def launched(name: str, *nodes: list[str], file: str = FSDP_FILE.name) -> list[Completed[str]]:
    """`accelerate launch --config_file FILE scripts/train_domain_adapter.py`, once for each node with its words."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / file)]
    script = [str(ROOT / "scripts" / "train_domain_adapter.py"), *reference().flags, *training(name)]
    env = {k: v for k, v in clean_environment().items() if k != "ACCELERATE_USE_CPU"}  # it has to find that out
    how: dict[str, Any] = {"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, *words, *script], **how) for words in nodes]
    said = [process.communicate(timeout=1200) for process in processes]
    return [Completed(p.args, p.returncode, *texts) for p, texts in zip(processes, said, strict=True)]


def together(place: Place, script: str, *flags: str, way: str = "fsdp", before: Any = (None, None)) -> list[Any]:
    """Two processes with what `accelerate launch` tells them; the first one's end comes first."""
    told = told_by("--config_file", str(FSDP_FILE)) if way == "fsdp" else {}
    told = {name: value for name, value in told.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}
    return [script.wait() for script in place.two(script, *flags, before=before, told=told)]


def start(way: str, name: str, before: Any = (None, None)) -> list[Any]:
    """A run of the domain adapter in one process, or in two that hold the model whole (ddp) or share it (fsdp)."""
    if way == "one":
        return [reference().start("train_domain_adapter", *training(name), before=before[0]).wait()]
    return together(reference(), "train_domain_adapter", *training(name), way=way, before=before)


def all_losses(run: Path) -> list[float]:
    measured = files.read_manifest(run)["measured"]
    return [*losses(run), *(loss for _, loss in measured["dev_losses"])]


def kept_step(run: Path) -> int:
    return files.read_manifest(run)["measured"]["kept_step"]


def described(model: torch.nn.Module) -> dict[str, Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors}


# ---------------------------------------------------------------------------- faults, in one of the processes


@dataclass(frozen=True)
class FirstReads:
    """The first rank reads the weights for all, as it does where they are not simply rows of tensors on disk."""

    def __call__(self) -> None:
        from utils.models.parallel import shard_reading

        shard_reading.reader = lambda base, model: None


@dataclass(frozen=True)
class Drift:
    """The first adapter matrix is no longer what it was, by little."""

    def __call__(self) -> None:
        with torch.no_grad():
            all_objects(torch.optim.AdamW)[0].param_groups[0]["params"][0].add_(1e-4)


@dataclass(frozen=True)
class Halve:
    """A norm is in another dtype."""

    def __call__(self) -> None:
        models = [m for m in all_objects(torch.nn.Module) if type(m).__name__ == "MiniMaxM2Model"]
        (norm,) = [m.norm for m in models if not m.norm.weight.is_meta]  # an outline of it has no values
        norm.to(torch.bfloat16)


@dataclass(frozen=True)
class AfterDealing:
    """A routing bias changes after the model was sharded."""

    what: str

    def __call__(self) -> None:
        shard = sharding.shard

        def and_change(module: torch.nn.Module) -> None:
            shard(module)
            next(b for name, b in module.named_buffers() if "e_score" in name).add_(1e-3)

        sharding.shard = and_change


@dataclass(frozen=True)
class Deaf:
    """Tensors of this many bytes do not arrive; 0: the large ones do, but for one bit."""

    size: int

    def __call__(self) -> None:
        owner, name = resolve("utils.models.parallel.sharding._from_main")
        receive = getattr(owner, name)

        def half_heard(as_bytes: torch.Tensor) -> None:
            if as_bytes.numel() == self.size:
                receive(as_bytes.clone())
                as_bytes.zero_()
                return
            receive(as_bytes)
            if not self.size and as_bytes.numel() > 100_000:
                as_bytes[12] ^= 1

        setattr(owner, name, half_heard)


def all_objects(kind: type) -> list[Any]:
    import gc

    return [found for found in gc.get_objects() if isinstance(found, kind)]


if __name__ == "__main__":
    unittest.main()
