"""Adapters on disk: directories in PEFT's format, made by us or by any other tool; found, read strictly, written.

What PEFT leaves to chance is asserted here: every expected key is there, no B is all zero, everything is finite, the
shapes are the base model's, and nothing in the configuration changes the update beyond scale * B @ A.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import LoraSection
from utils import disk
from utils.adapters import adapter_config, fused_experts
from utils.adapters.factors import Factors, ModuleFactors, norm, padded, zero_modules
from utils.artifacts import files
from utils.exceptions import ArtefactError, Problem
from utils.models.base_model import BaseModel
from utils.models.directory_checks import leads_out
from utils.models.model_shapes import PLAIN
from utils.models.parallel import sharding
from utils.models.weights import tensor_names
from utils.models.weights.safetensors_io import DTYPES, Checkpoint

if TYPE_CHECKING:
    from peft import LoraConfig

_PREFIX = "base_model.model."
_FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]


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
    raise ArtefactError(
        Problem(f"no adapter in PEFT's format: {looked}", have, "give the folder that save_pretrained wrote")
    )


def load(directory: Path, base: BaseModel | None = None) -> dict[str, ModuleFactors]:
    """Factors of an adapter made by this or another tool; with `base`, checked against the model's own tensors.

    Raises ArtefactError for what is missing, unexpected, damaged, all zero, not finite, or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = adapter_config.read(directory)
    try:
        state = load_file(directory / adapter_config.WEIGHTS)
    except (SafetensorError, KeyError) as error:  # KeyError: a number format that torch does not have
        raise ArtefactError(
            Problem(f"{directory / adapter_config.WEIGHTS} is damaged ({error})", fix="restore it from a copy")
        ) from error
    factors = _factors(state, settings, directory, base)
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
    peft_config = adapter_config.config_for(factors)
    if lora is not None:
        peft_config.lora_dropout = lora.dropout
        if lora.use_rslora:
            peft_config.use_rslora, peft_config.lora_alpha = True, adapter_config.tidy(lora.alpha)
    _write(directory, peft_config, to_state(factors), base)


def save_per_expert(directory: Path, factors: Factors, base: BaseModel) -> None:
    """Write the adapter with one pair of matrices per expert and the checkpoint's own names, as vLLM reads them.

    Every module gets the same rank (zero rows beyond its own) and scale 1, because servers read one rank and one scale
    for all; experts that are not adapted in a layer get zeros, because tools expect every expert or none. PEFT loads it
    too. Raises ArtefactError when the checkpoint has no per-expert tensors.
    """
    rank = max(f.rank for f in factors.values())
    spread = _per_expert_factors(factors, base)
    if not spread:
        raise ArtefactError(Problem(f"{base.directory} keeps no tensor per expert, so there are no names to export to"))
    plain = {name: f for name, f in factors.items() if not f.is_experts}
    peft_config = adapter_config.config_for({name: padded(f, rank) for name, f in plain.items()} or spread)
    leaves = {name.rpartition(".")[2] for name in spread}
    # PEFT turns these leaf names into the fused parameters when it loads the adapter
    peft_config.target_modules = sorted({*(adapter_config.shortest_targets(plain) if plain else ()), *leaves})
    peft_config.r, peft_config.lora_alpha = rank, rank
    peft_config.rank_pattern, peft_config.alpha_pattern = {}, {}
    state = to_state({name: padded(f, rank) for name, f in {**plain, **spread}.items()})
    _write(directory, peft_config, state, base)


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
        state[f"{_PREFIX}{place}.lora_A.weight"], state[f"{_PREFIX}{place}.lora_B.weight"] = a, b
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


