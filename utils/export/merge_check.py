"""Is a merged directory what base + adapter computes? Asked of a fresh process that loads it without peft.

The directory is reloaded in a process of its own, which gives logits. Here the base and the adapter, put on it by
peft, give the composed logits. Then peft merges the adapter in float32, and each weight, rounded as the files' dtypes
say, is compared with the files: a wrong tensor is seen at its full size, however little it moves the logits, and
rounding is no excuse for it. With the files' weights in place, the logits are compared with the reloaded ones.

A model that is larger than memory is checked on some of its layers, put together into small models of both sides.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from config import BaseModelSection
from utils.adapters import peft_model
from utils.adapters.factors import Factors
from utils.exceptions import OutOfMemory, Problem, VerificationError, is_out_of_memory
from utils.logger import event
from utils.models.base_model import BaseModel
from utils.models.float32_model import available, frugal_loading, in_float32, probe
from utils.models.weights import fp8, layer_sample, safetensors_io, tensor_names
from utils.models.weights.safetensors_io import Checkpoint

# as a share of the largest logit; float32 sums in another order were measured to differ by 6e-6
LOGIT_TOLERANCE = 1e-4
# as a share of the sum: libraries add float32 in an order of their own (peft's on AMD: 3e-8 from the merge's)
SUM_TOLERANCE = 1e-6
# of the adapters' effect, root mean square over the logits. A right merge may lose it to rounding, so this asks not if
# the files are right but if they are of use: 16 bits took 2% at MiniMax-M2's width; from half on noise takes over
LARGEST_ROUNDING = 0.5
SCRATCH = ".selfcheck"
RELOAD = Path(__file__).with_name("merged_logits.py")


@dataclass(frozen=True)
class _Subject:
    """What is compared: the base with the factors, and the directory that is reloaded (small models of `layers`)."""

    base: BaseModel
    factors: Factors
    reloaded: Path
    files: Checkpoint
    layers: list[int]


def merged_equals_composed(
    base: BaseModel,
    factors: Factors,
    directory: Path,
    section: BaseModelSection,
    *,
    available_bytes: int | None = None,
) -> dict[str, Any]:
    """What was compared, and the differences found; `available_bytes` of memory, by default what is free.

    Raises VerificationError when the directory is not base + factors or does not load, and ArtefactError when there is
    too little memory to find out.
    """
    scratch = directory / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        subject = _subject(base, factors, directory, scratch, available_bytes)
        ids_BT = probe(subject.files)
        checks = _compare(subject, section, ids_BT, _reloaded(subject.reloaded, ids_BT, scratch))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    event("merged model verified", layers=len(subject.layers), **checks)
    return {"checked_layers": subject.layers, **checks}


def refuse_too_large(checkpoint: Checkpoint, factors: Factors) -> None:
    """Raises ArtefactError when a merge of this base could not be checked here; called before it is written."""
    layer_sample.choose(checkpoint, factors, available())


def _subject(
    base: BaseModel, factors: Factors, directory: Path, scratch: Path, available_bytes: int | None
) -> _Subject:
    before, after = Checkpoint(base.directory), Checkpoint(directory)
    layers = layer_sample.choose(before, factors, available() if available_bytes is None else available_bytes)
    count = layer_sample.layer_count(before)
    if len(layers) == count and not layer_sample.has_partial_blocks(before):
        return _Subject(base, factors, directory, after, layers)
    if len(layers) < count:
        event("the model is larger than memory: some of its layers are checked", checked_layers=layers, of=count)
    layer_sample.write(before, layers, scratch / "base")
    layer_sample.write(after, layers, scratch / "merged")
    sampled = layer_sample.factors_of(factors, layers)
    return _Subject(replace(base, directory=scratch / "base"), sampled, scratch / "merged", after, layers)


def _reloaded(directory: Path, ids_BT: torch.Tensor, scratch: Path) -> torch.Tensor:
    """Logits of a directory, from a process that knows only transformers."""
    from safetensors.torch import load_file, save_file

    probe_path, out = scratch / "probe.safetensors", scratch / "logits.safetensors"
    save_file({"input_ids": ids_BT}, probe_path)
    event("reloading the merged model in a fresh process")
    command = [sys.executable, "-P", str(RELOAD), str(directory), str(probe_path), str(out)]
    with frugal_loading():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    last_line = "".join(done.stderr.strip().splitlines()[-1:])
    reason = f"it was ended by signal {-done.returncode}" if done.returncode < 0 else last_line
    if done.returncode < 0 or is_out_of_memory(RuntimeError(last_line)) or "MemoryError" in last_line:
        what = f"no memory to reload the merged model in a fresh process ({reason}); the written files are kept"
        raise OutOfMemory(Problem(what, fix="run the same command again where there is more memory"))
    if done.returncode:
        raise VerificationError(Problem(f"the merged model does not load: {last_line}"))
    return load_file(out)["logits"]


@torch.no_grad()
def _compare(
    subject: _Subject, section: BaseModelSection, ids_BT: torch.Tensor, merged: torch.Tensor
) -> dict[str, Any]:
    model = in_float32(subject.base, section)

    def logits(model: torch.nn.Module) -> torch.Tensor:
        return model(ids_BT.to(model.device), use_cache=False).logits.float().cpu()

    plain = composed = logits(model)
    summed = model
    if subject.factors:  # else it is a copy
        adapted = peft_model.add(model, "composed", subject.factors)
        composed = logits(adapted)
        summed = adapted.merge_and_unload()
    with safetensors_io.one_thread():
        differences = _compare_with_files(summed, subject)
    allowed = {name: weight_tolerance(safetensors_io.DTYPES[subject.files.tensor(name).dtype]) for name in differences}
    worst = max(differences, key=lambda name: differences[name] / allowed[name])
    scale = float(composed.abs().max())
    checks = {
        "rounded": any(
            t.is_floating and t.dtype != "F32" for h in subject.files.headers.values() for t in h.tensors.values()
        ),
        "largest_logit": scale,
        "max_logit_difference": float((merged - composed).abs().max()),
        "max_logit_difference_to_rounded": float((merged - logits(summed)).abs().max()),
        "max_weight_difference": differences[worst],
    }
    if subject.factors:
        checks["adapter_effect_on_logits"] = float((composed - plain).abs().max())
        checks["rounding_to_adapter_effect"] = float((merged - composed).norm() / (composed - plain).norm())
    _judge(checks, worst, allowed[worst])
    return checks


def weight_tolerance(dtype: torch.dtype) -> float:
    """By what share of its norm a right tensor may differ from the same sum, added in another order and then rounded.

    Where the sum is off by a share s, one value in eps / s is rounded to the other side and is off by eps: together
    sqrt(s * eps). A wrong adapter of a thousandth of the weights gives 30 times that.
    """
    return math.sqrt(SUM_TOLERANCE * max(SUM_TOLERANCE, torch.finfo(dtype).eps))


def _compare_with_files(model: torch.nn.Module, subject: _Subject) -> dict[str, float]:
    """How far each of the model's weights, rounded as the files' dtypes say, is from its file's, which it then gets."""
    in_model = dict(model.named_parameters()) | dict(model.named_buffers())
    sampled = layer_sample.names_in_sample(subject.files, subject.layers)
    names = {new: name for name, new in sampled.items() if not subject.files.is_scale(name)}
    differences = {}
    for new, place in tensor_names.places(subject.base.directory, names).items():
        name, tensor = names[new], subject.files.tensor(names[new])
        if place.parameter not in in_model or not tensor.is_floating:
            continue
        weights = in_model[place.parameter]
        if place.expert is not None:
            weights = weights[place.expert].tensor_split(place.parts)[place.part]
        is_changed = not subject.factors.keys().isdisjoint((place.parameter, place.parameter.removesuffix(".weight")))
        error = size = 0.0
        for lead, first, file_RI in subject.files.rows(subject.files.homes[name], name):
            model_RI = weights.view(safetensors_io.matrix_shape(tensor.shape))[lead, first : first + len(file_RI)]
            rounded_RI = model_RI.cpu()
            if tensor.dtype != safetensors_io.FP8:
                rounded_RI = rounded_RI.to(safetensors_io.DTYPES[tensor.dtype]).float()
            elif is_changed:  # the others are copied: quantizing them anew would give other FP8 values
                rounded_RI = fp8.dequantise(*fp8.quantise(rounded_RI, subject.files.block), subject.files.block)
            error += float((file_RI - rounded_RI).square().sum())
            size += float(rounded_RI.square().sum())
            model_RI.copy_(file_RI)  # a sum in another order may have been rounded to the other side
        share = (error / size) ** 0.5 if size else error
        differences[name] = share if share >= 0 else math.inf  # NaN
    return differences


