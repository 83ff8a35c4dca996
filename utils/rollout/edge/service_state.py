"""What a service remembers between commands: who is production, who is the candidate, which processes are ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from config import RolloutSection
from utils.artifacts import files
from utils.exceptions import ArtefactError, Problem
from utils.rollout.edge import haproxy, journal
from utils.rollout.edge.haproxy import Balancer, Layout
from utils.rollout.edge.journal import Story
from utils.rollout.edge.sides import Side


class Service:
    """The directory of one service. Facts that outlive a command are in service.json, written atomically."""

    def __init__(self, section: RolloutSection, models_dir: Path):
        self.section = section
        self.home = (models_dir / "rollout" / section.service).resolve()
        self.facts_path = self.home / "service.json"
        self.facts: dict[str, Any] = files.read_json(self.facts_path) if self.facts_path.exists() else {}

    @property
    def balancer(self) -> Balancer:
        return Balancer(self.home, haproxy.find_binary(self.section.haproxy))

    def remember(self, **facts: Any) -> None:
        self.facts = {**self.facts, **facts}
        files.write_json(self.facts_path, self.facts)

    def side(self, which: str) -> Side | None:
        return Side.from_json(self.facts.get(which))

    @property
    def rollout(self) -> Path | None:
        """The directory of the newest rollout."""
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
        canary = candidate.server() if with_canary and candidate else None
        section = self.section
        return Layout(
            production.server(), canary, self.facts["port"], section.session_header, section.server_timeout_seconds
        )
