"""Answers that still stream in workers which a reload replaced, and how many of them the hard stop cut.

A worker that was replaced takes no new request and ends with its last answer, or after `reload_drain_s`. Its log lines
reach nobody, so the master is asked about it instead.
"""

from __future__ import annotations

import csv
import re
import time
from dataclasses import dataclass, field

from utils.exceptions import BalancerError
from utils.rollout.edge.balancer.haproxy import Balancer

MASTER = "master.sock"
# the master tells ages in whole seconds
ROUNDING_S = 1.5
# a controller that looks must not wait long for what is not its task
PATIENCE_S = 0.3


@dataclass(frozen=True)
class OldWorker:
    """One replaced worker: how long ago that was, and the answers it still gives."""

    pid: str
    replaced_s: float
    answers: int


def old_workers(balancer: Balancer) -> list[OldWorker]:
    """The oldest first. Raises BalancerError when the master does not tell."""
    workers = _workers(balancer.command("show proc", to=MASTER, timeout_s=PATIENCE_S))
    replaced = []
    for (pid, _), (_, successor_age) in zip(workers[1:], workers, strict=False):
        replaced.append(OldWorker(pid, successor_age, _open(balancer, pid)))
    return replaced[::-1]


@dataclass
class DrainWatch:
    """Looks at old workers again and again; an answer that was open when its worker was stopped was cut."""

    balancer: Balancer
    drain_s: float
    open: int = 0
    cut: int = 0
    expected: bool = True
    """Whether there may be one: at first, and after a reload."""
    _last: dict[str, OldWorker] = field(default_factory=dict)
    _looked: float = 0.0

    def look(self) -> None:
        """Once a tick; asks nobody while no old worker is expected."""
        if not self.expected:
            return
        try:
            by_pid = {worker.pid: worker for worker in old_workers(self.balancer)}
        except BalancerError:
            return
        since, self._looked = time.monotonic() - self._looked, time.monotonic()
        for pid, worker in self._last.items():
            if worker.replaced_s + since > self.drain_s - ROUNDING_S:  # a stopped worker is seen for a moment more
                self.cut += max(0, worker.answers - (by_pid[pid].answers if pid in by_pid else 0))
        self._last, self.open = by_pid, sum(worker.answers for worker in by_pid.values())
        self.expected = bool(by_pid)


def _workers(text: str) -> list[tuple[str, float]]:
    """(process id, age in seconds) of every worker in `show proc`, the youngest first."""
    rows = re.findall(r"^(\d+)\s+worker\s+\d+.*?\s(\d+)d(\d+)h(\d+)m(\d+)s", text, flags=re.MULTILINE)
    workers = [(pid, 86_400.0 * int(d) + 3600 * int(h) + 60 * int(m) + int(s)) for pid, d, h, m, s in rows]
    return sorted(workers, key=lambda worker: worker[1])


def _open(balancer: Balancer, pid: str) -> int:
    """Answers in progress in this worker; 0 when it has just ended."""
    text = balancer.command(f"@!{pid} show stat", to=MASTER, timeout_s=PATIENCE_S).strip().lstrip("# ")
    rows = [row for row in csv.DictReader(text.splitlines()) if row.get("svname") == "BACKEND"]
    return sum(int(row["scur"] or 0) for row in rows)
