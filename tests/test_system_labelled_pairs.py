"""Labelled pairs through the scripts: one screen says what became of them, and what is trained is what was shown."""

from __future__ import annotations

import json
import math
import unittest
from pathlib import Path
from typing import Any

from tests.support import Workspace, last_json, write_jsonl
from utils.artifacts import files
from utils.data.prepared import Prepared

TOOLS = [{"type": "function", "function": {"name": "read_gauge", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "read_gauge", "arguments": '{"id": "7"}'}}


def said(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def asked(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


class Labelled(unittest.TestCase):
    def setUp(self) -> None:
        self.place = Workspace()

    def prepare(self, rows: list[dict[str, Any]], *flags: str, name: str = "pairs.jsonl") -> tuple[dict[str, Any], str]:
        """(last line, whole screen) of prepare_data on these rows alone."""
        path = write_jsonl(self.place.root / name, rows)
        done = self.place.run("prepare_data", "--data.corpus", "none", "--data.task", str(path), *flags)
        return last_json(done), done.stdout

    def refused(self, rows: list[dict[str, Any]], *flags: str) -> str:
        path = write_jsonl(self.place.root / "refused.jsonl", rows)
        done = self.place.run("prepare_data", "--data.corpus", "none", "--data.task", str(path), *flags)
        self.assertEqual((done.returncode, "Traceback" in done.stderr), (2, False), done.stderr)
        return done.stderr

    def test_columns_that_are_equally_likely_are_asked_about_with_the_flag_filled_in(self) -> None:
        rows = [
            {"frage": f"Was tut {n}?", "question": f"What does {n} do?", "antwort": "A.", "answer": "B."}
            for n in range(20)
        ]
        self.assertIn("--data.columns question=question,answer=answer (or question=frage)", self.refused(rows))
        self.assertEqual(
            self.prepare(rows, "--data.columns", "question=frage,answer=antwort")[0]["examples"]["read"]["train"][
                "examples"
            ],
            20,
        )
        rows = [{"ask": f"Which is {n}?", "group": "valves", "reaction": "Close it."} for n in range(20)]
        self.assertIn("--data.columns question=ask,answer=group (it may be answer=reaction);", self.refused(rows))

    def test_one_screen_and_the_manifest_say_what_became_of_every_column_row_and_turn(self) -> None:
        rows: list[dict[str, Any]] = [
            {"messages": [asked(f"Unit {n}?"), said(f"{n} bar."), asked("And?"), said(f"{n} litres.")], "mood": "fine"}
            for n in range(12)
        ]
        rows += [
            {"messages": [asked("Gauge 7?"), said("I look.", tool_calls=[CALL])], "tools": TOOLS},
            {"messages": [asked("Who?"), said("Go away.", weight=0)]},
            {"messages": [{"role": "user", "content": "<image>"}, said("A pump.")]},
        ]
        result, screen = self.prepare(rows, "--data.show", "2")
        for line in (
            "15 rows, 13 used, as messages",
            "messages   <- messages",
            "tools      <- tools (1 rows)",
            "columns not used: mood (12 rows)",
            "earlier assistant turns: 12 trained, 0 context only",
            "left out 1: marked as not to be trained",
            "left out 1: a picture, sound or film, which a text model cannot read",
        ):
            self.assertIn(line, screen)
        self.assertRegex(screen, r"tokens a turn +median \d+, 95% \d+, longest \d+; rows of 128")
        self.assertRegex(screen, r"memory of a step +\d+\.\d GiB")
        self.assertEqual(screen.count("--- pair"), 2)
        self.assertIn("  | ]~b]ai\n  | <think>\n", screen)
        read = result["examples"]["read"]["train"]
        self.assertEqual((read["columns_not_used"], read["rows"]), ({"mood": 12}, 15))
        self.assertEqual(read["rows"], read["examples"] + sum(read["dropped"].values()))
        manifest = files.read_object(Path(result["run"]) / "manifest.json")
        self.assertEqual(manifest["counts"]["examples"]["read"]["train"], read)
        pairs = [e for split in ("train", "dev", "test") for e in Prepared(Path(result["run"])).examples(split)]
        (calling,) = [pair for pair in pairs if pair.get("tool_calls")]
        self.assertTrue(calling["answers"][0].startswith("I look.\n<minimax:tool_call>\n<invoke name="))
        again = self.place.run(
            "prepare_data", "--data.corpus", "none", "--data.task", str(self.place.root / "pairs.jsonl")
        )
        self.assertTrue(last_json(again)["reused"])
        self.assertEqual(again.stdout.count("--- pair"), 3, "what is shown decides nothing")

    def test_what_the_template_has_no_place_for_is_left_out_by_row_or_refused(self) -> None:
        base = self.place.models / "base" / "tiny-minimax-m2"
        tools = [{"messages": [asked("Gauge?"), said("I look.", tool_calls=[CALL])], "tools": TOOLS}]
        good = [{"messages": [asked(f"Unit {n}?"), said(f"{n} bar.")]} for n in range(9)]
        plain = self.place.root / "plain"
        plain.mkdir()
        for path in base.iterdir():
            if path.name != "manifest.json":
                (plain / path.name).write_bytes(path.read_bytes())
        template = (
            "{%- for m in messages -%}{{- ']~b]' + m.role + '\\n' + m.content + '[e~[\\n' -}}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- ']~b]ai\\n' -}}{%- endif -%}"
        )
        found = [path for path in plain.iterdir() if path.name in ("chat_template.jinja", "tokenizer_config.json")]
        for path in found:
            if path.suffix == ".jinja":
                path.write_text(template)
            elif "chat_template" in (settings := json.loads(path.read_text())):
                path.write_text(json.dumps(settings | {"chat_template": template}))
        result, screen = self.prepare(tools + good, "--base.source", str(plain), "--base.name", "plain")
        self.assertIn("left out 1: not in the prompt that the chat template makes: the tools", screen)
        self.assertEqual(result["examples"]["read"]["train"]["examples"], 9)
        message = self.refused(tools, "--base.source", str(plain), "--base.name", "plain")
        self.assertIn("no labelled pairs left for train; left out: 1 not in the prompt", message)

    def test_too_few_pairs_after_marks_say_what_was_left_out(self) -> None:
        rows = [
            {"messages": [asked(f"q{n}"), said("Go away." if n % 2 else f"a{n}")], "label": not n % 2} for n in range(4)
        ]
        self.assertIn("left out before: 2 marked as a wrong answer", self.refused(rows))
        handbook = [{"question": f"q{n}", "answer": f"a{n}", "document": "handbook"} for n in range(20)]
        self.assertIn("`document`: 'handbook' holds 20 of 20 rows", self.refused(handbook))

    def test_one_handbook_is_split_by_the_headings_that_the_corpus_has(self) -> None:
        parts = [
            f"# Part {n}\n\n" + "\n\n".join(f"Valve {n}{m} is set to {n}{m} bar." for m in range(6)) for n in range(6)
        ]
        (self.place.root / "docs").mkdir()
        (self.place.root / "docs" / "handbook.md").write_text("\n\n".join(parts))
        rows = [
            {"question": f"Valve {n}{m}?", "answer": f"Valve {n}{m} is set to {n}{m} bar.", "document": "handbook.md"}
            for n in range(6)
            for m in range(6)
        ]
        result, screen = self.prepare(rows, "--data.corpus", str(self.place.root / "docs"))
        self.assertIn("divided by 6 headings of the corpus", screen)
        prepared = Prepared(Path(result["run"]))
        split = {name: {e["document"] for e in prepared.examples(name)} for name in ("train", "dev", "test")}
        self.assertEqual(sum(map(len, split.values())), 6)
        self.assertTrue(all(split.values()))
        self.assertEqual(set.union(*split.values()), {f"handbook.md > Part {n}" for n in range(6)})

    def test_thirty_conversations_that_end_alike_are_thirty_pairs(self) -> None:
        thanks = [asked("Thanks!"), said("You're welcome!")]
        rows = [{"messages": [asked(f"Unit {n}?"), said(f"{n} bar."), *thanks]} for n in range(30)]
        result, _ = self.prepare(rows)
        self.assertEqual(sum(result["examples"][split]["examples"] for split in ("train", "dev", "test")), 30)
        self.assertEqual(sum(result["examples"]["dropped"].values()), 0)

    def test_the_row_length_follows_the_data_and_both_trainings_read_it(self) -> None:
        rows = [
            {"question": f"Code of {n}?", "answer": f"K{n:02d}", "context": f"{'pump ' * (40 + 3 * n)} is K{n:02d}."}
            for n in range(40)
        ]
        rows += [{"question": f"Why {n}?", "answer": "word " * 400} for n in range(2)]
        open_length = ["--task.train.max_sequence_tokens", "0", "--domain.train.max_sequence_tokens", "0"]
        corpus = ["--data.corpus", str(self.place.corpus)]
        result, screen = self.prepare(rows, *open_length, *corpus)
        lengths, chosen = result["examples"]["lengths"], result["sequence_tokens"]
        self.assertEqual((lengths["limit"], chosen), (chosen, min(512, max(256, chosen))))
        self.assertEqual(chosen % 64, 0)
        self.assertGreater(lengths["longest"], chosen)
        self.assertIn(f"rows of {chosen}", screen)
        self.assertGreaterEqual(chosen, 64 * math.ceil(lengths["median"] / 64))
        steps = ["--domain.train.max_steps", "1", "--task.train.max_steps", "2"]
        domain = last_json(self.place.run("train_domain_adapter", *open_length, *steps))
        done = self.place.run("train_task_adapter", *open_length, *steps)
        task = last_json(done)
        for run in (domain, task):
            manifest = files.read_object(Path(run["run"]) / "manifest.json")
            self.assertEqual(manifest["identity"]["train"]["sequence_tokens"], chosen)
        self.assertIn("follows the labelled pairs", done.stderr)
        self.assertEqual(
            manifest["data"]["answer_does_not_fit"] + manifest["data"]["usable"], lengths["train"]["turns"]
        )
        self.assertEqual(manifest["data"]["contexts_shortened"], lengths["train"]["contexts_cut"])

    def test_turns_decide_what_is_trained(self) -> None:
        rows = [
            {"messages": [asked(f"Unit {n}?"), said(f"{n} bar."), asked("And?"), said(f"{n} l.")]} for n in range(9)
        ]
        result, _ = self.prepare(rows)
        train = result["examples"]["train"]["examples"]
        found = {}
        for turns in ("all", "last"):
            flags = ("--task.on", "base", "--task.train.max_steps", "1", "--task.turns", turns)
            run = last_json(self.place.run("train_task_adapter", *flags))
            manifest = files.read_object(Path(run["run"]) / "manifest.json")
            found[turns] = (manifest["data"]["usable"], manifest["identity"].get("turns"))
        self.assertEqual(found, {"all": (2 * train, "joined"), "last": (train, "last")})


if __name__ == "__main__":
    unittest.main()
