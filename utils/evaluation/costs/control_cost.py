"""How many adapters an evaluation trains for its controls and seeds, and how long at the pace of the runs there are."""

from __future__ import annotations

from config import EvaluateSection, RunSection
from utils.artifacts import runs
from utils.artifacts.runs import Run


def lines(evaluate: EvaluateSection, run: RunSection) -> list[str]:
    """One line of a dry run; empty where nothing is trained."""
    domain, task = newest_pair(run)
    domains, tasks = trainings(evaluate, domain, task)
    if not domains + tasks:
        return []
    seconds = domains * seconds_of(domain) + tasks * seconds_of(task)
    cost = f"about {seconds / 60:,.1f} minutes of training at the pace of the newest runs; " if seconds else ""
    counts = " and ".join(
        f"{n} {kind} adapter{'s' * (n != 1)}" for n, kind in ((domains, "domain"), (tasks, "task")) if n
    )
    return [f"in all {counts} are trained ({cost}what exists with these settings is used again)"]


def trainings(evaluate: EvaluateSection, domain: Run | None, task: Run | None) -> tuple[int, int]:
    """Numbers of domain and task adapters when none of them exists yet; before the first training, those of a pair.

    `run_groups` trains them: for each seed the pair's controls, for each further seed the pair and its baseline too.
    """
    seeds, groups = len(evaluate.seeds), 1 + len(evaluate.seeds)
    if (domain is None) != (task is None):  # one adapter alone has neither baseline nor controls
        return seeds * (domain is not None), seeds * (task is not None)
    identity, measured = (task.manifest["identity"], task.manifest.get("measured", {})) if task else ({}, {})
    is_stacked = identity.get("on") != "base"
    # a wrong domain; task adapters on it, on a random one, of the ranks together, and one that keeps no domain
    keeps = (measured.get("keeping") or {}).get("how", "off") != "off"
    controls = (1, 2 * is_stacked + 1 + keeps) if evaluate.controls else (0, 0)
    baselines = seeds * is_stacked + (evaluate.controls and is_stacked)
    return seeds + groups * controls[0], seeds + baselines + groups * controls[1]


def newest_pair(run: RunSection) -> tuple[Run | None, Run | None]:
    """The newest domain adapter and task adapter; a task adapter on the base is the baseline where there is another."""
    domain = next(iter(runs.complete_runs(run.models_dir, "domain")), None)
    tasks = list(runs.complete_runs(run.models_dir, "task"))
    on_domain = [one for one in tasks if one.manifest["identity"].get("on") != "base"]
    return domain, next(iter(on_domain or tasks), None)


def seconds_of(run: Run | None) -> float:
    """What the training took, or 0 where that is not known."""
    return float(run.manifest.get("measured", {}).get("seconds", 0.0)) if run else 0.0
