"""How long a run is, and what is said about it before it begins."""

from __future__ import annotations

import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from config import LoraSection, TrainSection
from tests.support import saved_model
from utils.artifacts.runs import Run
from utils.exceptions import DataError
from utils.training import steps, training_identity


class Data:
    """So many steps an epoch, each of 100 labels."""

    def __init__(self, number: int):
        self.number = number

    def steps(self, epoch: int) -> list[int]:
        return list(range(self.number))

    def num_labels(self, epoch: int, step: int) -> int:
        return 100


class Total(unittest.TestCase):
    def test_steps_are_those_of_the_epochs_or_max_steps(self) -> None:
        self.assertEqual(steps.total(Data(7), TrainSection(epochs=3), "x"), 21)
        self.assertEqual(steps.total(Data(7), TrainSection(epochs=3, max_steps=4), "x"), 4)
        self.assertEqual(steps.total(Data(7), TrainSection(epochs=3, max_steps=40), "x"), 40)
        with self.assertRaisesRegex(DataError, "nothing to train on"):
            steps.total(Data(0), TrainSection(max_steps=40), "x")


class Announcement(unittest.TestCase):
    def said(self, number: int, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Facts of the event, and of the warning."""
        train = TrainSection(**settings)
        with mock.patch.object(steps, "event") as event, mock.patch.object(steps, "warning") as warning:
            steps.announce(Data(number), train, steps.total(Data(number), train, "x"), "task adapter")
        told = {"what": warning.call_args.args[0], **warning.call_args.kwargs} if warning.called else {}
        return event.call_args.kwargs, told

    def test_steps_tokens_and_passes_are_said(self) -> None:
        facts, warned = self.said(40, epochs=2)
        self.assertEqual((facts["steps"], facts["passes"], facts["trained_tokens"]), (80, 2.0, 8_000))
        self.assertEqual(warned, {})
        facts, _ = self.said(40, epochs=2, max_steps=50)
        self.assertEqual((facts["steps"], facts["passes"], facts["trained_tokens"]), (50, 1.25, 5_000))

    def test_few_steps_are_warned_of_with_what_makes_more(self) -> None:
        facts, warned = self.said(3, epochs=1, batch_tokens=8_192)
        self.assertEqual(facts["steps"], 3)
        self.assertIn("3 optimiser steps teach little", warned["what"])
        self.assertIn("--task.train.batch_tokens 1228", warned["fix"])
        self.assertIn("--task.train.epochs 7", warned["fix"])
        self.assertGreaterEqual(self.said(3, epochs=7)[0]["steps"], steps.FEWEST_STEPS)
        _, warned = self.said(40, max_steps=10)  # where more passes or smaller steps would change nothing
        self.assertEqual(warned["fix"], f"--task.train.max_steps {steps.FEWEST_STEPS} or more")


class Identity(unittest.TestCase):
    def test_epochs_decide_only_without_max_steps_and_runs_of_before_are_made_anew(self) -> None:
        base, data = saved_model("llama"), Run(Path("x"), {"kind": "prepared", "digest": "1"})

        def of(**settings: Any) -> training_identity.Identity:
            train = TrainSection(**settings)
            return training_identity.training_identity(
                "domain", base, data, LoraSection(), train, seed=0, dtype="float32"
            )

        self.assertEqual(of(max_steps=5, epochs=1).values, of(max_steps=5, epochs=2).values)
        self.assertNotEqual(of(epochs=1).values, of(epochs=2).values)
        earlier = {"base": base.digest, "data": "1", "seed": 0, "dtype": "torch.float32", "stage": "domain"}
        for most, is_same in ((0, True), (5, False)):
            dumped = {
                "lora": LoraSection().model_dump(mode="json"),
                "train": TrainSection(max_steps=most).model_dump(mode="json"),
            }
            self.assertEqual(of(max_steps=most).is_of(earlier | dumped), is_same, most)


if __name__ == "__main__":
    unittest.main()
