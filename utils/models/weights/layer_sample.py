"""A small model made of some decoder layers of a large one, to check on it what the large one cannot be loaded for.

Embeddings, final norm and head are kept, layers are renumbered from 0, everything is streamed from file to file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.artifacts import files
from utils.exceptions import ArtefactError, Problem
from utils.models.model_shapes import TRANSIENT_LAYERS
from utils.models.structure import model_class
from utils.models.weights import safetensors_io
from utils.models.weights.safetensors_io import Checkpoint
from utils.models.weights.tensor_names import decoder_list, layer_of, number_in

# what configurations call the number of layers; some say it twice
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")


def choose(checkpoint: Checkpoint, factors: Iterable[str], available_bytes: int) -> list[int]:
    """All layers if their float32 weights fit into this memory, else some, from the first to the last that changes.

    Raises ArtefactError when not even one fits.
    """
    shared, largest = _float32_bytes(checkpoint)
    fitting = (available_bytes - shared) // max(1, largest) - TRANSIENT_LAYERS
    if fitting >= layer_count(checkpoint):
        return list(range(layer_count(checkpoint)))
    if fitting < 1 or not largest:
        raise ArtefactError(
            Problem(
                f"checking {'one layer of ' if largest else ''}the merged model takes about "
                f"{(shared + (1 + TRANSIENT_LAYERS) * largest) / 1e9:.1f} GB of memory",
                f"{available_bytes / 1e9:.1f} GB available",
                "merge where there is more memory: what is not checked is not published",
            )
        )
    changed = sorted({layer for name in factors if (layer := layer_of(name)) is not None}) or [0]
    last, steps = len(changed) - 1, max(1, fitting - 1)
    return sorted({changed[round(i * last / steps)] for i in range(min(fitting, len(changed)))})


def layer_count(checkpoint: Checkpoint) -> int:
    """Decoder layers of the language model. Raises ArtefactError where config.json does not say."""
    settings = text_settings(checkpoint.config)
    if key := _count_key(settings):
        return int(settings[key])
    # some only list the kind of each, and transformers counts
    count = getattr(model_class.settings_of(checkpoint.directory).get_text_config(), COUNTS[0], None)
    if not isinstance(count, int):
        known = ", ".join(COUNTS)
        raise ArtefactError(Problem("config.json does not say how many layers the model has", fix=f"name it: {known}"))
    return count


def layer_list(checkpoint: Checkpoint) -> str | None:
    """The list of the decoder's layers; None where several lists share them: of such a model no sample is made."""
    try:
        return decoder_list(checkpoint.homes, layer_count(checkpoint))
    except ArtefactError:
        return None


