"""What a learning curve costs, before anything is trained: by what the runs took that are there. No torch here."""

from __future__ import annotations

from config import LIKELIHOOD_METRICS, RunSection
from utils.evaluation.costs.control_cost import newest_pair, seconds_of
from utils.evaluation.learning_curve.curve_sizes import DOCUMENTS, PAIRS, SHARES


def lines(run: RunSection, primary: str) -> list[str]:
    """What a dry run says: trainings, rows, and how long at the pace of the newest runs."""
    domain, task = newest_pair(run)
    pairs, documents = (SHARES[kind][:-1] for kind in (PAIRS, DOCUMENTS))
    is_stacked = bool(domain and task and task.manifest["identity"].get("on") != "base")
    trainings, rows, seconds = [], 0, 0.0
    if task or not domain:
        trainings.append(f"{len(pairs)} task adapters on {_shares(pairs)} of the pairs")
        rows, seconds = rows + len(pairs), seconds + sum(pairs) * seconds_of(task)
    if domain or not task:
        trainings.append(f"{len(documents)} domain adapters on {_shares(documents)} of the documents")
        rows, seconds = rows + len(documents), seconds + sum(documents) * seconds_of(domain)
    if is_stacked:
        trainings.append(f"a task adapter on each of these {len(documents)}")
        seconds += len(documents) * seconds_of(task)
    cost = f"about {seconds / 60:,.1f} minutes of training at the pace of the newest runs; " if seconds else ""
    asks = "" if primary in LIKELIHOOD_METRICS else ", each of which answers every test question"
    text = f"learning curve: train {', '.join(trainings)}, and score {rows} rows more{asks}"
    return [f"{text} ({cost}what exists with these settings is used again)"]


def _shares(shares: tuple[float, ...]) -> str:
    *first, last = (f"1/{round(1 / share)}" for share in shares)
    return f"{', '.join(first)} and {last}"
