"""Adapters as any tool leaves them: their `adapter_config.json`, read strictly or refused with the reason.

Only what leaves the update at scale * B @ A is understood; every other setting has to be off.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.adapters.adapter_config import BAD_PATTERN, CONFIG, WEIGHTS
from utils.artifacts import files
from utils.exceptions import ArtefactError, Problem
from utils.models import directory_checks

PICKLED = "adapter_model.bin"
MLX_WEIGHTS = {"adapters.safetensors", "adapters.npz"}
_SAVED = "pickled weights are refused: save it with PEFT's save_pretrained"


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _text_or_texts(value: Any) -> bool:
    return isinstance(value, str) or _texts(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# settings that are read here, or do not touch the update, and what their values may be; every other one has to be off
_UNDERSTOOD: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("peft_type", "peft_version", "base_model_name_or_path", "revision"), lambda v: isinstance(v, str)),
    "task_type": lambda v: v == "CAUSAL_LM",
    # fan_in_fan_out says what the base's modules are, and PEFT goes by the modules
    **dict.fromkeys(("inference_mode", "use_rslora", "fan_in_fan_out"), lambda v: isinstance(v, bool)),
    **dict.fromkeys(("r", "lora_alpha", "rank_pattern", "alpha_pattern"), lambda v: True),  # see _unreadable
    "init_lora_weights": lambda v: isinstance(v, (str, bool)),
    "lora_dropout": lambda v: isinstance(v, (int, float)) and 0 <= v <= 1,
    "bias": lambda v: isinstance(v, str),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _text_or_texts),
    # whole modules are compared with the base's where the tensors are read
    **dict.fromkeys(("target_parameters", "modules_to_save"), _texts),
    "layers_to_transform": lambda v: _whole(v) or (isinstance(v, list) and all(_whole(layer) for layer in v)),
    # the name of a module that PEFT would import
    "megatron_core": lambda v: v == "megatron.core",
    "qalora_group_size": _whole,
    **dict.fromkeys(("eva_config", "runtime_config"), lambda v: isinstance(v, dict)),
}
_REASONS = {
    "use_dora": "DoRA rescales the whole weight, so two such adapters do not add up",
    "lora_bias": "the bias of B is not part of a low-rank update",
    "trainable_token_indices": "changed embedding rows cannot be added to another adapter",
    "use_qalora": "QA-LoRA pools its input",
    "layer_replication": "replicated layers are another architecture",
    "auto_mapping": "it names classes to import, and an adapter runs no code here",
}
_UNKNOWN = "its effect on the update is not known here"
_MERGED = "merge it into the base model with PEFT (merge_and_unload) and give the result as --base.source"
_FIXES = {
    "auto_mapping": f"remove it from {CONFIG}",
    "task_type": "give an adapter of a causal language model: another task has another head",
}
_OF_TRANSFORMERS = re.compile(r"transformers\.models\.[a-z0-9_.]+ [A-Za-z0-9_]+")
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LEFT_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")


def read(directory: Path) -> dict[str, Any]:
    """The adapter's configuration, checked. Raises ArtefactError for each setting that is not just scale * B @ A."""
    if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
        raise ArtefactError(_without_files(directory))
    if links := [name for name in (CONFIG, WEIGHTS) if directory_checks.leads_out(directory / name, directory)]:
        fix = "put the files themselves there"
        raise ArtefactError([Problem(f"{directory / name} leads out of {directory}", fix=fix) for name in links])
    settings = files.read_object(directory / CONFIG)
    if settings.get("peft_type") != "LORA":  # what another kind's settings mean is another matter
        kind = settings.get("peft_type") or "nothing said"
        raise ArtefactError(Problem(f"{directory}: peft_type is not LORA", kind, f"{_MERGED}, or train a LoRA adapter"))
    problems = [
        Problem(f"{directory}: {key} is set: {_REASONS.get(key, _UNKNOWN)}", value, _FIXES.get(key, _MERGED))
        for key, value in settings.items()
        if key not in _UNDERSTOOD and value and not (key == "auto_mapping" and _names_transformers(value))
    ]
    problems += [
        Problem(f"{directory}: {key} cannot have this value", settings[key], _FIXES.get(key, "restore it from a copy"))
        for key, fits in _UNDERSTOOD.items()
        if settings.get(key) is not None and not fits(settings[key])
    ]
    if settings.get("bias", "none") != "none":
        what = f"{directory}: bias is trained too: it is not part of the update"
        problems.append(Problem(what, settings["bias"], _MERGED))
    initialisation = str(settings.get("init_lora_weights")).lower()
    if initialisation.startswith(_CHANGED_BASE):
        fix = "save it with path_initial_model_for_weight_conversion"
        problems.append(
            Problem(f"{directory}: its initialisation changed the base", settings["init_lora_weights"], fix)
        )
    elif initialisation not in _LEFT_BASE:
        what = f"{directory}: init_lora_weights: whether this initialisation changed the base is not known here"
        problems.append(Problem(what, settings["init_lora_weights"], _MERGED))
    problems += [Problem(f"{directory}: {what} in {CONFIG}", value) for what, value in _unreadable(settings)]
    if problems:
        raise ArtefactError(problems)
    return settings


