"""Each rank reads from the files what it keeps of a sharded model: its rows, its experts, dequantized, and no more.

Until a rank has read it a parameter is a placeholder on the CPU: of the right shape and dtype, without memory, so that
adapters are attached as to any model. Where a tensor of the model is not simply rows or experts of tensors on disk
(`tensor_names.places`), or an FP8 matrix ends in a partial block (transformers 5.23 reads those wrongly), the first
rank reads for all.

Bytes are those asked of safetensors. What was read is compared, in samples, with our own reader, which takes another
way through the file and counts FP8 blocks by itself: rows that begin inside a block, with the scales of another, are
wrong by per cents without a message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from utils.exceptions import Problem, VerificationError
from utils.models.base_model import BaseModel
from utils.models.weights import fp8, layer_sample, tensor_names
from utils.models.weights.safetensors_io import SCALE, Checkpoint
from utils.models.weights.tensor_names import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# parameters of which each rank compares rows with our own reader
SAMPLED = 6
SAMPLED_ROWS = 256


@dataclass(frozen=True)
class Source:
    """Where a placeholder's values are: from row (or expert) `first` of a parameter on."""

    reader: ShardReader
    name: str
    first: int = 0


@dataclass(eq=False)
class ShardReader:
    """The tensors of a checkpoint by the parameters that they are, and how many bytes were asked for."""

    checkpoint: Checkpoint
    places: Mapping[str, Sequence[tuple[str, Place]]]
    bytes_read: int = 0
    _open: dict[str, Any] = field(default_factory=dict)

    def rows(self, name: str, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows `first` to `last` (of the first dimension: output rows, or experts) of a parameter, on the CPU."""
        tensors = self.places[name]
        if tensors[0][1].expert is None:
            return self._matrix(tensors[0][0], first, last).to(dtype)
        by_expert: dict[int, list[tuple[int, str]]] = {}
        for tensor, place in tensors:
            if place.expert is not None and first <= place.expert < last:
                by_expert.setdefault(place.expert, []).append((place.part, tensor))
        rows = [
            torch.cat([self._matrix(tensor, 0, None).to(dtype) for _, tensor in sorted(by_expert[expert])])
            for expert in range(first, last)
        ]
        return torch.stack(rows) if rows else torch.empty(0, dtype=dtype)

    def _matrix(self, name: str, first: int, last: int | None) -> torch.Tensor:
        """Rows of one tensor on disk, dequantized if it is FP8."""
        tensor = self.checkpoint.tensor(name)
        last = tensor.shape[0] if last is None and tensor.shape else last
        if not tensor.is_fp8:
            return self._slice(name, first, last)
        height = self.checkpoint.block[0]
        begin = first // height
        values = self._slice(name, begin * height, last)
        self.checkpoint.scale_home(self.checkpoint.homes[name], name)
        scales = self._slice(name + SCALE, begin, -(-(last or 0) // height))
        return fp8.dequantise(values, scales, self.checkpoint.block)[first - begin * height :]

    def _slice(self, name: str, first: int, last: int | None) -> torch.Tensor:
        from safetensors import safe_open

        path = str(self.checkpoint.homes[name])
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        part = self._open[path].get_slice(name)
        values = part[first:last] if part.get_shape() else part[...]
        self.bytes_read += values.nbytes
        return values

    def compare(self, local: Mapping[str, tuple[int, torch.Tensor]], seed: int) -> None:
        """Raises VerificationError unless sampled rows of `local` (first row, rows) are those of our own reader."""
        generator = torch.Generator().manual_seed(seed)
        names = [name for name, (_, rows) in local.items() if rows.ndim > 1 and len(rows)]
        chosen = [names[i] for i in torch.randperm(len(names), generator=generator)[:SAMPLED].tolist()]
        for name in chosen:
            first, rows = local[name]
            at = int(torch.randint(0, len(rows), (1,), generator=generator))
            count = min(len(rows) - at, SAMPLED_ROWS if rows.ndim == 2 else 1)
            expected = self._by_our_reader(name, first + at, first + at + count)
            if not torch.equal(rows[at : at + count].cpu(), expected.to(rows.dtype)):
                what = f"rows {first + at} to {first + at + count} of {name} are not those of its file"
                fix = "nothing was made with them; run it again, and if it happens again suspect the disk or a library"
                raise VerificationError(Problem(what, str(self.checkpoint.directory), fix))

    def _by_our_reader(self, name: str, first: int, last: int) -> torch.Tensor:
        tensors = self.places[name]
        if tensors[0][1].expert is None:
            return self._streamed(tensors[0][0], first, last)
        parts = sorted((p.expert or 0, p.part, tensor) for tensor, p in tensors if first <= (p.expert or 0) < last)
        rows = [
            torch.cat([self._streamed(tensor) for expert, _, tensor in parts if expert == number])
            for number in range(first, last)
        ]
        return torch.stack(rows)

    def _streamed(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows of one tensor on disk as the merge reads them: from its beginning, a few at a time."""
        shape = self.checkpoint.tensor(name).shape
        if len(shape) != 2:
            pieces = [piece for *_, piece in self.checkpoint.rows(self.checkpoint.homes[name], name)]
            return torch.cat(pieces).view(shape)[first:last]
        kept, last = [], shape[0] if last is None else last
        for _, at, piece in self.checkpoint.rows(self.checkpoint.homes[name], name):
            if at >= last:
                break
            kept.append(piece[max(0, first - at) : last - at])
        return torch.cat(kept)

    def close(self) -> None:
        """Let go of the files."""
        for handle in self._open.values():
            handle.__exit__(None, None, None)
        self._open.clear()


def reader(base: BaseModel, model: PreTrainedModel) -> ShardReader | None:
    """How each rank reads its part of `model`, which is on the meta device; None where it cannot."""
    checkpoint = Checkpoint(base.directory)
    if layer_sample.has_partial_blocks(checkpoint):
        return None
    state = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()
    }
    weights = [name for name in checkpoint.homes if not checkpoint.is_scale(name)]
    places: dict[str, list[tuple[str, Place]]] = {}
    for tensor, place in tensor_names.places(base.directory, weights).items():
        if place.parameter in state:
            places.setdefault(place.parameter, []).append((tensor, place))
    shapes = {name: _shape(checkpoint, parts) for name, parts in places.items()}
    if any(shapes.get(name) != tuple(tensor.shape) for name, tensor in state.items()):
        return None
    return ShardReader(checkpoint, places)


