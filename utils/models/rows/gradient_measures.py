"""Which linear modules a training step can change: one backward pass of the training loss, with a small LoRA on each.

A model may be right in every forward pass and still not be trainable: an operation in place, a kernel without a
gradient, a square root at zero. As B is zero at the beginning, what a module gets does not depend on which others are
adapted; only an error does, so after one the modules are tried by name.

Shape suffixes: I and O a module's inputs and outputs, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from config import AUTO
from utils.exceptions import MALFORMED, is_out_of_memory
from utils.models.losses import NextTokenLoss
from utils.models.rows import row_layouts, row_support
from utils.models.rows.row_support import BY_PADDING, RowSupport
from utils.models.structure import linear_modules, model_class

Rows = Sequence[Sequence[Sequence[int]]]
RANK = 2
NOT_FINITE, ABSENT, ZERO = "its gradient is NaN or infinite", "no gradient reaches it", "its gradient is zero"


def untrained(model: Any, support: RowSupport, rows: Rows, pad_id: int) -> dict[str, str]:
    """Leaf name of each linear module that a training step would not change -> why; empty where memory runs out.

    `rows` are of unequal length, so that some are padded, with `pad_id`. The model is left in eval mode.
    """
    if not support.packs:
        rows = [[piece] for row in rows for piece in row]
    row_support.attach(model, support)
    try:
        with torch.random.fork_rng():
            return _untrained(model.train(), linear_modules.named(model, (AUTO,)), rows, pad_id)
    except (RuntimeError, MemoryError, *MALFORMED) as error:
        if not isinstance(error, MALFORMED) and not is_out_of_memory(error):
            raise
        return {}  # not even its modules are found, or there is no room: training looks after its first step
    finally:
        model.eval()


def _untrained(model: Any, names: Sequence[str], rows: Rows, pad_id: int) -> dict[str, str]:
    reasons, why = _step(model, names, rows, pad_id)
    if why:
        leaves = linear_modules.leaves(names)
        alone = {leaf: _step(model, [n for n in names if _leaf(n) == leaf], rows, pad_id)[1] for leaf in leaves}
        return {leaf: reason for leaf, reason in alone.items() if reason} or dict.fromkeys(leaves, why)
    other = rows[0][0][0]
    if NOT_FINITE in reasons.values() and other != pad_id:
        again, why = _step(model, names, rows, other)
        if not why and NOT_FINITE not in again.values():
            return again | {leaf: BY_PADDING for leaf, reason in reasons.items() if reason == NOT_FINITE}
    return reasons


def _step(model: Any, names: Sequence[str], rows: Rows, pad_id: int) -> tuple[dict[str, str], str]:
    """(leaf name -> what is wrong with its gradients, the error that the passes raised or nothing)."""
    with _adapted(model, names) as factors:
        try:
            tensors = (t.to(model.device) for t in row_layouts.packed(rows, pad_id))
            NextTokenLoss(model)(*tensors).backward()
        except Exception as error:  # whatever a model's own code raises is an answer here
            if is_out_of_memory(error):
                raise
            first = (str(error).strip().splitlines() or [""])[0][:200]
            return {}, f"a training step stops with {type(error).__name__}: {first}"
        return _faults(model, factors), ""


def _faults(model: Any, factors: dict[str, torch.nn.Parameter]) -> dict[str, str]:
    """NaN anywhere is one; none and zero only where it is so of all modules in such a place, of layers and experts.

    These tokens need not visit every expert, and what is cut off in the last layer of a sample is not in the model.
    """
    faults: dict[str, str] = {}
    places = {name: _place(model, name) for name in factors}
    reached = {places[name] for name, b_OR in factors.items() if b_OR.grad is not None and b_OR.grad.any()}
    for name, b_OR in factors.items():
        if b_OR.grad is not None and not torch.isfinite(b_OR.grad).all():
            faults[_leaf(name)] = NOT_FINITE
        elif places[name] not in reached:
            faults.setdefault(_leaf(name), ABSENT if b_OR.grad is None else ZERO)
    return faults


@contextmanager
def _adapted(model: Any, names: Sequence[str]) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Meanwhile each of these modules gives W x + B A x, with B zero; yields module -> B.

    A layer's input carries a gradient, as it does in all but the first one of a model that has more layers.
    """
    generator, hooks, factors = torch.Generator().manual_seed(0), [], {}
    nothing, whole = torch.zeros((), device=model.device, requires_grad=True), model_class.causal(model)

    def below(module: Any, inputs: tuple[Any, ...]) -> Any:
        is_tensor = bool(inputs) and isinstance(inputs[0], torch.Tensor) and inputs[0].is_floating_point()
        return (inputs[0] + nothing, *inputs[1:]) if is_tensor else None

    def hook(a_RI: torch.Tensor, b_OR: torch.Tensor) -> Any:
        return lambda module, inputs, output: output + F.linear(F.linear(inputs[0], a_RI), b_OR)

    for layer in sorted({layer for name in names if (layer := _layer(name))}):
        hooks.append(whole.get_submodule(layer).register_forward_pre_hook(below))
    for name in names:
        module = whole.get_submodule(name)
        outputs, inputs = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
        a_RI = torch.randn((RANK, inputs), generator=generator).div(inputs**0.5).to(model.device)
        factors[name] = torch.nn.Parameter(torch.zeros((outputs, RANK), device=model.device))
        hooks.append(module.register_forward_hook(hook(a_RI, factors[name])))
    try:
        yield factors
    finally:
        for each in hooks:
            each.remove()


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _layer(name: str) -> str:
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else ""


def _place(model: Any, name: str) -> tuple[str, type]:
    """The path without numbers, and the class of its layer."""
    return re.sub(r"\.\d+\.", ".*.", name), type(model_class.causal(model).get_submodule(_layer(name)))
