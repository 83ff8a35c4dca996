"""Made-up evaluations for the report: scores with known effects, the runs behind them, and a reader of pages."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from bs4 import BeautifulSoup, Tag

from config import EvaluateSection
from tests.support import temporary_directory
from utils.artifacts import files
from utils.artifacts.runs import Run
from utils.data.contamination import Contamination, Overlap
from utils.evaluation import measures
from utils.evaluation.report import evaluation_report, largest_differences
from utils.evaluation.scored_rows import ModelRow

SEEDS = (0, 7)
QUESTIONS, DOCUMENTS = 48, 16
# what each row loses per token of an answer, and of a held-out document
EFFECTS = {
    "base": (4.4, 3.3),
    "domain": (3.1, 2.7),
    "task": (3.3, 3.2),
    "composed": (2.5, 2.8),
    "task_without_domain": (3.4, 3.2),
    "wrong_domain": (3.2, 3.3),
    "random": (3.3, 3.3),
    "rank_matched": (3.25, 3.2),
}
FOUR = tuple(EFFECTS)[:4]
VOID = {"meta", "br", "wbr", "hr", "img", "input", "link"}


def scores(cell: str, seed: int, *, choices: bool = True, answers: bool = True, heldout: bool = True) -> dict[str, Any]:
    """One row's scores as `cells.score` gives them: about 16 documents, 3 questions each."""
    generator = np.random.default_rng([seed, *cell.encode()])
    answer, document = EFFECTS[cell]
    tokens = [6 + i % 5 for i in range(QUESTIONS)]
    items = [
        {
            "name": f"q{i}",
            "document": f"d{i % DOCUMENTS}",
            "answer_nll": float(n * (answer + 0.2 * (i % DOCUMENTS - 8) / 8 + generator.normal() * 0.15)),
            "answer_tokens": n,
            "end_nll": 0.5,
            "choice_nlls": [float(answer), 3.0, 4.0] if choices else [],
            "choice_tokens": [4, 5, 3] if choices else [],
            "answer_index": i % 3 if choices else None,
        }
        for i, n in enumerate(tokens)
    ]

    def documents(loss: float) -> list[dict[str, Any]]:
        lengths = [50 + 7 * i for i in range(20)]
        nlls = [float(n * (loss + generator.normal() * 0.02)) for n in lengths]
        return [
            {"name": f"t{i}", "nll": nll, "tokens": n, "utf8_bytes": 4 * n}
            for i, (n, nll) in enumerate(zip(lengths, nlls, strict=True))
        ]

    said = [
        {
            "name": f"q{i}",
            "document": f"d{i}",
            "text": "x",
            "tokens": 3 + i % 4,
            "ended": i < 15,
            "repetitive": i == 0,
            "thinking_left": False,
            "exact_match": float(i < 5),
            "f1": 0.25 + 0.01 * i,
        }
        for i in range(20 if answers else 0)
    ]
    return {
        "items": items,
        "heldout": documents(document) if heldout else [],
        "seen": documents(document - 1) if heldout else [],
        "general": documents(4.0),
        "answers": said,
    }


