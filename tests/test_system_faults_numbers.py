"""NaN, infinity and too little memory: a clear error with its own exit code, every artefact as it was, and a way on."""

from __future__ import annotations

import functools
import resource
import subprocess
import unittest
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.fault_support import (
    ADAPTER,
    LONG,
    At,
    LimitMemory,
    Raise,
    contents,
    resolve,
    rubbish,
    trained,
    with_both_adapters,
)
from tests.support import Completed, last_json
from utils.artifacts import files

NON_FINITE, NO_MEMORY = 3, 71
AT_STEP = 7  # between the checkpoints of steps 4 and 8
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class InLoss:
    """The loss of one call of the loss function is this number; its gradient is what it would be."""

    value: float
    call: int

    def __call__(self) -> None:
        from utils.training import micro_batches

        original, count = micro_batches.batch_loss, 0

        def loss(*arguments: Any) -> torch.Tensor:
            nonlocal count
            count += 1
            found = original(*arguments)
            return found + self.value if count == self.call else found

        micro_batches.batch_loss = loss


@dataclass(frozen=True)
class InGradient:
    """One value of a gradient becomes this after the `call`-th backward pass."""

    value: float
    call: int

    def __call__(self) -> None:
        from accelerate import Accelerator

        original, count = Accelerator.clip_grad_norm_, 0

        @functools.wraps(original)
        def clip(accelerator: Any, parameters: Any, *rest: Any) -> Any:
            nonlocal count
            count += 1
            parameters = list(parameters)
            if count == self.call:
                parameters[3].grad[1, 1] = self.value
            return original(accelerator, parameters, *rest)

        Accelerator.clip_grad_norm_ = clip


@dataclass(frozen=True)
class InWeight:
    """One value of one trained matrix becomes this just before a function is called."""

    value: float
    where: str
    call: int

    def __call__(self) -> None:
        from utils.training import training_loop

        made, held = training_loop._TrainingLoop.__init__, []

        def init(loop: Any, *arguments: Any) -> None:
            made(loop, *arguments)
            held.append(loop)

        training_loop._TrainingLoop.__init__ = init

        def spoil() -> None:
            with torch.no_grad():
                list(held[0].parameters.values())[2][0, 0] = self.value

        At(self.where, spoil, self.call)()


@dataclass(frozen=True)
class InFrozen:
    """One value of the frozen adapter is moved while the other is trained."""

    def __call__(self) -> None:
        from utils.training import training_loop

        finish = training_loop._TrainingLoop.finish

        def moved(loop: Any) -> Any:
            with torch.no_grad():
                frozen = [p for n, p in loop.model.named_parameters() if "lora_B.domain" in n]
                frozen[0][0, 0] += 1e-3
            return finish(loop)

        training_loop._TrainingLoop.finish = moved


