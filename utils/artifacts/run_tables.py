"""Runs as text for a terminal: a listing, one run, several side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from utils.artifacts import run_settings
from utils.artifacts.run_list import Entry

# letters of a cell in the last column, which pushes no other aside
LAST_WIDEST = 160


def table(rows: Sequence[Sequence[Any]], titles: Sequence[str]) -> str:
    """Columns as wide as what is in them; no line ends in blanks."""
    texts = [
        [str(title) for title in titles],
        *([*map(run_settings.shown, row[:-1]), run_settings.shown(row[-1], LAST_WIDEST)] for row in rows),
    ]
    widths = [max(len(line[at]) for line in texts) for at in range(len(titles))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in texts
    )


def listing(listed: Sequence[Entry]) -> str:
    """Every run in a line, with the settings in which it is not like most runs of its stage and group."""
    if not listed:
        return "no runs yet: python scripts/prepare_data.py makes the first"
    alike: dict[tuple[str, str], list[Entry]] = {}
    for entry in listed:
        if entry.settings:
            alike.setdefault((entry.group, entry.stage), []).append(entry)
    own = {
        id(entry): text
        for group in alike.values()
        for entry, text in zip(group, run_settings.unusual(group), strict=True)
    }
    rows = []
    for entry in listed:
        settings = own.get(id(entry), "")
        loss = "" if entry.dev_loss is None else f"{entry.dev_loss:.4f}"
        result = entry.verdict or loss or ("" if entry.manifest else entry.state)
        used_by = f"{len(entry.children)}" if entry.children else ""
        size, age = f"{entry.size_bytes / 1e6:,.1f} MB", _age(entry.changed_at)
        rows.append((entry.name, entry.base, entry.data, result, size, age, used_by, settings))
    return table(rows, ("run", "base", "data", "result", "size", "age", "children", "settings that differ"))


def card(entry: Entry) -> str:
    """One run: what it is, from what, with which settings, what it measured and what was made from it."""
    facts: dict[str, Any] = {
        "run": entry.name,
        "path": entry.directory,
        "state": entry.state,
        "base": entry.base,
        "made": entry.manifest.get("created_at", ""),
        "command": entry.manifest.get("command", ""),
        "dev loss": entry.dev_loss,
        "verdict": entry.verdict,
        "size": f"{entry.size_bytes / 1e6:,.1f} MB",
        "digest": entry.digest,
    }
    lines = [f"{name:<10} {value}" for name, value in facts.items() if value not in ("", None)]
    lines += [f"{'parent':<10} {p['kind']} {p['path']}" for p in entry.manifest.get("parents", [])]
    lines += [f"{'child':<10} {child.name}" for child in entry.children]
    lines += ["", "settings that decide it:"]
    lines += [f"  {name:<32} {run_settings.shown(value)}" for name, value in run_settings.flattened(entry.settings)]
    return "\n".join(lines)


def comparison(chosen: Sequence[Entry]) -> str:
    """Settings that differ and results, a column for each run."""
    results: dict[str, list[Any]] = {
        "base": [entry.base for entry in chosen],
        "data": [entry.data for entry in chosen],
        "dev loss": [entry.dev_loss for entry in chosen],
        "verdict": [entry.verdict for entry in chosen],
    }
    for name in ("steps", "tokens_per_second", "seconds", "peak_memory_bytes"):
        results[name] = [entry.manifest.get("measured", {}).get(name) for entry in chosen]
    rows = [(name, *values) for name, values in run_settings.differing(chosen).items()]
    rows += [(name, *values) for name, values in results.items() if any(value not in ("", None) for value in values)]
    return table(rows, ("", *(entry.name for entry in chosen)))


def _age(at: float) -> str:
    hours = max(0.0, time.time() - at) / 3600
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.0f} h" if hours < 48 else f"{hours / 24:.0f} days"
