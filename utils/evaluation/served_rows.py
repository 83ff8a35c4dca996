"""Generated answers of the rows from an engine: a phase after the likelihoods, whose memory is free by then.

What was answered lies in `answers.jsonl` of the run, a line for each answer, so that an interrupted phase goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from config import LIKELIHOOD_METRICS, Config
from utils.adapters import adapter_tokenizer
from utils.artifacts import resumable
from utils.evaluation.scored_rows import Material, ModelRow
from utils.exceptions import ConfigError, Problem
from utils.inference import scoring
from utils.inference.answer_journal import AnswerJournal
from utils.inference.engines import served_model
from utils.inference.engines.served_model import ServedModel
from utils.inference.generation import GeneratedAnswer
from utils.models import chat
from utils.models.base_model import BaseModel

ANSWERS = "answers.jsonl"


class ServedRows:
    """Use it in `with`. One server for all rows on the base; further models one after the other."""

    def __init__(self, config: Config, base: BaseModel, rows: Sequence[ModelRow], on: Material, directory: Path):
        self._config, self._base, self._rows, self._on = config, base, rows, on
        self._journal = AnswerJournal(directory / ANSWERS, resumable.owner(directory))
        self._tokenizer = adapter_tokenizer.of(base)
        self._model: ServedModel | None = None
        self._serves: BaseModel | None = None

    def __enter__(self) -> ServedRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def scores(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Scores of rows with what their answers are worth; as without an engine, the first seed answers for its cell,
        unless the answers decide.

        `raw` is row's name -> its likelihoods. Raises EngineError.
        """
        scored, cells = dict(raw), set()
        for row in sorted(self._rows, key=lambda row: row.model is not None):
            if self._on.every_seed or row.cell not in cells:
                examples = self._on.answer_examples_of(row)
                given = self.answers(row, examples)
                scored[row.name] = {**raw[row.name], "answers": scoring.judged(self._tokenizer, examples, given)}
            cells.add(row.cell)
        return scored

    def answers(self, row: ModelRow, examples: Sequence[dict[str, Any]]) -> list[GeneratedAnswer]:
        """What a row says to some examples. Raises EngineError."""
        if not examples:
            return []
        return self._model_of(row).answers(self._prompts(examples), row.name, row.factors, f"{row.name}: answers")

    def _model_of(self, row: ModelRow) -> ServedModel:
        """The server of a row's base model; that of another one is ended first, for its memory."""
        base = row.model or self._base
        if self._model is None or self._serves is not base:
            self._stop()
            evaluate, inference = self._config.evaluate, self._config.inference
            chosen = {"tokenizer_from": self._base.tokenizer_from, "tokenizer_choice": self._base.tokenizer_choice}
            self._serves = base
            self._model = ServedModel(
                replace(base, **chosen),
                self._config.base,
                inference.model_copy(update={"max_new_tokens": evaluate.max_new_tokens, "temperature": 0.0}),
                models_dir=self._config.run.models_dir,
                rank=served_model.rank_of([one.factors for one in self._rows if one.model is row.model]),
                positions=served_model.positions_of(
                    self._prompts([*self._on.examples, *self._on.retrieved_answer_examples]), evaluate.max_new_tokens
                ),
                journal=self._journal,
            )
        return self._model

    def _prompts(self, examples: Sequence[dict[str, Any]]) -> list[list[int]]:
        return [chat.prompt_ids(self._tokenizer, example, self._on.system_prompt) for example in examples]

    def _stop(self) -> None:
        if self._model is not None:
            self._model.__exit__(None, None, None)
        self._model = self._serves = None


def refuse_other_models(config: Config, rows: Sequence[ModelRow]) -> None:
    """Raises ConfigError where a running server would have to answer for another model than it serves."""
    others = [row.name for row in rows if row.model is not None]
    if config.inference.engine == "openai" and others and _asks(config):
        fix = "--inference.engine vllm starts a server for each, --inference.engine local loads them one by one"
        raise ConfigError(Problem("a running server answers for its own model alone", others, fix))


def _asks(config: Config) -> bool:
    return bool(config.evaluate.generated_answers) or config.evaluate.primary not in LIKELIHOOD_METRICS
