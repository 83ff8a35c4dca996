"""Several ranks as one program: rank 0 runs the script, and the others do with it what it calls all of them to.

`everywhere(function, ...)` runs a function on every rank at once; in it `work.computed` splits batches over the
ranks and gathers the results, and `first` lets rank 0 work alone. Outside of it a rank is by itself, nothing is sent,
and code for one process needs no change. The training scripts are one such function from beginning to end.

Waits are looks at the launcher's store, and last as long as the other ranks give signs of life: what one rank does by
itself may take hours. A collective is entered when all are there, so that its timeout measures the machine. An error on
one rank ends all of them with its exit code, and rank 0 says it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch.distributed as dist

from utils.exceptions import PipelineError, Problem, VerificationError
from utils.models import devices
from utils.models.parallel import launcher
from utils.models.parallel.errors import Watch

T, R = TypeVar("T"), TypeVar("R")
# between two looks at the store, growing while nothing happens
LOOK_SECONDS, LONGEST_LOOK_SECONDS = 0.002, 0.1
SUSPECT = "nothing was published; run the same command again, and if it happens again suspect the hardware"


@dataclass
class Team:
    """The ranks of one command, as one of them sees it."""

    rank: int
    size: int
    store: dist.Store
    control: Any
    watch: Watch
    together: bool = False
    commands: int = 0
    meetings: int = 0
    firsts: int = 0


_teams: list[Team] = []


def size() -> int:
    """How many ranks do this together: one outside of `everywhere`."""
    return _teams[-1].size if _teams and _teams[-1].together else 1


def index() -> int:
    """Which of them this is."""
    return _teams[-1].rank if _teams and _teams[-1].together else 0


def is_sharded() -> bool:
    """Whether the model is held by several ranks together, here."""
    return size() > 1 and launcher.current().shard > 1


def everywhere(function: Callable[..., R], *positional: Any, **named: Any) -> R:
    """Run `function` on every rank, and return what it returns on this one.

    Everything has to be picklable; a `Held` among the arguments is each rank's own object.
    """
    team = _teams[-1] if _teams else None
    if team is None or team.together:
        return function(*map(_own, positional), **named)
    _send(team, (function, positional, named))
    return _together(team, function, positional, named)


class Held:
    """An object that every rank makes for itself with `make(...)`; its methods are called on all of them at once.

    Its attributes are those of this rank's object. Use it in `with`, or call `free`, to have its memory back.
    """

    _objects: ClassVar[dict[int, Any]] = {}
    _next: ClassVar[int] = 0

    def __init__(self, make: Callable[..., Any], *positional: Any, **named: Any):
        # made by rank 0 alone outside of `everywhere`, by each rank for itself inside: never the same number
        Held._next += 1
        self._number = Held._next * 2 + (size() > 1)
        everywhere(_make, self._number, make, positional, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_number":
            raise AttributeError(name)
        value = getattr(Held._objects[self._number], name)
        if getattr(value, "__self__", None) is not Held._objects[self._number]:
            return value
        return lambda *positional, **named: everywhere(_called, self, name, positional, named)

    def __reduce__(self) -> Any:
        return _held, (self._number,)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.free()
        else:  # the command is ending, and nobody may be there to be called
            _drop(self._number)

    def free(self) -> None:
        """Every rank drops its object."""
        everywhere(_drop, self._number)


def undivided(make: Callable[..., T], *positional: Any) -> T | Any:
    """An object whose work cannot be split: rank 0's own, or every rank's where they hold the model together."""
    return Held(make, *positional) if launcher.current().shard > 1 else make(*positional)


def gathered(value: T) -> list[T]:
    """The value of every rank, on all of them."""
    if size() == 1:
        return [value]
    team = _teams[-1]
    meet()
    everyone: list[Any] = [None] * team.size
    dist.all_gather_object(everyone, value, group=team.control)
    return everyone


def first(work: Callable[[], R]) -> R:
    """What `work()` gives on rank 0, on all of them; the others wait for as long as it lives."""
    if size() == 1:
        return work()
    team = _teams[-1]
    team.firsts += 1
    key = f"first/{team.firsts}"
    value = [work() if team.rank == 0 else None]
    if team.rank == 0:
        team.store.set(key, "done")
    wait_until(team, lambda: team.store.check([key]))
    dist.broadcast_object_list(value, 0, group=team.control)
    return value[0]  # type: ignore[return-value]


def first_of_node(work: Callable[[], R]) -> R:
    """`work()` on one rank of each node, then on the others, which find what it left: downloads and builds."""
    if size() == 1:
        return work()
    team = _teams[-1]
    team.firsts += 1
    # the launcher numbers the ranks of a node one after the other
    node = team.rank - int(os.environ.get("LOCAL_RANK", "0"))
    key = f"node/{team.firsts}/{node}"
    if team.rank == node:
        value = work()
        team.store.set(key, "done")
        return value
    wait_until(team, lambda: team.store.check([key]))
    return work()


def team() -> Team:
    """The ranks that do this together, of which there are several (`size`)."""
    return _teams[-1]


def meet() -> None:
    """Wait until every rank is here. Raises the error of a rank that ends instead."""
    if size() == 1:
        return
    team = _teams[-1]
    team.meetings += 1
    key = f"meeting/{team.meetings}"
    team.store.add(key, 1)
    wait_until(team, lambda: team.store.add(key, 0) >= team.size)


def refuse_unequal(
    values: Mapping[str, Any], what: str, error: type[PipelineError] = VerificationError, fix: str = SUSPECT
) -> None:
    """Raises `error` on every rank when `values` is not the same on all of them."""
    one, unlike = compared(values)
    if unlike:
        others, names = ", ".join(map(str, unlike)), next(iter(unlike.values()))[1]
        difference = f"{what} differs between rank 0 and {others}, in {len(names)} of {len(one)} values: {names[:5]}"
        raise error(Problem(difference, fix=fix))


def unequal_copies(own_values: Mapping[str, Any], copy_of: int) -> list[str]:
    """Names whose values differ among the ranks that are copies of the same part, on every rank."""
    one: dict[int, Mapping[str, Any]] = {}
    unequal: set[str] = set()
    for part, values in gathered((copy_of, dict(own_values))):
        known = one.setdefault(part, values)
        unequal |= {name for name in {*known, *values} if known.get(name) != values.get(name)}
    return sorted(unequal)


# ------------------------------------------------------------------------------------------------ inside


def compared(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[int, tuple[Mapping[str, Any], list[str]]]]:
    """(rank 0's values, rank -> (its values, the names of those that differ) of each rank with others)."""
    one, *others = gathered(dict(values))
    return one, {
        rank: (other, [name for name in sorted({*one, *other}, key=str) if one.get(name) != other.get(name)])
        for rank, other in enumerate(others, 1)
        if other != one
    }


def enter(team: Team) -> None:
    """From now on this rank is one of them."""
    _teams.append(team)
    team.watch.start()


def exit(team: Team) -> None:
    """It is no more."""
    _teams.remove(team)


def dismiss(team: Team) -> None:
    """Rank 0 has no more work for the others."""
    _send(team, None)


def serve(team: Team) -> dict[str, Any]:
    """Do what rank 0 calls for, until it has no more."""
    while True:
        team.commands += 1
        key = f"command/{team.commands}"
        wait_until(team, lambda key=key: team.store.check([key]))
        received: list[Any] = [None]
        dist.broadcast_object_list(received, 0, group=team.control)
        if received[0] is None:
            return {}
        _together(team, *received[0])


def _send(team: Team, command: Any) -> None:
    team.commands += 1
    team.store.set(f"command/{team.commands}", "sent")
    dist.broadcast_object_list([command], 0, group=team.control)


def _together(team: Team, function: Callable[..., R], positional: Sequence[Any], named: Mapping[str, Any]) -> R:
    team.together = True
    try:
        value = function(*map(_own, positional), **named)
        meet()
    finally:
        team.together = False
    return value


def wait_until(team: Team, condition: Callable[[], bool]) -> None:
    """Until the condition holds. Raises the error of another rank, or that it is gone."""
    pause = LOOK_SECONDS
    while not condition():
        team.watch.raise_error()
        time.sleep(pause)
        pause = min(LONGEST_LOOK_SECONDS, 1.2 * pause)


def _own(value: Any) -> Any:
    return Held._objects[value._number] if isinstance(value, Held) else value


def _held(number: int) -> Any:
    return Held._objects[number]


def _make(number: int, make: Callable[..., Any], positional: Sequence[Any], named: Mapping[str, Any]) -> None:
    Held._objects[number] = make(*map(_own, positional), **named)


def _called(target: Any, name: str, positional: Sequence[Any], named: Mapping[str, Any]) -> Any:
    return getattr(target, name)(*positional, **named)


def _drop(number: int) -> None:
    Held._objects.pop(number, None)
    devices.free_memory()
