"""Promotion: the candidate becomes production, in operations that may each be the last one before a crash.

Before the new configuration is in place the old model serves, after it the new one, never a mixture; doing all of it
again does no harm.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from utils.exceptions import Problem, VerificationError
from utils.rollout.edge import servers
from utils.rollout.edge.haproxy import Balancer, Layout
from utils.rollout.edge.journal import Journal
from utils.rollout.edge.service_state import Service, Side


def publish(
    service: Service, balancer: Balancer, writer: Journal, after: Callable[[str], None] = lambda operation: None
) -> None:
    """Make the candidate production. Every operation may be done again; `after` is told the name of each done one."""
    candidate, old = service.side("candidate"), service.side("production")
    if candidate is not None and old is not None and candidate != old:
        _verify(candidate.address, candidate, service.section.model_name, "before its promotion the candidate", tries=1)
        _serve(service, balancer, candidate, lambda: after("configuration"))
        after("reload")
        try:
            public = f"127.0.0.1:{service.facts['port']}"
            _verify(public, candidate, service.section.model_name, "after the promotion the balancer", tries=50)
        except VerificationError:
            restore(service, balancer)
            raise
        after("verified")
        service.remember(production=service.facts["candidate"], previous=service.facts["production"], candidate=None)
        after("recorded")
    writer.event("published", time.time(), production=service.facts["production"]["digest"])
    after("published")


def restore(service: Service, balancer: Balancer) -> None:
    """The old model serves everyone again, whatever a promotion had got to."""
    old = service.side("production")
    if old is not None:
        _serve(service, balancer, old, lambda: None)


def _serve(service: Service, balancer: Balancer, side: Side, written: Callable[[], None]) -> None:
    """One model behind the balancer and nothing else."""
    section = service.section
    balancer.write(
        Layout(side.server(), None, service.facts["port"], section.session_header, section.server_timeout_seconds)
    )
    written()
    if balancer.master() is None:
        balancer.start()
    else:
        balancer.reload()


def _verify(address: str, candidate: Side, model: str, who: str, tries: int) -> None:
    """A real completion from there, of the right model. The new worker may still be checking its server's health."""
    hello = [{"role": "user", "content": "Hello"}]
    answer = servers.ServerAnswer()
    for _ in range(tries):
        answer = servers.ask(address, hello, max_tokens=1, timeout_s=30, model=model)
        if not answer.error:
            break
        time.sleep(0.1)
    found = answer.error
    # a server that does not send its digest is marked by the balancer only
    if not found and candidate.digest and answer.digest and answer.digest != candidate.digest:
        found = f"digest {answer.digest[:16]}"
    if found:
        fix = "production is the old model; look at the candidate's server, then rollout.py resume, or abort"
        raise VerificationError(Problem(f"{who} answers with {found}", fix=fix))
