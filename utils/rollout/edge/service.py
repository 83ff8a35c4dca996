"""A service: its balancer, its servers, its rollouts. What each command of scripts/rollout.py does.

models/rollout/<service>/  service.json     who is production, who is the candidate, which processes are ours
                           haproxy.cfg      control.map  digests.map  admin.sock  master.sock  log.sock  balancer.pid
                           slots/<digest>/  model -> merged directory, server.log
                           rollouts/<id>/   journal.jsonl  live.json  report.html
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from config import RolloutSection
from utils.artifacts import files
from utils.exceptions import (
    ArtefactError,
    BalancerError,
    ConfigError,
    Incident,
    Interrupted,
    PipelineError,
    Problem,
    RolledBack,
    Undecided,
    VerificationError,
)
from utils.logger import event, warning
from utils.rollout.controller import State, begin
from utils.rollout.edge import golden, journal, on_event, rollout_report, servers
from utils.rollout.edge.abort import tell_person, to_production
from utils.rollout.edge.balancer.haproxy import Balancer
from utils.rollout.edge.balancer.haproxy_configuration import SHARE
from utils.rollout.edge.balancer.old_workers import old_workers
from utils.rollout.edge.journal import Journal
from utils.rollout.edge.promotion import publish
from utils.rollout.edge.request_log import Collector
from utils.rollout.edge.rollout_loop import Loop, Timing, send_command
from utils.rollout.edge.service_state import Service, Side, open_side, verify_side
from utils.rollout.gate import Counts
from utils.rollout.policy import Policy, RampStep


def policy_of(section: RolloutSection, *, has_prompts: bool) -> Policy:
    """The policy that the settings ask for. Raises ConfigError when they overdraw the error budget."""
    plain = Policy()
    metrics = tuple(replace(m, alpha=m.alpha * section.alpha / plain.alpha) for m in plain.metrics)
    steps = zip(section.steps, section.ratios, section.margins, strict=True)
    return Policy(
        metrics=metrics,
        steps=tuple(RampStep(round(share * 10_000), ratio, margin) for share, ratio, margin in steps),
        alpha=section.alpha,
        objective=section.objective,
        needs_quality=has_prompts,
        step_deadline_s=60 * section.step_minutes,
        rollout_deadline_s=60 * section.rollout_minutes,
        bake_s=60 * section.bake_minutes,
        bake_units=section.bake_units,
        min_step_s=section.min_step_seconds,
    )


def start(
    service: Service, prompts: list[golden.Prompt], seed: int, quality: golden.Quality = golden.token_f1
) -> dict[str, Any]:
    """A whole rollout; `quality` scores answers to golden prompts.

    Returns when the candidate is production; raises when it was rolled back or refused.
    """
    with files.locked(service.home, "the service"):
        to_production(service)  # nobody controls it
        _refuse_unfinished(service)
        if service.section.on_event:
            on_event.words(service.section.on_event)
        candidate = _prepare_sides(service)
        balancer = service.balancer
        _end_previous(service, balancer)
        _switch_on(service, balancer)
        identity = time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{candidate.digest[:8] or 'unknown'}"
        directory = service.home / "rollouts" / identity
        files.make_directory(directory)
        prober = _prober(service, prompts, seed, 0, quality)
        first = _preflight(service, prober)
        policy = policy_of(service.section, has_prompts=bool(prompts))
        header = {
            "id": identity,
            "started_at": time.time(),
            "policy": policy.to_json(),
            "production": service.facts["production"],
            "candidate": service.facts["candidate"],
            "seed": seed,
            "prompts": len(prompts),
        }
        writer = Journal(directory / "journal.jsonl")
        writer.append("header", header)
        service.remember(rollout=identity)
        return _drive(service, balancer, writer, prober, policy, begin(header["started_at"]), first, "")


def resume(service: Service, prompts: list[golden.Prompt], quality: golden.Quality = golden.token_f1) -> dict[str, Any]:
    """Go on after the controller died: never at the share it had, but from the first step, with all counts kept."""
    with files.locked(service.home, "the service"):
        to_production(service)  # before anything is read: nobody knows how long we were away
        story, directory = service.story(), service.rollout
        assert directory is not None
        writer, state, balancer = Journal(directory / "journal.jsonl"), story.state, service.balancer
        if state.phase == "ramp" or state.phase == "bake":
            _switch_on(service, balancer)
            probed = state.total.pairs.get("probe_errors", (0, 0, 0))
            prober = _prober(service, prompts, story.header.get("seed", 0), sum(probed), quality)
            why = "the controller was started again"
            return _drive(service, balancer, writer, prober, story.policy, state, Counts(), why)
        return _finish(service, balancer, writer, state, None)


def promote(service: Service) -> dict[str, Any]:
    """Ask the running controller to take the next step without waiting for evidence; alarms stay armed."""
    story, directory = service.story(), service.rollout
    assert directory is not None
    if story.state.is_over:
        raise ArtefactError(Problem(f"this rollout is over: {story.state.phase}", str(directory)))
    if not _is_controlled(service):
        raise ArtefactError(Problem("no controller is running", fix="python scripts/rollout.py resume"))
    send_command(directory, "promote")
    return {"asked": "promote", "rollout": str(directory)}


def stop(service: Service) -> dict[str, Any]:
    """End the balancer and every server that we started. The service is off after this; answers in progress are cut."""
    with files.locked(service.home, "the service"):
        balancer, cut = service.balancer, 0
        with suppress(BalancerError, ValueError):
            cut = balancer.answers() + sum(worker.answers for worker in old_workers(balancer))
        balancer.stop()
        stopped = [which for which in ("candidate", "production", "previous") if service.side(which)]
        for which in stopped:
            side = service.side(which)
            assert side is not None
            side.stop()
    return {"stopped": ["balancer", *stopped], "answers_cut": cut}


def _refuse_unfinished(service: Service) -> None:
    if service.rollout is None or not (service.rollout / "journal.jsonl").exists():
        return
    if not service.story().is_finished:
        fix = "python scripts/rollout.py resume, or python scripts/rollout.py abort"
        raise ArtefactError(Problem("a rollout of this service is not finished", str(service.rollout), fix))


def _prepare_sides(service: Service) -> Side:
    """Both servers up, each proven to be the model it should be by a real completion and its digest."""
    section, known = service.section, service.side("production")

    def opened(given: str, digest: str, slot: str) -> Side:
        known = service.side(slot)
        return open_side(given, digest, slots=service.home / "slots", slot=slot, known=known, section=section)

    if not (section.production or known):
        raise ConfigError(Problem("what serves now is not known", fix="give --rollout.production DIRECTORY or ADDRESS"))
    if not section.candidate:
        raise ConfigError(Problem("there is no candidate", fix="give --rollout.candidate DIRECTORY or ADDRESS"))
    started: list[Side] = []
    try:
        given = section.production
        production = opened(given, section.production_digest, "production") if given else known
        assert production is not None
        if production != known:
            started.append(production)
        running = service.balancer.master() is not None
        if running and known and (known.address, known.digest) != (production.address, production.digest):
            fix = "leave out --rollout.production, or python scripts/rollout.py stop"
            raise ConfigError(Problem("another production serves behind this balancer", known.address, fix))
        candidate = opened(section.candidate, section.candidate_digest, "candidate")
        started.append(candidate)
        port = section.port or service.facts.get("port") or (running and service.balancer.port) or servers.free_port()
        for side in (production, candidate):
            verify_side(side, section)
    except (PipelineError, OSError, KeyboardInterrupt):
        for side in started:  # nobody else would know that they run
            side.stop()
        raise
    facts = {which: vars(side) for which, side in (("production", production), ("candidate", candidate))}
    # without a name of theirs: what our slots are called
    models = [section.model_name] if section.model_name else list(servers.model_names(production.address))
    service.remember(port=port, models=models or [servers.MODEL], **facts)
    return candidate


def _end_previous(service: Service, balancer: Balancer) -> None:
    """The server of the model before the last promotion, kept warm until now; its answers may still stream."""
    previous = service.side("previous")
    if previous is None:
        return
    if previous.process:
        with suppress(BalancerError):
            if answers := balancer.open_answers(previous.address):
                event("waiting for answers of the former production", answers=len(answers), at=previous.address)
            if cut := balancer.drain(previous.address, service.section.reload_drain_seconds):
                warning("answers of the former production were cut", answers=cut)
        previous.stop()
    service.remember(previous=None)


def _switch_on(service: Service, balancer: Balancer) -> None:
    """The balancer with both models and share 0: started, told, or reloaded when its text changed."""
    how = balancer.take(service.layout(with_canary=True))
    settings = balancer.settings()
    if settings[SHARE] != 0:
        to_production(service)
        raise VerificationError(Problem("a fresh balancer does not start with share 0", settings))
    if how == "reloaded":
        longest = f"{service.section.reload_drain_seconds:g} s"
        event("the balancer took new settings; answers in progress go on in its former worker", at_most=longest)
    event("balancer ready", at=f"http://127.0.0.1:{service.facts['port']}", share="0%")


def _prober(
    service: Service, prompts: list[golden.Prompt], seed: int, asked_count: int, quality: golden.Quality
) -> golden.Prober:
    candidate, production = service.side("candidate"), service.side("production")
    if candidate is None or production is None:
        raise ArtefactError(Problem("this rollout's servers are not known", str(service.facts_path), "start another"))
    section = service.section
    return golden.Prober(
        prompts,
        candidate.address,
        production.address,
        seed=seed,
        every_s=section.probe_seconds,
        max_tokens=section.probe_tokens,
        timeout_s=section.probe_timeout_seconds,
        tolerance=section.latency_tolerance,
        model=section.model_name,
        digest=candidate.digest,
        asked_count=asked_count,
        quality=quality,
    )


def _preflight(service: Service, prober: golden.Prober) -> Counts:
    """Golden prompts before any user: refused when most of them fail on the candidate alone. The pairs count later."""
    count = min(service.section.preflight_prompts, len(prober.prompts))
    counts = prober.now(count)
    broken = sum(counts.pairs.get(metric, (0, 0, 0))[0] for metric in ("probe_errors", "output"))
    if prober.wrong_model or (count >= 4 and 2 * broken > count):
        prober.close()
        candidate = service.side("candidate")
        assert candidate is not None
        candidate.stop()
        shown = prober.examples[0] if prober.examples else None
        what = prober.wrong_model or f"{broken} of {count} golden prompts fail on the candidate and not on production"
        seen = f"{shown.prompt[:80]} -> {shown.canary[:80]!r}" if shown else None
        raise VerificationError(Problem(f"refused before any user saw it: {what}", seen, "look at the merged model"))
    return counts


def _drive(
    service: Service,
    balancer: Balancer,
    writer: Journal,
    prober: golden.Prober,
    policy: Policy,
    state: State,
    first: Counts,
    interrupted: str,
) -> dict[str, Any]:
    section = service.section
    timing = Timing(section.tick_seconds, section.lease_seconds, section.drain_seconds, section.reload_drain_seconds)
    collector = Collector(tolerance=section.latency_tolerance)
    loop = Loop(balancer, writer, prober, policy, state, timing, collector, candidate=prober.canary)
    try:
        state = loop.run(first, interrupted)
    except KeyboardInterrupt:
        fix = "python scripts/rollout.py resume, or abort"
        raise Interrupted(Problem("stopped; all traffic is at production", fix=fix)) from None
    return _finish(service, balancer, writer, state, loop)


def _report(writer: Journal, loop: Loop | None) -> str:
    """The page beside the journal; a disk that refuses it does not change the outcome."""
    examples = [vars(example) for example in loop.prober.examples] if loop else []
    try:
        path = str(rollout_report.write(writer.path, examples))
    except (OSError, PipelineError) as error:
        warning("the report could not be written", reason=str(error))
        return ""
    event("report written", path=path)
    return path


def _finish(service: Service, balancer: Balancer, writer: Journal, state: State, loop: Loop | None) -> dict[str, Any]:
    """What follows from a final state; done again after a crash it does no harm."""
    story = journal.read(writer.path)
    if state.phase == "promoted" and not story.happened("abandoned"):
        if not story.happened("published"):
            try:
                publish(service, balancer, writer)
            except VerificationError:
                with suppress(BalancerError):
                    balancer.set(canary_bp=0, lease_until=0)
                raise
        event("promoted", production=service.facts["production"]["address"])
        cut = loop.watch.cut if loop else 0
        if cut:
            with suppress(OSError):
                writer.event("answers_cut", time.time(), answers_cut=cut)
        if loop and loop.watch.open:
            event("answers go on in the balancer's former worker", answers=loop.watch.open)
        page = _report(writer, loop)
        done = {"outcome": "promoted", "rollout": str(writer.path.parent), "reason": state.reason, "report": page}
        tell_person(service, writer, done | {"answers_cut": cut})
        return done | {"answers_cut": cut}
    with suppress(BalancerError):
        balancer.set(canary_bp=0, lease_until=0)
    if loop is not None:
        loop.drain()
    candidate = service.side("candidate")
    if candidate:
        candidate.stop()
    cut = loop.cut + loop.watch.cut if loop else 0
    with suppress(OSError):
        writer.event("rolled_back", time.time(), cause=state.cause, answers_cut=cut)
    outcome = {"undecided": Undecided, "incident": Incident}.get(state.cause, RolledBack)
    page = _report(writer, loop)
    reason = "given up by a person before it was carried out" if state.phase == "promoted" else state.reason
    rollout = str(writer.path.parent)
    facts = {"outcome": "rolled_back", "rollout": rollout, "reason": reason, "cause": state.cause, "report": page}
    tell_person(service, writer, facts | {"answers_cut": cut})
    shown = f"{reason}; {cut} answers were cut" if cut else reason
    raise outcome(Problem(shown, fix=f"what was seen: {page or writer.path}"))


def _is_controlled(service: Service) -> bool:
    try:
        with files.locked(service.home, "the service"):
            return False
    except ArtefactError:
        return True
