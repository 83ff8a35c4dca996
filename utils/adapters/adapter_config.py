"""Ranks, scales and targets of `adapter_config.json`: written so that every tool reads the same, and found again."""

from __future__ import annotations

import functools
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.adapters.factors import Factors
from utils.exceptions import ArtefactError, Problem
from utils.models.base_model import BaseModel
from utils.models.structure import linear_modules
from utils.models.weights import tensor_names
from utils.models.weights.tensor_names import layer_of

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

WEIGHTS = "adapter_model.safetensors"
PATIENCE_S = 30.0
CONFIG = "adapter_config.json"


class _EndlessError(Exception):
    """An expression that was stopped."""


BAD_PATTERN = (re.error, OverflowError, RecursionError, _EndlessError)


def config_for(factors: Factors, model: torch.nn.Module) -> LoraConfig:
    """The PEFT configuration with which any tool gives these factors their ranks and scales (alpha = rank * scale).

    Leaf names where they find exactly these modules of `model` (a bare one), else full paths. What PEFT would not find
    by a module's name goes by its parameter's: routers, and dense layers that peft 0.21 takes for fused experts.
    """
    fused = {name: f for name, f in factors.items() if f.is_experts}
    others = _by_parameter(factors, model)
    plain = {name: f for name, f in factors.items() if name not in fused and name not in others}
    config = _config(
        factors,
        others,
        target_modules=_exact_targets(plain, model) if plain else [],
        target_parameters=[*shortest_targets(fused, keep=3), *(f"{name}.weight" for name in others)] or None,
        short=True,
    )
    transposed = tensor_names.transposed_parameters(model)
    config.fan_in_fan_out = any(f"{name}.weight" in transposed for name in plain)
    return config


def config_by_paths(factors: Factors, model: torch.nn.Module) -> LoraConfig:
    """As `config_for`, by full paths alone: what is put on `model` here, where names are taken exactly."""
    fused = [name for name, f in factors.items() if f.is_experts]
    others = [n for n in factors if n not in fused and not linear_modules.is_linear(model.get_submodule(n))]
    return _config(
        factors,
        others,
        target_modules=[name for name in factors if name not in fused and name not in others],
        target_parameters=[*fused, *(f"{name}.weight" for name in others)] or None,
        short=False,
    )


def _config(
    factors: Factors,
    others: Sequence[str],
    *,
    target_modules: list[str],
    target_parameters: list[str] | None,
    short: bool,
) -> LoraConfig:
    from peft import LoraConfig

    kinds = [(f.rank, f.scale) for f in factors.values()]
    common = max(set(kinds), key=lambda kind: (kinds.count(kind), kind))
    exceptions = {name: f for name, f in factors.items() if (f.rank, f.scale) != common}

    def patterns(values: dict[str, Any]) -> dict[str, Any]:
        keyed = {name: value for name, value in values.items() if name not in others}
        return (_by_leaf(keyed, factors) if short else keyed) | {
            f"{name}.weight": values[name] for name in others if name in values
        }

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=common[0],
        lora_alpha=tidy(common[0] * common[1]),
        rank_pattern=patterns({name: f.rank for name, f in exceptions.items()}),
        alpha_pattern=patterns({name: tidy(f.rank * f.scale) for name, f in exceptions.items()}),
        target_modules=target_modules,
        target_parameters=target_parameters,
        use_rslora=False,
        inference_mode=True,
    )


def _by_parameter(factors: Factors, model: torch.nn.Module) -> list[str]:
    """Modules that PEFT finds by their parameter alone: no linear ones, and names it takes for fused experts."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    @functools.cache
    def is_renamed(leaf: str) -> bool:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it misses the others that it would fuse with this one
            return True
        return leaf not in (config.target_modules or ())

    return [
        name
        for name, f in factors.items()
        if not f.is_experts
        and (is_renamed(name.rpartition(".")[2]) or not linear_modules.is_linear(model.get_submodule(name)))
    ]


def _exact_targets(factors: Factors, model: torch.nn.Module) -> list[str]:
    """Leaf names when PEFT finds exactly these modules by them, else full paths."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    short = shortest_targets(factors)
    rule = LoraConfig(target_modules=short)
    matches = {name for name, _ in model.named_modules() if name and check_target_module_exists(rule, name)}
    return short if matches == set(factors) else sorted(factors)


def targeted(settings: dict[str, Any], directory: Path, base: BaseModel) -> set[str]:
    """Names that PEFT adapts by these settings: modules by its own rule, parameters by the end of their name."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    parameters = settings.get("target_parameters") or []
    names = set()
    places = tensor_names.places(base.directory, tensor_names.tensor_shapes(base.directory))
    try:
        rule = LoraConfig(**{key: settings.get(key) for key in keys})
        with _in_time():
            for name, place in places.items():
                # an expert's own matrix goes by its name on disk, as it does in the adapter's keys
                module = (place.parameter if place.expert is None else name).removesuffix(".weight")
                # experts that are fused on disk are a parameter, and no module
                is_module = place.expert is not None or place.parameter.endswith(".weight")
                by_rule = is_module and bool(rule.target_modules) and bool(check_target_module_exists(rule, module))
                if by_rule or any(f".{place.parameter}".endswith(f".{parameter}") for parameter in parameters):
                    names.add(place.parameter.removesuffix(".weight"))
    except (TypeError, ValueError, *BAD_PATTERN) as error:
        what = f"{directory}: target_modules and what restricts them cannot be read ({error})"
        raise ArtefactError(Problem(what, {key: settings[key] for key in keys if settings.get(key)})) from error
    return names


def scale_of(module: str, rank: int, settings: dict[str, Any]) -> float:
    alpha = float(by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"]))
    return alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank


def by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: a key matches the end of the module's path. Raises ArtefactError for a key that never ends."""
    for key, value in (patterns or {}).items():
        try:
            with _in_time():
                matched = re.match(rf"(.*\.)?({key})$", module)
        except BAD_PATTERN as error:
            raise ArtefactError(Problem(f"a pattern of {CONFIG} cannot be matched ({error})", key)) from error
        if matched:
            return value
    return default


@contextmanager
def _in_time() -> Iterator[None]:
    """An expression such as (a+)+ takes longer than the universe on some names; `re` lets a signal stop it."""

    def stop(*_: object) -> None:
        raise _EndlessError(f"it took longer than {PATIENCE_S:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tidy(number: float) -> int | float:
    return int(number) if float(number).is_integer() else float(number)


def shortest_targets(factors: Factors, keep: int = 1) -> list[str]:
    """The last `keep` parts of the names when all of them are adapted in the same layers; else full paths."""
    layers: dict[str, set[int | None]] = {}
    for name in factors:
        layers.setdefault(".".join(name.split(".")[-keep:]), set()).add(layer_of(name))
    count = 1 + max((layer for numbers in layers.values() for layer in numbers if layer is not None), default=0)
    everywhere = all(numbers == set(range(count)) for numbers in layers.values())
    return sorted(layers) if everywhere else sorted(factors)


def _by_leaf(values: Mapping[str, Any], factors: Factors) -> dict[str, Any]:
    """Patterns by leaf name where every module of that leaf has the same value, else by full path."""
    patterns: dict[str, Any] = {}
    for name, value in values.items():
        leaf = name.rpartition(".")[2]
        alike = {values.get(other) for other in factors if other.rpartition(".")[2] == leaf} == {value}
        patterns[leaf if alike else name] = value
    return patterns
