"""Promotion: the candidate becomes production, in operations that may each be the last one before a crash.

Before the new configuration is in place the old model serves, after it the new one, never a mixture; doing all of it
again does no harm.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from utils.exceptions import Problem, VerificationError
from utils.rollout.edge import servers
from utils.rollout.edge.balancer.haproxy import Balancer
from utils.rollout.edge.journal import Journal
from utils.rollout.edge.service_state import Service, Side


def publish(
    service: Service, balancer: Balancer, writer: Journal, after: Callable[[str], None] = lambda operation: None
) -> None:
    """Make the candidate production. Every operation may be done again; `after` is told the name of each done one."""
    candidate, old = service.side("candidate"), service.side("production")
    if candidate is not None and old is not None and candidate != old:
        _verify(service, candidate.address, candidate, "before its promotion the candidate", tries=1)
        _serve(service, balancer, candidate, 1 - service.slot, lambda: after("configuration"))
        after("switch")
        try:
            public = f"127.0.0.1:{service.facts['port']}"
            _verify(service, public, candidate, "after the promotion the balancer", tries=50)
        except VerificationError:
            restore(service, balancer)
            raise
        after("verified")
        sides = {"production": service.facts["candidate"], "previous": service.facts["production"], "candidate": None}
        service.remember(**sides, slot=1 - service.slot)
        after("recorded")
    writer.event("published", time.time(), production=service.facts["production"]["digest"])
    after("published")


def restore(service: Service, balancer: Balancer) -> None:
    """The old model serves everyone again, whatever a promotion had got to."""
    old = service.side("production")
    if old is not None:
        _serve(service, balancer, old, service.slot, lambda: None)


def _serve(service: Service, balancer: Balancer, side: Side, slot: int, written: Callable[[], None]) -> None:
    """One model behind the balancer and nothing else. A running one is told and not reloaded: what streams goes on."""
    layout = replace(service.layout(with_canary=False), production=side.server(), slot=slot)
    balancer.write(layout)
    written()
    balancer.activate(layout)


def _verify(service: Service, address: str, candidate: Side, who: str, tries: int) -> None:
    """A real completion from there, of the right model. The new worker may still be checking its server's health."""
    hello = [{"role": "user", "content": "Hello"}]
    answer, section = servers.ServerAnswer(), service.section
    for _ in range(tries):
        answer = servers.ask(
            address, hello, max_tokens=1, timeout_s=section.probe_timeout_seconds, model=section.model_name
        )
        if not answer.error:
            break
        time.sleep(0.1)
    problem = answer.error
    # a server that does not send its digest is marked by the balancer only
    if not problem and candidate.digest and answer.digest and answer.digest != candidate.digest:
        problem = f"digest {answer.digest[:16]}"
    if problem:
        fix = "production is the old model; look at the candidate's server, then rollout.py resume, or abort"
        raise VerificationError(Problem(f"{who} answers with {problem}", fix=fix))
