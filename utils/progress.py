"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere, nothing above rank 0."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, ClassVar

from tqdm import tqdm

from utils import logger

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """`with Progress("domain adapter", total=100, unit="step") as bar: bar.advance(1, loss=2.3)`."""

    def __init__(self, what: str, *, total: float, unit: str, done: float = 0):
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._first = done
        self._bar: tqdm | None = None
        self._within: Whole | None = None

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        self._within = Whole.running
        if self._within is None and logger.rank() == 0 and sys.stderr.isatty():
            self._bar = tqdm(
                total=self.total, initial=self.done, desc=self.what, unit=self.unit, unit_scale=self.total > 10_000
            )
        return self

    def advance(self, amount: float, **facts: Any) -> None:
        """Count work done; `facts` (loss, tokens/s) are shown beside the bar."""
        self.done += amount
        if self._within is not None:
            self._within.work(self.what, amount)
            return
        if self._bar is not None:
            self._bar.set_postfix(
                {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in facts.items()}, refresh=False
            )
            self._bar.update(amount)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            rate = (self.done - self._first) / max(now - self._start, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            share = f"{self.done:.0f}/{self.total:.0f} {self.unit}s"
            logger.event(f"{self.what}: {share}", rate=f"{rate:.3g}/s", left=f"{left:.0f}s", **facts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


class Whole:
    """One bar over a long command: `with Whole("evaluation", total=900, unit="item"):`.

    Every `Progress` inside adds what it does to this one instead of showing its own. With `counts_steps` only `step`
    does, for work whose parts are as long as each other.
    """

    running: ClassVar[Whole | None] = None

    def __init__(self, what: str, *, total: float, unit: str, done: float = 0, counts_steps: bool = False):
        self._counts_steps = counts_steps
        self._bar = Progress(what, total=total, unit=unit, done=done)

    def __enter__(self) -> Whole:
        self._outer, Whole.running = Whole.running, None  # its own bar is none of the bars inside
        self._bar.__enter__()
        Whole.running = self
        return self

    def work(self, what: str, amount: float) -> None:
        """What a bar inside has done."""
        if not self._counts_steps:
            self._bar.advance(amount, now=what)

    def step(self, what: str) -> None:
        """One of `total` parts is done."""
        if self._counts_steps:
            self._bar.advance(1, now=what)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Whole.running = self._outer
        self._bar.__exit__(kind, error, trace)
