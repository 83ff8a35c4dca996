"""Every pair of a matrix scored: one loaded base with all adapters on it, each pair on its own data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Config
from utils.adapters import adapter_files, adapter_tokenizer, inference_layers
from utils.adapters.factors import Factors
from utils.artifacts import resumable
from utils.artifacts.runs import Run
from utils.data.prepared import Prepared
from utils.evaluation.baseline_weight import searched_alone
from utils.evaluation.documents import document_sets
from utils.evaluation.matrix.matrix_runs import AdapterPair, MatrixRuns
from utils.evaluation.metrics.classification import with_labels
from utils.inference import scoring
from utils.models import chat
from utils.models.base_model import BaseModel
from utils.models.parallel import ranks
from utils.models.rows import row_probe
from utils.models.structure import model_class
from utils.progress import Whole

BASE = "base"


@dataclass(frozen=True)
class Scored:
    """What is scored: a row (the base, an adapter, a pair) on the questions or the documents of some data."""

    row: str
    what: str
    data: str

    @property
    def file(self) -> str:
        return f"cell_{self.row}_{self.what}_{self.data}.json"


QUESTIONS, DOCUMENTS = "questions", "documents"


@dataclass(frozen=True)
class TaskQuestions:
    """The questions of a task adapter; `answers` are generated for `examples`, where those decide."""

    items: list[scoring.Question]
    examples: list[dict[str, Any]]
    system_prompt: str


def name_of(one: Run | AdapterPair) -> str:
    """Of a row, short and without a character that a file name may not hold."""
    if isinstance(one, AdapterPair):
        return f"{one.domain.digest[:8]}-{one.task.digest[:8]}"
    return one.digest[:8]


def baseline_row(members: MatrixRuns, pair: AdapterPair, weights: Mapping[str, float]) -> str:
    """The row of the task adapter alone that a pair is compared with; empty where there is none."""
    baseline = members.baselines[pair.task.digest]
    if baseline is None:
        return ""
    weight = weights.get(name_of(pair), 1.0)
    return name_of(baseline) if weight == 1.0 else f"{name_of(baseline)}@{weight:g}"


def baseline_weights(config: Config, base: BaseModel, members: MatrixRuns, directory: Path) -> dict[str, float]:
    """By pair, the weight of its baseline, chosen on dev where the weights of the pair were; others have 1."""
    weights: dict[str, float] = {}
    for pair in members.pairs:
        of, baseline = (
            (None, None) if pair.why_empty else (members.search_of(pair), members.baselines[pair.task.digest])
        )
        if of is not None and baseline is not None:
            remembered = directory / f"baseline_{name_of(pair)}.jsonl"
            prompt = pair.task.manifest.get("system_prompt", config.task.system_prompt)
            data = members.data[pair.task.digest]
            chosen = searched_alone(config, base, of, baseline, data, prompt, remembered)
            weights[name_of(pair)] = chosen.chosen.weights[0]
    return weights


def to_score(members: MatrixRuns, weights: Mapping[str, float]) -> list[Scored]:
    """Everything that has to be scored, each once."""
    listed: list[Scored] = []
    for pair in members.pairs:
        if pair.why_empty:
            continue
        task_data, read = members.data[pair.task.digest], members.data.get(pair.domain.digest)
        rows = filter(None, [BASE, name_of(pair), baseline_row(members, pair, weights)])
        listed += [Scored(row, QUESTIONS, questions_of(pair.task, task_data)) for row in rows]
        if read is not None and (read.directory / "heldout_documents").is_dir():
            listed += [Scored(row, DOCUMENTS, read.digest[:8]) for row in (BASE, name_of(pair.domain), name_of(pair))]
    return list(dict.fromkeys(listed))


def states(members: MatrixRuns, weights: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """By row, the adapters that are on and their weights: a pair is both at 1, unless it was composed otherwise."""
    rows: dict[str, dict[str, float]] = {BASE: {}}
    for pair in members.pairs:
        domain, task, own = name_of(pair.domain), name_of(pair.task), name_of(pair)
        rows[domain] = {domain: 1.0}
        rows[own] = {own: 1.0} if pair.composed else {domain: 1.0, task: 1.0}
        if (baseline := members.baselines[pair.task.digest]) is not None:
            rows[baseline_row(members, pair, weights)] = {name_of(baseline): weights.get(own, 1.0)}
    return rows


def scores(
    config: Config, base: BaseModel, members: MatrixRuns, weights: Mapping[str, float], directory: Path
) -> dict[Scored, dict[str, Any]]:
    """Per-item scores of everything that is wanted, from `directory` where an interrupted call wrote them.

    As rows of a comparison have them: `items`, and of questions `answers` where those decide.
    """
    of, listed = resumable.owner(directory), to_score(members, weights)
    known = {one: resumable.read(directory / one.file, of) for one in listed}
    todo = [one for one in listed if known[one] is None]
    if todo:
        adapters, rows = _adapters(base, members), states(members, weights)
        questions, documents = _material(config, base, members)
        with (
            ranks.Held(MatrixModel, config, base, adapters, rows, questions, documents) as model,
            Whole("matrix", total=len(listed), unit="row", done=len(listed) - len(todo), counts_steps=True) as bar,
        ):
            for one in todo:
                known[one] = resumable.write(directory / one.file, model.scores(one), of)
                bar.step(one.row)
    return {one: value for one, value in known.items() if value is not None}


class MatrixModel:
    """The loaded base with every adapter, and everything that is asked; every rank has one (`ranks.Held`)."""

    def __init__(
        self,
        config: Config,
        base: BaseModel,
        adapters: Mapping[str, Factors],
        rows: Mapping[str, Mapping[str, float]],
        questions: Mapping[str, TaskQuestions],
        documents: Mapping[str, Any],
    ):
        self._settings, self._questions, self._documents = config.evaluate, questions, documents
        self._tokenizer, self._rows = adapter_tokenizer.of(base), rows
        self._model = inference_layers.attach(row_probe.load_model(base, config.base), adapters).eval()

    def scores(self, one: Scored) -> dict[str, Any]:
        """Every item's likelihood, and answers where those decide."""
        inference_layers.select(self._model, dict(self._rows[one.row]))
        model, what = self._model, f"{one.row}: {one.what}"
        common: dict[str, Any] = {"batch_tokens": self._settings.batch_tokens, "what": what}
        common["device"] = next(model.parameters()).device
        if one.what == DOCUMENTS:
            return {"items": scoring.to_json(scoring.score_documents(model, self._documents[one.data], **common))}
        questions = self._questions[one.data]
        pad_id = chat.pad_id(self._tokenizer)
        result = {"items": scoring.to_json(scoring.score_questions(model, questions.items, pad_id=pad_id, **common))}
        if questions.examples:
            longest = self._settings.max_new_tokens
            how = (self._tokenizer, questions.examples, questions.system_prompt, longest)
            result["answers"] = scoring.answered(model, *how, what=f"{one.row}: answers")
        return result


