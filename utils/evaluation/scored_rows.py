"""The rows of the comparison: which adapters each has, and what the model then does on the held-out data.

All cells of one tokenizer are scored on the same tokens by the same loaded base; merged models of `evaluate.also` are
loaded one after the other. A cell is written whole or not at all, so an interrupted evaluation goes on at the next one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from config import Config, InferenceSection
from utils.adapters import adapter_files, adapter_tokenizer, inference_layers
from utils.adapters.factors import Factors, scaled
from utils.artifacts import resumable
from utils.composition.methods import Recipe, compose
from utils.data.batches import PackedDocuments
from utils.data.prepared import Prepared
from utils.data.splits import hash_share
from utils.evaluation.documents import document_sets
from utils.evaluation.metrics.classification import with_labels
from utils.evaluation.run_groups import ComparedRuns, RunGroup
from utils.exceptions import DataError, NonFiniteError, Problem
from utils.inference import generation, scoring
from utils.logger import event, warning
from utils.models import chat
from utils.models.base_model import BaseModel
from utils.models.parallel import ranks
from utils.models.rows import row_probe
from utils.models.rows.row_support import RowSupport
from utils.models.structure import model_class
from utils.progress import Whole

# what each row is, for the report
MEANING = {
    "base": "the base model",
    "domain": "the domain adapter alone",
    "task": "a task adapter trained on the base with the same data, steps and settings",
    "composed": "domain and task adapter composed",
    "task_without_domain": "composed's task adapter with its domain adapter taken away",
    "wrong_domain": "as composed, with an adapter of other documents as the domain adapter",
    "random": "as composed, with random numbers of the same size as the domain adapter",
    "rank_matched": "a task adapter of the ranks together, trained on the base",
    "base_retrieval": "the base model, asked with passages of the documents",
    "task_retrieval": "the task row, asked with passages",
    "composed_retrieval": "composed, asked with passages",
    "task_at_1": "as task, at weight 1 instead of the weight that was chosen for it on dev",
    "task_plain": "as task at weight 1, trained without what keeps the domain",
}
RETRIEVAL = "_retrieval"
# answered one at a time, for what an answer takes
TIMED_ANSWERS = 5


@dataclass(frozen=True)
class ModelRow:
    """One cell with one seed: the factors on the base (none for the base itself), or another model."""

    cell: str
    seed: int | None
    factors: Factors | None = None
    model: BaseModel | None = None

    @property
    def name(self) -> str:
        return self.cell if self.seed is None else f"{self.cell}-seed{self.seed}"

    @property
    def retrieves(self) -> bool:
        """Whether it is asked with passages; its adapters are those of the row without."""
        return self.cell.endswith(RETRIEVAL)

    @property
    def state(self) -> str:
        """The name of the row whose adapters it has."""
        return replace(self, cell=self.cell.removesuffix(RETRIEVAL)).name


@dataclass(frozen=True)
class Material:
    """What every cell is scored on; with `every_seed` each seed answers what is asked, else the first of its cell."""

    examples: list[dict[str, Any]]
    items: list[scoring.Question]
    left_out: list[str]
    documents: dict[str, PackedDocuments]
    answer_examples: list[dict[str, Any]]
    every_seed: bool
    system_prompt: str
    pad_id: int
    retrieved: list[scoring.Question] | None = None
    retrieved_answer_examples: list[dict[str, Any]] = field(default_factory=list)

    def answer_examples_of(self, row: ModelRow) -> list[dict[str, Any]]:
        """What a row is asked to answer, with passages or without."""
        return self.retrieved_answer_examples if row.retrieves else self.answer_examples

    def size_of(self, row: ModelRow) -> int:
        """Questions and rows of documents that are scored, for a progress bar."""
        if row.retrieves:
            return len(self.retrieved or [])
        return len(self.items) + sum(len(packed.row_lengths(0)) for packed in self.documents.values())


def rows(config: Config, base: BaseModel, parts: ComparedRuns) -> list[ModelRow]:
    """Every row in the order of the report; the first family's come first in each cell."""
    listed = [ModelRow("base", None)]
    for cell in MEANING:
        if cell.endswith(RETRIEVAL):
            continue
        for family in parts.families:
            if cell != "base" and (factors := _factors(cell, family, base, parts)) is not None:
                listed.append(ModelRow(cell, family.seed, factors))
    for guest in parts.guests:
        adapters = [adapter_files.load(run.adapter, base) for run in guest.adapters]
        listed.append(ModelRow(guest.name, None, compose(adapters, Recipe()) if adapters else None, guest.model))
    if config.evaluate.retrieval:
        retrieving = [row for row in listed if f"{row.cell}{RETRIEVAL}" in MEANING]
        listed += [replace(row, cell=f"{row.cell}{RETRIEVAL}") for row in retrieving]
    return listed


def row_supports(config: Config, base: BaseModel, parts: ComparedRuns) -> dict[str, RowSupport]:
    """What the base and each further model honours when rows are shared, by the name of its row."""
    models = {"base": base} | {guest.name: guest.model for guest in parts.guests if guest.model}
    return {name: row_probe.measured(model, config.base) for name, model in models.items()}


