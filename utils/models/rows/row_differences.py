"""Which ways of telling a model the borders within a row it honours: each compared with the pieces alone.

Shape suffixes: B rows, T tokens, V vocabulary, N tokens of all rows, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from utils.exceptions import is_out_of_memory
from utils.models import losses
from utils.models.rows import row_layouts, row_support
from utils.models.rows.row_support import ALONE, CANDIDATES, PACKING, RowSupport, Way
from utils.models.structure import model_class

# nats by which sharing a row may move a token in float32, where rounding moves it by 1e-6 to 1e-5
TOLERANCE = 1e-4
# a leak has to be this many times larger than what is allowed, or the model would hide it
SIGHT = 10
# of hidden states, root mean square, relative; bfloat16 alone moves them by up to 0.01
BFLOAT16_TOLERANCE = 0.05
# key of what the tokens after a row's last one move
AHEAD = "padding"
# in place of NaN and infinity, which JSON does not have
UNLIKE = 1e9
# of the largest logit, between our head's logits and the model's
SAME_LOGITS = 1e-5
# what a model without such an argument, or without such a function, raises
_NO_SUCH = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError)


@dataclass(frozen=True)
class _Texts:
    """Token ids that are compared: documents as (first row, second row), and prompts with their candidates."""

    rows: list[list[list[int]]]
    items: list[tuple[list[int], list[list[int]]]]

    @property
    def pieces(self) -> list[list[int]]:
        return [piece for row in self.rows for piece in row]


def measure(model: Any, *, vocabulary: int, skipped: Sequence[int] = (), size: int = 4) -> RowSupport:
    """What a loaded float32 model honours, its windows not longer than 16 * `size` tokens.

    `why` is set when what follows a token changes it: that is no causal language model.
    """
    texts = _texts(vocabulary, skipped, size)
    alone = [_own_nll(model, piece) for piece in texts.pieces]
    joined = _own_nll(model, [token for piece in texts.rows[0] for token in piece])
    moved = float((joined[-len(alone[1]) :] - alone[1]).abs().max())
    limit = max(5e-6, min(TOLERANCE, moved / SIGHT))
    differences: dict[str, float] = {}

    def packed(way: Way, rows: list[list[list[int]]]) -> float:
        row_support.attach(model, replace(ALONE, packing=way))
        tensors = [t.to(model.device) for t in row_layouts.packed(rows, texts.rows[0][0][0])]
        return _largest(losses.token_nll(model, *tensors), alone)

    def candidates(way: Way) -> float:
        row_support.attach(model, replace(ALONE, candidates=way))
        tensors, visible = row_layouts.sharing_a_prompt(texts.items, texts.rows[0][0][0])
        nll_N = losses.token_nll(model, *(t.to(model.device) for t in tensors), visible.to(model.device))
        return _largest(nll_N, [_own_nll(model, p + c)[-len(c) :] for p, own in texts.items for c in own])

    differences[AHEAD] = packed("none", [[piece] for piece in texts.pieces])
    if not differences[AHEAD] <= limit:
        return replace(
            ALONE, measured=differences, why=f"what follows a token moves it by {differences[AHEAD]:.2g} nats"
        )
    packing = _first(PACKING, lambda way: packed(way, texts.rows), limit, differences, "packing")
    shared = _first(CANDIDATES, candidates, limit, differences, "candidates")
    head = _head(model, texts.pieces[0], differences)
    return RowSupport(packing, shared, head, pads_left(model, texts, limit, differences), differences)


@torch.no_grad()
def measure_attention(model: Any, *, vocabulary: int, skipped: Sequence[int] = (), size: int = 4) -> RowSupport:
    """As `measure`, for a model in bfloat16: its attention blocks alone, by their hidden states, and no candidates."""
    _silence_all_but_attention(model)
    texts = _texts(vocabulary, skipped, size)
    decoder = model_class.decoder(model)

    def hidden(**how: Any) -> torch.Tensor:
        return decoder(**how).last_hidden_state.float().flatten(0, 1)

    alone_NH = torch.cat([hidden(input_ids=_row(model, piece), use_cache=False) for piece in texts.pieces])
    ids, positions, _ = row_layouts.packed(texts.rows, texts.rows[0][0][0])
    used = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(texts.rows):
        used[number, : sum(map(len, row))] = True
    differences: dict[str, float] = {}

    def packed(way: Way) -> float:
        row_support.attach(model, replace(ALONE, packing=way))
        how = row_support.arguments(model, ids.to(model.device), positions.to(model.device))
        together_NH = hidden(**how)[used.flatten().to(model.device)]
        moved = (together_NH - alone_NH).norm(dim=-1).div(alone_NH.norm(dim=-1)).max()
        return float(torch.nan_to_num(moved, nan=UNLIKE, posinf=UNLIKE))

    # the lengths first: flash attention reads them, and reads positions only of a batch of one row
    order: tuple[Way, ...] = ("varlen", "positions")
    return RowSupport(
        _first(order, packed, BFLOAT16_TOLERANCE, differences, "packing"), "none", "model", True, differences
    )


def _first(
    ways: Sequence[Way], difference: Callable[[Way], float], limit: float, differences: dict[str, float], what: str
) -> Any:
    """The first way that moves nothing; what each moved goes into `differences`."""
    for way in ways:
        try:
            moved = difference(way)
        except _NO_SUCH as error:
            if is_out_of_memory(error):
                raise
            continue  # the model has no such argument
        differences[f"{what}:{way}"] = moved
        if moved <= limit:
            return way
    return "none"


def pads_left(model: Any, texts: _Texts, limit: float, differences: dict[str, float]) -> bool:
    """Whether a prompt's first token is generated as it is alone when the prompt is padded to another's length."""
    prompts = [prompt for prompt, _ in texts.items]
    longest, pad = max(map(len, prompts)), texts.rows[0][0][0]

    def last_logits(rows: list[list[int]], lengths: list[int]) -> torch.Tensor:
        ids = torch.tensor(rows, device=model.device)
        mask = torch.tensor([[0] * (len(rows[0]) - n) + [1] * n for n in lengths], device=model.device)
        how = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "pad_token_id": pad}
        generated = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1, **how)
        return torch.log_softmax(generated.logits[0].float(), dim=-1)

    try:
        alone = torch.cat([last_logits([prompt], [len(prompt)]) for prompt in prompts])
        padded = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
        differences["left padding"] = _difference(last_logits(padded, [len(prompt) for prompt in prompts]), alone)
    except _NO_SUCH:
        return False
    return differences["left padding"] <= 10 * limit  # of all tokens, also of unlikely ones


def _head(model: Any, piece: list[int], differences: dict[str, float]) -> Any:
    """Whether hidden states times the output head are the model's own logits."""
    with torch.no_grad():
        own_TV = model(input_ids=_row(model, piece), use_cache=False).logits[0].float()
        try:
            ours_TV = losses.fused_logits(model, _row(model, piece))[0].float()
            difference = (ours_TV - own_TV).abs().max() / own_TV.abs().max()
            differences["head"] = float(torch.nan_to_num(difference, nan=UNLIKE, posinf=UNLIKE))
        except _NO_SUCH:
            return "model"
    return "fused" if differences["head"] <= SAME_LOGITS else "model"


