"""Base plus one adapter as a standalone model: streamed shard by shard, checked by reloading it before it is published.

The model is never built: each tensor is read a few rows at a time, dequantized if it is FP8, its update added in
float32, rounded once, and written under its own name to a file of the same name. A tensor that does not change is
copied. The result is an ordinary model directory that `AutoModelForCausalLM.from_pretrained` loads without peft.
Killed and called again it goes on at the first file that is not finished.

Shapes: R rows of a piece, O out_features, I in_features, r rank.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from config import BaseModelSection, MergeSection
from utils import disk
from utils.adapters import adapter_tokenizer, fused_experts
from utils.adapters.factors import Factors, ModuleFactors, norm
from utils.artifacts import files, resumable
from utils.exceptions import ArtefactError, NonFiniteError, Problem, VerificationError
from utils.export import merge_check
from utils.export.rounding_error import figures, squared_norm
from utils.logger import event
from utils.models import older_spellings
from utils.models.architectures import registry
from utils.models.base_model import BaseModel
from utils.models.parallel import ranks, work
from utils.models.weights import fp8, safetensors_io, tensor_names
from utils.models.weights.companion_files import companions, copy_companions
from utils.models.weights.safetensors_io import Checkpoint, Header, Tensor
from utils.progress import Progress

# what is finished, while a merge is being written; hidden, so no part of the artefact
RECORD = ".shards.json"
INDEX = "model.safetensors.index.json"
# they name Python files of the base's repository, which are neither fetched nor run
NAMES_CODE = ("auto_map", "custom_pipelines")
_SAFETENSORS_NAME = {"bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Plan:
    """What is going to be written, known from the headers alone."""

    checkpoint: Checkpoint
    outputs: dict[str, Header]
    updates: dict[str, ModuleFactors]
    dtype: str
    base: BaseModel

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(header.size for header in self.outputs.values())


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
    intended = plan(base, factors, settings.dtype)
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


def plan(base: BaseModel, factors: Factors, dtype: str) -> Plan:
    """What a merge will write, from the headers of the base. Raises ArtefactError for all that can be known by then."""
    checkpoint = Checkpoint(base.directory)
    if dtype == "fp8" and not _is_fp8(checkpoint):
        what = "which tensors stand FP8 is the model maker's choice, and this base has none in FP8 to show it"
        raise ArtefactError(Problem(what, "--merge.dtype fp8", "use --merge.dtype base or bfloat16"))
    updates = _updates(checkpoint, factors)
    outputs = {}
    for path, header in checkpoint.headers.items():
        after = {name: _after(checkpoint, updates, name, tensor, dtype) for name, tensor in header.tensors.items()}
        for name, tensor in header.tensors.items():
            if tensor.is_fp8 and (name in updates or after[name] != tensor):
                checkpoint.scale_home(path, name)  # raises now what would come up after hours of writing
        outputs[path.name] = safetensors_io.plan({n: tensor for n, tensor in after.items() if tensor}, header.metadata)
    return Plan(checkpoint, outputs, updates, dtype, base)


def write(plan: Plan, directory: Path, card: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Fill `directory`, going on where an interrupted call stopped; returns figures, and file name -> sha256."""
    _check_space(plan, directory)
    record = _write_shards(plan, directory)
    _write_companions(plan, directory, card)
    return figures(plan.outputs, record), {name: done["sha256"] for name, done in record.items()}


