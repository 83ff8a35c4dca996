"""The training suite: our loop, TRL's SFTTrainer and a plain Hugging Face loop on the same rows with the same LoRA.

All three do their step i before any does step i + 1: TRL's loop is the clock, and the others run in its callback, so a
machine that grows slow slows all. The first step of each is a warm-up. TRL is given its fastest settings here: bfloat16
weights and autocast, packing, no gradient checkpointing, no logging.

How much of the machine is used is the arithmetic that LoRA training needs, over the fastest product measured:

    FLOPs per token = 2 P (forward) + 2 P (gradient of the activations) + 6 L (forward, both gradients)

P counts the weights that a token is multiplied by (linear modules, the active share of fused experts, the output head),
L the adapter's weights. Frozen weights need no gradient of their own, so it is 4 P and not 6 P. Attention scores are
left out (about 5% of it in the default model at 256 tokens), and so is anything computed twice.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from config import Config, TrainSection
from utils import logger
from utils.adapters import peft_model
from utils.artifacts import locks
from utils.benchmarks.inputs import TokenStream
from utils.exceptions import ConfigError, Problem
from utils.logger import event
from utils.models import chat, devices, loading
from utils.models.base_model import BaseModel
from utils.models.losses import IGNORED, NextTokenLoss, autocast
from utils.models.structure import linear_modules

NO_TRL = "trl is not installed: pip install trl"
Step = Callable[[int], None]


@dataclass(frozen=True)
class Rows:
    """The stream as rows of equal length; positions start at 0 in each row and each document. N rows, T tokens."""

    ids_NT: torch.Tensor
    positions_NT: torch.Tensor
    per_step: int
    per_micro: int

    @property
    def steps(self) -> int:
        return len(self.ids_NT) // self.per_step

    def micro_batches(self, step: int) -> list[slice]:
        """The rows of each forward pass of a step."""
        first, end = step * self.per_step, (step + 1) * self.per_step
        return [slice(at, min(end, at + self.per_micro)) for at in range(first, end, self.per_micro)]


def measure(config: Config, base: BaseModel, stream: TokenStream) -> dict[str, Any]:
    """Seconds per step of each contender over `benchmark.training_tokens`, and the share of the machine's peak."""
    rows = make_rows(stream, config.domain.train)
    if rows.steps < 2:
        raise ConfigError(
            Problem(
                f"the training suite needs two steps of {config.domain.train.batch_tokens} tokens",
                config.benchmark.training_tokens,
                f"--benchmark.training_tokens {4 * config.domain.train.batch_tokens}",
            )
        )
    contenders = {"ours": _ours(config, base, rows), "plain": _plain(config, base, rows)}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    grown: dict[str, int] = dict.fromkeys(contenders, 0)

    def others(step: int) -> None:
        names = list(contenders)
        for name in names if step % 2 else names[::-1]:
            before, began = _allocated(), time.perf_counter()
            contenders[name](step)
            _synchronise()
            seconds[name].append(time.perf_counter() - began)
            grown[name] = max(grown[name], _grown(before))
        event(f"training step {step + 1} of {rows.steps}", **{name: own[-1] for name, own in seconds.items()})

    trl_note = ""
    try:
        import trl
    except ImportError:
        event(NO_TRL)
        trl_note = NO_TRL
        for step in range(rows.steps):
            others(step)
    else:
        seconds["trl"], grown["trl"] = [], 0
        trl_note = f"trl {trl.__version__}"
        grown["trl"] = _with_trl(config, base, rows, others, seconds["trl"])
    model = loading.load_model(base, config.base)
    flops = flops_per_token(model, peft_model.attach(model, "probe", config.domain.lora))
    tokens = rows.per_step * rows.ids_NT.shape[1]
    peak = matmul_peak(model, min(tokens, rows.per_micro * rows.ids_NT.shape[1]))
    return {
        "dtype": str(devices.compute_dtype(config.base.dtype)),
        "tokens": stream.source,
        "trl": trl_note,
        "tokens_per_step": tokens,
        "row_tokens": rows.ids_NT.shape[1],
        "counted_steps": rows.steps - 1,
        "flops_per_token": flops,
        "matmul_peak_flops": peak,
        "contenders": {
            name: _summary(own[1:], seconds["ours"][1:], tokens, flops, peak) | {"step_memory_bytes": grown[name]}
            for name, own in seconds.items()
        },
    }


