"""The tokenizer that came with an adapter: in what it differs from the base's, and which of the two is used.

Trainers save a tokenizer beside an adapter. Where it is the base's there is nothing to say. Another chat template,
further tokens or another end mean prompts that the adapter was not trained on, so the person says which is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import InputsSection
from utils.artifacts import files
from utils.artifacts.runs import Run
from utils.exceptions import ArtefactError, Problem
from utils.logger import event
from utils.models import chat
from utils.models.base_model import TOKENIZER_FILES, BaseModel
from utils.models.directory_checks import leads_out, readable
from utils.models.weights.tensor_names import tensor_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# key of a run's manifest: the folder whose tokenizer was chosen
KEY = "tokenizer_from"
# key of a composed run's manifest: what `inputs.tokenizer` said when it was made
CHOICE = "tokenizer"
_NAMED = 4
# tokens that decide what a prompt is and where an answer ends; padding is by position here
_ROLES = ("bos_token", "eos_token")
_PROBE = "What does json.dumps(obj, *, indent=None) do?\n\n  Über 1,234 naïve ways — 東京 🙂 of  saying\tso."


def choose(directory: Path, base: BaseModel, inputs: InputsSection) -> dict[str, str]:
    """What a manifest records of an adapter whose own tokenizer is to be used; empty where the base's is.

    Raises ArtefactError when it differs and nothing was chosen, or when the base cannot be used with it.
    """
    differences = compare(directory, base)
    if not differences:
        return {}
    if not inputs.tokenizer:
        fix = (
            "--inputs.tokenizer adapter renders prompts as this adapter was trained, --inputs.tokenizer base as the "
            "base model does"
        )
        what = f"{directory} came with a tokenizer of its own: {'; '.join(differences)}"
        raise ArtefactError(Problem(what, fix=fix))
    event("the adapter came with another tokenizer", path=directory, uses=inputs.tokenizer, differs=differences)
    if inputs.tokenizer == "base":
        return {}
    _refuse_unusable(directory, base)
    return {KEY: str(directory)}


def remembered(inputs: InputsSection, base: BaseModel) -> dict[str, str]:
    """What the manifest of a composed run records, so that later commands need not choose again."""
    choice = {CHOICE: inputs.tokenizer} if inputs.tokenizer else {}
    return choice | ({KEY: str(base.tokenizer_from)} if base.tokenizer_from else {})


def as_composed(inputs: InputsSection, composed: Run) -> InputsSection:
    """The settings for the adapters of a composed run: without a choice the one that it was made with, else base."""
    return inputs if inputs.tokenizer else inputs.model_copy(update={CHOICE: composed.manifest.get(CHOICE, "base")})


def compare(directory: Path, base: BaseModel) -> list[str]:
    """In what the tokenizer beside an adapter differs from the base's, as phrases; empty where it does not."""
    own, usual = _loaded(directory, base), chat.load_tokenizer(base.directory)
    if own is None:
        return []
    differences = []
    if own.chat_template and str(own.chat_template).strip() != str(usual.chat_template).strip():
        differences.append("another chat template")
    ours, theirs = usual.get_vocab(), own.get_vocab()
    if added := sorted(theirs.keys() - ours.keys(), key=lambda token: theirs[token]):
        named = ", ".join(added[:_NAMED]) + (", ..." if len(added) > _NAMED else "")
        differences.append(f"{len(added)} added tokens ({named})")
    moved = sum(theirs.get(token) != number for token, number in ours.items())
    if moved:
        differences.append(f"another vocabulary ({moved:,} tokens of the base's have other numbers or none)")
    for role in _ROLES:
        if (mine := getattr(own, role)) != (other := getattr(usual, role)):
            differences.append(f"{role} {mine} instead of {other}")
    if not differences and chat.text_ids(own, [_PROBE]) != chat.text_ids(usual, [_PROBE]):
        differences.append("another way of cutting text into tokens")
    return differences


