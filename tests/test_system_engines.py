"""evaluate and inference through an engine, as a person starts them, with the stub as vLLM (toy MiniMax-M2)."""

from __future__ import annotations

import json
import os
import signal
import unittest
from pathlib import Path
from typing import Any

from tests import launch_support
from tests.engine_support import left_in, owned_by, stub_python, until
from tests.fault_support import At
from tests.support import SECRETS, Script, Workspace, last_json, write_jsonl
from utils.artifacts import files
from utils.evaluation.served_rows import ANSWERS

QUESTIONS = 12


def killed_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Engines(unittest.TestCase):
    """One workspace; each test leaves neither a process nor a folder of an engine."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.place = Workspace()
        cls.place.prepare()
        # a task adapter on the base is its own baseline: one training fewer
        for stage in ("domain", "task"):
            train = (f"--{stage}.train.max_steps", "2", "--task.on", "base")
            last_json(cls.place.run(f"train_{stage}_adapter", *train))
        rows = [{"id": number, "question": f"What does f{number} do?"} for number in range(QUESTIONS)]
        cls.prompts = write_jsonl(cls.place.root / "prompts.jsonl", rows)
        cls.vllm = ["--inference.engine", "vllm", "--inference.engine_python", str(stub_python())]

    def tearDown(self) -> None:
        until(lambda: not owned_by(self.place.models), "a server is left")
        self.assertEqual(left_in(self.place.models), [])

    def start(self, name: str, *flags: str, **faults: Any) -> Script:
        environment = {**SECRETS, "ENGINE_STUB": json.dumps(faults)}
        return self.place.start(name, *self.vllm, "--task.on", "base", *flags, env=environment)

    def inference(self, target: Path, **faults: Any) -> Script:
        return self.start("inference", "--prompts_file", str(self.prompts), "--output_file", str(target), **faults)

    def test_evaluation_goes_on_where_its_server_died_and_its_rows_differ(self) -> None:
        flags = ("--evaluate.generated_answers", "4")
        died = self.start("evaluate", *flags, die_after=9).wait()
        self.assertEqual(died.returncode, 2, died.stderr[-2000:])
        self.assertIn("ended while it was asked", died.stderr)
        self.assertNotIn("Traceback", died.stderr)
        (directory,) = (path for path in (self.place.models / "evaluation").iterdir() if path.is_dir())
        kept = (directory / ANSWERS).read_text().splitlines()
        self.assertGreaterEqual(len(kept), 4)
        cells = {path.name: path.stat().st_mtime_ns for path in directory.glob("cell_*.json")}
        done = last_json(again := self.start("evaluate", *flags).wait())
        self.assertIn("on disk already", again.stderr)
        self.assertEqual(Path(done["run"]), directory)
        self.assertEqual(cells, {path.name: path.stat().st_mtime_ns for path in directory.glob("cell_*.json")})
        lines = (directory / ANSWERS).read_text().splitlines()
        self.assertEqual(lines[: len(kept)], kept)
        results = files.read_json(directory / "results.json")
        for cell, numbers in results["cells"].items():
            self.assertEqual(numbers["format"]["answers"], 4, cell)
            self.assertGreater(numbers["format"]["tokens"], 0)
        shown = [example["said"] for kind in results["examples"].values() for example in kind]
        self.assertTrue(shown and all(set(said) == {"task", "composed"} for said in shown))
        files.verify(directory)

    def test_several_ranks_ask_one_server_and_say_what_one_process_says(self) -> None:
        flags = (*self.vllm, "--task.on", "base", "--evaluate.generated_answers", "3", "--run.name")
        environment = {rank: {**SECRETS, "ENGINE_STUB": "{}"} for rank in range(2)}
        results = {}
        for way in ("python", "whole", "sharded"):
            done = launch_support.result(
                launch_support.launch(self.place, way, "evaluate", *flags, f"asked-{way}", env=environment)
            )
            results[way] = launch_support.read(Path(done["run"]) / "results.json")
        for way in ("whole", "sharded"):
            for part in ("cells", "examples"):
                self.assertEqual(launch_support.different(results["python"][part], results[way][part]), [], way)
        self.assertEqual({numbers["format"]["answers"] for numbers in results["whole"]["cells"].values()}, {3})

    def test_answers_to_a_file_are_gone_on_with_and_nothing_is_left_beside_them(self) -> None:
        target = self.place.root / "answers.jsonl"
        died = self.inference(target, die_after=6).wait()
        self.assertEqual(died.returncode, 2, died.stderr[-2000:])
        self.assertFalse(target.exists())
        (partial,) = target.parent.glob(".answers.jsonl.partial.jsonl")
        done = last_json(self.inference(target).wait())
        self.assertEqual(done["answered"], QUESTIONS)
        rows = [json.loads(line) for line in target.read_text().splitlines()]
        self.assertEqual([row["id"] for row in rows], list(range(QUESTIONS)))
        self.assertFalse(partial.exists())

    def test_answers_of_this_process_to_a_file_are_gone_on_with(self) -> None:
        rows = [{"id": number, "question": "What does it do? " + "word " * number} for number in range(100)]
        asked, target = write_jsonl(self.place.root / "many.jsonl", rows), self.place.root / "local.jsonl"
        flags = ("--task.on", "base", "--inference.max_new_tokens", "8", "--prompts_file", str(asked), "--output_file")
        whole = last_json(self.place.run("inference", *flags, str(self.place.root / "whole.jsonl")))
        for ranks in (1, 2):
            with self.subTest(ranks=ranks):
                way = "python" if ranks == 1 else "whole"
                killed = dict.fromkeys(range(ranks), At("utils.inference.generation.answer", killed_now, 2))
                ended = launch_support.launch(self.place, way, "inference", *flags, str(target), before=killed)
                codes = [done.returncode for done in ended]
                self.assertIn(-signal.SIGKILL, codes)
                # a rank that had not come so far is ended by the launcher
                others = {-signal.SIGKILL, 75} if ranks > 1 else {-signal.SIGKILL}
                self.assertLessEqual(set(codes), others, [done.stderr[-1000:] for done in ended])
                parts = list(target.parent.glob(".local.jsonl.partial.jsonl*"))
                self.assertTrue(1 <= len(parts) <= ranks, parts)
                again = launch_support.launch(self.place, way, "inference", *flags, str(target))
                self.assertEqual(launch_support.result(again)["answered"], whole["answered"])
                self.assertIn("on disk already", again[0].stderr)
                self.assertEqual(target.read_text(), (self.place.root / "whole.jsonl").read_text())
                self.assertEqual(list(target.parent.glob(".local.jsonl.partial.jsonl*")), [])
                target.unlink()

    def test_ctrl_c_and_sigterm_leave_nothing_and_sigkill_leaves_it_to_the_next_start(self) -> None:
        target = self.place.root / "stopped.jsonl"
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, -9)):
            with self.subTest(number):
                script = self.inference(target, hang=600, stubborn_child=True)
                script.wait_until(lambda: len(owned_by(self.place.models)) >= 3)
                script.signal(number)
                done = script.wait()
                self.assertEqual(done.returncode, code, done.stderr[-2000:])
                until(lambda: not owned_by(self.place.models), "the server outlives its command")
                self.assertEqual(bool(left_in(self.place.models)), number == signal.SIGKILL)
        self.assertEqual(last_json(self.inference(target).wait())["answered"], QUESTIONS)


if __name__ == "__main__":
    unittest.main()
