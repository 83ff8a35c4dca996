"""Golden prompts: questions with expected answers, asked of both models at once; each pair is lost, won or equal.

Read from the person's dev pairs. Every prompt counts once for the answer's quality, because a greedy answer that is
asked for again is no new evidence; asked again it still tells whether the server answers, and how fast.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.data import answer_metrics
from utils.data.tables import ProblemList, read_text
from utils.exceptions import ConfigError, DataError, Problem
from utils.logger import warning
from utils.models import chat
from utils.rollout.edge.servers import ServerAnswer, ask
from utils.rollout.gate import Counts

# slower by this much and by the tolerance: below it a difference is noise of the machine
NOISE_S = 0.02


@dataclass(frozen=True)
class Prompt:
    """A question as messages, and the answers that are right."""

    name: str
    messages: tuple[dict[str, str], ...]
    golds: tuple[str, ...]
    example: dict[str, Any] = field(default_factory=dict, compare=False)


# how good an answer's text is, by the row of the prompt that it answers
Quality = Callable[[str, dict[str, Any]], float]


def token_f1(text: str, example: dict[str, Any]) -> float:
    """Token F1 against the expected answers of a prompt."""
    return answer_metrics.token_f1(text, example["answers"])


def read(path: Path, system_prompt: str) -> list[Prompt]:
    """Prompts of a jsonl file in the common format (question, answers or answer, context). Raises DataError."""
    prompts, problems, unreadable = [], [], ProblemList()
    text = read_text(path, unreadable)
    unreadable.raise_if_any()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if any(row.get(key) for key in ("tools", "tool_turns", "tool_calls")):
                continue  # servers differ in how they take and give calls of tools
            golds = row.get("answers") or [row["answer"]]
            golds = [golds] if isinstance(golds, str) else [str(gold) for gold in golds]
            messages = tuple(chat.messages({**row, "question": row.get("question") or row["prompt"]}, system_prompt))
            if not all(isinstance(message.get(key), str) for message in messages for key in ("role", "content")):
                raise ValueError("a turn has no role or no content")
            "".join([*golds, *(message["content"] for message in messages)]).encode()  # halves of characters are none
            prompts.append(Prompt(str(row.get("id", number)), messages, tuple(golds), {**row, "answers": golds}))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            fix = 'write {"question": "...", "answers": ["..."]}'
            problems.append(
                Problem(f"{path.name}:{number}: no golden prompt ({type(error).__name__}: {error})", fix=fix)
            )
    if problems:
        raise DataError(problems[:20])
    if not prompts:
        raise DataError(Problem("there are no golden prompts", str(path)))
    return prompts


def compare(
    prompt: Prompt, canary: ServerAnswer, production: ServerAnswer, tolerance: float, quality: Quality = token_f1
) -> dict[str, int]:
    """Per metric +1 when the canary lost, -1 when it won, 0 when equal; a metric without meaning is absent.

    So is quality where the metric fails on both answers; where it fails on one, that model has lost.
    """
    signs = {"probe_errors": _sign(bool(canary.error), bool(production.error))}
    if canary.error or production.error:
        return signs
    faults = [answer_metrics.fault(answer.text, answer.finish_reason) for answer in (canary, production)]
    signs["output"] = _sign(bool(faults[0]), bool(faults[1]))
    example = {**prompt.example, "answers": list(prompt.golds)}
    scores = [_score(quality, chat.answer_of(answer.text), example) for answer in (canary, production)]
    if max(scores) > -math.inf:
        signs["quality"] = _sign(-scores[0], -scores[1])
    for metric, name in (("first_token", "first_token_s"), ("per_token", "per_token_s")):
        times = [getattr(answer, name) for answer in (canary, production)]
        if all(times):
            slower = max(times) > min(times) * (1 + tolerance) and (
                metric == "per_token" or abs(times[0] - times[1]) > NOISE_S
            )
            signs[metric] = _sign(times[0], times[1]) if slower else 0
    return signs


def _score(quality: Quality, text: str, example: dict[str, Any]) -> float:
    """The score of an answer; below all others where a person's own metric fails on it: that must not end a rollout."""
    try:
        return quality(text, example)
    except ConfigError as error:
        for problem in error.problems:
            warning(problem.what)
        return -math.inf