def _judge(checks: dict[str, Any], worst_tensor: str, allowed: float) -> None:
    """Raises VerificationError; written so that a NaN fails."""
    limit = LOGIT_TOLERANCE * max(1.0, checks["largest_logit"])
    problems = []
    if not checks.get("adapter_effect_on_logits", math.inf) > LOGIT_TOLERANCE * checks["largest_logit"]:
        effect, fix = checks["adapter_effect_on_logits"], "look at their manifests"
        problems.append(Problem("the adapters do not change the model's output", effect, fix))
    if not checks["max_weight_difference"] <= allowed:
        what = f"{worst_tensor} is not the rounded sum of base and adapter"
        problems.append(Problem(what, checks["max_weight_difference"], f"allowed is {allowed:.1g} of its norm"))
    exact = "max_logit_difference_to_rounded" if checks["rounded"] else "max_logit_difference"
    if not checks[exact] <= limit:
        what = f"the reloaded model's logits differ from the composed ones by more than {limit:.3g}"
        problems.append(Problem(what, checks[exact]))
    if not checks.get("rounding_to_adapter_effect", 0.0) <= LARGEST_ROUNDING:
        what = "rounding the merged weights takes most of what the adapters do"
        fix = "give --merge.dtype float32, or bfloat16 instead of fp8"
        problems.append(Problem(what, checks["rounding_to_adapter_effect"], fix))
    if problems:
        raise VerificationError(problems)
