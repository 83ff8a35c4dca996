"""Real models behind `transformers serve`: what `make rollout-demo` shows, and that it is output quality that decides.

Needs HAProxy, the server's packages and the embedded base model; where one of them cannot be had it says so and skips.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import unittest
from pathlib import Path

import config as settings
from tests.rollout_support import ON_REQUEST, REAL_PROCESSES, has_haproxy
from utils.exceptions import ArtefactError
from utils.models import sources
from utils.rollout.edge import journal


@unittest.skipUnless(os.environ.get(REAL_PROCESSES), ON_REQUEST)
@unittest.skipUnless(has_haproxy(), "haproxy is not there: sh scripts/launch/get_haproxy.sh")
@unittest.skipUnless(importlib.util.find_spec("fastapi"), "transformers serve needs fastapi, uvicorn and openai")
class Demo(unittest.TestCase):
    def test_a_good_candidate_is_promoted_and_a_broken_one_rolled_back_by_its_answers_while_http_is_healthy(
        self,
    ) -> None:
        from utils.rollout.edge import demo

        root = Path(tempfile.mkdtemp(prefix="ro-"))
        self.addCleanup(shutil.rmtree, root, ignore_errors=True)
        section = settings.smollm2_135m().base
        try:
            sources.fetch(section, root)
        except ArtefactError as error:
            self.skipTest(f"the embedded base model cannot be fetched here: {error}")
        found = demo.run(section, root, "")
        self.assertEqual((found["bad"]["outcome"], found["good"]["outcome"]), ("rolled back", "promoted"), found)
        self.assertRegex(found["bad"]["reason"], "worse on (output|quality)")
        self.assertNotRegex(found["bad"]["reason"], "errors")
        self.assertEqual((found["bad"]["failed"], found["good"]["failed"]), (0, 0))
        for path in root.glob("rollout/*/rollouts/*/journal.jsonl"):
            total = journal.read(path).state.total
            self.assertEqual([total.at(bp, "errors") for bp in total.rates], [(0, 0)] * len(total.rates))
            self.assertTrue(path.with_name("report.html").exists())


if __name__ == "__main__":
    unittest.main()
