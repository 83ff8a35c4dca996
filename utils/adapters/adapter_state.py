"""What the tensors of an adapter file say: pairs of factors by the base model's names, whoever wrote them and how.

Wrappers that were round the model while it was saved (torch.compile, DDP, FSDP, a doubled PEFT prefix, the adapter's
own name) are taken off the names; names of earlier versions and of a part of the base become the base's where that is
unambiguous. Unchanged copies of the base's embeddings and head, which PEFT may save beside the factors, are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.adapters import adapter_config, fused_experts, own_modules
from utils.adapters.factors import Factors, ModuleFactors, zero_modules
from utils.exceptions import ArtefactError, Problem
from utils.logger import event
from utils.models.base_model import BaseModel
from utils.models.structure import model_class
from utils.models.weights import tensor_names
from utils.models.weights.safetensors_io import DTYPES

PREFIX = "base_model.model."
_FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]
# parts of a name that wrappers add
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
_EMBEDDED = re.compile(r"(.+)\.lora_embedding_[AB]")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_WRAPPED = re.compile(r"(.+\.experts)((?:\.base_layer)*)")


def factors(
    state: Mapping[str, torch.Tensor], settings: dict[str, Any], directory: Path, base: BaseModel | None
) -> dict[str, ModuleFactors]:
    """The factors in a file's tensors, by the base model's names where `base` is given.

    Raises ArtefactError for what is missing, unexpected, all zero or not finite.
    """
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    problems = []
    for key, tensor in _unwrapped(state, directory).items():
        matched = _FACTOR.fullmatch(key.removeprefix(PREFIX))
        if not tensor.numel():
            fix = "DeepSpeed ZeRO-3 saved one process's share: save with stage3_gather_16bit_weights_on_model_save"
            problems.append(Problem(f"{directory}: {key} is empty", tuple(tensor.shape), fix))
        elif _EMBEDDED.search(key):
            fix = "leave the embeddings out of target_modules"
            problems.append(
                Problem(f"{directory}: it adapts embeddings, which is no update of a matrix here", key, fix)
            )
        elif key.startswith(PREFIX) and tensor.dtype in _FLOATS and not matched and ".lora_" not in key:
            whole[key.removeprefix(PREFIX)] = tensor
        elif not key.startswith(PREFIX) or not matched or tensor.ndim != 2 or tensor.dtype not in _FLOATS:
            problems.append(Problem(f"{directory}: unknown tensor", f"{key} {tuple(tensor.shape)}"))
        elif not torch.isfinite(tensor.float()).all():
            problems.append(Problem(f"{directory}: {key} holds NaN or infinity"))
        else:
            pairs.setdefault(matched[1], {})[matched[2]] = tensor
    problems += [Problem(f"{directory}: {module} has A or B but not both") for module, p in pairs.items() if len(p) < 2]
    problems += own_modules.problems(whole, directory, base)
    if problems or not pairs:
        raise ArtefactError(problems[:10] or [Problem(f"{directory} holds no LoRA tensors")])
    factors: dict[str, ModuleFactors] = {}
    for module, pair in pairs.items():
        name = _parameter(module, pairs, settings)
        rank = int(_of_pattern(settings.get("rank_pattern"), name, settings["r"]))
        scale = adapter_config.scale_of(name, rank, settings)
        fits = pair["A"].shape[0] == pair["B"].shape[1]
        if name != module and fits and pair["A"].shape[0] % rank == 0:
            factors[name] = fused_experts.from_peft(pair["A"], pair["B"], rank, scale)
        elif fits and pair["A"].shape[0] == rank:
            factors[name] = ModuleFactors(pair["A"], pair["B"], scale)
        else:
            ranks = " and ".join(str(r) for r in dict.fromkeys((pair["A"].shape[0], pair["B"].shape[1])))
            problems.append(Problem(f"{directory}: {module} has rank {ranks}, its config says {rank}"))
    if not problems and len(zero_modules(factors)) == len(factors):
        problems.append(Problem(f"every B in {directory} is zero", fix="it was never trained, or saved wrongly"))
    if problems:
        raise ArtefactError(problems[:10])
    if any(_EXPERT.search(name) for name in factors):
        factors = _fused_from_single(factors, directory, base)
    return _by_names_of(factors, base, directory) if base is not None else factors


def _unwrapped(state: Mapping[str, torch.Tensor], directory: Path) -> dict[str, torch.Tensor]:
    """The tensors by PEFT's own names. Raises ArtefactError where two of them would become one."""
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        parts = [part for part in key.split(".") if part not in _WRAPPERS]
        if parts[:1] == ["module"]:
            parts = parts[1:]
        while parts[:4] == ["base_model", "model"] * 2:
            parts = parts[2:]
        if parts[:3] == ["base_model", "model", "module"]:
            del parts[2]
        name = ".".join(parts)
        # the adapter's own name, which PEFT strips
        name = re.sub(r"(\.lora_[AB])\.[^.]+\.weight$", r"\1.weight", name)
        if name in tensors:
            what = f"{directory}: {key} and another tensor are both {name}: it holds more than one adapter"
            raise ArtefactError(Problem(what, fix="save one adapter alone"))
        tensors[name] = tensor
    return tensors


