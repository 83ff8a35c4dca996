"""Adapters on disk: directories in PEFT's format, made by us or by any other tool; found, read strictly, written.

What PEFT leaves to chance is asserted here: every expected key is there, no B is all zero, everything is finite, the
shapes are the base model's, and nothing in the configuration changes the update beyond scale * B @ A.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import LoraSection
from utils import experts, files
from utils.base_model import BaseModel
from utils.composition import Factors, ModuleFactors, layer_of, zero_modules
from utils.exceptions import ArtefactError, Problem

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
# settings whose values are read here, or do not touch the update; every other one has to be off
_UNDERSTOOD = {
    *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "lora_dropout", "bias"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "eva_config", "runtime_config"),
}
_REASONS = {
    "use_dora": "DoRA rescales the whole weight, so two such adapters do not add up",
    "lora_bias": "the bias of B is not part of a low-rank update",
    "modules_to_save": "full copies of modules cannot be added to another adapter",
    "trainable_token_indices": "changed embedding rows cannot be added to another adapter",
    "use_qalora": "QA-LoRA pools its input",
    "layer_replication": "replicated layers are another architecture",
    "fan_in_fan_out": "transposed weights (GPT-2's Conv1D) are not supported",
    "auto_mapping": "it names classes to import, and an adapter runs no code here",
}
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def find(path: Path) -> Path:
    """The adapter directory at `path`: itself, its `adapter/`, or the only sub-folder that holds one.

    Raises ArtefactError that says where it looked and what was there.
    """
    for directory in (path, path / "adapter"):
        if (directory / CONFIG).is_file():
            return directory
    below = sorted(p.parent for p in path.glob(f"*/{CONFIG}"))
    if len(below) == 1:
        return below[0]
    if below:
        names = ", ".join(p.name for p in below)
        fix = f"name one of them, e.g. {below[-1]}"
        raise ArtefactError(
            Problem(f"{path} holds several adapters ({names}), and none itself or in adapter/", fix=fix)
        )
    have = ", ".join(sorted(p.name for p in path.glob("*"))[:12]) or "nothing" if path.is_dir() else "no such directory"
    looked = f"looked for {CONFIG} in {path}, {path / 'adapter'} and its other sub-folders"
    raise ArtefactError(
        Problem(f"no adapter in PEFT's format: {looked}", have, "give the folder that save_pretrained wrote")
    )


def settings_of(directory: Path) -> dict[str, Any]:
    """The adapter's configuration, checked. Raises ArtefactError for each setting that is not just scale * B @ A."""
    if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
        have = sorted(p.name for p in directory.glob("*")) if directory.is_dir() else "no such directory"
        pickled = any(str(name).endswith((".bin", ".pt", ".pth")) for name in have)
        fix = "pickled weights are refused: save it with safetensors" if pickled else "give the adapter/ folder"
        raise ArtefactError(Problem(f"{directory} is not a PEFT adapter: it needs {CONFIG} and {WEIGHTS}", have, fix))
    settings = files.read_json(directory / CONFIG)
    if not isinstance(settings, dict):
        raise ArtefactError(Problem(f"{directory / CONFIG} is not a PEFT configuration", type(settings).__name__))
    problems = [
        Problem(f"{directory}: {key} is set: {_REASONS.get(key, 'its effect on the update is not known here')}", value)
        for key, value in settings.items()
        if key not in _UNDERSTOOD and value
    ]
    if settings.get("peft_type") != "LORA":
        problems.append(Problem(f"{directory}: peft_type is not LORA", settings.get("peft_type")))
    if settings.get("bias", "none") != "none":
        problems.append(Problem(f"{directory}: bias is trained too: it is not part of the update", settings["bias"]))
    initialisation = str(settings.get("init_lora_weights")).lower()
    if initialisation.startswith(_CHANGED_BASE):
        fix = "save it with path_initial_model_for_weight_conversion"
        problems.append(
            Problem(f"{directory}: its initialisation changed the base", settings["init_lora_weights"], fix)
        )
    for key, kind in (("r", int), ("lora_alpha", (int, float)), ("rank_pattern", dict), ("alpha_pattern", dict)):
        if not isinstance(settings.get(key) or kind() if kind is dict else settings.get(key), kind):
            problems.append(Problem(f"{directory}: {key} in {CONFIG} is no {kind}", settings.get(key)))
    if not problems and settings["r"] < 1:
        problems.append(Problem(f"{directory}: r in {CONFIG} is below 1", settings["r"]))
    if problems:
        raise ArtefactError(problems)
    return settings


