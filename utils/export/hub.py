"""Publishing a verified artefact to a hub: a public copy without this machine's paths, uploaded in one go.

Never on by default. The token comes from the environment (HF_TOKEN) or the hub's own login, never from a setting, and
appears in no message. `manifest.json` stays here; its public copy is `provenance.json`. Nothing in the repository is
deleted, and no pickle is ever uploaded.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar

from config import HubSection
from utils.adapters import cards
from utils.artifacts import files
from utils.exceptions import ArtefactError, Problem
from utils.export import model_index
from utils.logger import event, warning
from utils.secrets import redact

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from utils.evaluation.evaluation_for_card import Evaluation

Answer = TypeVar("Answer")

PROVENANCE = "provenance.json"
CARD = "README.md"
SUFFIXES = (".safetensors", ".json", ".md", ".jinja", ".txt", ".model", ".png", ".html", ".gguf")
# what a loader picks up by itself: left over from another artefact, it would be mixed with this one
WEIGHTS = re.compile(r"[^/]*(\.safetensors|\.bin|\.pt|\.index\.json)|adapter_config\.json")
# settings of other libraries that name where something was loaded from
REFERENCES = ("base_model_name_or_path", "_name_or_path", "_model_name_or_path", "name_or_path", "tokenizer_file")
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
TEXTS = (".json", ".md", ".jinja", ".txt", ".html")
# an absolute path of two names or more: not the rest of a URL, of a fraction or of a closing tag
_PATH = re.compile(r"(?<![\w.:/<~-])~?(?:/[^/\s'\",;:]+)+/([^/\s'\",;:]+)/?")
LOG_IN = "export HF_TOKEN=... with a token that may write, or run: hf auth login"
FIXES = {
    401: f"the hub does not know this token: {LOG_IN}",
    403: "use a token with write access to this repository, or another --hub.hub_model_id",
    404: "check --hub.hub_model_id: the owner must exist, and the token must see the repository",
    429: "the hub asks to wait: try again in some minutes",
}


def check(hub: HubSection) -> None:
    """For before hours of work: raises ArtefactError when push_to_hub is on and cannot succeed; else does nothing."""
    if not hub.push_to_hub:
        return
    api = _api()
    who = _ask(api, "say whose token this is", api.whoami)
    access = (who.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise ArtefactError(Problem("hub.push_to_hub needs a token that may write; this one may only read", fix=LOG_IN))
    owner = hub.hub_model_id.partition("/")[0]
    known = [who.get("name"), *(org.get("name") for org in who.get("orgs") or [])]
    if owner not in known:
        warning(
            "the hub token is of another owner than hub.hub_model_id", owner=owner, token_of=", ".join(map(str, known))
        )
    _warn_of_public(api, hub)


def push(directory: Path, hub: HubSection, *, message: str, evaluation: Evaluation | None = None) -> str:
    """Upload a complete artefact (or the adapter/ of a complete run) and return the URL of the commit.

    An evaluation of it goes into the card that is published; the artefact here stays as it was sealed.
    Raises ArtefactError when a file has no place in public, when the repository holds other weights, and for every
    error of the hub; running it again uploads only what is missing.
    """
    api, repository, branch = _api(), hub.hub_model_id, hub.hub_revision or None
    with _public_copy(directory, hub, evaluation) as public:
        names = sorted(path.relative_to(public).as_posix() for path in public.rglob("*") if path.is_file())
        _ask(
            api,
            f"create {repository}",
            lambda: api.create_repo(repository, private=hub.hub_private_repo, exist_ok=True),
        )
        if branch:
            _ask(
                api,
                f"create the branch {branch} of {repository}",
                lambda: api.create_branch(repository, branch=branch, exist_ok=True),
            )
        there = _ask(api, f"list {repository}", lambda: api.list_repo_files(repository, revision=branch))
        _refuse_mixture(repository, sorted(set(there) - set(names)))
        event("uploading to the hub", repository=repository, branch=branch or "default", files=len(names))
        commit = _ask(
            api,
            f"accept the upload to {repository}",
            lambda: api.upload_folder(repo_id=repository, folder_path=public, commit_message=message, revision=branch),
        )
    event("published", url=commit.commit_url)
    return str(commit.commit_url)


def provenance(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest for everyone: paths reduced to their last component, the command left out."""
    return {key: _without_paths(value, key) for key, value in manifest.items() if key != "command"}


def _api() -> HfApi:
    from huggingface_hub import HfApi, get_token

    token = _ask(None, "give a token", get_token)
    if not token:
        raise ArtefactError(Problem("hub.push_to_hub needs a token, and there is none", fix=LOG_IN))
    return HfApi(token=token)


def _ask(api: HfApi | None, what: str, call: Callable[[], Answer]) -> Answer:
    """What the hub answers; any of its errors, and any of the network's, is one ArtefactError with a fix."""
    # HTTPError is the HTTP library's own: a broken connection is no HfHubHTTPError
    from huggingface_hub.errors import HTTPError, OIDCError

    try:
        return call()
    except (HTTPError, OIDCError, OSError, ValueError, RuntimeError) as error:
        problem = _problem(what, error, str(api.token) if api else "")
    # outside the handler: as a cause, the library's exception would carry its text, and in it perhaps the token
    raise ArtefactError(problem)


def _problem(what: str, error: Exception, token: str) -> Problem:
    message = getattr(error, "server_message", None) or str(error)
    reason = next((line.strip() for line in message.splitlines() if line.strip()), type(error).__name__)
    if token:
        reason = reason.replace(token, "<token>")
    status = getattr(getattr(error, "response", None), "status_code", None)
    fix = FIXES.get(status or 0, "see the reason above; when it is the network or the hub, run the same again later")
    return Problem(f"the hub did not {what}{f' (status {status})' if status else ''}: {redact(reason)}", fix=fix)


