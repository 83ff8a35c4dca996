"""The comparison as a person runs it: rows, controls, seeds, regimes, further models, what it refuses to hide."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import math
import re
import shutil
import signal
import unittest
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import ModelCard

from config import Config, TrainSection
from tests.report_support import soup
from tests.support import (
    ROOT,
    Workspace,
    document_text,
    expert_factors,
    forked,
    last_json,
    random_factors,
    temporary_directory,
    write_jsonl,
)
from utils import cli, flags
from utils.adapters.factors import ModuleFactors, norm, random_like
from utils.artifacts import files
from utils.evaluation import comparison, measures, test_reads
from utils.evaluation.documents import document_sets
from utils.evaluation.report import largest_differences
from utils.exceptions import ConfigError
from utils.export import hub
from utils.models.architectures import toy
from utils.training.schedules import active_adapters

FOUR = ["base", "domain", "task", "composed"]
STACKED = ["task_without_domain"]
PROTOCOL = ["--evaluate.controls", "--evaluate.seeds", "7", "--evaluate.wrong_corpus"]
CONTROLS = ["wrong_domain", "random", "rank_matched"]


@functools.cache
def trained() -> tuple[Workspace, dict[str, dict[str, Any]]]:
    """A workspace with data, a domain adapter and a stacked task adapter; no baseline yet."""
    place = Workspace(documents=48)
    prepared = last_json(place.run("prepare_data", *place.sources, "--data.heldout_share", "0.4"))
    reported = {"prepared": prepared, "domain": last_json(place.run("train_domain_adapter"))}
    reported["task"] = last_json(place.run("train_task_adapter", "--task.prompt_loss_weight", "0.5"))
    return place, reported


@functools.cache
def compared() -> tuple[Workspace, dict[str, Any], str]:
    """The whole protocol: controls, two seeds; what it returned and printed."""
    place, _ = trained()
    other = place.root / "other.jsonl"
    rows = [{"id": f"o{i}", "text": f"The {i}th boat sailed on a {i * 7}-mile river at dawn."} for i in range(40)]
    write_jsonl(other, rows)
    return place, *evaluated(place, *PROTOCOL, str(other))


def evaluated(place: Workspace, *flags: str) -> tuple[dict[str, Any], str]:
    """scripts/evaluate.py in this process, which trains what is missing."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        return script("evaluate").main(cli.resolve([*place.flags, *flags], {})), printed.getvalue()