def _updates(checkpoint: Checkpoint, factors: Factors) -> dict[str, ModuleFactors]:
    """Tensor name on disk -> its update. Every value of every delta has its place, or this raises ArtefactError."""
    weights = [name for name in checkpoint.homes if not checkpoint.is_scale(name)]
    placed = dict.fromkeys(factors, 0)
    updates, problems = {}, []
    for name, place in tensor_names.places(checkpoint.directory, weights).items():
        module = place.parameter if place.parameter in factors else place.parameter.removesuffix(".weight")
        if module not in factors:
            continue
        module_update, tensor = factors[module], checkpoint.tensor(name)
        fits = place.expert is None or (module_update.is_experts and place.expert < module_update.shape[0])
        update = fused_experts.rows(module_update, place) if fits else module_update
        if not fits or update.shape != tensor.shape or not tensor.is_floating:
            on_disk = f"{tensor.dtype} {tensor.shape}"
            problems.append(Problem(f"{name} is {on_disk}, a delta of {update.shape} cannot be added to it"))
        placed[module] += math.prod(update.shape)
        updates[name] = update
    if problems:
        raise ArtefactError(problems[:5])
    without_tensor = [module for module, count in placed.items() if count != math.prod(factors[module].shape)]
    if without_tensor:
        fix = "the adapter was made for another model, or the base lacks files"
        raise ArtefactError(
            Problem("the base model has no tensor for all of these deltas", sorted(without_tensor)[:5], fix)
        )
    return updates


def _after(
    checkpoint: Checkpoint, updates: dict[str, ModuleFactors], name: str, tensor: Tensor, dtype: str
) -> Tensor | None:
    """What becomes of a tensor; None for one that is left out."""
    if checkpoint.is_scale(name):
        changed = name.removesuffix(safetensors_io.SCALE) in updates
        return None if dtype != "fp8" else safetensors_io.described("F32", tensor.shape) if changed else tensor
    kept = registry.of(checkpoint.config.get("model_type")).kept_in_merge
    if dtype == "fp8" or not tensor.is_floating or name.endswith(kept):
        return tensor
    if dtype == "base":
        return safetensors_io.described("BF16", tensor.shape) if tensor.is_fp8 else tensor
    return safetensors_io.described(_SAFETENSORS_NAME[dtype], tensor.shape)


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


def _write_shards(plan: Plan, directory: Path) -> dict[str, dict[str, Any]]:
    """Write what is not finished; returns file name -> sha256, bytes and the changed tensors' squared norms.

    The files are split over the ranks, each of which keeps a record of its own: there is no place for two writers.
    """
    record = _finished(plan, directory)
    if record:  # of any number of ranks
        resumable.write(directory / RECORD, record, directory.name)
    todo = [path.name for path in plan.checkpoint.headers if path.name not in record]
    return record | ranks.everywhere(_write_files, plan, directory, todo, record)


