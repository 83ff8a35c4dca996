"""The training loop: one for both adapters, on accelerate, small because the details decide.

What it promises: the same adapter bit for bit when killed anywhere and started again (CPU, one process); the loss is
the mean over the trained tokens of the whole step, whatever the number of processes and micro-batches, and whether the
model is whole in each process or dealt out to them; only the named adapter changes; a non-finite number stops the run
within one step; the adapter that is kept is the best on dev, or the last where that is asked for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import TrainSection
from utils import signals
from utils.adapters import peft_model
from utils.artifacts import files
from utils.artifacts.runs import METRICS
from utils.data.batches import Batch, OptimiserStep, TrainingData
from utils.exceptions import ArtefactError, DataError, Interrupted, OutOfMemory, Problem, is_out_of_memory
from utils.logger import event, warning
from utils.models import parallel
from utils.models.devices import peak_memory_bytes
from utils.models.losses import IGNORED, NextTokenLoss, autocast
from utils.progress import Progress
from utils.training import checkpoints, guards

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel


@dataclass(frozen=True)
class TrainingOutcome:
    """What a finished run measured."""

    steps: int
    trained_tokens: int
    seconds: float
    tokens_per_second: float
    kept_step: int
    best_dev_loss: float | None
    dev_losses: list[tuple[int, float]]
    peak_memory_bytes: int
    world_size: int
    is_dealt_out: bool


def train(
    model: PeftModel,
    data: TrainingData,
    dev: list[Batch],
    settings: TrainSection,
    *,
    seed: int,
    directory: Path,
    accelerator: Accelerator,
    what: str,
    before_step: Callable[[int | None], None] = lambda step: None,
) -> TrainingOutcome:
    """Train the active, trainable adapter of `model`; afterwards the model holds the state that is kept.

    `before_step` is called with the number of each step before it, and with None before dev is measured; what it does
    must follow from the number alone, or a resumed run would differ.

    Checkpoints go to `directory/checkpoints`, one line per step to `directory/metrics.jsonl`. Raises NonFiniteError
    and OutOfMemory (naming the batch), Interrupted after a signal (a checkpoint is written), ArtefactError when the
    disk is too small, DataError when there is nothing to train.
    """
    total = sum(len(data.steps(epoch)) for epoch in range(settings.epochs))
    total = min(total, settings.max_steps or total)
    if not total:
        raise DataError(Problem(f"{what}: there is nothing to train on", fix="look at the prepared data's manifest"))
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loop = _TrainingLoop(model, data, dev, settings, total, seed, directory, accelerator, what, before_step)
    loop.resume()
    try:
        loop.run()
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise loop.out_of_memory() from error
        raise
    return loop.finish()


def learning_rate(step: int, total: int, settings: TrainSection) -> float:
    """Linear warm-up, then a cosine to final_learning_rate_share of the peak; a pure function of the step."""
    warmup = max(1, round(settings.warmup_share * total))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    floor = settings.final_learning_rate_share
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


@torch.no_grad()
def mean_loss(loss_module: torch.nn.Module, batches: list[Batch], accelerator: Accelerator) -> float:
    """Mean NLL per trained token over batches, dealt to the processes; every process gets the same number."""
    was_training = loss_module.training
    loss_module.eval()
    inner = accelerator.unwrap_model(loss_module)
    sums = torch.zeros(2, dtype=torch.float64)
    for batch, counts in _share_of(batches, accelerator.process_index, accelerator.num_processes):
        loss = float(_loss(inner, batch, accelerator.device))
        if counts:
            sums += torch.tensor([loss, batch.num_labels], dtype=torch.float64)
    sums = accelerator.reduce(sums.to(accelerator.device), "sum")
    loss_module.train(was_training)
    return float(sums[0] / sums[1])


class _TrainingLoop:
    """The state of one training run and what happens to it, step by step."""

    def __init__(
        self,
        model: PeftModel,
        data: TrainingData,
        dev: list[Batch],
        settings: TrainSection,
        total: int,
        seed: int,
        directory: Path,
        accelerator: Accelerator,
        what: str,
        before_step: Callable[[int | None], None],
    ):
        self.model, self.data, self.dev, self.settings = model.train(), data, dev, settings
        self.total, self.seed, self.accelerator, self.what = total, seed, accelerator, what
        self.before_step = before_step
        module = NextTokenLoss(model)
        self.is_dealt_out = parallel.asked()
        if self.is_dealt_out:
            parallel.deal_out(module)  # the parameters are others after it
        self.parameters = peft_model.trainable_parameters(model)
        optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
        )
        self.loss_module = module if self.is_dealt_out else accelerator.prepare(module)
        self.optimizer = accelerator.prepare(optimizer)
        self.state = checkpoints.TrainingState()
        self.best: checkpoints.Tensors = {}
        self.checkpoints = directory / files.SCRATCH
        self.metrics_path = directory / METRICS
        self.frozen = guards.frozen_adapters(model)
        self.had_gradients = False  # looked at in the first step of this process, so in a resumed run too
        self.names: list[str] = []  # what this process has in its batches of the current step

    def resume(self) -> None:
        """Go back to the newest valid checkpoint, the same one on every process."""
        newest = checkpoints.newest_valid(self.checkpoints) if self.accelerator.is_main_process else None
        newest = _from_main(self.accelerator, newest)
        if newest is not None:
            self._refuse_other(newest)
            self.state, current, best = checkpoints.load(newest, self.optimizer.optimizer)
            _copy_into(self.parameters, current)
            self.best = {name: parallel.like(tensor, self.parameters[name]) for name, tensor in best.items()}
            event(f"{self.what}: resumed", step=self.state.step, checkpoint=newest)
        if self.accelerator.is_main_process:
            checkpoints.require_space(self.checkpoints, self.parameters, self.settings.keep_checkpoints)
        self.metrics = guards.Metrics(self.metrics_path, self.state.step, self.accelerator)

    def run(self) -> None:
        """Every step that is left."""
        state = self.state
        with (
            signals.stop_requested() as signalled,
            Progress(self.what, total=self.total, unit="step", done=state.step) as bar,
        ):
            for epoch, number, step, measures_dev in self._remaining():
                began = time.perf_counter()
                loss, norm, stop = self._step(epoch, step, signalled)
                state.step, state.epoch, state.step_in_epoch = state.step + 1, epoch, number + 1
                labels, seconds = self.data.num_labels(epoch, step), time.perf_counter() - began
                state.trained_tokens += labels
                rate = round(labels / seconds, 1)
                self.metrics.write(
                    step=state.step,
                    epoch=epoch,
                    loss=loss,
                    learning_rate=self.optimizer.param_groups[0]["lr"],
                    grad_norm=norm,
                    tokens_per_second=rate,
                )
                bar.advance(1, loss=loss, tokens_per_second=rate)
                if measures_dev and self.dev:
                    self._measure_dev(epoch)
                state.seconds += time.perf_counter() - began
                if stop:
                    self._save()
                    where = f"{self.what}: stopped at step {state.step} of {self.total}"
                    raise Interrupted(Problem(where, fix="run the same command again"))
                if state.step % self.settings.save_every_steps == 0 and state.step < self.total:
                    self._save()

    def finish(self) -> TrainingOutcome:
        """Put the state that is kept on the model: the best on dev, unless the last is wanted or there is no dev."""
        state = self.state
        kept_step = state.step
        guards.refuse_diverged(self.model, state.step, self.what)
        if self.best and self.settings.keep == "best":
            _copy_into(self.parameters, self.best)
            kept_step = state.best_step
        parallel.refuse_non_finite(self.parameters, f"the {self.what} of step {kept_step}")
        guards.refuse_changed(self.frozen, guards.frozen_adapters(self.model), self.what)
        self.model.eval()
        return TrainingOutcome(
            steps=state.step,
            trained_tokens=state.trained_tokens,
            seconds=round(state.seconds, 2),
            tokens_per_second=round(state.trained_tokens / max(state.seconds, 1e-9), 1),
            kept_step=kept_step,
            best_dev_loss=state.best_dev_loss if self.best else None,
            dev_losses=state.dev_losses,
            peak_memory_bytes=peak_memory_bytes(),
            world_size=self.accelerator.num_processes,
            is_dealt_out=self.is_dealt_out,
        )

    def _remaining(self) -> Iterator[tuple[int, int, OptimiserStep, bool]]:
        """(epoch, step in epoch, step, whether dev is measured after it) from where the run stands to its end."""
        done, first_epoch, first_step = self.state.step, self.state.epoch, self.state.step_in_epoch
        for epoch in range(first_epoch, self.settings.epochs):
            steps = self.data.steps(epoch)
            interval = math.ceil(len(steps) / self.settings.evals_per_epoch)
            for number in range(first_step if epoch == first_epoch else 0, len(steps)):
                if done >= self.total:
                    return
                done += 1
                ends = (number + 1) % interval == 0 or number + 1 == len(steps) or done == self.total
                yield epoch, number, steps[number], ends

    def out_of_memory(self) -> OutOfMemory:
        """What to do about a step that does not fit."""
        section = f"--{self.what.split()[0]}.train"
        fix = f"lower {section}.micro_batch_tokens (now {self.settings.micro_batch_tokens}; the result stays the same)"
        what = f"memory ran out in step {self.state.step + 1} of the {self.what}; the last checkpoint is kept"
        return OutOfMemory(
            Problem(what, ", ".join(self.names[: guards.NAMED]), f"{fix}, or set {section}.gradient_checkpointing")
        )

    def _step(self, epoch: int, step: OptimiserStep, signalled: Callable[[], bool]) -> tuple[float, float, bool]:
        """One optimiser step over all processes: (mean loss per token, gradient norm, was any process signalled)."""
        accelerator, number = self.accelerator, self.state.step
        self.before_step(number)
        labels = max(1, self.data.num_labels(epoch, step))
        sums = torch.zeros(3, dtype=torch.float64)
        self.names, bad = [], []
        mine = _share_of(step, accelerator.process_index, accelerator.num_processes)
        for at, (rows, counts) in enumerate(mine):
            # by the place in the step and not by process: dropout does not depend on the number of processes
            place = at * accelerator.num_processes + accelerator.process_index
            torch.manual_seed((self.seed * 1_000_003 + number) * 4096 + place)
            batch = self.data.batch(epoch, rows)
            self.names += batch.names
            if not counts:  # keeps the number of backward passes equal on every process
                batch = replace(batch, labels_BT=torch.full_like(batch.labels_BT, IGNORED))
            with nullcontext() if at + 1 == len(mine) else accelerator.no_sync(self.loss_module):
                loss = _loss(self.loss_module, batch, accelerator.device)
                if not torch.isfinite(loss):  # the others have to hear of it, so this process may not stop alone
                    bad += batch.names
                # distributed wrappers average gradients over processes; the step's loss is a sum over all of them
                accelerator.backward(loss * (accelerator.num_processes / labels))
            sums[0] += float(loss.detach())
        sums[1], sums[2] = float(signalled()), float(bool(bad))
        sums = accelerator.reduce(sums.to(accelerator.device), "sum")
        if sums[2]:
            raise guards.non_finite(f"loss of step {number + 1}", guards.from_every_process(accelerator, bad))
        if not self.had_gradients:
            guards.refuse_without_gradient(self.parameters)
            self.had_gradients = True
        clipped = accelerator.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        norm = float(parallel.whole(clipped))
        if not math.isfinite(norm):
            names = guards.from_every_process(accelerator, self.names)
            raise guards.non_finite(f"gradient norm of step {number + 1}", names)
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = learning_rate(number, self.total, self.settings)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(sums[0]) / labels, norm, bool(sums[1])

    def _measure_dev(self, epoch: int) -> None:
        state = self.state
        self.before_step(None)
        loss = mean_loss(self.loss_module, self.dev, self.accelerator)
        if not math.isfinite(loss):
            raise guards.non_finite(f"dev loss after step {state.step}", [n for b in self.dev for n in b.names])
        state.dev_losses.append((state.step, loss))
        self.metrics.write(step=state.step, epoch=epoch, dev_loss=loss)
        event(f"{self.what}: dev", step=state.step, loss=loss, perplexity=math.exp(min(loss, 50)))
        if loss < state.best_dev_loss:
            state.best_dev_loss, state.best_step = loss, state.step
            self.best = _copy_of(self.parameters)

    def _save(self) -> None:
        guards.refuse_diverged(self.model, self.state.step, self.what)
        is_main = self.accelerator.is_main_process
        # of a model that is dealt out, all have to take part in making a tensor whole, one at a time
        adapter, best, optimizer = (
            checkpoints.whole(tensors, keep=is_main)
            for tensors in (self.parameters, self.best, checkpoints.optimizer_tensors(self.optimizer.optimizer))
        )
        if is_main:
            self.metrics.sync()
            checkpoints.save(
                self.checkpoints,
                self.state,
                adapter,
                best,
                optimizer,
                self.settings.keep_checkpoints,
                frozen=self.frozen,
                conditions=self._conditions(),
            )
        self.accelerator.wait_for_everyone()

    def _conditions(self) -> dict[str, Any]:
        """What decides the last bits of a step besides the settings."""
        return {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processes": self.accelerator.num_processes,
            "dealt out": self.is_dealt_out,
        }

    def _refuse_other(self, newest: Path) -> None:
        """Raises ArtefactError when a checkpoint was made on other frozen adapters; warns of other conditions."""
        made = files.read_manifest(newest)
        if made.get("frozen", self.frozen) != self.frozen:
            what = f"{newest} was trained on another frozen adapter than the one that is loaded"
            raise ArtefactError(Problem(what, fix=f"restore that adapter, or remove {newest.parent} to start anew"))
        before, now = made.get("conditions", {}), self._conditions()
        changed = [f"{name} {before[name]} -> {now[name]}" for name in before if before[name] != now.get(name)]
        if changed:
            warning(
                "resumed under other conditions: the result may differ in its last bits", changed=", ".join(changed)
            )


def _share_of(items: Sequence[Any], process: int, processes: int) -> list[tuple[Any, bool]]:
    """This process's micro-batches, and whether each counts; short processes repeat one that does not count.

    The passes through the model have to be as many in every process: each is a conversation between them.
    """
    mine = [(rows, True) for rows in items[process::processes]]
    missing = math.ceil(len(items) / processes) - len(mine)
    return mine + [(items[0], False)] * missing


def _loss(module: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    with autocast(module, device):
        return module(batch.input_ids_BT.to(device), batch.position_ids_BT.to(device), batch.labels_BT.to(device))


def _copy_of(parameters: dict[str, torch.nn.Parameter]) -> checkpoints.Tensors:
    return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in parameters.items()}


def _copy_into(parameters: dict[str, torch.nn.Parameter], tensors: checkpoints.Tensors) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(parallel.like(tensors[name], parameter))


def _from_main(accelerator: Accelerator, value: Any) -> Any:
    """Every process continues with the main process's choice."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]
