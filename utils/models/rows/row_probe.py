"""What a base model honours when several pieces share a row: measured on the model itself, once, and remembered.

A small model of at least one decoder layer of each kind computes in float32, with every window shortened so that a
prompt can be longer. Two documents in a row are compared with each alone, candidates that share a prompt with each
alone, our output head with the model's own logits. A way that moves a token by more than 1e-4 nats is not used. One
backward pass of the training loss shows whether the model can be trained.
Flash attention has no float32: there the attention blocks alone compute in bfloat16, and hidden states are compared.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from config import AUTO, BaseModelSection
from utils.artifacts import files, resumable
from utils.exceptions import MALFORMED, ArtefactError, Problem, is_out_of_memory
from utils.logger import event, warning
from utils.models import chat, devices, float32_model, loading
from utils.models.base_model import BaseModel
from utils.models.model_shapes import PLAIN
from utils.models.parallel import ranks, sharding
from utils.models.rows import gradient_measures, row_differences, row_support
from utils.models.rows.row_support import ALONE, RowSupport
from utils.models.structure import layer_kinds, model_class
from utils.models.weights import layer_sample
from utils.models.weights.safetensors_io import Checkpoint
from utils.models.weights.tensor_names import number_in

# raised when the same model would be measured otherwise
METHOD = 3
# tokens of the shortened windows; the pieces are longer and shorter than it. With few learnt positions all is a quarter
WINDOW = 64
# an environment variable that transformers reads while it loads
SHARDING = "ACCELERATE_USE_FSDP"
# keys of what this process has said
_mentioned: set[str] = set()
_WINDOWS = re.compile(r"window|attention_chunk|local_attention")
_NO_WINDOWS = re.compile(r"layer|pattern|type|max_window|num_")


def measured(base: BaseModel, section: BaseModelSection) -> RowSupport:
    """What the model honours with this attention implementation on this device; measured where it is not known yet.

    What cannot be measured is not used, and said. Raises ArtefactError for a model that looks ahead.
    """
    return ranks.first_of_node(lambda: _known_or_measured(base, section))


def _known_or_measured(base: BaseModel, section: BaseModelSection) -> RowSupport:
    of = _key(base, section)
    if base.cache is None:
        return _reported(_measured(base, section, None), of)
    path = base.cache.with_name(".rows") / f"{of[:32]}.json"
    files.make_directory(path.parent)
    with files.locked(path.parent / "probe", "the probe of the base model", waits=True):
        record = resumable.read(path, of)
        if record is None:
            support = _measured(base, section, path.parent / "sample")
            if not support.why:  # what was out of reach may be within it next time
                resumable.write(path, support.to_json(), of)
            return _reported(support, of)
    return _reported(RowSupport(**record), of)


def load_model(base: BaseModel, section: BaseModelSection) -> Any:
    """The frozen base model, which from then on gets rows as it was measured to honour them. Errors as `loading`'s."""
    support = measured(base, section)
    model = sharding.ready_model(base, section)
    row_support.attach(model, support)
    return model


def _key(base: BaseModel, section: BaseModelSection) -> str:
    """What a measurement holds for."""
    where = [section.attention, importlib.metadata.version("transformers"), devices.device().type]
    return files.fingerprint([METHOD, base.digest, base.tokenizer_digest, base.quantization, *where])


