"""A conversation at a terminal: a pseudo-terminal, and what a person types into it."""

import os
import pty
import subprocess
import sys
import unittest

from tests.support import ROOT, clean_environment


class Terminal(unittest.TestCase):
    def test_a_line_that_is_not_utf8_is_not_asked_and_the_conversation_goes_on(self) -> None:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "tests.programs.converse"]
        environment = clean_environment({"PYTHONIOENCODING": "utf-8:strict"})
        started = subprocess.Popen(
            command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment
        )
        os.close(theirs)
        os.write(ours, b"first\n\xff\xfe\nsecond\n\n")
        out, said = started.communicate(timeout=120)
        os.close(ours)
        self.assertEqual(started.returncode, 0, said.decode()[-2000:])
        self.assertIn("<first>", out.decode())
        self.assertIn("<second>", out.decode())
        self.assertIn("{'answered': 2}", out.decode())


if __name__ == "__main__":
    unittest.main()
