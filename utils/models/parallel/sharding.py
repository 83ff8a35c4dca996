"""One model sharded over several ranks: FSDP2 on the decoder layers, the same code on CPUs (gloo) and GPUs (NCCL).

The launcher's file asks for it (`distributed_type: FSDP`, see scripts/launch/); with one rank, or without that, nothing
here does anything. torch's own `fully_shard` is used and not accelerate's `prepare`: that replicates the model on CPUs
without a word, and cannot load a model with a persistent buffer (MiniMax-M2's `e_score_correction_bias`) one copy at a
time. Here each rank reads what it keeps (`shard_reading`); where that cannot be, the first rank reads the weights and
layer by layer they are broadcast, compared by checksum, and cut, so no other rank holds more than its part and one
layer. What is no part of the files, adapters and buffers, always comes from the first rank. On several nodes each may
hold a copy (HSDP): then the mesh has two dimensions, and gradients are averaged over all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from config import BaseModelSection
from utils.exceptions import ConfigError, NonFiniteError, Problem
from utils.logger import event
from utils.models import devices, loading
from utils.models.base_model import BaseModel
from utils.models.model_shapes import PLAIN
from utils.models.parallel import expert_parallel, launcher, ranks, shard_reading
from utils.models.parallel.expert_parallel import Meshes, Owners
from utils.models.parallel.shard_reading import Source
from utils.progress import Progress

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

# of the model that was loaded last, by rank
_bytes_read: list[int] = []


def load_model(base: BaseModel, section: BaseModelSection, *, native_fp8: bool = False) -> PreTrainedModel:
    """The frozen base model to be trained on: on this rank's device or, when it will be sharded, in rank
    0's memory and without values on the other ranks, which read no weights. Errors as `base_model.load_model`.
    """
    if not ranks.is_sharded():
        return loading.load_model(base, section, native_fp8=native_fp8)
    if base.quantization != PLAIN:
        fix = "launch it with a file that does not shard, or leave out --base.quantization"
        raise ConfigError(Problem("a base in 4 or 8 bits cannot be sharded", base.quantization, fix))
    _layer_classes(loading.skeleton(base))  # a wrong name is found before the weights are read
    if not native_fp8 and (model := _placeholders(base, section)) is not None:
        event("each rank reads what it keeps", processes=ranks.size())
    else:
        if ranks.index() == 0:
            event("reading the weights on one rank, to shard them", processes=ranks.size())
        place = torch.device("meta" if ranks.index() else "cpu")
        model = loading.load_model(base, section, native_fp8=native_fp8, place=place)
    if not native_fp8 and expert_parallel.mark(model):
        event("ranks share the experts and send them their tokens", ranks=launcher.current().expert)
    return model


def _placeholders(base: BaseModel, section: BaseModelSection) -> PreTrainedModel | None:
    """The model whose parameters each rank will read for itself; None where that cannot be."""
    model = loading.load_model(base, section, place=torch.device("meta"))
    reading = shard_reading.reader(base, model)
    return model if reading is not None and shard_reading.as_placeholders(model, reading) else None


def ready_model(base: BaseModel, section: BaseModelSection) -> PreTrainedModel:
    """The frozen base model to be asked on every rank: whole on this rank's device, or sharded. Errors as `load_model`.

    Embeddings, the last norm and the output head stay whole: scores are computed from hidden states, outside of the
    module that would gather them.
    """
    model = load_model(base, section)
    if ranks.is_sharded():
        shard(model, root=model.get_decoder())
    return model


def shard(module: torch.nn.Module, root: torch.nn.Module | None = None) -> None:
    """Shard every parameter of `module` (loss and model) over the ranks, in place; buffers stay whole.

    With a `root` only the decoder layers are sharded, and the module whose forward pass begins a pass is `root`.

    Before, rank 0 has the values and the others have them or not. Afterwards parameters are DTensors outside
    of a forward or backward pass, so optimisers are made after this. Raises VerificationError when the ranks built
    different models, or do not get the same bytes.
    """
    _refuse_unlike(module)
    mesh = _mesh()
    meshes = Meshes.of(launcher.current()) if any(expert_parallel.shared_in(module)) else None
    classes = _layer_classes(module)
    layers = {name: part for name, part in module.named_modules() if type(part).__name__ in classes}
    inside = {id(part) for layer in layers.values() for part in layer.modules()}
    rest = {name: part for name, part in module.named_modules() if id(part) not in inside}
    sums: dict[str, int] = {}
    read: dict[Source, tuple[int, torch.Tensor]] = {}
    with Progress("sharding the model", total=len(layers) + 1, unit="layer") as bar:
        for name, layer in layers.items():
            _shard_layer(layer, dict(layer.named_modules(prefix=name)), mesh, sums, read, meshes)
            bar.advance(1)
        _shard_layer(root or module, rest, mesh, sums, read, is_whole=root is not None)
    _check_read(read)
    ranks.refuse_unequal(sums, "the model, while it was sharded,")
    parts = sum(own(p).nbytes for p in module.parameters())
    event("the model is sharded", layers=len(layers), processes=ranks.size(), part_gib=parts / 2**30)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, in main memory if it was sharded; then every rank has to call this for it."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor().cpu()


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a full tensor, cut as `parameter` is; nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def own(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's local shard of a tensor."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_whole(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What is trained and what is buffered, as far as every rank has all of it: that must be equal everywhere."""
    from torch.distributed.tensor import DTensor

    yield from ((n, p) for n, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor))
    yield from module.named_buffers()


