"""A long rollout's traffic, fast: log lines as HAProxy writes them, through the real sink, collector, loop and journal.

The log's connection is closed and opened anew, the balancer is reloaded, the clock is set back and forth; whatever
happens, each session is counted once and each of its errors once. `make rollout-test` has a day at 100 requests/s.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import socket
import time
import unittest
from pathlib import Path
from unittest import mock

from tests.test_rollout_kills import LEASE_S, POLICY, LoopTest, Silent
from utils.exceptions import BalancerError
from utils.rollout.edge.balancer.haproxy_configuration import LEASE, SHARE
from utils.rollout.edge.journal import Journal, read
from utils.rollout.edge.request_log import Collector
from utils.rollout.edge.rollout_loop import Loop, Timing
from utils.rollout.policy import UNITS

# written by HAProxy 2.6.12; numbers are replaced
LINE = (
    '{{"t":{t},"be":"{be}","st":{st},"ts":"{ts}","Tr":13,"Ta":{ta},"B":239,"rc":"0",'
    '"u":"{u}","bp":"{bp}","in":"{want}"}}\n'
)
PER_SECOND, SECONDS_PER_TICK, SHARE_BP = 100, 5, 1000
PER_TICK = PER_SECOND * SECONDS_PER_TICK


class WorldOfHAProxy:
    """Its map, counters, process id and log, without its processes; `traffic` is that of one tick."""

    def __init__(self, home: Path, generator: random.Random):
        self.home, self.generator = home, generator
        self.map, self.pid, self.counters = {SHARE: 0, LEASE: 0}, 1, {"canary": 0, "production": 0}
        self.connection: socket.socket | None = None
        self.sessions = 0
        self.clock = 1_800_000_000.0
        # what must be found in the journal: (arm, share) -> sessions; arm -> sessions with an error
        self.units: dict[tuple[int, int], set[str]] = {}
        self.errors: dict[int, set[str]] = {0: set(), 1: set()}
        self.requests = 0

    def time(self) -> float:
        return self.clock

    def info(self) -> dict[str, str]:
        return {"Pid": str(self.pid)}

    def roles(self) -> tuple[int, int]:
        return 0, 1

    def command(self, *commands: str, to: str = "", timeout_s: float = 1.0) -> str:
        raise BalancerError([])

    def settings(self) -> dict[str, int]:
        return dict(self.map)

    def set(self, **values: int) -> None:
        self.map |= values

    def statistics(self) -> dict[tuple[str, str], dict[str, str]]:
        rows = {(arm, "BACKEND"): {"stot": str(n), "scur": "0"} for arm, n in self.counters.items()}
        return {**rows, **{(arm, "s"): {"status": "UP"} for arm in self.counters}}

    def close_canary(self) -> None:
        return

    def rotate(self) -> None:
        """The connection of the log ends and another one begins."""
        if self.connection:
            self.connection.close()
        self.connection = None

    def reload(self) -> None:
        """The ramp starts again, and a session that goes on across it is a unit of the new first step."""
        self.rotate()
        self.sessions += 1
        self.pid, self.counters = self.pid + 1, dict.fromkeys(self.counters, 0)
        self.map = {SHARE: 0, LEASE: 0}

    def traffic(self) -> None:
        if self.connection is None:
            self.connection = socket.socket(socket.AF_UNIX)
            self.connection.connect(str(self.home / "log.sock"))
        share = self.map[SHARE] if self.clock < self.map[LEASE] else 0
        lines = []
        for _ in range(PER_TICK):
            self.sessions += self.generator.random() < 0.4  # 2.5 requests a session
            session = str(self.sessions * 2_654_435_761 % 2**32)
            canary = int(session) % 10_000 < share
            arm, name = (0, "canary") if canary else (1, "production")
            failed = self.generator.random() < 0.002
            self.units.setdefault((arm, share), set()).add(session)
            if failed:
                self.errors[arm].add(session)
            self.counters[name] += 1
            values = {"t": int(1000 * self.clock), "be": name, "st": 500 if failed else 200, "ts": "--", "ta": 200}
            line = LINE.format(**values, u=session, bp=share, want=1 if canary else "-")
            lines.append(f"{len(line)} {line}")
        self.requests += PER_TICK
        self.connection.sendall("".join(lines).encode())


class WholeDay(LoopTest):
    SECONDS = int(os.environ.get("ROLLOUT_DAY_SECONDS", "600"))

    def test_each_session_and_each_error_is_counted_once_whatever_happens_to_log_balancer_and_clock(self) -> None:
        path = self.rollout(0, 0)
        world = WorldOfHAProxy(self.root, random.Random(7))
        policy = dataclasses.replace(POLICY, objective=0.0, steps=(dataclasses.replace(POLICY.steps[1]),))
        policy = dataclasses.replace(
            policy, step_deadline_s=1e9, rollout_deadline_s=1e9, share_alpha=1e-30, evidence=1e300
        )
        policy = dataclasses.replace(policy, max_interruptions=100)
        with mock.patch.object(time, "time", world.time):
            state = read(path).state
            loop = Loop(world, Journal(path), Silent(), policy, state, Timing(1.0, LEASE_S, 0.0), Collector())  # type: ignore[arg-type]
            self.addCleanup(loop.sink.close)
            self.addCleanup(world.rotate)
            loop.pid, loop.roles = "1", (0, 1)
            generator, events = random.Random(1), dict.fromkeys(("rotate", "reload", "back", "forth"), 0)
            for tick in range(self.SECONDS // SECONDS_PER_TICK):
                world.clock += SECONDS_PER_TICK
                often = max(2, self.SECONDS // SECONDS_PER_TICK // 40)
                what = generator.choice(sorted(events)) if tick % often == often - 1 else ""
                if what:
                    events[what] += 1
                if what in ("rotate", "reload"):
                    getattr(world, what)()
                world.clock += {"back": -3600.0, "forth": 3600.0}.get(what, 0.0)
                world.traffic()
                self.wait_for_lines(loop, world)
                loop.tick()
                self.assertFalse(loop.state.is_over, loop.state.reason)
        self.assertTrue(all(events.values()), events)
        story = read(path)
        total = loop.state.total
        self.assertEqual(loop.collector.garbage, 0)
        self.assertEqual([seen.blind for seen in story.observations if seen.blind], [])
        jumps = [abs(b.at - a.at) for a, b in itertools.pairwise(story.observations)]
        self.assertLess(max(jumps), 1000, "a clock that is set must not pass a deadline")
        for bp in (0, SHARE_BP):
            expected = tuple(len(world.units.get((arm, bp), ())) for arm in (0, 1))
            self.assertEqual(total.at(bp, UNITS), expected, bp)
        found = [sum(total.at(bp, "errors")[arm] for bp in total.rates) for arm in (0, 1)]
        self.assertEqual(found, [len(world.errors[arm]) for arm in (0, 1)])
        self.assertGreater(total.at(SHARE_BP, UNITS)[0], self.SECONDS)

    def wait_for_lines(self, loop: Loop, world: WorldOfHAProxy) -> None:
        """The sink reads in a thread of its own."""
        end = time.monotonic() + 30
        while len(loop.sink._lines) < PER_TICK:
            self.assertLess(time.monotonic(), end, "lines do not arrive")
            time.sleep(0.0002)


if __name__ == "__main__":
    unittest.main()
