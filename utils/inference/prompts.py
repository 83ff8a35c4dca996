"""Prompts and where their answers go: from a file to a file, or one prompt or a conversation to stdout."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from config import BaseModelSection, InferenceSection
from utils.adapters import adapter_tokenizer, inference_layers
from utils.adapters.factors import Factors
from utils.artifacts import files
from utils.data.labelled import column_roles
from utils.data.tables import PAIR_SUFFIXES, ProblemList, iter_rows, table_suffix
from utils.exceptions import DataError, Problem, path_fix
from utils.inference import answer_journal, generation
from utils.inference.engines import served_model
from utils.inference.engines.served_model import ServedModel
from utils.inference.generation import GeneratedAnswer
from utils.logger import event, warning
from utils.models import chat
from utils.models.base_model import BaseModel
from utils.models.parallel import ranks
from utils.models.rows import row_probe


def read(path: Path) -> list[dict[str, Any]]:
    """Rows with a prompt or a question; of a .txt its lines. Raises DataError with file and line for what is none."""
    if not path.is_file():
        raise DataError(Problem("--prompts_file does not exist", str(path), path_fix(path)))
    if table_suffix(path) == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(Problem(f"--prompts_file is not UTF-8: {error}", str(path), "save it as UTF-8")) from error
        questions = [{"question": line, "context": None, "id": None} for line in lines if line.strip()]
        return questions or _refuse_empty(path)
    if table_suffix(path) not in PAIR_SUFFIXES:
        fix = f"give one of {' '.join(PAIR_SUFFIXES)}, or .txt with a prompt in each line"
        raise DataError(Problem("--prompts_file is of no kind that is read", str(path), fix))
    problems = ProblemList()
    questions, without = [], set[str]()
    for row in iter_rows(path, problems):
        question, context = _value(row.values, "question"), _value(row.values, "context") or None
        if question is None:
            columns = ", ".join(map(str, row.values))
            fix = 'call one of them question or prompt; a line of jsonl is {"prompt": "..."}'
            if columns not in without:  # a table is told once, and not for each row
                problems.add(f"{row.place}: no prompt or question among the columns {columns}", fix=fix)
            without.add(columns)
            continue
        if not isinstance(question, str) or not question.strip():
            problems.add(
                f"{row.place}: the prompt is empty or no text", question, "write a question, or remove the row"
            )
            continue
        if context is not None and not isinstance(context, str):
            problems.add(f"{row.place}: the context is no text", context, "write a string, or leave it out")
            continue
        questions.append({"question": question, "context": context, "id": row.values.get("id")})
    problems.raise_if_any()
    return questions or _refuse_empty(path)


def _value(row: Mapping[str, Any], role: str) -> Any:
    """What stands in the row's column of this role, by the names that labelled pairs may have; None without one."""
    named = {column_roles.column_name(name): value for name, value in row.items()}
    values = [named[name] for family in column_roles.STRONG[role] for name in family if name in named]
    return next((value for value in values if value not in (None, "")), "" if values else None)


def _refuse_empty(path: Path) -> NoReturn:
    raise DataError(Problem(f"{path} holds no prompts"))


# what the adapter is called in an engine
ADAPTER = "adapter"
# besides an empty line
ENDS = ("", "quit", "exit", ":q")


class PromptModel:
    """Base model with or without a composed adapter, and how it is asked; every rank may have one (`ranks.Held`)."""

    def __init__(
        self,
        base: BaseModel,
        section: BaseModelSection,
        factors: Factors | None,
        system_prompt: str,
        settings: InferenceSection,
        belongs_to: str,
    ):
        self._tokenizer = adapter_tokenizer.of(base)
        adapters = {"composed": factors} if factors else {}
        self._model = inference_layers.attach(row_probe.load_model(base, section), adapters)
        self._system_prompt, self._settings = system_prompt, settings
        self._journal = answer_journal.beside(settings.output_file, belongs_to, "answer")

    def answer_all(self, examples: list[dict[str, Any]]) -> list[GeneratedAnswer]:
        """Answers in the order of what `read` gave."""
        how = (self._system_prompt, self._settings)
        return generation.answer_all(
            self._model, self._tokenizer, examples, *how, what="answers", journal=self._journal
        )

    def answer_one(self, question: str) -> dict[str, str]:
        """Answer as the tokens are made: the answer to stdout, what stands in the template's think block to stderr."""
        is_shown = ranks.index() == 0

        def answered(show: Callable[[str], None]) -> GeneratedAnswer:
            (given,) = generation.answer(
                self._model,
                self._tokenizer,
                [chat.prompt_ids(self._tokenizer, {"question": question}, self._system_prompt)],
                max_new_tokens=self._settings.max_new_tokens,
                temperature=self._settings.temperature,
                top_p=self._settings.top_p,
                stream=show if is_shown else None,
            )
            return given

        return _streamed(self._tokenizer, self._settings, answered, is_shown=is_shown)