def _adapters(base: BaseModel, members: MatrixRuns) -> dict[str, Factors]:
    """Name -> factors: each adapter, and the pairs that are not just both of them."""
    alone = [*members.domains, *members.tasks, *(run for run in members.baselines.values() if run is not None)]
    adapters = {name_of(run): adapter_files.load(run.adapter, base) for run in alone}
    composed = {name_of(pair): pair.factors(base) for pair in members.pairs if pair.composed and not pair.why_empty}
    return {**adapters, **composed}


def questions_of(task: Run, data: Run) -> str:
    """Questions are rendered with the system prompt of the adapter."""
    return f"{data.digest[:8]}-{task.digest[:8]}"


def _material(config: Config, base: BaseModel, members: MatrixRuns) -> tuple[dict[str, TaskQuestions], dict[str, Any]]:
    """Test questions of each task adapter, and held-out documents of each data, as tokens."""
    tokenizer = adapter_tokenizer.of(base)
    longest = model_class.longest_row(base.directory, config.evaluate.batch_tokens)
    questions: dict[str, TaskQuestions] = {}
    for task in {pair.task.digest: pair.task for pair in members.pairs if not pair.why_empty}.values():
        data = members.data[task.digest]
        prompt = task.manifest.get("system_prompt", config.task.system_prompt)
        examples = Prepared(data.directory).examples("test")
        if (kind := members.kinds.get(task.digest)) and kind.labels:
            examples = with_labels(examples, kind.labels)
        items, _ = scoring.questions(examples, tokenizer, prompt, longest)
        fitting = {item.name for item in items} if members.metric_of(task).generates else set()
        chosen = [example for example in examples if str(example["id"]) in fitting]
        questions[questions_of(task, data)] = TaskQuestions(items, chosen, prompt)
    pad_id = chat.pad_id(tokenizer)
    documents = {
        data.digest[:8]: document_sets.of_data(config.evaluate, config.run.seed, base, prepared, pad_id)["heldout"]
        for data in members.data.values()
        if (data.directory / "heldout_documents").is_dir() and (prepared := Prepared(data.directory))
    }
    return questions, documents
