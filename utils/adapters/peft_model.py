"""Adapters on the model, as PEFT layers: attached for training, put on from factors, activated explicitly.

What PEFT leaves to chance is asserted here: the modules adapted are those asked for, the active list is what was asked
for, and nothing is trainable but the adapter that should be.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from config import LoraSection
from utils.adapters import adapter_config, fused_experts
from utils.adapters.factors import Factors, ModuleFactors
from utils.exceptions import ArtefactError, Problem, VerificationError
from utils.models.parallel import expert_parallel, sharding
from utils.models.structure import linear_modules
from utils.models.weights import tensor_names

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def attach(model: PreTrainedModel | PeftModel, name: str, lora: LoraSection) -> PeftModel:
    """Add a fresh adapter (B = 0, so the model's output does not change) in float32.

    Raises ArtefactError when the model lacks what is to be adapted, or PEFT adapted anything else: on a mixture of
    experts it takes some names for the router or the experts too.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = linear_modules.named(inner, lora.target_modules)
    problems = linear_modules.problems(inner, lora.target_modules)
    fused = tensor_names.fused_parameters(inner) if lora.experts else []
    if lora.experts and not fused:
        problems.append(Problem("lora.experts: the base model has no fused experts", fix="leave out --*.lora.experts"))
    problems += _on_fp8(inner, fused)
    if problems:
        raise ArtefactError(problems)
    peft_config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        # full paths, as `add` writes them: PEFT compares the spellings of adapters
        target_modules=modules,
        target_parameters=fused or None,
    )
    with _exact_names():
        if isinstance(model, PeftModel):
            model.add_adapter(name, peft_config)
        else:
            model = get_peft_model(model, peft_config, adapter_name=name)
    if unlike := sorted(set(lora_layers(model, name)) ^ {*modules, *fused}):
        raise ArtefactError(Problem("PEFT adapted other modules than asked", unlike[:5]))
    return model


def add(model: PreTrainedModel | PeftModel, name: str, factors: Factors) -> PeftModel:
    """Put factors on the model as an adapter called `name`, with their scales; its effect is exactly their deltas."""
    from peft import PeftModel, get_peft_model

    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    refuse_misfits(inner, factors)
    if problems := _on_fp8(inner, [name for name, f in factors.items() if f.is_experts]):
        raise ArtefactError(problems)
    peft_config = adapter_config.config_by_paths(factors, inner)
    with _exact_names():
        # peft 0.21 says that rank patterns of fused parameters are ignored, and applies them
        warnings.filterwarnings("ignore", message=".*did not match.*")
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
            lora_A, lora_B = fused_experts.to_peft(factors[module])
            layer.lora_A[name].weight.copy_(lora_A)
            layer.lora_B[name].weight.copy_(lora_B)
            layer.scaling[name] = factors[module].scale
    return model


def start_from(model: PeftModel, name: str, factors: Factors) -> None:
    """Give the fresh adapter `name` these factors; B takes up the difference where the scales differ.

    Raises ArtefactError unless the adapter has the same modules and ranks.
    """
    layers = lora_layers(model, name)
    problems = []
    if differing := sorted(set(layers) ^ set(factors)):
        what = f"the adapter to start from adapts other modules than this run: {len(differing)} differ"
        leaves = ",".join(sorted({module.rpartition(".")[2] for module in factors}))
        fix = f"give the run the same modules: --{name}.lora.target_modules {leaves} (and --{name}.lora.experts)"
        problems.append(Problem(what, differing[:3], fix))
    ranks = {factors[module].rank for module in layers if module in factors}
    own = {int(layer.r[name]) for layer in layers.values()}
    if ranks - own:
        what = f"the adapter to start from has rank {', '.join(map(str, sorted(ranks)))}, this run {own.pop()}"
        problems.append(Problem(what, fix=f"give the run the same: --{name}.lora.rank {max(ranks)}"))
    if problems:
        raise ArtefactError(problems)
    with torch.no_grad():
        for module, layer in layers.items():
            lora_A, lora_B = fused_experts.to_peft(factors[module])
            layer.lora_A[name].weight.copy_(lora_A)
            layer.lora_B[name].weight.copy_(lora_B * (factors[module].scale / layer.scaling[name]))


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


