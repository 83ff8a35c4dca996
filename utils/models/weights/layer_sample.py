"""A small model made of some decoder layers of a large one, to check on it what the large one cannot be loaded for.

Embeddings, final norm and head are kept, layers are renumbered from 0, everything is streamed from file to file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from utils.artifacts import files
from utils.exceptions import ArtefactError, Problem
from utils.models.model_shapes import TRANSIENT_LAYERS
from utils.models.weights import safetensors_io
from utils.models.weights.safetensors_io import Checkpoint
from utils.models.weights.tensor_names import layer_of


def choose(checkpoint: Checkpoint, factors: Iterable[str], available_bytes: int) -> list[int]:
    """All layers if their float32 weights fit into this memory, else some, from the first to the last that changes.

    Raises ArtefactError when not even one fits.
    """
    shared, largest = _float32_bytes(checkpoint)
    fitting = (available_bytes - shared) // max(1, largest) - TRANSIENT_LAYERS
    if fitting >= layer_count(checkpoint):
        return list(range(layer_count(checkpoint)))
    if fitting < 1:
        raise ArtefactError(
            Problem(
                "checking one layer of the merged model takes about "
                f"{(shared + (1 + TRANSIENT_LAYERS) * largest) / 1e9:.1f} GB of memory",
                f"{available_bytes / 1e9:.1f} GB available",
                "merge where there is more memory: what is not checked is not published",
            )
        )
    changed = sorted({layer for name in factors if (layer := layer_of(name)) is not None}) or [0]
    last, steps = len(changed) - 1, max(1, fitting - 1)
    return sorted({changed[round(i * last / steps)] for i in range(min(fitting, len(changed)))})


def layer_count(checkpoint: Checkpoint) -> int:
    return int(text_settings(checkpoint.config)["num_hidden_layers"])


def text_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes the language model."""
    return settings.get("text_config", settings)


def renumbered(name: str, layers: list[int]) -> str | None:
    """The name of a tensor or module in the small model; None when it is not part of it."""
    layer = layer_of(name)
    if layer is None:
        return name
    if layer not in layers:
        return None
    return name.replace(f"layers.{layer}.", f"layers.{layers.index(layer)}.", 1)


def factors_of(factors: Mapping[str, Any], layers: list[int]) -> dict[str, Any]:
    """The updates of the small model."""
    return {new: f for name, f in factors.items() if (new := renumbered(name, layers))}


def has_partial_blocks(checkpoint: Checkpoint) -> bool:
    """Whether an FP8 matrix does not end with a whole block: transformers 5.23 takes such blocks for smaller ones."""
    weights = (name.removesuffix(safetensors_io.SCALE) for name in checkpoint.homes if checkpoint.is_scale(name))
    height, width = checkpoint.block
    return any(rows % height or columns % width for *_, rows, columns in (checkpoint.tensor(n).shape for n in weights))


def write(checkpoint: Checkpoint, layers: list[int], directory: Path) -> None:
    """Write the small model to a new directory; FP8 that transformers cannot read is dequantized."""
    plain = has_partial_blocks(checkpoint)
    names, wanted = {}, {}
    for name in checkpoint.homes:
        if (new := renumbered(name, layers)) and not (plain and checkpoint.is_scale(name)):
            tensor = checkpoint.tensor(name)
            names[new] = name
            wanted[new] = safetensors_io.described("F32", tensor.shape) if plain and tensor.is_fp8 else tensor

    def content(new: str) -> Iterator[safetensors_io.Buffer]:
        path, tensor = checkpoint.homes[names[new]], checkpoint.tensor(names[new])
        if wanted[new] is tensor:
            return safetensors_io.raw(path, checkpoint.headers[path], names[new])
        return (safetensors_io.as_bytes(piece_RI) for *_, piece_RI in checkpoint.rows(path, names[new]))

    directory.mkdir()
    safetensors_io.write(directory / "model.safetensors", safetensors_io.plan(wanted, {"format": "pt"}), content)
    settings = {key: value for key, value in checkpoint.config.items() if not (plain and key == "quantization_config")}
    count = layer_count(checkpoint)
    inner = {
        # a list with an entry per layer
        key: [value[layer] for layer in layers] if isinstance(value, list) and len(value) == count else value
        for key, value in text_settings(settings).items()
    }
    inner["num_hidden_layers"] = len(layers)
    files.write_json(
        directory / "config.json", {**settings, "text_config": inner} if "text_config" in settings else inner
    )


def _float32_bytes(checkpoint: Checkpoint) -> tuple[int, int]:
    """Bytes in float32 of what every layer shares, and of the largest layer."""
    by_layer: dict[int | None, int] = {None: 0}
    for name in checkpoint.homes:
        if checkpoint.tensor(name).is_floating and not checkpoint.is_scale(name):
            layer = layer_of(name)
            by_layer[layer] = by_layer.get(layer, 0) + 4 * math.prod(checkpoint.tensor(name).shape)
    shared = by_layer.pop(None)
    return shared, max(by_layer.values(), default=0)