def without_times(counts: Counts) -> Counts:
    """Without the pairs about speed: they compare models only while the candidate has at most half of the load."""
    return Counts(
        counts.rates, {m: outcomes for m, outcomes in counts.pairs.items() if m not in ("first_token", "per_token")}
    )


def _sign(canary: float, production: float) -> int:
    return (canary > production) - (canary < production)


@dataclass
class Example:
    """A pair that differed, for the report."""

    prompt: str
    golds: tuple[str, ...]
    canary: str
    production: str
    metric: str


class Prober:
    """Asks golden prompts of both models in the background, one pair at a time; the loop collects what is there."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        canary: str,
        production: str,
        *,
        seed: int,
        every_s: float,
        max_tokens: int,
        timeout_s: float,
        tolerance: float,
        model: str = "",
        digest: str = "",
        asked_count: int = 0,
        quality: Quality = token_f1,
    ):
        self.prompts = list(prompts)
        random.Random(seed).shuffle(self.prompts)
        self.canary, self.production = canary, production
        self.every_s, self.tolerance, self.quality = every_s, tolerance, quality
        self._options: dict[str, Any] = {"max_tokens": max_tokens, "timeout_s": timeout_s, "model": model}
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._waiting: tuple[Prompt, Future[ServerAnswer], Future[ServerAnswer]] | None = None
        self._asked_count, self._due = asked_count, 0.0
        self._digest, self.wrong_model = digest, ""
        self.examples: list[Example] = []

    def now(self, count: int) -> Counts:
        """Ask `count` prompts one after another and wait: the check before any user sees the candidate."""
        counts = Counts()
        for _ in range(min(count, len(self.prompts))):
            self._send()
            counts = counts + self._result()
        return counts

    def collect(self) -> Counts:
        """What has been answered since the last call; sends the next pair when it is due."""
        counts = Counts()
        if self._waiting and all(future.done() for future in self._waiting[1:]):
            counts = self._result()
        if self.prompts and not self._waiting and time.monotonic() >= self._due:
            self._send()
        return counts

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _send(self) -> None:
        prompt = self.prompts[self._asked_count % len(self.prompts)]
        self._due = time.monotonic() + self.every_s
        # which one is asked first alternates: the second one finds a busier machine
        order = [self.canary, self.production][:: 1 if self._asked_count % 2 else -1]
        sent = {address: self._pool.submit(ask, address, prompt.messages, **self._options) for address in order}
        self._waiting = (prompt, sent[self.canary], sent[self.production])

    def _result(self) -> Counts:
        assert self._waiting is not None
        prompt, *futures = self._waiting
        self._waiting = None
        canary, production = (future.result() for future in futures)
        if self._digest and canary.digest and canary.digest != self._digest:
            self.wrong_model = f"another model answers: digest {canary.digest[:12]}, wanted is {self._digest[:12]}"
        results = compare(prompt, canary, production, self.tolerance, self.quality)
        if self._asked_count >= len(self.prompts):  # a greedy answer that is asked for again is no new evidence
            results = {m: r for m, r in results.items() if m not in ("quality", "output")}
        self._asked_count += 1
        worse = [metric for metric in ("probe_errors", "output", "quality") if results.get(metric, 0) > 0]
        if worse and len(self.examples) < 200:
            question = prompt.messages[-1]["content"]
            texts = [answer.error or answer.text for answer in (canary, production)]
            self.examples.append(Example(question, prompt.golds, *texts, worse[0]))
        return Counts({}, {m: (int(r > 0), int(r < 0), int(r == 0)) for m, r in results.items()})
