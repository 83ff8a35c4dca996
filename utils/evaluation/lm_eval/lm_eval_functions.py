"""What the tasks for lm-evaluation-harness compute. `lm_eval_tasks.py` copies this file beside them.

lm-eval loads it by its path, so it imports nothing of this project by name, and data is found beside it: the directory
can be moved. lm-eval moves white space from the end of a prompt to the answer and would score it; candidates here start
with it, and the likelihood of the white space alone is subtracted where it matters.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
THINK_END = "</think>"
Row = dict[str, Any]
Likelihood = tuple[float, bool]


def pairs(*, jsonl: str, **_: Any) -> dict[str, Any]:
    """The rows of a file in this directory as {"test": Dataset}."""
    from datasets import Dataset

    lines = (HERE / jsonl).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def documents(*, folder: str, end: str, first_token_is_given: bool, **_: Any) -> dict[str, Any]:
    """Held-out documents, each followed by the end token; `tokens` are those that are predicted."""
    from datasets import load_from_disk

    data = load_from_disk(str(HERE / folder)).select_columns(["id", "text", "num_tokens"])
    return {
        "test": data.map(
            lambda row: {"target": row["text"] + end, "tokens": row["num_tokens"] - first_token_is_given},
            keep_in_memory=True,
        )
    }


def answer_results(row: Row, results: Sequence[Likelihood]) -> dict[str, Any]:
    """NLL of the gold answer, with its number of tokens: the first candidate, less the white space in front of it."""
    likelihoods = [result[0] for result in results]
    space = likelihoods[1] if len(likelihoods) > 1 else 0.0
    return {"answer_nll": (space - likelihoods[0], row["tokens"][0])}


def choice_results(row: Row, results: Sequence[Likelihood]) -> dict[str, float]:
    """Whether the likeliest choice, in sum and per token, is the right one; the last candidate is white space."""
    likelihoods = [result[0] for result in results]
    space = likelihoods.pop() if len(likelihoods) > len(row["tokens"]) else 0.0
    nlls = [space - likelihood for likelihood in likelihoods]
    per_token = [nll / tokens for nll, tokens in zip(nlls, row["tokens"], strict=True)]
    right = row["answer_index"]
    return {
        "choice_accuracy": float(nlls.index(min(nlls)) == right),
        "choice_accuracy_per_token": float(per_token.index(min(per_token)) == right),
    }


def document_results(row: Row, results: Sequence[float]) -> dict[str, Any]:
    """NLL of a document, with its number of predicted tokens."""
    return {"domain_nll": (-results[0], row["tokens"])}


def generated_results(row: Row, results: Sequence[str]) -> dict[str, float]:
    """Exact match and token F1 of a generated answer, without its reasoning, by SQuAD's rules."""
    answers = _answers()
    text = results[0].rpartition(THINK_END)[2].strip()
    return {
        "exact_match": answers.exact_match(text, row["answers"]),
        "token_f1": answers.token_f1(text, row["answers"]),
    }


def per_token(items: Sequence[tuple[float, int]]) -> float:
    """Sum of NLL over sum of tokens."""
    return sum(nll for nll, _ in items) / sum(tokens for _, tokens in items)


def _answers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("answers", HERE / "answers.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{HERE / 'answers.py'} is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
