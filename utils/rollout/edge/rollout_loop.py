"""One tick: look, decide, write down, act, renew the lease. The decisions are in utils/rollout/controller.py.

The order is the safety: the share rises only after the observation that allows it is on disk; it falls before anything
is written, so that neither a full disk nor a dead model server can stand in the way; the lease is renewed last, and
only when the data of this very tick could be trusted. Whatever kills this process, the balancer drops the canary.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.artifacts import files
from utils.exceptions import BalancerError
from utils.logger import event, warning
from utils.rollout.controller import Decision, Observation, State, advance, share_of
from utils.rollout.edge.balancer.haproxy import Balancer
from utils.rollout.edge.balancer.haproxy_configuration import LEASE, SHARE
from utils.rollout.edge.balancer.old_workers import DrainWatch
from utils.rollout.edge.golden import Prober, without_times
from utils.rollout.edge.journal import Journal
from utils.rollout.edge.request_log import Collector, LogSink, completed
from utils.rollout.gate import Counts
from utils.rollout.policy import FULL_BP, Policy

LIVE, COMMAND = "live.json", "command"
TICKS_PER_SNAPSHOT = 300


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    tick_s: float
    lease_s: float
    drain_s: float
    reload_drain_s: float = 1800.0


class Loop:
    """The controller at the edge. `run` returns the final state; the caller promotes or stops servers."""

    def __init__(
        self,
        balancer: Balancer,
        journal: Journal,
        prober: Prober,
        policy: Policy,
        state: State,
        timing: Timing,
        collector: Collector,
        candidate: str = "",
    ):
        self.balancer, self.journal, self.prober, self.policy = balancer, journal, prober, policy
        self.state, self.timing, self.collector = state, timing, collector
        self.directory, self.candidate = journal.path.parent, candidate
        self.sink = LogSink(balancer.home / "log.sock")
        self.watch = DrainWatch(balancer, timing.reload_drain_s)
        self.roles: tuple[int, int] | None = None
        self.cut = 0
        self.pid, self.base, self.last_counters = "", {}, {}  # type: ignore[var-annotated]
        self.held_bp = 0
        self.kept = Counts()
        self.last_tick = time.monotonic()
        # deadlines run by a clock that nobody sets while they run
        self.began = time.time() - time.monotonic()
        self.shown = ""
        self.ticks = 0

    def run(self, first: Counts | None = None, interrupted: str = "") -> State:
        """Tick until the rollout is over. `first` are counts from before the first tick; `interrupted` restarts."""
        self.kept = self.kept + (first or Counts())
        self.pid = self.balancer.info()["Pid"]
        # lines of requests that ended before this sink existed were never ours
        self.base = completed(self.balancer.statistics())
        self.last_counters = dict(self.base)
        self.roles = self.balancer.roles()
        self._set(0)
        self.last_tick = time.monotonic()
        try:
            while not self.state.is_over:
                began = time.monotonic()
                self.tick(interrupted)
                interrupted = ""
                if not self.state.is_over:
                    time.sleep(max(0.0, self.timing.tick_s - (time.monotonic() - began)))
        except KeyboardInterrupt:
            self._to_zero()
            raise
        finally:
            self.prober.close()
            self.sink.close()
        return self.state

    def tick(self, interrupted: str = "") -> Decision:
        """One look and what follows from it."""
        began = time.monotonic()
        away = began - self.last_tick
        self.last_tick = began
        if away > self.timing.lease_s:
            interrupted = interrupted or f"the controller was away for {away:.1f} s, longer than its lease"
        if interrupted:
            self._try(lambda: self._set(0))
        seen = self._look(interrupted)
        decision = advance(self.state, seen, self.policy)
        if decision.action == "rollback":
            self._to_zero()
        try:
            self.journal.append("seen", seen.to_json())
        except OSError as error:
            if decision.action != "rollback":
                return self._without_disk(seen, error)
            warning("the journal cannot be written; the traffic is at production all the same", reason=error.strerror)
        self.state, self.kept, self.ticks = decision.state, Counts(), self.ticks + 1
        if self.ticks % TICKS_PER_SNAPSHOT == 0:
            with suppress(OSError):  # the observations are what counts
                self.journal.append("state", self.state.to_json())
        if decision.action == "restart":
            self.collector.forget_units()
        if decision.action != "rollback" and decision.renew:
            self._act(decision, began)
        self._tell(decision, seen)
        return decision

    def _act(self, decision: Decision, began: float) -> None:
        """Lease, then share. Not when this tick took as long as a lease: what it saw is stale by now."""
        if time.monotonic() - began > self.timing.lease_s / 2:
            return
        if not self._try(self._renew):
            return
        if self.held_bp != decision.share_bp:
            self._try(lambda: self._set(decision.share_bp))

    def _look(self, interrupted: str) -> Observation:
        """Everything one tick can see. Counters before lines: then a line that is on its way is not missed."""
        blind = unsafe = ""
        try:
            info, statistics = self.balancer.info(), self.balancer.statistics()
            live, roles = self.balancer.settings(), self.balancer.roles()
            counters = completed(statistics)
            if info["Pid"] != self.pid or any(counters[arm] < n for arm, n in self.last_counters.items()):
                interrupted = interrupted or "the balancer was restarted or its counters were cleared"
                self.pid, self.base, self.held_bp = info["Pid"], dict.fromkeys(counters, 0), live[SHARE]
                self.watch.expected = True
                self.collector.lines = dict.fromkeys(self.collector.lines, 0)
                if live[SHARE]:
                    self._try(lambda: self._set(0))
            elif live[SHARE] != self.held_bp:
                unsafe = f"someone else set the share to {live[SHARE] / 100:g}%, it was {self.held_bp / 100:g}%"
            if roles != self.roles:
                unsafe = unsafe or "someone else changed which model is production"
            self.last_counters = counters
            down = {arm: not statistics[arm, "s"]["status"].startswith("UP") for arm in ("canary", "production")}
            if down["canary"] and not down["production"]:
                unsafe = unsafe or f"the candidate's server is {statistics['canary', 's']['status']}"
            elif down["production"]:
                blind = "production's server is down"
        except (BalancerError, KeyError) as error:
            counters, blind = {}, f"the balancer does not tell: {error}"
        self.watch.look()
        probed = self.prober.collect()
        if self.held_bp > FULL_BP // 2:  # the candidate is busy and production idle: not like with like
            probed = without_times(probed)
        counts = self.kept + self.collector.count(self.sink.drain()) + probed
        since = {arm: n - self.base.get(arm, 0) for arm, n in counters.items()}
        blind = blind or self.collector.missing(since)
        return Observation(
            at=self.began + time.monotonic(),
            counts=counts,
            blind=blind,
            interrupted=interrupted,
            unsafe=self.prober.wrong_model or unsafe,
            command=self._command(),  # type: ignore[arg-type]
        )

    def _command(self) -> str:
        path = self.directory / COMMAND
        try:
            command = files.regular_bytes(path).decode(errors="replace").strip()
            path.unlink()
        except OSError:
            return ""
        return command if command in ("abort", "promote") else ""

    def _without_disk(self, seen: Observation, error: OSError) -> Decision:
        """Nothing may happen that is not on disk: no canary until it can be written again; the deadline still runs."""
        self.kept = seen.counts
        self._try(lambda: self._set(0))
        decision = advance(self.state, replace(seen, counts=Counts(), blind=f"journal: {error.strerror}"), self.policy)
        if decision.action == "rollback":
            self._to_zero()
            self.state = decision.state
        self._tell(decision, seen)
        return decision

    def _renew(self) -> None:
        self.balancer.set(**{LEASE: int(time.time() + self.timing.lease_s)})

    def _set(self, share_bp: int) -> None:
        self.balancer.set(**({SHARE: share_bp} if share_bp else {SHARE: 0, LEASE: 0}))
        self.held_bp = share_bp

    def _to_zero(self) -> None:
        """Share 0, read back; tried until it is acknowledged or the lease has run out, which is the same."""
        end = time.monotonic() + self.timing.lease_s + 1
        while not self._try(lambda: self._set(0)):
            if time.monotonic() > end:
                warning("the balancer does not answer; its lease has ended, so all traffic is at production")
                self._try(self.balancer.close_canary)
                return
            time.sleep(0.1)

    @staticmethod
    def _try(act: Callable[[], None]) -> bool:
        try:
            act()
        except BalancerError as error:
            warning("the balancer did not do as told", reason=str(error))
            return False
        return True

    def drain(self) -> None:
        """After a rollback: let what streams from the candidate end, and cut it after the drain time."""

        def drain() -> None:
            self.balancer.close_canary()
            self.cut += self.balancer.drain(self.candidate, self.timing.drain_s)

        self._try(drain)
        self.watch.look()
        if self.cut:
            what = f"answers of the candidate that still streamed after {self.timing.drain_s:g} s were cut"
            warning(what, answers=self.cut)

    def _tell(self, decision: Decision, seen: Observation) -> None:
        """The live picture for `status`, and a line in the log when something changed."""
        message = decision.reason if decision.action != "hold" else f"{self.state.step} {seen.blind or decision.reason}"
        if message.split(":")[0] != self.shown:
            self.shown = message.split(":")[0]
            say = warning if seen.blind or decision.action in ("rollback", "restart") else event
            share = f"{share_of(self.state, self.policy) / FULL_BP:.2%}"
            say(f"{decision.action}: {decision.reason}", share=share, units=self.state.total.units())
        path = self.directory / LIVE
        try:
            files_text = files.canonical_json(self.picture(decision, seen))
            temporary = path.with_suffix(".tmp")
            temporary.write_text(files_text, encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            return  # a picture is not worth stopping for

    def picture(self, decision: Decision, seen: Observation) -> dict[str, Any]:
        """What a person sees of this tick."""
        return {
            "at": time.time(),
            "controller": os.getpid(),
            "action": decision.action,
            "reason": decision.reason,
            "share_bp": self.held_bp,
            "state": self.state.to_json(),
            "verdict": decision.verdict.to_json() if decision.verdict else None,
            "blind": seen.blind,
            "aborted": self.collector.aborted,
            "fallen_back": self.collector.fallen_back,
            "old_workers": {"open": self.watch.open, "cut": self.watch.cut},
            "examples": [vars(example) for example in self.prober.examples[-20:]],
        }


def send_command(directory: Path, command: str) -> None:
    """Leave a command for the running controller; it is read at its next tick."""
    temporary = directory / f".{COMMAND}.{os.getpid()}"
    temporary.write_text(command, encoding="utf-8")
    os.replace(temporary, directory / COMMAND)
