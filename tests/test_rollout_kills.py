"""The controller dies after any operation on the balancer or the journal: users never get more than is written.

Real journal and real loop; the balancer is a map with HAProxy's lease, so that every single operation can be the last.
"""

from __future__ import annotations

import tempfile
import time
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from config import RolloutSection
from utils.exceptions import BalancerError
from utils.rollout.controller import share_of
from utils.rollout.edge import rollout_loop
from utils.rollout.edge.balancer.haproxy_configuration import LEASE, SHARE
from utils.rollout.edge.journal import Journal, read
from utils.rollout.edge.rollout_loop import Loop, Timing
from utils.rollout.edge.service import policy_of
from utils.rollout.gate import Counts
from utils.rollout.policy import FULL_BP, UNITS

POLICY = policy_of(
    RolloutSection(objective=0.3, min_step_seconds=0, bake_minutes=0, bake_units=1, golden="none"), has_prompts=False
)
LEASE_S = 30.0


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class Operations:
    """Counts what is done to the outside, and kills after a given one."""

    def __init__(self, last: int | None = None):
        self.last, self.done = last, []

    def __call__(self, name: str) -> None:
        self.done.append(name)
        if len(self.done) == self.last:
            raise Killed


class MapBalancer:
    """What Balancer does, on a dictionary."""

    def __init__(self, home: Path, operation: Operations):
        self.home, self.operation = home, operation
        self.map = {SHARE: 0, LEASE: 0}

    def info(self) -> dict[str, str]:
        return {"Pid": "1"}

    def settings(self) -> dict[str, int]:
        return dict(self.map)

    def statistics(self) -> dict[tuple[str, str], dict[str, str]]:
        rows = {(arm, "BACKEND"): {"req_tot": "0", "stot": "0", "scur": "0"} for arm in ("canary", "production")}
        servers = {(arm, "s"): {"status": "UP", "scur": "0"} for arm in ("canary", "production")}
        return {**rows, **servers}

    def set(self, **values: int) -> None:
        for name, value in values.items():  # a map is written entry by entry, so a kill falls between them too
            self.map[name] = value
            self.operation(f"{name}={value if name == SHARE else bool(value)}")

    def roles(self) -> tuple[int, int]:
        return 0, 1

    def command(self, *commands: str, to: str = "", timeout_s: float = 1.0) -> str:
        return ""

    def close_canary(self) -> None:
        self.operation("drain")

    def share_at(self, moment: float) -> int:
        """What users get."""
        return self.map[SHARE] if moment < self.map[LEASE] else 0


class Traffic:
    """Stands for the collector: equal models, and from `bad_from` on a candidate whose every session fails."""

    def __init__(self, controller: dict[str, Any], bad_from: int):
        self.controller, self.bad_from, self.lines = controller, bad_from, {}

    def count(self, raw: Any) -> Counts:
        held = self.controller["loop"].held_bp
        if not held:
            return Counts()
        units = (300, max(1, round(300 * (FULL_BP - held) / held)))
        bad = {"errors": (300, 0)} if held >= self.bad_from else {}
        return Counts({held: {UNITS: units, **bad}})

    def missing(self, since: Any) -> str:
        return ""

    def forget_units(self) -> None:
        return

    aborted = fallen_back = 0


class Silent:
    wrong_model, examples = "", ()

    def collect(self) -> Counts:
        return Counts()

    def close(self) -> None:
        return