def as_placeholders(model: PreTrainedModel, reading: ShardReader) -> bool:
    """Put placeholders in place of a meta model's parameters, values in its buffers; whether all of them are known."""
    for module in model.modules():
        buffers = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta}
        for name, buffer in buffers.items():
            value = float("nan") if buffer.is_floating_point() else 0
            module._buffers[name] = torch.full(buffer.shape, value, dtype=buffer.dtype)
        if buffers:
            with torch.no_grad():
                model._init_weights(module)  # transformers' own way to make what no file holds
    for name, buffer in model.named_buffers():
        if name in reading.places:
            buffer.copy_(reading.rows(name, 0, len(buffer), buffer.dtype).view(buffer.shape))
    done: dict[int, torch.nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in done:
                empty = torch.empty((), dtype=old.dtype).expand(old.shape)
                done[id(old)] = torch.nn.Parameter(empty, requires_grad=False)
                source = Source(reading, f"{path}.{name}".lstrip("."))
                done[id(old)].source = source  # type: ignore[attr-defined]
            module._parameters[name] = done[id(old)]
    floating = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    return not any(torch.isnan(buffer).any() for buffer in floating)


def source_of(tensor: torch.Tensor) -> Source | None:
    """Where a placeholder's values are; None for a tensor that has them."""
    return getattr(tensor, "source", None)


def _shape(checkpoint: Checkpoint, parts: Sequence[tuple[str, Place]]) -> tuple[int, ...] | None:
    """The shape of the parameter that these tensors make; None when they do not make one."""
    shapes = [checkpoint.tensor(tensor).shape for tensor, _ in parts]
    if parts[0][1].expert is None:
        return shapes[0] if len(parts) == 1 else None
    experts, count = {place.expert for _, place in parts}, parts[0][1].parts
    if len(parts) != count * len(experts) or len(set(shapes)) != 1 or experts != set(range(len(experts))):
        return None
    return len(experts), count * shapes[0][0], *shapes[0][1:]