def text_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json that describes the language model."""
    return settings.get("text_config", settings)


def names_in_sample(checkpoint: Checkpoint, layers: list[int]) -> dict[str, str]:
    """Tensor of the large model -> its name in the small one, for those that are part of it."""
    path = layer_list(checkpoint)
    names = {}
    for name in checkpoint.homes:
        layer = number_in(path, name)
        if layer is None:
            names[name] = name
        elif layer in layers:
            rest = name.removeprefix(f"{path}.{layer}.")
            names[name] = f"{path}.{layers.index(layer)}.{rest}"
    return names


def factors_of(factors: Mapping[str, Any], layers: list[int]) -> dict[str, Any]:
    """The updates of the small model."""
    updates = {}
    for name, f in factors.items():
        if (layer := layer_of(name)) is None:
            updates[name] = f
        elif layer in layers:
            before, _, after = name.partition(f".{layer}.")
            updates[f"{before}.{layers.index(layer)}.{after}"] = f
    return updates


def has_partial_blocks(checkpoint: Checkpoint) -> bool:
    """Whether an FP8 matrix does not end with a whole block: transformers 5.23 takes such blocks for smaller ones."""
    weights = (name.removesuffix(safetensors_io.SCALE) for name in checkpoint.homes if checkpoint.is_scale(name))
    height, width = checkpoint.block
    return any(rows % height or columns % width for *_, rows, columns in (checkpoint.tensor(n).shape for n in weights))


def write(checkpoint: Checkpoint, layers: list[int], directory: Path) -> None:
    """Write the small model to a new directory; FP8 that transformers cannot read is dequantized."""
    plain = has_partial_blocks(checkpoint)
    names, tensors = {}, {}
    for name, new in names_in_sample(checkpoint, layers).items():
        if not (plain and checkpoint.is_scale(name)):
            tensor = checkpoint.tensor(name)
            names[new] = name
            tensors[new] = safetensors_io.described("F32", tensor.shape) if plain and tensor.is_fp8 else tensor

    def content(new: str) -> Iterator[safetensors_io.Buffer]:
        path, tensor = checkpoint.homes[names[new]], checkpoint.tensor(names[new])
        if tensors[new] is tensor:
            return safetensors_io.raw(path, checkpoint.headers[path], names[new])
        return (safetensors_io.as_bytes(piece_RI) for *_, piece_RI in checkpoint.rows(path, names[new]))

    directory.mkdir()
    safetensors_io.write(directory / "model.safetensors", safetensors_io.plan(tensors, {"format": "pt"}), content)
    settings = {key: value for key, value in checkpoint.config.items() if not (plain and key == "quantization_config")}
    count, text = layer_count(checkpoint), model_class.settings_of(checkpoint.directory).get_text_config()
    # as transformers works them out: where config.json leaves them out, the layers of a sample keep theirs
    types = {key: value for key, value in text.to_dict().items() if key == "layer_types" and value}
    usual = type(text)()
    inner = {
        # a list with an entry per layer
        key: _of_layers(value, layers) if _is_per_layer(key, value, count, usual) else value
        for key, value in {**types, **text_settings(settings)}.items()
    }
    count_keys = [key for key in {_count_key(inner) or COUNTS[0], *COUNTS} if inner.get(key) == count]
    inner |= dict.fromkeys(count_keys or [COUNTS[0]], len(layers))
    files.write_json(
        directory / "config.json", {**settings, "text_config": inner} if "text_config" in settings else inner
    )


def float32_bytes(checkpoint: Checkpoint, layers: list[int]) -> int:
    """Bytes in float32 of the small model of these layers, and of what loading it takes beside."""
    shared, largest = _float32_bytes(checkpoint)
    return shared + (len(layers) + TRANSIENT_LAYERS) * largest


def _float32_bytes(checkpoint: Checkpoint) -> tuple[int, int]:
    """Bytes in float32 of what every layer shares, and of the largest layer."""
    by_layer: dict[int | None, int] = {None: 0}
    path = layer_list(checkpoint)
    for name in checkpoint.homes:
        if checkpoint.tensor(name).is_floating and not checkpoint.is_scale(name):
            layer = number_in(path, name)
            by_layer[layer] = by_layer.get(layer, 0) + 4 * math.prod(checkpoint.tensor(name).shape)
    shared = by_layer.pop(None)
    return shared, max(by_layer.values(), default=0)


def _is_per_layer(key: str, value: Any, count: int, usual: Any) -> bool:
    """Whether a setting has an entry per layer; a pattern may be a text with a letter for each.

    A list that `usual`, the configuration's defaults, has in another length than layers has its length by accident.
    """
    own = getattr(usual, key, None)
    if key.endswith("_id") or (isinstance(own, (list, tuple)) and len(own) != getattr(usual, COUNTS[0], 0)):
        return False
    return (isinstance(value, list) or (isinstance(value, str) and "pattern" in key)) and len(value) == count


def _of_layers(value: list[Any] | str, layers: list[int]) -> list[Any] | str:
    chosen = [value[layer] for layer in layers]
    return "".join(chosen) if isinstance(value, str) else chosen


def _count_key(settings: Mapping[str, Any]) -> str | None:
    """The setting that holds the number of layers: a usual name, or what the configuration's own class calls it."""
    usual = next((key for key in COUNTS if isinstance(settings.get(key), int)), None)
    if usual is None and settings.get("model_type"):
        from transformers import CONFIG_MAPPING

        with suppress(KeyError, AttributeError):  # a type that transformers does not know
            usual = CONFIG_MAPPING[settings["model_type"]].attribute_map.get(COUNTS[0])
    return usual if isinstance(settings.get(usual or ""), int) else None
