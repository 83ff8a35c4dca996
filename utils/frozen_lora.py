"""Adapters for inference only: each adapted linear module becomes base(x) + (x A^T) B^T in as little work as it takes.

PEFT's layer serves training: it asks which adapters are active, casts activations to the factors' float32 (or, under
autocast, the factors to bfloat16, again at every token) and keeps dropout and scale as operations of their own. For
one token on a CPU these many small operations cost more than the arithmetic. Here the scale is folded into A once.

What is left is chosen by measurement. A bfloat16 product has a fixed cost of 25-30 microseconds on a CPU (oneDNN),
however small, and a rank-32 product in float32 takes 2-15: so the few rows of a decode step go through the factors in
float32, which is also the more exact. The many rows of a prompt go through them in bfloat16, like the base. A single
row is multiplied by the base's weight as matrix times vector, with the same rounding as a linear layer but without its
re-ordering of the weight. On two busy CPU cores a decode step of SmolLM2-135M at batch 1 with a composed adapter of
rank 32 took, relative to the bare model: PEFT under autocast 1.7, PEFT with bfloat16 factors 1.6, two bfloat16
products 1.35, float32 factors 1.2, and with the matrix-vector product 1.0 (the bare model would take 0.85 with it).
Reading the factors cannot be avoided: they are 7% of the weights here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F

from utils.composition import Factors, ModuleFactors
from utils.exceptions import ArtefactError, Problem

# rows up to which float32 factors are the faster on a CPU; above, its float32 products lose to bfloat16 units
FEW_ROWS = 8


class FrozenLoraLinear(torch.nn.Module):
    """A linear module plus a frozen low-rank update, for inference.

    Shapes: N rows, r rank, I in_features, O out_features.
    """

    def __init__(self, base: torch.nn.Linear, factors: ModuleFactors):
        super().__init__()
        device = base.weight.device
        # a GPU multiplies small bfloat16 matrices as fast as any; only a CPU gains by float32
        self.dtype = torch.float32 if device.type == "cpu" else base.weight.dtype
        self.base = base
        # plain attributes: frozen, no part of a checkpoint, and not what `model.parameters()` says the dtype is
        self.a_rI = (factors.scale * factors.a_rI.float()).to(device, self.dtype).contiguous()
        self.b_rO = factors.b_Or.float().t().to(device, self.dtype).contiguous()
        self.b_Or = self.b_rO.t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # the base's weight is used directly: calling the module costs as much as one of the small products
        weight_OI, bias_O = self.base.weight, self.base.bias
        rows = x.numel() // x.shape[-1]
        if x.dtype == self.dtype or rows > FEW_ROWS:
            y = F.linear(x, weight_OI, bias_O)
            h_Nr = F.linear(x.reshape(-1, x.shape[-1]), self.a_rI.to(x.dtype))
            y.view(-1, y.shape[-1]).addmm_(h_Nr, self.b_rO.to(x.dtype))
            return y
        if rows == 1:
            x_I = x.reshape(-1)
            y_O = torch.mv(weight_OI, x_I)
            y_O.add_(torch.mv(self.b_Or, torch.mv(self.a_rI, x_I.to(self.dtype))))
            y_O = y_O if bias_O is None else y_O.add_(bias_O)
            return y_O.view(*x.shape[:-1], -1)
        y = F.linear(x, weight_OI, bias_O)
        h_Nr = F.linear(x.reshape(-1, x.shape[-1]).to(self.dtype), self.a_rI)
        y.view(-1, y.shape[-1]).add_(torch.mm(h_Nr, self.b_rO))
        return y


def put_on(model: torch.nn.Module, factors: Factors) -> torch.nn.Module:
    """Replace each adapted linear module of a bare model, in place; returns the model.

    Run it without autocast. Raises ArtefactError when the factors do not fit the model.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    odd = [name for name, f in factors.items() if name not in linears or linears[name].weight.shape != _shape(f)]
    if odd:
        raise ArtefactError(
            Problem("the adapter does not fit this base model", odd[:5], "it was made for another architecture")
        )
    for name, f in factors.items():
        model.set_submodule(name, FrozenLoraLinear(linears[name], f))
    return model


def sharing_weights(model: torch.nn.Module) -> Any:
    """A second model whose modules are its own and whose tensors are the first one's: adapters on it cost no copy."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _shape(factors: ModuleFactors) -> torch.Size:
    return torch.Size((factors.b_Or.shape[0], factors.a_rI.shape[1]))
