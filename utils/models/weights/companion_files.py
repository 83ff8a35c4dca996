"""What belongs to a model beside its weights and config.json, and goes along where they are written anew."""

from __future__ import annotations

import shutil
from pathlib import Path

from utils.artifacts import files
from utils.models import directory_checks

# what a copy with other weights leaves behind: weights in any format, code, what is written anew
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".py")
_MADE_ANEW = ("config.json", "README.md", files.MANIFEST)


def companions(directory: Path) -> list[Path]:
    """What belongs to a model beside config.json and weights, relative to it: tokenizer, templates, processor, licence.

    Everything that lies there but weights, their indices and code; of its folders only that of the chat templates.
    """
    paths = [path for path in directory.iterdir() if path.is_file() and not path.name.startswith(".")]
    paths = [p for p in paths if p.name not in _MADE_ANEW and not p.name.endswith((*_NOT_COPIED, ".index.json"))]
    paths += directory.glob(f"{directory_checks.TEMPLATES}/*.jinja")
    return sorted(path.relative_to(directory) for path in paths)


def copy_companions(source: Path, target: Path) -> None:
    """Copy them to another directory."""
    for path in companions(source):
        (target / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / path, target / path)
