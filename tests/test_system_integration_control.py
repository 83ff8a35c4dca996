"""The control with a known answer on the embedded model: true documents help, shuffled ones do not.

Forty invented towns, each with one of eight trades. Two domain adapters (true facts, shuffled facts), one task adapter
stacked on each, and one on the base as the fair baseline that both comparisons share. 22,000 trained tokens are minutes
on a laptop: `make proof-test` asks for them.
"""

from __future__ import annotations

import math
import os
import unittest
from typing import Any

from tests.support import embedded_models, forked, last_json, temporary_directory

DATA = ("--data.invented_towns", "40", "--data.invented_attributes", "1", "--data.test_share", "0.4")
DOMAIN = (
    *(
        "--domain.train.epochs",
        "6",
        "--domain.train.learning_rate",
        "2e-3",
        "--domain.train.max_sequence_tokens",
        "128",
    ),
    *("--domain.train.batch_tokens", "128", "--domain.train.micro_batch_tokens", "128"),
    *("--domain.train.warmup_ratio", "0.1"),
)
TASK = (
    *("--task.train.epochs", "5", "--task.train.learning_rate", "1e-3", "--task.train.max_sequence_tokens", "128"),
    *("--task.train.batch_tokens", "192", "--task.train.micro_batch_tokens", "192", "--task.train.warmup_ratio", "0.1"),
    *("--task.system_prompt", "Answer."),  # a third of a pair's tokens would be the default sentence
)
CHANCE = math.log(8)  # NLL of a guess among eight equally frequent values
MINUTES = 900.0


@unittest.skipUnless(
    os.environ.get("PROOF_TESTS") == "1", "trains five adapters of the embedded model: make proof-test"
)
class KnownAnswer(unittest.TestCase):
    """One workspace for the whole story: nine stages, about 22,000 trained tokens."""

    @classmethod
    def setUpClass(cls) -> None:
        models, data = embedded_models(), temporary_directory()
        # float32: on CPUs without matrix units it is the faster dtype here, and it rounds alike on all of them
        common = ("--run.data_dir", str(data), "--run.models_dir", str(models), "--run.trackers", "")
        common = (*common, "--run.threads", "2", "--base.dtype", "float32")

        def stage(script: str, *arguments: str) -> dict[str, Any]:
            return last_json(forked(script, *common, *arguments, patience=MINUTES))

        def trained(corpus: str) -> tuple[str, str]:
            prepared = stage("prepare_data", *DATA, "--data.corpus", corpus, "--data.task", "invented")["run"]
            domain = stage("train_domain_adapter", *DOMAIN, "--inputs.prepared", prepared, "--run.name", corpus)
            return prepared, domain["run"]

        true, domain = trained("invented")
        _, shuffled = trained("invented_shuffled")
        # the twin has the same pairs, so its task adapter is trained on the control's data and shares the baseline
        task = (*TASK, "--inputs.prepared", true)
        stage("train_task_adapter", *task, "--task.on", "base", "--run.name", "on-base")
        cls.results = {}
        for name, adapter in (("true", domain), ("shuffled", shuffled)):
            stacked = stage("train_task_adapter", *task, "--inputs.domain_adapter", adapter, "--run.name", f"on-{name}")
            evaluate = ("--inputs.task_adapter", stacked["run"], "--evaluate.generated_answers", "0")
            cls.results[name] = stage("evaluate", *evaluate, "--run.name", name)

    def test_adapting_to_true_documents_beats_the_task_adapter_alone(self) -> None:
        found = self.results["true"]
        self.assertGreater(found["contrasts"]["H3"]["low"], 1.0)
        self.assertLess(found["cells"]["composed"]["answer_nll"], 1.0)
        self.assertGreater(found["cells"]["composed"]["choice_accuracy"], 0.75)

    def test_neither_the_base_nor_one_adapter_alone_knows_and_answers(self) -> None:
        for cell in ("base", "domain", "task"):
            found = self.results["true"]["cells"][cell]
            self.assertGreater(found["answer_nll"], CHANCE - 0.25, cell)
        for cell in ("base", "task"):
            self.assertLess(self.results["true"]["cells"][cell]["choice_accuracy"], 0.5, cell)

    def test_adapting_to_shuffled_documents_is_no_better_than_guessing(self) -> None:
        found = self.results["shuffled"]
        self.assertGreater(found["cells"]["composed"]["answer_nll"], CHANCE - 0.25)
        self.assertLess(found["cells"]["composed"]["choice_accuracy"], 0.5)
        self.assertLess(found["contrasts"]["H3"]["low"], 0.0)
        self.assertNotEqual(found["verdict"], "helps")

    def test_the_true_domain_helps_more_than_the_wrong_one(self) -> None:
        # both against the same baseline on the same questions: the intervals do not even touch
        true, wrong = (self.results[name]["contrasts"]["H3"] for name in ("true", "shuffled"))
        self.assertGreater(true["low"], wrong["high"])

    def test_composing_keeps_what_was_learnt_about_the_documents(self) -> None:
        for name, found in self.results.items():
            base, domain, composed = (found["cells"][cell]["domain_nll"] for cell in ("base", "domain", "composed"))
            self.assertGreater((base - composed) / (base - domain), 0.8, name)


if __name__ == "__main__":
    unittest.main()