def script(name: str) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Protocol(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.place, cls.found, cls.printed = compared()
        cls.results = files.read_json(Path(cls.found["run"]) / "results.json")

    def test_every_row_is_there_for_both_seeds(self) -> None:
        self.assertEqual(list(self.found["cells"]), [*FOUR, *STACKED, *CONTROLS])
        for name, cell in self.results["cells"].items():
            self.assertEqual(cell["seeds"], [None] if name == "base" else [0, 7], name)
            self.assertLessEqual({"domain_ppl", "general_ppl", "answer_nll", "choice_accuracy", "em", "f1"}, set(cell))

    def test_no_more_documents_are_scored_than_the_setting_allows_of_the_corpus_either(self) -> None:
        prepared = next(run for run in self.runs("../data/prepared"))
        for name, counted in (("heldout", "heldout_documents"), ("seen", "corpus")):
            there = prepared["counts"]["documents"][counted]["documents"]
            scored = files.read_json(Path(self.found["run"]) / "cell_base.json")[name]
            self.assertEqual(len(scored), min(8, there), name)
        self.assertGreater(there, 8)  # else the limit would not have been asked

    def test_last_line_has_the_verdict_and_all_four_contrasts(self) -> None:
        self.assertIn(self.found["verdict"], ("helps", "coexists", "interferes", "undecided"))
        self.assertEqual(list(self.found["contrasts"]), ["H1", "H2", "H3", "H4"])
        for contrast in self.found["contrasts"].values():
            self.assertTrue(contrast["low"] <= contrast["estimate"] <= contrast["high"])
            self.assertLessEqual(contrast["p"], contrast["p_holm"])
        self.assertIn(self.found["sentence"][:60], self.printed)

    def test_contrasts_are_differences_of_the_matrix(self) -> None:
        cells = self.found["cells"]
        gained = cells["task"]["answer_nll"] - cells["composed"]["answer_nll"]
        self.assertAlmostEqual(self.found["contrasts"]["H3"]["estimate"], gained, places=9)
        self.assertAlmostEqual(self.found["contrasts"]["H2"]["estimate"], gained, places=9)
        kept = cells["base"]["domain_nll"] - cells["composed"]["domain_nll"]
        learnt = cells["base"]["domain_nll"] - cells["domain"]["domain_nll"]
        self.assertAlmostEqual(self.found["contrasts"]["H1"]["estimate"], kept / learnt, places=9)
        control = self.results["closest_control"]
        over = cells[control]["answer_nll"] - cells["composed"]["answer_nll"]
        self.assertAlmostEqual(self.found["contrasts"]["H4"]["estimate"], over, places=9)

    def test_seeds_are_different_adapters_and_their_mean_is_what_the_matrix_says(self) -> None:
        for cell, numbers in self.results["by_seed"].items():
            self.assertEqual(len(set(numbers)), 2, cell)
            self.assertAlmostEqual(np.mean(numbers), self.found["cells"][cell]["answer_nll"], places=9)

    def test_controls_differ_from_the_real_thing_in_what_they_stand_for_alone(self) -> None:
        identities = [run["identity"] for run in self.runs("controls/domain", "controls/task", "task", "domain")]
        real = next(i for i in identities if i["stage"] == "domain" and "control" not in i and i["seed"] == 0)
        task = next(i for i in identities if i["stage"] == "task" and i["on"] == "domain" and i["seed"] == 0)
        wrong = [i for i in identities if i["stage"] == "domain" and i.get("data", real["data"]) != real["data"]]
        self.assertEqual([i["seed"] for i in sorted(wrong, key=lambda i: i["seed"])], [0, 7])
        for identity in wrong:
            changed = {key for key in real if identity[key] != real[key]} - {"seed"}
            self.assertEqual(changed, {"data", "train"})
            others = {k for k in real["train"] if identity["train"][k] != real["train"][k]}
            self.assertLessEqual(others, {"epochs", "max_steps"})
        on_base = [i for i in identities if i["stage"] == "task" and i["on"] == "base" and i["seed"] == 0]
        plain = next(i for i in on_base if i["lora"] == task["lora"])
        self.assertEqual({k for k in task if plain[k] != task[k]}, {"on", "domain_adapter"})
        matched = next(i for i in on_base if i["lora"] != task["lora"])
        self.assertEqual(matched["lora"]["rank"], real["lora"]["rank"] + task["lora"]["rank"])
        scales = [lora["alpha"] / lora["rank"] for lora in (matched["lora"], task["lora"])]
        self.assertEqual(*scales)
        self.assertEqual({i["prompt_loss_weight"] for i in identities if i["stage"] == "task"}, {0.5})

    def test_wrong_domain_adapter_is_trained_for_as_many_steps_as_the_real_one(self) -> None:
        steps = {run["measured"]["steps"] for run in self.runs("controls/domain", "domain") if run["measured"]}
        self.assertEqual(len(steps), 1, steps)

    def test_what_later_stages_take_by_default_is_not_moved_by_controls(self) -> None:
        _, reported = trained()
        for stage in ("domain", "task"):
            latest = files.read_json(self.place.models / stage / ".latest.json")["run"]
            self.assertEqual(latest, Path(reported[stage]["run"]).name)
            self.assertEqual(len(list((self.place.models / stage).glob("*/manifest.json"))), 1)

    def test_the_dry_run_says_how_many_adapters_are_trained(self) -> None:
        siblings = [run for run in self.runs("controls/domain", "controls/task") if "control" not in run["identity"]]
        domains, tasks = (sum(run["kind"] == kind for run in siblings) for kind in ("domain", "task"))
        done = self.place.run("evaluate", *PROTOCOL, str(self.place.root / "other.jsonl"), "--dry-run")
        self.assertIn(f"in all {domains} domain adapters and {tasks} task adapters are trained (about ", done.stdout)
        self.assertEqual((domains, tasks), (3, 9))
        plain = self.place.run("evaluate", "--dry-run")
        self.assertNotIn("are trained (", plain.stdout)

    def test_running_it_again_trains_and_scores_nothing(self) -> None:
        again = self.place.run("evaluate", *PROTOCOL, str(self.place.root / "other.jsonl"))
        self.assertTrue(last_json(again)["reused"])
        self.assertNotIn("making", again.stderr)
        self.assertEqual(last_json(again)["cells"], self.found["cells"])

    def test_manifest_names_every_run_that_took_part_and_the_test_items(self) -> None:
        manifest = files.verify(Path(self.found["run"]))
        wanted = {run["digest"] for run in self.runs("domain", "task", "controls/domain", "controls/task")}
        self.assertLessEqual(wanted, {parent["digest"] for parent in manifest["parents"]})
        self.assertRegex(manifest["test"], "[0-9a-f]{64}")

    def test_report_is_part_of_the_sealed_evaluation_and_names_every_row_and_run(self) -> None:
        listed = files.verify(Path(self.found["run"]))["files"]
        self.assertLessEqual({"report.html", "results.json", "summary.txt"}, set(listed))
        text = Path(self.found["report"]).read_text(encoding="utf-8")
        for cell in self.results["cells"].values():
            self.assertIn(f'<data value="{cell["answer_nll"]!r}">', text)
        for run in self.results["lineage"]:
            self.assertIn(f'title="{run["digest"]}"', text)
        for role in ("wrong-domain adapter, seed 7", "random adapter in the domain adapter&#39;s place, seed 0"):
            self.assertIn(role, text)

    def test_examples_are_the_largest_gains_and_losses(self) -> None:
        for kind, sign in (("won", 1), ("lost", -1)):
            gains = [sign * (e["nll"]["task"] - e["nll"]["composed"]) for e in self.results["examples"][kind]]
            self.assertEqual(gains, sorted(gains, reverse=True))
            self.assertTrue(all(gain > 0 for gain in gains))
            self.assertLessEqual(len(gains), 10)

    def test_cautions_name_what_weakens_the_numbers(self) -> None:
        said = " ".join(self.results["cautions"])
        self.assertIn("not chosen on dev", said)
        self.assertNotIn("One training seed", said)
        self.assertNotIn("name no document", said)

    def test_interference_is_answered_with_what_is_left_to_try(self) -> None:
        foreign = {"stage": "task", "on": "elsewhere"}
        own = {**foreign, "on": "domain", "train": {}}
        for verdict, identity, is_said in (
            ("interferes", own, True),
            ("interferes", {**own, "prompt_loss_weight": 0.1}, False),
            ("interferes", foreign, False),
            ("undecided", own, False),
        ):
            families = (mock.Mock(task=mock.Mock(manifest={"identity": identity})),)
            parts = mock.Mock(families=families, first=families[0], composed=None)
            said = comparison.cautions(Config(), {**self.results, "verdict": verdict}, parts)
            self.assertEqual("--task.prompt_loss_weight" in " ".join(said), is_said, (verdict, identity))

    def runs(self, *folders: str) -> list[dict[str, Any]]:
        found = [path for folder in folders for path in (self.place.models / folder).glob("*/manifest.json")]
        return [files.read_json(path) for path in found]


class Cards(unittest.TestCase):
    """A card is written after the evaluation only where it is published or merged; there it has the numbers."""

    def setUp(self) -> None:
        place, self.found, _ = compared()
        self.root = temporary_directory()
        shutil.copytree(place.models, self.root / "models")
        flags = ["--preset", "tiny_minimax_m2", "--run.data_dir", str(place.data)]
        self.flags = [*flags, "--run.models_dir", str(self.root / "models")]

    def test_merged_model_has_the_evaluation_of_its_adapters_in_its_card(self) -> None:
        target = self.root / "merged"
        last_json(forked("inference", *self.flags, "--merge_path", str(target)))
        measured = [one.metric_value for one in ModelCard.load(target / "README.md").data.eval_results]
        self.assertIn(self.found["cells"]["composed"]["answer_nll"], measured)

    def test_composed_adapter_is_pushed_with_its_evaluation(self) -> None:
        push = ["--push_to_hub", "--hub_model_id", "owner/name"]
        quiet = contextlib.redirect_stdout(io.StringIO())
        with quiet, mock.patch.object(hub, "check"), mock.patch.object(hub, "push", return_value="url") as pushed:
            script("compose").main(cli.resolve([*self.flags, *push], {}))
        evaluation = pushed.call_args.kwargs["evaluation"]
        self.assertEqual(evaluation.run.directory.name, Path(self.found["run"]).name)
        self.assertEqual(evaluation.results["cells"]["composed"]["em"], self.found["cells"]["composed"]["em"])


class Rows(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.place, cls.reported = trained()
        compared()  # its baseline is found by the others

    def test_without_controls_the_report_says_which_claim_is_not_supported(self) -> None:
        found = last_json(self.place.run("evaluate"))
        self.assertEqual(list(found["cells"]), [*FOUR, *STACKED])
        self.assertEqual(list(found["contrasts"]), ["H1", "H2", "H3"])
        self.assertIn("--evaluate.controls", found["untested"]["H4"])
        self.assertNotEqual(found["verdict"], "helps")

    def test_a_metric_of_ones_own_decides_and_every_seed_answers_every_question(self) -> None:
        mine = self.place.root / "mine.py"
        mine.write_text(
            "def share(prediction, example):\n"
            "    return (prediction == example['answers'][0]) + len(example['question']) % 5\n"
        )
        primary = ["--evaluate.primary", f"{mine}:share", "--evaluate.seeds", "7", "--evaluate.max_new_tokens", "4"]
        before = files.read_json(Path(evaluated(self.place)[0]["run"]) / "results.json")["reads"]["reads"]
        found, printed = evaluated(self.place, *primary)
        results = files.read_json(Path(found["run"]) / "results.json")
        for name in ("task-seed0", "task-seed7", "composed-seed7", "base"):
            answers = files.read_json(Path(found["run"]) / f"cell_{name}.json")["answers"]
            self.assertEqual(len(answers), results["test_items"], name)
        prepared = Path(trained()[1]["prepared"]["run"])
        asked = [json.loads(line)["question"] for line in (prepared / "task_test.jsonl").read_text().splitlines()]
        self.assertAlmostEqual(results["cells"]["base"]["own_metric"], np.mean([len(q) % 5 for q in asked]))
        cells = results["cells"]
        gain = cells["composed"]["own_metric"] - cells["task"]["own_metric"]
        self.assertAlmostEqual(results["contrasts"]["H3"]["estimate"], gain, places=9)
        self.assertEqual(results["primary"]["title"], "share")
        self.assertGreater(results["primary"]["margin"], 0)
        self.assertEqual((results["reads"]["reads"], len(results["reads"]["metrics"])), (before + 1, 2))
        self.assertIn("decided on share", " ".join(printed.split()))
        text = Path(found["report"]).read_text(encoding="utf-8")
        self.assertIn("answered by every seed", text)
        self.assertIn(f'<data value="{cells["composed"]["own_metric"]!r}">', text)

    def test_rows_with_retrieval_stand_beside_the_others_with_intervals_and_costs(self) -> None:
        found, printed = evaluated(self.place, "--evaluate.retrieval", "bm25")
        results = files.read_json(Path(found["run"]) / "results.json")
        cells, said = results["cells"], results["retrieval"]
        asked = ["base_retrieval", "task_retrieval", "composed_retrieval"]
        self.assertEqual(list(cells), [*FOUR, *STACKED, *asked])
        for cell in asked:
            own = cells[cell.removesuffix("_retrieval")]
            self.assertNotEqual(cells[cell]["answer_nll"], own["answer_nll"])
            self.assertNotIn("domain_nll", cells[cell])  # documents do not depend on passages
            self.assertLess(
                said["costs"][cell.removesuffix("_retrieval")]["prompt_tokens"], said["costs"][cell]["prompt_tokens"]
            )
            gain = cells["base"]["answer_nll"] - cells[cell]["answer_nll"]
            self.assertAlmostEqual(said["gains"][cell]["estimate"], gain, places=9)
        best = min(said["on_dev"], key=lambda one: one["answer_nll"])
        self.assertEqual((said["passages"], said["tokens"]), (best["passages"], best["tokens"]))
        self.assertIn(said["sentence"][:60], " ".join(printed.split()))
        page = soup(Path(found["report"]).read_text(encoding="utf-8"))
        self.assertIn(said["sentence"], page.find(id="retrieval").parent.get_text())
        # what was found by others is asked in the same way, and is another evaluation
        ids = [item["name"] for item in files.read_json(Path(found["run"]) / "cell_base.json")["items"]]
        theirs = self.place.root / "theirs.jsonl"
        write_jsonl(theirs, [{"id": name, "passages": [document_text(1)[:60]]} for name in ids])
        other, _ = evaluated(self.place, "--evaluate.retrieval", str(theirs))
        self.assertNotEqual(other["run"], found["run"])
        self.assertEqual(files.read_json(Path(other["run"]) / "results.json")["retrieval"]["how"], "theirs.jsonl")

    def test_a_task_adapter_trained_with_passages_is_another_run_with_other_pairs(self) -> None:
        step = ["--task.train.max_steps", "1", "--task.train.max_sequence_tokens", "256"]
        completed = [self.place.run("train_task_adapter", *step, *more) for more in ([], ["--task.retrieval", "true"])]
        runs = [last_json(one) for one in completed]
        without, trained_with = (files.read_manifest(Path(run["run"]))["identity"] for run in runs)
        self.assertEqual(trained_with.pop("retrieval"), {"passages": 3, "tokens": 128})
        self.assertEqual(trained_with, without)
        self.assertEqual(["pairs have passages" in one.stderr for one in completed], [False, True])
        weights = [Path(run["adapter"]) / "adapter_model.safetensors" for run in runs]
        self.assertNotEqual(*map(files.sha256_file, weights))
        for run in runs:  # the next tests want the stacked one as the newest
            shutil.rmtree(run["run"])

    def test_further_rows_are_scored_beside_the_others(self) -> None:
        merged = self.place.root / "merged"
        last_json(self.place.run("inference", "--merge_path", str(merged)))
        adapter = Path(self.reported["domain"]["run"]) / "adapter"
        also = f"{merged},{adapter},{self.reported['task']['run']}"
        cells = last_json(self.place.run("evaluate", "--evaluate.also", also))["cells"]
        of_merged, of_adapter, of_task = list(cells)[-3:]
        for key in ("answer_nll", "domain_nll", "general_nll"):
            self.assertAlmostEqual(cells[of_merged][key], cells["composed"][key], places=4)
            self.assertAlmostEqual(cells[of_adapter][key], cells["domain"][key], places=5)
            self.assertAlmostEqual(cells[of_task][key], cells["composed"][key], places=5)

    def test_model_with_another_tokenizer_is_refused(self) -> None:
        directory = temporary_directory() / "other"
        model, _ = toy.tiny_llama()
        model.save_pretrained(directory)
        toy.tiny_tokenizer(700).save_pretrained(directory)
        refused = self.place.run("evaluate", "--evaluate.also", str(directory))
        self.assertEqual(refused.returncode, 2, refused.stderr[-1000:])
        self.assertIn("another tokenizer", refused.stderr)
        self.assertNotIn("Traceback", refused.stderr)

    def test_reading_the_test_split_again_for_other_weights_is_counted_and_shown(self) -> None:
        before = files.read_json(Path(last_json(self.place.run("evaluate"))["run"]) / "results.json")["reads"]
        other = self.place.run("evaluate", "--weights", "0.5,1")
        after = files.read_json(Path(last_json(other)["run"]) / "results.json")["reads"]
        self.assertEqual(after["test"], before["test"])
        self.assertGreater(after["reads"], before["reads"])
        self.assertIn(f"was read {after['reads']} times", " ".join(other.stdout.split()))

    def test_what_was_edited_in_an_interrupted_evaluation_is_scored_again(self) -> None:
        flags = ["--run.name", "edited"]
        whole = last_json(self.place.run("evaluate", *flags))
        directory = Path(whole["run"])
        for name in (files.MANIFEST, "results.json"):
            (directory / name).unlink()
        for cell in ("cell_composed-seed0.json", "cell_base.json"):
            text = (directory / cell).read_text()
            halved = re.sub(r'("nll": )([0-9.e-]+)', lambda found: found[1] + str(float(found[2]) / 2), text)
            self.assertNotEqual(halved, text)
            (directory / cell).write_text(halved)
        completed = self.place.run("evaluate", *flags)
        self.assertEqual(last_json(completed)["cells"], whole["cells"])
        self.assertEqual(completed.stderr.count("is not as it was written"), 2, completed.stderr[-2000:])

    def test_a_seed_that_is_there_already_is_refused(self) -> None:
        refused = self.place.run("evaluate", "--evaluate.seeds", "0")
        self.assertEqual(refused.returncode, 2)
        self.assertIn("this seed is there already", refused.stderr)

    def test_general_text_that_is_not_there_is_refused(self) -> None:
        refused = self.place.run("evaluate", "--evaluate.general_text", "nowhere.txt")
        self.assertEqual(refused.returncode, 2)
        self.assertIn("nowhere.txt", refused.stderr)


class Documents(unittest.TestCase):
    def test_only_items_that_share_their_document_with_none_are_said_to_name_none(self) -> None:
        # the demo asks about `array` and `array.append`: the first has its document's name and is not alone
        named = [("array", "array"), ("array.append", "array"), ("q1", "q1"), ("q2", "gc")]
        on = mock.Mock(examples=[{"id": name, "document": document} for name, document in named])
        self.assertEqual(comparison._without_document(on), 1)

    def test_too_few_held_out_documents_for_a_claim_are_said_before_anything_is_scored(self) -> None:
        directory = temporary_directory()
        (directory / "heldout_documents").mkdir()
        rows = [{"id": f"d{i}", "input_ids": [1, 2, 3], "num_tokens": 3, "utf8_bytes": 3} for i in range(8)]
        source = mock.Mock(directory=directory, documents=lambda which: Dataset.from_list(rows))
        more, none = "max_heldout_documents 8 scores all", "no setting of this command adds any"
        for limit, there, advice in ((5, 8, more), (6, 8, ""), (0, 8, ""), (5, 1, none), (0, 1, none)):
            source.documents = lambda which, there=there: Dataset.from_list(rows[:there])
            config = cli.resolve(["--evaluate.max_heldout_documents", str(limit)], {})
            with (
                mock.patch.object(document_sets, "warning") as said,
                mock.patch.object(document_sets, "_window", return_value=TrainSection(max_sequence_tokens=1024)),
            ):
                found = document_sets.of_data(config.evaluate, 0, mock.Mock(), source, 0)["heldout"]
            self.assertEqual(len(found.lengths), min(limit or 8, there))
            self.assertEqual(said.called, bool(advice), limit)
            self.assertIn(advice, str(said.call_args))


class Regimes(unittest.TestCase):
    def test_domain_ready_stops_and_goes_on_to_the_same_adapter(self) -> None:
        place, reported = trained()
        flags = ["--task.on", "domain_ready", "--task.train.epochs", "6", "--task.train.save_every_steps", "1"]
        whole = last_json(place.run("train_task_adapter", *flags, "--run.name", "whole"))
        running = place.start("train_task_adapter", *flags, "--run.name", "stopped")
        running.wait_until(lambda: any((place.models / "task" / "stopped" / "checkpoints").glob("step-*")))
        running.signal(signal.SIGTERM)
        self.assertIn(running.wait().returncode, (0, 75))
        again = last_json(place.run("train_task_adapter", *flags, "--run.name", "stopped"))
        weights = [Path(run["adapter"]) / "adapter_model.safetensors" for run in (whole, again)]
        self.assertEqual(*map(files.sha256_file, weights))
        manifest = files.read_manifest(Path(whole["run"]))
        self.assertEqual(manifest["identity"]["on"], "domain_ready")
        self.assertNotIn("prompt_loss_weight", manifest["identity"])  # 0, as in adapters from before there was one
        self.assertIn(reported["domain"]["digest"], [parent["digest"] for parent in manifest["parents"]])
        for run in (whole, again):  # the next tests want the stacked one as the newest
            shutil.rmtree(run["run"])

    def test_domain_ready_sees_the_domain_in_about_half_of_the_steps_and_always_on_dev(self) -> None:
        seen = [active_adapters.domain_is_on(0, step) for step in range(1000)]
        self.assertAlmostEqual(sum(seen) / 1000, 0.5, delta=0.05)
        self.assertEqual(seen, [active_adapters.domain_is_on(0, step) for step in range(1000)])
        self.assertNotEqual(seen, [active_adapters.domain_is_on(1, step) for step in range(1000)])
        self.assertTrue(active_adapters.domain_is_on(0, None))


class RandomControl(unittest.TestCase):
    def test_random_adapter_has_the_norm_of_the_real_one_in_every_module_and_expert(self) -> None:
        model, _ = toy.tiny_minimax_m2()
        real = random_factors(model, ("q_proj", "o_proj"), 4, 8, 1) | expert_factors(model, 2, 4, 2)
        made = random_like(real, 5)
        self.assertEqual(set(made), set(real))
        for name, f in real.items():
            pairs = [(f, made[name])]
            if f.is_experts:
                pairs = [
                    tuple(ModuleFactors(m.a_rI[e], m.b_Or[e], m.scale) for m in (f, made[name]))
                    for e in range(len(f.a_rI))
                ]
            for theirs, ours in pairs:
                self.assertAlmostEqual(norm(ours) / norm(theirs), 1.0, places=5)
                self.assertFalse(torch.equal(ours.a_rI, theirs.a_rI))

    def test_random_adapter_is_a_function_of_the_seed(self) -> None:
        model, _ = toy.tiny_llama()
        real = random_factors(model, ("q_proj",), 4, 8, 1)
        one, same, other = (next(iter(random_like(real, seed).values())).b_Or for seed in (1, 1, 2))
        self.assertTrue(torch.equal(one, same))
        self.assertFalse(torch.equal(one, other))


class Measures(unittest.TestCase):
    SCORES: ClassVar[dict[str, Any]] = {
        "items": [
            {
                "name": f"q{i}",
                "document": f"d{i // 2}",
                "answer_nll": float(i + 1),
                "answer_tokens": 2 + i % 3,
                "end_nll": 0.5,
                "choice_nlls": [1.0, 2.0] if i % 2 else [2.0, 1.0],
                "choice_tokens": [1, 4],
                "answer_index": 0,
            }
            for i in range(16)
        ],
        "heldout": [{"name": f"t{i}", "nll": 30.0 + i, "tokens": 10 + i, "utf8_bytes": 50} for i in range(8)],
        "seen": [],
        "general": [],
        "answers": [
            {
                "name": f"q{i}",
                "document": f"d{i}",
                "text": "x",
                "tokens": 3 + i,
                "ended": i < 6,
                "repetitive": i == 0,
                "thinking_left": False,
                "exact_match": float(i < 2),
                "f1": 0.25,
            }
            for i in range(8)
        ],
    }

    def test_measures_are_sums_over_sums(self) -> None:
        found = measures.measured([self.SCORES], {"resamples": 200, "seed": 0})
        items, documents = self.SCORES["items"], self.SCORES["heldout"]
        tokens = sum(i["answer_tokens"] for i in items)
        self.assertAlmostEqual(found["answer_nll"], sum(i["answer_nll"] for i in items) / tokens)
        nll = sum(d["nll"] for d in documents)
        self.assertAlmostEqual(found["domain_ppl"], math.exp(nll / sum(d["tokens"] for d in documents)))
        self.assertAlmostEqual(found["domain_nll_per_byte"], nll / 400)
        self.assertEqual((found["choice_accuracy"], found["choice_accuracy_per_token"]), (0.5, 0.0))
        self.assertEqual((found["em"], found["f1"]), (0.25, 0.25))
        self.assertEqual(found["format"]["ended"], 0.75)
        self.assertEqual(found["format"]["tokens"], 6.5)

    def test_what_the_data_do_not_support_is_absent(self) -> None:
        items = [{**i, "choice_nlls": [], "choice_tokens": [], "answer_index": None} for i in self.SCORES["items"]]
        found = measures.measured([{"items": items}], {"resamples": 200, "seed": 0})
        self.assertEqual(set(found), {"answer_nll", "end_of_turn_nll", "intervals"})

    def test_examples_are_chosen_by_the_gain_per_token(self) -> None:
        ours = self.SCORES["items"]
        others = [{**i, "answer_nll": i["answer_nll"] + (4 - n) * i["answer_tokens"]} for n, i in enumerate(ours)]
        found = largest_differences.chosen({"items": ours}, {"items": others})
        self.assertEqual(found["won"], ["q0", "q1", "q2", "q3"])
        self.assertEqual(found["lost"][:3], ["q15", "q14", "q13"])
        self.assertEqual(len(found["lost"]), 10)


class Reads(unittest.TestCase):
    def test_each_comparison_is_counted_once_and_a_torn_line_is_none(self) -> None:
        folder = temporary_directory()
        self.assertEqual(test_reads.record(folder, test="t", composed="a", run="r1")["reads"], 1)
        with (folder / test_reads.RECORD).open("a") as handle:
            handle.write('{"test": "t", "comp\n')
        self.assertEqual(test_reads.record(folder, test="t", composed="a", run="r1")["reads"], 1)
        test_reads.record(folder, test="other", composed="a", run="r2")
        found = test_reads.record(folder, test="t", composed="b", run="r3")
        self.assertEqual((found["reads"], found["models"], found["reads_of_this"]), (2, 2, 1))
        self.assertIn("read 2 times, 1 of them for these adapters", test_reads.sentence(found))
        self.assertEqual(test_reads.sentence({**found, "reads": 1}), "")

    def test_a_record_that_was_edited_is_said_to_be(self) -> None:
        folder = temporary_directory()
        for run in ("r1", "r2"):
            test_reads.record(folder, test="t", composed="a", run=run)
        path = folder / test_reads.RECORD
        path.write_text(path.read_text().replace('"test": "t"', '"test": "u"', 1) + "[1]\n\xff")
        found = test_reads.record(folder, test="t", composed="a", run="r3")
        self.assertEqual((found["reads"], found["doubtful"]), (2, 1))
        self.assertIn("1 lines of .test_reads.jsonl", test_reads.sentence({**found, "reads": 1}))

    def test_items_are_identified_whatever_their_order(self) -> None:
        self.assertEqual(test_reads.digest(["a", "b"], ["x", "y"]), test_reads.digest(["b", "a"], ["y", "x"]))
        self.assertNotEqual(test_reads.digest(["a", "b"], ["x", "y"]), test_reads.digest(["a", "b"], ["x", "z"]))


class Flags(unittest.TestCase):
    def test_settings_survive_the_way_through_a_command_line(self) -> None:
        given = ["--preset", "tiny_minimax_m2", "--task.lora.rank", "7", "--data.corpus", "a,b c", "--data.task", "x"]
        config = cli.resolve([*given, "--run.trackers", "[]", "--task.lora.use_rslora"], {})
        again = cli.resolve(flags.arguments(config, ("task", "data", "run")), {})
        for section in ("task", "data", "run"):
            self.assertEqual(getattr(again, section), getattr(config, section))
        self.assertEqual(cli.resolve(flags.arguments(config, ("task",)), {}).data, cli.resolve(given[:2], {}).data)

    def test_the_launcher_that_is_no_setting_any_more_says_what_to_do(self) -> None:
        for given, environment in ((["--evaluate.launcher", "x"], {}), ([], {"DTA_EVALUATE__LAUNCHER": "x"})):
            with self.assertRaisesRegex(ConfigError, "accelerate launch --config_file FILE scripts/evaluate.py"):
                cli.resolve(given, environment)


if __name__ == "__main__":
    unittest.main()
