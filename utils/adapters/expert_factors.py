"""PEFT's factors of experts that ranks share: each rank keeps those of its experts, in the same modules and names.

PEFT's layer would make W + B A of all experts of a layer, and fails on a part of them (0.21: `baddbmm` of a tensor and
a DTensor). Here its modules hold the factors and say which are on, as they do for every other layer, and the products
are those of `expert_parallel.with_updates`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from utils.models.parallel import expert_parallel, sharding
from utils.models.parallel.expert_parallel import Update

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def prepare(model: torch.nn.Module) -> None:
    """Before a model is cut: have its PEFT layers on shared experts cut with them, and leave the products to them."""
    from peft.tuners.lora.layer import ParamWrapper

    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    inner = {id(wrapper.base_layer) for wrapper in wrappers}
    for outermost in (wrapper for wrapper in wrappers if id(wrapper) not in inner):
        chain: list[Any] = [outermost]
        while isinstance(chain[-1].base_layer, ParamWrapper):
            chain.append(chain[-1].base_layer)
        experts = chain[-1].base_layer
        shared = experts.__dict__.get("shared")
        if shared is None:  # a router, or experts that are gathered
            continue
        shared.updates = functools.partial(_active, {wrapper.parameter_name: wrapper for wrapper in chain})
        shared.cut_factors = functools.partial(_cut, chain)
        outermost.forward = functools.partial(_forward, experts)


def _forward(experts: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
    return experts(*arguments, **named)


def _active(wrappers: Mapping[str, Any], parameter: str) -> list[Update]:
    """The factors that are on a parameter, of this rank's experts."""
    wrapper = wrappers.get(parameter)
    if wrapper is None or wrapper.disable_adapters:
        return []
    updates: list[Update] = []
    for name in wrapper.active_adapters:
        if name in wrapper.lora_A:
            rank = wrapper.r[name]
            lora_A, lora_B = (sharding.own(side[name].weight) for side in (wrapper.lora_A, wrapper.lora_B))
            a_ErI = lora_A.view(-1, rank, lora_A.shape[1])
            # grouped products take rows one after the other
            b_EOr = lora_B.view(lora_B.shape[0], rank, -1).permute(2, 0, 1).contiguous()
            updates.append((a_ErI, b_EOr, float(wrapper.scaling[name])))
    return updates


def _cut(wrappers: Sequence[Any], mesh: DeviceMesh) -> None:
    for wrapper in wrappers:
        for name, rank in wrapper.r.items():
            lora_A, lora_B = wrapper.lora_A[name], wrapper.lora_B[name]
            lora_A.weight = expert_parallel.factor(lora_A.weight, mesh)
            lora_B.weight = expert_parallel.factor(lora_B.weight, mesh, rank)
