"""A service whose files are damaged, behind a real HAProxy that sends users to the candidate."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from config import RolloutSection
from tests.rollout_support import NEW, OLD, RolloutTest
from tests.support import ROOT
from utils.artifacts import files
from utils.exceptions import ArtefactError, BalancerError, PipelineError
from utils.rollout.controller import Observation
from utils.rollout.edge import abort, journal, rollout_report, screen, service
from utils.rollout.edge.balancer.haproxy import SAFE_MAP, Balancer
from utils.rollout.edge.journal import Journal
from utils.rollout.edge.rollout_loop import Loop
from utils.rollout.edge.servers import free_port
from utils.rollout.edge.service_state import Service
from utils.rollout.gate import Counts
from utils.rollout.policy import UNITS, Policy

# takes the lock of a service and holds it
HOLD = """
import sys
from pathlib import Path
from utils.artifacts import files
with files.locked(Path(sys.argv[1]), "the service"):
    print("held", flush=True)
    sys.stdin.read()
"""
NAME = "20300101-000000-dddddddd"


class Damage(RolloutTest):
    def setUp(self) -> None:
        super().setUp()
        state = self.service
        self.home, self.journal = state.home, state.home / "rollouts" / NAME / "journal.jsonl"
        self.journal.parent.mkdir(parents=True)
        sides = {
            "production": {"address": self.production.address, "digest": OLD, "directory": "", "process": None},
            "candidate": {"address": self.candidate.address, "digest": NEW, "directory": "", "process": None},
        }
        state.remember(port=free_port(), rollout=NAME, **sides)
        writer = Journal(self.journal)
        header = {"id": NAME, "started_at": time.time(), "policy": Policy().to_json(), "seed": 0, "prompts": 0}
        writer.append("header", header | sides)
        writer.append("seen", Observation(time.time(), Counts({100: {UNITS: (9, 900)}})).to_json())
        state.balancer.write(state.layout(with_canary=True))
        state.balancer.start()
        self.canary()
        self.whole = {path: path.read_bytes() for path in (state.facts_path, self.journal)}

    def canary(self) -> None:
        self.service.balancer.set(canary_bp=5000, lease_until=int(time.time()) + 1000)

    def share(self) -> int:
        return Balancer(self.home, Path("haproxy")).settings()["canary_bp"]

    def restore(self) -> None:
        for path in [*self.home.rglob("*.damaged-*"), *self.home.rglob(".*.tmp*"), self.journal.parent / "command"]:
            path.unlink(missing_ok=True)
        for path, content in self.whole.items():
            path.write_bytes(content)
        with contextlib.suppress(BalancerError):
            self.canary()

    def quiet(self, what: Any, *given: Any, **flags: Any) -> str:
        """What a command complains of; anything else than an error of ours is a failure of the test."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                what(*given, **flags)
        except PipelineError as error:
            return str(error)
        return ""

    def snapshot(self) -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(self.home.rglob("*")) if p.is_file()}

    def test_abort_and_start_after_each_kind_of_damage(self) -> None:
        header, seen = self.whole[self.journal].splitlines(keepends=True)
        state = self.service
        for path, content in (
            (self.journal, header + b"nonsense\n" + seen),
            (self.journal, b""),
            (self.journal, header.replace(b'"policy"', b'"polcy"') + seen),
            (self.journal, header + seen.replace(b'"rates"', b'"rates":5,"r"')),
            (state.facts_path, b"{"),
            (state.facts_path, b"[]"),
            (state.facts_path, b'{"rollout": "../../..", "port": 5}'),
            (state.facts_path, b'{"candidate": {"address": 5}}'),
        ):
            with self.subTest(path.name, content=content[:60]):
                path.write_bytes(content)
                said = self.quiet(lambda: service.resume(self.readable(), []))
                self.assertIn("abort", said)
                found = abort.abort(Service(RolloutSection(), self.root))
                self.assertEqual((found["share_bp"], self.share()), (0, 0))
                (kept,) = found["set_aside"]
                self.assertEqual(Path(kept).read_bytes(), content)
                with contextlib.redirect_stdout(io.StringIO()):
                    self.assertEqual(screen.status(self.readable(), watch=False), {"rollout": None})
                service._refuse_unfinished(self.readable())  # another one may be started
                self.restore()

    def readable(self) -> Service:
        """As scripts/rollout.py opens it for every command but abort and stop."""
        found = Service(RolloutSection(), self.root)
        if found.damaged:
            raise found.damaged
        return found

    def test_a_refused_start_and_a_refused_resume_leave_everyone_at_production(self) -> None:
        for command in (lambda: service.start(self.readable(), [], 0), lambda: service.resume(self.readable(), [])):
            self.journal.write_bytes(b"nonsense\n" + self.whole[self.journal])
            self.assertIn("abort", self.quiet(command))
            self.assertEqual(self.share(), 0)
            self.restore()
        self.assertIn("not finished", self.quiet(lambda: service.start(self.readable(), [], 0)))
        self.assertEqual(self.share(), 0)

    def test_whatever_refuses_a_start_or_a_resume_takes_the_share_to_zero(self) -> None:
        missing = {"golden": self.root / "nowhere.jsonl"}
        nobody = {"golden": "none", "candidate": f"http://127.0.0.1:{free_port()}", "start_timeout_seconds": 0.2}
        facts, there = self.service.facts_path, self.journal
        for word, path, settings, said in (
            ("start", there, nobody, "no completion"),  # without a journal nothing is unfinished
            ("start", facts, missing, "memory is damaged"),
            ("resume", facts, missing, "memory is damaged"),
            ("resume", there, missing, "no golden prompts"),
            ("start", there, missing, "no golden prompts"),
        ):
            with self.subTest(word, path=path.name, said=said):
                path.unlink()
                if path is facts:
                    path.write_text("{")
                code, _, errors = self.run_command(word, **settings)
                self.assertEqual((code, self.share()), (2, 0), errors)
                self.assertIn(said, errors)
                self.assertNotIn("Traceback", errors)
                self.restore()

    def test_a_lock_that_cannot_be_taken_is_no_controller_and_one_that_is_held_is(self) -> None:
        lock = self.home / files.LOCK
        lock.unlink(missing_ok=True)
        lock.symlink_to(lock.name)
        self.assertIn("error", self.quiet(abort.secure, self.service))
        self.assertEqual(self.share(), 0)
        lock.unlink()
        self.canary()
        holder = [sys.executable, "-c", HOLD, str(self.home)]
        with subprocess.Popen(holder, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as held:
            assert held.stdout is not None
            held.stdout.readline()
            self.assertIn("in use by", self.quiet(abort.secure, self.service))
            self.assertEqual(self.share(), 5000)
            held.kill()

    def test_pipes_in_the_place_of_files_hold_no_command(self) -> None:
        def too_long(*_: Any) -> None:
            raise AssertionError("a command waits for a pipe")

        self.addCleanup(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, too_long))
        self.addCleanup(signal.alarm, 0)
        beside = [self.journal.with_name(name) for name in ("live.json", "command")]
        for path in (*self.whole, *beside, self.home / "balancer.pid", self.home / "haproxy.cfg"):
            with self.subTest(path.name):
                kept = path.rename(self.root / "kept") if path.exists() else None
                os.mkfifo(path)
                signal.alarm(30)
                self.quiet(lambda: screen.status(self.readable(), watch=False))
                self.quiet(lambda: service.promote(self.readable()))
                self.quiet(lambda: service._prepare_sides(self.readable()))
                self.quiet(lambda: abort.abort(Service(RolloutSection(), self.root)))
                self.assertEqual(self.share(), 0)
                signal.alarm(0)
                path.unlink(missing_ok=True)
                if kept:
                    kept.rename(path)
                self.restore()

    def test_a_command_that_is_no_text_ends_no_controller(self) -> None:
        place = self.journal.with_name("command")
        place.write_bytes(b"\xff\xfe")
        loop = mock.Mock(directory=place.parent)
        self.assertEqual(Loop._command(loop), "")
        place.write_bytes(b"abort\n")
        self.assertEqual(Loop._command(loop), "abort")

    def test_a_map_that_was_edited_is_not_what_a_balancer_starts_with(self) -> None:
        balancer = self.service.balancer
        balancer.map.write_text(SAFE_MAP.replace(" 0", " 10000", 1).replace("until 0", "until 9999999999"))
        balancer.write(self.service.layout(with_canary=True))
        balancer.reload()
        self.assertEqual(self.share(), 0)

    def test_damaged_files_of_every_kind_give_no_traceback_and_an_abort_takes_the_share_to_zero(self) -> None:
        generator = random.Random(0)
        live = self.journal.parent / "live.json"
        for number in range(1000):
            path = generator.choice([*self.whole, live])
            content = self.mutated(self.whole.get(path, b'{"state": {"phase": "ramp"}, "at": 1}'), generator)
            path.write_bytes(content)
            before = self.snapshot()
            try:
                self.quiet(lambda: screen.status(self.readable(), watch=False))
                self.assertEqual(self.snapshot(), before, "status changes nothing")
                if number % 3 == 0:
                    self.quiet(lambda: service._refuse_unfinished(self.readable()))
                self.quiet(lambda: abort.abort(Service(RolloutSection(), self.root)))
                self.assertEqual(self.share(), 0)
            except BaseException:
                print(number, path.name, content[:400])
                raise
            self.restore()

    @staticmethod
    def mutated(text: bytes, generator: random.Random) -> bytes:
        if generator.random() < 0.1:
            return generator.choice((b"", b"{", b"[]", b"5", b"null", b"\xff", b"[" * 100_000))
        pieces = list(text)
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(pieces))
            change = generator.choice((b"", b"5", b"[]", b"}", b"null", b'"', b"\n", b"-1", b"1e999", b"{}", b"NaN"))
            pieces[place : place + generator.randint(0, 12)] = change
            pieces = pieces or [32]
        return bytes(pieces)


