"""Base plus one adapter as a standalone model: streamed shard by shard, checked by reloading it before it is published.

The model is never built: each tensor is read a few rows at a time, dequantized if it is FP8, its update added in
float32, rounded once, and written under its own name to a file of the same name. A tensor that does not change is
copied. The result is an ordinary model directory that `AutoModelForCausalLM.from_pretrained` loads without peft.
Killed and called again it goes on at the first file that is not finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import BaseModelSection, MergeSection
from utils import disk
from utils.adapters import adapter_tokenizer
from utils.adapters.factors import Factors
from utils.artifacts import files
from utils.exceptions import ArtefactError, NonFiniteError, Problem, VerificationError
from utils.export import merge_check, merge_plan, merged_shards
from utils.export.merge_plan import SAFETENSORS_NAME, Plan, is_fp8
from utils.export.rounding_error import figures
from utils.logger import event
from utils.models import older_spellings
from utils.models.base_model import BaseModel
from utils.models.parallel import ranks
from utils.models.weights.companion_files import companions, copy_companions

INDEX = "model.safetensors.index.json"
# they name Python files of the base's repository, which are neither fetched nor run
NAMES_CODE = ("auto_map", "custom_pipelines")


def merge(
    base: BaseModel,
    factors: Factors,
    target: Path,
    settings: MergeSection,
    section: BaseModelSection,
    *,
    fingerprint: str,
    manifest: Callable[[dict[str, Any]], dict[str, Any]],
    card: str,
) -> dict[str, Any]:
    """Write base + factors to `target` and return what was checked; `target` appears only when every check passed.

    `fingerprint` says what is being made: a call with the same one goes on where an interrupted one stopped. Raises
    ArtefactError when the target is in the way, the disk is too small, the base is damaged or a delta fits no tensor,
    NonFiniteError when a merged weight is not finite, and VerificationError when the reloaded model is not the
    composed one.
    """
    refuse_target(target)
    intended = merge_plan.plan(base, factors, settings.dtype)
    merge_check.refuse_too_large(intended.checkpoint, factors)
    checks: dict[str, Any] = {}
    digests: dict[str, str] = {}
    with files.publish(target, lambda: manifest(checks), resume=fingerprint, digests=digests) as directory:
        _mention_others(target, directory)
        try:
            rounding, sha256s = write(intended, directory, card)
            checks |= rounding | merge_check.merged_equals_composed(base, factors, directory, section)
        except (NonFiniteError, VerificationError):
            shutil.rmtree(directory)  # going on from files that failed their check would only fail again
            raise
        digests |= sha256s
        for hidden in directory.glob(".*"):  # the record, and what a kill may have left of writing it
            if hidden.name != files.LOCK:
                hidden.unlink()
    return checks


def refuse_target(target: Path) -> None:
    """Raises ArtefactError when something is already there; called before any work."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtefactError(
            Problem(
                "--merge_path exists and is not empty; nothing is ever overwritten",
                str(target),
                "choose another path, or remove it first",
            )
        )


def write(plan: Plan, directory: Path, card: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Fill `directory`, going on where an interrupted call stopped; returns figures, and file name -> sha256."""
    _check_space(plan, directory)
    record = merged_shards.finished(plan, directory)
    todo = [path.name for path in plan.checkpoint.headers if path.name not in record]
    record |= ranks.everywhere(merged_shards.write, plan, directory, todo, record)
    _write_companions(plan, directory, card)
    return figures(plan.outputs, record), {name: done["sha256"] for name, done in record.items()}


def _mention_others(target: Path, directory: Path) -> None:
    """An interrupted merge with other settings can still be gone on from, so it is kept, and may be large."""
    for other in target.parent.glob(f".{target.name}.partial-*"):
        if other != directory:
            size = sum(path.stat().st_size for path in other.rglob("*") if path.is_file())
            event(
                "an interrupted merge with other settings is kept; remove it to free its bytes", path=other, bytes=size
            )


def _check_space(plan: Plan, directory: Path) -> None:
    source = plan.checkpoint.directory
    beside = sum((source / path).stat().st_size for path in companions(source))
    written = [(directory / name, header.size) for name, header in plan.outputs.items() if (directory / name).exists()]
    needed = plan.size + beside - sum(min(path.stat().st_size, size) for path, size in written)
    disk.require(directory.parent, needed, "merging")


def _write_companions(plan: Plan, directory: Path, card: str) -> None:
    """config.json as the base has it, but for the dtype, a quantization that no longer holds, and code that is not
    copied; tokenizer and all."""
    settings = {key: value for key, value in plan.checkpoint.config.items() if key not in NAMES_CODE}
    dtype = "bfloat16" if plan.dtype == "base" and is_fp8(plan.checkpoint) else plan.dtype
    if dtype in SAFETENSORS_NAME:
        spellings = {"dtype", "torch_dtype"} & settings.keys() or {"dtype"}
        settings |= dict.fromkeys(spellings, dtype)
        if is_fp8(plan.checkpoint):
            settings.pop("quantization_config", None)
    files.write_json(directory / "config.json", older_spellings.of_config(settings))
    if plan.checkpoint.weight_map:
        kept = {name for header in plan.outputs.values() for name in header.tensors}
        total = sum(tensor.size for header in plan.outputs.values() for tensor in header.tensors.values())
        weight_map = {name: file for name, file in plan.checkpoint.weight_map.items() if name in kept}
        files.write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    copy_companions(plan.checkpoint.directory, directory)
    if plan.base.tokenizer_from:
        adapter_tokenizer.write(plan.base, directory)
    older_spellings.add(directory)
    (directory / "README.md").write_text(card, encoding="utf-8")
