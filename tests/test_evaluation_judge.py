"""The judge, against a real server on this machine: both orders, what it may reply, who labelled, what fails."""

from __future__ import annotations

import http.server
import json
import os
import threading
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from config import EvaluateSection
from tests.support import temporary_directory, write_jsonl
from utils.cli import resolve
from utils.evaluation.metrics import judging
from utils.evaluation.metrics.judging import Judge, LabelledPair
from utils.exceptions import ConfigError, DataError


class Server:
    """Answers as an OpenAI-compatible server does; `reply` makes the judge's text from (answer A, answer B)."""

    def __init__(self, reply: Any, status: int = 200, models: tuple[str, ...] = ("some/judge",)):
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self, value: dict[str, Any]) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.answer({"object": "list", "data": [{"id": name, "object": "model"} for name in models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.keys.append(self.headers.get("Authorization", ""))
                text = body["messages"][-1]["content"]
                a = text.partition("Answer A: ")[2].partition("\n\nAnswer B: ")[0]
                b = text.partition("Answer B: ")[2].partition("\n\nA, B or TIE?")[0]
                message = {"role": "assistant", "content": reply(a, b)}
                self.answer({"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": message}]})

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def longer(a: str, b: str) -> str:
    return "TIE" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


EXAMPLES = [{"id": f"q{i}", "document": f"d{i}", "question": "Who?", "answers": ["the keeper"]} for i in range(12)]


class Judging(unittest.TestCase):
    def server(self, *arguments: Any, **more: Any) -> Server:
        found = Server(*arguments, **more)
        self.addCleanup(found.close)
        return found

    def judged(
        self, server: Server, root: Path | None = None, labels: list[LabelledPair] | None = None
    ) -> dict[str, Any]:
        composed = {e["id"]: "a long answer" if i < 8 else "same" for i, e in enumerate(EXAMPLES)}
        task = {e["id"]: "short" if i < 8 else "same" for i, e in enumerate(EXAMPLES)}
        judge = Judge(server.url, (root or temporary_directory()) / "judge.jsonl")
        return judging.compared(judge, EXAMPLES, task, composed, labels or [], resamples=500, seed=0)

    def test_each_pair_is_shown_in_both_orders_and_equal_answers_are_not_asked_about(self) -> None:
        server = self.server(longer)
        found = self.judged(server)
        self.assertEqual((found["won"], found["lost"], found["tied"], found["swayed"]), (8, 0, 4, 0))
        self.assertEqual(len(server.asked), 16)
        self.assertEqual({(body["model"], body["temperature"]) for body in server.asked}, {("some/judge", 0.0)})
        self.assertAlmostEqual(found["net"]["estimate"], 8 / 12)
        self.assertGreater(found["net"]["low"], 0)
        self.assertIn("Nobody checked it", found["sentence"])

    def test_a_judge_that_likes_the_first_place_wins_nobody_anything(self) -> None:
        found = self.judged(self.server(lambda a, b: "A"))
        self.assertEqual((found["won"], found["lost"], found["swayed"]), (0, 0, 8))
        self.assertEqual(found["net"]["estimate"], 0.0)

    def test_agreement_with_people_stands_beside_it(self) -> None:
        labels = [LabelledPair("Who?", "", "long long", "short", better) for better in ("a", "a", "a", "b", "tie")]
        found = self.judged(self.server(longer), labels=labels)
        self.assertEqual((found["agreed"], found["labels"]), (3, 5))
        share, low, high = found["agreement"]
        self.assertAlmostEqual(share, 0.6)
        # Wilson's interval of 3 of 5
        self.assertAlmostEqual(low, 0.2307, places=3)
        self.assertAlmostEqual(high, 0.8824, places=3)
        self.assertIn("3 of 5 pairs that people labelled", found["sentence"])

    def test_replies_are_read_as_they_come(self) -> None:
        for reply, expected in (
            ("A", "a"),
            ("b", "b"),
            ("**TIE**", "tie"),
            ("Answer B is longer. Therefore: A", "a"),
            ("a good question", ""),
            ("", ""),
        ):
            self.assertEqual(judging.preference(reply), expected, reply)
        thinking = self.judged(self.server(lambda a, b: f"<think>B? A!</think>{longer(a, b)}"))
        self.assertEqual(thinking["won"], 8)
        self.assertEqual(self.judged(self.server(lambda a, b: "neither of them"))["unreadable"], 8)

    def test_what_was_answered_is_not_asked_again(self) -> None:
        root, server = temporary_directory(), self.server(longer)
        first = self.judged(server, root)
        self.assertEqual(self.judged(server, root), first)
        self.assertEqual(len(server.asked), 16)

    def test_a_key_comes_from_the_environment_and_is_written_nowhere(self) -> None:
        root, server = temporary_directory(), self.server(longer)
        with mock.patch.dict(os.environ, {judging.KEY: "sk-a-secret-of-ours"}):
            self.judged(server, root)
        self.assertEqual(set(server.keys), {"Bearer sk-a-secret-of-ours"})
        self.assertNotIn("secret", "".join(path.read_text() for path in root.rglob("*") if path.is_file()))

    def test_servers_that_cannot_judge_are_refused_before_anything_is_trained(self) -> None:
        closed = Server(longer)
        closed.close()
        with mock.patch.object(judging, "RETRIES", 0):
            for server, reason in (
                (closed, "nobody answers"),
                (self.server(longer, status=401), "OPENAI_API_KEY"),
                (self.server(longer, status=500), "the server says 500"),
                (self.server(longer, models=()), "names no model"),
            ):
                with self.assertRaises(DataError) as caught:
                    judging.check(EvaluateSection(judge=server.url))
                self.assertIn(reason, str(caught.exception))

    def test_labels_are_read_with_every_problem_at_once(self) -> None:
        root = temporary_directory()
        good = write_jsonl(root / "good.jsonl", [{"question": "q", "a": "x", "b": "y", "better": "TIE"}])
        self.assertEqual(judging.read_labels(good), [LabelledPair("q", "", "x", "y", "tie")])
        bad = write_jsonl(root / "bad.jsonl", [{"question": "q"}, {"question": "q", "a": "x", "b": "y", "better": "c"}])
        with self.assertRaises(DataError) as caught:
            judging.read_labels(bad)
        with self.assertRaises(DataError):
            judging.read_labels(root / "none.jsonl")
        self.assertIn("bad.jsonl:1", str(caught.exception))
        self.assertIn("better is none of a, b, tie", str(caught.exception))

    def test_settings_that_do_not_go_together_are_refused(self) -> None:
        for flags, reason in (
            (["--evaluate.judge", "localhost:8000"], "write http://host:port"),
            (["--evaluate.judge", "http://me:key@host"], "OPENAI_API_KEY"),
            (["--evaluate.judge_labels", "x.jsonl"], "give --evaluate.judge URL too"),
            (["--evaluate.judge", "http://host:1", "--evaluate.generated_answers", "0"], "compares generated answers"),
        ):
            with self.assertRaises(ConfigError) as caught:
                resolve(flags, {})
            self.assertIn(reason, str(caught.exception))


if __name__ == "__main__":
    unittest.main()
