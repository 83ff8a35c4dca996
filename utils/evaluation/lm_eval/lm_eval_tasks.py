"""The test split as tasks for lm-evaluation-harness: the numbers of `scripts/evaluate.py` from another program.

Writes a directory with rendered prompts, so that a model is conditioned on what our evaluation conditions it on:

    dta_answers.yaml    answer_nll                                    answers.jsonl
    dta_choices.yaml    choice_accuracy, choice_accuracy_per_token    choices.jsonl, where there are choices
    dta_generated.yaml  exact_match, token_f1                         answers.jsonl
    dta_documents.yaml  domain_nll                                    the held-out documents beside the directory
    functions.py, answers.py                                          what the tasks compute

    lm_eval --model hf --model_args pretrained=MERGED,add_bos_token=False --include_path DIRECTORY --tasks dta
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.artifacts import files
from utils.data import answer_metrics
from utils.evaluation.lm_eval import lm_eval_functions
from utils.inference.scoring import Question, questions
from utils.logger import warning
from utils.models import chat, turn_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "lm_eval"
HELDOUT = "heldout_documents"

_TASK = """\
# {what}
# lm_eval --model hf --model_args pretrained=MODEL,add_bos_token=False{arguments} \\
#         --include_path THIS_DIRECTORY --tasks {name} --batch_size 8       (with an adapter: ,peft=ADAPTER)
task: {name}
tag: dta
custom_dataset: !function functions.{loader}
dataset_kwargs: {data}
test_split: test
output_type: {output_type}
{fields}
num_fewshot: 0
process_results: !function functions.{results}
metric_list:
{metrics}
metadata:
  version: 1
"""
_LIKELIHOOD = 'doc_to_text: context\ndoc_to_choice: candidates\ndoc_to_target: 0\ntarget_delimiter: ""'


def write(
    directory: Path,
    examples: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    *,
    max_tokens: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Write the tasks for these test items to `directory`; returns what the manifest says about them.

    Contexts are shortened, and items left out, as the evaluation does with `max_tokens`. lm-eval tokenises prompt and
    answer together and we apart; `tokenised_otherwise` counts the items for which that gives other tokens.
    """
    items, left_out = questions(examples, tokenizer, system_prompt, max_tokens)
    by_name = {str(example["id"]): example for example in examples}
    files.make_directory(directory)
    rows, choice_rows = [], []
    otherwise = 0
    for item in items:
        example = by_name[item.name]
        prompt = _prompt(example, item, tokenizer, system_prompt)
        opened = prompt + chat.answer_opening(tokenizer)
        context = opened.rstrip()
        space = opened[len(context) :]
        gold, choices = example["answers"][0], example.get("choices") or []
        otherwise += _is_tokenised_otherwise(tokenizer, context, space, item, [gold, *choices])
        shared = {"id": item.name, "document": item.document, "context": context}
        tokens = [len(candidate) - item.skip - item.end_tokens for candidate in item.candidates]
        rows.append(
            shared
            | {"prompt": prompt, "answers": example["answers"]}
            | {"candidates": [space + gold, *_alone(space)], "tokens": tokens[:1]}
        )
        if item.answer_index is not None:
            candidates = [*(space + choice for choice in choices), *_alone(space)]
            facts = {"tokens": [tokens[at] for at in item.choice_of], "answer_index": item.answer_index}
            choice_rows.append(shared | {"candidates": candidates} | facts)
    if otherwise:
        warning("lm-eval tokenises prompt and answer together: its numbers will differ a little", items=otherwise)
    _write_rows(directory / "answers.jsonl", rows)
    if choice_rows:
        _write_rows(directory / "choices.jsonl", choice_rows)
    end, stop = str(tokenizer.eos_token), tokenizer.decode(turn_format.end_of_turn(tokenizer))
    has_documents = (directory.parent / HELDOUT).is_dir()
    for name, task in _tasks(
        system_prompt, end, stop, tokenizer.bos_token_id is not None, max_new_tokens, bool(choice_rows), has_documents
    ):
        files.write_text(directory / f"{name}.yaml", task)
    for module, name in ((lm_eval_functions, "functions.py"), (answer_metrics, "answers.py")):
        shutil.copyfile(str(module.__file__), directory / name)
    return {
        "system_prompt": system_prompt,
        "items": len(rows),
        "with_choices": len(choice_rows),
        "left_out": len(left_out),
        "tokenised_otherwise": otherwise,
    }


