"""The base model loaded frozen, as its files say, on this process's device. Only safetensors, and never remote code."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch

from config import AUTO, BaseModelSection
from utils.exceptions import ArtefactError, Problem
from utils.logger import event, quiet_transformers
from utils.models import devices, quantization
from utils.models.architectures import registry
from utils.models.base_model import BaseModel
from utils.models.directory_checks import readable
from utils.models.model_shapes import PLAIN
from utils.models.structure import load_checks, model_class
from utils.models.weights import safetensors_io
from utils.models.weights.fp8 import is_fp8

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    base: BaseModel,
    section: BaseModelSection,
    *,
    dtype: torch.dtype | None = None,
    native_fp8: bool = False,
    place: torch.device | None = None,
) -> PreTrainedModel:
    """The frozen base model on this process's device, in eval mode, quantized if that is asked for.

    `dtype` overrides the section's. An FP8 checkpoint is de-quantised unless `native_fp8` says that it stays FP8
    (utils/planning/memory/native_fp8.py). `place` is another device; on "meta" it is the same model without values,
    and the weights are not read. Raises ArtefactError for files that do not load, or not as they say.
    """
    model_config = model_class.settings_of(base.directory)
    kind = model_class.class_of(model_config, base.directory)
    extra: dict[str, Any] = {}
    in_bits = base.quantization != PLAIN
    if in_bits:
        bits = quantization.settings(base.quantization, dtype or devices.compute_dtype(section.dtype), base.directory)
        extra |= {"quantization_config": bits, "device_map": {"": devices.device()}}
    if is_fp8(model_config.to_dict()) and not native_fp8:
        from transformers import FineGrainedFP8Config

        event("the checkpoint is FP8: de-quantising it while loading")
        extra["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    if float32 := registry.of(model_config.model_type).float32:
        names = {name.removesuffix(".weight") for name in float32}
        kind._keep_in_fp32_modules_strict = names
    with quiet_transformers(), readable(base.directory):
        how = {
            "output_loading_info": True,
            "dtype": dtype or devices.compute_dtype(section.dtype),
            "attn_implementation": None if section.attention == AUTO else section.attention,
            "trust_remote_code": False,
            "use_safetensors": True,
            "local_files_only": True,
            **extra,
        }
        if place is not None and place.type == "meta":
            model, loading_info = _without_values(base, **how)
        else:
            model, loading_info = kind.from_pretrained(base.directory, **how)
    if lost := sorted(loading_info["missing_keys"]):
        # transformers makes them up at random, with a warning
        what = f"the files of {base.directory} lack {len(lost)} tensors that its config.json asks for"
        raise ArtefactError(Problem(what, lost[:3], "fetch the model again"))
    if extra and not in_bits and (dtype or devices.compute_dtype(section.dtype)) == torch.float32:
        model = model.float()  # transformers 5.23 leaves what is not quantised in an FP8 checkpoint in its own dtype
    model.requires_grad_(False)
    if problems := load_checks.problems(model, base.directory, native_fp8=native_fp8):
        raise ArtefactError(problems)
    route_outside_autocast(model)
    if in_bits:
        quantization.check_loaded(model, base.directory)
        quantization.keep_differentiable(model)
        return model.eval()
    return model.to(place or devices.device()).eval()


def attention_problems(kind: type[PreTrainedModel], attention: str) -> list[Problem]:
    """Why a model of this class cannot compute with this `base.attention`; empty when it can."""
    can = {"sdpa": kind._supports_sdpa, "flash": kind._supports_flash_attn}.get(attention.partition("_")[0], True)
    what = f"base.attention {attention}: {kind.__name__} does not support it"
    return [] if can else [Problem(what, fix="--base.attention auto")]


def attention_of(base: BaseModel, section: BaseModelSection) -> str:
    """The attention implementation that the model is loaded with; auto by its name."""
    if section.attention != AUTO:
        return section.attention
    return str(model_class.outline(base.directory).config.get_text_config()._attn_implementation)


def skeleton(base: BaseModel) -> PreTrainedModel:
    """The model's modules on the meta device, from its config.json alone."""
    with readable(base.directory):
        return model_class.skeleton(base.directory)


def _without_values(base: BaseModel, **how: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What `from_pretrained` would give, on the meta device: only the headers of the files are read.

    It goes through the same loading, because that fuses experts, keeps routers in float32 and de-quantises.
    """
    settings = model_class.settings_of(base.directory)
    headers = safetensors_io.Checkpoint(base.directory).headers.values()
    state = {
        name: torch.empty(tensor.shape, dtype=safetensors_io.DTYPES[tensor.dtype], device="meta")
        for header in headers
        for name, tensor in header.tensors.items()
    }
    architecture = type(skeleton(base))
    return architecture.from_pretrained(None, config=settings, state_dict=state, device_map={"": "meta"}, **how)


def route_outside_autocast(model: PreTrainedModel) -> None:
    """Routers compute in the dtype of their weights: autocast would take a float32 router back to bfloat16."""
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            # bound to the module: a copy of the model gets a method of its own routers
            module.forward = types.MethodType(_outside_autocast, module)


def _outside_autocast(router: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
    with torch.autocast(devices.device().type, enabled=False):
        return type(router).forward(router, *arguments, **named)