def material(config: Config, base: BaseModel, parts: ComparedRuns, scratch: Path) -> Material:
    """Test items and documents as tokens; no items for a domain adapter alone.

    Raises DataError when no test item can be scored.
    """
    settings, tokenizer = config.evaluate, adapter_tokenizer.of(base)
    task, source = parts.first.task, Prepared(parts.data.directory)
    prompt = task.manifest["system_prompt"] if task else config.task.system_prompt
    # a domain adapter alone is judged on documents: the test questions stay unread for the task adapter to come
    examples = source.examples("test") if task else []
    if parts.kind.labels:
        examples = with_labels(examples, parts.kind.labels)
    longest = model_class.longest_row(base.directory, settings.batch_tokens)
    items, left_out = scoring.questions(examples, tokenizer, prompt, longest)
    if left_out:
        warning("test items that do not fit evaluate.batch_tokens are left out", count=len(left_out))
    if not items and task:
        raise DataError(Problem("no test item can be scored", len(left_out), "raise --evaluate.batch_tokens"))
    pad_id = chat.pad_id(tokenizer)
    claim = {"": "H1", "domain": "D1"}.get(parts.which_alone, "")
    documents = document_sets.of_data(settings, config.run.seed, base, source, pad_id, claim=claim)
    documents["general"] = document_sets.general(settings, base, tokenizer, pad_id, scratch)
    order = sorted(examples, key=lambda e: hash_share(str(e["id"]), config.run.seed))
    answer_examples = order[: settings.generated_answers]
    if parts.primary.generates:
        scored = {item.name for item in items}
        answer_examples = [example for example in examples if str(example["id"]) in scored]
    return Material(examples, items, left_out, documents, answer_examples, parts.primary.generates, prompt, pad_id)


def score(
    config: Config, base: BaseModel, model_rows: Sequence[ModelRow], on: Material, directory: Path
) -> dict[str, Any]:
    """Row name -> its scores, from `directory/cell_<row>.json` where an interrupted call wrote them.

    Without generated answers where an engine gives them, which is a phase of its own (`served_rows`).
    """
    of = resumable.owner(directory)
    paths = {row.name: directory / f"cell_{row.name}.json" for row in model_rows}
    scored = {name: resumable.read(path, of) for name, path in paths.items()}
    todo = [row for row in model_rows if scored[row.name] is None]
    if not todo:
        return scored
    first_of_cell = {row.cell: row.name for row in reversed(model_rows)}
    # generating costs far more than scoring: unless it decides, the first seed answers for its cell
    is_first = {row.name: first_of_cell[row.cell] == row.name for row in todo}
    answers = {row.name: config.inference.engine == "local" and (on.every_seed or is_first[row.name]) for row in todo}
    examples = {row.name: on.answer_examples_of(row) if answers[row.name] else [] for row in todo}
    total = sum(on.size_of(row) + len(examples[row.name]) for row in todo)
    event(f"evaluation of {len(todo)} rows", questions=len(on.items), answers=sum(map(len, examples.values())))
    with Whole("evaluation", total=total, unit="item"):
        for row, model in _models(config, base, todo, on):
            is_timed = is_first[row.name] and f"{row.cell.removesuffix(RETRIEVAL)}{RETRIEVAL}" in first_of_cell
            try:
                result = model.scores(replace(row, factors=None, model=None), examples[row.name], is_timed=is_timed)
            except NonFiniteError as error:
                raise NonFiniteError([replace(problem, value=row.name) for problem in error.problems]) from error
            scored[row.name] = resumable.write(paths[row.name], result, of)
    return scored


def answers_to(
    config: Config, base: BaseModel, model_rows: Sequence[ModelRow], on: Material, examples: Sequence[dict[str, Any]]
) -> dict[str, list[str]]:
    """What some rows say to some examples: row's cell -> texts."""
    return {row.cell: model.answers(row.name, examples) for row, model in _models(config, base, model_rows, on)}