@torch.no_grad()
def _own_nll(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """NLL of each token but the first, by the model's own logits on nothing but these tokens."""
    ids = _row(model, tokens)
    logits_TV = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits_TV, ids[0, 1:], reduction="none")


def _row(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(tokens)], device=model.device)


def _largest(nll_N: torch.Tensor, alone: Sequence[torch.Tensor]) -> float:
    """The largest difference; NaN is one."""
    return _difference(nll_N, torch.cat(list(alone)))


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nan_to_num((one - other).abs().max(), nan=UNLIKE, posinf=UNLIKE))


def documents(*, vocabulary: int, skipped: Sequence[int] = (), size: int = 4) -> list[list[list[int]]]:
    """The documents that are compared, in two rows of unequal length."""
    return _texts(vocabulary, skipped, size).rows


def _texts(vocabulary: int, skipped: Sequence[int], size: int) -> _Texts:
    """Random pieces, the same every time: 12 to 24 times `size` tokens, candidates of a few."""
    generator = torch.Generator().manual_seed(0)
    usable = torch.tensor(sorted(set(range(vocabulary)) - set(skipped)))

    def some(count: int) -> list[int]:
        return usable[torch.randint(0, len(usable), (count,), generator=generator)].tolist()

    rows = [[some(18 * size), some(15 * size)], [some(10 * size), some(20 * size)]]
    items = [(some(20 * size), [some(12), some(5), some(9)]), (some(4 * size), [some(3), some(7)])]
    return _Texts(rows, items)


def _silence_all_but_attention(model: Any) -> None:
    """Feed-forward modules give zeros: what is left are attention blocks and residuals."""
    names = re.compile(r"mlp|feed_forward|ffn|moe|expert", re.IGNORECASE)
    for name, module in model_class.decoder(model).named_modules():
        leaf = name.rpartition(".")[2]
        if (
            names.search(leaf)
            and "norm" not in leaf
            and not re.search(r"\.(mlp|feed_forward|ffn|moe)\.", f".{name}"[:-1])
        ):
            module.forward = lambda x, *_, **__: torch.zeros_like(x)