def of(base: BaseModel) -> PreTrainedTokenizerBase:
    """The tokenizer that is used with the base: its own, or that of the adapter which was chosen."""
    usual = chat.load_tokenizer(base.directory)
    if base.tokenizer_from is None:
        return usual
    own = _loaded(base.tokenizer_from, base)
    return usual if own is None else own


def write(base: BaseModel, directory: Path) -> None:
    """Put the tokenizer that is used with the base into a model's folder, in place of what is there."""
    for name in TOKENIZER_FILES:
        (directory / name).unlink(missing_ok=True)
    of(base).save_pretrained(directory)


def with_chosen(base: BaseModel, adapters: Sequence[Run]) -> BaseModel:
    """The base with the tokenizer that was chosen for these adapters, if any. Raises ArtefactError for two."""
    folders = {Path(run.manifest[KEY]) for run in adapters if run.manifest.get(KEY)}
    if not folders:
        return base
    if gone := [str(folder) for folder in folders if not files_in(folder)]:
        what = "the tokenizer that was chosen with an adapter is gone"
        raise ArtefactError(Problem(what, gone, "bring it back, or say --inputs.tokenizer base"))
    digests = {folder: digest(folder) for folder in folders}
    if len(set(digests.values())) > 1:
        what = "these adapters came with different tokenizers, and one model has one"
        raise ArtefactError(Problem(what, sorted(map(str, folders)), "--inputs.tokenizer base"))
    chosen = min(folders)
    return replace(base, tokenizer_from=chosen, tokenizer_choice=digests[chosen])


def digest(directory: Path) -> str:
    """What identifies the tokenizer beside an adapter: the contents of its files."""
    return files.fingerprint({path.name: files.sha256_file(path) for path in files_in(directory)})


def files_in(directory: Path) -> list[Path]:
    """The tokenizer's files beside an adapter. Raises ArtefactError for one that leads out of its folder."""
    paths = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if out := [path for path in paths if leads_out(path, directory)]:
        raise ArtefactError(Problem(f"{out[0]} leads out of {directory}", fix="put the file itself there"))
    return paths


def _loaded(directory: Path, base: BaseModel) -> PreTrainedTokenizerBase | None:
    """The adapter's tokenizer; the base's with the adapter's template where only that is there; None without either."""
    from transformers import AutoTokenizer

    names = {path.name for path in files_in(directory)}
    if names.isdisjoint(TOKENIZER_FILES):
        return None
    usual = chat.load_tokenizer(base.directory)
    if names.isdisjoint(("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")):
        template = _template(directory)
        if not template:
            return None
        usual.chat_template = template
        return usual
    with readable(directory):
        own: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    if own.eos_token is None:
        own.eos_token = usual.eos_token
    if not own.chat_template:
        own.chat_template = usual.chat_template
    chat.adopt_ends(own, usual)
    return own


def _template(directory: Path) -> str:
    """The chat template that stands beside an adapter without a tokenizer."""
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (directory / name).is_file() and isinstance(settings := files.read_object(directory / name), dict):
            template = settings.get("chat_template")
            if isinstance(template, str):
                return template
    return ""


def _refuse_unusable(directory: Path, base: BaseModel) -> None:
    """Every token of the base has to mean the same, and every further one has to have its row in the embeddings."""
    own, usual = _loaded(directory, base), chat.load_tokenizer(base.directory)
    theirs = {} if own is None else own.get_vocab()
    problems = []
    if moved := [token for token, number in usual.get_vocab().items() if theirs.get(token) != number]:
        what = f"{directory}: {len(moved):,} of the base's tokens have other numbers in it: it is another model's"
        problems.append(Problem(what, moved[:_NAMED], "--inputs.tokenizer base"))
    shapes = tensor_shapes(base.directory)
    rows = max((shape[0] for name, shape in shapes.items() if "embed" in name or "wte" in name), default=None)
    if rows is not None and (beyond := [token for token, number in theirs.items() if number >= rows]):
        what = f"{directory}: {len(beyond)} of its tokens have no row in the base's embeddings ({rows:,})"
        problems.append(Problem(what, beyond[:_NAMED], "--inputs.tokenizer base"))
    if problems:
        raise ArtefactError(problems)
