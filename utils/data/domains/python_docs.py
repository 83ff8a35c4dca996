"""The demo domain that needs no download: the documentation of the running Python.

Reads the docstrings of the standard library's modules, functions, classes and methods by importing them in a clean
child process (about 2 s); writes nothing. The texts and their order are the same every time for one Python version:
nothing depends on `hash()`, a set's order, a memory address, or on what this process has imported: transformers adds
methods to `logging.Logger`, torch replaces `inspect.getfile`, and a corpus must not change with that.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.exceptions import DataError, Problem

# they open windows or browsers, print when imported, or are tests and demos; setuptools may replace distutils
SKIPPED_MODULES = frozenset(
    ["antigravity", "distutils", "idlelib", "lib2to3", "pydoc_data", "test", "this", "tkinter", "turtle", "turtledemo"]
)
CHILD = Path(__file__).with_name("read_docstrings.py")
ANSWER_CHARACTERS = range(15, 201)
NUM_CHOICES = 4

_ONLY_SIGNATURE = re.compile(r"[\w.]+\(.*\)(\s*->.*)?\.?")
# "e.g. " and "i.e. " do not end a sentence
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)\.\s")


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
    # -I and -S: no environment variables, no site-packages, none of their .pth files
    command = [sys.executable, "-I", "-S", str(CHILD), *modules]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        fix = "run this command to see why, or name fewer modules"
        what = f"the documentation of this Python cannot be read: exit code {done.returncode}"
        raise DataError(Problem(what, done.stderr[-500:], fix))
    return json.loads(done.stdout.rpartition("\n")[2])


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
