"""The update of fused experts in its spellings: as factors here, as PEFT lays it out, and of one expert's own tensor.

Here factors are A (E, r, I), B (E, O, r). On disk PEFT lays them out as lora_A (E*r, I), expert-major, and lora_B
(O, r*E), rank-major (peft 0.21 `ParamWrapper`): joining two such files along a dimension is wrong (measured relative
error 1.05), joining factors expert by expert is exact.

Shapes: E experts, r rank, I in_features, O out_features.
"""

from __future__ import annotations

import torch

from utils.adapters.factors import ModuleFactors
from utils.models.weights.tensor_names import Place


def to_peft(factors: ModuleFactors) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_A, lora_B) as PEFT stores them."""
    if not factors.is_experts:
        return factors.a_rI.contiguous(), factors.b_Or.contiguous()
    return factors.a_rI.flatten(0, 1).contiguous(), factors.b_Or.permute(1, 2, 0).flatten(1, 2).contiguous()


def from_peft(lora_A: torch.Tensor, lora_B: torch.Tensor, rank: int, scale: float) -> ModuleFactors:
    """Factors of a fused parameter from PEFT's tensors. Raises ValueError when `rank` does not divide them."""
    if lora_A.shape[0] % rank or lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} are no experts of rank {rank}")
    experts = lora_A.shape[0] // rank
    a_ErI = lora_A.reshape(experts, rank, lora_A.shape[1])
    b_EOr = lora_B.reshape(lora_B.shape[0], rank, experts).permute(2, 0, 1).contiguous()
    return ModuleFactors(a_ErI, b_EOr, scale)


def rows(factors: ModuleFactors, place: Place) -> ModuleFactors:
    """The update of the tensor at `place`, from the factors of its parameter; as the tensor lies, inputs first too."""
    if place.expert is None:
        return transposed(factors) if place.transposed else factors
    size = factors.b_Or.shape[1] // place.parts
    own = slice(place.part * size, (place.part + 1) * size)
    return ModuleFactors(factors.a_rI[place.expert], factors.b_Or[place.expert, own], factors.scale)


def transposed(factors: ModuleFactors) -> ModuleFactors:
    """The same update of a weight that lies with its inputs before its outputs, (I, O) or (E, I, O)."""
    return ModuleFactors(factors.b_Or.mT.contiguous(), factors.a_rI.mT.contiguous(), factors.scale)