def load(directory: Path, base: BaseModel | None = None) -> dict[str, ModuleFactors]:
    """Factors of an adapter made by this or another tool; with `base`, checked against the model's own tensors.

    Raises ArtefactError for what is missing, unexpected, damaged, all zero, not finite, or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = settings_of(directory)
    try:
        state = load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ArtefactError(
            Problem(f"{directory / WEIGHTS} is damaged ({error})", fix="restore it from a copy")
        ) from error
    factors = _factors(state, settings, directory, base)
    if base is not None:
        _check_against(factors, settings, directory, base)
    return factors


def save(directory: Path, factors: Factors, base: BaseModel, *, lora: LoraSection | None = None) -> None:
    """Write a plain PEFT directory (`adapter_config.json`, `adapter_model.safetensors`), loadable by any other tool."""
    peft_config = config_for(factors)
    if lora is not None:
        peft_config.lora_dropout = lora.dropout
        if lora.use_rslora:
            peft_config.use_rslora, peft_config.lora_alpha = True, _tidy(lora.alpha)
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
    peft_config = config_for({name: _padded(f, rank) for name, f in plain.items()} or spread)
    leaves = {name.rpartition(".")[2] for name in spread}
    # PEFT turns these leaf names into the fused parameters when it loads the adapter
    peft_config.target_modules = sorted({*(_targets(plain) if plain else ()), *leaves})
    peft_config.r, peft_config.lora_alpha = rank, rank
    peft_config.rank_pattern, peft_config.alpha_pattern = {}, {}
    state = to_state({name: _padded(f, rank) for name, f in {**plain, **spread}.items()})
    _write(directory, peft_config, state, base)


def config_for(factors: Factors) -> LoraConfig:
    """The PEFT configuration that gives these factors their ranks and scales (alpha = rank * scale)."""
    from peft import LoraConfig

    kinds = [(f.rank, f.scale) for f in factors.values()]
    common = max(set(kinds), key=lambda kind: (kinds.count(kind), kind))
    odd = {name: f for name, f in factors.items() if (f.rank, f.scale) != common}
    plain = {name: f for name, f in factors.items() if not f.is_experts}
    fused = {name: f for name, f in factors.items() if f.is_experts}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=common[0],
        lora_alpha=_tidy(common[0] * common[1]),
        rank_pattern=_by_leaf({name: f.rank for name, f in odd.items()}, factors),
        alpha_pattern=_by_leaf({name: _tidy(f.rank * f.scale) for name, f in odd.items()}, factors),
        target_modules=_targets(plain) if plain else [],
        target_parameters=_targets(fused, keep=3) if fused else None,
        use_rslora=False,
        inference_mode=True,
    )


def to_state(factors: Factors) -> dict[str, torch.Tensor]:
    """PEFT's names on disk, the adapter's own name stripped; fused parameters nested as PEFT nests them."""
    state = {}
    for module, f in factors.items():
        place = module
        if f.is_experts:
            parent, _, leaf = module.rpartition(".")
            outside = [p for p in _fused(parent, factors) if experts.FUSED.index(p) > experts.FUSED.index(leaf)]
            place = parent + ".base_layer" * len(outside)
        a, b = experts.to_peft(f)
        state[f"{_PREFIX}{place}.lora_A.weight"], state[f"{_PREFIX}{place}.lora_B.weight"] = a, b
    return state


def _write(directory: Path, peft_config: LoraConfig, state: Mapping[str, torch.Tensor], base: BaseModel) -> None:
    from safetensors.torch import save_file

    files.make_directory(directory)
    peft_config.base_model_name_or_path, peft_config.revision = base.reference, base.revision or None
    save_file(dict(state), directory / WEIGHTS, metadata={"format": "pt"})
    peft_config.save_pretrained(directory)
    written = files.read_json(directory / CONFIG)
    # PEFT keeps targets in sets, whose order changes from process to process: equal adapters, unequal bytes
    ordered = {k: sorted(written[k]) for k in ("target_modules", "target_parameters") if written.get(k)}
    files.write_json(directory / CONFIG, {**written, **ordered})


def _factors(
    state: dict[str, torch.Tensor], settings: dict[str, Any], directory: Path, base: BaseModel | None
) -> dict[str, ModuleFactors]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    problems = []
    for key, tensor in state.items():
        matched = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if not matched or tensor.ndim != 2:
            problems.append(Problem(f"{directory}: unknown tensor", f"{key} {tuple(tensor.shape)}"))
        elif not torch.isfinite(tensor).all():
            problems.append(Problem(f"{directory}: {key} holds NaN or infinity"))
        else:
            pairs.setdefault(matched[1], {})[matched[2]] = tensor
    problems += [Problem(f"{directory}: {module} has A or B but not both") for module, p in pairs.items() if len(p) < 2]
    if problems or not pairs:
        raise ArtefactError(problems[:10] or [Problem(f"{directory} holds no LoRA tensors")])
    factors: dict[str, ModuleFactors] = {}
    for module, pair in pairs.items():
        name = _parameter(module, pairs, settings)
        rank = int(_pattern(settings.get("rank_pattern"), name, settings["r"]))
        scale = _scale(name, rank, settings)
        fits = pair["A"].shape[0] == pair["B"].shape[1]
        if name != module and fits and pair["A"].shape[0] % rank == 0:
            factors[name] = experts.from_peft(pair["A"], pair["B"], rank, scale)
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
    names = [name for name in experts.FUSED if name in targets]
    depth = wrapped[2].count(".base_layer")
    if len(names) != levels or depth >= levels:
        raise ArtefactError(
            Problem(
                f"{module}: {levels} fused parameters have factors, target_parameters names {len(names)} of "
                f"{', '.join(experts.FUSED)}",
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
    found = experts.places(base.model_type, [f"{name}.weight" for name in singles])
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
    shapes = experts.weight_shapes(base.directory, base.model_type)
    problems = []
    for name, f in factors.items():
        if name not in shapes:
            problems.append(Problem(f"{directory}: the base model has no {name}", fix="it was made for another one"))
        elif shapes[name] != f.shape:
            problems.append(Problem(f"{directory}: {name} updates {f.shape}, the base model's is {shapes[name]}"))
    targets = settings.get("target_modules") or []
    parameters = {str(p) for p in settings.get("target_parameters") or []}
    simple = (
        isinstance(targets, list) and not settings.get("layers_to_transform") and not settings.get("exclude_modules")
    )
    if simple:
        wanted = {str(target) for target in targets} | parameters
        expected = {n for n in shapes if n in wanted or any(n.endswith(f".{target}") for target in wanted)}
        problems += [
            Problem(f"{directory}: no factors for {name}, which its target_modules name", fix="restore it from a copy")
            for name in sorted(expected - set(factors))
        ]
    if problems:
        raise ArtefactError(problems[:10])


def _per_expert_factors(factors: Factors, base: BaseModel) -> dict[str, ModuleFactors]:
    """Checkpoint's module name of each expert matrix -> its update; zeros for the ones that are not adapted."""
    names = experts.tensor_shapes(base.directory)
    found = {}
    for name, place in experts.places(base.model_type, names).items():
        if place.expert is None or not name.endswith(".weight"):
            continue
        rows, columns = names[name]
        if place.parameter in factors:
            found[name.removesuffix(".weight")] = experts.rows(factors[place.parameter], place)
        else:
            found[name.removesuffix(".weight")] = ModuleFactors(torch.zeros(1, columns), torch.zeros(rows, 1), 1.0)
    return found


