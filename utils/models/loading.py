"""The base model loaded frozen, as its files say, on this process's device. Only safetensors, and never remote code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from config import BaseModelSection
from utils.exceptions import ArtefactError, Problem
from utils.logger import event, quiet_transformers
from utils.models import devices, load_checks, quantization
from utils.models.architectures import registry
from utils.models.base_model import BaseModel
from utils.models.directory_checks import readable
from utils.models.model_shapes import PLAIN
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
    """The frozen base model on this process's device, in eval mode, in its bits where it is quantised.

    `dtype` overrides the section's. An FP8 checkpoint is de-quantised unless `native_fp8` says that it stays FP8
    (utils/planning/native_fp8.py). `place` is another device; on "meta" it is the same model without values,
    and the weights are not read. Raises ArtefactError for files that do not load, or not as they say.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    with readable(base.directory):
        model_config = AutoConfig.from_pretrained(base.directory, trust_remote_code=False, local_files_only=True)
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
        MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]._keep_in_fp32_modules_strict = names
    with quiet_transformers(), readable(base.directory):
        how = {
            "output_loading_info": True,
            "dtype": dtype or devices.compute_dtype(section.dtype),
            "attn_implementation": section.attention,
            "trust_remote_code": False,
            "use_safetensors": True,
            "local_files_only": True,
            **extra,
        }
        if place is not None and place.type == "meta":
            model, found = _without_values(base, **how)
        else:
            model, found = AutoModelForCausalLM.from_pretrained(base.directory, **how)
    if lost := sorted(found["missing_keys"]):
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


def skeleton(base: BaseModel) -> PreTrainedModel:
    """The model's modules on the meta device, from its config.json alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with readable(base.directory), torch.device("meta"):
        settings = AutoConfig.from_pretrained(base.directory, trust_remote_code=False, local_files_only=True)
        return AutoModelForCausalLM.from_config(settings, trust_remote_code=False)


def _without_values(base: BaseModel, **how: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What `from_pretrained` would give, on the meta device: only the headers of the files are read.

    It goes through the same loading, because that fuses experts, keeps routers in float32 and de-quantises.
    """
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(base.directory, trust_remote_code=False, local_files_only=True)
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
            module.forward = torch.autocast(devices.device().type, enabled=False)(module.forward)
