"""What the report says about the runs behind the numbers: roles, training, lineage."""

from __future__ import annotations

import unittest

from tests.report_support import evaluation, run_at, soup, text_of, the_runs
from tests.support import temporary_directory
from utils.evaluation.report import evaluation_report, report_facts


class Background(unittest.TestCase):
    def test_every_run_has_its_role(self) -> None:
        root, found = temporary_directory(), evaluation()
        runs, _ = the_runs(root, found)
        parent = [{"kind": "prepared", "path": "x", "digest": "9" * 64}]
        train = {"train": {}, "lora": {"rank": 8}, "seed": 7}
        wrong = run_at(root, "domain", "wrong", train, parents=parent)
        noise = run_at(root, "domain", "noise", {"control": "random", "seed": 7})
        on = [{"on": "domain", "domain_adapter": below.digest} for below in (wrong, noise)]
        tasks = [
            run_at(root, "task", f"t{i}", train | one, parents=runs[0].manifest["parents"]) for i, one in enumerate(on)
        ]
        foreign = run_at(root, "domain", "foreign", {"on": "elsewhere"})
        roles = report_facts.roles([*runs, *tasks, wrong, noise, foreign])
        self.assertEqual(
            [roles[run.digest] for run in (*runs, wrong, noise, *tasks, foreign)],
            [
                "domain adapter, seed 0",
                "task adapter on the domain adapter, seed 0",
                "task adapter on the base, seed 0",
                "data",
                "composed adapter",
                "wrong-domain adapter, seed 7",
                "random adapter in the domain adapter's place, seed 7",
                "task adapter on the wrong-domain adapter, seed 7, rank 8",
                "task adapter on the random adapter, seed 7, rank 8",
                "domain adapter of another tool",
            ],
        )

    def test_loss_curves_have_the_steps_of_the_metrics_and_a_torn_line_is_none(self) -> None:
        root, found = temporary_directory(), evaluation()
        runs, _ = the_runs(root, found)
        ((name, style, lines),) = report_facts.trained(runs, "domain")
        self.assertEqual((name, style, len(lines)), ("domain adapter, seed 0", "domain", 5))
        self.assertEqual([style for _, style, _ in report_facts.trained(runs, "task")], ["composed", "task"])
        page = soup(evaluation_report.page("x", found, runs, None))
        hovers = [t.get_text() for t in page.select("#training ~ .charts title")]
        self.assertIn("domain adapter, seed 0: dev loss 3.400 at step 3", hovers)
        self.assertEqual(len(page.select("#training ~ .charts polyline")), 4)

    def test_lineage_has_whole_digests_roles_time_and_memory(self) -> None:
        found = evaluation()
        runs, composed = the_runs(temporary_directory(), found)
        page = soup(evaluation_report.page("x", found, runs, composed, {"dtype": "torch.bfloat16"}))
        digests = [code["title"] for code in page.select("code.digest")]
        self.assertEqual(digests, [*(one["digest"] for one in found["lineage"]), found["reads"]["test"]])
        for code in page.select("code.digest"):
            self.assertEqual(code.get_text().replace("…", ""), code["title"])
        said = text_of(page.find(id="lineage").parent)
        for part in ("took 13 min, at most 2.7 GB of memory", "torch 2.13.0", "torch.bfloat16", "0.05 nats per token"):
            self.assertIn(part, said)
        runs = text_of(page.find(id="training").parent)
        for part in ("best, step 2", "62 s", "512.0 MB", "task adapter on the base, seed 0"):
            self.assertIn(part, runs)


if __name__ == "__main__":
    unittest.main()
