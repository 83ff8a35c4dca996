"""What the fault tests share: a trained workspace, faults that are put into a script's process, kills until it is done.

The processes are real and so are the signals, the full disks and the limits; what is put in is only where and when.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
import unittest
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from tests.support import Completed, Script, Workspace, last_json, temporary_directory
from utils import logger
from utils.artifacts import files

LONG = os.environ.get("FAULT_TESTS") == "long"
SAVE_EVERY = 4
TRAIN = {
    "epochs": 2,
    "batch_tokens": 256,
    "micro_batch_tokens": 128,
    "save_every_steps": SAVE_EVERY,
    "evals_per_epoch": 2,
    "keep": "best",
}
ADAPTER = "adapter/adapter_model.safetensors"


class Place(Workspace):
    """A workspace whose base model is in several files, as large ones are."""

    def __init__(self) -> None:
        super().__init__()
        base = self.models / "base" / "tiny-minimax-m2"
        with logger.quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(base)
            (base / "model.safetensors").unlink()
            model.save_pretrained(base, max_shard_size="200KB")
        files.seal(base, {key: files.read_manifest(base)[key] for key in ("kind", "source")})

    def train(self, name: str, *more: str, **how: Any) -> Script:
        return self.start("train_domain_adapter", "--run.name", name, *training_flags("domain"), *more, **how)

    def run_of(self, name: str, stage: str = "domain") -> Path:
        return self.models / stage / name

    def pair(self, name: str, *more: str, before: Any = (None, None)) -> list[Script]:
        """The two processes of one run of the domain adapter."""
        return self.two("train_domain_adapter", "--run.name", name, *training_flags("domain"), *more, before=before)

    def two(
        self, script: str, *flags: str, before: Any = (None, None), told: dict[str, str] | None = None
    ) -> list[Script]:
        """Two processes of a script, with what a launcher sets in their environment, and what else it told them."""
        there = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port())}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **there, **(told or {})} for rank in (0, 1)]
        return [self.start(script, *flags, env=env, before=fault) for env, fault in zip(ranks, before, strict=True)]


def port() -> int:
    """One that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def training_flags(stage: str) -> list[str]:
    return [f"--{stage}.train.{name}={value}" for name, value in TRAIN.items()] + [f"--{stage}.lora.dropout=0.1"]


@functools.cache
def trained() -> Place:
    """Prepared data, and an uninterrupted run of the domain adapter called `reference`."""
    place = Place()
    place.prepare()
    last_json(place.train("reference").wait())
    return place


@functools.cache
def with_both_adapters() -> Place:
    """The same place, with a task adapter and the control."""
    place = trained()
    flags = ["--domain_adapter", str(place.run_of("reference"))]
    last_json(place.run("train_task_adapter", "--run.name", "reference", *flags))
    last_json(place.run("train_task_adapter", "--run.name", "control", "--task.on", "base"))
    return place


# ------------------------------------------------------------------------------------------- faults, in the process


@dataclass(frozen=True)
class At:
    """Before the `call`-th call of the function `where` (all of them: 0), `act` is called."""

    where: str
    act: Callable[[], None]
    call: int = 1

    def __call__(self) -> None:
        owner, name = resolve(self.where)
        original, count = getattr(owner, name), 0

        @functools.wraps(original)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if self.call in (0, count):
                self.act()
            return original(*arguments, **named)

        setattr(owner, name, wrapped)


@dataclass(frozen=True)
class All:
    """Several faults."""

    faults: tuple[Callable[[], None], ...]

    def __call__(self) -> None:
        for fault in self.faults:
            fault()


@dataclass(frozen=True)
class Unchecked:
    """Merges are not reloaded and compared, which takes most of their time and has its own tests."""

    def __call__(self) -> None:
        from utils.export import merge_check

        merge_check.merged_equals_composed = lambda *arguments, **named: {}


