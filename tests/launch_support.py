"""Scripts in several ranks at once, with what a launch file tells them, in forked processes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.fault_support import port
from tests.support import Completed, Workspace
from tests.test_planning_plan import LAUNCH, told_by

# how a script can be started -> the file of scripts/launch/ and the number of ranks
WAYS: dict[str, tuple[str, int]] = {
    "python": ("", 1),
    "one": ("cpu.yaml", 1),
    "whole": ("cpu_two_processes.yaml", 2),
    "sharded": ("cpu_two_processes_fsdp.yaml", 2),
    "hybrid": ("cpu_four_processes_hsdp.yaml", 4),
    # ranks share the experts: two that hold each once, in a shard of four or in each of two copies too
    "experts": ("cpu_two_processes_fsdp.yaml", 2),
    "experts_in_four": ("cpu_two_processes_fsdp.yaml", 4),
    "experts_hybrid": ("cpu_four_processes_hsdp.yaml", 4),
}
EXPERTS = tuple(way for way in WAYS if way.startswith("experts"))


@functools.cache
def told(file: str) -> Mapping[str, str]:
    """What accelerate tells the ranks about sharding."""
    if not file:
        return {}
    found = told_by("--config_file", str(LAUNCH / file))
    return {
        k: v for k, v in found.items() if k.startswith(("ACCELERATE_USE_", "FSDP_", "PARALLELISM_", "CUDA_VISIBLE"))
    }


def launch(
    place: Workspace,
    way: str,
    script: str,
    *flags: str,
    before: Mapping[int, Callable[[], None]] | None = None,
    env: Mapping[int, Mapping[str, str]] | None = None,
    more: Mapping[int, tuple[str, ...]] | None = None,
) -> list[Completed[str]]:
    """Run to the end in every rank; `before`, `env` and `more` flags are those of single ranks."""
    file, count = WAYS[way]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}
    scripts = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        environment = {**told(file), **(own | address if way != "python" else {}), **(env or {}).get(rank, {})}
        words = (*flags, *(["--run.expert_parallel=2"] if way in EXPERTS else []), *(more or {}).get(rank, ()))
        scripts.append(place.start(script, *words, env=environment, before=(before or {}).get(rank)))
    return [running.wait() for running in scripts]


def result(ended: list[Completed[str]]) -> dict[str, Any]:
    """The one line of JSON. Raises AssertionError unless all ranks succeeded and rank 0 alone printed."""
    for rank, done in enumerate(ended):
        if done.returncode:
            raise AssertionError(f"rank {rank} of {done.args} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        # a library may warn of a slow connection; what we say is rank 0's
        if rank and (done.stdout or "Traceback" in done.stderr or "  path=" in done.stderr):
            raise AssertionError(f"rank {rank} of {done.args} printed:\n{done.stdout}\n{done.stderr[-2000:]}")
    lines = [line for line in ended[0].stdout.splitlines() if line.startswith("{") and line.endswith("}")]
    if ended[0].stdout.splitlines()[-1:] != lines[-1:]:
        raise AssertionError(f"the last line is no JSON:\n{ended[0].stdout}")
    return dict(json.loads(lines[-1]))


def numbers(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a JSON value by its place."""
    if isinstance(value, dict):
        return {k: v for name, one in value.items() for k, v in numbers(one, f"{path}/{name}").items()}
    if isinstance(value, list):
        return {k: v for at, one in enumerate(value) for k, v in numbers(one, f"{path}/{at}").items()}
    return {path: value}


def different(one: Any, other: Any, tolerance: float = 1e-5) -> list[str]:
    """Places where two JSON values differ, numbers by more than `tolerance` of their size."""
    left, right = numbers(one), numbers(other)
    for leaves in (left, right):  # a time, and the seal over it
        for place in [place for place in leaves if place.endswith(("/answering_seconds", "/seal"))]:
            del leaves[place]
    found = [f"{place}: only in one" for place in left.keys() ^ right.keys()]
    for place in left.keys() & right.keys():
        a, b = left[place], right[place]
        both = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
        if not (abs(a - b) <= tolerance * max(abs(a), abs(b), 1e-3) if both else a == b):
            found.append(f"{place}: {a!r} and {b!r}")
    return sorted(found)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
