"""The base model in float32, for checks that compare logits: of equal models they differ by rounding only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import torch

from config import AUTO, BaseModelSection
from utils.exceptions import ArtefactError
from utils.models import devices, loading
from utils.models.base_model import BaseModel
from utils.models.model_shapes import PLAIN
from utils.models.parallel import launcher
from utils.models.weights import layer_sample
from utils.models.weights.safetensors_io import Checkpoint

PROBE_ROWS, PROBE_TOKENS = 2, 48
# an environment variable that transformers reads
FRUGAL = "HF_DEACTIVATE_ASYNC_LOAD"


def in_float32(base: BaseModel, section: BaseModelSection) -> Any:
    """The base model in float32, with every expert visited by every token; a quantized one dequantized.

    The choice of a few experts is a step at which errors of 1e-7 become visible.
    """
    if section.attention.startswith("flash"):  # has no float32
        section = section.model_copy(update={"attention": AUTO})
    with frugal_loading():
        base = replace(base, quantization=PLAIN)
        model = loading.load_model(base, section, dtype=torch.float32)
    return visiting_every_expert(model)


def visiting_every_expert(model: Any) -> Any:
    """The model, whose routers now choose all experts for every token."""
    counts = {path: module.num_experts for path, module in model.named_modules() if hasattr(module, "num_experts")}
    for path, module in model.named_modules():
        if hasattr(module, "top_k"):
            # of attention over experts only what is inside knows their number
            inside = (count for at, count in counts.items() if at.startswith(f"{path}."))
            module.top_k = counts.get(path, next(inside, module.top_k))
    return model


@contextmanager
def frugal_loading() -> Iterator[None]:
    """transformers 5.23 reads ahead in threads while it joins experts: more than 8 GB beside a model of 14 GB."""
    before = os.environ.get(FRUGAL)
    os.environ[FRUGAL] = "1"
    try:
        yield
    finally:
        os.environ.pop(FRUGAL) if before is None else os.environ.update({FRUGAL: before})


def probe(checkpoint: Checkpoint) -> torch.Tensor:
    """Token ids (B, T) on which models are compared, the same every time."""
    vocabulary = int(layer_sample.text_settings(checkpoint.config)["vocab_size"])
    return torch.randint(0, vocabulary, (PROBE_ROWS, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))


def fits(base: BaseModel) -> bool:
    """Whether the whole model can be loaded here, by the ranks together where they hold it together."""
    checkpoint, room = Checkpoint(base.directory), available() * launcher.current().shard
    try:
        return len(layer_sample.choose(checkpoint, {}, room)) == layer_sample.layer_count(checkpoint)
    except ArtefactError:
        return False


def available() -> int:
    """Bytes that a model may take here, of memory and of the GPU it would be moved to, with room for what others do."""
    free = psutil.virtual_memory().available
    if devices.device().type == "cuda":
        free = min(free, torch.cuda.mem_get_info()[0])
    return int(0.8 * free)
