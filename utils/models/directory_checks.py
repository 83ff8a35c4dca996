"""What is refused in a model directory before any library opens it: pickles, code, and paths that lead out of it.

Reads names and the JSON files only. A hub cache keeps its files as links into its `blobs` folder, which is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.artifacts import files
from utils.exceptions import ArtefactError, PipelineError, Problem, is_lost_process, is_out_of_memory
from utils.models.architectures import registry

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TEMPLATES = "additional_chat_templates"
# transformers fetches and runs a kernel from a hub when one of these names a repository
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def problems(directory: Path) -> list[Problem]:
    """Everything for which `directory` is not a model to be trusted with."""
    problems = []
    if not (directory / CONFIG).is_file():
        problems.append(Problem(f"{directory} has no {CONFIG}", fix="point --base.source at a model directory"))
    if not any(directory.glob("*.safetensors")):
        problems.append(Problem(f"{directory} has no .safetensors file; pickled weights (.bin, .pt) are refused"))
    if (directory / "adapter_config.json").exists():
        # transformers would load the adapter on top of the weights without a word
        problems.append(Problem(f"{directory} contains adapter_config.json", fix="remove it: a base model has none"))
    problems += [
        Problem(f"{path} leads out of {directory}", str(path.resolve()), "put the file itself there")
        for path in _opened(directory)
        if leads_out(path, directory)
    ]
    settings = files.read_object(directory / CONFIG) if not problems else {}
    others = [*_named_code(directory), *_named_paths(directory), *_unsaid(directory)] if not problems else []
    return problems or [*others, *quantised(settings, directory)]


def quantised(settings: dict[str, Any], place: object) -> list[Problem]:
    """Why the weights that a config.json describes cannot be adapted: they are in bits of another tool already."""
    recorded = settings.get("quantization_config") or text_part(settings).get("quantization_config")
    method = recorded.get("quant_method") if isinstance(recorded, dict) else recorded
    if not recorded or method == "fp8":
        return []
    in_bits = isinstance(recorded, dict) and (
        method == "bitsandbytes" or recorded.get("load_in_4bit") or recorded.get("load_in_8bit")
    )
    kind = "int8" if in_bits and recorded.get("load_in_8bit") else "nf4"
    also = f" with --base.quantization {kind}" if in_bits else ""
    how = method or "bitsandbytes"
    what = f"{place} is quantised already ({how}): no adapter is trained on, or merged into, such bits"
    return [Problem(what, fix=f"give the 16-bit model that it was made from as --base.source{also}")]


def text_part(settings: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the language model."""
    part = settings.get("text_config")
    return part if isinstance(part, dict) else {}


def leads_out(path: Path, root: Path) -> bool:
    """Whether a link takes `path` to a file outside of `root` that is no blob of a hub cache."""
    target = path.resolve()
    is_blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return not is_blob and not target.is_relative_to(root.resolve())


def _opened(directory: Path) -> Iterator[Path]:
    """Files that transformers may open."""
    for path in (*directory.glob("*"), *directory.glob(f"{TEMPLATES}/*")):
        if path.name == TEMPLATES or not path.is_dir():
            yield path


def _named_code(directory: Path) -> Iterator[Problem]:
    for place, key, value in _entries(files.read_object(directory / CONFIG), CONFIG):
        if key.removeprefix("_").startswith(_IMPLEMENTATIONS) and isinstance(value, str) and "/" in value:
            yield Problem(f"{directory / CONFIG}: {place} names code on a hub", value, "remove it; no remote code runs")


def _named_paths(directory: Path) -> Iterator[Problem]:
    """Files that the model's own JSON names: each has to be one beside it."""
    for name, key in (("tokenizer_config.json", "fast_tokenizer_files"), (INDEX, "weight_map")):
        named = files.read_object(directory / name).get(key) if (directory / name).is_file() else None
        values = named.values() if isinstance(named, dict) else named if isinstance(named, list) else ()
        if elsewhere := sorted({str(value) for value in values if "/" in str(value)}):
            yield Problem(f"{directory / name}: {key} leads out of {directory}", elsewhere[:3], "restore the file")
        if name == INDEX and (directory / name).is_file() and not isinstance(named, dict):
            yield Problem(f"{directory / name} has no {key}", fix="fetch it again")


def _unsaid(directory: Path) -> list[Problem]:
    """What config.json leaves out although transformers' default for it is silently another model."""
    settings = files.read_object(directory / CONFIG)
    return registry.of(settings.get("model_type")).missing_settings(settings, str(directory / CONFIG))


def _entries(value: Any, place: str) -> Iterator[tuple[str, str, Any]]:
    """(where, key, value) of every entry of nested JSON."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield f"{place}:{key}", str(key), inner
        yield from _entries(inner, f"{place}:{key}")


@contextmanager
def readable(directory: Path) -> Iterator[None]:
    """A damaged or unsuitable model directory is an artefact error, whichever library notices."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # of a file that is not what they expect, libraries raise whatever their next line does
        if is_out_of_memory(error) or is_lost_process(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        what, fix = (
            f"the model in {directory} cannot be loaded: {reason}",
            "fix what the reason names, or restore the files",
        )
        if type(error).__module__.startswith("jinja2"):
            what = f"the chat template of the model in {directory} fails: {reason}"
            fix = (
                "fix chat_template.jinja; it is given the messages and the tokenizer's special tokens (bos_token, ...)"
            )
        raise ArtefactError(Problem(what, fix=fix)) from error