class Training(unittest.TestCase):
    def failed(self, name: str, fault: Callable[[], None] | None, *flags: str, code: int = NON_FINITE) -> Completed:
        """A run that ends with this fault, leaves no artefact, and whose checkpoints are all whole and finite."""
        place = trained()
        done = place.train(name, *flags, before=fault).wait()
        self.assertEqual(done.returncode, code, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        directory = place.run_of(name)
        self.assertFalse((directory / files.MANIFEST).exists())
        self.assertFalse((directory / ADAPTER).exists())
        for checkpoint in directory.glob("checkpoints/step-*"):
            files.verify(checkpoint)
        self.assertEqual(rubbish(directory), [])
        return done

    def resumes(self, name: str, step: int) -> None:
        place = trained()
        done = place.train(name).wait()
        last_json(done)
        self.assertRegex(done.stderr, rf"resumed +step={step}\b")
        self.assertEqual(contents(place.run_of(name))[ADAPTER], contents(place.run_of("reference"))[ADAPTER])

    def test_a_loss_or_gradient_that_is_not_finite_stops_in_its_step_names_the_batch_and_keeps_the_checkpoint(
        self,
    ) -> None:
        for name, fault, what in (
            ("nan-loss", InLoss(NAN, 2 * AT_STEP), "loss"),
            ("inf-gradient", InGradient(INF, AT_STEP), "gradient norm"),
        ):
            with self.subTest(name):
                done = self.failed(name, fault)
                self.assertIn(
                    f"the {what} of step {AT_STEP} is NaN or infinite; the last checkpoint is kept", done.stderr
                )
                self.assertRegex(done.stderr, r"got '.*corpus\.jsonl#\d+|got '(d\d+, )*d\d+'")
                self.resumes(name, 4)

    def test_a_weight_that_is_not_finite_is_in_no_checkpoint_and_in_no_adapter(self) -> None:
        done = self.failed("nan-weight", InWeight(NAN, "utils.training.training_loop._TrainingLoop._save", 2))
        self.assertIn("of the checkpoint after step 8", done.stderr)
        self.assertIn("1 tensors hold NaN or infinity", done.stderr)
        done = self.failed(
            "inf-weight",
            InWeight(INF, "utils.training.training_loop._TrainingLoop.finish", 1),
            "--domain.train.keep=last",
        )
        self.assertIn("the adapter of the checkpoint after step 44: 1 tensors hold NaN or infinity", done.stderr)

    def test_a_dev_loss_that_is_not_finite_stops_the_run(self) -> None:
        done = self.failed("nan-dev", At("utils.training.micro_batches.mean_loss", Spoilt(), 1))
        self.assertIn("the dev loss after step 11 is NaN or infinite", done.stderr)
        self.resumes("nan-dev", 8)

    @unittest.skipUnless(LONG, "a longer one of its kind: make fault-test")
    def test_an_exploding_learning_rate_ends_with_the_same_clear_error(self) -> None:
        done = self.failed("exploded", None, "--domain.train.learning_rate=1e30")
        self.assertRegex(done.stderr, r"the (loss|gradient norm) of step [23] is NaN or infinite")
        self.assertIn("lower the learning rate", done.stderr)

    def test_a_nan_on_one_of_two_processes_stops_both_and_names_the_batch_of_that_one(self) -> None:
        place = trained()
        ended = [script.wait() for script in place.pair("nan-two", before=(None, InLoss(NAN, AT_STEP)))]
        self.assertEqual([done.returncode for done in ended], [NON_FINITE, NON_FINITE], ended[0].stderr)
        self.assertIn(f"the loss of step {AT_STEP} is NaN or infinite", ended[0].stderr)
        self.assertRegex(ended[0].stderr, r"got '(d\d+)")
        self.assertNotIn("Traceback", ended[0].stderr + ended[1].stderr)

    def test_a_frozen_adapter_that_moves_is_seen_and_nothing_is_published(self) -> None:
        place = with_both_adapters()
        flags = ["--run.name", "moved", "--domain_adapter", str(place.run_of("reference"))]
        done = place.start("train_task_adapter", *flags, before=InFrozen()).wait()
        self.assertEqual(done.returncode, 4, done.stderr)
        self.assertIn("the frozen adapter below it changed while it was trained", done.stderr)
        self.assertFalse((place.run_of("moved", "task") / files.MANIFEST).exists())

    def test_memory_that_runs_out_in_a_step_names_the_batch_and_the_setting_and_the_run_goes_on(self) -> None:
        for name, kind, said in (
            ("no-gpu-memory", "torch.OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB"),
            ("no-memory", "builtins.RuntimeError", "[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            ("no-python-memory", "builtins.MemoryError", ""),
        ):
            with self.subTest(name):
                fault = At("utils.models.losses.NextTokenLoss.forward", Raise(kind, said), 2 * AT_STEP)
                done = self.failed(name, fault, code=NO_MEMORY)
                self.assertIn(f"memory ran out in step {AT_STEP} of the domain adapter", done.stderr)
                self.assertRegex(done.stderr, r"got '(d\d+)")
                # a row is as long as the micro-batch here, so recomputing is what is left
                self.assertRegex(
                    done.stderr, r"scripts/train_domain_adapter.py .* --domain.train.gradient_checkpointing true"
                )
        self.resumes("no-memory", 4)


@dataclass(frozen=True)
class Spoilt:
    """From now on the loss of every batch is NaN."""

    def __call__(self) -> None:
        from utils.training import micro_batches

        original = micro_batches.batch_loss
        micro_batches.batch_loss = lambda *arguments: original(*arguments) * NAN


@dataclass(frozen=True)
class InHead:
    """One weight of the loaded model's head is NaN, so every logit of one token is."""

    def __call__(self) -> None:
        from utils.models import loading

        original = loading.load_model

        def load(*arguments: Any, **settings: Any) -> Any:
            model = original(*arguments, **settings)
            model.get_output_embeddings().weight.data[3, 1] = NAN
            return model

        loading.load_model = load


class Evaluation(unittest.TestCase):
    def test_logits_that_are_not_finite_give_no_number_but_the_name_of_their_cell(self) -> None:
        place = with_both_adapters()
        done = place.start("evaluate", "--run.name", "nan-head", before=InHead()).wait()
        self.assertEqual(done.returncode, NON_FINITE, done.stderr)
        self.assertIn("the model gives NaN or infinite log-likelihoods (got 'base')", done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        self.assertEqual(done.stdout, "")
        directory = place.run_of("nan-head", "evaluation")
        self.assertFalse((directory / files.MANIFEST).exists())
        self.assertEqual(list(directory.glob("cell_*.json")), [])
        self.assertIn("verdict", last_json(place.start("evaluate", "--run.name", "nan-head").wait()))


@dataclass(frozen=True)
class LimitReload:
    """The fresh process that reloads the merged model may map only this many bytes."""

    size: int

    def __call__(self) -> None:
        from utils.export import merge_check

        run = subprocess.run
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (self.size, self.size))
        merge_check.subprocess.run = functools.partial(run, preexec_fn=limit)


class Merge(unittest.TestCase):
    @unittest.skipUnless(LONG, "a longer one of its kind: make fault-test")
    def test_memory_that_runs_out_in_a_merge_or_its_self_check_keeps_what_is_written_and_goes_on(self) -> None:
        place = with_both_adapters()
        target = place.root / "large"
        flags = ["--merge_path", str(target)]
        for name, fault in (
            ("writing", At("utils.export.merged_tensors.content", LimitMemory(0), 5)),
            ("writing its first file", At("utils.models.weights.safetensors_io.write", LimitMemory(0), 1)),
            ("comparing", At("utils.export.merge_check._compare", LimitMemory(0), 1)),
            ("reloading", LimitReload(200 << 20)),
        ):
            with self.subTest(name):
                done = place.start("inference", *flags, before=fault).wait()
                self.assertEqual(done.returncode, NO_MEMORY, done.stderr[-3000:])
                self.assertIn("out of memory", done.stderr)
                self.assertEqual("reloading the merged model" in done.stderr, not name.startswith("writing"))
                self.assertNotIn("Traceback", done.stderr)
                self.assertFalse(target.exists())
                self.assertTrue(list(place.root.glob(".large.partial-*")))
        done = place.start("inference", *flags).wait()
        last_json(done)
        self.assertIn("going on with an interrupted merge", done.stderr)
        files.verify(target)


class Faults(unittest.TestCase):
    def test_a_fault_finds_the_function_it_is_put_into(self) -> None:
        for where in (
            "utils.training.micro_batches.batch_loss",
            "utils.models.losses.NextTokenLoss.forward",
            "torch.OutOfMemoryError",
        ):
            owner, name = resolve(where)
            self.assertTrue(callable(getattr(owner, name)))


if __name__ == "__main__":
    unittest.main()
