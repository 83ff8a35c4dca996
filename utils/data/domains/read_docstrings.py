"""The child process of python_docs: prints the documented objects of the modules in `sys.argv` as one line of JSON.

Run by its path with -I and -S, so it imports the standard library alone: what this project imports must not change
what a module documents.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType

SKIPPED_PARTS = frozenset(["__main__", "test", "tests"])
# the public module whose functions are written in a differently named C module
ACCELERATORS = {"os": ("posix", "nt"), "os.path": ("posixpath", "ntpath"), "threading": ("_thread",)}
SIGNATURE_CHARACTERS = 200

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_DOCUMENTED = (type, staticmethod, classmethod, property)


def print_entries() -> None:
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
    for submodule in sorted(pkgutil.iter_modules(getattr(module, "__path__", [])), key=lambda info: info.name):
        if not submodule.name.startswith("_") and submodule.name not in SKIPPED_PARTS:
            yield from _import_with_submodules(f"{name}.{submodule.name}")


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


if __name__ == "__main__":
    print_entries()
