"""Model servers over the OpenAI HTTP API: one timed answer, which model answers, and servers of merged directories.

Works with vLLM, SGLang, llama.cpp and `transformers serve`: only /health and /v1/chat/completions are relied on, and
/v1/models where it tells more. A server of ours runs in `<slot>/`, where `model` links to the merged directory, so that
both models have the same name for clients: a server that is pinned to one name answers 400 to any other.
"""

from __future__ import annotations

import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from utils.artifacts import files
from utils.exceptions import ArtefactError, Problem
from utils.inference.engines.server_process import free_port
from utils.rollout.edge.balancer.haproxy_configuration import DIGEST, MODEL_NAME

MODEL = "model"
DIGEST_HEADER = "x-model-digest"
# bytes; an event of a stream, or a list of models, has some hundred
LONGEST_LINE, LARGEST_ANSWER = 1 << 20, 1 << 24
MOST_NAMES = 20
# characters of an answer that are looked at: golden prompts ask for some dozen tokens, and all of it is compared
MOST_TEXT = 1 << 16
# what reading from a server that misbehaves raises
BROKEN = (OSError, http.client.HTTPException, ValueError, ArithmeticError, AttributeError, RecursionError)
# servers outlive their controller on purpose; a Popen that is collected while its process runs warns
_STARTED: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class ServerAnswer:
    """One streamed answer. Times are seconds; `error` says what went wrong, empty when nothing did."""

    text: str = ""
    finish_reason: str = ""
    error: str = ""
    status: int = 0
    first_token_s: float = 0.0
    per_token_s: float = 0.0
    """Mean time between pieces of text; 0 with fewer than two."""
    digest: str = ""


def ask(
    address: str, messages: Sequence[dict[str, str]], *, max_tokens: int, timeout_s: float, model: str = ""
) -> ServerAnswer:
    """Stream one greedy answer. Never raises for what a server does: that is what is measured."""
    body: dict[str, Any] = {"messages": list(messages), "max_tokens": max_tokens, "temperature": 0, "stream": True}
    if model:
        body["model"] = model
    start = time.monotonic()
    try:
        with _response(address, "/v1/chat/completions", timeout_s, json.dumps(body)) as response:
            digest = claimed_digest(response.headers)
            if response.status != 200:
                return ServerAnswer(error=f"HTTP {response.status}", status=response.status, digest=digest)
            return _streamed(response, start, timeout_s, digest)
    except BROKEN as error:
        if time.monotonic() - start >= timeout_s:
            return ServerAnswer(error="timeout")
        return ServerAnswer(error=type(error).__name__ + (f": {error}" if str(error) else ""))


class _BoundedResponse(http.client.HTTPResponse):
    """An answer whose chunks have a size: to http.client -1 means to read all that ever comes."""

    def _read_next_chunk_size(self) -> int:
        size = int(super()._read_next_chunk_size())  # type: ignore[misc]
        if not 0 <= size <= LARGEST_ANSWER:
            raise http.client.HTTPException(f"a chunk of {size} bytes")
        return size


@contextmanager
def _response(address: str, path: str, timeout_s: float, data: str | None = None) -> Iterator[http.client.HTTPResponse]:
    """The answer to a GET, or to a POST of JSON, that ends after `timeout_s` whatever the server does.

    A socket's own timeout begins anew with every byte, so a server that drips would never reach it.
    """
    connection = http.client.HTTPConnection(address, timeout=timeout_s)
    connection.response_class = _BoundedResponse
    watchdog = threading.Timer(timeout_s, lambda: _shut(opened))
    watchdog.daemon = True
    try:
        connection.connect()
        opened = connection.sock
        watchdog.start()
        headers = {} if data is None else {"Content-Type": "application/json"}
        connection.request("GET" if data is None else "POST", path, data, headers)
        yield connection.getresponse()
    finally:
        watchdog.cancel()
        connection.close()


def _shut(opened: socket.socket) -> None:
    """Whoever reads from it sees the end."""
    with suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)


def _streamed(response: http.client.HTTPResponse, start: float, timeout_s: float, digest: str) -> ServerAnswer:
    """Read the events of a 200; what ends without a finish reason and [DONE] was cut."""
    pieces: list[str] = []
    moments: list[float] = []
    finish, done, error, size = "", False, "", 0
    while not done and (line := response.readline(LONGEST_LINE)):
        size += len(line)
        if len(line) == LONGEST_LINE or size > LARGEST_ANSWER:
            error = "an answer of more bytes than any has"
            break
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if not line.endswith(b"\n") and data != b"[DONE]":
            break
        if data == b"[DONE]":
            done = True
            continue
        try:
            event = json.loads(data)
            if event.get("error"):
                error = f"error in the stream: {str(event['error'])[:120]}"
                break
            for choice in event.get("choices") or []:
                text = (choice.get("delta") or {}).get("content") or ""
                if not isinstance(text, str):
                    raise ValueError("content is no text")
                reason = choice.get("finish_reason")
                finish = reason if reason and isinstance(reason, str) else finish
                if text:
                    pieces.append(text)
                    moments.append(time.monotonic())
        except (ValueError, AttributeError, TypeError, RecursionError) as broken:
            error = f"unreadable event: {broken}"
            break
    if not error and not finish:
        error = "timeout" if time.monotonic() - start >= timeout_s else "the stream was cut"
    between = (moments[-1] - moments[0]) / (len(moments) - 1) if len(moments) > 1 else 0.0
    first = moments[0] - start if moments else 0.0
    # a pair of surrogates may come in two events; half of one alone is no text
    text = "".join(pieces).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return ServerAnswer(text[:MOST_TEXT], finish, error, 200, first, between, digest)


