"""The page of a matrix: one heat map, one table, the reason for each empty cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.artifacts import files
from utils.html import numbers, pages

# how much of the colour a gain gets: the largest one all of it
COLOURS = {"helps": "good", "coexists": "good", "interferes": "bad", "undecided": "warn"}
FAINTEST = 12


def write(directory: Path, results: Mapping[str, Any]) -> Path:
    """report.html in the evaluation's directory."""
    target = directory / "report.html"
    files.write_text(target, page(directory.name, results))
    return target


def page(name: str, results: Mapping[str, Any]) -> str:
    """The page as text."""
    matrix = results["matrix"]
    pairs = {(pair["task"], pair["domain"]): pair for pair in matrix["pairs"]}
    gains = [abs(p["gain"]["estimate"]) for p in pairs.values() if p.get("gain")]
    strongest = max(gains, default=1.0) or 1.0
    judged = [pair for pair in matrix["pairs"] if not pair["why_empty"]]
    return pages.render(
        "evaluation/matrix/matrix.html.jinja",
        title=f"Which pairs compose: {name}",
        name=name,
        results=results,
        matrix=matrix,
        rows=[
            (task, [pairs[task["name"], domain["name"]] for domain in matrix["domains"]]) for task in matrix["tasks"]
        ],
        judged=judged,
        colours=COLOURS,
        strength={
            (pair["task"], pair["domain"]): FAINTEST
            + round((60 - FAINTEST) * abs(pair["gain"]["estimate"]) / strongest)
            for pair in judged
            if pair["gain"]
        },
        form=numbers,
    )
