"""Safetensors files a few rows at a time: read, planned and written without ever holding a whole tensor.

Our own, because the library writes a file only from all its tensors in memory: merging FP8 to bfloat16 with it took 3.6
to 4.2 times the largest file, this takes half a gigabyte whatever its size. It also reads by mapping, where a file that
becomes shorter ends the process without a word. The format is 8 bytes with the length of a JSON header, the header, and
the tensors' bytes without gaps. Files written here load with the library.

Shapes: L leading size (1 for a matrix, E for fused experts), R rows of a piece, I columns.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.artifacts import files
from utils.exceptions import ArtefactError, Problem
from utils.models.weights import fp8

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Buffer = bytes | bytearray | memoryview
FP8 = "F8_E4M3"
# an FP8 tensor's block scales are the tensor of the same name with this behind it
SCALE = "_scale_inv"
# stays in a core's cache from reading to writing; with 4 MB copying took three times the system time
PIECE_BYTES = 1 << 20
INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000  # the library's own


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file; `begin` and `end` are bytes counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin

    @property
    def is_floating(self) -> bool:
        return self.dtype in DTYPES and DTYPES[self.dtype].is_floating_point

    @property
    def is_fp8(self) -> bool:
        return self.dtype in (FP8, "F8_E5M2")


@dataclass(frozen=True)
class Header:
    """What a file holds, in the order of the file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    data_start: int

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.data_start + sum(tensor.size for tensor in self.tensors.values())


