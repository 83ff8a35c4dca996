"""Modules that an adapter of another tool holds whole: the base's own, unchanged, or ones that were trained too.

PEFT saves embeddings and head beside factors when they are among the targets, when the vocabulary was resized, and for
`modules_to_save`. Unchanged copies are dropped. Changed ones replace the base's: the base with them is written once as
a model directory under models/base/, which is the base model from then on, as a quantised base is. So they are not
scaled or added, every stage sees the same model, and one adapter alone can bring them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from utils import disk
from utils.adapters import adapter_config
from utils.artifacts import files
from utils.exceptions import ArtefactError, Problem
from utils.logger import event
from utils.models.base_model import TOKENIZER_FILES, BaseModel, identify
from utils.models.directory_checks import leads_out, text_part
from utils.models.structure import model_class
from utils.models.weights import safetensors_io, tensor_names
from utils.models.weights.companion_files import copy_companions
from utils.models.weights.safetensors_io import Checkpoint

PREFIX = "base_model.model."
_INNER = re.compile(r"\.(?:base_layer|original_module|modules_to_save(?:\.[^.]+)?)\.")


def problems(whole: Mapping[str, torch.Tensor], directory: Path, base: BaseModel | None) -> Iterator[Problem]:
    """What of these tensors (name without PEFT's prefix -> values) is not as the base model has it; says what is."""
    if not whole:
        return
    if base is None:
        what = f"{directory} holds copies of modules: whether they are the base model's needs the base model"
        yield Problem(what, sorted(whole)[:3], "name the base in base_model_name_or_path")
        return
    homes, checkpoint = _homes(base), Checkpoint(base.directory)
    same = []
    for key, tensor in whole.items():
        home = homes.get(_INNER.sub(".", key))
        if home is None:
            shown = f"{key} {tuple(tensor.shape)}"
            yield Problem(f"{directory}: unknown tensor", shown, "the base model has no such weight")
        elif not _is_copy(tensor, checkpoint, home):
            fix = "give it as --domain_adapter, --task_adapter or --compose.also: the base with it is then made"
            yield Problem(f"{directory}: {key} was trained whole, and this base has another", fix=fix)
        else:
            same.append(key)
    if same:
        event("the adapter holds copies of the base model's weights: left out", path=directory, names=same)


def base_with(base: BaseModel, folders: Sequence[Path], models_dir: Path) -> BaseModel:
    """The base model with the modules that these adapters trained whole; itself when there are none.

    Raises ArtefactError when two adapters bring the same module, or a module has no place.
    """
    changed = {folder: tensors for folder in folders if (tensors := _changed(folder, base))}
    if not changed:
        return base
    if len(changed) > 1:
        what = "two adapters trained whole modules: they replace the base's, so only one adapter can bring them"
        names = [f"{folder}: {', '.join(tensors)}" for folder, tensors in changed.items()]
        raise ArtefactError(Problem(what, names, "leave one of them out"))
    ((folder, tensors),) = changed.items()
    stamp = files.fingerprint([base.digest, *(files.sha256_file(folder / n) for n in (adapter_config.WEIGHTS,))])
    target = models_dir / "base" / f"{base.directory.name}-with-{stamp[:8]}"
    with files.locked(target.with_name(f".{target.name}"), "the base model with these modules", waits=True):
        if not (target / files.MANIFEST).exists():
            facts = {"kind": "base", "source": base.source, "made_from": base.digest, "replaced": sorted(tensors)}
            with files.publish(target, lambda: facts) as directory:
                _write(base, tensors, folder, directory)
    event("an adapter's own modules replace the base model's; this directory is the base model then", path=target)
    event("later commands take it with --base.source", names=sorted(tensors), source=target)
    model = identify(target, str(target), "", models_dir / "base" / ".digests")
    return replace(model, made_from=base.digest)


def _homes(base: BaseModel) -> dict[str, str]:
    """Parameter of the model -> its tensor on disk; a tied head has that of the embeddings."""
    places = tensor_names.places(base.directory, Checkpoint(base.directory).homes)
    homes = {place.parameter: name for name, place in places.items() if place.expert is None}
    model = model_class.outline(base.directory)
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False) if n in homes}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in homes and id(parameter) in names:
            homes[name] = homes[names[id(parameter)]]
    return homes


