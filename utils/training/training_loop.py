"""The training loop: one for both adapters, on accelerate, small because the details decide.

What it promises: the same adapter bit for bit when killed anywhere and started again (CPU, one process); the loss is
the mean over the trained tokens of the whole step, whatever the number of processes and micro-batches, and whether the
model is whole on each rank or sharded over them; only the named adapter changes; a non-finite number stops the run
within one step; the adapter that is kept is the best on dev, or the last where that is asked for.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch

from utils import signals
from utils.adapters import expert_factors, peft_model
from utils.artifacts import files
from utils.artifacts.runs import METRICS
from utils.data.batches import OptimiserStep
from utils.data.mixed_in_documents import KeptPairs
from utils.exceptions import ArtefactError, ConfigError, Interrupted, Problem, is_out_of_memory
from utils.logger import event, warning
from utils.models.devices import peak_memory_bytes
from utils.models.losses import NextTokenLoss
from utils.models.parallel import expert_parallel, launcher, ranks, sharding
from utils.progress import Progress
from utils.training import checkpoints, gradients, guards, micro_batches, out_of_memory, steps
from utils.training.keeping import keep_decision
from utils.training.keeping.keep_decision import DomainLook, KeepDomain
from utils.training.schedules.learning_rate import learning_rate
from utils.training.training_setup import TrainingOutcome, TrainingSetup


def train(setup: TrainingSetup) -> TrainingOutcome:
    """Train one adapter, from the newest checkpoint where there is one; afterwards the model holds the state kept.

    Raises NonFiniteError and OutOfMemory (naming the batch), Interrupted after a signal (a checkpoint is written),
    ArtefactError when the disk is too small, DataError when there is nothing to train, VerificationError when other
    adapters are on, or trained, than `setup.schedule` says.
    """
    loop = _TrainingLoop(setup)
    steps.announce(setup.data, setup.settings, loop.total, setup.what)
    loop.resume()
    try:
        loop.run()
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory.error_of(setup.what, loop.state.step + 1, setup.settings, loop.names) from error
        raise
    return loop.finish()


class _TrainingLoop:
    """The state of one training run and what happens to it, step by step."""

    def __init__(self, setup: TrainingSetup):
        self.setup, self.settings, self.accelerator, self.what = setup, setup.settings, setup.accelerator, setup.what
        self.total = steps.total(setup.data, self.settings, self.what)
        if self.settings.gradient_checkpointing:
            setup.model.enable_input_require_grads()
            setup.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = setup.model.train()
        module = NextTokenLoss(
            self.model, lambda: peft_model.switched(self.model, setup.schedule.below(self.state.step))
        )
        self.is_dealt_out = ranks.is_sharded()
        if self.is_dealt_out:
            expert_factors.prepare(self.model)
            sharding.shard(module)  # the parameters are others after it
        self.shares_experts = any(expert_parallel.shared_in(self.model))
        self.parameters = peft_model.trainable_parameters(self.model)
        optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=self.settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=self.settings.weight_decay,
        )
        self.loss_module = module if self.is_dealt_out else self.accelerator.prepare(module)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.state = checkpoints.TrainingState(keeping=setup.keep.at_start(self.total) if setup.keep else None)
        self.best: checkpoints.Tensors = {}
        self.checkpoints = setup.directory / files.SCRATCH
        self.frozen = guards.frozen_adapters(self.model)
        self.conditions = checkpoints.conditions(
            self.settings,
            processes=self.accelerator.num_processes,
            is_dealt_out=self.is_dealt_out,
            expert_ranks=launcher.current().expert if self.shares_experts else 1,
        )
        self.had_gradients = False  # looked at in the first step of this process, so in a resumed run too
        self.names: list[str] = []  # what this process has in its batches of the current step

    def resume(self) -> None:
        """Go back to the newest valid checkpoint, the same one on every process."""
        newest = ranks.first(lambda: checkpoints.newest_valid(self.checkpoints)) or self.setup.go_on_from
        if newest is not None:
            checkpoints.refuse_other(newest, frozen=self.frozen, conditions=self.conditions)
            self.state, current, best = checkpoints.load(newest, self.optimizer.optimizer)
            checkpoints.put(self.parameters, current)
            self.best = {name: sharding.like(tensor, self.parameters[name]) for name, tensor in best.items()}
            event(f"{self.what}: resumed", step=self.state.step, checkpoint=newest)
            if self.state.step >= self.total and newest == self.setup.go_on_from:
                what = f"{self.what}: the finished run has made {self.state.step} steps, and {self.total} are asked for"
                raise ConfigError(Problem(what, fix="ask for more: more epochs, or a larger max_steps"))
        keep_decision.say(self.what, self.state.keeping)
        ranks.first(
            lambda: checkpoints.require_space(self.checkpoints, self.parameters, self.settings.keep_checkpoints)
        )
        self.metrics = guards.Metrics(self.setup.directory / METRICS, self.state.step, self.accelerator)

    def run(self) -> None:
        """Every step that is left."""
        state = self.state
        with (
            signals.stop_requested() as signalled,
            Progress(self.what, total=self.total, unit="step", done=state.step) as bar,
        ):
            for epoch, number, step, measures_dev in self._remaining():
                began = time.perf_counter()
                self._switch_adapters(state.step)
                step = self._with_keeping(step)
                loss, norm, stop = self._step(epoch, step, signalled)
                state.step, state.epoch, state.step_in_epoch = state.step + 1, epoch, number + 1
                labels, seconds = self.setup.data.num_labels(epoch, step), time.perf_counter() - began
                state.trained_tokens += labels
                state.first_loss, state.last_loss = loss if state.step == 1 else state.first_loss, loss
                rate = round(labels / seconds, 1)
                self.metrics.write(
                    step=state.step,
                    epoch=epoch,
                    loss=loss,
                    learning_rate=self.optimizer.param_groups[0]["lr"],
                    grad_norm=norm,
                    tokens_per_second=rate,
                    **self._expert_rows(),
                )
                bar.advance(1, loss=loss, tokens_per_second=rate)
                if measures_dev and self.setup.dev:
                    self._measure_dev(epoch)
                if self.setup.keep and state.keeping is None and state.step == self.setup.keep.look_step(self.total):
                    self._decide_keeping(self.setup.keep)
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
        self._save(is_last=True)
        if self.best and self.settings.keep == "best":
            checkpoints.put(self.parameters, self.best)
            kept_step = state.best_step
        sharding.refuse_non_finite(self.parameters, f"the {self.what} of step {kept_step}")
        guards.refuse_changed(self.frozen, guards.frozen_adapters(self.model), self.what)
        guards.warn_if_worse(self.setup, state, dict(state.dev_losses).get(kept_step))
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
            keeping=state.keeping,
        )

    def _remaining(self) -> Iterator[tuple[int, int, OptimiserStep, bool]]:
        """(epoch, step in epoch, step, whether dev is measured after it) from where the run stands to its end."""
        done, first_epoch, first_step = self.state.step, self.state.epoch, self.state.step_in_epoch
        for epoch in itertools.count(first_epoch):  # `max_steps` may be more than those of `epochs`
            if done >= self.total:
                return
            planned = self.setup.data.steps(epoch)
            interval = math.ceil(len(planned) / self.settings.evals_per_epoch)
            for number in range(first_step if epoch == first_epoch else 0, len(planned)):
                if done >= self.total:
                    return
                done += 1
                ends = (number + 1) % interval == 0 or number + 1 == len(planned) or done == self.total
                yield epoch, number, planned[number], ends

    def _switch_adapters(self, step: int | None) -> None:
        """Have the adapters on that the schedule says, and no others; without alternation they have to be already."""
        schedule = self.setup.schedule
        active = schedule.active(step)
        if schedule.alternates:
            peft_model.activate(self.model, active, trainable=schedule.trained)
        peft_model.refuse_other_state(self.model, active, trainable=schedule.trained)

    def _expert_rows(self) -> dict[str, float]:
        """Rows that experts computed on one rank in this step, where ranks share them: the busiest's, and the mean."""
        if not self.shares_experts:
            return {}
        largest, mean = expert_parallel.rows_of_exchanges()
        return {"expert_rows_largest": largest, "expert_rows_mean": mean}

    def _step(self, epoch: int, step: OptimiserStep, signalled: Callable[[], bool]) -> tuple[float, float, bool]:
        """One optimiser step over all processes: (mean loss per token, gradient norm, was any process signalled)."""
        number = self.state.step
        expert_parallel.count_rows()
        loss, stop = self._accumulate(epoch, step, signalled)
        gradients.reduce(self.parameters, self.accelerator.num_processes)
        if not self.had_gradients:
            guards.refuse_without_gradient(self.parameters)
            self.had_gradients = True
        norm = gradients.clip(self.parameters, self.settings.max_grad_norm, self.accelerator)
        if not math.isfinite(norm):
            names = guards.from_every_rank(self.accelerator, self.names)
            raise guards.non_finite(f"gradient norm of step {number + 1}", names)
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = learning_rate(number, self.total, self.settings)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm, stop

    def _accumulate(self, epoch: int, step: OptimiserStep, signalled: Callable[[], bool]) -> tuple[float, bool]:
        """Gradients of one step's mean loss, over all processes: (that loss, was any process signalled)."""
        accelerator, data, number = self.accelerator, self.setup.data, self.state.step
        labels = max(1, data.num_labels(epoch, step))
        sums = torch.zeros(3, dtype=torch.float64)
        self.names, bad = [], []
        mine = micro_batches.share_of(step, accelerator.process_index, accelerator.num_processes)
        for at, (rows, counts) in enumerate(mine):
            # by the place in the step and not by process: dropout does not depend on the number of processes
            place = at * accelerator.num_processes + accelerator.process_index
            torch.manual_seed((self.setup.seed * 1_000_003 + number) * 4096 + place)
            batch = data.batch(epoch, rows)
            self.names += batch.names
            if not counts:  # keeps the number of backward passes equal on every process
                batch = batch.uncounted()
            with nullcontext() if at + 1 == len(mine) else accelerator.no_sync(self.loss_module):
                loss = micro_batches.batch_loss(self.loss_module, batch, accelerator.device)
                if not torch.isfinite(loss):  # the others have to hear of it, so this process may not stop alone
                    bad += batch.names
                # distributed wrappers average gradients over processes; the step's loss is a sum over all of them
                accelerator.backward(loss * (accelerator.num_processes / labels))
            sums[0] += float(loss.detach())
        sums[1], sums[2] = float(signalled()), float(bool(bad))
        sums = accelerator.reduce(sums.to(accelerator.device), "sum")
        if sums[2]:
            raise guards.non_finite(f"loss of step {number + 1}", guards.from_every_rank(accelerator, bad))
        return float(sums[0]) / labels, bool(sums[1])

    def _measure_dev(self, epoch: int) -> None:
        state, dev = self.state, self.setup.dev
        self._switch_adapters(None)
        loss = micro_batches.mean_loss(self.loss_module, dev, self.accelerator)
        if not math.isfinite(loss):
            raise guards.non_finite(f"dev loss after step {state.step}", [n for b in dev for n in b.names])
        state.dev_losses.append((state.step, loss))
        self.metrics.write(step=state.step, epoch=epoch, dev_loss=loss)
        event(f"{self.what}: dev", step=state.step, loss=loss, perplexity=math.exp(min(loss, 50)))
        if loss < state.best_dev_loss:
            state.best_dev_loss, state.best_step = loss, state.step
            self.best = checkpoints.copy_of(self.parameters)

    def _with_keeping(self, step: OptimiserStep) -> OptimiserStep:
        """The step with what keeps the domain in it, where something does."""
        data = self.setup.data
        if self.setup.keep is None or not isinstance(data, KeptPairs):
            return step
        return data.with_keeping(step, self.state.step, keep_decision.keeping_of(self.state.keeping))

    def _decide_keeping(self, settings: KeepDomain) -> None:
        """Look at what the steps until here did to dev documents, and decide what is done from here on."""
        state, (below, windows) = self.state, (self.setup.schedule.below(None), settings.dev)
        losses = []
        for names in ([], below, [*below, self.setup.schedule.trained]):
            with peft_model.switched(self.model, names):
                losses.append(micro_batches.sums(self.loss_module, windows, self.accelerator))
        look = DomainLook(*losses, tokens=sum(batch.num_labels for batch in windows))
        state.keeping = ranks.first(lambda: keep_decision.decide(look, settings, state.step))
        keep_decision.say(self.what, state.keeping)
        if state.keeping["how"] != "off":
            # the best on dev is the best answers: one of before would bring back what the domain lost
            state.best_dev_loss, state.best_step, self.best = float("inf"), 0, {}

    def _save(self, *, is_last: bool = False) -> None:
        """Write a checkpoint; a last one, which only a longer run needs, is done without where there is no space."""
        guards.refuse_diverged(self.model, self.state.step, self.what)
        is_main = self.accelerator.is_main_process
        # of a sharded model all ranks have to take part in gathering a full tensor, one at a time
        adapter, best, optimizer = (
            checkpoints.whole(tensors, keep=is_main)
            for tensors in (self.parameters, self.best, checkpoints.optimizer_tensors(self.optimizer.optimizer))
        )
        if is_main:
            self.metrics.sync()
            try:
                checkpoints.save(
                    self.checkpoints,
                    self.state,
                    adapter,
                    best,
                    optimizer,
                    self.settings.keep_checkpoints,
                    frozen=self.frozen,
                    conditions=self.conditions,
                )
            except ArtefactError as error:
                if not is_last:
                    raise
                warning("the optimiser's state is not kept for a longer run", reason=error.problems[0].what)
        ranks.meet()