class ScoredModel:
    """A loaded model with the adapters of several rows, and what it is scored on; every rank has one (`ranks.Held`)."""

    def __init__(
        self, config: Config, base: BaseModel, loaded: BaseModel, adapters: Mapping[str, Factors], on: Material
    ):
        self._settings, self._on, self._adapters = config.evaluate, on, set(adapters)
        self._tokenizer = adapter_tokenizer.of(base)
        self._model = inference_layers.attach(row_probe.load_model(loaded, config.base), adapters).eval()

    def scores(self, of: ModelRow, examples: Sequence[dict[str, Any]], *, is_timed: bool = False) -> dict[str, Any]:
        """Every item's and document's likelihoods in the state of a row, and its answers to `examples`.

        Documents do not depend on passages, so a row with retrieval has none. `is_timed`: what an answer takes, too.
        """
        self._select(of.state)
        settings, on, model, row = self._settings, self._on, self._model, of.name
        items = (on.retrieved or []) if of.retrieves else on.items
        common: dict[str, Any] = {"batch_tokens": settings.batch_tokens, "device": next(model.parameters()).device}
        scored = []
        if items:
            scored = scoring.score_questions(model, items, pad_id=on.pad_id, what=f"{row}: questions", **common)
        result: dict[str, Any] = {"items": scoring.to_json(scored)}
        for name, packed in ({} if of.retrieves else on.documents).items():
            what = f"{row}: {name} documents"
            result[name] = scoring.to_json(scoring.score_documents(model, packed, what=what, **common))
        began = time.perf_counter()
        result["answers"] = scoring.answered(
            model, self._tokenizer, examples, on.system_prompt, settings.max_new_tokens, what=f"{row}: answers"
        )
        result["answering_seconds"] = round(time.perf_counter() - began, 3)
        if is_timed:
            result["per_answer"] = {
                "prompt_tokens": sum(len(item.prompt) for item in items) / len(items),
                "seconds": self._seconds_an_answer(examples[:TIMED_ANSWERS]),
            }
        event(f"{row} scored", **({"answer_nll": scoring.summary(scored, [])["answer_nll"]} if scored else {}))
        return result

    def loss(self, items: Sequence[scoring.Question], what: str) -> float:
        """NLL per token of gold answers, by the base model alone."""
        self._select("")
        how: dict[str, Any] = {"batch_tokens": self._settings.batch_tokens, "pad_id": self._on.pad_id, "what": what}
        how["device"] = next(self._model.parameters()).device
        scored = scoring.score_questions(self._model, items, **how)
        return scoring.summary(scored, [])["answer_nll"]

    def _seconds_an_answer(self, examples: Sequence[dict[str, Any]]) -> float | None:
        """Median time from a question to the end of its answer, one at a time; None without questions."""
        how, taken = InferenceSection(max_new_tokens=self._settings.max_new_tokens), []
        for example in examples:
            began = time.perf_counter()
            generation.answer_all(self._model, self._tokenizer, [example], self._on.system_prompt, how)
            taken.append(time.perf_counter() - began)
        return round(statistics.median(taken), 4) if taken else None

    def answers(self, row: str, examples: Sequence[dict[str, Any]]) -> list[str]:
        """The answers in the state of a row, without their reasoning."""
        self._select(row)
        how = InferenceSection(max_new_tokens=self._settings.max_new_tokens)
        given = generation.answer_all(self._model, self._tokenizer, examples, self._on.system_prompt, how)
        return [one.answer for one in given]

    def _select(self, row: str) -> None:
        inference_layers.select(self._model, {row: 1.0} if row in self._adapters else {})


def _models(
    config: Config, base: BaseModel, model_rows: Sequence[ModelRow], on: Material
) -> Iterator[tuple[ModelRow, ranks.Held]]:
    """Each row with the `ScoredModel` that has it; the base is loaded once, with every adapter on it."""
    on_base = [row for row in model_rows if row.model is None]
    if on_base:
        adapters = {row.state: row.factors for row in on_base if row.factors}
        with ranks.Held(ScoredModel, config, base, base, adapters, on) as model:
            for row in on_base:
                yield row, model
    for row in model_rows:
        if row.model is not None:
            with ranks.Held(ScoredModel, config, base, row.model, {}, on) as model:
                yield row, model


def _factors(cell: str, family: RunGroup, base: BaseModel, parts: ComparedRuns) -> Factors | None:
    """The adapter of a cell in a family, or None where the family does not have it."""

    def load(*runs: Any) -> list[Factors]:
        return [adapter_files.load(run.adapter, base) for run in runs]

    if (alone := parts.alone) is not None:
        if cell != parts.which_alone:
            return None
        if family is parts.first:
            return alone.factors
        return compose([*load(family.domain or family.task), *alone.parts[1:]], alone.recipe)
    if cell == "domain":
        return load(family.domain)[0] if family.domain else None
    if cell in ("task", "task_at_1"):
        chosen = parts.baseline_weight.chosen.weights[0] if parts.baseline_weight else 1.0
        if family.baseline is None or (cell == "task_at_1" and chosen == 1.0):
            return None
        weight = chosen if cell == "task" else 1.0
        return {name: scaled(factors, weight) for name, factors in load(family.baseline)[0].items()}
    if cell == "task_without_domain":
        stacked = family.domain and family.baseline is not family.task
        return load(family.task)[0] if stacked else None
    if cell in ("rank_matched", "task_plain"):
        return load(*family.controls[cell])[0] if cell in family.controls else None
    if parts.composed is None or family.domain is None:
        return None
    if cell == "composed" and family is parts.first:
        return parts.composed.factors
    pair = (family.domain, family.task) if cell == "composed" else family.controls.get(cell)
    if pair is None:
        return None
    # further adapters of the composition are the same for every seed and control
    return compose([*load(*pair), *parts.composed.parts[2:]], parts.composed.recipe)