def _padded(f: ModuleFactors, rank: int) -> ModuleFactors:
    """The same update with `rank` and scale 1: the scale goes into A, zero rows are added."""
    more = rank - f.rank
    a_rI = torch.nn.functional.pad(f.scale * f.a_rI.float(), (0, 0, 0, more))
    return ModuleFactors(a_rI, torch.nn.functional.pad(f.b_Or.float(), (0, more)), 1.0)


def _scale(module: str, rank: int, settings: dict[str, Any]) -> float:
    alpha = float(_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"]))
    return alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: a key matches the end of the module's path."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _by_leaf(values: Mapping[str, Any], factors: Factors) -> dict[str, Any]:
    """Patterns by leaf name where every module of that leaf has the same value, else by full path."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        leaf = name.rpartition(".")[2]
        alike = {values.get(other) for other in factors if other.rpartition(".")[2] == leaf} == {value}
        found[leaf if alike else name] = value
    return found


def _targets(factors: Factors, keep: int = 1) -> list[str]:
    """The last `keep` parts of the names when all of them are adapted in the same layers; else full paths."""
    layers: dict[str, set[int | None]] = {}
    for name in factors:
        layers.setdefault(".".join(name.split(".")[-keep:]), set()).add(layer_of(name))
    count = 1 + max((layer for found in layers.values() for layer in found if layer is not None), default=0)
    everywhere = all(found == set(range(count)) for found in layers.values())
    return sorted(layers) if everywhere else sorted(factors)


def _fused(parent: str, factors: Factors) -> list[str]:
    return [leaf for leaf in experts.FUSED if f"{parent}.{leaf}" in factors]


def _tidy(number: float) -> int | float:
    return int(number) if float(number).is_integer() else float(number)