def evaluation(
    cells: Sequence[str] = tuple(EFFECTS), seeds: Sequence[int] = SEEDS, *, question: str = "What is it?", **kinds: bool
) -> dict[str, Any]:
    """A results.json of made-up scores, assembled by the same code as a real one."""
    rows = [ModelRow(cell, seed) for cell in cells for seed in ((None,) if cell == "base" else seeds)]
    raw = {row.name: scores(row.cell, row.seed or 0, **kinds) for row in rows}
    settings = EvaluateSection(resamples=400)
    first = {row.cell: raw[row.name] for row in reversed(rows)}
    found = measures.assemble(rows, raw, settings, 0)
    examples: dict[str, Any] = {}
    if {"task", "composed"} <= set(cells) and kinds.get("answers", True):
        asked = {f"q{i}": {"question": f"{question} {i}", "answers": [f"gold {i}"]} for i in range(QUESTIONS)}
        chosen = largest_differences.chosen(first["composed"], first["task"])
        shown = {cell: first[cell] for cell in ("task", "composed")}
        said = {cell: {name: f"{cell} says {name}" for name in asked} for cell in shown}
        examples = {kind: largest_differences.described(names, asked, shown, said) for kind, names in chosen.items()}
    found |= {
        "examples": examples,
        "test_items": QUESTIONS,
        "test_documents": DOCUMENTS,
        "items_without_document": 0,
        "left_out": 0,
        "seeds": list(seeds),
        "task_trained_on": "domain",
        "missing": {},
        "reads": {"test": "e" * 64, "reads": 1, "models": 1, "reads_of_this": 1, "sentence": ""},
        "cautions": ["One caution & another."],
        "lineage": [{"kind": "base", "path": "toy:minimax_m2", "digest": "f" * 64}],
        "dataset": {"task": "pairs.jsonl", "task_revision": "", "corpus": ["docs"], "corpus_revision": ""},
        "command": "scripts/evaluate.py --run.models_dir elsewhere",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "measured": {"seconds": 754.3, "peak_memory_bytes": 2_700_000_000},
    }
    if "composed" in cells:
        recipe = {"method": "sum", "weights": [1.25, 0.75], "rank": 0, "density": 0.5, "seed": 0}
        adapters = [digest("domain"), digest("task")]
        found["composition"] = {"recipe": recipe, "exact": True, "searched": True, "adapters": adapters}
    return found


def digest(name: str) -> str:
    return (name.encode().hex() * 64)[:64]


def the_runs(root: Path, found: dict[str, Any]) -> tuple[list[Run], Run]:
    """Domain and task adapter, the baseline, the data and the composed run, on disk; they become the lineage."""
    data = run_at(root, "prepared", "data", {"data": {"corpus": ["docs"], "task": "pairs.jsonl"}}, counts=COUNTS)
    parent = [{"kind": "prepared", "path": "data", "digest": data.digest}]
    trained = {"lora": {"rank": 4}, "train": {"keep": "best"}, "seed": 0}
    domain = run_at(root, "domain", "domain", trained, parents=parent, losses=[4.0, 3.0, 2.5], dev=[3.2, 3.4])
    below = {"on": "domain", "domain_adapter": domain.digest}
    task = run_at(root, "task", "task", trained | below, parents=parent, losses=[3.0, 2.0], dev=[2.2])
    on_base = trained | {"on": "base", "domain_adapter": None}
    baseline = run_at(root, "task", "baseline", on_base, parents=parent, losses=[4.0, 3.0], dev=[3.1])
    composed = run_at(root, "composed", "composed", {})
    runs = [domain, task, baseline, data, composed]
    found["lineage"] += [run.as_parent() for run in runs]
    return runs, composed


COUNTS = {
    "documents": {
        "read": {"files": 3, "documents": 90, "dropped": {"exact duplicates": 7}, "skipped_files": []},
        "corpus": {"documents": 83, "tokens": 43_364, "bytes": 150_672},
        "heldout_documents": {"documents": 20, "tokens": 2_330, "bytes": 9_320},
    },
    "examples": {
        "dropped": {"train pairs that are in test": 2},
        "train": {"examples": 400, "documents": 25, "with_choices": 400, "answer_tokens": 5_000},
        "test": {"examples": QUESTIONS, "documents": DOCUMENTS, "with_choices": QUESTIONS, "answer_tokens": 380},
    },
}


def run_at(
    root: Path,
    kind: str,
    name: str,
    identity: dict[str, Any],
    *,
    parents: Sequence[dict[str, str]] = (),
    losses: Sequence[float] = (),
    dev: Sequence[float] = (),
    **facts: Any,
) -> Run:
    """A run as the stages leave it, as far as the report reads it."""
    directory = root / kind / name
    directory.mkdir(parents=True)
    lines = [{"step": at, "loss": loss} for at, loss in enumerate(losses, 1)]
    lines += [{"step": len(losses), "dev_loss": loss} for loss in dev]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo')
    measured = {}
    if losses:
        measured = {
            "steps": len(losses),
            "trained_tokens": 900,
            "seconds": 61.5,
            "kept_step": 2,
            "best_dev_loss": min(dev),
        }
        measured |= {"dev_losses": [[len(losses), loss] for loss in dev], "peak_memory_bytes": 512_000_000}
    manifest = {"kind": kind, "digest": digest(name), "identity": {"stage": kind, **identity}, "parents": list(parents)}
    return Run(directory, manifest | {"measured": measured} | facts)


