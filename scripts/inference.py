"""Answer questions with base + both adapters composed exactly, or write them as one standalone model.

Reads the newest composed run, or composes the newest task run and the domain run it belongs to; writes nothing, or
--output_file, or --merge_path.

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

SECTIONS = ("inference", "merge", "compose", "inputs", "hub", "base", "run")
MOST_USED = (
    "inference.prompt",
    "inference.prompts_file",
    "inference.output_file",
    "inference.adapters",
    "merge.path",
    "compose.weights",
)


def main(config: Config) -> dict[str, Any]:
    """Compose, then merge or answer."""
    from utils.adapters import inference_layers
    from utils.artifacts import files
    from utils.composition import composed_adapter
    from utils.exceptions import ConfigError, Problem
    from utils.export import gguf, hub, merge
    from utils.logger import warning
    from utils.models import chat, loading
    from utils.planning import preflight

    wanted, which, merge_path = config.inference, config.inference.adapters, config.merge.path
    interactive = sys.stdin.isatty() and not (wanted.prompt or wanted.prompts_file or merge_path)
    if not (wanted.prompt or wanted.prompts_file or merge_path or interactive):
        raise ConfigError(
            Problem("nothing to answer", fix='give --prompt "...", --prompts_file FILE or --merge_path DIR')
        )
    if merge_path and which == "none":
        raise ConfigError(Problem("--merge_path with --adapters none would copy the base", fix="leave out --adapters"))
    if config.hub.push_to_hub and not merge_path:
        raise ConfigError(Problem("--push_to_hub uploads a merged model here", fix="add --merge_path DIR"))
    if merge_path:
        if not (Path(merge_path) / files.MANIFEST).exists():  # a complete one may be the same, see below
            merge.refuse_target(Path(merge_path))
        hub.check(config.hub)
        if config.merge.gguf:
            gguf.check(Path(merge_path), config.merge.gguf)
    examples = _read_prompts(Path(wanted.prompts_file)) if wanted.prompts_file else []
    if wanted.output_file:
        files.make_directory(Path(wanted.output_file).parent)
    base = preflight.start(config, loads_model=not merge_path)
    found = composed_adapter.composition(config, base, which) if which != "none" else None
    if found:
        composed_adapter.say(found)
        if which == "task" and found.runs[0].manifest["identity"]["on"] == "domain":
            warning("this task adapter was trained on its domain adapter; alone it is not the task baseline")
    if merge_path:
        return _merge(config, base, found)
    system_prompt = (found.runs[:2][-1].manifest if found else {}).get("system_prompt", config.task.system_prompt)
    tokenizer = chat.load_tokenizer(base.directory)
    model = loading.load_model(base, config.base)
    if found:
        model = inference_layers.attach(model, {"composed": found.factors})
    adapters = [str(run.directory) for run in found.runs] if found else []
    if examples:
        return _answer_file(config, model, tokenizer, examples, system_prompt) | {"adapters": adapters}
    answer = _streaming(config, model, tokenizer, system_prompt)
    if interactive:
        return _interactive(answer)
    return {"prompt": wanted.prompt, **answer(wanted.prompt), "adapters": adapters}


def _streaming(config: Config, model: Any, tokenizer: Any, system_prompt: str) -> Callable[[str], dict[str, str]]:
    """Answers as they are made: the answer to stdout, what stands in the template's think block to stderr."""
    from utils.inference import generation
    from utils.logger import warning
    from utils.models import chat

    def answer(question: str) -> dict[str, str]:
        ids = chat.prompt_ids(tokenizer, {"question": question}, system_prompt)
        parting = generation.Parting(
            lambda text: print(text, end="", flush=True, file=sys.stderr),
            lambda text: print(text, end="", flush=True),
            opened=chat.opens_thinking(tokenizer),
        )
        (given,) = generation.answer(
            model,
            tokenizer,
            [ids],
            max_new_tokens=config.inference.max_new_tokens,
            temperature=config.inference.temperature,
            top_p=config.inference.top_p,
            stream=parting,
        )
        parting.end()
        print(flush=True)
        if given.opened:
            print(file=sys.stderr)
            if not given.ended and not given.spoken:
                tokens = config.inference.max_new_tokens
                warning("cut while still thinking: raise --inference.max_new_tokens", max_new_tokens=tokens)
        return _parts(given)

    return answer