def get(address: str, path: str, timeout_s: float = 3.0) -> tuple[int, bytes]:
    """Status and body; (0, b"") when there is no answer."""
    try:
        with _response(address, path, timeout_s) as response:
            return response.status, response.read(LONGEST_LINE)
    except BROKEN:
        return 0, b""


def claimed_digest(headers: Mapping[str, str]) -> str:
    """The digest that a server claims in `x-model-digest`, or "". Anything else than a digest is another's text.

    It goes into the balancer's configuration, where `${NAME}` and `%[...]` would be read out of its environment.
    """
    claimed = (headers.get(DIGEST_HEADER) or "").strip()
    return claimed if DIGEST.fullmatch(claimed) else ""


def served_digest(address: str) -> str:
    """Digest of the model that this address serves, or "" when nothing tells.

    In this order: an `x-model-digest` header; the model's path in /v1/models (vLLM's `root`) where a manifest stands;
    the working directory of the local process that listens there, when it is a slot of ours.
    """
    claimed, entries = _listed(address)
    if claimed:
        return claimed
    roots = [Path(str(entry["root"])) for entry in entries if entry.get("root")]
    return next(
        (d for d in map(_directory_digest, [r for r in roots if r.is_absolute()]) if d), _process_digest(address)
    )


def model_names(address: str) -> tuple[str, ...]:
    """What this server calls its models in /v1/models, as far as it may be told to clients; none when it does not."""
    names = [entry.get("id") for entry in _listed(address)[1]]
    return tuple(dict.fromkeys(n for n in names if isinstance(n, str) and MODEL_NAME.fullmatch(n)))[:MOST_NAMES]


def _listed(address: str) -> tuple[str, list[dict[str, Any]]]:
    """The digest that the answer to /v1/models claims, and its entries."""
    try:
        with _response(address, "/v1/models", 3.0) as response:
            body = response.read(LONGEST_LINE)
            claimed = claimed_digest(response.headers)
            listed = json.loads(body).get("data") if response.status == 200 else []
    except BROKEN:
        return "", []
    return claimed, [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []


def _directory_digest(directory: Path) -> str:
    try:
        return str(files.read_manifest(directory).get("digest", ""))
    except (ArtefactError, OSError, ValueError):  # no path at all, by what a server says
        return ""


def _process_digest(address: str) -> str:
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost"):
        return ""
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == int(port) and connection.pid:
                return _directory_digest(Path(psutil.Process(connection.pid).cwd()) / MODEL)
    return ""


@dataclass(frozen=True)
class Process:
    """A server that we started: enough to find it again, and to end nothing else."""

    pid: int
    created: float
    address: str

    @property
    def is_running(self) -> bool:
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        return False

    def stop(self, patience_s: float = 10.0) -> None:
        """SIGTERM to its process group, SIGKILL after `patience_s`; nothing when the id is another program's now."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self.is_running:
                return
            with suppress(OSError):
                os.killpg(self.pid, number)
            end = time.monotonic() + patience_s
            while self.is_running and time.monotonic() < end:
                with suppress(OSError):  # ours to reap when we started it ourselves
                    os.waitpid(self.pid, os.WNOHANG)
                time.sleep(0.05)


def launch(directory: Path, slot: Path, command: str) -> Process:
    """Start the server of a merged directory in `slot`, in a session of its own; its output is `slot/server.log`."""
    files.make_directory(slot)
    link = slot / MODEL
    link.unlink(missing_ok=True)
    link.symlink_to(directory.resolve(), target_is_directory=True)
    port = free_port()
    words = shlex.split(command.format(model=MODEL, port=port))
    # a script run as .venv/bin/python has no activated environment
    words[0] = shutil.which(words[0]) or shutil.which(words[0], path=str(Path(sys.executable).parent)) or words[0]
    # a merged directory is all it needs; threads that spin while they wait starve the other model
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "HF_HUB_OFFLINE": "1"}
    with (slot / "server.log").open("ab") as log:
        try:
            started = subprocess.Popen(
                words,
                cwd=slot,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            fix = "install it, or set --rollout.serve_command, or give addresses of running servers"
            raise ArtefactError(Problem(f"the server cannot be started: {error.strerror}", words[0], fix)) from error
    _STARTED.append(started)
    return Process(started.pid, psutil.Process(started.pid).create_time(), f"127.0.0.1:{port}")


def wait_ready(address: str, *, model: str, patience_s: float, alive: Any = lambda: True) -> None:
    """Ready is one real completion; /health says ok before a model can answer. Raises ArtefactError otherwise."""
    end = time.monotonic() + patience_s
    hello = [{"role": "user", "content": "Hello"}]
    last = ServerAnswer(error="no answer")
    while time.monotonic() < end and alive():
        if get(address, "/health")[0] == 200:
            last = ask(address, hello, max_tokens=1, timeout_s=max(1.0, end - time.monotonic()), model=model)
            if not last.error:
                return
        time.sleep(0.1)
    why = last.error if alive() else "the server has ended; see server.log in its slot"
    raise ArtefactError(Problem(f"the server gives no completion: {why}", address, "start it, or see its log"))
