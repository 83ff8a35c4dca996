"""The balancer's log lines as counts: one event per session, metric and rollout, by the share in force at its time.

HAProxy writes one JSON line per request to a ring that it forwards to us. Lines can be lost without anyone counting
them, so every tick compares them with the balancer's own counters; with too many missing the data are not trusted.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.rollout.edge.balancer import near_sockets
from utils.rollout.gate import Counts
from utils.rollout.policy import NEW_UNITS, UNITS

ARMS = ("canary", "production")
# the share of lines that may be missing, and the number that always may
MISSING_SHARE, MISSING_LINES = 0.01, 5
HISTORY, ENOUGH_HISTORY = 1000, 200
# what a request need not have, and what HAProxy then logs: a request without a session is a unit of its own
VARIABLES, UNSET = ("u", "bp", "in"), "-"
# sessions per metric, the newest ones: some 50 MB a metric; one that comes back later still is a new one
REMEMBERED = 500_000


class LogSink:
    """The stream socket that HAProxy's log ring connects to; a thread reads it, so that the ring never fills.

    A datagram socket holds `net.unix.max_dgram_qlen` lines, 10 by default: at 300 requests a second 63% were lost.
    """

    def __init__(self, path: Path):
        path.unlink(missing_ok=True)
        self.path = path
        self._lines: deque[bytes] = deque()
        self._connections: set[socket.socket] = set()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        near_sockets.bind(self._socket, path)
        os.chmod(path, 0o600)
        self._socket.listen(8)
        threading.Thread(target=self._accept, daemon=True).start()

    def drain(self) -> list[bytes]:
        """What has arrived since the last call."""
        return [self._lines.popleft() for _ in range(len(self._lines))]

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for open_one in (self._socket, *list(self._connections)):
            open_one.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._socket.accept()
                self._connections.add(connection)
                threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        """Octet-counted lines (RFC 6587): the length, a space, the line."""
        rest = b""
        with suppress(OSError, ValueError):
            while piece := connection.recv(1 << 16):
                rest += piece
                while (space := rest.find(b" ")) > 0 and len(rest) > space + int(rest[:space]):
                    end = space + 1 + int(rest[:space])
                    self._lines.append(rest[space + 1 : end])
                    rest = rest[end:]
        self._connections.discard(connection)
        connection.close()


# what HAProxy says of servers and of itself comes through the same ring; a server that flaps is no damaged log
_OF_SERVERS = re.compile(rb"(Server|backend|Proxy|Stopping|Health check|Agent check) [^{]*$")


def is_error(line: Mapping[str, Any]) -> bool:
    """5xx, a response that the server or a time-out ended early (S, s), a proxy or resource error (P, R), a retry.

    A cut stream is a 200 in the status and in the balancer's counters; only the termination state tells.
    """
    return int(line["st"]) >= 500 or line["ts"][0] in "SsPR" or str(line["rc"]) not in ("0", "+0")


def is_ours_or_the_clients(line: Mapping[str, Any]) -> bool:
    """The client went away (C, c) or we cut it (K): nobody's error, but counted and shown.

    A client that left later than a slow answer takes has met a slow one: else a model that hangs would never be seen.
    """
    return line["ts"][0] in "CcKDI"


@dataclass
class Collector:
    """Turns log lines into counts. Holds which sessions were seen and what production's recent speed was."""

    tolerance: float = 0.25
    since_ms: float = field(default_factory=lambda: 1000 * time.time())
    """Requests that ended before this are not ours: the ring keeps what nobody read, in the order of their ends, so
    after the first one of ours all are, whatever the clock does."""
    lines: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ARMS, 0))
    garbage: int = 0
    aborted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ARMS, 0))
    fallen_back: int = 0
    _seen: dict[Any, dict[str, None]] = field(default_factory=dict)
    _speeds: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=HISTORY))

    def count(self, raw: Iterable[bytes]) -> Counts:
        """Counts of these lines. The limit for "slow" is fixed before they are looked at."""
        limit = self._slow_limit()
        rates: dict[int, dict[str, list[int]]] = {}
        for text in raw:
            line = self._parsed(text)
            if line is None or line["be"] not in ARMS:
                continue
            if line["t"] + line["Ta"] < self.since_ms:
                continue
            self.since_ms = 0.0
            arm = ARMS.index(line["be"])
            self.lines[line["be"]] += 1
            if line["in"] == "1" and arm == 1:
                self.fallen_back += 1  # its session belongs to the canary, which was down
            speed = (float(line["Ta"]), line["Ta"] / max(line["B"], 1))
            # a model that says more takes longer, one that says less has more overhead per byte: both must be slow
            is_slow = limit is not None and speed[0] > limit[0] and speed[1] > limit[1]
            if is_ours_or_the_clients(line):
                self.aborted[line["be"]] += 1
                if not is_slow or line["ts"][0] not in "Cc":  # who left after waiting that long has seen enough
                    continue
            bp, unit = int(line["bp"] or 0), line["u"]
            share = rates.setdefault(bp, {})
            self._add(share, UNITS, unit, arm, once_per=(UNITS, bp))
            self._add(share, NEW_UNITS, unit, arm, once_per=NEW_UNITS)
            if is_ours_or_the_clients(line):
                self._add(share, "slow", unit, arm, once_per="slow")
            elif is_error(line):
                self._add(share, "errors", unit, arm, once_per="errors")
            elif 400 <= line["st"] < 500:
                self._add(share, "client_errors", unit, arm, once_per="client_errors")
            else:
                if is_slow:
                    self._add(share, "slow", unit, arm, once_per="slow")
                if arm == 1:
                    self._speeds.append(speed)
        return Counts({bp: {m: (arms[0], arms[1]) for m, arms in metrics.items()} for bp, metrics in rates.items()})

    def forget_units(self) -> None:
        """The ramp starts again: its sessions are units of the first step again. Their events stay counted once."""
        for key in [key for key in self._seen if isinstance(key, tuple)]:
            del self._seen[key]

    def missing(self, completed: Mapping[str, int]) -> str:
        """Why the lines do not cover the balancer's counters, or an empty string. `completed` is per arm."""
        for arm in ARMS:
            lost = completed.get(arm, 0) - self.lines[arm]
            if lost > max(MISSING_SHARE * completed.get(arm, 0), MISSING_LINES):
                return f"{lost} of {completed[arm]} log lines of {arm} are missing"
        if self.garbage > max(MISSING_SHARE * sum(self.lines.values()), MISSING_LINES):
            return f"{self.garbage} log lines cannot be read"
        return ""

    def _add(self, share: dict[str, list[int]], metric: str, unit: str, arm: int, *, once_per: Any) -> None:
        if unit:  # requests without a session are units of their own
            known = self._seen.setdefault(once_per, {})
            if unit in known:
                return
            known[unit] = None
            if len(known) > REMEMBERED:
                del known[next(iter(known))]
        share.setdefault(metric, [0, 0])[arm] += 1

    def _slow_limit(self) -> tuple[float, float] | None:
        if len(self._speeds) < ENOUGH_HISTORY:
            return None
        total, per_byte = (sorted(values)[int(0.95 * len(values))] for values in zip(*self._speeds, strict=True))
        # log times are whole milliseconds
        return total * (1 + self.tolerance) + 1, per_byte * (1 + self.tolerance)

    def _parsed(self, text: bytes) -> dict[str, Any] | None:
        if _OF_SERVERS.match(text):
            return None
        try:
            line = json.loads(text[text.index(b"{") :])
            for key in ("t", "st", "Ta", "B"):
                line[key] = int(line[key])
            if len(line["ts"]) < 2 or not {"be", "rc", *VARIABLES} <= line.keys():
                raise ValueError
            line |= {name: "" for name in VARIABLES if line[name] == UNSET}
        except (ValueError, KeyError, TypeError):
            self.garbage += 1
            return None
        return line


def completed(statistics: Mapping[tuple[str, str], Mapping[str, str]]) -> dict[str, int]:
    """Requests that each backend has finished, from `show stat`."""
    requests = {}
    for arm in ARMS:
        row = statistics.get((arm, "BACKEND"))
        requests[arm] = int(row["stot"] or 0) - int(row["scur"] or 0) if row else 0
    return requests