class Reading(unittest.TestCase):
    def test_facts_that_this_program_never_writes_are_refused(self) -> None:
        root = Path(tempfile.mkdtemp(prefix="ro-"))
        self.addCleanup(shutil.rmtree, root)
        path = root / "rollout" / RolloutSection().service / "service.json"
        path.parent.mkdir(parents=True)
        side = {"address": "a:1", "digest": "", "directory": "", "process": [1, 2.0]}
        for facts in ({}, {"port": 80, "rollout": "r", "production": side, "candidate": None}):
            path.write_text(json.dumps(facts))
            self.assertIsNone(Service(RolloutSection(), root).damaged, facts)
        for facts in (
            *([], 5, {"port": "80"}, {"port": 0}, {"rollout": "../x"}, {"rollout": 5}, {"production": 5}),
            *({"candidate": side | {"process": ["1", 2]}}, {"candidate": side | {"address": 5}}),
            *({"candidate": {"address": "a"}}, {"candidate": side | {"more": 1}}),
            *({"rollout": name} for name in ("..", ".", "a\0b", "a/b", "\ud800/", "\n")),
            *({"candidate": side | {"process": [pid, 2.0]}} for pid in (-1, 0, 1 << 40)),
        ):
            path.write_text(json.dumps(facts))
            found = Service(RolloutSection(), root)
            self.assertIsInstance(found.damaged, ArtefactError, facts)
            self.assertIn("rollout.py abort", str(found.damaged))

    def test_a_journal_from_which_no_report_could_be_written_is_refused(self) -> None:
        path = Path(tempfile.mkdtemp(prefix="ro-")) / "journal.jsonl"
        self.addCleanup(shutil.rmtree, path.parent)
        side = {"address": "a:1", "digest": "", "directory": "", "process": None}
        header = {"id": NAME, "started_at": time.time(), "policy": Policy().to_json(), "production": side}
        header |= {"candidate": side}
        seen = Observation(time.time()).to_json()

        def written(header: dict[str, Any], seen: dict[str, Any]) -> Path:
            path.write_text(json.dumps({"header": header}) + "\n" + json.dumps({"seen": seen}) + "\n")
            return path

        rollout_report.write(written(header, seen), [])
        for changed in (
            *({"id": value} for value in (None, 5, [])),
            *({"started_at": value} for value in (None, "x", True, -1, 1e308, float("nan"))),
            *({"production": value} for value in (None, {}, [], "x", side | {"digest": None})),
        ):
            with self.assertRaises(ArtefactError, msg=str(changed)):
                journal.read(written(header | changed, seen))
        for at in (None, "x", 1e308, float("nan"), -1, True):
            with self.assertRaises(ArtefactError, msg=str(at)):
                journal.read(written(header, seen | {"at": at}))


if __name__ == "__main__":
    unittest.main()
