"""The linear modules of a language model that an adapter may take, found in the model and not by a list of names.

They are those of the decoder's layers: attention, MLP, and what stands in their place. Not among them: the output head,
embeddings, vision and audio towers, routers, blocks that only weigh (they give nothing as wide as the model) or compute
without gradients, and modules whose weight the model's own code reads beside calling them, because an adapter on the
module would be passed by there (state-space mixers do so for their fused kernels).
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
    names = adaptable(model)
    return names if AUTO in targets else [name for name in names if name.rpartition(".")[2] in targets]


def problems(model: Any, targets: Sequence[str], setting: str = "lora.target_modules") -> list[Problem]:
    """Why these target names cannot be adapted on this model; empty when they can."""
    judged = _judged(model_class.causal(model))
    usable = {name.rpartition(".")[2] for name, reason in judged.items() if not reason}
    if AUTO in targets:
        kind = type(model_class.causal(model)).__name__
        fix = "give another --base.source"
        return [] if usable else [Problem(f"{setting} auto: {kind} has no linear module to adapt", fix=fix)]
    problems = []
    for target in targets:
        if target in usable:
            continue
        reasons = {reason for name, reason in judged.items() if reason and name.rpartition(".")[2] == target}
        what = f"{setting} {target}: " + (" and ".join(sorted(reasons)) or "the base model has no such module")
        problems.append(Problem(what, fix=did_you_mean(target, usable) or f"it has {', '.join(sorted(usable))}"))
    return problems


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
    head, widths = model.get_output_embeddings(), _widths(model)
    reasons = {}
    for path, module in decoder.named_modules():
        if not is_linear(module) or module is head or ".lora_" in f".{path}" or path.endswith("base_layer"):
            continue
        reasons[f"{prefix}.{path}".lstrip(".")] = _reason(decoder, path, module, widths)
    return reasons


def _reason(decoder: torch.nn.Module, path: str, module: torch.nn.Module, widths: set[int]) -> str:
    owner_path, _, leaf = path.rpartition(".")
    owner, parts = decoder.get_submodule(owner_path), path.split(".")
    layer = next((at for at, part in enumerate(parts[:-1]) if part.isdigit()), None)  # a linear one in a list is none
    if layer is None:
        return "it lies outside the decoder's layers"
    if not _gives(decoder.get_submodule(".".join(parts[:-1][: layer + 2])), widths):
        return "it only weighs: its block gives nothing as wide as the model"
    if _routes(decoder, owner_path, getattr(module, "base_layer", module)):
        return "it is a router"
    if _has_no_gradient(type(owner)):
        return f"{type(owner).__name__} computes without gradients"
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
            if count == 1 or count in {number, *_stacked(experts)}:
                return True
        if any(count in _stacked(child) for child in block.children()):
            return True
    return False


def _stacked(module: torch.nn.Module) -> set[int]:
    """How many matrices its parameters hold one above the other, as fused experts do."""
    is_convolution = isinstance(module, torch.nn.modules.conv._ConvNd)
    return set() if is_convolution else {p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3}


def _widths(model: PreTrainedModel) -> set[int]:
    """How wide the model is between its layers; with its embeddings, which a few models project to it."""
    settings = model.config.get_text_config()
    table = model.get_input_embeddings()
    return {getattr(settings, "hidden_size", None) or table.embedding_dim, table.embedding_dim}


def _gives(block: torch.nn.Module, widths: set[int]) -> bool:
    """Whether a block, or one linear module, has a matrix with outputs as wide as the model; experts' are fused."""
    for module in block.modules():
        if is_linear(module):
            inner = getattr(module, "base_layer", module)
            if getattr(inner, "out_features", getattr(inner, "nf", None)) in widths:
                return True
    return any(p.ndim == 3 and widths & set(p.shape[1:]) for p in block.parameters())


@functools.cache
def _has_no_gradient(kind: type) -> bool:
    """Whether the whole of a class's forward pass is under `no_grad`: what chooses tokens for others does so."""
    try:
        source = inspect.getsource(kind.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError, AttributeError):
        return False
    return re.match(r"\s*@torch\.(no_grad|inference_mode)\b", source) is not None


@functools.cache
def _read_weights(kind: type) -> frozenset[str]:
    """Children of a class whose `weight` its code reads, but for asking its dtype, device or shape."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|is_|data_ptr))", source))