def copied_shards(module: torch.nn.Module) -> tuple[list[tuple[str, torch.Tensor]], int]:
    """What is trained and sharded, where other ranks hold the same shards (HSDP), and which of the shards this is."""
    from torch.distributed.tensor import DTensor

    layout = launcher.current()
    if layout.replicate == 1:
        return [], 0
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad and isinstance(p, DTensor)]
    return [(n, p) for n, p in trained if not expert_parallel.is_factor(p)], ranks.index() % layout.shard


def checksum(tensor: torch.Tensor) -> int:
    """The sum of a tensor's 4-byte words as integers: at the speed of the memory, where it is.

    It tells numbers that changed or did not arrive, not ones that changed places.
    """
    as_bytes = _bytes(tensor.contiguous())
    words = as_bytes.view(torch.int32) if as_bytes.numel() % 4 == 0 else as_bytes
    return int(words.sum(dtype=torch.int64))


def _mesh() -> DeviceMesh:
    """The ranks as FSDP2 takes them: in a row, or in as many rows as there are copies of the model."""
    from torch.distributed.device_mesh import init_device_mesh

    layout, kind = launcher.current(), devices.device().type
    if layout.replicate == 1:
        return init_device_mesh(kind, (layout.shard,))
    return init_device_mesh(kind, (layout.replicate, layout.shard), mesh_dim_names=("replicate", "shard"))


def _layer_classes(module: torch.nn.Module) -> set[str]:
    """Names of the classes to wrap: the launcher's or, without one, what transformers says must not be split."""
    there = {type(part).__name__ for part in module.modules()}
    given = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    if given:
        classes = {name.strip() for name in given.split(",")}
        fix = "change fsdp_transformer_layer_cls_to_wrap in the launch file, or leave it out"
    else:
        classes = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
        classes, fix = classes & there, "name it in the launch file as fsdp_transformer_layer_cls_to_wrap"
    if not classes or classes - there:
        layers = sorted(name for name in there if name.endswith(("Layer", "Block")))
        what = f"the model has no layer of class {given or 'that transformers names'} to shard; it has {layers}"
        raise ConfigError(Problem(what, fix=fix))
    return classes


