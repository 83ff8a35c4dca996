"""A conversation at a terminal: a pseudo-terminal, and what a person types into it."""

import json
import os
import pty
import subprocess
import sys
import unittest

from tests.support import ROOT, Workspace, clean_environment, last_json


class Terminal(unittest.TestCase):
    def test_a_line_that_is_not_utf8_is_not_asked_and_the_conversation_goes_on(self) -> None:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "tests.programs.converse"]
        environment = clean_environment({"PYTHONIOENCODING": "utf-8:strict"})
        started = subprocess.Popen(
            command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment
        )
        os.close(theirs)
        os.write(ours, b"first\n\xff\xfe\nsecond\nquit\n")
        out, said = started.communicate(timeout=120)
        os.close(ours)
        self.assertEqual(started.returncode, 0, said.decode()[-2000:])
        self.assertIn("<first>", out.decode())
        self.assertIn("<second>", out.decode())
        self.assertIn("{'answered': 2}", out.decode())


class Piped(unittest.TestCase):
    """`echo ... | inference`, as a person types it (toy preset)."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.place = Workspace()
        cls.place.prepare()
        for stage in ("domain", "task"):
            last_json(cls.place.run(f"train_{stage}_adapter", f"--{stage}.train.max_steps", "1"))

    def ask(self, typed: bytes, *flags: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "scripts/inference.py", *self.place.flags, "--inference.max_new_tokens", "2", *flags]
        return subprocess.run(command, input=typed, capture_output=True, cwd=ROOT, env=clean_environment(), check=False)

    def test_each_line_is_a_question_and_quiet_says_results_alone(self) -> None:
        done = self.ask(b"q\n\nWhat is it?\n", "-q")
        self.assertEqual(done.returncode, 0, done.stderr.decode()[-2000:])
        lines = done.stdout.decode().splitlines()
        self.assertEqual([json.loads(line)["prompt"] for line in lines[:-1]], ["q", "What is it?"])
        self.assertEqual(json.loads(lines[-1])["answered"], 2)
        self.assertNotIn(b"composed", done.stderr)

    def test_what_is_no_utf8_is_refused(self) -> None:
        done = self.ask(b"\xff\xfe\n")
        self.assertEqual((done.returncode, b"Traceback" in done.stderr), (2, False), done.stderr)
        self.assertIn(b"not UTF-8", done.stderr)


if __name__ == "__main__":
    unittest.main()
