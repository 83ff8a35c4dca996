"""Batches over the ranks: who computes which, in step where they hold the model together, results by number, errors."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from utils.exceptions import PipelineError
from utils.logger import event
from utils.models.parallel import expert_parallel, launcher, ranks
from utils.models.parallel.errors import post
from utils.progress import Progress

T, R = TypeVar("T"), TypeVar("R")


def computed(
    batches: Sequence[T],
    costs: Sequence[float],
    compute: Callable[[T], R],
    bar: Progress | None = None,
    amounts: Sequence[float] = (),
    *,
    in_step: bool | None = None,
    spare: Callable[[T], R] | None = None,
) -> list[R]:
    """`compute(batch)` of each batch, each on one rank; all of them, in order, on every rank.

    Costs decide who computes what, the most expensive first. Where ranks hold the model together each of them computes
    equally often, and repeats a batch whose result is dropped when it has none left (with `spare`, if given);
    `in_step` False: the model has no part in it. `bar` advances by `amounts`.
    """
    if ranks.size() == 1:
        results = []
        for number, batch in enumerate(batches):
            results.append(compute(batch))
            if bar is not None:
                bar.advance(amounts[number])
        return results
    in_step = ranks.is_sharded() if in_step is None else in_step
    parts = assigned(costs, ranks.size(), in_step=in_step)
    mine = parts[ranks.index()]
    passes = len(parts[0]) if in_step else len(mine)
    scale = sum(amounts) / max(1e-9, sum(amounts[number] for number in mine)) if bar is not None else 0.0
    own: dict[int, R] = {}
    expert_parallel.count_rows()
    for at in range(passes):
        number = mine[at] if at < len(mine) else 0
        with _agreed(at_once=in_step):
            value = (compute if at < len(mine) or spare is None else spare)(batches[number])
        if at < len(mine):
            own[number] = value
            if bar is not None:
                bar.advance(amounts[number] * scale)
    if in_step and bar is not None and launcher.current().expert > 1:
        largest, mean = expert_parallel.rows_of_exchanges()
        event("rows of the experts on a rank", largest=largest, mean=round(mean))
    everyone: dict[int, R] = {}
    for part in ranks.gathered(own):
        everyone |= part
    return [everyone[number] for number in range(len(batches))]


def assigned(costs: Sequence[float], count: int, *, in_step: bool = False) -> list[list[int]]:
    """The batches of each rank, longest first to the rank that has least; `in_step`: of like cost at the same time."""
    order = sorted(range(len(costs)), key=lambda number: (-costs[number], number))
    if in_step:
        return [order[rank::count] for rank in range(count)]
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [(0.0, rank) for rank in range(count)]
    for number in order:
        load, rank = heapq.heappop(loads)
        parts[rank].append(number)
        heapq.heappush(loads, (load + costs[number], rank))
    return parts


class _agreed:
    """Meanwhile an error of this rank; afterwards an error of any rank, on all of them.

    At once where they would otherwise wait for each other in the next pass; elsewhere as soon as a rank looks.
    """

    def __init__(self, *, at_once: bool):
        self.team, self.at_once = ranks.team(), at_once

    def __enter__(self) -> None:
        if not self.at_once:
            self.team.watch.raise_error()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # what is not ours may have come in the middle of a pass, in which the others are waiting: no place to agree
        if not self.at_once or (error is not None and not isinstance(error, PipelineError)):
            return
        if error is not None:  # told at once: should the others be in a pass after all, they are given time to end
            post(self.team.store, self.team.rank, error)
        flag = torch.tensor(float(error is not None))
        dist.all_reduce(flag, group=self.team.control)
        if flag and error is None:
            ranks.wait_until(self.team, lambda: False)  # its rank is about to say what it is
