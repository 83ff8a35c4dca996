"""Adapters for inference only: each adapted weight becomes base(x) + (x A^T) B^T in as little work as it takes.

PEFT's layer serves training: it asks which adapters are active, casts activations to the factors' float32 (or, under
autocast, the factors to bfloat16, again at every token) and keeps dropout and scale as operations of their own. For
one token on a CPU these many small operations cost more than the arithmetic. Here scale and weight are folded into A
once, and several adapters are one product of their ranks together.

A model carries any number of adapters; `select` chooses them and their weights without touching the base weights, so a
weight search or an evaluation never reloads or rebuilds the model. Weights may be tensors that require a gradient.

What is left is chosen by measurement. A bfloat16 product has a fixed cost of 25-30 microseconds on a CPU (oneDNN),
however small, and a rank-32 product in float32 takes 2-15: so the few rows of a decode step go through the factors in
float32, which is also the more exact. The many rows of a prompt go through them in bfloat16, like the base. On a CPU
with matrix units (AMX) a single row is multiplied by the base's weight as matrix times vector, with the same rounding
as a linear layer but without its re-ordering of the weight; without such units that product is 2 to 3 times slower
than the layer, and the layer is used. On two busy cores with AMX a decode step of SmolLM2-135M at batch 1 with a
composed adapter of rank 32 took, relative to the bare model: PEFT under autocast 1.7, PEFT with bfloat16 factors 1.6,
two bfloat16 products 1.35, float32 factors 1.2, and with the matrix-vector product 1.0 (the bare model would take 0.85
with it). Reading the factors cannot be avoided: they are 7% of the weights here.

Shapes: N rows, r rank, I in_features, O out_features, E experts.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from utils.adapters.factors import Factors, ModuleFactors
from utils.adapters.peft_model import refuse_misfits
from utils.models.parallel import expert_parallel
from utils.models.parallel.expert_parallel import SharedExperts
from utils.models.quantization import is_quantised
from utils.models.structure import linear_modules
from utils.models.weights import tensor_names

# rows up to which float32 factors are the faster on a CPU; above, its float32 products lose to bfloat16 units
FEW_ROWS = 8
Weights = Mapping[str, "float | torch.Tensor"]


def attach(model: torch.nn.Module, adapters: Mapping[str, Factors]) -> torch.nn.Module:
    """Put adapters on a bare model, in place, all selected at weight 1; returns the model.

    Run it without autocast. Raises ArtefactError when the factors do not fit the model.
    """
    owners: dict[str, dict[str, dict[str, ModuleFactors]]] = {}
    for adapter, factors in adapters.items():
        refuse_misfits(model, factors)
        for name, f in factors.items():
            module, _, parameter = name.rpartition(".") if f.is_experts else (name, "", "weight")
            owners.setdefault(module, {}).setdefault(parameter, {})[adapter] = f
    for name, parameters in owners.items():
        module = model.get_submodule(name)
        if isinstance(module, torch.nn.Linear):
            kind = FrozenLoraBeside if is_quantised(module) else FrozenLoraLinear
            model.set_submodule(name, kind(module, parameters["weight"]))
        elif linear_modules.is_linear(module):
            model.set_submodule(name, FrozenLoraBeside(module, parameters["weight"]))
        elif (shared := module.__dict__.get("shared")) is not None:
            model.set_submodule(name, FrozenLoraSharedExperts(module, parameters, shared))
        elif _is_plain_experts(module):
            model.set_submodule(name, FrozenLoraExperts(module, parameters))
        else:
            model.set_submodule(name, FrozenLoraParameters(module, parameters))
    select(model, dict.fromkeys(adapters, 1.0))
    return model


def select(model: torch.nn.Module, weights: Weights | Callable[[str], Weights]) -> None:
    """From now on the model is base + sum of weight x adapter; what is not named is off.

    `weights` may be a function of the module's name, for weights that differ by layer.
    """
    for name, module in model.named_modules():
        if isinstance(module, FrozenLoraLinear):
            module.update.select(weights(name) if callable(weights) else weights)
        elif isinstance(module, (FrozenLoraExperts, FrozenLoraSharedExperts, FrozenLoraParameters)):
            for parameter, update in module.updates.items():
                own = name if parameter == "weight" else f"{name}.{parameter}"
                update.select(weights(own) if callable(weights) else weights)


class Update:
    """The adapters of one weight as one pair of matrices, for the selection that is made.

    Plain attributes: frozen, no part of a checkpoint, and not what `model.parameters()` says the dtype is.
    """

    def __init__(self, parts: Mapping[str, ModuleFactors], like: torch.Tensor):
        # a GPU multiplies small bfloat16 matrices as fast as any; only a CPU gains by float32
        self.dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        self.parts = {
            name: (
                (f.scale * f.a_rI.float()).to(like.device, self.dtype).contiguous(),
                f.b_Or.float().mT.to(like.device, self.dtype).contiguous(),
            )
            for name, f in parts.items()
        }
        self.select(dict.fromkeys(parts, 1.0))

    def select(self, weights: Weights) -> None:
        chosen = [(*self.parts[name], w) for name, w in weights.items() if name in self.parts and not _is_zero(w)]
        self.is_on = bool(chosen)
        if len(chosen) == 1 and not isinstance(chosen[0][2], torch.Tensor) and chosen[0][2] == 1.0:
            self.a_rI, self.b_rO = chosen[0][:2]
        elif chosen:
            self.a_rI = torch.cat([w * a_rI for a_rI, _, w in chosen], dim=-2)
            self.b_rO = torch.cat([b_rO for _, b_rO, _ in chosen], dim=-2)
        self.b_Or = self.b_rO.mT if self.is_on else None


class FrozenLoraLinear(torch.nn.Module):
    """A linear module plus frozen low-rank updates."""

    def __init__(self, base: torch.nn.Linear, parts: Mapping[str, ModuleFactors]):
        super().__init__()
        self.base = base
        self.update = Update(parts, base.weight)

    @property
    def weight(self) -> torch.Tensor:
        """The base's, for code that asks for its dtype or device."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # the base's weight is used directly: calling the module costs as much as one of the small products
        weight_OI, bias_O, update = self.base.weight, self.base.bias, self.update
        rows = x.numel() // x.shape[-1]
        if not update.is_on:
            return F.linear(x, weight_OI, bias_O)
        if x.dtype == update.dtype or rows > FEW_ROWS:
            y = F.linear(x, weight_OI, bias_O)
            h_Nr = F.linear(x.reshape(-1, x.shape[-1]), update.a_rI.to(x.dtype))
            y.view(-1, y.shape[-1]).addmm_(h_Nr, update.b_rO.to(x.dtype))
            return y
        if rows == 1 and vector_products_are_fast():
            x_I = x.reshape(-1)
            y_O = torch.mv(weight_OI, x_I)
            y_O.add_(torch.mv(update.b_Or, torch.mv(update.a_rI, x_I.to(update.dtype))))
            y_O = y_O if bias_O is None else y_O.add_(bias_O)
            return y_O.view(*x.shape[:-1], -1)
        y = F.linear(x, weight_OI, bias_O)
        if rows == 1:
            y.view(-1).add_(torch.mv(update.b_Or, torch.mv(update.a_rI, x.reshape(-1).to(update.dtype))))
            return y
        h_Nr = F.linear(x.reshape(-1, x.shape[-1]).to(update.dtype), update.a_rI)
        y.view(-1, y.shape[-1]).add_(torch.mm(h_Nr, update.b_rO))
        return y


