"""The life of one command in several ranks: they meet, check that they were told the same, and end together."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from config import Config
from utils.exceptions import ConfigError, Interrupted, PipelineError, Problem, is_lost_process
from utils.flags import arguments
from utils.models import devices
from utils.models.parallel import ranks
from utils.models.parallel.errors import REPORTED, Elsewhere, Watch, error_of, post
from utils.models.parallel.ranks import Team

# of one collective; all ranks are there when it begins
COLLECTIVE = timedelta(minutes=30)
# how long a rank that ends waits for the others to have heard of it
FAREWELL_SECONDS = 15.0
# the same, where a rank is known to be gone for good
LOST_FAREWELL_SECONDS = 4.0
SAME_COMMAND = "give the same command on every node"
_failed: list[Team] = []
_joined = itertools.count()


def run(main: Callable[[Config], dict[str, Any]], config: Config, *, on_all: bool) -> dict[str, Any]:
    """`main(config)` over all ranks: on rank 0, which calls the others, or `on_all` of them from beginning to end.

    Returns its result on rank 0 and nothing on the others. An error of any rank is raised on all of them.
    """
    team = _join()
    try:
        team.together = True
        _refuse_other_settings(config)
        team.together = on_all
        result = main(config) if on_all or team.rank == 0 else ranks.serve(team)
        if on_all:
            ranks.meet()
        elif team.rank == 0:
            ranks.dismiss(team)
    except BaseException as error:
        raise _ended_by(team, error) from error
    finally:
        ranks.exit(team)
    team.watch.stop()
    team.store.add("farewell", 1)
    if team.rank == 0:  # it may be the one that holds the store
        _until(lambda: team.store.add("farewell", 0) >= team.size, FAREWELL_SECONDS)
    return result if team.rank == 0 else {}


def leave() -> None:
    """End together: called when everything is said. After an error rank 0, which has said it, lets the others go."""
    if _failed:
        team = _failed.pop()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it as soon as one rank has ended
        with suppress(RuntimeError):  # the store is gone
            if team.rank == 0:
                team.store.set(REPORTED, "said")
            team.store.add("farewell", 1)
        if team.rank == 0:
            record = team.watch.error or {}
            waits = LOST_FAREWELL_SECONDS if record.get("exit_code") == Interrupted.exit_code else FAREWELL_SECONDS
            _until(lambda: team.store.add("farewell", 0) >= team.size, waits)
        return  # a connection that is broken cannot be closed in order
    if dist.is_initialized():
        dist.destroy_process_group()


def _join() -> Team:
    """Meet the other ranks; the process group stays until `leave`."""
    from accelerate import PartialState

    PartialState(cpu=devices.device().type == "cpu", timeout=COLLECTIVE)
    store = dist.PrefixStore(f"ranks/{next(_joined)}", dist.distributed_c10d._get_default_store())
    # objects travel in main memory, also beside GPUs, and never between the collectives of a pass
    control = dist.new_group(backend="gloo", timeout=COLLECTIVE)
    rank, count = dist.get_rank(), dist.get_world_size()
    team = Team(rank, count, store, control, Watch(store, rank, count))
    ranks.enter(team)
    return team


def _refuse_other_settings(config: Config) -> None:
    """Raises ConfigError on every rank when they were given different commands."""
    sections = [name for name in type(config).model_fields if name not in ("preset", "overrides")]
    _, *flags = arguments(config, sections)
    given = {name.removeprefix("--"): value for name, _, value in (flag.partition("=") for flag in flags)}
    one, unlike = ranks.compared(given)
    problems = [
        Problem(f"rank {rank} was given another --{name} than rank 0", (other.get(name), one.get(name)), SAME_COMMAND)
        for rank, (other, names) in unlike.items()
        for name in names
    ]
    if problems:
        raise ConfigError(problems[:8])


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """As `wait_until`, for so long at most; whether the condition holds. Nothing is waited for without a store."""
    end = time.monotonic() + seconds
    try:
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(ranks.LOOK_SECONDS)
    except RuntimeError:
        return False
    return True


def _ended_by(team: Team, error: BaseException) -> BaseException:
    """What this rank ends with: its own error, which the others are told, or the one that another rank told first."""
    if is_lost_process(error):  # what broke the connection may have an explanation, which comes a moment later
        _until(lambda: team.watch.error is not None, 2 * team.watch.beat_seconds)
    heard = team.watch.error = team.watch.error or post(team.store, team.rank, error)
    team.watch.stop(failed=True)
    _failed.append(team)
    if heard is None:  # nobody can be told
        return error
    if team.rank:
        waits = LOST_FAREWELL_SECONDS if heard["exit_code"] == Interrupted.exit_code else FAREWELL_SECONDS
        if _until(lambda: team.store.check([REPORTED]), waits):
            return Elsewhere(heard)
        # rank 0 cannot say it any more
        return dist.DistNetworkError("the first rank") if team.watch.is_without_first() else Elsewhere(heard)
    is_own = heard["rank"] == 0 or isinstance(error, PipelineError) or not isinstance(error, Exception)
    return error if is_own else error_of(heard)