class Strict(HTMLParser):
    """Raises AssertionError where an element is not closed, is closed twice, or closes another one."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"an attribute twice: {self.get_starttag_text()}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"only SVG closes itself: {self.get_starttag_text()}"

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> at {self.getpos()}"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


def soup(text: str) -> BeautifulSoup:
    """The page, after it was found to be well formed."""
    Strict(text)
    return BeautifulSoup(text, "html.parser")


def text_of(page: str | Tag) -> str:
    node = soup(page) if isinstance(page, str) else page
    words = re.sub(r"\s+", " ", node.get_text(" "))
    return re.sub(r"(?<=[(\[])\s|\s(?=[,.;)\]])", "", words).strip()


def name_in(row: Tag) -> str:
    head = row.find("th")
    return "".join(str(part) for part in head.children if isinstance(part, str)).strip()


SEARCH = {
    "chosen": {"method": "sum", "weights": [1.25, 0.75], "answer_nll": 2.19, "domain_nll": 2.82},
    "reason": "sum: the simplest within one standard error of the best on dev",
    "champions": [
        {
            "label": "sum",
            "method": "sum",
            "weights": [1.25, 0.75],
            "answer_nll": 2.19,
            "domain_nll": 2.82,
            "difference_to_best": 0.0,
            "standard_error": 0.0,
            "keeps_the_domain": True,
        }
    ],
    "points": [
        {"method": "sum", "weights": [d, t], "answer_nll": 3 - d + t * t / 9, "domain_nll": 3 - d / 2 + t}
        for d in (0.0, 0.5, 1.0)
        for t in (0.5, 1.0)
    ],
}
SEARCH["pareto"] = SEARCH["points"][-2:]
INTERFERENCE = {
    "layers": 3,
    "adapters": ["domain", "task"],
    "derivatives": {"answer": {"loss": 2.07, "per_layer": [[0.1, 0.2, -0.1], [-0.2, 0.0, 0.1]]}},
    "per_layer": {"first_norm": [1, 2, 3], "second_norm": [2, 2, 2], "cosine": [0.1, None, 0.2]},
}


def contamination(said: str = "hardly <changed>") -> dict[str, Any]:
    """What utils/data/contamination.py finds, as results.json has it."""
    facts = {"source": "corpus", "kind": "near duplicate", "is_flagged": True, "why": said, "ids": (), "examples": ()}
    nowhere = facts | {"kind": "question", "source": "dev pairs"}
    overlaps = (Overlap(**facts, items=3, share=3 / QUESTIONS), Overlap(**nowhere, items=0, share=0.0))
    measured = Contamination("same documents", 0.75, QUESTIONS, 2, 83, overlaps, ("q1", "q2", "q3"), 0.1)
    rest = {"items": 45, "verdict": "helps", "sentence": f"It helps still: {said}.", "contrasts": {}, "answer_nll": {}}
    return {**measured.to_json(), "lines": measured.lines(), "without_flagged": rest}


@functools.cache
def whole() -> tuple[dict[str, Any], str]:
    """Everything that a report can hold, and its page."""
    root = temporary_directory()
    found = evaluation()
    runs, composed = the_runs(root, found)
    files.write_json(composed.directory / "search.json", SEARCH)
    files.write_json(composed.directory / "interference.json", INTERFERENCE)
    found["contamination"] = contamination()
    settings = {"evaluate": {"resamples": 400, "also": []}, "dtype": "torch.bfloat16", "seed": 0}
    return found, evaluation_report.page("smollm2-1234", found, runs, composed, settings)


@functools.cache
def bare() -> tuple[dict[str, Any], str]:
    """As little as there can be: no domain, no choices, no answers, no documents, one seed."""
    found = evaluation(("base", "task"), (0,), choices=False, answers=False, heldout=False)
    return found, evaluation_report.page("bare", found, [], None)