@contextmanager
def switched(model: PeftModel, names: Sequence[str]) -> Iterator[None]:
    """Meanwhile exactly these adapters, or none, take part in the forward pass; which one is trained stays.

    `activate` would also change what takes a gradient, which an optimiser and a sharded model must not see change.
    """
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = list(names)
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def refuse_other_state(model: PeftModel, active: Sequence[str], *, trainable: str) -> None:
    """Raises VerificationError unless exactly these adapters take part in the forward pass and exactly one is trained.

    Asked of the layers themselves: PEFT's `set_adapter` makes every adapter it switches on trainable, a trainer's
    resume switches on the first one only, and merging one takes the others out, each without an error.
    """
    from peft.tuners.lora import LoraLayer

    problems = []
    carried = {name for layer in model.modules() if isinstance(layer, LoraLayer) for name in layer.lora_A}
    if missing := sorted({*active, trainable} - carried):
        problems.append(Problem(f"the model does not carry the adapter {' and '.join(missing)}", sorted(carried)))
    wrong: dict[str, int] = {}
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            on = set() if layer.disable_adapters else set(layer.active_adapters) & set(layer.lora_A)
            for name in on ^ (set(active) & set(layer.lora_A)):
                state = f"{name} is {'on' if name in on else 'off'} and should not be"
                wrong[state] = wrong.get(state, 0) + 1
            for name in layer.merged_adapters:
                wrong[f"{name} is merged into the weights"] = wrong.get(f"{name} is merged into the weights", 0) + 1
    problems += [Problem(f"adapter {state}, in {count} modules") for state, count in wrong.items()]
    trained = set(trainable_parameters(model))
    own = {name for name, _ in model.named_parameters() if "lora_" in name and f".{trainable}." in name}
    if others := sorted(trained - own):
        problems.append(Problem(f"{len(others)} tensors are trained beside the {trainable} adapter", others[:3]))
    if frozen := sorted(own - trained):
        problems.append(Problem(f"{len(frozen)} tensors of the {trainable} adapter are not trained", frozen[:3]))
    if problems:
        raise VerificationError(problems)


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter of everything that is trained, in a fixed order."""
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}


def lora_layers(model: PeftModel, name: str) -> dict[str, Any]:
    """Module path (fused parameters: parameter path) in the base model -> PEFT layer that carries the adapter."""
    from peft.tuners.lora import LoraLayer

    layers = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            parameter = getattr(module, "parameter_name", "weight")
            own = path.replace(".base_layer", "")
            layers[own if parameter == "weight" else f"{own}.{parameter}"] = module
    return layers


def factors_of(model: PeftModel, name: str) -> dict[str, ModuleFactors]:
    """A detached float32 copy of an adapter on the model; of a sharded one every rank has to ask for it."""
    factors = {}
    for path, layer in lora_layers(model, name).items():
        sides = (sharding.whole(side[name].weight) for side in (layer.lora_A, layer.lora_B))
        lora_A, lora_B = (side.detach().float().cpu().clone() for side in sides)
        scale = float(layer.scaling[name])
        is_experts = getattr(layer, "num_experts", 1) > 1
        factors[path] = (
            fused_experts.from_peft(lora_A, lora_B, layer.r[name], scale)
            if is_experts
            else ModuleFactors(lora_A, lora_B, scale)
        )
    return factors


@contextmanager
def _exact_names() -> Iterator[None]:
    """PEFT adapts what is named and nothing else; what it would rename is read off `adapter_config` instead.

    peft 0.21 takes the full path of a dense layer or a shared expert for the fused experts of its architecture.
    """
    from peft.utils import transformers_weight_conversion

    usual = transformers_weight_conversion.convert_peft_config_for_transformers
    transformers_weight_conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # it sees Conv1D for itself
            yield
    finally:
        transformers_weight_conversion.convert_peft_config_for_transformers = usual


def _on_fp8(model: torch.nn.Module, fused: Sequence[str]) -> list[Problem]:
    """PEFT adds an update to FP8 values without their block scales, and gives it no gradient: neither with an error."""
    dtypes = {name.replace(".base_layer", ""): parameter.dtype for name, parameter in model.named_parameters()}
    codes = [name for name in fused if dtypes[name] == torch.float8_e4m3fn]
    fix = "--base.fp8 dequantise"
    return [Problem("an adapter on FP8 experts would be silently wrong", codes[:3], fix)] if codes else []


def refuse_misfits(model: torch.nn.Module, factors: Factors) -> None:
    """Raises ArtefactError when the model has no weight of the right shape for an update."""
    lying = tensor_names.transposed_parameters(model)
    named = {
        name: (p.mT if name.replace(".base_layer", "") in lying else p).shape for name, p in model.named_parameters()
    }
    shared = expert_parallel.whole_shapes(model)
    named |= {
        name: torch.Size((*shape[:1], *reversed(shape[1:]))) if name.replace(".base_layer", "") in lying else shape
        for name, shape in shared.items()
    }
    shapes = {name.removesuffix(".weight"): tuple(shape) for name, shape in named.items()}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    shapes |= {name: (m.out_features, m.in_features) for name, m in linear.items()}  # in 4 bits a weight is packed
    shapes = {name.replace(".base_layer", ""): shape for name, shape in shapes.items()}
    misfits = [name for name, f in factors.items() if shapes.get(name) != f.shape][:5]
    if misfits:
        raise ArtefactError(
            Problem("the adapter does not fit this base model", misfits, "it was made for another architecture")
        )
