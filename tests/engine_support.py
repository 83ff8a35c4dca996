"""What the engine's tests share: the stub as `--inference.engine_python`, and as a server that runs already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from tests.support import ROOT, temporary_directory
from utils.inference.engines import server_process

STUB = ROOT / "tests" / "engine_stub.py"
PATIENCE = 60.0


def stub_python() -> Path:
    """A program that is started like a Python with vLLM, and is the stub."""
    path = temporary_directory() / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{STUB}" "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


class RunningStub:
    """A server that somebody else started; use it in `with`."""

    def __init__(self, model: Path, *words: str, **faults: Any):
        self.port = server_process.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-S", "-E", str(STUB), "--model", str(model), "--port", str(self.port), *words]
        environment = {k: v for k, v in os.environ.items() if k != "VLLM_API_KEY"}
        environment["ENGINE_STUB"] = json.dumps(faults)
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        until(self._answers, "the stub does not start")

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def says(self) -> dict[str, Any]:
        """Counts of what it answered, and the adapters that it has."""
        return json.loads(urllib.request.urlopen(f"{self.url}/stub", timeout=5).read())

    def set(self, **faults: Any) -> None:
        data = json.dumps(faults).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/stub", data=data), timeout=5).read()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> RunningStub:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def until(condition: Any, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(what)
        time.sleep(0.02)


def owned_by(models_dir: Path) -> list[psutil.Process]:
    """Processes that belong to an engine of this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            owner = process.environ().get(server_process.OWNER, "")
            if owner.startswith(str(models_dir.resolve())) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):  # it ended while it was looked at
            continue
    return found


def left_in(models_dir: Path) -> list[str]:
    """Folders of engines that are there."""
    return [path.name for path in models_dir.glob(f"{server_process.PREFIX}*")]
