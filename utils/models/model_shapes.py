"""A model's shapes, as far as memory and time depend on them, and the formats its numbers come in. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 2**30
# the base model in no other bits than its own (`base.quantization`)
PLAIN = "none"


Dtype = Literal["float32", "bfloat16", "fp8", "nf4", "int8"]


# an FP8 checkpoint has one float32 scale for every block of this many rows and columns
FP8_BLOCK = 128


# bitsandbytes' nf4 has a float32 scale for this many weights, its int8 one for every row
NF4_BLOCK = 64


# what checking a merged or composed model on some of its layers takes beside their float32 weights, in layers: 0.8
# while loading and 1.7 with an adapter on the experts were measured, and peft makes every active adapter's update anew
TRANSIENT_LAYERS = 3


@dataclass(frozen=True)
class Matrix:
    """All weight matrices of one leaf name and shape over the layers; `copies` counts every expert.

    `adaptable`: an adapter may take it; a vision tower's, or a router, is counted and stays as it is.
    """

    name: str
    out_features: int
    in_features: int
    copies: int
    is_experts: bool = False
    adaptable: bool = True

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features * self.copies

    def lora_parameters(self, rank: int) -> int:
        """Parameters of A (rank, in) and B (out, rank) for every copy."""
        return (self.out_features + self.in_features) * rank * self.copies


@dataclass(frozen=True)
class ModelSizes:
    """The shapes of a model, as far as memory and time depend on them.

    `parameters` counts by kind: embeddings, head (0 when tied), attention, router, experts, dense, norms, other.
    `query` and `key` are heads x head_dim; `experts` is 0 for a dense model;
    `expert_plan`: transformers knows how ranks can share them.
    """

    model_type: str
    layer_class: str
    parameters: dict[str, int]
    matrices: tuple[Matrix, ...]
    num_layers: int
    layer_parameters: int
    hidden: int
    query: int
    key: int
    heads: int
    intermediate: int
    vocabulary: int
    experts: int = 0
    experts_per_token: int = 0
    expert_plan: bool = False
    has_qk_norm: bool = False
    float32_router: bool = False
    stored: Dtype = "bfloat16"

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    @property
    def expert_layers(self) -> int:
        """Layers that have experts."""
        copies = [matrix.copies for matrix in self.matrices if matrix.is_experts]
        return max(copies, default=0) // max(1, self.experts)

    @property
    def idle(self) -> int:
        """Expert parameters that a token does not visit."""
        if not self.experts:
            return 0
        return self.parameters["experts"] * (self.experts - self.experts_per_token) // self.experts

    @property
    def active(self) -> int:
        """Parameters that a token visits, the embedding table included."""
        return self.total - self.idle

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with; a tied table is the output head too."""
        tied = self.parameters["head"] == 0
        return self.active - (0 if tied else self.parameters["embeddings"])
