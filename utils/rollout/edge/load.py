"""A bounded load of completions, for the demo and for tests: a fixed rate, sessions, and what each request got.

with Load("127.0.0.1:8000", per_second=50) as load: ...
load.results -> [Result(...)]
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Result:
    """One request: when it was sent, the status (0: no answer), which model, what went wrong, how long it took."""

    at: float
    status: int
    digest: str
    error: str
    seconds: float
    session: str


@dataclass
class Load:
    """Sends `per_second` requests per second from a thread of its own until it is closed."""

    address: str
    per_second: float
    questions: Sequence[str] = ("Hello",)
    session_requests: int = 3
    session_share: float = 1.0
    """Share of the requests with a session header; plain OpenAI clients send none."""
    max_tokens: int = 16
    timeout_s: float = 30.0
    most_open: int = 400
    stream_share: float = 0.5
    seed: int = 0
    results: list[Result] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()
        self._thread.join()

    def pause(self) -> None:
        """Send nothing more; what was sent is still waited for."""
        self._stopped.set()

    def failures(self) -> list[Result]:
        """Requests whose client saw something other than a whole answer."""
        return [result for result in list(self.results) if result.error]

    async def _run(self) -> None:
        generator = random.Random(self.seed)
        begin, sent, running = time.monotonic(), 0, set()
        while not self._stopped.is_set():
            due = int((time.monotonic() - begin) * self.per_second)
            while sent < due:
                if len(running) < self.most_open:
                    has_session = generator.random() < self.session_share if self.session_share < 1 else True
                    session = f"s{self.seed}-{sent // self.session_requests}" if has_session else ""
                    streamed = generator.random() < self.stream_share
                    task = asyncio.create_task(self._one(session, generator.choice(self.questions), streamed))
                    running.add(task)
                    task.add_done_callback(running.discard)
                sent += 1
            await asyncio.sleep(0.002)
        if running:
            await asyncio.wait(running, timeout=self.timeout_s)

    async def _one(self, session: str, question: str, streamed: bool) -> None:
        began, at = time.monotonic(), time.time()
        body: dict[str, Any] = {"messages": [{"role": "user", "content": question}], "max_tokens": self.max_tokens}
        if streamed:
            body["stream"] = True
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.address}\r\nContent-Type: application/json\r\n"
        head += f"x-session-id: {session}\r\n" if session else ""
        head += f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        status, digest, error = 0, "", ""
        try:
            answer = await asyncio.wait_for(self._exchange(head.encode() + data), self.timeout_s)
            top, _, rest = answer.partition(b"\r\n\r\n")
            lines = top.decode("latin-1").split("\r\n")
            status = int(lines[0].split()[1])
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            digest = headers.get("x-model-digest", "")
            error = _what_is_wrong(status, headers, rest, streamed)
        except (TimeoutError, OSError, ValueError, IndexError) as failure:
            error = type(failure).__name__
        self.results.append(Result(at, status, digest, error, time.monotonic() - began, session))

    async def _exchange(self, request: bytes) -> bytes:
        host, _, port = self.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(request)
            return await reader.read(-1)
        finally:
            writer.close()


def _what_is_wrong(status: int, headers: dict[str, str], body: bytes, streamed: bool) -> str:
    if status != 200:
        return f"HTTP {status}"
    if streamed:
        if b'"error"' in body:
            return "error in the stream"
        # transformers serve ends with a finish reason and without [DONE]
        return "" if b"[DONE]" in body or re.search(rb'"finish_reason": ?"', body) else "cut"
    length = headers.get("content-length")
    if length is not None:
        return "" if len(body) == int(length) else "cut"
    return "" if body.rstrip().endswith((b"}", b"0")) else "cut"
