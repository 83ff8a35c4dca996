"""A person's own command on the end of a rollout: told by data, bounded in time, and without any say."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

from config import RolloutSection
from tests.test_rollout_kills import LoopTest
from utils.exceptions import ArtefactError, ConfigError, RolledBack
from utils.rollout.controller import Observation
from utils.rollout.edge import abort, on_event, service
from utils.rollout.edge.balancer.haproxy import Balancer
from utils.rollout.edge.journal import Journal, read
from utils.rollout.edge.service_state import Service

WRITES = """import json, os, sys
print(json.dumps([sys.argv[1:], json.load(sys.stdin), json.loads(os.environ['ROLLOUT_EVENT'])]))
"""
LEAVES = """import subprocess, sys
print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)
"""


class Commands(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="ro-")
        self.addCleanup(directory.cleanup)
        self.log = Path(directory.name) / "on_event.log"

    def tell(self, program: str, facts: dict[str, Any], *words: str, seconds: float = 20.0) -> bool:
        command = shlex.join([sys.executable, "-c", program, *words])
        return on_event.tell(command, facts, self.log, seconds)

    def test_it_is_told_by_data_and_no_shell_reads_it(self) -> None:
        reason = 'the "server" said $(touch /tmp/x); `id` \x00 \udc80 | & é'
        self.assertTrue(self.tell(WRITES, {"outcome": "rolled_back", "reason": reason}, "$HOME", "; exit 3", "*"))
        words, stdin, variable = json.loads(self.log.read_text())
        self.assertEqual(words, ["$HOME", "; exit 3", "*"])
        self.assertEqual(stdin, {"outcome": "rolled_back", "reason": reason})
        self.assertEqual(stdin, variable)

    def test_whatever_it_does_is_said_and_nothing_more(self) -> None:
        begun = time.monotonic()
        for program, seconds in (
            *(("raise SystemExit(3)", 20), ("import os; os.kill(os.getpid(), 9)", 20), ("1 +", 20)),
            *(("import time; time.sleep(3600)", 0.5), ("import sys; sys.stdin.close(); print('x' * 10_000_000)", 20)),
        ):
            with self.subTest(program):
                told = self.tell(program, {"reason": "r" * 10_000_000}, seconds=seconds)
                self.assertEqual(told, "print" in program)
        self.assertLess(time.monotonic() - begun, 1800)

    def test_its_children_end_with_it(self) -> None:
        self.assertTrue(self.tell(LEAVES, {}))
        end = time.monotonic() + 10
        while Path(f"/proc/{self.log.read_text().strip()}/cmdline").exists() and time.monotonic() < end:
            if not Path(f"/proc/{self.log.read_text().strip()}/cmdline").read_bytes():  # ended, not collected
                break
            time.sleep(0.05)
        else:
            self.assertLess(time.monotonic(), end)

    def test_a_log_that_cannot_be_written_and_a_program_that_is_gone(self) -> None:
        self.assertTrue(on_event.tell("true", {}, self.log / "no" / "folder", 5))
        self.assertFalse(on_event.tell("no-such-program-at-all", {}, self.log, 5))
        self.assertTrue(on_event.tell("", {}, self.log, 5))

    def test_what_is_no_command_is_refused_before_anything_starts(self) -> None:
        for command in ("no-such-program-at-all --x", "'unclosed", "   "):
            with self.assertRaisesRegex(ConfigError, "on_event"):
                on_event.words(command)
            target = Service(RolloutSection(on_event=command, production="http://127.0.0.1:9"), self.log.parent)
            with self.assertRaisesRegex(ConfigError, "on_event"):
                service.start(target, [], 0)


class Ends(LoopTest):
    """The journal of a rollout that ended, and what is run for it."""

    def service(self, program: str = WRITES, **settings: Any) -> Service:
        command = shlex.join([sys.executable, "-c", program])
        found = Service(RolloutSection(on_event=command, **settings), self.root)
        if not found.facts:
            found.home.mkdir(parents=True)
            path = found.home / "rollouts" / "r" / "journal.jsonl"
            path.parent.mkdir(parents=True)
            self.rollout(0, 0).rename(path)
            side = {"address": "127.0.0.1:9", "digest": "d" * 64, "directory": "", "process": None}
            found.remember(port=1, rollout="r", production=side, candidate=side | {"address": "127.0.0.1:8"})
        return found

    def ended(self, found: Service) -> Journal:
        writer = Journal(found.rollout / "journal.jsonl")  # type: ignore[operator]
        writer.append("seen", Observation(time.time(), unsafe="the candidate's server is DOWN").to_json())
        return writer

    def test_a_rollback_is_told_once_and_a_failing_command_changes_nothing(self) -> None:
        for program, done in ((WRITES, True), ("raise SystemExit(3)", False)):
            with self.subTest(program):
                self.setUp()
                found = self.service(program)
                writer = self.ended(found)
                for _ in range(2):
                    with self.assertRaisesRegex(RolledBack, "DOWN"):
                        service._finish(
                            found, Balancer(found.home, Path("haproxy")), writer, read(writer.path).state, None
                        )
                told = [entry for entry in read(writer.path).events if entry["event"] == "told"]
                self.assertEqual([entry["done"] for entry in told], [done])
                if done:
                    (line,) = writer.path.with_name("on_event.log").read_text().splitlines()
                    fact = json.loads(line)[1]
                    self.assertEqual(
                        (fact["outcome"], fact["cause"], fact["service"]), ("rolled_back", "unsafe", "default")
                    )
                    self.assertIn("report.html", fact["report"])

    def test_an_abort_without_a_controller_is_a_rollback_too(self) -> None:
        found = self.service()
        abort.abort(found)
        fact = json.loads((found.rollout / "on_event.log").read_text())[1]  # type: ignore[operator]
        self.assertEqual((fact["outcome"], fact["cause"]), ("rolled_back", "person"))
        abort.abort(self.service())
        self.assertEqual(len((found.rollout / "on_event.log").read_text().splitlines()), 1)  # type: ignore[operator]

    def test_what_is_aborted_with_damaged_files_still_ends(self) -> None:
        found = self.service("raise SystemExit(3)")
        (found.rollout / "journal.jsonl").write_text("nonsense\n\n")  # type: ignore[operator]
        self.assertIn("set_aside", abort.abort(self.service("raise SystemExit(3)")))
        with self.assertRaises(ArtefactError):
            self.service().story()


if __name__ == "__main__":
    unittest.main()
