"""The planner's arithmetic: exact counts, the known memory table within 5%, measured peaks within 15%."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, MiniMaxM2Config

from config import ALL_LINEAR_LLAMA, ATTENTION, LoraSection
from tests.support import ARCHITECTURES, expert_factors, random_factors
from utils import logger
from utils.adapters import inference_layers, peft_model
from utils.models import loading
from utils.models.architectures import minimax_m2
from utils.models.losses import NextTokenLoss, autocast, token_nll
from utils.models.model_shapes import GIB, ModelSizes
from utils.planning import estimates, pass_times
from utils.planning.estimates import Adapter, TrainingStep
from utils.planning.memory import count_parameters
from utils.training import training_run

M2 = minimax_m2.sizes(minimax_m2.PUBLISHED)
QKVO = Adapter(ATTENTION, 16)
TASK = TrainingStep("bfloat16", QKVO, 4096, 4096, checkpointing=True)
H100, H200 = 75 * GIB, 136 * GIB
# what was worked out by hand for 8 GPUs at one row of 4,096 tokens with checkpointing, before this planner was written:
# GiB per GPU, from a chunked loss and one gathered layer to whole logits and a prefetched one
TABLE = {
    "bfloat16, attention": (TASK, 64, 77),
    "fp8, attention": (replace(TASK, base="fp8"), 35, 45),
    "bfloat16, experts r8": (replace(TASK, adapter=Adapter(ATTENTION, 8, True)), 80, 93),
    "bfloat16, experts r16": (replace(TASK, adapter=Adapter(ATTENTION, 16, True)), 83, 96),
    "bfloat16, experts r32": (replace(TASK, adapter=Adapter(ATTENTION, 32, True)), 88, 101),
    "both with experts": (
        replace(TASK, adapter=Adapter(ATTENTION, 16, True), below=Adapter(ATTENTION, 16, True)),
        100,
        121,
    ),
}


class Counts(unittest.TestCase):
    def test_the_real_classes_on_the_meta_device_have_the_known_counts(self) -> None:
        remote = {
            "auto_map": {"AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM"},
            "num_mtp_modules": 3,
        }
        counted = count_parameters.of_settings(
            minimax_m2.PUBLISHED | remote
        )  # as published; no remote code is asked for
        self.assertEqual(counted, M2)  # what dry runs know by heart is what transformers builds
        self.assertEqual(counted.total, 228_689_748_992)
        self.assertEqual(counted.active, 11_030_537_216)
        self.assertEqual(counted.multiplied, 10_415_940_608)
        self.assertEqual(counted.layer_parameters, 3_668_718_592)
        expected = {
            "embeddings": 614_596_608,
            "head": 614_596_608,
            "attention": 2_730_491_904,
            "router": 48_758_784,
            "experts": 224_680_476_672,
            "dense": 0,
            "norms": 444_416 + 384_000,
            "other": 0,
        }
        self.assertEqual(counted.parameters, expected)

    def test_trainable_parameters_by_target(self) -> None:
        expected = {
            (ATTENTION, 8, False): 13_205_504,
            (ATTENTION, 16, False): 26_411_008,
            (ATTENTION, 32, False): 52_822_016,
            (ATTENTION, 64, False): 105_644_032,
            (("q_proj", "v_proj"), 16, False): 13_205_504,
            ((), 8, True): 1_365_245_952,
            ((), 16, True): 2_730_491_904,
            ((), 32, True): 5_460_983_808,
            (ATTENTION, 8, True): 1_378_451_456,
            (ATTENTION, 16, True): 2_756_902_912,
            (ATTENTION, 32, True): 5_513_805_824,
        }
        for adapter, count in expected.items():
            self.assertEqual(sum(estimates.lora_parameters(M2, Adapter(*adapter)).values()), count, adapter)

    def test_toys_are_counted_as_they_are_built_and_attach_trains_what_is_predicted(self) -> None:
        for name, build in ARCHITECTURES.items():
            with self.subTest(name):
                model, _ = build()
                counted = count_parameters.of_config(model.config)
                self.assertEqual(counted.total, sum(p.numel() for p in model.parameters()))
                lora = LoraSection(rank=4, target_modules=ATTENTION, experts=name == "minimax_m2")
                model = training_run.new_adapter(model.requires_grad_(False), "task", lora, 0)
                trained = sum(p.numel() for p in peft_model.trainable_parameters(model).values())
                wanted = estimates.lora_parameters(counted, Adapter(ATTENTION, 4, lora.experts))
                self.assertEqual(trained, sum(wanted.values()))
                self.assertEqual(counted.layer_class, type(model.get_base_model().model.layers[0]).__name__)


class Table(unittest.TestCase):
    def near(self, found: float, expected: float, share: float = 0.05) -> None:
        self.assertLess(abs(found / expected - 1), share, f"{found:.2f} instead of {expected}")

    def test_weights_and_layers(self) -> None:
        self.near(estimates.weight_bytes(M2, "bfloat16") / GIB, 426.0, 0.001)
        self.near(estimates.weight_bytes(M2, "fp8") / GIB, 214.3, 0.001)
        self.near(2 * M2.layer_parameters / GIB, 6.83, 0.001)
        self.near(estimates.loading_bytes(M2, "bfloat16", processes=8, sharded=False) / 1e9, 8 * 457, 0.01)

    def test_peak_per_gpu_of_every_row(self) -> None:
        for name, (step, low, high) in TABLE.items():
            with self.subTest(name):
                self.near(estimates.training_memory(M2, step, shards=8).total / GIB, low)
                whole = estimates.training_memory(M2, step, shards=8, careful=True, whole_logits=True)
                self.near(whole.total / GIB, high)

    def test_verdicts_of_the_table(self) -> None:
        expected = {
            "bfloat16, attention": ("tight", "fits"),
            "fp8, attention": ("fits", "fits"),
            "bfloat16, experts r8": ("no", "fits"),
            "bfloat16, experts r16": ("no", "fits"),
            "bfloat16, experts r32": ("no", "fits"),
            "both with experts": ("no", "fits"),
        }
        for name, (step, _, _) in TABLE.items():
            low, high = (estimates.training_memory(M2, step, shards=8, careful=careful) for careful in (False, True))
            found = tuple(estimates.verdict(low.total, high.total, memory) for memory in (H100, H200))
            self.assertEqual(found, expected[name], name)
        for base in ("bfloat16", "fp8"):  # one GPU of 141 GB holds neither
            alone = estimates.training_memory(M2, replace(TASK, base=base))
            self.assertEqual(estimates.verdict(alone.total, alone.total, H200), "no")

    def test_operations(self) -> None:
        self.near(pass_times.flops_per_token(M2, checkpointing=True) / 1e9, 62)
        longer = pass_times.flops_per_token(M2, row_tokens=4096, checkpointing=True)
        self.assertGreater(longer / 1e9, 62 * 1.1)  # attention over the row is not free


def llama(**shape: int) -> LlamaConfig:
    return LlamaConfig(num_attention_heads=8, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **shape)


def mixture(**shape: int) -> MiniMaxM2Config:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "rotary_dim": 16}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2}
    return MiniMaxM2Config(**(heads | experts | shape))


class Measured(unittest.TestCase):
    """Peak of all tensors in a training step: what is there before it (weights, factors, AdamW's moments) plus the
    largest sum of the CPU allocator's events that torch's profiler records during it, temporaries inside operators
    included. The resident set of so small a process is mostly libraries, and says nothing."""

    # hidden, layers, tokens, packing, checkpointing and dtype all differ, so that every term of the formula matters
    CASES: ClassVar = {
        "mixture, float32": (
            mixture(vocab_size=2000, hidden_size=256, intermediate_size=192, num_hidden_layers=3),
            {"dtype": "float32", "targets": ATTENTION, "rows": 1, "row_tokens": 384},
        ),
        "mixture, bfloat16, packed, checkpointing": (
            mixture(vocab_size=3000, hidden_size=128, intermediate_size=256, num_hidden_layers=5),
            {
                "dtype": "bfloat16",
                "targets": ATTENTION,
                "rows": 2,
                "row_tokens": 256,
                "packed": True,
                "checkpoint": True,
            },
        ),
        "mixture with experts, checkpointing": (
            mixture(vocab_size=1000, hidden_size=256, intermediate_size=256, num_hidden_layers=4),
            {
                "dtype": "float32",
                "targets": ATTENTION,
                "rows": 1,
                "row_tokens": 256,
                "checkpoint": True,
                "experts": True,
            },
        ),
        "dense, bfloat16": (
            llama(vocab_size=3000, hidden_size=256, intermediate_size=512, num_hidden_layers=4),
            {"dtype": "bfloat16", "targets": ALL_LINEAR_LLAMA, "rows": 2, "row_tokens": 192},
        ),
    }

    def test_predicted_peaks_are_within_15_percent(self) -> None:
        for name, (shape, case) in self.CASES.items():
            with self.subTest(name):
                predicted, measured = self.predicted(count_parameters.of_config(shape), **case), measure(shape, **case)
                self.assertLess(abs(predicted / measured - 1), 0.15, f"{predicted:,} predicted, {measured:,} measured")

    @staticmethod
    def predicted(
        found: ModelSizes,
        *,
        dtype: Any,
        targets: tuple[str, ...],
        rows: int,
        row_tokens: int,
        packed: bool = False,
        checkpoint: bool = False,
        experts: bool = False,
    ) -> int:
        step = TrainingStep(
            base=dtype,
            adapter=Adapter(targets, 8, experts),
            tokens=rows * row_tokens,
            row_tokens=row_tokens,
            packed=packed,
            checkpointing=checkpoint,
        )
        return estimates.training_memory(found, step).total


def measure(
    shape: Any,
    *,
    dtype: str,
    targets: tuple[str, ...],
    rows: int,
    row_tokens: int,
    packed: bool = False,
    checkpoint: bool = False,
    experts: bool = False,
) -> int:
    """Peak bytes of the second optimiser step of the real loss, adapters and autocast."""
    with logger.quiet_transformers():
        model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    loading.route_outside_autocast(model)
    lora = LoraSection(rank=8, target_modules=targets, experts=experts)
    model = training_run.new_adapter(model.requires_grad_(False), "task", lora, 0).train()
    if checkpoint:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_module, trained = NextTokenLoss(model), list(peft_model.trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids_BT = torch.randint(0, shape.vocab_size, (rows, row_tokens))
    half = row_tokens // 2 if packed else row_tokens
    positions_BT = (torch.arange(row_tokens) % half).expand(rows, -1).contiguous()

    def step() -> None:
        with autocast(loss_module, torch.device("cpu")):
            loss = loss_module(ids_BT, positions_BT, ids_BT)
        (loss / ids_BT.numel()).backward()
        optimizer.step()

    step()  # makes the moments
    optimizer.zero_grad()
    tensors = [*model.parameters(), *model.buffers(), *(t for s in optimizer.state.values() for t in s.values())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + allocated(step)


def allocated(call: Callable[[], Any]) -> int:
    """Largest sum of the CPU allocator's events during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    if not peak:
        raise AssertionError("the profiler recorded no allocation")
    return peak


class MeasuredInference(unittest.TestCase):
    """Scoring with a mask and answering with two frozen adapters on the model, as a search and an evaluation do."""

    CASES: ClassVar = {
        "mixture, bfloat16": (
            mixture(vocab_size=300, hidden_size=256, intermediate_size=128, num_hidden_layers=2),
            {"dtype": "bfloat16", "targets": ATTENTION, "rows": 8, "row_tokens": 64},
        ),
        "mixture with experts, float32": (
            mixture(vocab_size=1000, hidden_size=256, intermediate_size=256, num_hidden_layers=2),
            {"dtype": "float32", "targets": ATTENTION, "rows": 2, "row_tokens": 128, "experts": True},
        ),
        "dense, float32": (
            llama(vocab_size=500, hidden_size=256, intermediate_size=1024, num_hidden_layers=3),
            {"dtype": "float32", "targets": ALL_LINEAR_LLAMA, "rows": 4, "row_tokens": 128},
        ),
    }

    def test_predicted_peaks_are_within_15_percent(self) -> None:
        for name, (shape, case) in self.CASES.items():
            for what in ("scoring", "answering"):
                with self.subTest(f"{what}: {name}"):
                    predicted, measured = self.both(what, shape, **case)
                    self.assertLess(
                        abs(predicted / measured - 1), 0.15, f"{predicted:,} predicted, {measured:,} measured"
                    )

    @staticmethod
    def both(
        what: str,
        shape: Any,
        *,
        dtype: str,
        targets: tuple[str, ...],
        rows: int,
        row_tokens: int,
        experts: bool = False,
    ) -> tuple[int, int]:
        with logger.quiet_transformers():
            model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        loading.route_outside_autocast(model)
        model.requires_grad_(False).eval()
        parts = {
            name: random_factors(model, targets, 8, 8, seed, 0.02)
            | (expert_factors(model, 8, 8, seed, size=0.02) if experts else {})
            for seed, name in enumerate(("domain", "task"))
        }
        model = inference_layers.attach(model, parts)
        sizes, adapters = count_parameters.of_config(shape), [Adapter(targets, 8, experts)] * 2
        ids_BT = torch.randint(0, shape.vocab_size, (rows, row_tokens))
        positions_BT = torch.arange(row_tokens).expand(rows, -1).contiguous()

        def score() -> None:
            visible_BTT = torch.ones(rows, row_tokens, row_tokens, dtype=torch.bool).tril()
            with autocast(model, torch.device("cpu")):
                token_nll(model, ids_BT, positions_BT, ids_BT, visible_BTT)

        def answer() -> None:
            with torch.no_grad(), autocast(model, torch.device("cpu")):
                model.generate(
                    input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=8, eos_token_id=None
                )

        if what == "scoring":
            call, found = score, estimates.scoring_memory(sizes, dtype, adapters, rows * row_tokens, row_tokens)
        else:
            call, found = answer, estimates.answering_memory(sizes, dtype, adapters, rows, row_tokens, 8)
        call()
        return found.total, sum(p.nbytes for p in model.parameters()) + found.adapters + allocated(call)


if __name__ == "__main__":
    unittest.main()
