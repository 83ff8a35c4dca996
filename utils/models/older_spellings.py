"""What transformers 5 writes into a model's folder, said a second time in the words of transformers 4.

transformers 4 and llama.cpp's converter look for `rope_theta` beside `rope_parameters` and take a default when it is
not there: the model loads and is another one. They do not know the tokenizer class `TokenizersBackend` either. Each
file lists what was added to it under `older_spellings`; a model's identity is that of the files without it, so a base
model keeps the adapters that were made for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.artifacts import files
from utils.models.architectures import registry

LISTED = "older_spellings"
CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
_CLASS = {"TokenizersBackend": "PreTrainedTokenizerFast"}
_ROPE_NAMES = {
    "": {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"},
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def of_config(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config.json with the older spellings beside the newer ones that have none yet."""
    copy = json.loads(json.dumps(settings))
    added = []
    for place, part in _parts(copy):
        for key, value in _older(part).items():
            if key not in part:
                part[key] = value
                added.append(place + key)
    return copy | {LISTED: sorted({*copy.get(LISTED, ()), *added})} if added else settings


def add(directory: Path) -> None:
    """Both files of a folder, each where what is written can be taken away again to the byte."""
    for name, spelt in ((CONFIG, of_config), (TOKENIZER, _of_tokenizer)):
        path = directory / name
        if not path.is_file():
            continue
        before = path.read_bytes()
        settings = files.read_object(path)
        after = _text(name, spelt(settings))
        if spelt(settings) != settings and _without(name, json.loads(after)) == before:
            files.write_text(path, after.decode("utf-8"))


def identified(path: Path) -> bytes | None:
    """What an identity takes the digest of instead of this file; None where it is the file as it lies there."""
    if path.name not in (CONFIG, TOKENIZER) or LISTED.encode() not in path.read_bytes():
        return None
    return _without(path.name, files.read_object(path))


def _without(name: str, settings: dict[str, Any]) -> bytes:
    listed = settings.get(LISTED, ())
    if name == TOKENIZER:
        newer = {old: new for new, old in _CLASS.items()}
        classes = {"tokenizer_class": newer.get(settings.get("tokenizer_class", ""))} if listed else {}
        settings = settings | {key: value for key, value in classes.items() if value}
    else:
        for place, part in _parts(settings):
            # one that says something else than the newer spelling decides something, and stays
            again = _older({key: value for key, value in part.items() if place + key not in listed})
            for key, value in again.items():
                if place + key in listed and part.get(key) == value:
                    del part[key]
    return _text(name, {key: value for key, value in settings.items() if key != LISTED})


def _of_tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
    known = _CLASS.get(settings.get("tokenizer_class", ""))
    return settings | {"tokenizer_class": known, LISTED: ["tokenizer_class"]} if known else settings


def _parts(settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(prefix of its keys, settings) of a model and of the models that it is made of."""
    yield "", settings
    for key, value in settings.items():
        if key.endswith("_config") and isinstance(value, dict) and key != "quantization_config":
            yield f"{key}.", value


def _older(part: dict[str, Any]) -> dict[str, Any]:
    """The older spellings of what a part says."""
    spellings = {"torch_dtype": part["dtype"]} if isinstance(part.get("dtype"), str) else {}
    older = registry.of(part.get("model_type")).older_names
    spellings |= {old: part[new] for new, old in older.items() if new in part}
    rope = part.get("rope_parameters")
    if not isinstance(rope, dict):
        return spellings
    local = None
    if "full_attention" in rope and "sliding_attention" in rope:  # Gemma-3: one for each kind of layer
        local, rope = rope["sliding_attention"].get("rope_theta"), rope["full_attention"]
    if rope.get("rope_type", "default") not in _ROPE_TYPES:  # transformers 4 has no such model
        return spellings
    names = _ROPE_NAMES.get(part.get("model_type", ""), _ROPE_NAMES[""])
    spellings |= {old: rope[new] for new, old in names.items() if new in rope}
    spellings |= {"rope_local_base_freq": local} if local is not None else {}
    if rope.get("rope_type", "default") != "default":
        kept = {key: value for key, value in rope.items() if key not in names}
        spellings["rope_scaling"] = kept
    return spellings


def _text(name: str, settings: dict[str, Any]) -> bytes:
    """As transformers writes the two files."""
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=name == CONFIG) + "\n"
    return text.encode("utf-8")
