"""A person's own metric: `FILE.py:FUNCTION`, a function of the predicted text and the example; higher is better."""

from __future__ import annotations

import importlib.util
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from utils.artifacts import files
from utils.exceptions import ConfigError, Problem

SHAPE = "def metric(prediction: str, example: dict) -> float"


def is_own(written: str) -> bool:
    """Whether a metric is named as a function of a file."""
    return written.partition(":")[0].endswith(".py")


@dataclass(frozen=True)
class OwnFunction:
    """The function, as the value of a generated answer. `recorded` identifies it by its file's contents."""

    name: str
    path: Path
    function: Any
    recorded: str
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    known: dict[tuple[str, str], float] = field(default_factory=dict)

    def on(self, examples: Sequence[Mapping[str, Any]]) -> OwnFunction:
        """The same for answers to these examples; each answer is judged once."""
        return replace(self, examples={str(example["id"]): example for example in examples}, known={})

    def __call__(self, answer: Mapping[str, Any]) -> float:
        """The value of a generated answer. Raises ConfigError where the function fails."""
        key = (answer["name"], answer["text"])
        if key not in self.known:
            self.known[key] = self.checked(answer["text"], self.examples[answer["name"]])
        return self.known[key]

    def checked(self, text: str, example: Mapping[str, Any]) -> float:
        """What the function says, as a finite number. Raises ConfigError where it raises or says something else."""
        try:
            value = self.function(text, dict(example))
        except Exception as error:  # whatever a person's code raises is theirs to read
            raise self._refused(f"raises {_where(error, self.path)}", text, example) from error
        if not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
            raise self._refused(f"returns {type(value).__name__} and not a number", text, example)
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise self._refused(f"returns no number ({error})", text, example) from error
        if not math.isfinite(number):
            raise self._refused(f"returns {number}", text, example)
        return number

    def tried_on(self, examples: Sequence[Mapping[str, Any]]) -> float:
        """How much better gold answers are than empty ones, on average.

        Raises ConfigError where the function fails, says two things of the same answer, or likes no answer better.
        """
        gold, nothing = 0.0, 0.0
        for example in examples:
            answer = str(example["answers"][0])
            first = self.checked(answer, example)
            if self.checked(answer, example) != first:
                raise self._refused("says two things of the same answer; it has to be repeatable", answer, example)
            gold, nothing = gold + first, nothing + self.checked("", example)
        if not gold > nothing:
            shown = f"gold answers {gold / len(examples):.4g}, empty ones {nothing / len(examples):.4g} on average"
            raise ConfigError(
                Problem(
                    f"evaluate.primary: {self.name} does not tell gold answers from empty ones on dev ({shown})",
                    str(self.path),
                    "higher has to be better; look at the function with an example of task_dev.jsonl",
                )
            )
        return (gold - nothing) / len(examples)

    def _refused(self, what: str, text: str, example: Mapping[str, Any]) -> ConfigError:
        shown = f"prediction {text[:60]!r}, example {str(example.get('id'))!r}"
        return ConfigError(Problem(f"evaluate.primary: {self.name} {what} ({shown})", str(self.path), f"write {SHAPE}"))


def load(written: str) -> OwnFunction:
    """The function that `FILE.py:FUNCTION` names. Raises ConfigError where it cannot be loaded."""
    place, _, name = written.rpartition(":")
    path = Path(place)
    if not path.is_file():
        raise ConfigError(Problem("evaluate.primary: no such file", place, f"write FILE.py:FUNCTION; {SHAPE}"))
    spec = importlib.util.spec_from_file_location(f"metric_of_{path.stem}", path)
    assert spec is not None  # a file that ends in .py has both
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        what = f"evaluate.primary: {path.name} cannot be imported: {_where(error, path)}"
        raise ConfigError(Problem(what, str(path), "python " + str(path))) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        fix = f"its functions are {', '.join(there)}" if there else f"write {SHAPE}"
        raise ConfigError(Problem(f"evaluate.primary: {path.name} has no function {name}", written, fix))
    return OwnFunction(name, path, function, f"{name} {files.sha256_file(path)}")


def _where(error: BaseException, path: Path) -> str:
    """The error with the line of the person's file that it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    if isinstance(error, SyntaxError) and error.lineno:
        lines = [error.lineno]
    at = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{at}"