class LoopTest(unittest.TestCase):
    """Runs the loop on a map instead of a balancer."""

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="ro-")
        self.addCleanup(directory.cleanup)
        self.root = Path(directory.name)

    def rollout(self, number: int, bad_from: int) -> Path:
        """A rollout that was just started: its journal."""
        path = self.root / f"{number}-{bad_from}" / "journal.jsonl"
        path.parent.mkdir()
        sides = {"address": "127.0.0.1:1", "digest": "d" * 64}
        header = {"id": "r", "started_at": time.time(), "policy": POLICY.to_json(), "production": sides}
        Journal(path).append("header", header | {"candidate": sides})
        return path

    def run_until(self, path: Path, balancer: MapBalancer, bad_from: int, interrupted: str = "") -> str:
        """One controller's life; the phase it ended in, or "killed"."""
        own: dict[str, Any] = {}
        timing = Timing(0.0, LEASE_S, 0.0)
        journal = Journal(path)
        append = journal.append

        def written(kind: str, value: Any) -> None:
            append(kind, value)
            balancer.operation(f"journal {kind}")

        with mock.patch.object(journal, "append", written):
            state = read(path).state
            own["loop"] = Loop(balancer, journal, Silent(), POLICY, state, timing, Traffic(own, bad_from))
            try:
                return own["loop"].run(interrupted=interrupted).phase
            except Killed:
                return "killed"


class Kills(LoopTest):
    def test_killed_after_any_operation_the_share_is_at_most_what_the_journal_says(self) -> None:
        for bad_from, ends in ((FULL_BP + 1, "promoted"), (5000, "rolled_back")):
            whole = Operations()
            balancer = MapBalancer(self.root, whole)
            with mock.patch.object(rollout_loop, "completed", return_value={"canary": 0, "production": 0}):
                self.assertEqual(self.run_until(self.rollout(0, bad_from), balancer, bad_from), ends)
                shares = [name for name in whole.done if name.startswith(SHARE)]
                self.assertIn(f"{SHARE}=5000", shares)
                self.assertGreater(len(whole.done), 12, whole.done)
                for last in range(1, len(whole.done) + 1):
                    with self.subTest(ends=ends, last=whole.done[last - 1], operation=last):
                        self.killed_after(last, bad_from, ends)

    def killed_after(self, last: int, bad_from: int, ends: str) -> None:
        path = self.rollout(last, bad_from)
        balancer = MapBalancer(self.root, Operations(last))
        outcome = self.run_until(path, balancer, bad_from)
        self.assertEqual(outcome, "killed")
        story, now = read(path), time.time()
        # a candidate that is promoted on paper keeps what it has until it is production
        written = FULL_BP if story.state.phase == "promoted" else share_of(story.state, story.policy)
        self.assertLessEqual(balancer.share_at(now), written)
        if story.state.phase == "rolled_back":
            self.assertEqual(balancer.share_at(now), 0)
        self.assertEqual(balancer.share_at(now + LEASE_S + 1), 0, "the lease does not end")
        self.assertEqual(story.state, story.replayed)
        if story.state.is_over:
            return
        balancer.operation = Operations()
        self.assertEqual(self.run_until(path, balancer, bad_from, interrupted="the controller was killed"), ends)
        steps = [int(name.partition("=")[2]) for name in balancer.operation.done if name.startswith(SHARE)]
        self.assertEqual(steps[0], 0, "a new controller starts with production alone")
        risen = [share for share in steps if share]
        first = POLICY.steps[0].share_bp
        self.assertEqual(risen[:1], [first] if story.observations else risen[:1])


class Refusals(LoopTest):
    def test_a_balancer_that_does_not_do_as_told_is_not_believed(self) -> None:
        """Every write of the share fails: no observation is attributed to a share that was never held."""
        path = self.rollout(0, FULL_BP + 1)
        balancer = MapBalancer(self.root, Operations())
        plain, failures = balancer.set, []

        def set_(**values: int) -> None:
            if values.get(SHARE):
                failures.append(values)
                if len(failures) <= 3:
                    raise BalancerError("refused")
            plain(**values)

        with (
            mock.patch.object(rollout_loop, "completed", return_value={"canary": 0, "production": 0}),
            mock.patch.object(balancer, "set", set_),
        ):
            self.assertEqual(self.run_until(path, balancer, FULL_BP + 1), "promoted")
        self.assertGreater(len(failures), 3)
        held = [seen.counts.rates for seen in read(path).observations[:3]]
        self.assertEqual(held, [{}, {}, {}])


if __name__ == "__main__":
    unittest.main()
