"""What a merge will write, from the headers of the base: which tensors an update changes, and every file's layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

from utils.adapters import fused_experts
from utils.adapters.factors import Factors, ModuleFactors
from utils.exceptions import ArtefactError, Problem
from utils.models.architectures import registry
from utils.models.base_model import BaseModel
from utils.models.weights import safetensors_io, tensor_names
from utils.models.weights.safetensors_io import Checkpoint, Header, Tensor

SAFETENSORS_NAME = {"bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Plan:
    """What is going to be written, known from the headers alone."""

    checkpoint: Checkpoint
    outputs: dict[str, Header]
    updates: dict[str, ModuleFactors]
    dtype: str
    base: BaseModel

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(header.size for header in self.outputs.values())


def plan(base: BaseModel, factors: Factors, dtype: str) -> Plan:
    """What a merge will write, from the headers of the base. Raises ArtefactError for all that can be known by then."""
    checkpoint = Checkpoint(base.directory)
    if dtype == "fp8" and not is_fp8(checkpoint):
        what = "which tensors stand FP8 is the model maker's choice, and this base has none in FP8 to show it"
        raise ArtefactError(Problem(what, "--merge.dtype fp8", "use --merge.dtype base or bfloat16"))
    updates = _updates(checkpoint, factors)
    outputs = {}
    for path, header in checkpoint.headers.items():
        after = {name: _after(checkpoint, updates, name, tensor, dtype) for name, tensor in header.tensors.items()}
        for name, tensor in header.tensors.items():
            if tensor.is_fp8 and (name in updates or after[name] != tensor):
                checkpoint.scale_home(path, name)  # raises now what would come up after hours of writing
        outputs[path.name] = safetensors_io.plan({n: tensor for n, tensor in after.items() if tensor}, header.metadata)
    return Plan(checkpoint, outputs, updates, dtype, base)


def _updates(checkpoint: Checkpoint, factors: Factors) -> dict[str, ModuleFactors]:
    """Tensor name on disk -> its update. Every value of every delta has its place, or this raises ArtefactError."""
    weights = [name for name in checkpoint.homes if not checkpoint.is_scale(name)]
    placed = dict.fromkeys(factors, 0)
    updates, problems = {}, []
    for name, place in tensor_names.places(checkpoint.directory, weights).items():
        module = place.parameter if place.parameter in factors else place.parameter.removesuffix(".weight")
        if module not in factors:
            continue
        module_update, tensor = factors[module], checkpoint.tensor(name)
        fits = place.expert is None or (module_update.is_experts and place.expert < module_update.shape[0])
        update = fused_experts.rows(module_update, place) if fits else module_update
        if not fits or update.shape != tensor.shape or not tensor.is_floating:
            on_disk = f"{tensor.dtype} {tensor.shape}"
            problems.append(Problem(f"{name} is {on_disk}, a delta of {update.shape} cannot be added to it"))
        placed[module] += math.prod(update.shape)
        updates[name] = update
    if problems:
        raise ArtefactError(problems[:5])
    without_tensor = [module for module, count in placed.items() if count != math.prod(factors[module].shape)]
    if without_tensor:
        fix = "the adapter was made for another model, or the base lacks files"
        raise ArtefactError(
            Problem("the base model has no tensor for all of these deltas", sorted(without_tensor)[:5], fix)
        )
    return updates


def _after(
    checkpoint: Checkpoint, updates: dict[str, ModuleFactors], name: str, tensor: Tensor, dtype: str
) -> Tensor | None:
    """What becomes of a tensor; None for one that is left out."""
    if checkpoint.is_scale(name):
        changed = name.removesuffix(safetensors_io.SCALE) in updates
        return None if dtype != "fp8" else safetensors_io.described("F32", tensor.shape) if changed else tensor
    kept = registry.of(checkpoint.config.get("model_type")).kept_in_merge
    if dtype == "fp8" or not tensor.is_floating or name.endswith(kept):
        return tensor
    if dtype == "base":
        return safetensors_io.described("BF16", tensor.shape) if tensor.is_fp8 else tensor
    return safetensors_io.described(SAFETENSORS_NAME[dtype], tensor.shape)


def is_fp8(checkpoint: Checkpoint) -> bool:
    return any(checkpoint.is_scale(name) for name in checkpoint.homes)
