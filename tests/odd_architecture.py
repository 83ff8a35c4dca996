"""An architecture that no code here knows: position ids ignored, logits with a twist, names and lists of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


class OddConfig(PreTrainedConfig):
    """Sizes under names of its own, but for the number of layers. `houses`: how many floors each list of them has."""

    model_type = "odd_of_the_tests"
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "floors", "hidden_size": "width"}

    def __init__(
        self,
        vocab_size: int = 640,
        width: int = 64,
        floors: int = 2,
        heads: int = 4,
        houses: Sequence[int] = (),
        street: bool = False,
        **rest: Any,
    ):
        self.vocab_size, self.width, self.floors, self.heads = vocab_size, width, floors, heads
        self.houses, self.street = list(houses), street
        super().__init__(**rest)


class OddFloor(nn.Module):
    """Attention with a bias by distance, which is counted from the row's beginning whatever position ids say."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.before, self.between = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.wqkv, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 96), nn.Linear(96, width)

    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x_BTH.shape
        q, k, v = (
            part.view(rows, tokens, self.heads, -1).transpose(1, 2)
            for part in self.wqkv(self.before(x_BTH)).chunk(3, dim=-1)
        )
        back = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
        slopes = 2.0 ** -torch.arange(1, self.heads + 1)
        bias = (-slopes[:, None, None] * back).masked_fill(back < 0, float("-inf"))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(x_BTH.dtype))
        x_BTH = x_BTH + self.leave(mixed.transpose(1, 2).reshape(rows, tokens, width))
        return x_BTH + self.narrow(torch.tanh(self.widen(self.between(x_BTH))))


class OddBase(PreTrainedModel):
    config_class, base_model_prefix, _supports_sdpa = OddConfig, "trunk", True

    def __init__(self, config: OddConfig):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        lists = [
            nn.ModuleList(OddFloor(config.width, config.heads) for _ in range(count))
            for count in config.houses or [config.floors]
        ]
        # one list; lists in a list; or several beside each other, under names of their own
        self.house = nn.ModuleDict({f"floors{number or ''}": floors for number, floors in enumerate(lists)})
        if config.street:
            self.house = nn.ModuleList(lists)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutput:
        x_BTH = self.words(input_ids)
        for floors in self.house if isinstance(self.house, nn.ModuleList) else self.house.values():
            for floor in floors:
                x_BTH = floor(x_BTH)
        return BaseModelOutput(last_hidden_state=x_BTH)


class OddForCausalLM(PreTrainedModel, GenerationMixin):
    config_class, base_model_prefix, _supports_sdpa = OddConfig, "trunk", True

    def __init__(self, config: OddConfig):
        super().__init__(config)
        self.trunk, self.say = OddBase(config), nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.words

    def get_output_embeddings(self) -> nn.Module:
        return self.say

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 0, **rest: Any) -> CausalLMOutput:
        x_BTH = self.trunk(input_ids).last_hidden_state[:, -logits_to_keep:]
        return CausalLMOutput(logits=4.0 * torch.tanh(self.say(x_BTH) / 4.0))

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": input_ids}


def register() -> None:
    """Make transformers' automatic classes know it, in this process."""
    AutoConfig.register(OddConfig.model_type, OddConfig, exist_ok=True)
    AutoModelForCausalLM.register(OddConfig, OddForCausalLM, exist_ok=True)
