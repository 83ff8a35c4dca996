"""What can go wrong, as a small family of exceptions.

A message names every problem at once, the offending value, and the command or edit that fixes it.
`utils.cli.run` turns these into text on stderr and an exit code; nothing else prints a traceback on purpose.

| class              | exit code | meaning                                                        |
|--------------------|-----------|----------------------------------------------------------------|
| ConfigError        | 2         | a setting, flag or environment variable is wrong               |
| DataError          | 2         | a corpus, a task file or a prompt file cannot be used          |
| ArtefactError      | 2         | a run, adapter or model directory is missing, damaged, unfit   |
| EngineError        | 2         | a server of answers cannot be started, attached to, or asked   |
| NonFiniteError     | 3         | a loss, gradient or weight became NaN or infinite              |
| VerificationError  | 4         | a result failed its own check and was therefore not published  |
| BalancerError      | 2         | the balancer does not answer, or does not do what it was told  |
| RolledBack         | 5         | the candidate is worse, unsafe, or a person stopped it         |
| Undecided          | 6         | rolled back at the deadline for want of trustworthy data       |
| Incident           | 7         | rolled back at the deadline while production was failing       |
| OutOfMemory        | 71        | memory ran out; what is finished is kept                       |
| Interrupted        | 75        | stopped by a signal after writing a checkpoint; run it again   |
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from utils.secrets import redact


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, the value that is to blame, and what to do about it."""

    what: str
    value: object = None
    fix: str = ""

    def __str__(self) -> str:
        text = self.what if self.value is None else f"{self.what} (got {self.value!r})"
        return f"{text}\n      -> {self.fix}" if self.fix else text


def did_you_mean(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    """A fix that names what is spelled alike; empty where nothing is."""
    known = sorted(candidates)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    if not close:  # a right field in the wrong section is the commonest slip, and far in edit distance
        close = [c for c in known if c.rpartition(".")[2] == name.rpartition(".")[2]][:3]
    return "did you mean " + " or ".join(f"{prefix}{c}" for c in close) + "?" if close else ""


# so many names of a folder are listed beside a path where nothing is
NAMES_SHOWN = 8


def path_fix(path: str | Path) -> str:
    """How a path where nothing is can be corrected: what is spelled alike beside it, else where relative ones start."""
    path, names = Path(path).expanduser(), list[str]()
    with suppress(OSError):
        names = [one.name for one in itertools.islice(path.parent.iterdir(), 1_000) if not one.name.startswith(".")]
    if close := difflib.get_close_matches(path.name, sorted(names), n=2, cutoff=0.6):
        return "did you mean " + " or ".join(str(path.parent / name) for name in close) + "?"
    if 0 < len(names) <= NAMES_SHOWN:
        return f"correct the path: {path.parent} has {', '.join(sorted(names))}"
    start = "" if path.is_absolute() else f"; it starts at the current folder, {Path.cwd()}"
    return f"correct the path{start}"


# what Python raises if values of JSON that others wrote have an unexpected type
MALFORMED = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


class PipelineError(Exception):
    """Base of everything this project raises on purpose; `exit_code` is the process's exit status."""

    exit_code = 1
    title = "error"

    def __init__(self, problems: Problem | str | Sequence[Problem | str]):
        listed = [problems] if isinstance(problems, (Problem, str)) else list(problems)
        self.problems: list[Problem] = [p if isinstance(p, Problem) else Problem(p) for p in listed]
        super().__init__(str(self))

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return redact(f"{self.title}: {self.problems[0]}")
        lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(self.problems, 1))
        return redact(f"{self.title}: {len(self.problems)} problems\n{lines}")


class ConfigError(PipelineError):
    exit_code = 2
    title = "configuration error"


class DataError(PipelineError):
    exit_code = 2
    title = "data error"


class ArtefactError(PipelineError):
    exit_code = 2
    title = "artefact error"


class EngineError(PipelineError):
    """A server of answers cannot be started, is not the one that is needed, or was lost."""

    exit_code = 2
    title = "engine error"


class NonFiniteError(PipelineError):
    exit_code = 3
    title = "non-finite number"


class VerificationError(PipelineError):
    exit_code = 4
    title = "verification failed"


class Interrupted(PipelineError):
    # 75 is EX_TEMPFAIL of sysexits.h: schedulers that requeue on it exist, and it cannot be mistaken for success
    exit_code = 75
    title = "interrupted"


class OutOfMemory(PipelineError):
    """The machine, not the input, was too small: what is finished is kept, and nothing half-written appears."""

    # EX_OSERR of sysexits.h
    exit_code = 71
    title = "out of memory"


def is_out_of_memory(error: BaseException) -> bool:
    """MemoryError (numpy's and Arrow's too), torch's OutOfMemoryError, and the bare RuntimeErrors of its CPU side."""
    phrases = ("can't allocate memory", "can't start new thread", "Cannot allocate memory", "failed to map segment")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in phrases))
    )


def is_lost_process(error: BaseException) -> bool:
    """What a process hears when another one of a distributed run ended: torch's DistError, or gloo's RuntimeError."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, RuntimeError) and ("DistError" in kinds or "gloo/transport" in str(error))


def explained(error: Exception, rank: int = 0) -> PipelineError | None:
    """What no stage foresaw about memory, a file or another process, as an error of ours; None for anything else."""
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    if is_out_of_memory(error):
        problem = Problem(f"{reason}; what was complete before is as it was", fix="use a machine with more memory")
        return OutOfMemory(problem)
    if is_lost_process(error):
        what = f"another process of this run ended or cannot be reached: {reason}"
        return Interrupted(Problem(what, f"process {rank}", "see what it said; run the same command again"))
    if isinstance(error, OSError):
        return ArtefactError(Problem(f"cannot use {error.filename or 'a file'}: {error.strerror or error}"))
    return None


class BalancerError(PipelineError):
    """The balancer does not answer, or does not do what it was told."""

    exit_code = 2
    title = "balancer error"


class RolledBack(PipelineError):
    """The candidate is worse, unsafe, or a person stopped it."""

    exit_code = 5
    title = "rolled back"


class Undecided(PipelineError):
    """The deadline passed without enough trustworthy data."""

    exit_code = 6
    title = "rolled back without a verdict"


class Incident(PipelineError):
    """The deadline passed while production itself was failing."""

    exit_code = 7
    title = "rolled back during an incident of production"