class ServedPrompts:
    """The same of a model behind an engine; use it in `with`."""

    def __init__(self, model: ServedModel, factors: Factors | None, system_prompt: str, settings: InferenceSection):
        self._model, self._factors = model, factors
        self._system_prompt, self._settings = system_prompt, settings

    def __enter__(self) -> ServedPrompts:
        return self

    def __exit__(self, *error: Any) -> None:
        self._model.__exit__(*error)

    @classmethod
    def of(
        cls,
        base: BaseModel,
        section: BaseModelSection,
        factors: Factors | None,
        system_prompt: str,
        settings: InferenceSection,
        *,
        questions: Sequence[dict[str, Any]],
        belongs_to: str,
        models_dir: Path,
        seed: int,
    ) -> ServedPrompts:
        """For these questions, or for any where none are known before.

        Answers to a file grow beside it (`answer_journal`), and are gone on from where they belong to the same
        (`belongs_to`).
        """
        ids = prompt_ids(adapter_tokenizer.of(base), questions, system_prompt)
        model = ServedModel(
            base,
            section,
            settings,
            models_dir=models_dir,
            rank=served_model.rank_of([factors]),
            positions=served_model.positions_of(ids, settings.max_new_tokens) if ids else 0,
            seed=seed,
            journal=answer_journal.beside(settings.output_file, belongs_to, "ids"),
        )
        return cls(model, factors, system_prompt, settings)

    def answer_all(self, examples: list[dict[str, Any]]) -> list[GeneratedAnswer]:
        """Answers in the order of what `read` gave."""
        ids = prompt_ids(self._model.tokenizer, examples, self._system_prompt)
        return self._model.answers(ids, ADAPTER, self._factors, "answers")

    def answer_one(self, question: str) -> dict[str, str]:
        """Answer as the tokens come, as `PromptModel` does."""
        (ids,) = prompt_ids(self._model.tokenizer, [{"question": question}], self._system_prompt)
        return _streamed(
            self._model.tokenizer,
            self._settings,
            lambda show: self._model.stream(ids, ADAPTER, self._factors, show),
            is_shown=True,
        )


def prompt_ids(tokenizer: Any, examples: Sequence[dict[str, Any]], system_prompt: str) -> list[list[int]]:
    """The token ids of each prompt."""
    return [chat.prompt_ids(tokenizer, example, system_prompt) for example in examples]


def write_answers(
    examples: list[dict[str, Any]], answers: list[GeneratedAnswer], settings: InferenceSection
) -> dict[str, Any]:
    """JSON lines in `settings.output_file` or on stdout; says how many and where."""
    rows = [
        {"id": example["id"], "prompt": example["question"], **_parts(answer)}
        for example, answer in zip(examples, answers, strict=True)
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if settings.output_file:
        files.write_text(Path(settings.output_file), lines + "\n")
        if grown := answer_journal.beside(settings.output_file):
            grown.discard()
    else:
        print(lines)
    return {"answered": len(rows), "output_file": settings.output_file or None}


def piped() -> list[str]:
    """The questions on standard input, a line each, where it is a pipe or a file; a terminal is asked otherwise.

    Raises DataError for a line that is not UTF-8.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # of a stream that is no file
        return []
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
        return []
    event("reading questions from standard input, one a line")
    try:
        return [line.strip() for line in sys.stdin.buffer.read().decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(Problem(f"standard input is not UTF-8: {error}", fix="write the questions in UTF-8")) from error


def converse(answer: Callable[[str], Any]) -> dict[str, Any]:
    """Answer what is typed, one question at a time, until an empty line, `quit` or the end of the input."""
    print("Ask a question; an empty line, quit or Ctrl-D ends.", file=sys.stderr)
    count = 0
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            break
        except UnicodeDecodeError as error:
            warning("this line is not UTF-8 and was not asked: type it again", reason=error)
            continue
        if question.lower() in ENDS:
            break
        answer(question)
        count += 1
    return {"answered": count}


def _streamed(
    tokenizer: Any,
    settings: InferenceSection,
    answered: Callable[[Callable[[str], None]], GeneratedAnswer],
    *,
    is_shown: bool,
) -> dict[str, str]:
    """Show an answer as it is made: the answer on stdout, what stands in the template's think block on stderr."""
    splitter = generation.ThinkSplitter(
        lambda text: print(text, end="", flush=True, file=sys.stderr),
        lambda text: print(text, end="", flush=True),
        opened=chat.opens_thinking(tokenizer),
    )
    given = answered(splitter)
    if is_shown:
        splitter.end()
        print(flush=True)
    if given.opened and is_shown:
        print(file=sys.stderr)
        if not given.ended and not given.answer:
            tokens = settings.max_new_tokens
            warning("cut while still thinking: raise --inference.max_new_tokens", max_new_tokens=tokens)
    return _parts(given)


def _parts(given: GeneratedAnswer) -> dict[str, str]:
    """The answer, and its reasoning where the template has a place for it."""
    return {"answer": given.answer} | ({"reasoning": given.reasoning} if given.opened else {})