def _write_files(
    plan: Plan, directory: Path, todo: Sequence[str], finished: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Every rank writes its share of `todo`; returns what `_write_shards` does about all of it."""
    paths = {path.name: path for path in plan.checkpoint.headers}
    rank, is_alone = ranks.index(), ranks.size() == 1
    record = dict(finished) if rank == 0 else {}
    own = directory / (RECORD if rank == 0 else RECORD.replace(".json", f"-{rank}.json"))
    done = sum(entry["bytes"] for entry in finished.values())
    with (
        Progress("merging", total=plan.size, unit="B", done=done) as bar,
        safetensors_io.one_thread(),
        safetensors_io.one_more_thread() as thread,
    ):

        def written(file: str) -> dict[str, Any]:
            squares: dict[str, list[float]] = {}
            header = plan.outputs[file]

            def content(name: str) -> Iterator[Any]:
                return _content(plan, paths[file], name, squares)

            advance = bar.advance if is_alone else _nothing
            digest = safetensors_io.write(directory / file, header, content, advance, thread)
            record[file] = {"sha256": digest, "bytes": header.size, "squares": squares}
            resumable.write(own, record, directory.name)
            return record[file]

        sizes = [plan.outputs[file].size for file in todo]
        entries = work.computed(todo, sizes, written, None if is_alone else bar, sizes, in_step=False)
    return dict(zip(todo, entries, strict=True))


def _nothing(amount: float) -> None:
    """For progress that is told by the file."""


def _finished(plan: Plan, directory: Path) -> dict[str, dict[str, Any]]:
    """The record of an interrupted merge, as far as the files are still what it says."""
    paths = [directory / RECORD, *sorted(directory.glob(RECORD.replace(".json", "-*.json")))]
    records = [record for path in paths if (record := resumable.read(path, directory.name)) is not None]
    if not records:
        return {}
    event("going on with an interrupted merge: checking its finished files")
    return {
        name: done
        for record in records
        for name, done in record.items()
        if (directory / name).is_file()
        and (directory / name).stat().st_size == done["bytes"] == plan.outputs[name].size
        and files.sha256_file(directory / name) == done["sha256"]
    }


def _content(plan: Plan, path: Path, name: str, squares: dict[str, list[float]]) -> Iterator[Any]:
    """The bytes of one tensor of the result, in pieces; `squares` gets the norms of a changed one."""
    before, after = plan.checkpoint.headers[path].tensors[name], plan.outputs[path.name].tensors[name]
    weight = name.removesuffix(safetensors_io.SCALE)
    if weight in plan.updates and weight != name:
        # made anew from the weight: it may come before it, or be in another file
        for exact_RI in _exact(plan, plan.checkpoint.homes[weight], weight):
            yield safetensors_io.as_bytes(fp8.quantise(exact_RI, plan.checkpoint.block)[1])
    elif name not in plan.updates and after.dtype == before.dtype:
        yield from safetensors_io.raw(path, plan.checkpoint.headers[path], name)
    else:
        yield from _computed(plan, path, name, squares)


def _computed(plan: Plan, path: Path, name: str, squares: dict[str, list[float]]) -> Iterator[Any]:
    dtype = plan.outputs[path.name].tensors[name].dtype
    error = size = 0.0
    for exact_RI in _exact(plan, path, name):
        if dtype == safetensors_io.FP8:
            written_RI, scales = fp8.quantise(exact_RI, plan.checkpoint.block)
            rounded_RI = fp8.dequantise(written_RI, scales, plan.checkpoint.block)
        else:
            written_RI = exact_RI.to(safetensors_io.DTYPES[dtype])
            rounded_RI = written_RI.float()
        if name in plan.updates:
            error += squared_norm(rounded_RI - exact_RI)
            size += squared_norm(exact_RI)
        yield safetensors_io.as_bytes(written_RI)
    if name in plan.updates:
        if not math.isfinite(error + size):
            raise NonFiniteError(Problem(f"{name} is not finite after merging", fix="look at the adapters' weights"))
        squares[name] = [error, size, norm(plan.updates[name]) ** 2]


def _exact(plan: Plan, path: Path, name: str) -> Iterator[torch.Tensor]:
    """The weights of a tensor (R, I) in float32 with its update added, piece by piece."""
    update = plan.updates.get(name)
    if update is not None:
        # one update per leading index, as `rows` counts them
        a_LrI = update.a_rI.float().view(-1, *update.a_rI.shape[-2:])
        b_LOr = update.b_Or.float().view(-1, *update.b_Or.shape[-2:])
    for lead, first, weights_RI in plan.checkpoint.rows(path, name):
        if update is not None:
            weights_RI.addmm_(b_LOr[lead, first : first + len(weights_RI)], a_LrI[lead], alpha=update.scale)
        yield weights_RI


def _write_companions(plan: Plan, directory: Path, card: str) -> None:
    """config.json as the base has it, but for the dtype, a quantization that no longer holds, and code that is not
    copied; tokenizer and all."""
    settings = {key: value for key, value in plan.checkpoint.config.items() if key not in NAMES_CODE}
    dtype = "bfloat16" if plan.dtype == "base" and _is_fp8(plan.checkpoint) else plan.dtype
    if dtype in _SAFETENSORS_NAME:
        spellings = {"dtype", "torch_dtype"} & settings.keys() or {"dtype"}
        settings |= dict.fromkeys(spellings, dtype)
        if _is_fp8(plan.checkpoint):
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


def _is_fp8(checkpoint: Checkpoint) -> bool:
    return any(checkpoint.is_scale(name) for name in checkpoint.homes)
