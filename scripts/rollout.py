"""Canary a merged model behind HAProxy: 1%, 10%, 50%, 100%, each step on evidence; back at once when it is worse.

The first word is the command, before any flag:

    python scripts/rollout.py start --rollout.production models/old --rollout.candidate models/new
    python scripts/rollout.py status --watch
    python scripts/rollout.py abort        everything to production now, also when the controller is dead
    python scripts/rollout.py promote      the next step without waiting for evidence; alarms stay armed
    python scripts/rollout.py resume       go on after a crash: from the first step, nothing counted is lost
    python scripts/rollout.py stop         end the balancer and the servers that were started
    python scripts/rollout.py simulate     how often this policy is wrong, measured on simulated ramps
    python scripts/rollout.py judge        counts as JSON in (--rollout.counts FILE or standard input), a verdict out
    python scripts/rollout.py kubernetes --rollout.output DIR    the same as files for Gateway API and Argo Rollouts
    python scripts/rollout.py demo         a bad and a good candidate of the embedded model, in a few minutes

Reads merged models or addresses of running servers; writes models/rollout/<service>/. Exit codes besides the usual:
5 rolled back, 6 rolled back for want of data, 7 rolled back while production itself was failing.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config
from utils import cli

SECTIONS = ("rollout", "base", "run")
MOST_USED = ("rollout.production", "rollout.candidate", "rollout.service", "rollout.golden", "rollout.watch")


def main(config: Config) -> dict[str, Any]:
    """Do what the first word says."""
    from utils.exceptions import ConfigError, Problem

    command = config.rollout.command
    if command == "judge":
        return _judge(config)
    if command == "simulate":
        return _simulate(config)
    if command == "kubernetes":
        return _kubernetes(config)
    if command == "demo":
        from utils.rollout.edge import demo

        return demo.run(config.base, config.run.models_dir, config.rollout.haproxy)
    from utils.evaluation.metrics import text_scores
    from utils.logger import event
    from utils.rollout.edge import abort
    from utils.rollout.edge import service as services

    service = services.Service(config.rollout, config.run.models_dir)
    if command in ("start", "resume"):
        abort.secure(service)
        for number in (signal.SIGTERM, signal.SIGINT):  # also where the shell made a background job deaf to SIGINT
            signal.signal(number, signal.default_int_handler)
        prompts = _prompts(config)
        name, quality = text_scores.text_score(config.evaluate, [prompt.example for prompt in prompts])
        event("golden prompts are scored", by=name)
        if command == "start":
            return services.start(service, prompts, config.run.seed, quality)
        return services.resume(service, prompts, quality)
    if service.damaged and command not in ("abort", "stop"):
        raise service.damaged
    acts = {"abort": abort.abort, "promote": services.promote, "stop": services.stop}
    if command in acts:
        return acts[command](service)
    if command == "status":
        return _status(config, service)
    raise ConfigError(Problem("no such command", command, "see --help"))


def _prompts(config: Config) -> list[Any]:
    """Golden prompts: a file, the dev pairs of the newest prepared data, or, when a person says so, none."""
    from utils.artifacts import runs
    from utils.exceptions import ArtefactError, Problem
    from utils.logger import event, warning
    from utils.rollout.edge import golden

    setting = config.rollout.golden
    if setting == "none":
        warning("no golden prompts: nothing is known about the answers, only about errors and speed")
        return []
    path = Path(setting) if setting else None
    if path is None:
        candidates = [run.directory / "task_dev.jsonl" for run in runs.complete_runs(config.run.data_dir, "prepared")]
        path = next((p for p in candidates if p.exists()), None)
    if path is None or not path.is_file():
        fix = "--rollout.golden FILE.jsonl with question and answers, or --rollout.golden none to go without"
        raise ArtefactError(Problem("there are no golden prompts", setting or str(config.run.data_dir), fix))
    prompts = golden.read(path, config.task.system_prompt)
    event("golden prompts", path=path, prompts=len(prompts))
    return prompts


def _judge(config: Config) -> dict[str, Any]:
    """{"counts": ..., "here": ..., "step": 0, "policy": {...}} -> action, reason and every test behind it."""
    from utils.exceptions import MALFORMED, DataError, Problem
    from utils.rollout.edge.service import policy_of
    from utils.rollout.gate import Counts, judge
    from utils.rollout.policy import Policy

    source = config.rollout.counts
    try:
        given = json.loads(sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8"))
        if not isinstance(given, dict) or not isinstance(given.get("counts"), dict):
            raise ValueError("an object with `counts` is expected")
        counts = Counts.from_json(given["counts"])
        here = Counts.from_json(given["here"]) if "here" in given else counts
        policy = policy_of(config.rollout, has_prompts=bool(counts.pairs) or config.rollout.golden != "none")
        policy = Policy.from_json(given["policy"]) if "policy" in given else policy
        number = given.get("step", 0)
        if number is not None and number not in range(len(policy.steps)):
            raise DataError(Problem("step is 0 for the first one, or null for the bake at 100%", number))
        return judge(counts, here, policy, None if number is None else policy.steps[number]).to_json()
    except MALFORMED as error:
        fix = 'write {"counts": {"rates": {"100": {"units": [40, 4000], "errors": [0, 3]}}}, "step": 0}'
        raise DataError(Problem(f"--rollout.counts cannot be read: {error}", source, fix)) from error


def _simulate(config: Config) -> dict[str, Any]:
    """False rollbacks, promotions and canary units of this policy, for equal models and for worse ones."""
    import numpy as np

    from utils.rollout.edge.service import policy_of
    from utils.rollout.simulation import Scenario, our_gate, ramp

    policy = policy_of(config.rollout, has_prompts=True)
    rows = []
    for base, ratio in [(0.001, 1.0), (0.01, 1.0), (0.05, 1.0), (0.01, 2.0), (0.01, 5.0), (0.05, 2.0), (0.05, 4.0)]:
        scenario = Scenario(base_rate=base, ratio=ratio, looks=1000)
        outcome = ramp(scenario, our_gate, policy, runs=config.rollout.runs, seed=config.run.seed)
        median, late = (float(q) for q in np.percentile(outcome.canary_units, [50, 95]))
        rows.append({"error_rate": base, "ratio": ratio, **outcome.shares, "canary_units": [median, late]})
    titles = ("error rate", "ratio", "promoted", "rolled back", "deadline")
    print(" ".join(f"{title:>11}" for title in titles) + "   canary units (median, 95%)")
    for row in rows:
        shares = " ".join(f"{row[name]:>11.1%}" for name in ("promoted", "rolled_back", "deadline"))
        units = ", ".join(f"{number:,.0f}" for number in row["canary_units"])
        print(f"{row['error_rate']:>11.1%} {row['ratio']:>11g} {shares}   {units}")
    return {"runs": config.rollout.runs, "scenarios": rows}


def _kubernetes(config: Config) -> dict[str, Any]:
    from utils.exceptions import ConfigError, Problem
    from utils.rollout import kubernetes

    if not config.rollout.output:
        raise ConfigError(Problem("kubernetes writes files", fix="say where: --rollout.output DIRECTORY"))
    return {"written": [str(path) for path in kubernetes.write(config.rollout, Path(config.rollout.output))]}


def _status(config: Config, service: Any) -> dict[str, Any]:
    from utils.rollout.edge import screen

    return screen.status(service, watch=config.rollout.watch)


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    from utils.planning import dry_run

    section = config.rollout
    shares = ", ".join(f"{share:.2%}" for share in (*section.steps, 1.0))
    if section.command != "start":
        return [f"{section.command} of the service {section.service!r}"]
    return [
        *dry_run.lines(config, "rollout"),
        f"start or find the servers of {section.production or 'the last production'} and {section.candidate or '?'}",
        "verify the candidate: digest, a completion, golden prompts; no user sees it before",
        f"walk {shares} behind HAProxy, each step on evidence, rollback armed all the time",
        f"write {config.run.models_dir / 'rollout' / section.service}/",
    ]


if __name__ == "__main__":
    words = cli.words_as_flags(sys.argv[1:], "rollout.command")
    cli.run(main, plan, sections=SECTIONS, most_used=MOST_USED, description=__doc__, argv=words, ranks="first")