def _refuse_unlike(module: torch.nn.Module) -> None:
    """The ranks have to agree on names, shapes and dtypes before anything is sent."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    whole_numbers = [n for n, p in module.named_parameters() if not p.dtype.is_floating_point]
    if whole_numbers:
        fix = "launch it with a file that does not shard, or load a base that is not quantised to 4 or 8 bits"
        raise ConfigError(Problem("quantised weights cannot be sharded", whole_numbers[:3], fix))
    ranks.refuse_unequal({name: (tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in tensors}, "the model")


def _shard_layer(
    layer: torch.nn.Module,
    parts: Mapping[str, torch.nn.Module],
    mesh: DeviceMesh,
    sums: dict[str, int],
    read: dict[Source, tuple[int, torch.Tensor]],
    meshes: Meshes | None = None,
    *,
    is_whole: bool = False,
) -> None:
    """Put the tensors of `parts` on the device, with rank 0's values, and shard the parameters of `layer`.

    What `is_whole` is not cut, and `layer` only leads the layers inside it.
    """
    from torch.distributed.fsdp import fully_shard

    placeholders: list[tuple[Owners, Source]] = []
    for owners, tensor in _placed(parts):
        if (source := shard_reading.source_of(tensor)) is not None:
            placeholders.append((owners, source))
            continue
        _from_main(_bytes(tensor))
        sums[owners[0][0]] = checksum(tensor)
    if is_whole:
        for owners, source in placeholders:
            _fill(owners, source, read)
    drops = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    unread = placeholders
    if meshes is not None:
        unread = expert_parallel.cut(layer, meshes, placeholders, drops=drops)
    left_alone = expert_parallel.parts(layer)
    if is_whole:
        left_alone |= {p for part in parts.values() for p in part.parameters(recurse=False)}
    fully_shard(layer, mesh=mesh, reshard_after_forward=drops, ignored_params=left_alone or None)
    if not is_whole:
        prefix = next((name for name, module in parts.items() if module is layer), "")
        read_here = [(owners, _local(owners, source, read)) for owners, source in unread]
        # one parameter under each of its names: tied ones stay tied
        filled = {path.removeprefix(f"{prefix}."): parameter for owners, parameter in read_here for path, *_ in owners}
        layer.load_state_dict(filled, strict=False, assign=True)


def _fill(owners: Owners, source: Source, read: dict[Source, tuple[int, torch.Tensor]]) -> None:
    """A parameter that every rank keeps whole, read by each."""
    _, module, key = owners[0]
    old = module._parameters[key]
    rows = source.reader.rows(source.name, 0, old.shape[0], old.dtype).view(old.shape).to(devices.device())
    read[source] = 0, rows
    parameter = torch.nn.Parameter(rows, requires_grad=False)
    for _, module, key in owners:
        module._parameters[key] = parameter


def _local(owners: Owners, source: Source, read: dict[Source, tuple[int, torch.Tensor]]) -> torch.nn.Parameter:
    """This rank's rows of a parameter that was cut without values, read."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, module, key = owners[0]
    cut = module._parameters[key]
    shape, first = tuple(cut.shape), source.first
    if isinstance(cut, DTensor):
        shape, offset = compute_local_shape_and_global_offset(cut.shape, cut.device_mesh, cut.placements)
        first += offset[0]
    rows = source.reader.rows(source.name, first, first + shape[0], cut.dtype).view(shape).to(devices.device())
    read[source] = first, rows
    if not isinstance(cut, DTensor):
        return torch.nn.Parameter(rows, requires_grad=False)
    local_shard = DTensor.from_local(
        rows, cut.device_mesh, cut.placements, run_check=False, shape=cut.shape, stride=cut.stride()
    )
    return torch.nn.Parameter(local_shard, requires_grad=False)


def _check_read(read: Mapping[Source, tuple[int, torch.Tensor]]) -> None:
    """What this rank read, compared with our own reader in samples, and how many bytes it asked for."""
    _bytes_read.clear()
    for reader in {id(source.reader): source.reader for source in read}.values():
        reader.compare({source.name: rows for source, rows in read.items()}, seed=ranks.index())
        reader.close()
        _bytes_read[:] = ranks.gathered(reader.bytes_read)
        event("each rank has read its part, and samples of it are as in the files", bytes_by_rank=list(_bytes_read))


def loaded() -> dict[str, Any]:
    """What a manifest says about several ranks: their layout, and who read how much of the model loaded last."""
    layout = launcher.current()
    read = {"bytes_read_by_rank": list(_bytes_read)} if _bytes_read else {}
    return {"ranks": {"layout": asdict(layout), **read}} if layout.processes > 1 else {}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes: gloo and NCCL do not know every dtype."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _from_main(as_bytes: torch.Tensor) -> None:
    dist.broadcast(as_bytes, 0)


def _placed(parts: Mapping[str, torch.nn.Module]) -> list[tuple[Owners, torch.Tensor]]:
    """Move parameters and buffers to the device, without values where they have none; tied ones stay tied.

    Placeholders become parameters on the meta device. Returns each tensor with its places.
    """
    done: dict[int, tuple[torch.Tensor, Owners, torch.Tensor]] = {}
    for path, part in parts.items():
        for held in (part._parameters, part._buffers):
            for name, old in held.items():
                if old is None:
                    continue
                if id(old) not in done:  # the old one stays, so that its id is not given to another
                    done[id(old)] = old, [], _moved(old, devices.device())
                _, owners, held[name] = done[id(old)]
                owners.append((f"{path}.{name}".lstrip("."), part, name))
    return [(owners, new) for _, owners, new in done.values()]


def _moved(old: torch.Tensor, device: torch.device) -> torch.Tensor:
    if (source := shard_reading.source_of(old)) is not None:
        empty = torch.nn.Parameter(torch.empty(old.shape, dtype=old.dtype, device="meta"), requires_grad=False)
        empty.source = source  # type: ignore[attr-defined]
        return empty
    with torch.no_grad():
        new = torch.empty_like(old, device=device) if old.is_meta else old.to(device).contiguous()
    return torch.nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, torch.nn.Parameter) else new


def refuse_non_finite(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Raises NonFiniteError that names the tensors holding NaN or infinity; for before something is published."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(own(tensor)).all()]
    if bad:
        fix = "lower the learning rate; run the same command again to go on from the last checkpoint"
        raise NonFiniteError(Problem(f"{what}: {len(bad)} tensors hold NaN or infinity", bad[:8], fix))
