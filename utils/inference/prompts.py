"""Prompts and where their answers go: from a file to a file, or one prompt or a conversation to stdout."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import InferenceSection
from utils.artifacts import files
from utils.data.tables import ProblemList, iter_rows
from utils.exceptions import DataError, Problem
from utils.inference import generation
from utils.inference.generation import GeneratedAnswer
from utils.logger import event, warning
from utils.models import chat
from utils.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read(path: Path) -> list[dict[str, Any]]:
    """Rows with a prompt or a question. Raises DataError with file and line for what cannot be used."""
    if not path.is_file():
        raise DataError(Problem("--prompts_file does not exist", str(path)))
    problems = ProblemList()
    found = []
    for row in iter_rows(path, problems):
        question = row.values.get("question") or row.values.get("prompt")
        if not isinstance(question, str) or not question.strip():
            problems.add(f"{row.place}: no prompt or question", list(row.values), 'write {"prompt": "..."}')
            continue
        context = row.values.get("context")
        if context is not None and not isinstance(context, str):
            problems.add(f"{row.place}: the context is no text", context, "write a string, or leave it out")
            continue
        found.append({"question": question, "context": context, "id": row.values.get("id")})
    problems.raise_if_any()
    if not found:
        raise DataError(Problem(f"{path} holds no prompts"))
    return found


# besides an empty line
ENDS = ("", "quit", "exit", ":q")


def answer_file(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, Any]],
    system_prompt: str,
    settings: InferenceSection,
) -> dict[str, Any]:
    """Answer what `read` gave, as JSON lines in `settings.output_file` or on stdout; says how many and where."""
    with Progress("answers", total=len(examples), unit="prompt") as bar:
        answers = generation.answer_all(model, tokenizer, examples, system_prompt, settings, bar.advance)
    rows = [
        {"id": example["id"], "prompt": example["question"], **_parts(answer)}
        for example, answer in zip(examples, answers, strict=True)
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if settings.output_file:
        files.write_text(Path(settings.output_file), lines + "\n")
    else:
        print(lines)
    return {"answered": len(rows), "output_file": settings.output_file or None}


def answer_one(
    model: Any, tokenizer: PreTrainedTokenizerBase, question: str, system_prompt: str, settings: InferenceSection
) -> dict[str, str]:
    """Answer as the tokens are made: the answer to stdout, what stands in the template's think block to stderr."""
    parting = generation.Parting(
        lambda text: print(text, end="", flush=True, file=sys.stderr),
        lambda text: print(text, end="", flush=True),
        opened=chat.opens_thinking(tokenizer),
    )
    (given,) = generation.answer(
        model,
        tokenizer,
        [chat.prompt_ids(tokenizer, {"question": question}, system_prompt)],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stream=parting,
    )
    parting.end()
    print(flush=True)
    if given.opened:
        print(file=sys.stderr)
        if not given.ended and not given.spoken:
            tokens = settings.max_new_tokens
            warning("cut while still thinking: raise --inference.max_new_tokens", max_new_tokens=tokens)
    return _parts(given)


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
    asked = 0
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
        asked += 1
    return {"answered": asked}


def _parts(given: GeneratedAnswer) -> dict[str, str]:
    """The answer, and its reasoning where the template has a place for it."""
    return {"answer": given.spoken} | ({"reasoning": given.reasoning} if given.opened else {})
