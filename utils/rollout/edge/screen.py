"""The picture of a rollout in the terminal: where the traffic is, the counts, every test against its limit.

Written for a person on call: what is happening and what to do stand first, the numbers behind it below.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from contextlib import suppress
from typing import Any

from utils.artifacts import files
from utils.exceptions import MALFORMED, ArtefactError, BalancerError
from utils.html.numbers import span
from utils.rollout.controller import State
from utils.rollout.edge.rollout_loop import LIVE
from utils.rollout.policy import FULL_BP, Policy

STALE_S = 10.0
_BAR = 28


def status(service: Any, *, watch: bool) -> dict[str, Any]:
    """Print the picture, again and again with `watch`, and return the facts of the last one."""
    while True:
        picture, width = current(service), shutil.get_terminal_size((100, 40)).columns
        if picture is None:
            print(f"no rollout was started under {service.home}")
            return {"rollout": None}
        try:
            text = screen(picture, width)
        except MALFORMED:  # live.json is not as the controller writes it
            picture = current(service, drawn=False) or {}
            text = screen(picture, width)
        if watch and sys.stdout.isatty():
            # past the cleaned sys.stdout: what is shown may command no terminal, this may
            print("\x1b[2J\x1b[H", end="", file=sys.__stdout__, flush=True)
        print(text, flush=True)
        if not watch or picture["state"]["phase"] in ("promoted", "rolled_back"):
            shown = ("action", "reason", "share_bp", "live_share_bp")
            return {"rollout": picture["rollout"], "phase": picture["state"]["phase"]} | {k: picture[k] for k in shown}
        time.sleep(1.0)


def current(service: Any, *, drawn: bool = True) -> dict[str, Any] | None:
    """The last picture the controller drew (or without it), completed by what the balancer and the clock say now."""
    if service.rollout is None:
        return None
    story = service.story()
    live = service.rollout / LIVE
    picture: dict[str, Any] = {}
    with suppress(ArtefactError):
        picture = files.read_object(live) if drawn else {}
    if not isinstance(picture.get("state"), dict) or "phase" not in picture["state"]:  # it died before its first look
        picture = {"at": story.header["started_at"], "action": "hold", "reason": "not looked yet", "share_bp": 0}
        picture |= {"state": story.state.to_json(), "verdict": None, "blind": "", "controller": 0, "examples": []}
        picture |= {"aborted": {}, "fallen_back": 0}
    if story.state.is_over and picture["state"]["phase"] != story.state.phase:
        picture |= {"state": story.state.to_json(), "reason": story.state.reason, "share_bp": 0}
    held: int | None = None
    lease = 0.0
    try:
        live_settings = service.balancer.settings()
        held, lease = live_settings["canary_bp"], live_settings["lease_until"] - time.time()
    except (BalancerError, ArtefactError) as error:  # a status is shown whatever is broken
        picture["balancer"] = str(error).splitlines()[0]
    return picture | {
        "rollout": str(service.rollout),
        "policy": story.header["policy"],
        "started_at": story.header["started_at"],
        "sides": {which: story.header[which] for which in ("production", "candidate")},
        "live_share_bp": held if held is None or lease > 0 else 0,
        "lease_s": max(0.0, lease),
        "now": time.time(),
    }


def screen(picture: dict[str, Any], width: int = 100) -> str:
    """One screen: what a person on call needs first stands first."""
    policy = Policy.from_json(picture["policy"])
    state = State.from_json(picture["state"])
    age = picture["now"] - picture["at"]
    live = picture["live_share_bp"]
    shown = "unknown: the balancer does not answer" if live is None else f"{live / 100:g}% to the candidate"
    if state.is_over:  # after a promotion the balancer has no share any more
        promoted = "the candidate is production now"
        shown = promoted if state.phase == "promoted" else "production serves everyone" if live == 0 else shown
    lines = [f"{_headline(state, policy)}   {shown}", f"  {picture['reason']}"[:width]]
    if picture["blind"]:
        lines.append(f"  NO TRUSTWORTHY DATA: {picture['blind']}"[:width])
    if not state.is_over and age > STALE_S:
        lines.append(
            f"  THE CONTROLLER HAS NOT LOOKED FOR {span(age)}: its lease has ended, production serves everyone"
        )
        lines.append("  next: python scripts/rollout.py resume, or abort")
    if any((picture.get("old_workers") or {}).values()):
        streams = picture["old_workers"]
        lines.append(
            f"  since a reload: {streams['open']} answers go on in its former worker, {streams['cut']} were cut"
        )
    lines.append("")
    if not state.is_over:
        step_left = (
            policy.step_deadline_s + (policy.bake_s if state.phase == "bake" else 0) - (picture["now"] - state.step_at)
        )
        whole_left = policy.rollout_deadline_s - (picture["now"] - state.started_at)
        lines.append(
            f"  step ends in {span(step_left)}, rollout in {span(whole_left)}, lease {picture['lease_s']:.0f} s"
        )
    lines += ["", *_ladder(state, policy), "", *_counts(state), ""]
    if picture["verdict"]:
        lines += _tests(picture["verdict"]["findings"])
    for example in picture["examples"][-2:]:
        lines += ["", f"  {example['metric']}: {example['prompt']}"[:width]]
        lines += [f"    {arm:<11}{example[arm]!r}"[:width] for arm in ("production", "candidate") if arm in example]
        lines.append(f"    {'candidate':<11}{example['canary']!r}"[:width])
    return "\n".join(line.rstrip() for line in lines)


def _headline(state: State, policy: Policy) -> str:
    if state.phase == "promoted":
        return "PROMOTED"
    if state.phase == "rolled_back":
        return "ROLLED BACK"
    where = f"step {state.step + 1} of {len(policy.steps)}" if state.phase == "ramp" else "bake"
    return f"RUNNING, {where}"


def _ladder(state: State, policy: Policy) -> list[str]:
    shares = [step.share_bp for step in policy.steps] + [FULL_BP]
    here = len(shares) - 1 if state.phase in ("bake", "promoted") else state.step
    marks = []
    for number, share in enumerate(shares):
        done = number < here or state.phase == "promoted"
        mark = "done" if done else "here" if number == here and not state.is_over else "    "
        mark = "back" if number == here and state.phase == "rolled_back" else mark
        marks.append(f"{share / 100:g}% {mark}".rstrip())
    return ["  " + "  ->  ".join(marks)]


def _counts(state: State) -> list[str]:
    canary, production = state.total.units()
    lines = [f"  {'':<16}{'candidate':>16}{'production':>18}", f"  {'sessions':<16}{canary:>16,}{production:>18,}"]
    for metric in ("errors", "client_errors", "slow"):
        bad = [sum(state.total.at(bp, metric)[arm] for bp in state.total.rates) for arm in (0, 1)]
        cells = [
            f"{n:,} {'(' + format(n / all_, '.2%') + ')' if all_ else '':>8}"
            for n, all_ in zip(bad, (canary, production), strict=True)
        ]
        lines.append(f"  {metric.replace('_', ' '):<16}{cells[0]:>16}{cells[1]:>18}")
    if state.total.pairs:
        lines += ["", f"  {'golden prompts':<16}{'lost':>8}{'won':>8}{'equal':>8}"]
        for metric, (lost, won, equal) in state.total.pairs.items():
            lines.append(f"  {metric.replace('_', ' '):<16}{lost:>8,}{won:>8,}{equal:>8,}")
    return lines


def _tests(findings: list[dict[str, Any]]) -> list[str]:
    lines = [f"  {'is it worse? (alarm at the limit)':<34}{'e-value':>10} {'limit':>8}"]
    for finding in [f for f in findings if f["test"] in ("worse", "share")]:
        lines.append(_test_line(finding["metric"], finding))
    evidence = [f for f in findings if f["test"] not in ("worse", "share")]
    if evidence:
        lines += ["", f"  {'is it shown not to be worse?':<34}{'e-value':>10} {'limit':>8}"]
    for finding in evidence:
        what = finding["metric"] + (", below the objective" if finding["test"] == "below objective" else "")
        lines.append(_test_line(what, finding))
    return lines


def _test_line(name: str, finding: dict[str, Any]) -> str:
    numbers = f"{short(finding['e_value']):>10} {finding['limit']:>8,.0f}"
    return f"  {name.replace('_', ' '):<34}{numbers}  {_gauge(finding)}"


def _gauge(finding: dict[str, Any]) -> str:
    """How far the e-value is on the way from 1 to its limit, by its logarithm."""
    way = math.log(max(finding["e_value"], 1.0)) / math.log(finding["limit"])
    filled = min(_BAR, int(way * _BAR))
    end = (" ALARM" if finding["test"] in ("worse", "share") else " shown") if finding["reached"] else ""
    return "#" * filled + "." * (_BAR - filled) + end


def short(value: float) -> str:
    if value >= 1e6 or 0 < value < 1e-2:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
