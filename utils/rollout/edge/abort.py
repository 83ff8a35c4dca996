"""Abort: everyone to production, whatever is damaged. It works from what is there: the socket, the map, the files.

The share is taken to zero before anything is read. What cannot be read is said, and set aside under another name.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.artifacts import files
from utils.exceptions import ArtefactError, BalancerError, PipelineError, Problem, VerificationError
from utils.logger import event, warning
from utils.rollout.controller import Observation
from utils.rollout.edge import journal, on_event
from utils.rollout.edge.balancer.haproxy import Balancer
from utils.rollout.edge.journal import Journal
from utils.rollout.edge.promotion import restore
from utils.rollout.edge.rollout_loop import send_command
from utils.rollout.edge.service_state import Service


def abort(service: Service) -> dict[str, Any]:
    """Everything to production now. Needs neither the controller nor the journal, nor a writable disk.

    What is damaged does not stand in the way: it is said, and set aside under another name.
    """
    directory = service.rollout
    if directory is not None:
        with suppress(OSError):  # first, so that a running controller does not take us for a stranger
            send_command(directory, "abort")
    answered = to_production(service, with_warning=True)
    if directory is None and not service.damaged:
        service.story()
    end = time.monotonic() + 5 * service.section.tick_seconds + 5
    while time.monotonic() < end:
        try:
            with files.locked(service.home, "the service"):
                aside = _abort_without_controller(service, directory)
                done = {"aborted": True, "share_bp": 0 if answered else None, "rollout": str(directory)}
                return done | ({"set_aside": aside} if aside else {})
        except ArtefactError as error:
            if "in use by" not in str(error):
                raise
            if service.damaged:  # its controller lives and has been told
                return {"aborted": True, "share_bp": 0 if answered else None, "rollout": str(directory)}
            with suppress(ArtefactError):
                if service.story().is_finished:
                    return {"aborted": True, "share_bp": 0 if answered else None, "rollout": str(directory)}
            time.sleep(0.1)
    raise VerificationError(Problem("the running controller did not take the abort", fix="end its process; share is 0"))


def to_production(service: Service, *, with_warning: bool = False) -> bool:
    """Share 0 in the running balancer and in what it starts with; whether the running one said that it has it."""
    try:
        balancer = service.balancer
    except ArtefactError:  # the socket needs no binary
        balancer = Balancer(service.home, Path("haproxy"))
    with suppress(OSError, PipelineError):
        balancer.make_map_safe()
    try:
        balancer.set(canary_bp=0, lease_until=0)
        return True
    except BalancerError as error:
        if with_warning:
            warning("the balancer does not answer; its lease ends the canary by itself", reason=str(error))
        return False


def secure(service: Service) -> None:
    """Everyone to production before a command that takes control reads anything: whatever refuses it, share is 0.

    Raises ArtefactError where another controller runs, whose canary is left alone, or where service.json is damaged.
    """
    if service.home.is_dir():
        try:
            with files.locked(service.home, "the service"):
                to_production(service)
        except ArtefactError as error:
            if "in use by" not in str(error):  # a lock that cannot be taken tells of no controller
                to_production(service)
            raise
    if service.damaged:
        raise service.damaged


def _abort_without_controller(service: Service, directory: Path | None) -> list[str]:
    """The rest of an abort, under the lock of the service; returns what was damaged and set aside."""
    aside = []
    if service.damaged:
        aside.append(_set_aside(service.facts_path, service.damaged))
    if directory is None:
        return aside
    path = directory / "journal.jsonl"
    try:
        story = journal.read(path)
    except ArtefactError as error:
        aside.append(_set_aside(path, error))
        if not service.damaged:
            candidate, production = service.side("candidate"), service.side("production")
            # an unreadable journal may have been that of a promotion
            if candidate and production and candidate.address != production.address:
                candidate.stop()
            with suppress(OSError, PipelineError):
                service.remember(rollout=None)
        return [name for name in aside if name]
    writer = Journal(path)
    if service.damaged or story.happened("published"):
        return aside
    cut, ended = 0, not story.is_finished
    with suppress(OSError):
        if not story.state.is_over:
            writer.append("seen", Observation(at=time.time(), command="abort").to_json())
        elif story.state.phase == "promoted":
            restore(service, service.balancer)
            writer.event("abandoned", time.time())
    candidate = service.side("candidate")
    if candidate:
        with suppress(OSError, PipelineError):
            if answers := service.balancer.open_answers(candidate.address):
                seconds = f"{service.section.drain_seconds:g} s"
                event("no new request reaches the candidate; its answers may end", answers=len(answers), within=seconds)
            cut = service.balancer.drain(candidate.address, service.section.drain_seconds)
        candidate.stop()
    if ended:
        facts = {"outcome": "rolled_back", "reason": "aborted by a person", "cause": "person", "answers_cut": cut}
        tell_person(service, writer, facts | {"rollout": str(directory)})
    return aside


def tell_person(service: Service, writer: Journal, facts: dict[str, Any]) -> None:
    """Run --rollout.on_event, once for each end of a rollout; nothing of it can fail."""
    command = service.section.on_event
    with suppress(OSError, PipelineError):
        if not command or journal.read(writer.path).happened("told"):
            return
    message = {"service": service.section.service, "at": time.time(), **facts}
    done = on_event.tell(command, message, writer.path.with_name("on_event.log"), service.section.on_event_seconds)
    with suppress(OSError):
        writer.event("told", time.time(), done=done)


def _set_aside(path: Path, error: ArtefactError) -> str:
    """Give what cannot be read another name; empty when the disk does not let us, or there is nothing."""
    target = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    try:
        path.rename(target)
    except OSError as refused:
        warning("what cannot be read stays where it is", path=path, reason=refused)
        return ""
    warning("what cannot be read was set aside; servers that were started may still run", reason=str(error))
    return str(target)
