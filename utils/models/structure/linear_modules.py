"""The linear modules of a language model that an adapter may take, found in the model and not by a list of names.

They are those of the decoder's layers: attention, MLP, and what stands in their place. Not among them: the output head,
embeddings, vision and audio towers, routers, and modules whose weight the model's own code reads beside calling them,
because an adapter on the module would be passed by there (state-space mixers do so for their fused kernels).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import AUTO
from utils.exceptions import Problem, did_you_mean
from utils.models.structure import model_class
from utils.models.weights import tensor_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMED = 3


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module multiplies by one matrix: a linear one, or GPT-2's Conv1D, with or without adapters on it."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(getattr(module, "base_layer", module), (torch.nn.Linear, Conv1D))


def adaptable(model: Any) -> list[str]:
    """Paths of the linear modules that an adapter may take, in the model's order."""
    return [name for name, reason in _judged(model_class.causal(model)).items() if not reason]


def named(model: Any, targets: Sequence[str]) -> list[str]:
    """Paths of the modules that `target_modules` says: all for auto, else those with such a leaf name."""
    found = adaptable(model)
    return found if AUTO in targets else [name for name in found if name.rpartition(".")[2] in targets]


def problems(model: Any, targets: Sequence[str], setting: str = "lora.target_modules") -> list[Problem]:
    """Why these target names cannot be adapted on this model; empty when they can."""
    judged = _judged(model_class.causal(model))
    usable = {name.rpartition(".")[2] for name, reason in judged.items() if not reason}
    if AUTO in targets:
        kind = type(model_class.causal(model)).__name__
        fix = "give another --base.source"
        return [] if usable else [Problem(f"{setting} auto: {kind} has no linear module to adapt", fix=fix)]
    found = []
    for target in targets:
        if target in usable:
            continue
        reasons = {reason for name, reason in judged.items() if reason and name.rpartition(".")[2] == target}
        what = f"{setting} {target}: " + (" and ".join(sorted(reasons)) or "the base model has no such module")
        found.append(Problem(what, fix=did_you_mean(target, usable) or f"it has {', '.join(sorted(usable))}"))
    return found


def leaves(names: Iterable[str]) -> list[str]:
    """The last parts of paths, each once, in their order."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def unplaced(directory: Path, names: Iterable[str]) -> list[str]:
    """Modules of the model without a tensor of their own on disk: they could be trained and never be merged."""
    there = tensor_names.weight_shapes(directory)
    return [name for name in names if name not in there]


def _judged(model: PreTrainedModel) -> dict[str, str]:
    """Path of every linear module in the decoder -> why an adapter cannot take it; empty when it can."""
    decoder, prefix = model_class.decoder(model), model_class.decoder_path(model)
    head = model.get_output_embeddings()
    found = {}
    for path, module in decoder.named_modules():
        if not is_linear(module) or module is head or ".lora_" in f".{path}" or path.endswith("base_layer"):
            continue
        found[f"{prefix}.{path}".lstrip(".")] = _reason(decoder, path, module)
    return found


def _reason(decoder: torch.nn.Module, path: str, module: torch.nn.Module) -> str:
    owner_path, _, leaf = path.rpartition(".")
    owner = decoder.get_submodule(owner_path)
    if not any(part.isdigit() for part in path.split(".")):
        return "it lies outside the decoder's layers"
    if _routes(decoder, owner_path, getattr(module, "base_layer", module)):
        return "it is a router"
    if leaf in _read_weights(type(owner)):
        return f"{type(owner).__name__} also reads its weight itself, past an adapter on it"
    return ""


def _routes(decoder: torch.nn.Module, owner_path: str, module: torch.nn.Module) -> bool:
    """Whether a linear module chooses or weighs experts: a score, or one for each, beside or in a block of experts."""
    count = module.weight.shape[0] if isinstance(module, torch.nn.Linear) else module.weight.shape[1]
    count = getattr(module, "out_features", count)
    for path in (owner_path, owner_path.rpartition(".")[0]):
        block = decoder.get_submodule(path)
        experts = getattr(block, "experts", None)
        if isinstance(experts, torch.nn.Module):
            number = getattr(experts, "num_experts", None) or len(list(experts.children()))
            stacked = [p.shape[0] for p in experts.parameters(recurse=False) if p.ndim == 3]
            if count == 1 or count in {number, *stacked}:
                return True
    return False


@functools.cache
def _read_weights(kind: type) -> frozenset[str]:
    """Children of a class whose `weight` its code reads, but for asking its dtype, device or shape."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|is_|data_ptr))", source))
