"""FP8 weights in blocks: e4m3 values with one float32 scale per block of 128 x 128, weight = value * scale.

This is how MiniMax-M2 and DeepSeek-V3 ship; the blocks at the end of rows and columns may be partial.

Shapes: R rows, I columns; any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

E4M3_MAX = 448.0
_E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def dequantise(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Weights (..., R, I) in float32 from e4m3 values and their block scales (..., blocks of rows, of columns)."""
    # a table: torch 2.13 converts e4m3 on a CPU six times slower than it looks the values up
    weights = _E4M3_VALUES.index_select(0, values.contiguous().view(torch.uint8).flatten().int()).view(values.shape)
    columns = scales.float().repeat_interleave(block[1], -1)[..., : values.shape[-1]]
    for strip, scale in zip(weights.split(block[0], -2), columns.unbind(-2), strict=False):
        strip.mul_(scale.unsqueeze(-2))
    return weights


def quantise(weights: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 values (..., R, I), block scales in float32) of float32 weights: a block's largest value becomes 448."""
    rows, columns = weights.shape[-2:]
    padded = torch.nn.functional.pad(weights, (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    scales = blocks.abs().amax((-3, -1)) / E4M3_MAX
    # a block of zeros, or of values too small to be scaled up
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 1.0, scales)
    values = (blocks / scales[..., :, None, :, None]).to(torch.float8_e4m3fn)
    return values.flatten(-2).flatten(-3, -2)[..., :rows, :columns], scales


def block_grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the block scales of a tensor."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def is_fp8(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json says that its weights are FP8."""
    return (settings.get("quantization_config") or {}).get("quant_method") == "fp8"
