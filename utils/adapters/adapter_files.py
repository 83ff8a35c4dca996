"""Adapters on disk: directories in PEFT's format, made by us or by any other tool; found, read strictly, written.

What PEFT leaves to chance is asserted here: every expected key is there, no B is all zero, everything is finite, the
shapes are the base model's, and nothing in the configuration changes the update beyond scale * B @ A.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import LoraSection
from utils import disk
from utils.adapters import adapter_config, adapter_state, fused_experts, other_tools
from utils.adapters.factors import Factors, ModuleFactors, norm, padded
from utils.artifacts import files
from utils.exceptions import ArtefactError, Problem, path_fix
from utils.models.base_model import BaseModel
from utils.models.directory_checks import leads_out
from utils.models.model_shapes import PLAIN
from utils.models.parallel import sharding
from utils.models.structure import model_class
from utils.models.weights import tensor_names
from utils.models.weights.safetensors_io import Checkpoint

if TYPE_CHECKING:
    from peft import LoraConfig


def find(path: Path) -> Path:
    """The adapter directory at `path`: itself, its `adapter/`, or the only sub-folder that holds one.

    Raises ArtefactError that says where it looked and what was there.
    """
    for directory in (path, path / "adapter"):
        if (directory / adapter_config.CONFIG).is_file() and not leads_out(directory, path):
            return directory
    below = sorted(p.parent for p in path.glob(f"*/{adapter_config.CONFIG}") if not leads_out(p.parent, path))
    if len(below) == 1:
        return below[0]
    if below:
        names = ", ".join(p.name for p in below)
        fix = f"name one of them, e.g. {below[-1]}"
        raise ArtefactError(
            Problem(f"{path} holds several adapters ({names}), and none itself or in adapter/", fix=fix)
        )
    have = ", ".join(sorted(p.name for p in path.glob("*"))[:12]) or "nothing" if path.is_dir() else "no such directory"
    looked = f"looked for {adapter_config.CONFIG} in {path}, {path / 'adapter'} and its other sub-folders"
    fix = "give the folder that save_pretrained wrote" if path.exists() else path_fix(path)
    raise ArtefactError(Problem(f"no adapter in PEFT's format: {looked}", have, fix))


def load(directory: Path, base: BaseModel | None = None) -> dict[str, ModuleFactors]:
    """Factors of an adapter made by this or another tool; with `base`, checked against the model's own tensors.

    Raises ArtefactError for what is missing, unexpected, damaged, all zero, not finite, or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = other_tools.read(directory)
    try:
        state = load_file(directory / adapter_config.WEIGHTS)
    except (SafetensorError, KeyError) as error:  # KeyError: a number format that torch does not have
        raise ArtefactError(
            Problem(f"{directory / adapter_config.WEIGHTS} is damaged ({error})", fix="restore it from a copy")
        ) from error
    factors = adapter_state.factors(state, settings, directory, base)
    if base is not None:
        _check_against(factors, settings, directory, base)
    return factors


def digest(directory: Path) -> str:
    """What identifies an adapter of another tool: its two files' contents."""
    return files.fingerprint(digests(directory))


def digests(directory: Path) -> dict[str, str]:
    return {name: files.sha256_file(directory / name) for name in (adapter_config.CONFIG, adapter_config.WEIGHTS)}