def _of_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT goes by a module's path, or by a parameter's where the adapter targets one."""
    return adapter_config.by_pattern(patterns, name, adapter_config.by_pattern(patterns, f"{name}.weight", default))


def _by_names_of(factors: Factors, base: BaseModel, directory: Path) -> dict[str, ModuleFactors]:
    """The factors by the base model's own names: as transformers renames them, or after what one of both has in front.

    A name that cannot be told stays as it is, and is refused with the others that do not fit.
    """
    model = model_class.outline(base.directory)
    known = {name.removesuffix(".weight") for name in model.state_dict()}
    strange = [name for name in factors if name not in known]
    if not strange:
        return dict(factors)
    renamed = tensor_names.places(base.directory, [f"{name}.weight" for name in strange])
    inside = {name for name in known if name.startswith(model_class.decoder_path(model))}
    names = {name: name for name in factors}
    for name in strange:
        by_rule = renamed[f"{name}.weight"].parameter.removesuffix(".weight")
        names[name] = by_rule if by_rule in known else _by_end(name, inside) or name
    changed = {old: new for old, new in names.items() if old != new}
    if len(set(names.values())) < len(names):
        what = f"{directory}: two of its modules would be one module of the base model"
        raise ArtefactError(Problem(what, sorted(changed)[:3], "save the adapter again with peft 0.21"))
    if changed:
        example = next(iter(changed.items()))
        event("the adapter's names are read as the base model's", path=directory, names=len(changed), example=example)
    return {names[name]: f for name, f in factors.items()}


def _by_end(name: str, known: set[str]) -> str | None:
    """The one module of the language model whose path ends as this one does, from its first number's list on."""
    parts = name.split(".")
    first = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts))
    for at in range(1, max(1, first)):
        end = ".".join(parts[at:])
        fitting = [one for one in known if one == end or one.endswith(f".{end}")]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    whole = [one for one in known if one.endswith(f".{name}")]
    return whole[0] if len(whole) == 1 else None


def _parameter(module: str, pairs: Mapping[str, Any], settings: dict[str, Any]) -> str:
    """The fused parameter that a wrapper's key stands for (by nesting, the first registered innermost), or `module`."""
    wrapped = _WRAPPED.fullmatch(module)
    if not wrapped:
        return module
    levels = sum(1 for other in pairs if (m := _WRAPPED.fullmatch(other)) and m[1] == wrapped[1])
    targets = [str(target).rpartition(".")[2] for target in settings.get("target_parameters") or []]
    names = [name for name in tensor_names.FUSED if name in targets]
    depth = wrapped[2].count(".base_layer")
    if len(names) != levels or depth >= levels:
        raise ArtefactError(
            Problem(
                f"{module}: {levels} fused parameters have factors, target_parameters names {len(names)} of "
                f"{', '.join(tensor_names.FUSED)}",
                settings.get("target_parameters"),
                "save the adapter again with peft 0.21",
            )
        )
    return f"{wrapped[1]}.{names[levels - 1 - depth]}"


def _fused_from_single(factors: Factors, directory: Path, base: BaseModel | None) -> dict[str, ModuleFactors]:
    """Per-expert factors (as vLLM and older PEFT have them) as updates of the fused parameters, exactly.

    Parts that are joined in one parameter (w1 and w3) keep their own factors: A is stacked, B is block-diagonal.
    """
    if base is None:
        raise ArtefactError(Problem(f"{directory} has factors per expert: reading it needs the base model's names"))
    singles = {name: f for name, f in factors.items() if _EXPERT.search(name)}
    places = tensor_names.places(base.directory, [f"{name}.weight" for name in singles])
    groups: dict[str, dict[tuple[int, int], ModuleFactors]] = {}
    parts: dict[str, int] = {}
    for name, f in singles.items():
        place = places[f"{name}.weight"]
        if place.expert is None:
            raise ArtefactError(Problem(f"{directory}: the base model has no such expert", name))
        groups.setdefault(place.parameter, {})[place.expert, place.part] = f
        parts[place.parameter] = place.parts
    joined = {name: f for name, f in factors.items() if name not in singles}
    for parameter, group in groups.items():
        count = 1 + max(expert for expert, _ in group)
        expected = {(expert, part) for expert in range(count) for part in range(parts[parameter])}
        if set(group) != expected or len({(f.a_rI.shape, f.b_Or.shape, f.scale) for f in group.values()}) > 1:
            raise ArtefactError(Problem(f"{directory}: {parameter}: experts are missing, or of unequal rank or shape"))
        own = [[group[expert, part] for part in range(parts[parameter])] for expert in range(count)]
        a_ErI = torch.stack([torch.cat([f.a_rI for f in row]) for row in own])
        b_EOr = torch.stack([torch.block_diag(*(f.b_Or for f in row)) for row in own])
        joined[parameter] = ModuleFactors(a_ErI, b_EOr, own[0][0].scale)
    return joined
