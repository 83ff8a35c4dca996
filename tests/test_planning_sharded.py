"""Predicted peaks of a sharded step against measured ones: two processes (gloo) that hold a toy together.

Each process counts what torch's profiler sees the CPU allocator give during a second step, and what it holds before.
"""

from __future__ import annotations

import os
import unittest
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from config import ALL_LINEAR_LLAMA, ATTENTION, LoraSection
from tests.support import temporary_directory
from tests.test_planning_estimates import allocated, llama, mixture
from utils import logger
from utils.adapters import peft_model
from utils.models import loading
from utils.models.losses import NextTokenLoss, autocast
from utils.planning import estimates
from utils.planning.estimates import Adapter, TrainingStep
from utils.planning.memory import count_parameters
from utils.training import training_run

RANKS = 2


def peak(rank: int, place: str, shape: Any, dtype: str, targets: tuple[str, ...], rows: int, row_tokens: int) -> None:
    """Write this process's peak bytes to `place/RANK`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=RANKS)
    with logger.quiet_transformers():
        model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    loading.route_outside_autocast(model)
    model = training_run.new_adapter(
        model.requires_grad_(False), "task", LoraSection(rank=8, target_modules=targets), 0
    ).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_module, mesh = NextTokenLoss(model), init_device_mesh("cpu", (RANKS,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(loss_module, mesh=mesh, reshard_after_forward=True)
    optimizer = torch.optim.AdamW(list(peft_model.trainable_parameters(model).values()), lr=1e-3)
    ids_BT = torch.randint(0, shape.vocab_size, (rows, row_tokens))
    positions_BT = torch.arange(row_tokens).expand(rows, -1).contiguous()

    def step() -> None:
        with autocast(loss_module, torch.device("cpu")):
            loss = loss_module(ids_BT, positions_BT, ids_BT)
        (loss / ids_BT.numel()).backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    tensors = [*model.parameters(), *model.buffers(), *(t for s in optimizer.state.values() for t in s.values())]
    held = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)
    (Path(place) / str(rank)).write_text(str(held + allocated(step)))
    dist.destroy_process_group()


@unittest.skipUnless(os.environ.get("LAUNCH_TESTS") == "all", "two processes: make launch-test")
class Sharded(unittest.TestCase):
    CASES: ClassVar = {
        "mixture, bfloat16": (
            mixture(vocab_size=1000, hidden_size=256, intermediate_size=256, num_hidden_layers=6),
            {"dtype": "bfloat16", "targets": ATTENTION, "rows": 2, "row_tokens": 128},
        ),
        "dense, float32": (
            llama(vocab_size=2000, hidden_size=256, intermediate_size=1024, num_hidden_layers=6),
            {"dtype": "float32", "targets": ALL_LINEAR_LLAMA, "rows": 1, "row_tokens": 192},
        ),
    }

    def test_measured_peaks_lie_between_the_predicted_ones_within_25_percent(self) -> None:
        for name, (shape, case) in self.CASES.items():
            with self.subTest(name):
                place = str(temporary_directory())
                arguments = (place, shape, case["dtype"], case["targets"], case["rows"], case["row_tokens"])
                mp.start_processes(peak, args=arguments, nprocs=RANKS, start_method="fork")
                measured = max(int((Path(place) / str(rank)).read_text()) for rank in range(RANKS))
                sizes = count_parameters.of_config(shape)
                what = TrainingStep(
                    base=case["dtype"],
                    adapter=Adapter(case["targets"], 8),
                    tokens=case["rows"] * case["row_tokens"],
                    row_tokens=case["row_tokens"],
                    checkpointing=True,
                )
                low, high = (
                    estimates.training_memory(sizes, what, shards=RANKS, careful=careful).total
                    for careful in (False, True)
                )
                said = f"{low:,} to {high:,} predicted, {measured:,} measured"
                self.assertTrue(0.75 * low < measured < 1.25 * high, said)


if __name__ == "__main__":
    unittest.main()
