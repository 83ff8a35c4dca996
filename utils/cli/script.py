"""What every script does around its `main`: help, dry run, the result as JSON, and an exit code for each error."""

from __future__ import annotations

import functools
import logging
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal, NoReturn, TextIO

from config import Config, reason_of
from utils import flags, logger, signals
from utils.cli import help_text, settings_files
from utils.cli.command_line import resolve
from utils.exceptions import ConfigError, Interrupted, PipelineError, explained

# which ranks run a script's `main`
Ranks = Literal["led", "all", "first"]
# 128 + SIGPIPE, as a shell says it of a program whose reader went away
READER_GONE = 141
# flags whose text may be any
TEXTS = ("--prompt", "--inference.prompt")
# characters of a setting in the first line of a script
LONGEST_SHOWN = 80


def run(
    main: Callable[[Config], dict[str, Any]],
    plan: Callable[[Config], list[str]],
    *,
    sections: Sequence[str],
    description: str | None,
    most_used: Sequence[str] = (),
    argv: Sequence[str] | None = None,
    status: Callable[[dict[str, Any]], int] = lambda result: 0,
    ranks: Ranks = "led",
) -> NoReturn:
    """Parse, check, run `main`, print its result as one line of JSON and exit; errors become text and an exit code.

    `sections` are those that the script reads, its own first; `most_used` are the settings on the first page of help.
    `status` gives the exit code of a result. Launched in several ranks, `main` runs on the first, which calls the
    others for what all of them do ("led"), on "all" of them, or on the "first" alone, for which the others do not wait.
    """
    _open_closed_streams()
    with logger.clean_output():
        arguments, level = _verbosity(list(sys.argv[1:] if argv is None else argv))
        logger.setup(level)
        _prepare_process(quiet=level == logger.WARNING)
        launched = functools.partial(_on_ranks, main, ranks)
        code = _exit_code(launched, plan, arguments, sections, most_used, description or "", status)
        _leave_ranks()
        # a list, because both have to be flushed before the interpreter does it and complains
        sys.exit(code if all([_flushed(stream) for stream in (sys.stdout, sys.stderr)]) else READER_GONE)


def _on_ranks(main: Callable[[Config], dict[str, Any]], ranks: Ranks, config: Config) -> dict[str, Any]:
    """`main(config)` in as many ranks as there are; the result is rank 0's."""
    from utils.models.parallel import launcher

    if ranks == "first":
        return main(config) if logger.rank() == 0 else {}
    if launcher.take().processes == 1:
        return main(config)
    from utils.models.parallel import lifecycle

    return lifecycle.run(main, config, on_all=ranks == "all")


def _leave_ranks() -> None:
    if (lifecycle := sys.modules.get("utils.models.parallel.lifecycle")) is not None:
        lifecycle.leave()


def _exit_code(
    main: Callable[[Config], dict[str, Any]],
    plan: Callable[[Config], list[str]],
    arguments: list[str],
    sections: Sequence[str],
    most_used: Sequence[str],
    description: str,
    status: Callable[[dict[str, Any]], int],
) -> int:
    try:
        if (topics := help_text.topics(arguments)) is not None:
            print(help_text.page(description, sections, most_used, topics))
            return 0
        dry_run = "--dry-run" in arguments
        config = resolve([a for a in arguments if a not in ("--dry-run", settings_files.PRINT)], os.environ)
        if settings_files.PRINT in arguments:
            print(settings_files.as_yaml(config, sections), end="")
            return 0
        if dry_run:
            print(_card(config, sections, plan(config)))
            result: dict[str, Any] = {"dry_run": True, "config": config.model_dump(mode="json")}
        else:
            if "base" in sections:
                _log_settings(config)
            with signals.terminable():
                result = main(config)
        if logger.rank() == 0:
            print(logger.json_line(result), flush=True)
    except PipelineError as error:
        # the same settings were given to all ranks of a node, so its first one says what is wrong with them
        if logger.rank() == 0 or (isinstance(error, ConfigError) and os.environ.get("LOCAL_RANK") == "0"):
            _complain(str(error))
        return error.exit_code
    except signals.Terminated:
        if logger.rank() == 0:
            _complain("stopped by SIGTERM; nothing is half-written, run the same command again")
        return Interrupted.exit_code
    except KeyboardInterrupt:
        if logger.rank() == 0:
            _complain("interrupted")
        return 130
    except Exception as error:  # noqa: BLE001 - shown here, because the interpreter would show it with secrets in it
        if isinstance(error, BrokenPipeError) and _reader_is_gone(sys.stdout):
            _silence(sys.stdout)
            return READER_GONE
        explanation = explained(error, logger.rank())
        _complain(str(explanation) if explanation else traceback.format_exc())
        return explanation.exit_code if explanation else 1
    return 0 if dry_run or logger.rank() else status(result)


def _log_settings(config: Config) -> None:
    """Preset, run and own settings, before torch is imported, which takes seconds; a prompt is nobody else's."""
    own = {path: flags.shown(flags.value_of(config, path)) for path in config.overrides if f"--{path}" not in TEXTS}
    values = {
        path: value if len(value) <= LONGEST_SHOWN else f"{value[:LONGEST_SHOWN]}..." for path, value in own.items()
    }
    whose = "" if "base.source" in config.overrides else " (default; see --base.source)"
    base = "" if "base.source" in values else f", base model {config.base.source}{whose}"
    logger.event(f"preset {config.preset}{base}, run {config.run.name or 'named by its settings'}", **values)


def _complain(text: str) -> None:
    with suppress(BrokenPipeError):
        print(logger.printable(text), file=sys.stderr)


def _flushed(stream: TextIO) -> bool:
    """Whether everything got out; where the reader has ended, as `head` does, the rest goes nowhere."""
    try:
        stream.flush()
    except BrokenPipeError:
        _silence(stream)
        return False
    return True


def _reader_is_gone(stream: TextIO) -> bool:
    """Whether nothing reads a stream that is a pipe any more."""
    with suppress(OSError, ValueError):  # of a stream that is no file
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _silence(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _open_closed_streams() -> None:
    """A shell's `>&-` leaves no stream, and the next file that is opened would get its number and what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115


def _verbosity(arguments: list[str]) -> tuple[list[str], int]:
    """The arguments without -q and -v, and the level that they ask for."""
    levels = {"-q": logger.WARNING, "--quiet": logger.WARNING, "-v": logger.DEBUG, "--verbose": logger.DEBUG}
    rest, level = [], logger.INFO
    for word in arguments:
        if word in levels and (not rest or rest[-1] not in TEXTS):
            level = levels[word]
        else:
            rest.append(word)
    return rest, level


def _prepare_process(*, quiet: bool = False) -> None:
    """Process-wide defaults that must be set before torch is imported; each can be overridden from outside."""
    # GNU OpenMP's threads spin while they wait: with other work on the cores a training step took 8x longer so
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if quiet or logger.rank() > 0 or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _card(config: Config, sections: Sequence[str], plan: list[str]) -> str:
    lines = [f"preset {config.preset}: {reason_of(config.preset)}"]
    for path in flags.fields():
        if path.split(".")[0] in sections:
            value = flags.shown(flags.value_of(config, path))
            lines.append(f"  {path:<40} {value:<44} {config.overrides.get(path, 'preset')}")
    return "\n".join([*lines, "", "would do:", *(f"  - {step}" for step in plan)])
