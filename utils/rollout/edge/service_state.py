"""What a service remembers between commands: its two models (address, digest, our process) and which is production."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import RolloutSection
from utils.artifacts import files
from utils.exceptions import MALFORMED, ArtefactError, ConfigError, Problem, VerificationError
from utils.logger import warning
from utils.rollout.edge import journal, servers
from utils.rollout.edge.balancer.haproxy import Balancer, find_binary
from utils.rollout.edge.balancer.haproxy_configuration import MODEL_NAME, SLOTS, Layout, Server
from utils.rollout.edge.journal import Story
from utils.rollout.edge.servers import Process

# a time and the beginning of a digest
_ROLLOUT = re.compile(r"\w[\w.-]*")


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


class Service:
    """The directory of one service. Facts that outlive a command are in service.json, written atomically."""

    def __init__(self, section: RolloutSection, models_dir: Path):
        self.section = section
        self.home = (models_dir / "rollout" / section.service).resolve()
        self.facts_path = self.home / "service.json"
        self.facts: dict[str, Any] = {}
        self.damaged: ArtefactError | None = None
        """Why service.json cannot be read: `abort` and `stop` work all the same."""
        try:
            self.facts = _checked(self.facts_path) if self.facts_path.exists() else {}
        except ArtefactError as error:
            fix = "python scripts/rollout.py abort sends everyone to production and sets it aside"
            self.damaged = ArtefactError([*error.problems, Problem("this service's memory is damaged", fix=fix)])

    @property
    def balancer(self) -> Balancer:
        return Balancer(self.home, find_binary(self.section.haproxy))

    def remember(self, **facts: Any) -> None:
        self.facts = {**self.facts, **facts}
        files.write_json(self.facts_path, self.facts)

    def side(self, which: str) -> Side | None:
        return Side.from_json(self.facts.get(which))

    @property
    def rollout(self) -> Path | None:
        """The directory of the newest rollout."""
        if self.damaged:
            return max((path for path in self.home.glob("rollouts/*") if path.is_dir()), default=None)
        return self.home / "rollouts" / self.facts["rollout"] if self.facts.get("rollout") else None

    def story(self) -> Story:
        """Raises ArtefactError when there is no rollout."""
        if self.rollout is None:
            fix = "python scripts/rollout.py start --rollout.production ... --rollout.candidate ..."
            raise ArtefactError(Problem(f"no rollout was started under {self.home}", fix=fix))
        return journal.read(self.rollout / "journal.jsonl")

    def layout(self, *, with_canary: bool) -> Layout:
        production, candidate = self.side("production"), self.side("candidate")
        assert production is not None
        return Layout(
            production.server(),
            candidate.server() if with_canary and candidate else None,
            self.facts["port"],
            session_header=self.section.session_header,
            server_timeout_s=self.section.server_timeout_seconds,
            reload_drain_s=self.section.reload_drain_seconds,
            models=tuple(self.facts.get("models") or (self.section.model_name or servers.MODEL,)),
            slot=self.slot,
        )

    @property
    def slot(self) -> int:
        """Production's slot in the balancer; the candidate has the other one."""
        return int(self.facts.get("slot") or 0)


def open_side(given: str, digest: str, *, slots: Path, slot: str, known: Side | None, section: RolloutSection) -> Side:
    """The side that is meant by a directory or an address; the server of a directory is started, or found running.

    Raises ArtefactError for a directory whose files are not those of its manifest.
    """
    if given.startswith(("http://", "https://")):
        if given.startswith("https://"):
            raise ConfigError(Problem("model servers are asked over plain HTTP inside your network", given))
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
    digest = servers.served_digest(side.address)
    if not digest and not side.digest:
        warning("this server does not tell which model it serves; nothing but its answers is checked", at=side.address)
    elif digest != side.digest:
        fix = "start the right model there, or correct the digest"
        what = f"{side.address} serves another model: digest {digest[:16] or 'unknown'}, wanted is {side.digest[:16]}"
        raise VerificationError(Problem(what, fix=fix))


def _checked(path: Path) -> dict[str, Any]:
    """What service.json says. Raises ArtefactError for what this program never writes there."""
    facts = files.read_object(path)
    fits: dict[str, Any] = {
        "port": lambda value: isinstance(value, int) and 0 < value < 1 << 16,
        "rollout": lambda value: isinstance(value, str) and _ROLLOUT.fullmatch(value),
        "slot": lambda value: type(value) is int and value in SLOTS,
        "models": lambda value: isinstance(value, list) and all(MODEL_NAME.fullmatch(str(name)) for name in value),
        **dict.fromkeys(("production", "candidate", "previous"), _is_side),
    }
    wrong = [key for key, fit in fits.items() if facts.get(key) is not None and not fit(facts[key])]
    if wrong:
        raise ArtefactError([Problem(f"{path}: {key} is not what belongs there", facts[key]) for key in wrong])
    return facts


def _is_side(value: Any) -> bool:
    try:
        side = Side.from_json(value)
    except MALFORMED:
        return False
    process = side.process if side else None
    is_process = process is None or (
        [type(number) for number in process] in ([int, float], [int, int]) and 0 < process[0] < 1 << 31
    )
    return side is None or (is_process and all(isinstance(t, str) for t in (side.address, side.digest, side.directory)))
