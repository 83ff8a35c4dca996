"""Answer questions with base + both adapters composed exactly, or write them as one standalone model.

Reads the newest task run and the domain run it belongs to; writes nothing, or --output_file, or --merge_path.

    python scripts/inference.py --prompt "What does json.dumps do?"
    python scripts/inference.py --prompts_file questions.jsonl --output_file answers.jsonl
    python scripts/inference.py --merge_path models/merged_model
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import Config
from utils import cli

SECTIONS = ("inference", "compose", "inputs", "base", "run")


def main(config: Config) -> dict[str, Any]:
    """Compose, then merge or answer."""
    from utils import base_model, files, frozen_lora, merging, stages
    from utils.exceptions import ConfigError, Problem

    wanted = config.inference
    interactive = sys.stdin.isatty() and not (wanted.prompt or wanted.prompts_file or wanted.merge_path)
    if not (wanted.prompt or wanted.prompts_file or wanted.merge_path or interactive):
        raise ConfigError(
            Problem("nothing to answer", fix='give --prompt "...", --prompts_file FILE or --merge_path DIR')
        )
    if wanted.merge_path:
        merging.refuse_target(Path(wanted.merge_path))
    examples = _read_prompts(Path(wanted.prompts_file)) if wanted.prompts_file else []
    if wanted.output_file:
        files.make_directory(Path(wanted.output_file).parent)
    base = stages.start(config)
    factors, parents, system_prompt = _chosen(config, base)
    if wanted.merge_path:
        return _merge(config, base, factors, parents)
    tokenizer = base_model.load_tokenizer(base.directory)
    model = base_model.load_model(base, config.base)
    if factors:
        model = frozen_lora.put_on(model, factors)
    if examples:
        return _answer_file(config, model, tokenizer, examples, system_prompt, parents)
    answer = _streaming(config, model, tokenizer, system_prompt)
    if interactive:
        return _interactive(answer)
    return {"prompt": wanted.prompt, "answer": answer(wanted.prompt), "adapters": [str(p.directory) for p in parents]}


def _chosen(config: Config, base: Any) -> tuple[Any, list[Any], str]:
    """The composed factors (None for the bare base), the runs they come from, and their system prompt."""
    from utils import stages
    from utils.logger import event, warning

    which = config.inference.adapters
    if which == "none":
        return None, [], config.task.system_prompt
    if which == "domain":
        domain, task = stages.domain_run(config, base), None
    else:
        domain, task = stages.lineage(config, base)
        if which == "both" and domain is None:
            domain = stages.domain_run(config, base)  # says what is missing
        if which == "task":
            if task.manifest["identity"]["on"] == "domain":
                warning("this task adapter was trained on its domain adapter; alone it is not the task baseline")
            domain = None
    factors, parents = stages.composed_factors(domain, task, config.compose.weights)
    system_prompt = task.manifest["system_prompt"] if task else config.task.system_prompt
    event("composed", adapters=", ".join(p.directory.as_posix() for p in parents), weights=config.compose.weights)
    if which == "both":
        event("these weights were not searched on the dev split")
    return factors, parents, system_prompt


def _streaming(config: Config, model: Any, tokenizer: Any, system_prompt: str) -> Callable[[str], str]:
    from utils import chat, generation

    def answer(question: str) -> str:
        ids = chat.prompt_ids(tokenizer, {"question": question}, system_prompt)
        texts = generation.answer(
            model,
            tokenizer,
            [ids],
            max_new_tokens=config.inference.max_new_tokens,
            temperature=config.inference.temperature,
            top_p=config.inference.top_p,
            stream=lambda text: print(text, end="", flush=True),
        )
        print(flush=True)
        return chat.spoken(texts[0])

    return answer


def _interactive(answer: Callable[[str], str]) -> dict[str, Any]:
    print("Ask a question; an empty line or Ctrl-D ends.", file=sys.stderr)
    asked = 0
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            break
        if not question:
            break
        answer(question)
        asked += 1
    return {"answered": asked}


def _read_prompts(path: Path) -> list[dict[str, Any]]:
    """Rows with a prompt or a question. Raises DataError with file and line for what cannot be used."""
    from utils.corpus.tables import ProblemList, iter_rows
    from utils.exceptions import DataError, Problem

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


def _answer_file(
    config: Config, model: Any, tokenizer: Any, examples: list[dict[str, Any]], system_prompt: str, parents: list[Any]
) -> dict[str, Any]:
    from utils import chat, files, generation
    from utils.progress import Progress

    with Progress("answers", total=len(examples), unit="prompt") as bar:
        texts = generation.answer_all(model, tokenizer, examples, system_prompt, config.inference, bar.advance)
    rows = [
        {"id": example["id"], "prompt": example["question"], "answer": chat.spoken(text)}
        for example, text in zip(examples, texts, strict=True)
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if config.inference.output_file:
        files.write_text(Path(config.inference.output_file), lines + "\n")
    else:
        print(lines)
    return {
        "answered": len(rows),
        "output_file": config.inference.output_file or None,
        "adapters": [str(p.directory) for p in parents],
    }


def _merge(config: Config, base: Any, factors: Any, parents: list[Any]) -> dict[str, Any]:
    from utils import cards, merging, runs
    from utils.exceptions import ConfigError, Problem
    from utils.logger import event

    if factors is None:
        raise ConfigError(Problem("--merge_path with --adapters none would copy the base", fix="leave out --adapters"))
    target = Path(config.inference.merge_path)
    identity = {
        "stage": "merged",
        "base": base.digest,
        "adapters": [p.digest for p in parents],
        "weights": list(config.compose.weights),
        "dtype": config.inference.merge_dtype,
    }

    def manifest(checks: dict[str, Any]) -> dict[str, Any]:
        return runs.manifest("merged", identity, base=base.record(), parents=parents, measured=checks)

    card = cards.merged_card(base, parents, config.compose.weights)
    checks = merging.merge(base, factors, target, config, manifest, card)
    event("merged model written", path=target)
    return {"merged": str(target), "adapters": [str(p.directory) for p in parents], **checks}


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    a_d, a_t = config.compose.weights
    steps = [f"load {config.base.source} and compose {config.inference.adapters}: W + {a_d:g} D + {a_t:g} T"]
    if config.inference.merge_path:
        return [*steps, f"write the merged model to {config.inference.merge_path}, reload it and compare its logits"]
    return [*steps, "answer the prompt" if config.inference.prompt else "answer the prompts"]


if __name__ == "__main__":
    cli.run(main, plan, sections=SECTIONS, description=__doc__)
