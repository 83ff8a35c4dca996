"""Whether something on the disk can be trusted: its files, its manifest, all that it was made from, its base model.

Reads, and writes nothing; every byte is hashed anew. Parents are found by digest under the given roots, so a moved or
renamed directory is found too. What a manifest cannot show is who wrote it: a forger can seal what he changed. He is
found by what others recorded before: a child holds the digest and the seal of each of its parents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.adapters import adapter_config, adapter_files, adapter_tokenizer, other_tools, parent_runs
from utils.artifacts import files, manifests, runs
from utils.exceptions import ArtefactError, PipelineError, Problem
from utils.logger import event
from utils.models import base_model, directory_checks
from utils.models.base_model import BaseModel
from utils.models.weights.safetensors_io import Checkpoint

ADAPTER_STAGES = ("domain", "task", "composed")


@dataclass
class Verification:
    """What was looked at, what is wrong, and what could not be known."""

    kind: str = "unknown"
    checked: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def trusted(self) -> bool:
        return not self.problems

    def line(self) -> str:
        """The verdict in one line."""
        if self.problems:
            return f"NOT to be trusted: {len(self.problems)} problem{'s' * (len(self.problems) != 1)}"
        others = f", with {len(self.checked) - 1} more that it was made from" if len(self.checked) > 1 else ""
        return f"to be trusted: {self.kind} {self.checked[0]}{others}"


def verify(path: Path, roots: Sequence[Path]) -> Verification:
    """Check `path` and its whole lineage; `roots` hold the folders of the stages (data/, models/). Never raises."""
    verdict = Verification()
    directory = path.parent if path.name == "adapter" and (path.parent / files.MANIFEST).exists() else path
    with _collected(verdict):
        if (directory / files.MANIFEST).exists():
            own = (directory.resolve().parents[1],) if len(directory.resolve().parents) > 1 else ()
            _Lineage(verdict, [*roots, *own]).run(directory)
        elif (directory / "identity.json").exists():
            raise ArtefactError(Problem(f"{directory} is an unfinished run", fix="run the same command again"))
        elif (directory / directory_checks.CONFIG).is_file():
            verdict.kind = "model"
            _model(verdict, directory)
            verdict.notes.append("it has no manifest: nothing says what its files were when they were made")
        else:
            verdict.kind = "adapter of another tool"
            _external(verdict, adapter_files.find(directory))
    return verdict


@dataclass
class _Lineage:
    verdict: Verification
    roots: Sequence[Path]
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, directory: Path) -> None:
        """One artefact of ours and, through it, its parents and its base model."""
        manifest = self._manifest(directory)
        if manifest is None:
            return
        kind = str(manifest.get("kind"))
        self.verdict.checked.append(str(directory))
        if self.verdict.kind == "unknown":
            self.verdict.kind = kind
        if manifests.SEAL not in manifest:
            note = "has no seal (an earlier version made it): whether it was edited cannot be known"
            self.verdict.notes.append(f"{directory / files.MANIFEST} {note}")
        for reason in manifests.missing(manifest):
            self._problem(f"{directory / files.MANIFEST}: {reason}")
        if manifest.get("fingerprint", "") != files.fingerprint(manifest.get("identity")) and "identity" in manifest:
            self._problem(f"{directory / files.MANIFEST}: its fingerprint is not that of its settings")
        self.seen[manifest["digest"]] = manifest
        for parent in manifest.get("parents", []):
            self._parent(directory, parent)
        if kind == "checkpoint":
            self._checkpoint(directory, manifest)
        elif kind in runs.STAGES or kind == "merged":
            self._agrees(directory, manifest)
            self._contents(directory, manifest, self._base(directory, manifest))
        elif kind == "base":
            _model(self.verdict, directory, is_new=False)

    def _manifest(self, directory: Path) -> dict[str, Any] | None:
        event("checking", path=directory)
        with _collected(self.verdict):
            return files.verify(directory)
        with _collected(Verification()):  # what is wrong was said; what it was made from can still be looked at
            return files.read_manifest(directory)
        return None

    def _parent(self, child: Path, recorded: Mapping[str, Any]) -> None:
        if self._is_known(child, recorded):
            return None
        for root in self.roots:
            for path in sorted((root / recorded["kind"]).glob(f"*/{files.MANIFEST}")):
                with _collected(Verification()):
                    if files.read_manifest(path.parent)["digest"] == recorded["digest"]:
                        self.run(path.parent)
                        self._is_known(child, recorded)
                        return None
        external = Path(recorded["path"])
        if not (external / files.MANIFEST).exists() and (external / adapter_config.CONFIG).is_file():
            with _collected(self.verdict):
                if _external(self.verdict, external) != recorded["digest"]:
                    self._problem(f"{external}, an adapter of another tool, was changed after {child} was made from it")
            return None
        places = ", ".join(str(root / recorded["kind"]) for root in dict.fromkeys(self.roots))
        fix = "say where it is with --run.data_dir and --run.models_dir, or restore it"
        what = f"{child} was made from the {recorded['kind']} run {recorded['path']}, which is not under {places}"
        self.verdict.problems.append(Problem(what, recorded["digest"][:16], fix))

    def _is_known(self, child: Path, recorded: Mapping[str, Any]) -> bool:
        """Whether this parent was looked at; a problem when its manifest is another one than the child saw."""
        known = self.seen.get(recorded["digest"])
        if known and manifests.SEAL in recorded and recorded[manifests.SEAL] != known.get(manifests.SEAL):
            self._problem(f"the manifest of the {recorded['kind']} run is not the one that {child} was made with")
        return known is not None

    def _agrees(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        """What the settings say about base and parents is what the lineage says."""
        identity, base = manifest.get("identity"), manifest.get("base")
        if not isinstance(identity, dict) or not isinstance(base, dict):
            return  # said as missing
        parents = {parent["digest"]: parent["kind"] for parent in manifest.get("parents", [])}
        adapters = identity.get("adapters")
        named = [
            identity.get("data"),
            identity.get("domain_adapter"),
            identity.get("init_from"),
            *(adapters if isinstance(adapters, list) else []),
        ]
        for digest in named:
            if isinstance(digest, str) and digest not in parents:
                self._problem(f"{directory}: its settings name an input that is none of its parents", digest)
        if identity.get("base", base.get("digest")) != base.get("digest"):
            self._problem(f"{directory}: its settings name another base model than its manifest", identity["base"])
        if identity.get("tokenizer", base.get("tokenizer_digest")) != base.get("tokenizer_digest"):
            self._problem(f"{directory}: its settings name another tokenizer than its manifest", identity["tokenizer"])
        for digest in parents:
            recorded = self.seen.get(digest, {}).get("base")
            other = recorded if isinstance(recorded, dict) and recorded else base
            # prepared data knows no weights, only a tokenizer
            keys = ("tokenizer_digest",) if parents[digest] == "prepared" else ("digest", "tokenizer_digest")
            asserted = (manifest.get("composition") or {}).get("asserted")
            if asserted and parents[digest] != "prepared":
                self.verdict.notes += [
                    f"{directory}: {assertion}" for assertion in asserted if assertion not in self.verdict.notes
                ]
                keys = ("tokenizer_digest",)
            if any(other.get(key) != base.get(key) for key in keys):
                self._problem(f"{directory} and its {parents[digest]} parent were made with different base models")

    def _base(self, directory: Path, manifest: Mapping[str, Any]) -> BaseModel | None:
        """The base model, when it is there and is the one that was recorded."""
        recorded = manifest.get("base")
        if not isinstance(recorded, dict) or not isinstance(recorded.get("directory"), str):
            return None
        here = Path(recorded["directory"])
        places = [*(root / "base" / here.name for root in self.roots), here]
        place = next((p for p in places if (p / directory_checks.CONFIG).is_file()), None)
        if place is None:
            fix = "restore it, or say where models are with --run.models_dir"
            self.verdict.problems.append(Problem(f"the base model of {directory} is gone", recorded["directory"], fix))
            return None
        if str(place) not in self.seen:
            event("checking", path=place)
            self.seen[str(place)] = {}
            with _collected(self.verdict):
                self.verdict.checked.append(str(place))
                self.seen[str(place)] = {"model": base_model.identify(place, recorded["source"], "", None)}
        model = self.seen[str(place)].get("model")
        if model is None:
            return None
        for key, what in (("digest", "another model"), ("tokenizer_digest", "another tokenizer or chat template")):
            if getattr(model, key) != recorded.get(key):
                self._problem(f"{place} is {what} than {directory} was made with", getattr(model, key)[:16])
        return model if model.digest == recorded.get("digest") else None

    def _contents(self, directory: Path, manifest: Mapping[str, Any], base: BaseModel | None) -> None:
        with _collected(self.verdict):
            if manifest["kind"] in ADAPTER_STAGES:
                adapter_files.load(directory / "adapter", base)
            elif manifest["kind"] == "merged":
                _model(self.verdict, directory, is_new=False)

    def _checkpoint(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        if directory.name != f"step-{manifest.get('step', 0):08d}":
            self._problem(f"{directory} is named after another step than its own", manifest.get("step"))
        identity = directory.parent.parent / "identity.json"
        if identity.exists() and manifest.get("run") != files.fingerprint(files.read_json(identity)):
            self._problem(f"{directory} is a checkpoint of another run than {identity.parent}")

    def _problem(self, what: str, value: object = None) -> None:
        self.verdict.problems.append(Problem(what, value, "restore it from a copy, or make it anew"))


def _model(verdict: Verification, directory: Path, *, is_new: bool = True) -> None:
    """A model directory: nothing in it that is not to be trusted, every weight where its header says."""
    if is_new:
        verdict.checked.append(str(directory))
    if problems := directory_checks.problems(directory):
        raise ArtefactError(problems)
    Checkpoint(directory)


def _external(verdict: Verification, directory: Path) -> str:
    """An adapter of another tool: what it says is scale * B * A, and what it holds is that. Returns its digest."""
    verdict.checked.append(str(directory))
    settings = other_tools.read(directory)
    named = settings.get("base_model_name_or_path") or ""
    if parent_runs.is_model(named):
        base = base_model.identify(Path(named), named, "", None)
        adapter_files.load(directory, base)
        verdict.checked.append(named)
        if adapter_tokenizer.files_in(directory) and (other := adapter_tokenizer.compare(directory, base)):
            verdict.notes.append(f"it came with a tokenizer of its own: {'; '.join(other)}; --inputs.tokenizer chooses")
    else:
        adapter_files.load(directory)
        verdict.notes.append(f"its base model ({named or 'not said'}) is not here: whether it fits was not checked")
    verdict.notes.append(f"{directory} has no manifest: who made it, and whether it was changed, cannot be known")
    return adapter_files.digest(directory)


@contextmanager
def _collected(verdict: Verification) -> Iterator[None]:
    """What is raised inside is a problem of the verdict, and the checking goes on."""
    try:
        yield
    except PipelineError as error:
        verdict.problems += error.problems
    except OSError as error:
        verdict.problems.append(Problem(f"cannot read {error.filename}: {error.strerror or error}"))
