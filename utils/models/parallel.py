"""One model dealt out to several processes: FSDP2 on the decoder layers, the same code on CPUs (gloo) and GPUs (NCCL).

The launcher's file asks for it (`distributed_type: FSDP`, see scripts/launch/); one process, or none that asks, and
nothing here does anything. torch's own `fully_shard` is used and not accelerate's `prepare`: that replicates the model
on CPUs without a word, and cannot load a model with a persistent buffer (MiniMax-M2's `e_score_correction_bias`) one
copy at a time. Here the main process alone reads the weights; layer by layer they are broadcast, compared by checksum,
buffers too, and cut, so no process but the first ever holds more than its part and one layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from config import BaseModelSection
from utils.exceptions import ConfigError, NonFiniteError, Problem, VerificationError
from utils.logger import event
from utils.models import devices, loading
from utils.models.base_model import BaseModel
from utils.models.model_shapes import PLAIN
from utils.progress import Progress

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

# the others wait in a collective while the first process fetches or reads hundreds of gigabytes; torch allows minutes
PATIENCE = timedelta(hours=3)
ASKED = "ACCELERATE_USE_FSDP"
# what else a launcher can ask for, and would be ignored
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing (it is --domain.train.gradient_checkpointing)",
    "FSDP_IGNORED_MODULES": "fsdp_ignored_modules",
}


def asked() -> bool:
    """Whether the launcher asks for the model to be dealt out, and to more than one process."""
    return _says(ASKED) and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_alone() -> bool:
    """Whether there is no other process to agree with."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def check(*, trains: bool) -> None:
    """Raises ConfigError for what the launcher's file asks and the script does not do; nothing is ignored."""
    fix = "use a file of scripts/launch/, or change these lines of yours as they are there"
    problems = [
        Problem(f"the launcher asks for {what}, which is not done here", os.environ[name], fix)
        for name, what in _REFUSED.items()
        if _says(name) or (name == "FSDP_IGNORED_MODULES" and os.environ.get(name))
    ]
    if asked() and not trains:
        alone = "start it with python, or with a launch file for one process"
        problems.append(Problem("only the training scripts deal a model out to several processes", fix=alone))
    if _says(ASKED):
        for name, key, wanted in (
            ("FSDP_VERSION", "fsdp_version", "2"),
            ("FSDP_AUTO_WRAP_POLICY", "fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        ):
            if (found := os.environ.get(name, wanted)) != wanted:
                problems.append(Problem(f"the launcher's {key} has to be {wanted}", found, fix))
    if problems:
        raise ConfigError(problems)


def load_model(base: BaseModel, section: BaseModelSection, *, native_fp8: bool = False) -> PreTrainedModel:
    """The frozen base model to be trained on: on this process's device or, when it will be dealt out, in the main
    process's memory and without values in the others, which read no weights. Errors as `base_model.load_model`.
    """
    if not asked():
        return loading.load_model(base, section, native_fp8=native_fp8)
    if base.quantization != PLAIN:
        fix = "launch it with a file that deals nothing out, or leave out --base.quantization"
        raise ConfigError(Problem("a base in 4 or 8 bits cannot be dealt out", base.quantization, fix))
    with unseen():
        _layer_classes(loading.skeleton(base))  # a wrong name is found before the weights are read
        if dist.get_rank() == 0:
            event("reading the weights in one process, to deal them out", processes=dist.get_world_size())
        place = torch.device("meta" if dist.get_rank() else "cpu")
        return loading.load_model(base, section, native_fp8=native_fp8, place=place)


def deal_out(module: torch.nn.Module) -> None:
    """Cut every parameter of `module` (loss and model) into the processes' parts, in place; buffers stay whole.

    Before, the main process has the values and the others have them or not. Afterwards parameters are DTensors outside
    of a forward or backward pass, so optimisers are made after this. Raises VerificationError when the processes built
    different models, or do not get the same bytes.
    """
    from torch.distributed.device_mesh import init_device_mesh

    _refuse_unlike(module)
    mesh = init_device_mesh(devices.device().type, (dist.get_world_size(),))
    wanted = _layer_classes(module)
    layers = {name: part for name, part in module.named_modules() if type(part).__name__ in wanted}
    inside = {id(part) for layer in layers.values() for part in layer.modules()}
    rest = {name: part for name, part in module.named_modules() if id(part) not in inside}
    sums: dict[str, int] = {}
    with Progress("dealing out the model", total=len(layers) + 1, unit="layer") as bar:
        for name, layer in layers.items():
            _deal(layer, dict(layer.named_modules(prefix=name)), mesh, sums)
            bar.advance(1)
        _deal(module, rest, mesh, sums)
    refuse_unequal(sums, "the model, while it was dealt out,")
    parts = sum(own(p).nbytes for p in module.parameters())
    event("the model is dealt out", layers=len(layers), processes=dist.get_world_size(), part_gib=parts / 2**30)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, in main memory if it was dealt out; then every process has to call this for it."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor().cpu()


def like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, cut as `parameter` is; nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def own(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_whole(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What is trained and what is buffered, as far as every process has all of it: that must be equal everywhere."""
    from torch.distributed.tensor import DTensor

    yield from ((n, p) for n, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor))
    yield from module.named_buffers()


def checksum(tensor: torch.Tensor) -> int:
    """The sum of a tensor's 4-byte words as integers: at the speed of the memory, where it is.

    It tells numbers that changed or did not arrive, not ones that changed places.
    """
    as_bytes = _bytes(tensor.contiguous())
    words = as_bytes.view(torch.int32) if as_bytes.numel() % 4 == 0 else as_bytes
    return int(words.sum(dtype=torch.int64))


def refuse_unequal(found: Mapping[str, Any], what: str) -> None:
    """Raises VerificationError, in every process, when `found` is not the same in all of them."""
    if is_alone():
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(found))
    first = everyone[0]
    odd = {
        rank: [name for name in sorted({*first, *other}, key=str) if first.get(name) != other.get(name)]
        for rank, other in enumerate(everyone)
        if other != first
    }
    if odd:
        named = next(iter(odd.values()))
        ranks = ", ".join(map(str, odd))
        said = f"{what} differs between process 0 and {ranks}, in {len(named)} of {len(first)} values: {named[:5]}"
        fix = "nothing was published; run the same command again, and if it happens again suspect the hardware"
        raise VerificationError(Problem(said, fix=fix))


@contextmanager
def unseen() -> Iterator[None]:
    """Meanwhile accelerate and transformers do not see what was asked: they would empty or wrap the model their way."""
    before = os.environ.pop(ASKED, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[ASKED] = before


def _says(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


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
        what = f"the model has no layer of class {given or 'that transformers names'} to deal out; it has {layers}"
        raise ConfigError(Problem(what, fix=fix))
    return classes


def _refuse_unlike(module: torch.nn.Module) -> None:
    """The processes have to agree on names, shapes and dtypes before anything is sent."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    whole_numbers = [n for n, p in module.named_parameters() if not p.dtype.is_floating_point]
    if whole_numbers:
        fix = "launch it with a file that deals nothing out, or load a base that is not quantised to 4 or 8 bits"
        raise ConfigError(Problem("quantised weights cannot be dealt out", whole_numbers[:3], fix))
    refuse_unequal({name: (tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in tensors}, "the model")


def _deal(layer: torch.nn.Module, parts: Mapping[str, torch.nn.Module], mesh: DeviceMesh, sums: dict[str, int]) -> None:
    """Put the tensors of `parts` on the device, with the main process's values, and cut the parameters of `layer`."""
    from torch.distributed.fsdp import fully_shard

    for name, tensor in _placed(parts).items():
        _from_main(_bytes(tensor))
        sums[name] = checksum(tensor)
    fully_shard(layer, mesh=mesh, reshard_after_forward=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") != "false")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes: gloo and NCCL do not know every dtype."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _from_main(as_bytes: torch.Tensor) -> None:
    dist.broadcast(as_bytes, 0)


def _placed(parts: Mapping[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Move parameters and buffers to the device, without values where they have none; tied ones stay tied."""
    done: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    placed = {}
    for path, part in parts.items():
        for held in (part._parameters, part._buffers):
            for name, old in held.items():
                if old is None:
                    continue
                if id(old) not in done:
                    placed[f"{path}.{name}"] = new = _moved(old, devices.device())
                    done[id(old)] = old, new  # the old one stays, so that its id is not given to another
                held[name] = done[id(old)][1]
    return placed


def _moved(old: torch.Tensor, device: torch.device) -> torch.Tensor:
    with torch.no_grad():
        new = torch.empty_like(old, device=device) if old.is_meta else old.to(device).contiguous()
    return torch.nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, torch.nn.Parameter) else new


def refuse_non_finite(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Raises NonFiniteError that names the tensors holding NaN or infinity; for before something is published."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(own(tensor)).all()]
    if bad:
        fix = "lower the learning rate; run the same command again to go on from the last checkpoint"
        raise NonFiniteError(Problem(f"{what}: {len(bad)} tensors hold NaN or infinity", bad[:8], fix))
