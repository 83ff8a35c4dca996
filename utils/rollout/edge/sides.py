"""The two models of a rollout: where each is served, what it is, and the process when it is ours."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import RolloutSection
from utils.artifacts import files
from utils.exceptions import ConfigError, Problem, VerificationError
from utils.logger import warning
from utils.rollout.edge import servers
from utils.rollout.edge.haproxy import Server
from utils.rollout.edge.servers import Process


@dataclass(frozen=True)
class Side:
    """One of the two models: where it is served, what it is, and our process when we started it."""

    address: str
    digest: str
    directory: str = ""
    process: tuple[int, float] | None = None

    def server(self) -> Server:
        return Server(self.address, self.digest)

    def stop(self) -> None:
        if self.process:
            Process(*self.process, self.address).stop()

    @staticmethod
    def from_json(values: dict[str, Any] | None) -> Side | None:
        if not values:
            return None
        process = values.get("process")
        return Side(**{**values, "process": tuple(process) if process else None})


def open_side(given: str, digest: str, *, slots: Path, slot: str, known: Side | None, section: RolloutSection) -> Side:
    """The side that is meant by a directory or an address; the server of a directory is started, or found running.

    Raises ArtefactError for a directory whose files are not those of its manifest.
    """
    if given.startswith(("http://", "https://")):
        if given.startswith("https://"):
            raise ConfigError(Problem("model servers are spoken to in plain HTTP inside your network", given))
        address = given.removeprefix("http://").rstrip("/").removesuffix("/v1")  # people type what their clients use
        return Side(address, digest or servers.served_digest(address))
    directory = Path(given)
    manifest = files.verify(directory)
    if known and known.digest == manifest["digest"] and known.process and Process(*known.process, "").is_running:
        return known
    place = slots / f"{slot}-{manifest['digest'][:12]}-{time.time_ns() % 10**6:06d}"
    process = servers.launch(directory, place, section.serve_command)
    return Side(process.address, manifest["digest"], str(directory.resolve()), (process.pid, process.created))


def verify_side(side: Side, section: RolloutSection) -> None:
    """A real completion and the right digest, or ArtefactError / VerificationError."""
    process = Process(*side.process, side.address) if side.process else None
    servers.wait_ready(
        side.address,
        model=section.model_name,
        patience_s=section.start_timeout_seconds,
        alive=lambda: process is None or process.is_running,
    )
    found = servers.served_digest(side.address)
    if not found and not side.digest:
        warning("this server does not tell which model it serves; nothing but its answers is checked", at=side.address)
    elif found != side.digest:
        fix = "start the right model there, or correct the digest"
        what = f"{side.address} serves another model: digest {found[:16] or 'unknown'}, wanted is {side.digest[:16]}"
        raise VerificationError(Problem(what, fix=fix))