def _block(directory: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale in an FP8 checkpoint."""
    quantization = config.get("quantization_config") or {}
    size = (quantization.get("weight_block_size") if isinstance(quantization, dict) else None) or (128, 128)
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ArtefactError(Problem(f"{directory / 'config.json'}: weight_block_size is not two sizes", size))
    return size[0], size[1]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index says. Raises ArtefactError when it is anything else."""
    weight_map = files.read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ArtefactError(Problem(f"{index}: weight_map does not name a file for each tensor", fix="restore it"))
    return weight_map


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that transformers reads: those of the index, else model.safetensors, else all there are.

    Others may lie beside them, such as Mistral's consolidated.safetensors with the same weights once more.
    """
    there = sorted(directory.glob("*.safetensors"))
    index = directory / INDEX
    named = set(_weight_map(index).values()) if index.is_file() else {"model.safetensors"}
    return [path for path in there if path.name in named] or there


class Checkpoint:
    """The safetensors files of a model directory and its config.json, read on demand.

    Raises ArtefactError for a file that is truncated or damaged, and for one that the index names and is not there.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config: dict[str, Any] = files.read_object(directory / "config.json")
        index = directory / INDEX
        self.weight_map = _weight_map(index) if index.is_file() else {}
        self.headers = {path: read_header(path) for path in weight_files(directory)}
        self.homes = {name: path for path, header in self.headers.items() for name in header.tensors}
        self.block = _block(directory, self.config)
        have = {path.name: header.tensors for path, header in self.headers.items()}
        missing = [f"{name} in {file}" for name, file in self.weight_map.items() if name not in have.get(file, ())]
        if missing:
            raise ArtefactError(Problem(f"{index} names tensors that are not there", missing[:5], "fetch these files"))

    def tensor(self, name: str) -> Tensor:
        return self.headers[self.homes[name]].tensors[name]

    def is_scale(self, name: str) -> bool:
        """Whether this tensor holds the block scales of an FP8 tensor."""
        weight = name.removesuffix(SCALE)
        return weight != name and weight in self.homes and self.tensor(weight).dtype == FP8

    def rows(self, path: Path, name: str) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(leading index, first row, weights (R, I) in float32, dequantized) of a floating tensor, piece by piece.

        A piece begins at a multiple of the FP8 block's height, so it can be quantised by itself.
        """
        header = self.headers[path]
        tensor = header.tensors[name]
        dtype, scales_LRI = DTYPES[tensor.dtype], self._scales(path, name)
        leading, count, width = matrix_shape(tensor.shape)
        unit = self.block[0]
        step = unit * max(1, PIECE_BYTES // (4 * unit * max(1, width)))
        with _reading(path) as handle:
            handle.seek(header.data_start + tensor.begin)
            for lead in range(leading if tensor.size else 0):
                for first in range(0, count, step):
                    shape = (min(step, count - first), width)
                    data = _read(handle, path, math.prod(shape) * dtype.itemsize)
                    piece_RI = torch.frombuffer(data, dtype=dtype).view(shape)
                    if scales_LRI is None:
                        yield lead, first, piece_RI.float()
                    else:
                        yield lead, first, fp8.dequantise(piece_RI, scales_LRI[lead, first // unit :], self.block)

    def scale_home(self, path: Path, name: str) -> Path:
        """The file with the block scales of an FP8 tensor, which may be another one than the tensor's.

        Raises ArtefactError when there are none, or they are of another shape.
        """
        tensor, scale = self.headers[path].tensors[name], name + SCALE
        home = path if scale in self.headers[path].tensors else self.homes.get(scale)
        if home is None or tensor.dtype != FP8:
            fix = f"only e4m3 with block scales in {scale} can be read; use a bfloat16 copy of the model"
            raise ArtefactError(Problem(f"{path}: {name} cannot be dequantized", tensor.dtype, fix))
        scales, expected = self.headers[home].tensors[scale], fp8.block_grid(tensor.shape, self.block)
        if scales.shape != expected or not scales.is_floating:
            fix = f"blocks of {self.block} give {expected}: see weight_block_size in config.json"
            raise ArtefactError(Problem(f"{home}: {scale} does not fit {name} {tensor.shape}", scales.shape, fix))
        return home

    def _scales(self, path: Path, name: str) -> torch.Tensor | None:
        """Block scales (L, blocks of rows, blocks of columns) of an FP8 tensor."""
        if not self.headers[path].tensors[name].is_fp8:
            return None
        home = self.scale_home(path, name)
        scales = self.headers[home].tensors[name + SCALE]
        data = bytearray().join(raw(home, self.headers[home], name + SCALE))
        return torch.frombuffer(data, dtype=DTYPES[scales.dtype]).view(matrix_shape(scales.shape)).float()


def read_header(path: Path) -> Header:
    """The header of a file. Raises ArtefactError when it is truncated, damaged or no safetensors file."""
    with _reading(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        length = int.from_bytes(handle.read(8), "little")
        text = handle.read(length) if length <= min(_HEADER_LIMIT, size - 8) else b""
    try:
        values = json.loads(text)
        metadata = dict(values.pop("__metadata__", {}))
        tensors = {name: Tensor(v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for name, v in values.items()}
        in_order = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
        end = 0
        for name, tensor in in_order.items():
            if tensor.begin != end or tensor.size != described(tensor.dtype, tensor.shape, tensor.size).size:
                raise ValueError(f"{name} is not where and as large as it should be")
            end = tensor.end
        if 8 + length + end != size:
            raise ValueError(f"the file has {size} bytes, its header describes {8 + length + end}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        fix = "fetch this file again"
        raise ArtefactError(
            Problem(f"{path} is truncated or damaged, or no safetensors file: {error}", fix=fix)
        ) from error
    return Header(in_order, metadata, 8 + length)


def described(dtype: str, shape: tuple[int, ...], size: int = 0) -> Tensor:
    """A tensor that has no place in a file yet; `size` in bytes counts only for a dtype that is not known here."""
    known = DTYPES.get(dtype)
    return Tensor(dtype, shape, 0, size if known is None else known.itemsize * math.prod(shape))


def plan(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Header:
    """The header of a file to be written.

    The order is kept, but wider dtypes come first, as the library has it: so every tensor is aligned to its values.
    """

    def width(item: tuple[str, Tensor]) -> int:
        return DTYPES[item[1].dtype].itemsize if item[1].dtype in DTYPES else 0

    placed: dict[str, Tensor] = {}
    end = 0
    for name, tensor in sorted(tensors.items(), key=width, reverse=True):
        placed[name] = Tensor(tensor.dtype, tensor.shape, end, end + tensor.size)
        end += tensor.size
    return Header(placed, dict(metadata), len(_header_bytes(placed, metadata)))


def write(
    path: Path,
    header: Header,
    content: Callable[[str], Iterable[Buffer]],
    advance: Callable[[int], None] = lambda _: None,
    thread: Executor | None = None,
) -> str:
    """Write a planned file tensor by tensor and fsync it; returns its sha256, taken on the way.

    `content(name)` yields the tensor's bytes in pieces that are not changed afterwards; `advance` hears of each;
    `thread` (of `one_more_thread`) does the hashing.
    """
    digest = hashlib.sha256()
    with path.open("wb") as handle, nullcontext(thread) if thread else one_more_thread() as pool:
        hashed = pool.submit(digest.update, b"")
        for data in _pieces(header, content):
            # hashing is the slowest step and runs without the interpreter's lock: beside writing this, reading the next
            hashed.result()
            hashed = pool.submit(digest.update, data)
            handle.write(data)
            advance(len(data))
        hashed.result()
        handle.flush()
        os.fsync(handle.fileno())
    return digest.hexdigest()


@contextmanager
def one_more_thread() -> Iterator[Executor]:
    """A thread that runs already: CPython 3.11 waits for ever for one that dies of want of memory while it starts."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        yield pool


def raw(path: Path, header: Header, name: str) -> Iterator[bytearray]:
    """A tensor's bytes as they are, in pieces."""
    tensor = header.tensors[name]
    with _reading(path) as handle:
        handle.seek(header.data_start + tensor.begin)
        for at in range(0, tensor.size, PIECE_BYTES):
            yield _read(handle, path, min(PIECE_BYTES, tensor.size - at))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's own memory, for writing."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


@contextmanager
def one_thread() -> Iterator[None]:
    """Pieces are too small to share: waking and joining threads for each took longer than its arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(L, R, I) of a tensor of any number of dimensions."""
    padded = (1, 1, *shape)
    return math.prod(padded[:-2]), padded[-2], padded[-1]


def _header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    described_by_name = {
        n: {"dtype": t.dtype, "shape": t.shape, "data_offsets": (t.begin, t.end)} for n, t in tensors.items()
    }
    values = {"__metadata__": dict(metadata), **described_by_name} if metadata else described_by_name
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned, as the library does
    return len(text).to_bytes(8, "little") + text


def _pieces(header: Header, content: Callable[[str], Iterable[Buffer]]) -> Iterator[Buffer]:
    yield _header_bytes(header.tensors, header.metadata)
    for name, tensor in header.tensors.items():
        size = 0
        for data in content(name):
            size += len(data)
            yield data
        if size != tensor.size:
            raise ValueError(f"{name} has {size} bytes, {tensor.size} were planned")


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """A file to read from; what fails there is the file's fault, and not that of the place written to."""
    try:
        with path.open("rb") as handle:
            yield handle
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtefactError(
            Problem(f"cannot read {path}: {reason}", fix="see the reason, or fetch it again")
        ) from error


def _read(handle: BinaryIO, path: Path, size: int) -> bytearray:
    data = bytearray(size)
    if handle.readinto(data) != size:
        raise ArtefactError(Problem(f"{path} became shorter while it was read", fix="fetch it again and start anew"))
    return data
