"""What the rollout's tests share: two stub servers, a real HAProxy, the controller as a process, users' traffic."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import RolloutSection
from tests.support import ROOT
from utils.exceptions import ArtefactError
from utils.rollout.edge import journal, servers
from utils.rollout.edge.balancer import haproxy
from utils.rollout.edge.load import Load
from utils.rollout.edge.service import Service

QUESTIONS = tuple(f"What is {number}?" for number in range(200))
OLD, NEW = "d" * 64, "e" * 64
# a limit on waiting for what must happen; a test that passes does not wait
PATIENCE = 180.0
# tests hold steps with few units: the objective is loose, everything else is as in production
FAST = {
    "tick_seconds": 0.1,
    "lease_seconds": 2,
    "objective": 0.3,
    "min_step_seconds": 0.2,
    "bake_minutes": 0.005,
    "bake_units": 5,
    "probe_seconds": 0.03,
    # a starved machine serves few units; tests of deadlines set their own
    "step_minutes": 2,
    "server_timeout_seconds": 5,
    "drain_seconds": 3,
    "probe_timeout_seconds": 5,
    "margins": "0.3,0.3,0.3",
}


def has_haproxy() -> bool:
    try:
        haproxy.find_binary("")
    except ArtefactError:
        return False
    return True


class Stub:
    """One stub server in a process of its own."""

    def __init__(self, digest: str):
        self.digest, self.address = digest, f"127.0.0.1:{servers.free_port()}"
        self.start()

    def start(self) -> None:
        port = self.address.rpartition(":")[2]
        self.process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "rollout_stub.py"), port, self.digest])
        until(lambda: servers.get(self.address, "/health")[0] == 200, "the stub does not start")

    def fault(self, **faults: float) -> None:
        import http.client

        connection = http.client.HTTPConnection(self.address, timeout=5)
        connection.request("POST", "/stub", json.dumps(faults))
        assert connection.getresponse().status == 200
        connection.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


REAL_PROCESSES = "ROLLOUT_PROCESS_TESTS"
ON_REQUEST = "real balancers, servers and kills take twelve minutes: make rollout-test"


@unittest.skipUnless(os.environ.get(REAL_PROCESSES), ON_REQUEST)
@unittest.skipUnless(has_haproxy(), "haproxy is not there: apt-get install haproxy")
class RolloutTest(unittest.TestCase):
    """A production and a candidate stub, and a models folder as people have them: with a space in its name."""

    def setUp(self) -> None:
        place = Path(tempfile.mkdtemp(prefix="ro-"))
        self.addCleanup(shutil.rmtree, place, ignore_errors=True)
        self.root = place / "my models"
        self.root.mkdir()
        self.production, self.candidate = Stub(OLD), Stub(NEW)
        self.addCleanup(self.production.stop)
        self.addCleanup(self.candidate.stop)
        self.golden = self.root / "golden.jsonl"
        rows = [{"question": q, "answers": [f"The answer is {i}."]} for i, q in enumerate(QUESTIONS)]
        self.golden.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.controllers: list[subprocess.Popen[str]] = []
        self.addCleanup(self._stop_everything)

    def _stop_everything(self) -> None:
        for controller in self.controllers:
            if controller.poll() is None:
                controller.kill()
            controller.communicate()
        balancer = self.service.balancer
        if balancer.master() is not None:
            balancer.stop()

    @property
    def service(self) -> Service:
        return Service(RolloutSection(), self.root)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.service.facts['port']}"

    def command(self, word: str, **settings: Any) -> list[str]:
        values = {"golden": self.golden, **FAST, **settings}
        if word == "start":
            values = {
                "production": f"http://{self.production.address}",
                "candidate": f"http://{self.candidate.address}",
                "candidate_digest": NEW,
                "production_digest": OLD,
                **values,
            }
        flags = [piece for name, value in values.items() for piece in (f"--rollout.{name}", str(value))]
        return [sys.executable, str(ROOT / "scripts" / "rollout.py"), word, "--run.models_dir", str(self.root), *flags]

    def start(self, word: str = "start", **settings: Any) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DTA_")} | {"OMP_NUM_THREADS": "1"}
        started = subprocess.Popen(
            self.command(word, **settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.controllers.append(started)
        return started

    def run_command(self, word: str, **settings: Any) -> tuple[int, dict[str, Any], str]:
        """Exit code, last line of output as JSON (empty when it is none), standard error."""
        return self.end(self.start(word, **settings))

    def end(self, started: subprocess.Popen[str], patience: float = PATIENCE) -> tuple[int, dict[str, Any], str]:
        out, err = started.communicate(timeout=patience)
        lines = out.strip().splitlines()
        return started.returncode, json.loads(lines[-1]) if lines else {}, err

    def load(self, per_second: float = 150, **settings: Any) -> Load:
        return Load(self.address, per_second, questions=QUESTIONS, **settings)

    def wait_ramp(self, share_bp: int = 1, controller: subprocess.Popen[str] | None = None) -> None:
        """Until the balancer holds at least this share."""

        def there() -> bool:
            if controller is not None and controller.poll() is not None:
                raise AssertionError(f"the controller ended: {controller.communicate()[1][-2000:]}")
            try:
                return self.service.balancer.settings()["canary_bp"] >= share_bp
            except haproxy.BalancerError:
                return False

        until(there, f"the share did not reach {share_bp}")

    def story(self) -> journal.Story:
        return self.service.story()

    def assert_production_only(self, seconds: float = 0.5, per_second: float = 200) -> None:
        """Measured by traffic, not by the map."""
        with self.load(per_second, seed=int(time.time() * 1000) % 10**6) as load:
            time.sleep(seconds)
        self.assertGreater(len(load.results), 5)
        self.assertEqual({r.digest for r in load.results}, {OLD}, [r for r in load.results if r.error][:3])


def until(condition: Callable[[], Any], otherwise: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(otherwise)
        time.sleep(0.02)


def starved_seconds() -> float:
    """How much longer than usual this machine takes to start a program now: what to add to a time that is measured."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import json, http.client"], check=True)
    return 10 * max(0.0, time.monotonic() - began - 0.3)


def kill(process: subprocess.Popen[Any]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
