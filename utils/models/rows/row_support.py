"""How a model is told where the pieces of a row end, and which way of telling it was measured to work.

    positions     position ids start again at every piece; transformers reads the borders off them
    mask          one mask on all attention scores
    layer_masks   a mask for each type of layer, its window or chunk within it: transformers' own dictionary
    window_mask   one mask within the window that all layers have
    varlen        one row for all, with the lengths and numbers of its pieces: what flash attention and kernels of
                  state-space layers take
    none          nothing works: one piece in each row

Shape suffixes: B rows, T tokens, 1 broadcast.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Way = Literal["positions", "mask", "layer_masks", "window_mask", "varlen", "none"]
# in the order in which they are tried
PACKING: tuple[Way, ...] = ("positions", "layer_masks", "mask", "window_mask", "varlen")
CANDIDATES: tuple[Way, ...] = ("mask", "layer_masks", "window_mask")
_ATTRIBUTE = "row_support"
# why no gradient helps where only padding makes it NaN
BY_PADDING = "its gradient is NaN where a row is padded"


@dataclass(frozen=True)
class RowSupport:
    """What a base model honours. The values of a model that nobody measured are those of a plain decoder.

    `packing` is the way for independent documents, `candidates` that for answers that share a prompt in their row;
    `head` is "fused" where hidden states times the output head are the model's logits, else "model". `pads_left`:
    prompts of unequal length are answered in one batch as they are alone. `measured` has the largest difference of
    each way that was tried, in nats; `why` the reason where nothing could be measured. `untrained`: leaf name of a
    linear module -> why a training step would not change it.
    """

    packing: Way = "positions"
    candidates: Way = "mask"
    head: Literal["fused", "model"] = "fused"
    pads_left: bool = True
    measured: dict[str, float] = field(default_factory=dict)
    why: str = ""
    untrained: dict[str, str] = field(default_factory=dict)

    @property
    def packs(self) -> bool:
        """Whether several documents may share a row."""
        return self.packing != "none"

    def to_json(self) -> dict[str, Any]:
        """What manifests record."""
        return asdict(self)

    def deciding(self, *names: str) -> dict[str, Any]:
        """What of these makes a result another one than that of a plain decoder, for an identity; empty for one."""
        usual, own = asdict(PLAIN_ROWS), asdict(self)
        differing = {
            name: own[name]
            for name in names or ("packing", "candidates", "head", "pads_left")
            if own[name] != usual[name]
        }
        return {"rows": differing} if differing else {}


PLAIN_ROWS = RowSupport()
ALONE = RowSupport("none", "none", "model", pads_left=False)


def causal(model: Any) -> PreTrainedModel:
    """The model itself, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attach(model: Any, support: RowSupport) -> None:
    """From now on rows are fed to the model by these ways."""
    setattr(causal(model), _ATTRIBUTE, support)


def of(model: Any) -> RowSupport:
    """What was measured on the model's base."""
    return getattr(causal(model), _ATTRIBUTE, PLAIN_ROWS)


def arguments(
    model: Any, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor, visible_BTT: torch.Tensor | None = None
) -> dict[str, Any]:
    """Keyword arguments of a forward pass over rows whose positions start again at every piece.

    `visible_BTT` is given where pieces share a beginning: True where a query (first T) may look. With `varlen` the
    tensors are one row, (1, B*T); its tokens are in the same order.
    """
    support = of(model)
    way = support.packing if visible_BTT is None else support.candidates
    inputs: dict[str, Any] = {"input_ids": input_ids_BT, "use_cache": False}
    if way == "none":
        if visible_BTT is not None:
            raise ValueError("this model's candidates do not share a row")
        return inputs
    if way == "varlen":
        return inputs | _one_row(input_ids_BT, position_ids_BT)
    inputs |= {"position_ids": position_ids_BT, "attention_mask": None}
    if way == "positions":
        return inputs
    if visible_BTT is None:
        visible_BTT = _own_piece(position_ids_BT)
    return inputs | {"attention_mask": _mask(causal(model), way, visible_BTT, position_ids_BT)}


def _own_piece(position_ids_BT: torch.Tensor) -> torch.Tensor:
    """True where query and key are of one piece, the key not after the query."""
    piece_BT = _starts(position_ids_BT).cumsum(-1)
    return (piece_BT[:, :, None] == piece_BT[:, None, :]).tril()


def _starts(position_ids_BT: torch.Tensor) -> torch.Tensor:
    return position_ids_BT.diff(prepend=position_ids_BT[:, :1] - 2) != 1


def _one_row(input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor) -> dict[str, Any]:
    starts_BT = _starts(position_ids_BT)
    borders = torch.cat([starts_BT.flatten().nonzero().flatten(), starts_BT.new_full((1,), 0, dtype=torch.long)])
    borders[-1] = starts_BT.numel()
    lengths, longest = borders.to(torch.int32), int(borders.diff().max())
    return {
        "input_ids": input_ids_BT.reshape(1, -1),
        "position_ids": position_ids_BT.reshape(1, -1),
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": (starts_BT.flatten().cumsum(0) - 1).to(torch.int32)[None],
    }


def _mask(
    model: PreTrainedModel, way: Way, visible_BTT: torch.Tensor, position_ids_BT: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What is added to the attention scores, for all layers or for each type of them."""
    settings = model.config.get_text_config()
    back_BTT = position_ids_BT[:, :, None] - position_ids_BT[:, None, :]
    window = getattr(settings, "sliding_window", None)
    near_BTT = visible_BTT if window is None else visible_BTT & (back_BTT < window)
    if way != "layer_masks":
        return _added(model, near_BTT if way == "window_mask" else visible_BTT)
    masks: dict[str, torch.Tensor] = {}
    for kind in dict.fromkeys(settings.layer_types):
        allowed_BTT = near_BTT if kind == "sliding_attention" else visible_BTT
        if kind == "chunked_attention":
            chunk_BT = position_ids_BT // settings.attention_chunk_size
            allowed_BTT = visible_BTT & (chunk_BT[:, :, None] == chunk_BT[:, None, :])
        masks[kind] = _added(model, allowed_BTT)
    return masks


def _added(model: PreTrainedModel, visible_BTT: torch.Tensor) -> torch.Tensor:
    """Additive, because eager attention adds it and sdpa takes it in the query's dtype."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    mask = torch.zeros(visible_BTT.shape, dtype=dtype, device=visible_BTT.device)
    return mask.masked_fill_(~visible_BTT, torch.finfo(dtype).min)[:, None]
