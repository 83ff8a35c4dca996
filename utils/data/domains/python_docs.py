"""The demo domain that needs no download: the documentation of the running Python.

Reads the docstrings of the standard library's modules, functions, classes and methods by importing them in a clean
child process (about 2 s); writes nothing. The texts and their order are the same every time for one Python version:
nothing depends on `hash()`, a set's order, a memory address, or on what this process has imported: transformers adds
methods to `logging.Logger`, torch replaces `inspect.getfile`, and a corpus must not change with that.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import io
import json
import pkgutil
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from utils.exceptions import DataError, Problem

# they open windows or browsers, print when imported, or are tests and demos; setuptools may replace distutils
SKIPPED_MODULES = frozenset(
    ["antigravity", "distutils", "idlelib", "lib2to3", "pydoc_data", "test", "this", "tkinter", "turtle", "turtledemo"]
)
SKIPPED_PARTS = frozenset(["__main__", "test", "tests"])
# the public module whose functions are written in a differently named C module
ACCELERATORS = {"os": ("posix", "nt"), "os.path": ("posixpath", "ntpath"), "threading": ("_thread",)}
SIGNATURE_CHARACTERS = 200
ANSWER_CHARACTERS = range(15, 201)
NUM_CHOICES = 4

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_ONLY_SIGNATURE = re.compile(r"[\w.]+\(.*\)(\s*->.*)?\.?")
# "e.g. " and "i.e. " do not end a sentence
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)\.\s")
_DOCUMENTED = (type, staticmethod, classmethod, property)


def standard_modules() -> list[str]:
    """The public top-level modules of this Python's standard library, sorted; some fail to import on some platforms."""
    return sorted(n for n in sys.stdlib_module_names if not n.startswith("_") and n not in SKIPPED_MODULES)


def python_documents(modules: Sequence[str]) -> Iterator[dict[str, str]]:
    """{"id": "json.dumps", "module": "json", "text": signature and docstring} for every documented public object.

    Each name stands for the module and its public submodules; `module` is the top-level name. A module that cannot be
    imported is left out, and a docstring that was already seen is left out.
    Raises DataError if the child process fails.
    """
    for entry in _entries(tuple(modules)):
        text = f"{entry['id']}{entry['signature']}\n\n{entry['doc']}\n"
        yield {"id": entry["id"], "module": entry["module"], "text": text}


def python_qa(modules: Sequence[str]) -> list[dict[str, Any]]:
    """Labelled examples in the common form: what an object does, answered by the first sentence of its docstring.

    `document` is the top-level module. The choices are the answer and 3 answers of the same module, or None where the
    module has fewer than 4. A sentence that describes two objects is left out: no model could know which was meant.
    Raises DataError if the child process fails.
    """
    answers = [(entry, _summary(entry["doc"])) for entry in _entries(tuple(modules))]
    times = Counter(answer.casefold() for _, answer in answers if answer)
    kept = [(entry, answer) for entry, answer in answers if answer and times[answer.casefold()] == 1]
    per_module: dict[str, list[str]] = {}
    for entry, answer in kept:
        per_module.setdefault(entry["module"], []).append(answer)
    return [_example(entry, answer, per_module[entry["module"]]) for entry, answer in kept]


@functools.cache
def _entries(modules: tuple[str, ...]) -> list[dict[str, str]]:
    root = Path(__file__).resolve().parents[3]
    code = f"import sys; sys.path.append({str(root)!r}); from utils.data import python_docs as p; p.print_entries()"
    # -I and -S: no environment variables, no site-packages, none of their .pth files
    command = [sys.executable, "-I", "-S", "-c", code, *modules]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        fix = "run this command to see why, or name fewer modules"
        what = f"the documentation of this Python cannot be read: exit code {done.returncode}"
        raise DataError(Problem(what, done.stderr[-500:], fix))
    return json.loads(done.stdout.rpartition("\n")[2])


def print_entries() -> None:
    """What the child process does: print the entries of the modules in `sys.argv` as one line of JSON."""
    line = json.dumps(list(_collect(sys.argv[1:])))
    # on a line of its own: a C module may have printed something before
    sys.stdout.write(f"\n{line}")


def _collect(names: Sequence[str]) -> Iterator[dict[str, str]]:
    seen_docs: set[str] = set()
    seen_ids: set[str] = set()  # unittest.main is a class and a submodule
    # all imports before the first look: importing a submodule changes what its parent holds
    imported = [(name, list(_import_with_submodules(name))) for name in names]
    for name, modules in imported:
        for module in modules:
            for identity, value in _public_objects(module):
                whole = _own_doc(value)
                signature, doc = _signature_and_rest(identity, value, whole)
                # an alias has the same whole docstring, a sibling function may differ in the signature line alone
                if doc and identity not in seen_ids and seen_docs.isdisjoint((whole, doc)):
                    seen_docs.update((whole, doc))
                    seen_ids.add(identity)
                    yield {"id": identity, "module": name.partition(".")[0], "signature": signature, "doc": doc}


