"""The evaluation suite: our scoring of questions and documents against lm-evaluation-harness on one loaded model.

Both get the same items and the same budget of padded tokens per forward pass, and do the same slice one after the
other, taking turns in who begins; the first slice is a warm-up. Questions: the likelihood of the gold answer and of
each choice, from tokens. Documents: their perplexity in windows of 1,024 tokens, from text. lm-eval fixes the number of
rows of a batch and not its tokens, so it gets as many rows as the budget has room for at the longest request.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from datasets import Dataset

from config import Config, TrainSection
from utils.adapters import parent_runs
from utils.data.batches import PackedDocuments
from utils.data.prepared import Prepared
from utils.data.splits import hash_share
from utils.exceptions import ArtefactError, Problem
from utils.inference import scoring
from utils.inference.scoring import Question
from utils.logger import event
from utils.models import chat
from utils.models.base_model import BaseModel
from utils.models.rows import row_probe

NO_LM_EVAL = "lm-eval is not installed: pip install 'lm-eval>=0.4.9'"
WINDOW_TOKENS = 1024
SLICES = 5  # the first one is a warm-up
Score = Callable[[Any], Sequence[float | None]]


def measure(config: Config, base: BaseModel) -> dict[str, Any]:
    """Items or tokens per second of both, their ratio within each slice, and how far their numbers are apart."""
    source = Prepared(parent_runs.prepared_run(config, base).directory)
    tokenizer = chat.load_tokenizer(base.directory)
    budget, pad_id = config.evaluate.batch_tokens, chat.pad_id(tokenizer)
    chosen = _chosen(source.examples("test"), config.benchmark.evaluation_items, config.run.seed)
    questions, _ = scoring.questions(chosen, tokenizer, config.task.system_prompt, min(budget, WINDOW_TOKENS))
    rows = _documents(source, config.benchmark.evaluation_document_tokens)
    items, documents = _slices(questions), _slices(rows)
    if not items or not documents:
        raise ArtefactError(
            Problem(
                f"the evaluation suite needs {SLICES} test pairs and {SLICES} documents",
                f"{len(questions)} pairs and {len(rows)} documents",
                "prepare more data, or raise --benchmark.evaluation_items",
            )
        )
    model = row_probe.load_model(base, config.base)
    ours: dict[str, Score] = {
        "questions": lambda part: _our_questions(model, part, pad_id, budget),
        "documents": lambda part: _our_documents(model, tokenizer, part, budget),
    }
    note, theirs = _harness(model, tokenizer, budget, questions, rows)
    results: dict[str, Any] = {"dtype": str(model.dtype), "batch_tokens": budget, "lm_eval": note, "parts": {}}
    for name, parts, sizes, unit in (
        ("questions", items, [len(part) for part in items], "items"),
        ("documents", documents, [sum(row["num_tokens"] for row in part) for part in documents], "tokens"),
    ):
        contenders = {"ours": ours[name]} | ({"lm_eval": theirs[name]} if theirs else {})
        results["parts"][name] = {"unit": unit, "counted": sum(sizes[1:])} | _race(name, contenders, parts, sizes)
    return results


def _race(name: str, contenders: dict[str, Score], parts: Sequence[Any], sizes: Sequence[int]) -> dict[str, Any]:
    """Each contender on each slice, in alternating order."""
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    apart = 0.0
    for number, part in enumerate(parts):
        order = list(contenders) if number % 2 else list(contenders)[::-1]
        scores = {}
        for contender in order:
            began = time.perf_counter()
            scores[contender] = contenders[contender](part)
            seconds[contender].append(time.perf_counter() - began)
        if "lm_eval" in scores:
            pairs = zip(scores["ours"], scores["lm_eval"], strict=True)
            apart = max([apart, *(abs(a - b) / max(1.0, abs(b)) for a, b in pairs if a is not None)])
        event(f"{name}: slice {number + 1} of {len(parts)}", **{c: round(s[-1], 2) for c, s in seconds.items()})
    done = sum(sizes[1:])
    result = {c: {"per_second": round(done / sum(own[1:]), 2)} for c, own in seconds.items()}
    if "lm_eval" in seconds:
        ratios = [theirs / ours for theirs, ours in zip(seconds["lm_eval"], seconds["ours"], strict=True)][1:]
        result["lm_eval"] |= {
            "time_to_ours": round(sum(seconds["lm_eval"][1:]) / sum(seconds["ours"][1:]), 2),
            "median_time_to_ours": round(statistics.median(ratios), 2),
            "largest_relative_difference": float(f"{apart:.2g}"),
        }
    return {"contenders": result}


def _chosen(examples: Sequence[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    return sorted(examples, key=lambda example: hash_share(str(example["id"]), seed))[:count]


def _documents(source: Prepared, tokens: int) -> list[dict[str, Any]]:
    """Held-out documents, then those of the corpus, up to so many tokens and at least one a slice."""
    rows: list[dict[str, Any]] = []
    for which in ("heldout_documents", "corpus"):
        with suppress(ArtefactError):  # there may be none
            for row in source.documents(which).select_columns(["id", "text", "num_tokens"]):
                if len(rows) >= SLICES and sum(known["num_tokens"] for known in rows) >= tokens:
                    return rows
                rows.append(row)
    return rows


def _slices(rows: Sequence[Any]) -> list[list[Any]]:
    return [list(rows[at::SLICES]) for at in range(SLICES)] if len(rows) >= SLICES else []


def _our_questions(model: Any, items: Sequence[Question], pad_id: int, budget: int) -> list[float]:
    scores = scoring.score_questions(
        model, items, batch_tokens=budget, pad_id=pad_id, device=model.device, what="questions"
    )
    return [nll for score in scores for nll in (score.answer_nll, *score.choice_nlls)]


def _our_documents(model: Any, tokenizer: Any, part: list[dict[str, Any]], budget: int) -> list[float | None]:
    texts = [row["text"] for row in part]
    ids = chat.document_ids(tokenizer, texts)
    sizes = {"num_tokens": [len(row) for row in ids], "utf8_bytes": [len(text.encode()) for text in texts]}
    data = Dataset.from_dict({"id": [row["id"] for row in part], "input_ids": ids, **sizes})
    settings = TrainSection(max_sequence_tokens=WINDOW_TOKENS, micro_batch_tokens=max(WINDOW_TOKENS, budget))
    packed = PackedDocuments(data, settings, 0, chat.pad_id(tokenizer))
    scores = scoring.score_documents(model, packed, batch_tokens=budget, device=model.device, what="held-out documents")
    # in the last window of a longer document lm-eval shows more of what came before
    return [score.nll if score.tokens <= WINDOW_TOKENS else None for score in scores]


def _harness(
    model: Any, tokenizer: Any, budget: int, items: Sequence[Question], documents: Sequence[dict[str, Any]]
) -> tuple[str, dict[str, Score]]:
    """lm-eval's way to the same numbers; nothing when it is not installed."""
    try:
        import lm_eval
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        event(NO_LM_EVAL)
        return NO_LM_EVAL, {}
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    def evaluator(longest: int) -> Any:
        rows = max(1, budget // longest)
        return HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=rows, max_length=WINDOW_TOKENS, add_bos_token=False
        )

    for_questions = evaluator(max(len(item.prompt) + len(c) for item in items for c in item.candidates))
    for_documents = evaluator(min(WINDOW_TOKENS, max(row["num_tokens"] for row in documents)))

    def score_questions(part: Sequence[Question]) -> list[float]:
        # tokens and not texts, so that both score the same ones; each candidate once, as ours does
        requests = [
            (("", ""), [*item.prompt, *candidate[: item.skip]], list(candidate[item.skip : -1]))
            for item in part
            for candidate in item.candidates
        ]
        nlls = iter([-score for score, _ in for_questions._loglikelihood_tokens(requests, disable_tqdm=True)])
        by_item = [[next(nlls) for _ in item.candidates] for item in part]
        return [own[at] for item, own in zip(part, by_item, strict=True) for at in (0, *item.choice_of)]

    def score_documents(part: Sequence[dict[str, Any]]) -> list[float]:
        requests = [Instance("loglikelihood_rolling", {}, (row["text"] + tokenizer.eos_token,), 0) for row in part]
        return [-score for score in for_documents.loglikelihood_rolling(requests, disable_tqdm=True)]

    return f"lm-eval {lm_eval.__version__}", {"questions": score_questions, "documents": score_documents}
