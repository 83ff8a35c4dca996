"""The tasks for lm-evaluation-harness: what they condition on, what they compute, and that preparing data writes them.

Whether lm-eval itself gives our numbers with them is in test_evaluation_references.py.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from tests.support import Workspace, last_json, plain_tokenizer, temporary_directory
from utils.artifacts import files
from utils.data.example_formats import to_common
from utils.evaluation.lm_eval import lm_eval_functions, lm_eval_tasks
from utils.inference import scoring
from utils.models import chat
from utils.models.architectures import toy

SYSTEM = "Answer: briefly,\nand 'correctly'."


class _Loader(yaml.SafeLoader):
    """Reads `!function x.y` as "x.y"."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def example(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "document": f"d-{name}", **to_common({"question": f"What is {name}?", **fields})[1]}


EXAMPLES = [
    example("plain", answers=["one", "1"]),
    example("chosen", choices=["red", "green", "blue"], answer_index=1),
    example("long", answers=["short"], context="word " * 300),
    example("too long", answers=["word " * 300]),
]


def written(examples: list[dict[str, Any]] = EXAMPLES, tokenizer: Any = None) -> tuple[Path, dict[str, Any]]:
    directory = temporary_directory() / "lm_eval"
    counts = lm_eval_tasks.write(
        directory, examples, tokenizer or toy.tiny_tokenizer(), SYSTEM, max_tokens=200, max_new_tokens=9
    )
    return directory, counts


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def loaded(directory: Path) -> ModuleType:
    """functions.py as lm-eval loads it: by its path."""
    spec = importlib.util.spec_from_file_location("functions", directory / "functions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Tasks(unittest.TestCase):
    def test_context_and_candidate_together_are_the_tokens_that_the_evaluation_scores(self) -> None:
        tokenizer = toy.tiny_tokenizer()
        directory, counts = written()
        items, left_out = scoring.questions(EXAMPLES, tokenizer, SYSTEM, 200)
        found = rows(directory / "answers.jsonl")
        self.assertEqual([row["id"] for row in found], ["plain", "chosen", "long"])
        self.assertEqual((counts["items"], counts["left_out"], left_out), (3, 1, ["too long"]))
        for row, item in zip(found, items, strict=True):
            text = row["context"] + row["candidates"][0]
            expected = tokenizer.decode([*item.prompt, *item.candidates[0][:-1]], skip_special_tokens=False)
            self.assertEqual(text, expected)
            self.assertEqual(row["context"], row["context"].rstrip(), "lm-eval would move it to the candidates")
            self.assertEqual(row["candidates"][1], "\n\n")
            self.assertEqual(row["tokens"], [len(item.candidates[0]) - item.skip - 1])
            self.assertEqual(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"], list(item.prompt))
        self.assertIn(SYSTEM, found[0]["prompt"])
        self.assertLess(found[2]["prompt"].count("word"), 300)

    def test_choices_are_those_of_the_item_in_their_order_with_their_own_lengths(self) -> None:
        (row,) = rows(written()[0] / "choices.jsonl")
        self.assertEqual(row["candidates"], ["\n\nred", "\n\ngreen", "\n\nblue", "\n\n"])
        lengths = [len(chat.answer_ids(toy.tiny_tokenizer(), c)) for c in ("red", "green", "blue")]
        skip = chat.answer_offset(toy.tiny_tokenizer())
        self.assertEqual((row["tokens"], row["answer_index"]), ([n - skip - 1 for n in lengths], 1))

    def test_every_task_names_files_and_functions_that_are_there(self) -> None:
        directory, _ = written()
        module = loaded(directory)
        tasks = {path.stem: yaml.load(path.read_text(), _Loader) for path in directory.glob("*.yaml")}
        self.assertEqual(set(tasks), {"dta_answers", "dta_choices", "dta_generated"})
        for name, task in tasks.items():
            self.assertEqual((task["task"], task["tag"], task["num_fewshot"]), (name, "dta", 0))
            named = [task["custom_dataset"], task["process_results"], *(m["aggregation"] for m in task["metric_list"])]
            for function in named:
                self.assertTrue(function == "mean" or callable(getattr(module, function.removeprefix("functions."))))
            data = module.pairs(**task["dataset_kwargs"], pretrained="x")["test"]
            for field in ("doc_to_text", "doc_to_choice"):
                self.assertIn(task.get(field, "id"), data.column_names)
        generation = tasks["dta_generated"]["generation_kwargs"]
        self.assertEqual(generation, {"until": ["[e~["], "max_gen_toks": 9, "do_sample": False})

    def test_without_choices_there_is_no_choice_task_and_a_moved_directory_still_works(self) -> None:
        directory, _ = written(EXAMPLES[:1])
        self.assertFalse(list(directory.glob("*choices*")))
        moved = temporary_directory() / "elsewhere"
        shutil.move(directory, moved)
        module = loaded(moved)
        self.assertEqual(module.pairs(jsonl="answers.jsonl")["test"]["id"][:], ["plain"])
        row = {"answers": ["the Cat sat", "dog"]}
        self.assertEqual(module.generated_results(row, ["x</think>\n cat sat."]), {"exact_match": 1.0, "token_f1": 1.0})

    def test_items_that_lm_eval_tokenises_otherwise_are_counted(self) -> None:
        tokenizer = plain_tokenizer()
        merged = {**EXAMPLES[0], "id": "merged", "answers": ["\n x"]}
        self.assertLess(len(tokenizer("\n\n")["input_ids"]), 2, "the template's newline and the answer's are one token")
        for examples, expected in ((EXAMPLES[:3], 0), ([*EXAMPLES[:3], merged], 1)):
            directory, counts = written(examples, tokenizer=tokenizer)
            self.assertEqual(counts["tokenised_otherwise"], expected)
        self.assertEqual(rows(directory / "answers.jsonl")[0]["candidates"], ["\none", "\n"])


class Functions(unittest.TestCase):
    def test_likelihood_of_white_space_is_no_part_of_the_answer(self) -> None:
        found = lm_eval_functions.answer_results({"tokens": [4]}, [(-9.0, False), (-1.5, True)])
        self.assertEqual(found, {"answer_nll": (7.5, 4)})
        self.assertEqual(lm_eval_functions.answer_results({"tokens": [4]}, [(-9.0, False)]), {"answer_nll": (9.0, 4)})
        self.assertEqual(lm_eval_functions.per_token([(7.5, 4), (2.5, 1)]), 2.0)

    def test_choices_are_compared_by_sum_and_per_token_without_white_space(self) -> None:
        row = {"tokens": [1, 4], "answer_index": 0}
        # sums 3 and 6, per token 3 and 1.5; with the white space's 6 per token they would be 9 and 3
        found = lm_eval_functions.choice_results(row, [(-9.0, False), (-12.0, False), (-6.0, False)])
        self.assertEqual(found, {"choice_accuracy": 1.0, "choice_accuracy_per_token": 0.0})
        # with white space 7 against 8 / 2, without it 1 against 2 / 2: a tie goes to the first, as in our evaluation
        row = {"tokens": [1, 2], "answer_index": 0}
        found = lm_eval_functions.choice_results(row, [(-7.0, False), (-8.0, False), (-6.0, False)])
        self.assertEqual(found, {"choice_accuracy": 1.0, "choice_accuracy_per_token": 1.0})
        self.assertEqual(lm_eval_functions.choice_results(row, [(-2.0, False), (-1.0, False)])["choice_accuracy"], 0.0)


class Prepared(unittest.TestCase):
    def test_preparing_data_writes_the_tasks_and_the_manifest_covers_them(self) -> None:
        place = Workspace()
        done = place.prepare()
        directory = Path(done["run"])
        names = {n for n in files.verify(directory)["files"] if n.startswith("lm_eval/")}
        expected = {"answers.jsonl", "choices.jsonl", "functions.py", "answers.py"}
        tasks = {f"dta_{name}.yaml" for name in ("answers", "choices", "generated", "documents")}
        self.assertEqual(names, {f"lm_eval/{name}" for name in expected | tasks})
        self.assertEqual(done["lm_eval"]["items"], done["examples"]["test"]["examples"])
        task = yaml.load((directory / "lm_eval" / "dta_documents.yaml").read_text(), _Loader)
        data = loaded(directory / "lm_eval").documents(**task["dataset_kwargs"])["test"]
        self.assertEqual(len(data), done["documents"]["heldout_documents"]["documents"])
        tokenizer = toy.tiny_tokenizer()
        for row in data:
            ids = tokenizer(row["target"], add_special_tokens=False)["input_ids"]
            self.assertEqual((len(ids), ids[-1]), (row["tokens"], tokenizer.eos_token_id))
        self.assertTrue(math.isclose(sum(data["tokens"]), sum(data["num_tokens"]) - len(data)))
        # another system prompt does not make other data, but it is told that the tasks have the old one
        again = place.run("prepare_data", *place.sources, "--task.system_prompt", "Other.")
        self.assertTrue(last_json(again)["reused"])
        self.assertIn("another system prompt", again.stderr)
        self.assertNotIn("another system prompt", place.run("prepare_data", *place.sources).stderr)

    def test_data_without_pairs_has_no_tasks(self) -> None:
        place = Workspace()
        done = last_json(place.run("prepare_data", "--data.corpus", str(place.corpus), "--data.task", "none"))
        self.assertFalse((Path(done["run"]) / "lm_eval").exists())


if __name__ == "__main__":
    unittest.main()