def make_rows(stream: TokenStream, train: TrainSection) -> Rows:
    """Rows, and how many make a step and a forward pass, as the domain stage would group them."""
    length = train.max_sequence_tokens
    count = len(stream.ids) // length
    starts = torch.arange(count)[:, None] * length
    offsets = torch.arange(length).expand(count, -1)
    documents = stream.positions[: count * length].view(count, length)
    # a document that goes on in the next row starts at 0 there, as it does in PackedDocuments
    positions = torch.where(documents > offsets, offsets, documents)
    ids = stream.ids[starts + offsets]
    per_step = max(1, train.batch_tokens // length)
    return Rows(ids, positions, per_step, min(per_step, max(1, train.micro_batch_tokens // length)))


def flops_per_token(model: Any, adapted: Any) -> float:
    """The formula above; `adapted` is the same model with the adapter on it."""
    settings = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    embeddings = model.get_input_embeddings().weight
    weights = lora = 0.0
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            lora += parameter.numel()
        elif parameter.ndim == 3:  # fused experts: a token visits some of them
            active = getattr(settings, "num_experts_per_tok", 1) / parameter.shape[0]
            weights += parameter.numel() * active
        elif parameter.ndim == 2 and parameter is not embeddings and parameter is not head:
            weights += parameter.numel()
    return 4 * (weights + head.numel()) + 6 * lora


@torch.no_grad()
def matmul_peak(model: Any, rows: int) -> float:
    """FLOP/s of the fastest product of `rows` tokens with a weight of the model, best of several."""
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim == 2 and min(p.shape) > 1}
    best = 0.0
    for out_features, in_features in sorted(shapes):
        x = torch.randn(rows, in_features, device=model.device, dtype=model.dtype)
        weight = torch.randn(out_features, in_features, device=model.device, dtype=model.dtype)
        for _ in range(6):
            _synchronise()
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            _synchronise()
            best = max(best, 2.0 * rows * in_features * out_features / (time.perf_counter() - began))
    return best


def _ours(config: Config, base: BaseModel, rows: Rows) -> Step:
    model = peft_model.attach(loading.load_model(base, config.base), "ours", config.domain.lora)
    peft_model.activate(model, ["ours"], trainable="ours")
    device = next(model.parameters()).device
    loss_module = NextTokenLoss(model.train())

    def loss(here: slice) -> torch.Tensor:
        ids = rows.ids_NT[here].to(device)
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
        with autocast(loss_module, device):
            total = loss_module(ids, rows.positions_NT[here].to(device), labels)
        return total / (ids.shape[0] * (ids.shape[1] - 1))

    return _stepper(model, rows, loss, config.domain.train)


def _plain(config: Config, base: BaseModel, rows: Rows) -> Step:
    """What a short tutorial does: float32 weights under autocast, all logits at once, the model's own loss."""
    model = loading.load_model(base, config.base, dtype=torch.float32)
    model = peft_model.attach(model, "plain", config.domain.lora)
    peft_model.activate(model, ["plain"], trainable="plain")
    device = next(model.parameters()).device
    low = devices.compute_dtype(config.base.dtype) == torch.bfloat16

    def loss(here: slice) -> torch.Tensor:
        ids = rows.ids_NT[here].to(device)
        with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    return _stepper(model.train(), rows, loss, config.domain.train)


def _stepper(model: Any, rows: Rows, loss: Callable[[slice], torch.Tensor], settings: TrainSection) -> Step:
    parameters = list(peft_model.trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)

    def step(number: int) -> None:
        micros = rows.micro_batches(number)
        for here in micros:
            (loss(here) / len(micros)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _with_trl(config: Config, base: BaseModel, rows: Rows, others: Step, seconds: list[float]) -> int:
    """Run TRL's trainer; after each of its steps the others do theirs, outside its clock. Returns its steps' memory."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    lora, settings = config.domain.lora, config.domain.train
    low = devices.compute_dtype(config.base.dtype) == torch.bfloat16

    class Clock(TrainerCallback):
        began, before, grown = 0.0, 0, 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.before, self.began = _allocated(), time.perf_counter()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            _synchronise()
            # from the end of the last callback: fetching, collating and bookkeeping are a part of its loop
            seconds.append(time.perf_counter() - self.began)
            self.grown = max(self.grown, _grown(self.before))
            others(state.global_step - 1)
            self.before, self.began = _allocated(), time.perf_counter()

    with locks.scratch("trl") as scratch, logger.quiet_transformers():
        arguments = SFTConfig(
            output_dir=str(scratch),
            max_steps=rows.steps,
            per_device_train_batch_size=rows.per_micro,
            gradient_accumulation_steps=max(1, rows.per_step // rows.per_micro),
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=settings.max_grad_norm,
            bf16=low,
            packing=True,
            packing_strategy="wrapped",  # the rows are full: cut as they are
            max_length=rows.ids_NT.shape[1],
            gradient_checkpointing=False,
            use_cpu=devices.device().type == "cpu",
            dataloader_pin_memory=devices.device().type == "cuda",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        model = loading.load_model(base, config.base)
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": rows.ids_NT.tolist()}),
            processing_class=chat.load_tokenizer(base.directory),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=linear_modules.named(model, lora.target_modules),
            ),
            callbacks=[clock := Clock()],
        )
        trainer.remove_callback(PrinterCallback)  # it prints to standard output, which is for results
        trainer.train()
    return clock.grown


def _summary(own: list[float], ours: list[float], tokens: int, flops: float, peak: float) -> dict[str, float]:
    median = statistics.median(own)
    return {
        "seconds_per_step": round(median, 4),
        "tokens_per_second": round(tokens / median, 1),
        "time_to_ours": round(statistics.median(a / b for a, b in zip(own, ours, strict=True)), 3),
        "share_of_peak": round(tokens / median * flops / peak, 4),
    }


def _allocated() -> int:
    """Bytes on the GPU now, from where the peak is counted anew; 0 on a CPU, whose processes cannot tell."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def _grown(before: int) -> int:
    return int(torch.cuda.max_memory_allocated()) - before if torch.cuda.is_available() else 0


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
