"""What the report says about the runs behind the numbers: their roles, training, data and lineage."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from utils.adapters import parent_runs
from utils.artifacts import runs
from utils.artifacts.identity import settings_of
from utils.artifacts.runs import Run

TRAINED_ON = {"domain": "on the domain adapter", "domain_ready": "ready for the domain adapter", "base": "on the base"}
PARTS = {
    "corpus": "the domain adapter was trained on them",
    "dev_documents": "for choosing: dev losses, weights",
    "heldout_documents": "for reporting: held-out perplexity",
}
SPLITS = {
    "train": "the task adapter was trained on them",
    "dev": "for choosing: dev losses, weights",
    "test": "for reporting",
}
# the one adapter that is judged, or "" -> part or split -> what rests on it
CLAIMS = {
    "": {"heldout_documents": ", claim H1", "test": ": claims H2 to H4"},
    "domain": {"heldout_documents": ", claim D1", "test": ", not read here"},
    "task": {"test": ": claim T1"},
}
KEPT_BY = {"replay": ", documents mixed in", "kl": ", predictions on prompts held"}


def roles(runs: Sequence[Run]) -> dict[str, str]:
    """What each run is in the comparison, by its digest."""
    data = next((run.digest for run in runs if run.manifest["kind"] == "prepared"), "")
    by_digest: dict[str, str] = {}
    for run in sorted(runs, key=lambda run: run.manifest["kind"] == "task"):  # a task adapter names what lies below
        by_digest[run.digest] = _role(run, data, by_digest)
    tasks = [run for run in runs if _is_trained(run, "task")]
    for run in tasks:
        rank = run.manifest["identity"]["lora"]["rank"]
        if rank != tasks[0].manifest["identity"]["lora"]["rank"]:
            by_digest[run.digest] += f", rank {rank}"
    return by_digest


def metrics(run: Run) -> list[dict[str, Any]]:
    """The lines of a training run's metrics, in order; a line that was cut short is none."""
    path, lines = run.directory / runs.METRICS, []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def trained(runs: Sequence[Run], kind: str) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Name, colour and metrics of the runs of a kind on the same data: composed's own, the baseline, and the others."""
    named, series = roles(runs), []
    own = [run for run in runs if _is_trained(run, kind)]
    same = [run for run in own if _data_of(run) == _data_of(own[0])]
    colours = {own[0].digest: "domain" if kind == "domain" else "composed"} if own else {}
    if baseline := next((run for run in same if run.manifest["identity"].get("on") == "base"), None):
        colours[baseline.digest] = "task"
    for run in same:
        if lines := metrics(run):
            series.append((named[run.digest], colours.get(run.digest, "other"), lines))
    return series


def training_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What each training run measured, with its role."""
    named = roles(runs)
    return [
        {
            "role": named[run.digest],
            "keep": run.manifest["identity"]["train"].get("keep", ""),
            **run.manifest["measured"],
        }
        for run in runs
        if run.manifest.get("measured", {}).get("steps")
    ]


def lineage_rows(results: Mapping[str, Any], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Everything the numbers came from: role, path, digest."""
    named = roles(runs)
    return [{"role": named.get(one["digest"], one["kind"]), **one} for one in results.get("lineage", [])]


def data_of(runs: Sequence[Run], alone: str = "") -> dict[str, Any] | None:
    """Counts of the prepared data as rows, what was dropped, and where it came from; None when it is not among them.

    `alone` is the one adapter that is judged ("domain", "task"), if it is one.
    """
    run = next((run for run in runs if run.manifest["kind"] == "prepared"), None)
    if run is None:
        return None
    counts, settings = run.manifest["counts"], settings_of(run.manifest)["data"]
    documents, examples = counts.get("documents", {}), counts.get("examples", {})
    claims = CLAIMS[alone]
    parts, splits = ({name: use + claims.get(name, "") for name, use in uses.items()} for uses in (PARTS, SPLITS))
    return {
        "name": run.directory.name,
        "documents": [
            {"name": name, "use": use, **documents[name]} for name, use in parts.items() if name in documents
        ],
        "examples": [{"name": name, "use": use, **examples[name]} for name, use in splits.items() if name in examples],
        "dropped": [
            *_dropped("documents", {k: v for k, v in documents.items() if k not in PARTS}),
            *_dropped("pairs", {k: v for k, v in examples.items() if k not in SPLITS}),
        ],
        "settings": {key: value for key, value in settings.items() if value not in ("", [], None)},
    }


def _role(run: Run, data: str, known: Mapping[str, str]) -> str:
    kind, identity = run.manifest["kind"], run.manifest["identity"]
    seed = f", seed {identity['seed']}" if "seed" in identity else ""
    if kind == "prepared":
        return "data"
    if identity.get("on") == parent_runs.EXTERNAL:
        return f"{kind} adapter of another tool"
    if kind == "domain" and identity.get("control"):
        return f"{identity['control']} adapter in the domain adapter's place{seed}"
    if kind == "domain":
        return f"{'domain' if _data_of(run) in (data, '') else 'wrong-domain'} adapter{seed}"
    if kind == "task":
        below = known.get(identity.get("domain_adapter") or "", "")
        where = TRAINED_ON.get(identity["on"], f"on {identity['on']}")
        if below and not below.startswith("domain adapter"):
            where = where.replace("domain", below.partition(" ")[0])
        how = (run.manifest.get("measured", {}).get("keeping") or {}).get("how", "off")
        where += KEPT_BY.get(how, "")
        return f"task adapter {where}{seed}"
    return f"{kind} adapter"


def _is_trained(run: Run | None, kind: str) -> bool:
    return run is not None and run.manifest["kind"] == kind and "train" in run.manifest["identity"]


def _data_of(run: Run | None) -> str:
    parents = run.manifest["parents"] if run else []
    return next((parent["digest"] for parent in parents if parent["kind"] == "prepared"), "")


def _dropped(what: str, counts: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every reason to leave something out, with its number; 0 is worth saying too."""
    for name, value in counts.items():
        if isinstance(value, Mapping):
            yield from _dropped(what if name in ("read", "dropped") else f"{what}, {name}", _reasons(value))
        elif isinstance(value, int):
            yield f"{what}: {str(name).replace('_', ' ')}", value


def _reasons(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a reader reports, only what it left out."""
    whole = ("files", "documents", "characters", "utf8_bytes", "rows", "examples")
    return {name: value for name, value in counts.items() if name not in whole}