def resolve(where: str) -> tuple[Any, str]:
    """`utils.training.training_loop._TrainingLoop._save` -> (the class, "_save")."""
    *parts, name = where.split(".")
    for length in range(len(parts), 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            owner = getattr(owner, part)
        return owner, name
    raise ModuleNotFoundError(where)


@dataclass(frozen=True)
class SlowWriting:
    """Files are written in two halves with a pause between, and each step of publishing takes a while."""

    seconds: float

    def __call__(self) -> None:
        import safetensors.torch

        from utils.models.weights import safetensors_io
        from utils.training import checkpoints

        def in_halves(tensors: Any, path: Any, metadata: Any = None) -> None:
            content = safetensors.torch.save(tensors, metadata)
            with open(path, "wb") as handle:
                handle.write(content[: len(content) // 2])
                handle.flush()
                self.wait()
                handle.write(content[len(content) // 2 :])

        remove, pieces = checkpoints._remove, safetensors_io._pieces

        def slow_pieces(*arguments: Any) -> Iterator[Any]:
            for piece in pieces(*arguments):
                yield piece
                time.sleep(self.seconds / 20)

        safetensors.torch.save_file = in_halves
        safetensors_io._pieces = slow_pieces
        checkpoints._remove = lambda directory: (self.wait(), remove(directory))
        for where in ("os.fsync", "utils.artifacts.files.seal", "datasets.Dataset.save_to_disk"):
            At(where, self.wait, call=0)()

    def wait(self) -> None:
        time.sleep(self.seconds)


@dataclass(frozen=True)
class FillDisk:
    """Write until no byte is left."""

    ballast: Path

    def __call__(self) -> None:
        descriptor = os.open(self.ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    os.write(descriptor, bytes(size))
            except OSError:
                continue
        os.close(descriptor)


@dataclass(frozen=True)
class LimitFiles:
    """From now on no file of this process may become larger than this."""

    size: int

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


@dataclass(frozen=True)
class LimitMemory:
    """From now on this process may map only this many bytes more than it has; with 0, malloc has no reserve."""

    more: int

    def __call__(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + self.more
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        for reserve in () if self.more else (1 << 24, 1 << 20, 1 << 16, 1 << 13):
            while libc.malloc(ctypes.c_size_t(reserve)):
                pass


@dataclass(frozen=True)
class Send:
    """A signal to this process."""

    number: int

    def __call__(self) -> None:
        os.kill(os.getpid(), self.number)


@dataclass(frozen=True)
class Raise:
    """An exception, made there from its type and text."""

    where: str
    text: str

    def __call__(self) -> None:
        owner, name = resolve(self.where)
        raise getattr(owner, name)(self.text)


def obey_permissions() -> None:
    """Root obeys permission bits from now on: it gives up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH for good."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, held):
        raise OSError(ctypes.get_errno(), "capget")
    for word in (0, 1):  # effective, permitted
        held[word] &= ~0b110
    if libc.capset(header, held):
        raise OSError(ctypes.get_errno(), "capset")


# ------------------------------------------------------------------------------------------------- disks and kills


@contextmanager
def small_disk(size: str) -> Iterator[Path]:
    """A file system of its own with this many bytes; the test is skipped where it may not be mounted."""
    directory = temporary_directory()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise unittest.SkipTest("there is no mount command here") from error
    if mounted.returncode:
        raise unittest.SkipTest(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


class Killer:
    """SIGKILL at seeded random moments, again and again, until a command ends by itself."""

    def __init__(self, seed: int, kills: int):
        self.random, self.left = random.Random(seed), kills
        self.killed = 0

    def run(
        self,
        start: Callable[[], Script],
        moment: Callable[[Script, random.Random], None],
        after: Callable[[], None] = lambda: None,
    ) -> Completed[str]:
        """Start, wait for the moment, kill, start again ...; `after` each kill is for a look at what is left."""
        while True:
            script = start()
            if not self.left:
                return script.wait()
            moment(script, self.random)
            script.signal(signal.SIGKILL)
            done = script.wait()
            if done.returncode != -signal.SIGKILL:
                return done
            self.left, self.killed = self.left - 1, self.killed + 1
            after()


def within(seconds: float) -> Callable[[Script, random.Random], None]:
    """Any moment of the first seconds."""

    def wait(script: Script, generator: random.Random) -> None:
        end = time.monotonic() + generator.uniform(0.05, seconds)
        script.wait_until(lambda: time.monotonic() >= end)

    return wait


def while_writing(directory: Path, seconds: float) -> Callable[[Script, random.Random], None]:
    """Any moment of the first seconds or, every other time, while a small file of the directory is written."""

    def wait(script: Script, generator: random.Random) -> None:
        within(seconds)(script, generator)
        if generator.random() < 0.5:
            script.wait_until(lambda: any(directory.glob(".*.tmp-*")))
            time.sleep(generator.uniform(0.0, 0.1))

    return wait


def contents(directory: Path, *without: str) -> dict[str, str]:
    """File name -> sha256 of what an artefact holds."""
    return {
        path.relative_to(directory).as_posix(): files.sha256_file(path)
        for path in files.artefact_files(directory)
        if path.name not in without
    }


def rubbish(directory: Path) -> list[str]:
    """Names of temporary files and directories anywhere below, except what can be gone on from."""
    return sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob(".*")
        if ".tmp" in path.name or path.name.startswith((".removing", ".reading", ".selfcheck"))
    )


def copied(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target)
    return target