def _without_files(directory: Path) -> Problem:
    """Why a folder without PEFT's two files is no adapter here, and what makes one of what is there."""
    have = sorted(p.name for p in directory.glob("*")) if directory.is_dir() else "no such directory"
    if MLX_WEIGHTS & set(have):
        fix = f"mlx_lm.fuse --model BASE --adapter-path {shlex.quote(str(directory))} --save-path NEW: give NEW as "
        return Problem(f"{directory} is an adapter of MLX-LM, whose format is its own", have, f"{fix}--base.source")
    what = f"{directory} is not a PEFT adapter: it needs {CONFIG} and {WEIGHTS}"
    if PICKLED in have and CONFIG in have:
        return Problem(what, have, f"pickled weights are refused; this reads no code of them: {_converting(directory)}")
    pickled = any(str(name).endswith((".bin", ".pt", ".pth")) for name in have)
    return Problem(what, have, _SAVED if pickled else "give the adapter/ folder")


def _converting(directory: Path) -> str:
    """The command that writes the tensors of a pickled adapter as safetensors."""
    program = (
        "import sys, torch; from safetensors.torch import save_file; "
        "state = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}, sys.argv[2])"
    )
    return shlex.join(["python", "-c", program, str(directory / PICKLED), str(directory / WEIGHTS)])


def _names_transformers(value: Any) -> bool:
    """PEFT writes auto_mapping when no task_type was given; classes of transformers itself are what it then names."""
    names = [value.get(key) for key in ("parent_library", "base_model_class")] if isinstance(value, dict) else []
    return all(isinstance(name, str) for name in names) and bool(_OF_TRANSFORMERS.fullmatch(" ".join(names)))


def _unreadable(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    """(what is wrong, the value) of ranks, scales and patterns."""

    def is_rank(value: Any) -> bool:
        return _whole(value) and value >= 1

    def is_number(value: Any) -> bool:
        # beyond that a float32 sum is no number any more; it also says no to infinity and NaN
        return (_whole(value) or isinstance(value, float)) and abs(value) < 1e30

    faults = []
    for key, patterns, fits in (("r", "rank_pattern", is_rank), ("lora_alpha", "alpha_pattern", is_number)):
        kind = "whole number from 1" if fits is is_rank else "finite number"
        if not fits(settings.get(key)):
            faults.append((f"{key} is no {kind}", settings.get(key)))
        own = settings.get(patterns) or {}
        if not isinstance(own, dict):
            faults.append((f"{patterns} is no dictionary", own))
            continue
        for pattern, value in own.items():
            if not fits(value):
                faults.append((f"{patterns} has no {kind} for {pattern}", value))
            try:
                re.compile(pattern)
            except BAD_PATTERN as error:
                faults.append((f"{patterns} has a key that is no regular expression ({error})", pattern))
    return faults
