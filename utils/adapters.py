"""Adapters on disk and on the model: plain PEFT directories, loaded strictly, activated explicitly.

What PEFT leaves to chance is asserted here: every expected key is loaded, no B is all zero, everything is finite, the
active list is what was asked for, and nothing is trainable but the adapter that should be.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import LoraSection
from utils import files
from utils.base_model import BaseModel
from utils.composition import Factors, ModuleFactors, zero_modules
from utils.exceptions import ArtefactError, Problem

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
# what would change the delta in a way that W + s B A does not express
_UNSUPPORTED = {
    "use_dora": "DoRA rescales the whole weight, so two such adapters do not add up",
    "lora_bias": "the bias of B is not part of a low-rank delta",
    "modules_to_save": "full copies of modules cannot be added to another adapter",
    "use_qalora": "QA-LoRA pools its input",
    "target_parameters": "adapters on fused experts are not supported",
    "layer_replication": "replicated layers are another architecture",
}
_UNCONVERTED = ("pissa", "olora", "corda", "loftq")


def attach(model: PreTrainedModel | PeftModel, name: str, lora: LoraSection) -> PeftModel:
    """Add a fresh adapter (B = 0, so the model's output does not change) in float32."""
    from peft import LoraConfig, PeftModel, get_peft_model

    peft_config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        target_modules=list(lora.target_modules),
    )
    missing = [t for t in lora.target_modules if not any(n.rpartition(".")[2] == t for n, _ in model.named_modules())]
    if missing:
        raise ArtefactError(
            Problem(
                f"lora.target_modules {', '.join(missing)}: the base model has no such module",
                fix="see its config.json",
            )
        )
    if isinstance(model, PeftModel):
        model.add_adapter(name, peft_config)
        return model
    return get_peft_model(model, peft_config, adapter_name=name)


def add(model: PreTrainedModel | PeftModel, name: str, factors: Factors) -> PeftModel:
    """Put factors on the model as an adapter called `name`, with their scales; its effect is exactly their deltas."""
    from peft import PeftModel, get_peft_model

    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    shapes = {path: tuple(module.weight.shape) for path, module in inner.named_modules() if hasattr(module, "weight")}
    odd = [name for name, f in factors.items() if shapes.get(name) != (f.b_Or.shape[0], f.a_rI.shape[1])][:5]
    if odd:
        raise ArtefactError(
            Problem("the adapter does not fit this base model", odd, "it was made for another architecture")
        )
    peft_config = config_for(factors)
    peft_config.target_modules = set(factors)  # paths: a leaf name would also take layers that the adapter leaves out
    if isinstance(model, PeftModel):
        if name in model.peft_config:  # PEFT returns without doing anything for a name that exists
            model.delete_adapter(name)
        model.add_adapter(name, peft_config)
    else:
        model = get_peft_model(model, peft_config, adapter_name=name)
    layers = lora_layers(model, name)
    if set(layers) != set(factors):
        raise ArtefactError(Problem("PEFT adapted other modules than asked", sorted(set(layers) ^ set(factors))[:5]))
    with torch.no_grad():
        for module, layer in layers.items():
            layer.lora_A[name].weight.copy_(factors[module].a_rI)
            layer.lora_B[name].weight.copy_(factors[module].b_Or)
            layer.scaling[name] = factors[module].scale
    return model


def activate(model: PeftModel, names: Sequence[str], *, trainable: str = "") -> None:
    """Make exactly these adapters active and exactly one (or none) trainable.

    `base_model.set_adapter` is the form that takes several; it makes all of them trainable, which is undone here.
    """
    if names:
        model.base_model.enable_adapter_layers()
        model.base_model.set_adapter(list(names))
    else:
        model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(trainable) and "lora_" in name and f".{trainable}." in name)
    if names and list(model.active_adapters) != list(names):
        raise ArtefactError(Problem(f"active adapters are {model.active_adapters}, not {list(names)}"))


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter of everything that is trained, in a fixed order."""
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def lora_layers(model: PeftModel, name: str) -> dict[str, Any]:
    """Module path in the base model -> PEFT layer that carries the adapter."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            found[path] = module
    return found


def factors_of(model: PeftModel, name: str) -> dict[str, ModuleFactors]:
    """A detached float32 copy of an adapter on the model."""
    return {
        path: ModuleFactors(
            layer.lora_A[name].weight.detach().float().cpu().clone(),
            layer.lora_B[name].weight.detach().float().cpu().clone(),
            float(layer.scaling[name]),
        )
        for path, layer in lora_layers(model, name).items()
    }


def config_for(factors: Factors) -> LoraConfig:
    """The PEFT configuration that gives these factors their ranks and scales (alpha = rank * scale)."""
    from peft import LoraConfig

    ranks = {name: f.rank for name, f in factors.items()}
    common = max(set(ranks.values()), key=lambda r: (list(ranks.values()).count(r), r))
    scale = next(f.scale for name, f in factors.items() if f.rank == common)
    odd = {name: f for name, f in factors.items() if f.rank != common or f.scale != scale}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=common,
        lora_alpha=_tidy(common * scale),
        rank_pattern={name: f.rank for name, f in odd.items()},
        alpha_pattern={name: _tidy(f.rank * f.scale) for name, f in odd.items()},
        target_modules=_targets(factors),
        use_rslora=False,
        inference_mode=True,
    )


