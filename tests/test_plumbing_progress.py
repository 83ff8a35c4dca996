"""One bar over a long command: what bars inside it do is counted there, and nothing else is shown."""

from __future__ import annotations

import unittest
from unittest import mock

from utils import logger, progress
from utils.progress import Progress, Whole


class OneBar(unittest.TestCase):
    def setUp(self) -> None:
        for patched in (mock.patch.object(logger, "event"), mock.patch.object(progress, "SECONDS_BETWEEN_LINES", 0.0)):
            self.addCleanup(patched.stop)
            patched.start()

    def said(self) -> list[str]:
        return [str(call.args[0]) for call in logger.event.call_args_list]

    def test_bars_inside_add_to_it(self) -> None:
        with Whole("evaluation", total=10, unit="item") as whole:
            for name in ("base", "composed"):
                with Progress(name, total=5, unit="item") as bar:
                    bar.advance(2)
                    bar.advance(3)
            whole.step("is not counted here")
        self.assertEqual([line.split(" ")[1] for line in self.said()], ["2/10", "5/10", "7/10", "10/10"])
        self.assertTrue(all(line.startswith("evaluation:") for line in self.said()))
        with Progress("alone", total=5, unit="item") as bar:
            bar.advance(5)
        self.assertIn("alone: 5/5", self.said()[-1])

    def test_parts_may_be_counted_instead(self) -> None:
        with Whole("weight search", total=3, unit="point", done=1, counts_steps=True) as whole:
            with Progress("questions", total=50, unit="item") as bar:
                bar.advance(50)
            whole.step("sum")
        self.assertEqual([line.split(" ")[2] for line in self.said()], ["2/3"])

    def test_it_ends_with_an_error_too(self) -> None:
        with self.assertRaises(ValueError), Whole("evaluation", total=1, unit="item"):
            raise ValueError
        self.assertIsNone(Whole.running)


if __name__ == "__main__":
    unittest.main()
