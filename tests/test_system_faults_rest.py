"""Faults beside those of the other files: folders that are read-only, long runs, special tokens.

Long ones are asked for (`make fault-test`); each has a sample here or in the files of its subject.
"""

from __future__ import annotations

import json
import shutil
import time
import unittest
from pathlib import Path

from tests.fault_support import (
    LONG,
    Place,
    obey_permissions,
    with_both_adapters,
)
from tests.support import last_json, temporary_directory, write_jsonl
from utils.artifacts import files
from utils.models import chat

SMALL = ("--benchmark.repeats", "2", "--benchmark.prompt_tokens", "32", "--benchmark.new_tokens", "4")
SPECIAL = ("[e~[", "]~b]ai", "]~!b[", "]~b]system", "<|im_end|>", "<s>", "<|endoftext|>")


@unittest.skipUnless(LONG, "kills and long runs: make fault-test")
class ReadOnly(unittest.TestCase):
    def test_a_models_folder_that_others_own_is_read_by_what_reads_and_refused_by_what_writes(self) -> None:
        place, shared = with_both_adapters(), Place.__new__(Place)
        shared.root = temporary_directory()
        shared.data, shared.models, shared.scripts = shared.root / "data", shared.root / "models", []
        shared.corpus, shared.task = place.corpus, place.task
        shutil.copytree(place.models, shared.models)
        shutil.copytree(place.data, shared.data)
        composed = last_json(shared.run("compose"))["composed"]
        everything = [shared.root, *shared.root.rglob("*")]
        for path in everything:
            path.chmod(path.stat().st_mode & 0o555)
        for path in everything:
            self.addCleanup(path.chmod, 0o755)
        before = {path: path.stat().st_mtime_ns for path in everything}
        for command, code in (
            (["verify", composed], 0),
            (["plan"], 0),
            (["rollout", "status"], 0),
            (["compose", "--weights", "0.5,0.5"], 2),
            (["benchmark", "--run.name", "b", *SMALL], 2),
            (["evaluate", "--run.name", "e"], 2),
            (["train_task_adapter", "--run.name", "t"], 2),
            (["prepare_data", *shared.sources, "--run.name", "p"], 2),
            (["inference", "--merge_path", str(shared.root / "merged")], 2),
            (["rollout", "start", "--rollout.production", "http://h:1", "--rollout.candidate", "http://h:2"], 2),
        ):
            with self.subTest(command):
                done = shared.start(*command, before=obey_permissions).wait()
                self.assertEqual(done.returncode, code, done.stderr[-1500:])
                self.assertNotIn("Traceback", done.stderr)
                if code:
                    self.assertRegex(done.stderr, "Permission denied|no golden prompts")
                self.assertEqual({p: p.stat().st_mtime_ns for p in [shared.root, *shared.root.rglob("*")]}, before)


@unittest.skipUnless(LONG, "kills and long runs: make fault-test")
class LongRun(unittest.TestCase):
    def test_memory_and_descriptors_of_a_long_training_do_not_grow(self) -> None:
        place = with_both_adapters()
        flags = [
            "--domain.train.epochs",
            "60",
            "--domain.train.batch_tokens",
            "256",
            "--domain.train.save_every_steps",
            "10",
        ]
        script = place.start("train_domain_adapter", "--run.name", "long", *flags)
        seen: list[tuple[int, int]] = []

        def look() -> bool:
            try:
                pages = int(Path(f"/proc/{script.process.pid}/statm").read_text().split()[1])
                seen.append((pages * 4096, len(list(Path(f"/proc/{script.process.pid}/fd").iterdir()))))
            except OSError:
                return True
            time.sleep(0.25)
            return False

        script.wait_until(look)
        last_json(script.wait())
        steps = len((place.run_of("long") / "metrics.jsonl").read_text().splitlines())
        early, late = seen[len(seen) // 4], seen[-2]
        print(f"{steps} lines of metrics, {early[0] >> 20} -> {late[0] >> 20} MiB, {early[1]} -> {late[1]} descriptors")
        self.assertGreater(steps, 300)
        self.assertLess(late[0], early[0] * 1.1)
        self.assertLessEqual(late[1], early[1] + 2)


@unittest.skipUnless(LONG, "kills and long runs: make fault-test")
class SpecialTokens(unittest.TestCase):
    def test_special_tokens_in_labelled_pairs_are_text_from_the_file_to_the_answer(self) -> None:
        place = with_both_adapters()
        rows = [json.loads(line) for line in place.task.read_text().splitlines()]
        for number, row in enumerate(rows):
            mark = SPECIAL[number % len(SPECIAL)]
            row["question"] = f"{mark} What does f{number} {mark} do?{mark}"
            row["answer"] = f"it {mark} returns {number}"
            row["choices"] = [row["answer"], f"it raises {mark}", "it prints"]
        pairs = write_jsonl(place.root / "special.jsonl", rows)
        flags = ["--data.corpus", str(place.corpus), "--data.task", str(pairs), "--run.name", "special"]
        data = Path(last_json(place.run("prepare_data", *flags))["run"])
        tokenizer = chat.load_tokenizer(place.models / "base" / "tiny-minimax-m2")
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        plain = [i for i in chat.prompt_ids(tokenizer, {"question": "Why?"}, "Be brief.") if i in special]
        kept = [json.loads(line) for path in data.glob("task_*.jsonl") for line in path.read_text().splitlines()]
        self.assertEqual(len(kept), len(rows))
        for row in kept:
            said = (row.get("answers") or [row.get("answer")])[0]
            prompt, answer = chat.prompt_ids(tokenizer, row, "Be brief."), chat.answer_ids(tokenizer, said)
            self.assertEqual([i for i in prompt if i in special], plain, row["question"])
            self.assertEqual(answer.count(tokenizer.eos_token_id), 1, said)
        trained = last_json(place.run("train_task_adapter", "--run.name", "special", "--inputs.prepared", str(data)))
        for mark in SPECIAL:
            asked = place.run("inference", "--prompt", f"{mark} What does f1 do? {mark}")
            self.assertEqual(asked.returncode, 0, asked.stderr[-1000:])
        files.verify(Path(trained["run"]))


if __name__ == "__main__":
    unittest.main()