def _parts(given: Any) -> dict[str, str]:
    """The answer, and its reasoning where the template has a place for it."""
    return {"answer": given.spoken} | ({"reasoning": given.reasoning} if given.opened else {})


def _interactive(answer: Callable[[str], dict[str, str]]) -> dict[str, Any]:
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
    from utils.data.tables import ProblemList, iter_rows
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
    config: Config, model: Any, tokenizer: Any, examples: list[dict[str, Any]], system_prompt: str
) -> dict[str, Any]:
    from utils.artifacts import files
    from utils.inference import generation
    from utils.progress import Progress

    with Progress("answers", total=len(examples), unit="prompt") as bar:
        answers = generation.answer_all(model, tokenizer, examples, system_prompt, config.inference, bar.advance)
    rows = [
        {"id": example["id"], "prompt": example["question"], **_parts(answer)}
        for example, answer in zip(examples, answers, strict=True)
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if config.inference.output_file:
        files.write_text(Path(config.inference.output_file), lines + "\n")
    else:
        print(lines)
    return {"answered": len(rows), "output_file": config.inference.output_file or None}


def _merge(config: Config, base: Any, found: Any) -> dict[str, Any]:
    """Write the standalone model; then GGUF and the hub, where they were asked for."""
    from utils.adapters import cards
    from utils.artifacts import files, runs
    from utils.composition import composed_adapter
    from utils.evaluation.find_evaluation import evaluation_of
    from utils.export import gguf, hub, merge, model_index
    from utils.logger import event

    target, settings = Path(config.merge.path), config.merge
    composed_adapter.refuse_inside(target, base, found.runs)
    parents = [*found.runs, *([found.run] if found.run else [])]
    composition = composed_adapter.record(found)
    identity = {
        "stage": "merged",
        "base": base.digest,
        "adapters": [run.digest for run in found.runs],
        "recipe": composition["recipe"],
        "dtype": settings.dtype,
    }

    def manifest(checks: dict[str, Any]) -> dict[str, Any]:
        facts = {"composition": composition, "seed": config.run.seed}
        return runs.manifest("merged", identity, base=base.record(), parents=parents, measured=checks, **facts)

    card = cards.merged_card(
        base,
        found.runs,
        method=found.recipe.method,
        source=composition["source"],
        weights=found.recipe.weights or (1.0,) * len(found.runs),
        exact=found.check.exact,
        searched=found.searched,
        dtype=settings.dtype,
        check=found.line(),
    )
    evaluation = evaluation_of(config.run.models_dir, base.digest, found.runs, composition["recipe"])
    if evaluation:
        card = model_index.with_evaluation(card, target.name, evaluation)
    fingerprint = files.fingerprint(identity)
    reused = (target / files.MANIFEST).exists() and files.read_manifest(target).get("fingerprint") == fingerprint
    if reused:
        checks = files.verify(target)["measured"]
        event("this merged model is already complete", path=target)
    else:
        checks = merge.merge(
            base, found.factors, target, settings, config.base, fingerprint=fingerprint, manifest=manifest, card=card
        )
        event("merged model written", path=target)
    adapters = [str(run.directory) for run in found.runs]
    result = {"merged": str(target), "adapters": adapters, "reused": reused, **checks}
    if settings.gguf:
        converted = gguf.convert(target, settings.gguf)
        result["gguf"] = str(converted) if converted else None
    if config.hub.push_to_hub:
        result["url"] = hub.push(target, config.hub, message="Merged model", evaluation=evaluation)
    return result


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    from utils.composition import methods
    from utils.planning import dry_run

    which, how = config.inference.adapters, "as the newest composed run of them does, else by sum with weights of 1"
    if methods.asks_for_itself(config.compose) or which != "both":
        recipe = methods.recipe_of(config.compose, config.run.seed)
        how = f"by {recipe.method} with weights {recipe.weights or 'of 1'}"
    steps = [
        *dry_run.lines(config, "inference"),
        f"load {config.base.source} and compose {which} {how}",
    ]
    if config.merge.path:
        written = f"write the merged model to {config.merge.path} shard by shard ({config.merge.dtype})"
        return [*steps, written, "reload it in a fresh process and compare its logits before it appears there"]
    return [*steps, "answer the prompt" if config.inference.prompt else "answer the prompts"]


if __name__ == "__main__":
    cli.run(main, plan, sections=SECTIONS, most_used=MOST_USED, description=__doc__)
