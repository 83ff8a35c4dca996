"""Every script under every launch file: the numbers of one process, one stdout, one line of JSON, one exit code.

`make launch-test` runs the whole table of docs/multi_gpu.md; without LAUNCH_TESTS=all one cell for each script is run.
"""

from __future__ import annotations

import functools
import json
import os
import unittest
from pathlib import Path
from typing import Any

from tests.fault_support import Unchecked, contents
from tests.launch_support import EXPERTS, WAYS, different, launch, read, result
from tests.support import Workspace, last_json, plain_tokenizer, relative, saved_model, write_jsonl
from utils.adapters import adapter_files

ALL = os.environ.get("LAUNCH_TESTS") == "all"
# one cell for each script where not all are asked for
SAMPLE: dict[str, tuple[str, ...]] = {
    "inference": ("sharded",),
    "prompt": (),
    "evaluate": ("whole", "experts"),
    "compose": ("sharded",),
    "merge": ("whole",),
    "benchmark": ("whole",),
    "prepare_data": ("whole",),
    "train_task_adapter": ("hybrid", "experts"),
}
LAUNCHED = tuple(way for way in WAYS if way != "python")
SHARDED = ("sharded", "hybrid", *EXPERTS)
TASK = ("--task.lora.experts=true", "--task.train.max_steps=2", "--task.train.micro_batch_tokens=128")
EVALUATE = ("--evaluate.max_heldout_documents=4", "--evaluate.batch_tokens=400", "--evaluate.generated_answers=6")
COMPOSE = ("--compose.search", "--compose.max_dev_items=6", "--compose.search_methods=sum")


def ways(script: str) -> tuple[str, ...]:
    return LAUNCHED if ALL else SAMPLE[script]


class LaunchPlace(Workspace):
    """A workspace with trained adapters on a toy whose answers are text, and what one process made of them."""

    domain_run: dict[str, Any]
    task_run: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.base = self.root / "base"
        saved_model("minimax_m2", self.base)
        plain_tokenizer().save_pretrained(self.base)

    @property
    def flags(self) -> list[str]:
        return [*super().flags, f"--base.source={self.base}"]


@functools.cache
def place() -> LaunchPlace:
    made = LaunchPlace()
    made.prepare()
    made.domain_run = last_json(made.run("train_domain_adapter", "--domain.train.max_steps=2"))
    made.task_run = last_json(made.run("train_task_adapter", *TASK))
    return made


def pinned() -> list[str]:
    """The adapters of the place, whatever a test trained or composed since."""
    return [f"--domain_adapter={place().domain_run['run']}", f"--task_adapter={place().task_run['run']}"]


class SameAsOneProcess(unittest.TestCase):
    def test_answers_to_a_file_of_prompts(self) -> None:
        prompts = [{"prompt": f"What does f{number} do?" + " please" * number} for number in range(20)]
        asked = write_jsonl(place().root / "prompts.jsonl", prompts)

        def answers(way: str) -> Any:
            out = place().root / f"answers_{way}.jsonl"
            done = launch(place(), way, "inference", *pinned(), f"--prompts_file={asked}", f"--output_file={out}")
            self.assertEqual(result(done)["answered"], len(prompts))
            return out.read_text(encoding="utf-8")

        expected = answers("python")
        self.assertGreater(len(set(expected.splitlines())), 15)
        for way in ways("inference"):
            with self.subTest(way):
                self.assertEqual(answers(way), expected)

    def test_a_prompt_is_answered_once(self) -> None:
        if not ways("prompt"):
            self.skipTest("LAUNCH_TESTS=all")
        expected = launch(place(), "python", "inference", *pinned(), "--prompt", "What does f3 do?")[0].stdout
        self.assertTrue(read_answer(expected))
        for way in ways("prompt"):
            with self.subTest(way):
                ended = launch(place(), way, "inference", *pinned(), "--prompt", "What does f3 do?")
                result(ended)
                self.assertEqual(ended[0].stdout, expected)

    def test_scores_and_answers_of_an_evaluation(self) -> None:
        def cells(way: str) -> dict[str, Any]:
            done = result(launch(place(), way, "evaluate", "--run.name", way, *pinned(), *EVALUATE))
            return {path.name: read(path) for path in Path(done["run"]).glob("cell_*.json")}

        expected = cells("python")
        self.assertGreaterEqual(len(expected), 3)
        for way in ways("evaluate"):
            with self.subTest(way):
                self.assertEqual(different(cells(way), expected), [])

    def test_a_weight_search_and_what_explains_it(self) -> None:
        def found(way: str) -> Any:
            run = Path(result(launch(place(), way, "compose", "--run.name", way, *pinned(), *COMPOSE))["composed"])
            return {name: read(run / name) for name in ("search.json", "interference.json")}

        expected = found("python")
        for way in ways("compose"):
            with self.subTest(way):
                self.assertEqual(different(found(way), expected, 1e-4), [])

    def test_a_merge_writes_the_same_files(self) -> None:
        def written(way: str) -> dict[str, str]:
            target = place().root / f"merged_{way}"
            ranks = range(WAYS[way][1])
            result(
                launch(
                    place(),
                    way,
                    "inference",
                    *pinned(),
                    f"--merge_path={target}",
                    before=dict.fromkeys(ranks, Unchecked()),
                )
            )
            return contents(target, "README.md")

        expected = written("python")
        for way in ways("merge"):
            with self.subTest(way):
                self.assertEqual(written(way), expected)

    def test_prepared_data_is_the_same(self) -> None:
        def digest(way: str) -> str:
            return result(launch(place(), way, "prepare_data", "--run.name", f"again-{way}", *place().sources))[
                "digest"
            ]

        expected = digest("python")
        for way in ways("prepare_data"):
            with self.subTest(way):
                self.assertEqual(digest(way), expected)

    def test_an_adapter_on_attention_and_experts_is_trained_to_the_same(self) -> None:
        for way in ways("train_task_adapter"):
            with self.subTest(way):
                done = result(launch(place(), way, "train_task_adapter", "--run.name", f"trained-{way}", *TASK))
                self.assertEqual(done["steps"], place().task_run["steps"])
                found, expected = (adapter_files.load(Path(run["adapter"])) for run in (done, place().task_run))
                self.assertEqual(found.keys(), expected.keys())
                for name, factors in expected.items():
                    self.assertLess(relative(found[name].a_rI, factors.a_rI), 1e-3, name)
                    self.assertLess(relative(found[name].b_Or, factors.b_Or), 1e-3, name)
                ranks = read(Path(done["run"]) / "manifest.json").get("ranks", {"layout": {}})
                self.assertEqual(len(ranks.get("bytes_read_by_rank", [])), WAYS[way][1] if way in SHARDED else 0)

    def test_a_benchmark_is_one_report(self) -> None:
        for way in ways("benchmark"):
            with self.subTest(way):
                found = result(launch(place(), way, "benchmark", "--run.name", way, *pinned()))
                models = read(Path(found["report"]) / "results.json")["inference"]["cells"][0]["models"]
                self.assertEqual(set(models), {"base", "two active", "composed", "merged"})


def read_answer(stdout: str) -> str:
    return str(json.loads(stdout.splitlines()[-1])["answer"])


if __name__ == "__main__":
    unittest.main()