def _changed(folder: Path, base: BaseModel) -> dict[str, torch.Tensor]:
    """Tensor on disk -> what an adapter has in its place, where that is something else."""
    path = folder / adapter_config.WEIGHTS
    if not path.is_file() or leads_out(path, folder):
        return {}
    try:
        header = safetensors_io.read_header(path)
    except ArtefactError:
        return {}  # said where the factors are read
    keys = [key for key in header.tensors if key.startswith(PREFIX) and ".lora_" not in key]
    if not keys:
        return {}
    homes, checkpoint = _homes(base), Checkpoint(base.directory)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(path, framework="pt") as reader:
        for key in keys:
            name = _INNER.sub(".", key.removeprefix(PREFIX))
            if name not in homes:
                continue
            tensor = reader.get_tensor(key)
            if _is_copy(tensor, checkpoint, homes[name]):
                continue
            if homes[name] in tensors and not torch.equal(tensors[homes[name]], tensor):
                what = f"{folder}: embeddings and output head differ, which this base model has as one"
                raise ArtefactError(Problem(what, key, "train it on a base whose head is its own"))
            tensors[homes[name]] = tensor
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]:
        raise ArtefactError(Problem(f"{folder}: whole modules hold NaN or infinity", bad))
    _refuse_odd_shapes(folder, tensors, base)
    return tensors


def _refuse_odd_shapes(folder: Path, tensors: Mapping[str, torch.Tensor], base: BaseModel) -> None:
    """Only a vocabulary can be resized, and then embeddings and head together."""
    checkpoint, homes = Checkpoint(base.directory), _homes(base)
    model = model_class.outline(base.directory)
    tables = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    sized = {homes[n] for n, p in model.named_parameters(remove_duplicate=False) if id(p) in tables and n in homes}
    rows = {name: tensor.shape[0] for name, tensor in tensors.items() if name in sized}
    misfits = [
        name
        for name, tensor in tensors.items()
        if (tensor.shape[1:] if name in sized else tensor.shape)
        != torch.Size(checkpoint.tensor(name).shape[1:] if name in sized else checkpoint.tensor(name).shape)
    ]
    if misfits:
        raise ArtefactError(Problem(f"{folder}: whole modules of other shapes than the base model's", misfits))
    counts = {rows.get(name, checkpoint.tensor(name).shape[0]) for name in sized}
    if len(counts) > 1:
        what = f"{folder}: the vocabulary was resized in embeddings or output head alone"
        raise ArtefactError(Problem(what, sorted(counts), "save it with save_embedding_layers=True"))


def _is_copy(tensor: torch.Tensor, checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor holds the base's values, to the precision in which it was saved."""
    if tuple(tensor.shape) != checkpoint.tensor(name).shape:
        return False
    step = torch.finfo(tensor.dtype).eps
    for _, first, piece_RI in checkpoint.rows(checkpoint.homes[name], name):
        own = tensor.view(-1, tensor.shape[-1])[first : first + len(piece_RI)].float()
        if not torch.allclose(own, piece_RI, rtol=2 * step, atol=1e-12):
            return False
    return True


def _write(base: BaseModel, tensors: Mapping[str, torch.Tensor], folder: Path, directory: Path) -> None:
    """Every file of the base, the replaced tensors in the base's dtype; a resized vocabulary brings its tokenizer."""
    checkpoint = Checkpoint(base.directory)
    disk.require(directory.parent, sum(header.size for header in checkpoint.headers.values()), "the base with modules")
    for path, header in checkpoint.headers.items():
        entries = {
            name: safetensors_io.described(tensor.dtype, tuple(tensors[name].shape)) if name in tensors else tensor
            for name, tensor in header.tensors.items()
        }

        def content(
            name: str, path: Path = path, header: safetensors_io.Header = header
        ) -> Iterator[safetensors_io.Buffer]:
            if name not in tensors:
                return safetensors_io.raw(path, header, name)
            dtype = safetensors_io.DTYPES[header.tensors[name].dtype]
            return iter([safetensors_io.as_bytes(tensors[name].to(dtype))])

        safetensors_io.write(directory / path.name, safetensors_io.plan(entries, header.metadata), content)
    copy_companions(base.directory, directory)
    if (base.directory / safetensors_io.INDEX).is_file():
        files.write_json(directory / safetensors_io.INDEX, files.read_object(base.directory / safetensors_io.INDEX))
    settings = dict(checkpoint.config)
    resized = {t.shape[0] for n, t in tensors.items() if t.shape[0] != checkpoint.tensor(n).shape[0]}
    for part in (settings, text_part(settings)):
        if resized and "vocab_size" in part:
            part["vocab_size"] = max(resized)
    files.write_json(directory / "config.json", settings)
    for name in TOKENIZER_FILES if resized else ():
        if (folder / name).is_file():
            files.write_text(directory / name, (folder / name).read_text(encoding="utf-8"))


def folders_of(paths: Sequence[Any]) -> list[Path]:
    """The folders in PEFT's format at these paths; what is none is found out later, where it is used."""
    places = [place for path in filter(None, paths) for place in (Path(path), Path(path) / "adapter")]
    return [place for place in places if (place / adapter_config.CONFIG).is_file()]