def _measured(base: BaseModel, section: BaseModelSection, scratch: Path | None) -> RowSupport:
    """`measure` on a small model of the base; values of caution with the reason where that does not work."""
    event("measuring whether rows can be shared: once for each base model")
    scratch = scratch or base.directory.with_name(f".{base.directory.name}.rows")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        checkpoint = Checkpoint(base.directory)
        settings = layer_sample.text_settings(checkpoint.config)
        positions = [settings[key] for key in ("max_position_embeddings", "n_positions") if settings.get(key)]
        size = 4 if min(positions, default=WINDOW * 4) >= WINDOW * 3 else 1
        layer_sample.write(checkpoint, _layers(checkpoint), scratch)
        _shorten_windows(scratch / "config.json", WINDOW * size // 4)
        sample, which = replace(base, directory=scratch, quantization=PLAIN), {
            "vocabulary": int(settings["vocab_size"]),
            "skipped": _named_tokens(checkpoint.config),
            "size": size,
        }
        is_flash = section.attention.startswith("flash")
        plain = section.model_copy(update={"attention": AUTO}) if is_flash else section
        with float32_model.frugal_loading(), _whole():
            model = loading.load_model(sample, plain, dtype=torch.float32)
        support = row_differences.measure(float32_model.visiting_every_expert(model), **which)
        if not support.why:
            rows = row_differences.documents(**which)
            untrained = gradient_measures.untrained(model, support, rows, _pad_id(base, rows[0][0][0]))
            support = replace(support, untrained=untrained)
        if not is_flash:
            return support
        del model
        with _whole():
            narrow = loading.load_model(sample, section, dtype=torch.bfloat16)
        of_flash = row_differences.measure_attention(narrow, **which)
        return replace(of_flash, head=support.head, pads_left=support.pads_left, untrained=support.untrained)
    except (ArtefactError, MemoryError, RuntimeError, AssertionError, *MALFORMED) as error:
        reason = "memory ran out" if is_out_of_memory(error) else str(error).strip().splitlines()[0][:200]
        return replace(ALONE, why=reason or type(error).__name__)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _pad_id(base: BaseModel, usual: int) -> int:
    """What training pads rows with; another token where the model's tokenizer is none to train with."""
    try:
        return chat.pad_id(chat.load_tokenizer(base.directory))
    except ArtefactError:
        return usual


@contextmanager
def _whole() -> Iterator[None]:
    """Meanwhile transformers does not see that a launcher asks for sharding: other ranks would have no values."""
    before = os.environ.pop(SHARDING, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[SHARDING] = before


def _layers(checkpoint: Checkpoint) -> list[int]:
    """The first layers until one of each kind is there; only those of a kind's first one where memory is short.

    The first layers and not some: periods and offsets in config.json go on to mean what they mean.
    """
    count, path = layer_sample.layer_count(checkpoint), layer_sample.layer_list(checkpoint)
    tensors: dict[int, set[str]] = {}
    for name in checkpoint.homes:
        if (layer := number_in(path, name)) is not None and layer < count:
            tensors.setdefault(layer, set()).add(re.sub(r"\.\d+\.", ".*.", name.removeprefix(f"{path}.{layer}.")))
    kinds = layer_kinds.layer_kinds(model_class.outline(checkpoint.directory), count) or [frozenset()] * count
    seen: dict[Any, int] = {}
    for layer in sorted(tensors):
        seen.setdefault((kinds[layer], frozenset(tensors[layer])), layer)
    room = float32_model.available()
    # without one list of them, all
    choices = [list(range(max(seen.values()) + 1)), sorted(seen.values())] if seen else [list(range(count))]
    for layers in choices:
        if layer_sample.float32_bytes(checkpoint, layers) <= room:
            return layers
    raise ArtefactError(Problem("too little memory for a layer of each kind in float32", f"{room / 1e9:.1f} GB"))


def _shorten_windows(path: Path, tokens: int) -> None:
    """Every window of the attention gets at most so many tokens."""
    settings = files.read_object(path)
    inner = layer_sample.text_settings(settings)
    for key, value in inner.items():
        is_window = _WINDOWS.search(key) and not _NO_WINDOWS.search(key)
        if is_window and isinstance(value, int) and not isinstance(value, bool) and value > tokens:
            inner[key] = tokens
    files.write_json(path, settings)


def _named_tokens(settings: dict[str, Any]) -> list[int]:
    """Tokens that config.json gives a meaning: of images, of padding."""
    entries = {**settings, **layer_sample.text_settings(settings)}
    named = [value for key, value in entries.items() if key.endswith(("_token_id", "_token_index"))]
    return [token for value in named for token in (value if isinstance(value, list) else [value]) if token is not None]


def _reported(support: RowSupport, of: str) -> RowSupport:
    """Raises ArtefactError for a model that looks ahead; says, once in a process, what is not shared and why."""
    if not support.measured.get(row_differences.AHEAD, 0.0) <= row_differences.TOLERANCE:
        fix = "give a causal language model"
        raise ArtefactError(Problem(f"the base model looks ahead: {support.why}", fix=fix))
    if of in _mentioned:
        return support
    _mentioned.add(of)
    if support.why:
        warning(
            "rows could not be probed: one document and one candidate in each, the model's own head", why=support.why
        )
        return support
    moved = {name: f"{value:.2g}" for name, value in support.measured.items()}
    if not support.packs:
        warning("documents see each other when they share a row of this model: one document in each", nats=moved)
    if support.candidates == "none":
        warning("candidate answers see each other when they share a row of this model: one in each", nats=moved)
    if support.head == "model":
        event("the model changes its logits after the output head: losses come from its own")
    if not support.pads_left:
        event("this model's answers depend on the padding before a prompt: one prompt in each batch")
    return support