def _warn_of_public(api: HfApi, hub: HubSection) -> None:
    repository = hub.hub_model_id
    if not hub.hub_private_repo or not _ask(api, f"find {repository}", lambda: api.repo_exists(repository)):
        return
    if not _ask(api, f"describe {repository}", lambda: api.model_info(repository)).private:
        warning("hub.hub_model_id exists and is public, so what is uploaded will be", repository=repository)


def _refuse_mixture(repository: str, others: list[str]) -> None:
    if strays := [name for name in others if WEIGHTS.fullmatch(name)]:
        raise ArtefactError(
            Problem(
                f"{repository} holds weights of something else, and loaders would mix them with these",
                strays[:5],
                "choose another --hub.hub_model_id, or delete those files there; nothing is deleted from here",
            )
        )


@contextmanager
def _public_copy(directory: Path, hub: HubSection, evaluation: Evaluation | None) -> Iterator[Path]:
    """What is uploaded: links to the artefact's files, and rewritten those that name this machine or this place."""
    directory = directory.resolve()
    manifest = _manifest_of(directory)
    names = _names(directory, manifest)
    with tempfile.TemporaryDirectory() as scratch:
        public = Path(scratch)
        rewritten = {}
        for name in names:
            target = public / name
            target.parent.mkdir(parents=True, exist_ok=True)
            text = _rewritten(directory / name, manifest, hub, evaluation)
            if text is None:
                target.symlink_to(directory / name)
            else:
                target.write_text(text, encoding="utf-8")
                rewritten[name] = {"sha256": files.sha256_file(target), "bytes": target.stat().st_size}
        facts = provenance({**manifest, "files": manifest["files"] | rewritten, "rewritten": sorted(rewritten)})
        files.write_json(public / PROVENANCE, facts)
        _refuse_private(public, directory)
        yield public


def _manifest_of(directory: Path) -> dict[str, Any]:
    """The artefact's manifest; for the adapter/ of a run the run's, with the files of that directory only."""
    if (directory / files.MANIFEST).exists():
        return files.verify(directory, hash_files=False)
    if (directory.parent / files.MANIFEST).exists():
        manifest = files.verify(directory.parent, hash_files=False)
        inside = f"{directory.name}/"
        listed = {n.removeprefix(inside): facts for n, facts in manifest["files"].items() if n.startswith(inside)}
        if listed:
            return {**manifest, "files": listed}
    raise ArtefactError(Problem("no complete artefact to publish: it has no manifest", str(directory), "make it anew"))


def _names(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """The artefact's files. Raises ArtefactError for each that is of another kind, or that nobody verified."""
    names = [path.relative_to(directory).as_posix() for path in files.artefact_files(directory)]
    problems = []
    for name in names:
        if PurePath(name).suffix.lower() not in SUFFIXES:
            fix = f"only {' '.join(SUFFIXES)} are published"
            problems.append(Problem(f"{name} is not a kind of file that is published", fix=fix))
        elif name not in manifest["files"]:
            problems.append(Problem(f"{name} is no part of the artefact that was verified", fix="move it elsewhere"))
    if problems:
        raise ArtefactError(problems[:10])
    return names


def _rewritten(path: Path, manifest: dict[str, Any], hub: HubSection, evaluation: Evaluation | None) -> str | None:
    """The text that is published instead of the file's own, or None when the file is published as it is."""
    if path.name == CARD:
        card = path.read_text(encoding="utf-8")
        published = cards.for_hub(card, hub.hub_model_id, hub.hub_revision)
        if evaluation:
            published = model_index.with_evaluation(published, hub.hub_model_id, evaluation)
        return published if published != card else None
    if path.suffix != ".json":
        return None
    settings = files.read_json(path)
    if not isinstance(settings, dict):
        return None
    changed = {
        key: PurePath(settings[key]).name
        for key in REFERENCES
        if isinstance(settings.get(key), str) and _is_local(settings[key], manifest)
    }
    return json.dumps(settings | changed, indent=2, ensure_ascii=False) + "\n" if changed else None


def _is_local(reference: str, manifest: dict[str, Any]) -> bool:
    base = manifest.get("base") or {}
    if base.get("revision") and base.get("source") == reference:  # a directory here may have the same name
        return os.path.isabs(reference)
    return os.path.isabs(reference) or Path(reference).is_dir()


def _without_paths(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {_without_paths(name): _without_paths(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(inner, key) for inner in value]
    if not isinstance(value, str) or key == "system_prompt":  # a prompt is a prompt: /no_think is no path
        return value
    if key in ("path", "directory") or os.path.isabs(value):
        return PurePath(value).name
    return _PATH.sub(r"\1", value)


def _refuse_private(public: Path, directory: Path) -> None:
    """A last look at what leaves: no text names this user's home, the working directory or the artefact's place."""
    places = {os.path.expanduser("~"), os.getcwd(), str(directory.parent)}
    private = sorted(f"{place}/" for place in places if len(PurePath(place).parts) > 1)
    for path in sorted(public.rglob("*")):
        if path.suffix in TEXTS and path.name not in VOCABULARIES and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            if matches := [place for place in private if place in text]:
                name = path.relative_to(public).as_posix()
                raise ArtefactError(
                    Problem(f"{name} names a directory of this machine", matches[0], "make the artefact without it")
                )