def _factors(
    state: dict[str, torch.Tensor], settings: dict[str, Any], directory: Path, base: BaseModel | None
) -> dict[str, ModuleFactors]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    problems = []
    for key, tensor in state.items():
        matched = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if not matched or tensor.ndim != 2 or tensor.dtype not in _FLOATS:
            problems.append(Problem(f"{directory}: unknown tensor", f"{key} {tuple(tensor.shape)}"))
        elif not torch.isfinite(tensor.float()).all():
            problems.append(Problem(f"{directory}: {key} holds NaN or infinity"))
        else:
            pairs.setdefault(matched[1], {})[matched[2]] = tensor
    problems += [Problem(f"{directory}: {module} has A or B but not both") for module, p in pairs.items() if len(p) < 2]
    if problems or not pairs:
        raise ArtefactError(problems[:10] or [Problem(f"{directory} holds no LoRA tensors")])
    factors: dict[str, ModuleFactors] = {}
    for module, pair in pairs.items():
        name = _parameter(module, pairs, settings)
        rank = int(adapter_config.by_pattern(settings.get("rank_pattern"), name, settings["r"]))
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
    return _fused_from_single(factors, directory, base) if any(_EXPERT.search(n) for n in factors) else factors


_EXPERT = re.compile(r"\.experts\.\d+\.")
_WRAPPED = re.compile(r"(.+\.experts)((?:\.base_layer)*)")


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
    found = tensor_names.places(base.model_type, [f"{name}.weight" for name in singles])
    groups: dict[str, dict[tuple[int, int], ModuleFactors]] = {}
    parts: dict[str, int] = {}
    for name, f in singles.items():
        place = found[f"{name}.weight"]
        if place.expert is None:
            raise ArtefactError(Problem(f"{directory}: the base model has no such expert", name))
        groups.setdefault(place.parameter, {})[place.expert, place.part] = f
        parts[place.parameter] = place.parts
    joined = {name: f for name, f in factors.items() if name not in singles}
    for parameter, group in groups.items():
        count = 1 + max(expert for expert, _ in group)
        wanted = {(expert, part) for expert in range(count) for part in range(parts[parameter])}
        if set(group) != wanted or len({(f.a_rI.shape, f.b_Or.shape, f.scale) for f in group.values()}) > 1:
            raise ArtefactError(Problem(f"{directory}: {parameter}: experts are missing, or of unequal rank or shape"))
        own = [[group[expert, part] for part in range(parts[parameter])] for expert in range(count)]
        a_ErI = torch.stack([torch.cat([f.a_rI for f in row]) for row in own])
        b_EOr = torch.stack([torch.block_diag(*(f.b_Or for f in row)) for row in own])
        joined[parameter] = ModuleFactors(a_ErI, b_EOr, own[0][0].scale)
    return joined


def _check_against(factors: Factors, settings: dict[str, Any], directory: Path, base: BaseModel) -> None:
    """Every update fits a tensor of the base model, and every module that the adapter targets has one."""
    shapes = tensor_names.weight_shapes(base.directory, base.model_type)
    problems = []
    for name, f in factors.items():
        if name not in shapes:
            problems.append(Problem(f"{directory}: the base model has no {name}", fix="it was made for another one"))
        elif shapes[name] != f.shape:
            problems.append(Problem(f"{directory}: {name} updates {f.shape}, the base model's is {shapes[name]}"))
    if expected := adapter_config.targeted(settings, directory, base) & set(shapes):
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


def _per_expert_factors(factors: Factors, base: BaseModel) -> dict[str, ModuleFactors]:
    """Checkpoint's module name of each expert matrix -> its update; zeros for the ones that are not adapted."""
    names = tensor_names.tensor_shapes(base.directory)
    found = {}
    for name, place in tensor_names.places(base.model_type, names).items():
        if place.expert is None or not name.endswith(".weight"):
            continue
        rows, columns = names[name]
        if place.parameter in factors:
            found[name.removesuffix(".weight")] = fused_experts.rows(factors[place.parameter], place)
        else:
            found[name.removesuffix(".weight")] = ModuleFactors(torch.zeros(1, columns), torch.zeros(rows, 1), 1.0)
    return found


def _fused(parent: str, factors: Factors) -> list[str]:
    return [leaf for leaf in tensor_names.FUSED if f"{parent}.{leaf}" in factors]
