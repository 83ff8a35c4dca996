"""What `adapter_config.json` says: read strictly, and written so that every tool reads the same.

Only what leaves the update at scale * B @ A is understood; every other setting has to be off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import experts, files
from utils.base_model import BaseModel
from utils.composition import Factors, layer_of
from utils.exceptions import ArtefactError, Problem

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
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
_LEFT_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")


def read(directory: Path) -> dict[str, Any]:
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
        if key not in _UNDERSTOOD and value and not (key == "auto_mapping" and _names_transformers(value))
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
    elif initialisation not in _LEFT_BASE:
        what = f"{directory}: init_lora_weights: whether this initialisation changed the base is not known here"
        problems.append(Problem(what, settings["init_lora_weights"]))
    problems += [Problem(f"{directory}: {what} in {CONFIG}", value) for what, value in _unreadable(settings)]
    if problems:
        raise ArtefactError(problems)
    return settings


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
        lora_alpha=tidy(common[0] * common[1]),
        rank_pattern=_by_leaf({name: f.rank for name, f in odd.items()}, factors),
        alpha_pattern=_by_leaf({name: tidy(f.rank * f.scale) for name, f in odd.items()}, factors),
        target_modules=shortest_targets(plain) if plain else [],
        target_parameters=shortest_targets(fused, keep=3) if fused else None,
        use_rslora=False,
        inference_mode=True,
    )


def targeted(settings: dict[str, Any], directory: Path, base: BaseModel) -> set[str]:
    """Names that PEFT adapts by these settings: modules by its own rule, parameters by the end of their name."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    parameters = settings.get("target_parameters") or []
    found = set()
    try:
        rule = LoraConfig(**{key: settings.get(key) for key in keys})
        for name, place in experts.places(base.model_type, experts.tensor_shapes(base.directory)).items():
            # an expert's own matrix goes by its name on disk, as it does in the adapter's keys
            module = (place.parameter if place.expert is None else name).removesuffix(".weight")
            by_rule = bool(rule.target_modules) and bool(check_target_module_exists(rule, module))
            if by_rule or any(f".{place.parameter}".endswith(f".{parameter}") for parameter in parameters):
                found.add(place.parameter.removesuffix(".weight"))
    except (TypeError, ValueError, re.error) as error:
        what = f"{directory}: target_modules and what restricts them cannot be read ({error})"
        raise ArtefactError(Problem(what, {key: settings[key] for key in keys if settings.get(key)})) from error
    return found


def scale_of(module: str, rank: int, settings: dict[str, Any]) -> float:
    alpha = float(by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"]))
    return alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank


def by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: a key matches the end of the module's path."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def tidy(number: float) -> int | float:
    return int(number) if float(number).is_integer() else float(number)


def shortest_targets(factors: Factors, keep: int = 1) -> list[str]:
    """The last `keep` parts of the names when all of them are adapted in the same layers; else full paths."""
    layers: dict[str, set[int | None]] = {}
    for name in factors:
        layers.setdefault(".".join(name.split(".")[-keep:]), set()).add(layer_of(name))
    count = 1 + max((layer for found in layers.values() for layer in found if layer is not None), default=0)
    everywhere = all(found == set(range(count)) for found in layers.values())
    return sorted(layers) if everywhere else sorted(factors)


def _names_transformers(value: Any) -> bool:
    """PEFT writes auto_mapping when no task_type was given; classes of transformers itself are what it then names."""
    return isinstance(value, dict) and str(value.get("parent_library")).startswith("transformers.")


def _unreadable(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    """(what is wrong, the value) of ranks, scales and patterns."""

    def is_rank(value: Any) -> bool:
        return isinstance(value, int) and value >= 1

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and math.isfinite(value)

    found = []
    for key, patterns, fits in (("r", "rank_pattern", is_rank), ("lora_alpha", "alpha_pattern", is_number)):
        kind = "whole number from 1" if fits is is_rank else "finite number"
        if not fits(settings.get(key)):
            found.append((f"{key} is no {kind}", settings.get(key)))
        own = settings.get(patterns) or {}
        if not isinstance(own, dict):
            found.append((f"{patterns} is no dictionary", own))
            continue
        for pattern, value in own.items():
            if not fits(value):
                found.append((f"{patterns} has no {kind} for {pattern}", value))
            try:
                re.compile(pattern)
            except re.error as error:
                found.append((f"{patterns} has a key that is no regular expression ({error})", pattern))
    return found


def _by_leaf(values: Mapping[str, Any], factors: Factors) -> dict[str, Any]:
    """Patterns by leaf name where every module of that leaf has the same value, else by full path."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        leaf = name.rpartition(".")[2]
        alike = {values.get(other) for other in factors if other.rpartition(".")[2] == leaf} == {value}
        found[leaf if alike else name] = value
    return found
