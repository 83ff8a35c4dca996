"""A person's own command on promotion and rollback: a message to a chat, a ticket, a deployment.

It is run without a shell, told by data alone, ended after a time, and nothing it does changes the rollout: by then the
traffic is where it belongs and the outcome is written.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.exceptions import ConfigError, Problem
from utils.logger import event, warning

VARIABLE = "ROLLOUT_EVENT"
# one variable of the environment holds 128 KiB
LONGEST_TEXT = 4000


def words(command: str) -> list[str]:
    """The command as its words, its program found. Raises ConfigError."""
    try:
        argv = shlex.split(command)
    except ValueError as error:
        raise ConfigError(Problem(f"--rollout.on_event: {error}", command, "quote it as in a shell")) from error
    if not argv or shutil.which(argv[0]) is None:
        fix = "give a program that can be run; for a pipe or a variable, write a script"
        raise ConfigError(Problem("--rollout.on_event is no command", command, fix))
    return argv


def tell(command: str, facts: dict[str, Any], log: Path, seconds: float) -> bool:
    """Run it with these facts; whether it ended with 0. Its output goes to `log`, where that can be written."""
    if not command:
        return True
    text = json.dumps({name: _short(value) for name, value in facts.items()}, ensure_ascii=True)
    why = ""
    try:
        with _output(log) as output:
            started = subprocess.Popen(
                words(command),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=os.environ | {VARIABLE: text},
                start_new_session=True,
            )
            try:
                started.communicate(text.encode(), timeout=seconds)
                why = f"exit code {started.returncode}" if started.returncode else ""
            except subprocess.TimeoutExpired:
                why = f"it did not end within {seconds:g} s"
            finally:  # and whatever it left behind
                with suppress(OSError):
                    os.killpg(started.pid, signal.SIGKILL)
                started.wait()
    except (OSError, ValueError, ConfigError) as error:
        why = str(error)
    except KeyboardInterrupt:
        why = "interrupted"
    if why:
        warning("the command of --rollout.on_event failed; the rollout is what it was", reason=why, output=log)
    else:
        event("the command of --rollout.on_event was told", output=log)
    return not why


def _short(value: Any) -> Any:
    return value[:LONGEST_TEXT] if isinstance(value, str) else value


def _output(log: Path) -> Any:
    try:
        return log.open("ab")
    except OSError:
        return open(os.devnull, "wb")