def save(directory: Path, factors: Factors, base: BaseModel, *, lora: LoraSection | None = None) -> None:
    """Write a plain PEFT directory (`adapter_config.json`, `adapter_model.safetensors`), loadable by any other tool."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    peft_config = config_for(factors)
    peft_config.base_model_name_or_path = base.reference
    peft_config.revision = base.revision or None
    if lora is not None:
        peft_config.lora_dropout = lora.dropout
        if lora.use_rslora:
            peft_config.use_rslora, peft_config.lora_alpha = True, _tidy(lora.alpha)
    save_file(to_state(factors), directory / WEIGHTS, metadata={"format": "pt"})
    peft_config.save_pretrained(directory)
    written = files.read_json(directory / CONFIG)
    # PEFT keeps target_modules in a set, whose order changes from process to process: equal adapters, unequal bytes
    files.write_json(directory / CONFIG, {**written, "target_modules": sorted(written["target_modules"])})


def to_state(factors: Factors) -> dict[str, torch.Tensor]:
    """PEFT's names on disk, the adapter's own name stripped."""
    state = {}
    for module, f in factors.items():
        state[f"{_PREFIX}{module}.lora_A.weight"] = f.a_rI.contiguous()
        state[f"{_PREFIX}{module}.lora_B.weight"] = f.b_Or.contiguous()
    return state


def load(directory: Path) -> dict[str, ModuleFactors]:
    """Factors of a PEFT directory made by this or another tool.

    Raises ArtefactError for what is missing, damaged, all zero, not finite, or not expressible as scale * B @ A.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
        have = sorted(p.name for p in directory.glob("*")) if directory.is_dir() else "no such directory"
        raise ArtefactError(
            Problem(
                f"{directory} is not a PEFT adapter: it needs {CONFIG} and {WEIGHTS}", have, "give the adapter/ folder"
            )
        )
    settings = files.read_json(directory / CONFIG)
    problems = [Problem(f"{directory}: {k} is set: {why}") for k, why in _UNSUPPORTED.items() if settings.get(k)]
    if settings.get("peft_type") != "LORA":
        problems.append(Problem(f"{directory}: peft_type is not LORA", settings.get("peft_type")))
    if str(settings.get("init_lora_weights")).split("_")[0].lower() in _UNCONVERTED:
        fix = "save it with path_initial_model_for_weight_conversion"
        problems.append(
            Problem(f"{directory}: its initialisation changed the base", settings["init_lora_weights"], fix)
        )
    if problems:
        raise ArtefactError(problems)
    try:
        state = load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise ArtefactError(
            Problem(f"{directory / WEIGHTS} is damaged ({error})", fix="restore it from a copy")
        ) from error
    return _factors(state, settings, directory)


def _factors(state: dict[str, torch.Tensor], settings: dict[str, Any], directory: Path) -> dict[str, ModuleFactors]:
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    problems = []
    for key, tensor in state.items():
        matched = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if not matched:
            problems.append(Problem(f"{directory}: unknown tensor", key))
        elif not torch.isfinite(tensor).all():
            problems.append(Problem(f"{directory}: {key} holds NaN or infinity"))
        else:
            pairs.setdefault(matched[1], {})[matched[2]] = tensor
    problems += [Problem(f"{directory}: {module} has A or B but not both") for module, p in pairs.items() if len(p) < 2]
    if problems or not pairs:
        raise ArtefactError(problems[:10] or [Problem(f"{directory} holds no LoRA tensors")])
    factors = {m: ModuleFactors(p["A"], p["B"], _scale(m, int(p["A"].shape[0]), settings)) for m, p in pairs.items()}
    for module, f in factors.items():
        expected = _pattern(settings.get("rank_pattern"), module, settings["r"])
        if f.b_Or.shape[1] != f.rank or f.rank != expected:
            problems.append(Problem(f"{directory}: {module} has rank {f.rank}, its config says {expected}"))
    if len(zero_modules(factors)) == len(factors):
        problems.append(Problem(f"every B in {directory} is zero", fix="it was never trained, or saved wrongly"))
    if problems:
        raise ArtefactError(problems[:10])
    return factors


def _scale(module: str, rank: int, settings: dict[str, Any]) -> float:
    alpha = float(_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"]))
    return alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: a key matches the end of the module's path."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _targets(factors: Factors) -> list[str]:
    """Leaf names, which every tool understands, when all of them are adapted in the same layers; else full paths."""
    by_leaf: dict[str, set[str]] = {}
    for name in factors:
        parent, _, leaf = name.rpartition(".")
        by_leaf.setdefault(leaf, set()).add(re.sub(r"\.\d+\.", ".*.", parent))
    layers = {
        leaf: {m[1] for n in factors if n.endswith("." + leaf) and (m := re.search(r"\.(\d+)\.", n))}
        for leaf in by_leaf
    }
    same_layers = len({frozenset(found) for found in layers.values()}) == 1
    return sorted(by_leaf) if same_layers else sorted(factors)


def _tidy(number: float) -> int | float:
    return int(number) if float(number).is_integer() else float(number)
