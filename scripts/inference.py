"""Answer questions with base + both adapters composed exactly, or write them as one standalone model.

Reads the newest composed run of the base model (--composed names another; --domain_adapter and --task_adapter name
adapters instead), or composes the newest task run and its domain run. Writes --output_file or --merge_path if given.

    python scripts/inference.py --prompt "What does json.dumps do?"
    echo "What does json.dumps do?" | python scripts/inference.py
    python scripts/inference.py --prompts_file questions.jsonl --output_file answers.jsonl
    python scripts/inference.py --prompts_file questions.jsonl --output_file answers.jsonl --inference.engine vllm
    python scripts/inference.py --merge_path models/merged_model
    python scripts/inference.py --merge_path models/minimax-m2-bf16 --adapters none --merge.dtype bfloat16
"""

from __future__ import annotations

import sys
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
    "inference.engine",
    "inputs.composed",
    "merge.path",
    "compose.weights",
)


def main(config: Config) -> dict[str, Any]:
    """Compose, then merge or answer."""
    from utils.adapters import adapter_tokenizer, unmeant_base
    from utils.artifacts import files
    from utils.composition import composed_adapter
    from utils.inference import answer_journal, prompts
    from utils.logger import warning
    from utils.models.parallel import ranks
    from utils.planning import preflight

    section, merge_path = config.inference, config.merge.path
    asks_nothing = not (section.prompt or section.prompts_file or merge_path)
    interactive = asks_nothing and sys.stdin.isatty()
    examples = (
        [{"question": text, "context": None, "id": None} for text in prompts.piped()]
        if asks_nothing and not interactive
        else []
    )
    _refuse(config, has_questions=interactive or bool(examples))
    if section.prompts_file:
        examples = prompts.read(Path(section.prompts_file))
    if section.output_file:
        files.make_directory(Path(section.output_file).parent)
    reads = unmeant_base.ADAPTERS if section.adapters != "none" else ()
    base = preflight.start(config, loads_model=not merge_path and section.engine == "local", reads=reads)
    composed = composed_adapter.composition(config, base, section.adapters) if section.adapters != "none" else None
    if composed:
        composed_adapter.say(config, composed)
        if section.adapters == "task" and composed.runs[0].manifest["identity"]["on"] == "domain":
            warning("this task adapter was trained on its domain adapter; alone it is not the task baseline")
        base = adapter_tokenizer.with_chosen(base, composed.runs)
    if merge_path:
        return _merge(config, base, composed)
    system_prompt = (composed.runs[:2][-1].manifest if composed else {}).get("system_prompt", config.task.system_prompt)
    factors, prompt_settings = composed.factors if composed else None, (system_prompt, section)
    adapters = [str(run.directory) for run in composed.runs] if composed else []
    digests = [run.digest for run in composed.runs] if composed else []
    belongs_to = answer_journal.belonging(base.digest, digests, str(composed and composed.recipe))
    if section.engine != "local":
        known = examples or ([{"question": section.prompt}] if section.prompt else [])
        how = {"belongs_to": belongs_to, "models_dir": config.run.models_dir, "seed": config.run.seed}
        with prompts.ServedPrompts.of(base, config.base, factors, *prompt_settings, questions=known, **how) as served:
            return _answered(served, examples, section, adapters, interactive=interactive)
    make = ranks.Held if examples else ranks.undivided
    model = make(prompts.PromptModel, base, config.base, factors, *prompt_settings, belongs_to)
    return _answered(model, examples, section, adapters, interactive=interactive)


def _answered(
    model: Any, examples: list[dict[str, Any]], section: Any, adapters: list[str], *, interactive: bool
) -> dict[str, Any]:
    """Every prompt of a file, a conversation, or one prompt."""
    from utils.inference import prompts

    if examples:
        return prompts.write_answers(examples, model.answer_all(examples), section) | {"adapters": adapters}
    if interactive:
        return prompts.converse(model.answer_one)
    return {"prompt": section.prompt, **model.answer_one(section.prompt), "adapters": adapters}


def _refuse(config: Config, *, has_questions: bool) -> None:
    """Before anything is loaded: a command that asks for nothing or for a contradiction, and a target that is taken."""
    from utils.artifacts import files
    from utils.exceptions import ConfigError, Problem
    from utils.export import gguf, hub, merge

    section, merge_path = config.inference, config.merge.path
    if not (section.prompt or section.prompts_file or merge_path or has_questions):
        raise ConfigError(
            Problem(
                "nothing to answer",
                fix='give --prompt "...", --prompts_file FILE, questions on standard input, or --merge_path DIR',
            )
        )
    if Path(section.output_file).is_file():
        fix = "choose another file, or remove it first"
        raise ConfigError(Problem("--output_file exists; nothing is ever overwritten", section.output_file, fix))
    if config.hub.push_to_hub and section.adapters == "none":
        what = "--adapters none with --merge_path copies the base model, which is not ours to publish"
        raise ConfigError(Problem(what, fix="leave out --push_to_hub"))
    if config.hub.push_to_hub and not merge_path:
        raise ConfigError(Problem("--push_to_hub uploads a merged model here", fix="add --merge_path DIR"))
    if merge_path:
        if not (Path(merge_path) / files.MANIFEST).exists():  # a complete one may be the same: merged_model looks
            merge.refuse_target(Path(merge_path))
        hub.check(config.hub)
        if config.merge.gguf:
            gguf.check(Path(merge_path), config.merge.gguf)


def _merge(config: Config, base: Any, composed: Any) -> dict[str, Any]:
    """The standalone model, or a copy of the base alone; then GGUF and the hub, where they were asked for."""
    from utils.export import gguf, hub, merged_model

    models_dir, seed = config.run.models_dir, config.run.seed
    if composed:
        merged = merged_model.make(base, composed, config.merge, config.base, models_dir=models_dir, seed=seed)
    else:
        merged = merged_model.copy(base, config.merge, config.base, seed=seed)
    adapters = [str(run.directory) for run in composed.runs] if composed else []
    result = {"merged": str(merged.directory), "adapters": adapters, "reused": merged.is_reused, **merged.checks}
    if config.merge.gguf:
        converted = gguf.convert(merged.directory, config.merge.gguf)
        result["gguf"] = str(converted) if converted else None
    if config.hub.push_to_hub:
        result["url"] = hub.push(merged.directory, config.hub, message="Merged model", evaluation=merged.evaluation)
    return result


def plan(config: Config) -> list[str]:
    """What --dry-run prints."""
    from utils.composition import methods
    from utils.planning import dry_run

    which, how = config.inference.adapters, "as the newest composed run does, else by sum with weights of 1"
    if methods.asks_for_itself(config.compose) or which != "both":
        recipe = methods.recipe_of(config.compose, config.run.seed)
        how = f"by {recipe.method} with weights {recipe.weights or 'of 1'}"
    steps = [
        *dry_run.lines(config, "inference"),
        f"load {config.base.source} and compose {which} {how}" if which != "none" else f"take {config.base.source}",
    ]
    if config.merge.path:
        written = f"write the merged model to {config.merge.path} shard by shard ({config.merge.dtype})"
        return [*steps, written, "reload it in a fresh process and compare its logits before it appears there"]
    if (engine := config.inference.engine) != "local":
        steps.append(
            "start vLLM, load the adapter into it, and end it afterwards"
            if engine == "vllm"
            else f"attach to {config.inference.engine_url} and load the adapter into it"
        )
    return [*steps, "answer the prompt" if config.inference.prompt else "answer the prompts"]


if __name__ == "__main__":
    cli.run(main, plan, sections=SECTIONS, most_used=MOST_USED, description=__doc__)