class FrozenLoraBeside(FrozenLoraLinear):
    """A module that multiplies as only it can (4 or 8 bits, Conv1D) plus frozen low-rank updates."""

    def __init__(self, base: torch.nn.Linear, parts: Mapping[str, ModuleFactors]):
        torch.nn.Module.__init__(self)
        self.base = base
        # float32: a quantised weight's dtype is that of its bits
        self.update = Update(parts, torch.empty(0, device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, update = self.base(x), self.update
        if not update.is_on:
            return y
        h_Nr = F.linear(x.reshape(-1, x.shape[-1]).to(update.dtype), update.a_rI)
        return y + torch.mm(h_Nr, update.b_rO).view_as(y).to(y.dtype)


class FrozenLoraExperts(torch.nn.Module):
    """Fused experts plus frozen low-rank updates, expert by expert: only the experts that are hit are computed.

    PEFT makes W + delta for all experts of a layer at every forward pass (3.7 times the layer's weights with two
    adapters); here an expert costs its two small products.
    """

    def __init__(self, base: torch.nn.Module, parameters: Mapping[str, Mapping[str, ModuleFactors]]):
        super().__init__()
        self.base = base
        self.updates = {name: Update(parts, getattr(base, name)) for name, parts in parameters.items()}

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Tokens (N, I), their experts (N, k) and the experts' weights (N, k) -> (N, I), as the base module does."""
        total = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.base.num_experts:  # the padding index of expert parallelism
                continue
            token, place = torch.where(top_k_index == expert)
            gate, up = self._linear("gate_up_proj", hidden_states[token], expert).chunk(2, dim=-1)
            out = self._linear("down_proj", self.base.act_fn(gate) * up, expert)
            total.index_add_(0, token, (out * top_k_weights[token, place, None]).to(total.dtype))
        return total

    def _linear(self, name: str, x_NI: torch.Tensor, expert: int) -> torch.Tensor:
        y = F.linear(x_NI, getattr(self.base, name)[expert])
        update = self.updates.get(name)
        if update is None or not update.is_on:
            return y
        change = (x_NI.to(update.dtype) @ update.a_rI[expert].mT) @ update.b_rO[expert]
        return y + change.to(y.dtype)


class FrozenLoraSharedExperts(torch.nn.Module):
    """Experts that ranks share plus frozen low-rank updates, on each rank those of its own experts."""

    def __init__(
        self,
        base: torch.nn.Module,
        parameters: Mapping[str, Mapping[str, ModuleFactors]],
        shared: SharedExperts,
    ):
        super().__init__()
        self.base = base
        own = slice(shared.first, shared.first + shared.kept)
        self.updates = {
            parameter: Update(
                {name: ModuleFactors(f.a_rI[own], f.b_Or[own], f.scale) for name, f in parts.items()},
                getattr(base, parameter),
            )
            for parameter, parts in parameters.items()
        }
        shared.updates = self._on

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """As the experts, which are sent the other ranks' tokens."""
        return self.base(*arguments, **named)

    def _on(self, parameter: str) -> list[expert_parallel.Update]:
        update = self.updates.get(parameter)
        return [(update.a_rI, update.b_rO.mT, 1.0)] if update is not None and update.is_on else []


class FrozenLoraParameters(torch.nn.Module):
    """Any module plus frozen low-rank updates of its parameters: it computes with W + delta, made at each forward pass.

    For routers, and for experts whose forward pass is their own (biases, inputs before outputs): exact, and as slow as
    PEFT's layer.
    """

    def __init__(self, base: torch.nn.Module, parameters: Mapping[str, Mapping[str, ModuleFactors]]):
        super().__init__()
        self.base = base
        self.updates = {name: Update(parts, getattr(base, name)) for name, parts in parameters.items()}
        self.transposed = tensor_names.transposed_parameters(base)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        weights = {}
        for name, update in self.updates.items():
            if update.is_on:
                delta = update.b_rO.mT @ update.a_rI
                delta = delta.mT if f".{name}" in self.transposed else delta
                weight = getattr(self.base, name)
                weights[name] = weight + delta.to(weight.dtype)
        return torch.func.functional_call(self.base, weights, arguments, named)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # a block may ask its router or experts for what they know
            return getattr(super().__getattr__("base"), name)


def sharing_weights(model: torch.nn.Module) -> Any:
    """A second model whose modules are its own and whose tensors are the first one's: adapters on it cost no copy."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _is_plain_experts(module: torch.nn.Module) -> bool:
    """Experts whose forward pass is the one repeated here: gated, (E, O, I), without biases or a gate of their own."""
    fused = all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in tensor_names.FUSED)
    unusual = [name for name in ("is_transposed", "has_bias", "has_post_expert_norm") if getattr(module, name, False)]
    usual = [name for name in ("has_gate", "is_concatenated") if getattr(module, name, True)]
    gate = getattr(type(module), "_apply_gate", None)
    return fused and not unusual and len(usual) == 2 and getattr(gate, "__name__", "") == "_default_apply_gate"


@functools.cache
def vector_products_are_fast() -> bool:
    """Whether a bfloat16 matrix times a vector beats the layer, as measured on CPUs with and without matrix units."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _is_zero(weight: float | torch.Tensor) -> bool:
    return not isinstance(weight, torch.Tensor) and weight == 0.0