def _import_with_submodules(name: str) -> Iterator[ModuleType]:
    module = _import_silently(name)
    if module is None:
        return
    yield module
    for found in sorted(pkgutil.iter_modules(getattr(module, "__path__", [])), key=lambda info: info.name):
        if not found.name.startswith("_") and found.name not in SKIPPED_PARTS:
            yield from _import_with_submodules(f"{name}.{found.name}")


def _import_silently(name: str) -> ModuleType | None:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit):  # noqa: BLE001 - modules of other platforms fail in their own ways
            return None


def _public_objects(module: ModuleType) -> Iterator[tuple[str, object]]:
    yield module.__name__, module
    listed = getattr(module, "__all__", None)
    names = sorted(vars(module) if listed is None else set(listed))
    # an alias comes after the name it stands for, because the second of two equal docstrings is the one left out
    for name in sorted(names, key=lambda n: getattr(vars(module).get(n), "__name__", n) != n):
        value = vars(module).get(name)
        if name.startswith("_") or not callable(value) or not _is_own(value, module.__name__, listed is not None):
            continue
        identity = f"{module.__name__}.{name}"
        yield identity, value
        if isinstance(value, type):
            for member_name, member in sorted(vars(value).items()):
                if not member_name.startswith("_") and (callable(member) or isinstance(member, _DOCUMENTED)):
                    yield f"{identity}.{member_name}", member


def _is_own(value: object, module_name: str, is_listed: bool) -> bool:
    home = getattr(value, "__module__", None)
    if not isinstance(home, str):
        return False
    # asyncio.run lives in asyncio.runners, but `asyncio.__all__` says where people find it
    inside = is_listed and home.startswith(f"{module_name}.")
    return inside or home in (module_name, f"_{module_name}", *ACCELERATORS.get(module_name, ()))


def _own_doc(value: object) -> str:
    # inspect.getdoc alone would also return the docstring of a base class
    own = vars(value).get("__doc__") if isinstance(value, type) else getattr(value, "__doc__", None)
    return (inspect.getdoc(value) or "").strip() if isinstance(own, str) else ""


def _signature_and_rest(identity: str, value: object, doc: str) -> tuple[str, str]:
    repeated, doc = _split_repeated_signature(identity.rpartition(".")[2], doc)
    signature = "" if isinstance(value, (ModuleType, property)) else _signature(value) or repeated
    return _ADDRESS.sub("", signature if len(signature) <= SIGNATURE_CHARACTERS else ""), doc


def _split_repeated_signature(name: str, doc: str) -> tuple[str, str]:
    pattern = re.compile(rf"(?:[\w.]+\.)?{re.escape(name)}(?P<signature>\(.*\)(?:\s*->.*)?)")
    lines, signature = doc.split("\n"), ""
    while lines and (match := pattern.fullmatch(lines[0].strip())):
        signature = signature or match["signature"]
        lines.pop(0)
    rest = inspect.cleandoc("\n".join(lines)).strip()
    # a docstring that is nothing but its signature is kept as it is
    return (signature, rest) if rest else ("", doc)


def _signature(value: object) -> str:
    try:
        text = str(inspect.signature(value.__func__ if isinstance(value, (staticmethod, classmethod)) else value))
    except (TypeError, ValueError, NameError, AttributeError):
        return ""
    # a default that is a path of this installation
    return text.replace(repr(sys.executable), "sys.executable")


def _summary(doc: str) -> str | None:
    paragraph = " ".join(doc.split("\n\n", 1)[0].split())
    sentence = _SENTENCE_END.split(paragraph, maxsplit=1)[0].strip()
    if len(sentence) < len(paragraph):
        sentence = sentence.rstrip(".") + "."
    if len(sentence) not in ANSWER_CHARACTERS or sentence.startswith(("Alias", "Deprecated")) or ">>>" in sentence:
        return None
    return None if _ONLY_SIGNATURE.fullmatch(sentence) else sentence


def _example(entry: dict[str, str], answer: str, answers_of_module: list[str]) -> dict[str, Any]:
    choices = None
    if len(answers_of_module) >= NUM_CHOICES:
        others = sorted((a for a in answers_of_module if a != answer), key=lambda a: _order(entry["id"], "draw", a))
        choices = sorted([answer, *others[: NUM_CHOICES - 1]], key=lambda a: _order(entry["id"], "shuffle", a))
    return {
        "id": entry["id"],
        "document": entry["module"],
        "system": None,
        "history": [],
        "question": f"What does `{entry['id']}` do?",
        "context": None,
        "reasoning": None,
        "answers": [answer],
        "choices": choices,
        "answer_index": None if choices is None else choices.index(answer),
    }


def _order(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode()).digest()
