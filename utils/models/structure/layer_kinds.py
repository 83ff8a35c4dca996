"""Which decoder layers of a model are of one kind, by what they are made of and set to, not by words of config.json.

Layers that hold the same tensors may compute differently: with a window or without, with positions or without. Most
configurations say so in `layer_types`, some in words of their own (GPT-Neo), and older files leave it to the code.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from utils.exceptions import ArtefactError
from utils.models.structure import model_class
from utils.models.weights import tensor_names

Settings = dict[tuple[str, str], Hashable]


def layer_kinds(model: Any, count: int) -> list[frozenset[Any]]:
    """Something for each decoder layer that equal layers share; empty where one list does not hold all of them."""
    causal = model_class.causal(model)
    try:
        path = tensor_names.decoder_list((name for name, _ in causal.named_parameters()), count)
    except ArtefactError:
        return []
    described = [_settings(layer) for layer in list(causal.get_submodule(path).children())[:count]]
    shared = [key for key in dict.fromkeys(k for d in described for k in d) if not _counts_up(key, described)]
    return [frozenset((key, settings[key]) for key in shared if key in settings) for settings in described]


def _settings(layer: torch.nn.Module) -> Settings:
    """Classes, and plain attributes but fractions, which may grow with depth."""
    settings: Settings = {}
    for path, module in layer.named_modules():
        settings[path, "class"] = type(module)
        for name, value in vars(module).items():
            if not name.startswith("_") and (value is None or isinstance(value, (bool, int, str, tuple))):
                settings[path, name] = repr(value)
    return settings


def _counts_up(key: tuple[str, str], described: Sequence[Mapping[tuple[str, str], Hashable]]) -> bool:
    """Whether an attribute is the layer's number, or a multiple of it."""
    values = [str(settings.get(key)) for settings in described]
    if len(values) < 2 or not all(value.isdigit() for value in values):
        return False
    numbers = [int(value) for value in values]
    steps = {second - first for first, second in itertools.pairwise(numbers)}
    # of two layers any two numbers are a sequence: a window is wider than that
    return len(steps) == 1 and not steps & {0} and (len(values) > 2 or steps <= {1, 2})