def relative_size(factors: Factors, base: BaseModel, modules: int = 8) -> float:
    """Median of ||delta|| / ||weight|| over some modules, evenly chosen; 0 when none has its own tensor on disk."""
    checkpoint = Checkpoint(base.directory)
    named = sorted(name for name in factors if f"{name}.weight" in checkpoint.homes)
    shares = []
    for module in named[:: max(1, len(named) // modules)][:modules]:
        weight = f"{module}.weight"
        pieces = checkpoint.rows(checkpoint.homes[weight], weight)
        size = sum(float(piece_RI.norm()) ** 2 for _, _, piece_RI in pieces) ** 0.5
        shares.append(norm(factors[module]) / size if size else 0.0)
    return statistics.median(shares) if shares else 0.0


def save(directory: Path, factors: Factors, base: BaseModel, *, lora: LoraSection | None = None) -> None:
    """Write a plain PEFT directory (`adapter_config.json`, `adapter_model.safetensors`), loadable by any other tool."""
    peft_config = adapter_config.config_for(factors, model_class.outline(base.directory))
    if lora is not None:
        peft_config.lora_dropout = lora.dropout
        if lora.use_rslora:
            peft_config.use_rslora, peft_config.lora_alpha = True, adapter_config.tidy(lora.alpha)
    _write(directory, peft_config, to_state(factors), base)


def save_per_expert(directory: Path, factors: Factors, base: BaseModel) -> bool:
    """Write the adapter with one pair of matrices per expert and the checkpoint's own names, as vLLM reads them.

    Every module gets the same rank (zero rows beyond its own) and scale 1, because servers read one rank and one scale
    for all; experts that are not adapted in a layer get zeros, because tools expect every expert or none. PEFT loads it
    too. Returns False, and writes nothing, when the checkpoint has no per-expert tensors, so no names to export to.
    """
    rank = max(f.rank for f in factors.values())
    spread = _per_expert_factors(factors, base)
    if not spread:
        return False
    plain = {name: f for name, f in factors.items() if not f.is_experts}
    same = {name: padded(f, rank) for name, f in factors.items()}
    peft_config = adapter_config.config_for(same, model_class.outline(base.directory))
    leaves = {name.rpartition(".")[2] for name in spread}
    # PEFT turns these leaf names into the fused parameters when it loads the adapter
    peft_config.target_modules = sorted({*peft_config.target_modules, *leaves})
    peft_config.target_parameters = [p for p in peft_config.target_parameters or () if p.endswith(".weight")] or None
    peft_config.r, peft_config.lora_alpha = rank, rank
    peft_config.rank_pattern, peft_config.alpha_pattern = {}, {}
    state = to_state({name: padded(f, rank) for name, f in {**plain, **spread}.items()})
    _write(directory, peft_config, state, base)
    return True


def to_state(factors: Factors) -> dict[str, torch.Tensor]:
    """PEFT's names on disk, the adapter's own name stripped; fused parameters nested as PEFT nests them."""
    state = {}
    for module, f in factors.items():
        place = module
        if f.is_experts:
            parent, _, leaf = module.rpartition(".")
            outside = [
                p for p in _fused(parent, factors) if tensor_names.FUSED.index(p) > tensor_names.FUSED.index(leaf)
            ]
            place = parent + ".base_layer" * len(outside)
        a, b = fused_experts.to_peft(f)
        state[f"{adapter_state.PREFIX}{place}.lora_A.weight"], state[f"{adapter_state.PREFIX}{place}.lora_B.weight"] = (
            a,
            b,
        )
    return state


def _write(directory: Path, peft_config: LoraConfig, state: Mapping[str, torch.Tensor], base: BaseModel) -> None:
    from safetensors.torch import save_file

    sharding.refuse_non_finite(state, f"the adapter for {directory}")
    files.make_directory(directory)
    peft_config.base_model_name_or_path = base.reference
    peft_config.revision = (base.revision or None) if base.quantization == PLAIN else None
    # the weights first: without its adapter_config.json no tool takes the directory for an adapter
    with disk.errors(directory / adapter_config.WEIGHTS):
        save_file(dict(state), directory / adapter_config.WEIGHTS, metadata={"format": "pt"})
    with disk.errors(directory / adapter_config.CONFIG):
        peft_config.save_pretrained(directory)
    written = files.read_json(directory / adapter_config.CONFIG)
    # PEFT keeps targets in sets, whose order changes from process to process: equal adapters, unequal bytes
    ordered = {k: sorted(written[k]) for k in ("target_modules", "target_parameters") if written.get(k)}
    files.write_json(directory / adapter_config.CONFIG, {**written, **ordered})


def _check_against(factors: Factors, settings: dict[str, Any], directory: Path, base: BaseModel) -> None:
    """Every update fits a tensor of the base model, and every module that the adapter targets has one."""
    shapes = tensor_names.weight_shapes(base.directory)
    problems = []
    for name, f in factors.items():
        if name not in shapes:
            problems.append(Problem(f"{directory}: the base model has no {name}", fix="it was made for another one"))
        elif shapes[name] != f.shape:
            problems.append(Problem(f"{directory}: {name} updates {f.shape}, the base model's is {shapes[name]}"))
    if expected := _expected(factors, settings, directory, base) & set(shapes):
        problems += [
            Problem(f"{directory}: no factors for {name}, which its targets name", fix="restore it from a copy")
            for name in sorted(expected - set(factors))
        ]
        problems += [
            Problem(f"{directory}: factors for {name}, which its targets do not name: PEFT would leave them out")
            for name in sorted(set(factors) & set(shapes) - expected)
        ]
    elif settings.get("target_parameters") or settings.get("target_modules") not in (None, "all-linear"):
        keys = ("target_modules", "target_parameters", "layers_to_transform", "exclude_modules")
        named = {key: settings[key] for key in keys if settings.get(key) is not None}
        problems.append(Problem(f"{directory}: what its configuration targets is nothing of the base model", named))
    if problems:
        raise ArtefactError(problems[:10])


def _expected(factors: Factors, settings: dict[str, Any], directory: Path, base: BaseModel) -> set[str]:
    """What the configuration targets. Leaf names find single experts' tensors too, as transformers 4 had them, and a
    vision tower's, which a text model alone has not: those count for an adapter that has some."""
    targets = adapter_config.targeted(settings, directory, base)
    model = model_class.outline(base.directory)
    inside, head = model_class.decoder_path(model), model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is head}
    towers = {name for name in targets - heads if not name.startswith(inside)}
    if towers.isdisjoint(factors):
        targets -= towers
    if any(f.is_experts for f in factors.values()):
        return targets
    places = tensor_names.places(base.directory, tensor_names.tensor_shapes(base.directory)).values()
    experts = {place.parameter for place in places if place.expert is not None}
    return targets - (experts - adapter_config.targeted({**settings, "target_modules": None}, directory, base))


def _per_expert_factors(factors: Factors, base: BaseModel) -> dict[str, ModuleFactors]:
    """Checkpoint's module name of each expert matrix -> its update; zeros for the ones that are not adapted."""
    names = tensor_names.tensor_shapes(base.directory)
    updates = {}
    for name, place in tensor_names.places(base.directory, names).items():
        if place.expert is None or not name.endswith(".weight"):
            continue
        rows, columns = names[name]
        if place.parameter in factors:
            updates[name.removesuffix(".weight")] = fused_experts.rows(factors[place.parameter], place)
        else:
            updates[name.removesuffix(".weight")] = ModuleFactors(torch.zeros(1, columns), torch.zeros(rows, 1), 1.0)
    return updates


def _fused(parent: str, factors: Factors) -> list[str]:
    return [leaf for leaf in tensor_names.FUSED if f"{parent}.{leaf}" in factors]