def is_for(counts: Mapping[str, Any], system_prompt: str) -> bool:
    """Whether the tasks written with prepared data (its manifest's counts) use this system prompt."""
    return counts.get(FOLDER, {}).get("system_prompt") == system_prompt


def _tasks(
    system_prompt: str,
    end: str,
    stop: str,
    has_begin: bool,
    max_new_tokens: int,
    has_choices: bool,
    has_documents: bool,
) -> Iterator[tuple[str, str]]:
    """(name, YAML) of each task; strings are written as JSON, which is YAML."""

    prompt = f". System prompt of every item without its own: {json.dumps(system_prompt)}"

    def task(name: str, what: str, metrics: Mapping[str, str], **fields: str) -> tuple[str, str]:
        lines = [
            f"  - metric: {metric}\n    aggregation: {aggregation}\n"
            f"    higher_is_better: {str(not metric.endswith('_nll')).lower()}"
            for metric, aggregation in metrics.items()
        ]
        shown = {"arguments": "", "loader": "pairs"} | fields
        return name, _TASK.format(name=name, what=what, metrics="\n".join(lines), **shown)

    summed = "!function functions.per_token"
    answer_file, choice_file = (json.dumps({"jsonl": f"{name}.jsonl"}) for name in ("answers", "choices"))
    yield task(
        "dta_answers",
        f"NLL per token of the first gold answer, without its end-of-turn token{prompt}",
        {"answer_nll": summed},
        output_type="multiple_choice",
        data=answer_file,
        fields=_LIKELIHOOD,
        results="answer_results",
    )
    if has_choices:
        yield task(
            "dta_choices",
            f"Accuracy of the likeliest choice, by its sum and per token{prompt}",
            {"choice_accuracy": "mean", "choice_accuracy_per_token": "mean"},
            output_type="multiple_choice",
            data=choice_file,
            fields=_LIKELIHOOD,
            results="choice_results",
        )
    generation = {"until": list(dict.fromkeys([stop, end])), "max_gen_toks": max_new_tokens, "do_sample": False}
    yield task(
        "dta_generated",
        f"Greedy answers against all gold answers, by SQuAD's rules{prompt}",
        {"exact_match": "mean", "token_f1": "mean"},
        output_type="generate_until",
        data=answer_file,
        fields=f"doc_to_text: prompt\ndoc_to_target: answers\ngeneration_kwargs: {json.dumps(generation)}",
        results="generated_results",
    )
    if has_documents:
        yield task(
            "dta_documents",
            "NLL per token of the held-out documents, cut into windows of max_length",
            {"domain_nll": summed},
            loader="documents",
            arguments=",max_length=1024",
            output_type="loglikelihood_rolling",
            data=json.dumps({"folder": f"../{HELDOUT}", "end": end, "first_token_is_given": has_begin}),
            fields='doc_to_text: ""\ndoc_to_target: target',
            results="document_results",
        )


def _prompt(example: dict[str, Any], item: Question, tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> str:
    """The item's prompt as text; one with a shortened context is known by its tokens only."""
    text = chat.prompt_text(tokenizer, example, system_prompt)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if tuple(whole) == item.prompt else tokenizer.decode(list(item.prompt), skip_special_tokens=False)


def _alone(space: str) -> list[str]:
    return [space] if space else []


def _is_tokenised_otherwise(
    tokenizer: PreTrainedTokenizerBase, context: str, space: str, item: Question, texts: Sequence[str]
) -> bool:
    """Whether lm-eval's tokens of context and candidates, each pair in one piece, differ from the item's."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    before = ids(context)
    opened = [*item.prompt, *item.candidates[0][: item.skip]]
    candidates = [item.candidates[0], *(item.candidates[at] for at in item.choice_of)]
    joined = [ids(context + space + text) for text in texts]
    expected = [[*item.prompt, *candidate[: -item.end_tokens]] for candidate in candidates]
    return opened[: len(before)] != before or ids(context + space) != opened or joined != expected


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
