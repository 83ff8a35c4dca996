"""Training promises: the same bytes after any interruption, a loss per token, and a stop at the first bad number."""

from __future__ import annotations

import functools
import json
import math
import random
import shutil
import signal
import time
import unittest
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from config import TrainSection
from tests.support import Completed, Script, Workspace, last_json, temporary_directory, write_jsonl
from utils import logger
from utils.adapters import adapter_files, peft_model
from utils.artifacts import files
from utils.data.batches import PackedDocuments
from utils.data.prepared import Prepared
from utils.inference.scoring import score_documents
from utils.training.schedules.learning_rate import learning_rate
from utils.training.steps import FEWEST_STEPS

SETTINGS = {
    "epochs": 2,
    "batch_tokens": 256,
    "micro_batch_tokens": 128,
    "save_every_steps": 2,
    "evals_per_epoch": 2,
    "keep": "best",
}
TRAIN = [f"--domain.train.{name}={value}" for name, value in SETTINGS.items()] + ["--domain.lora.dropout=0.1"]
RANDOM = random.Random(20)
WEIGHTS, MANIFEST = "adapter_model.safetensors", "manifest.json"


class LearningRate(unittest.TestCase):
    def test_learning_rate_is_a_linear_warm_up_then_a_cosine_to_its_floor(self) -> None:
        settings = TrainSection(learning_rate=0.5, warmup_ratio=0.1, min_learning_rate_ratio=0.2)
        total, warmup = 100, 10
        for step in range(total):
            if step < warmup:
                expected = 0.5 * (step + 1) / warmup
            else:
                cosine = (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
                expected = 0.5 * (0.2 + 0.8 * cosine)
            self.assertAlmostEqual(learning_rate(step, total, settings), expected, places=12)

    def test_learning_rate_is_never_zero_in_a_run_of_one_step(self) -> None:
        self.assertEqual(learning_rate(0, 1, TrainSection(learning_rate=0.5)), 0.5)


class Runs(unittest.TestCase):
    """Runs of the domain adapter in one workspace, each under a name of its own."""

    place: Workspace
    reference: Path

    @classmethod
    def setUpClass(cls) -> None:
        cls.place = prepared_workspace()
        cls.reference = cls.place.models / "domain" / "reference"

    def run_named(self, name: str, *arguments: str) -> Completed[str]:
        return self.place.run("train_domain_adapter", "--run.name", name, *TRAIN, *arguments)

    def started(self, name: str, steps: int) -> tuple[Script, Path]:
        """A run that has written at least this many lines of metrics."""
        directory = self.place.models / "domain" / name
        script = self.place.start("train_domain_adapter", "--run.name", name, *TRAIN)
        script.wait_until(lambda: len(metrics(directory)) >= steps)
        return script, directory

    def assert_same_as_reference(self, directory: Path) -> None:
        weights = "adapter/adapter_model.safetensors"
        self.assertEqual((directory / weights).read_bytes(), (self.reference / weights).read_bytes())
        self.assertEqual(losses(directory), losses(self.reference))
        self.assertEqual([m["step"] for m in metrics(directory)], [m["step"] for m in metrics(self.reference)])


class Interruption(Runs):
    def test_interrupted_and_resumed_equals_uninterrupted(self) -> None:
        for at in sorted(RANDOM.sample(range(3, len(metrics(self.reference)) - 4), 2)):
            script, directory = self.started("killed", at)
            time.sleep(RANDOM.random() * 0.05)
            script.signal(signal.SIGKILL)
            self.assertEqual(script.wait().returncode, -signal.SIGKILL, "it ended before it was killed")
            self.assertFalse((directory / "manifest.json").exists())
        completed = self.run_named("killed")
        last_json(completed)
        self.assertRegex(completed.stderr, r"resumed +step=\d*[02468]\b")
        self.assert_same_as_reference(directory)

    def test_terminated_run_writes_a_checkpoint_exits_75_and_resumes_to_the_same_bytes(self) -> None:
        script, directory = self.started("terminated", 4)
        script.signal(signal.SIGTERM)
        completed = script.wait()
        self.assertEqual(completed.returncode, 75, completed.stderr)
        done = max(m["step"] for m in metrics(directory))
        self.assertEqual(newest_checkpoint(directory).name, f"step-{done:08d}")
        self.assertIn(f"stopped at step {done} of ", completed.stderr)
        last_json(self.run_named("terminated"))
        self.assert_same_as_reference(directory)

    def test_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(self) -> None:
        script, directory = self.started("damaged", 7)
        script.signal(signal.SIGTERM)
        self.assertEqual(script.wait().returncode, 75)
        newest = newest_checkpoint(directory)
        flip_a_bit(newest / "adapter.safetensors")
        completed = self.run_named("damaged")
        last_json(completed)
        self.assertIn("a damaged checkpoint was set aside", completed.stderr)
        self.assertIn("resumed", completed.stderr)
        self.assertEqual(len(list(directory.glob(f"checkpoints/invalid-{newest.name}"))), 1)
        self.assert_same_as_reference(directory)

    def test_a_second_process_on_a_running_directory_is_refused(self) -> None:
        script, directory = self.started("held", 2)
        script.signal(signal.SIGSTOP)
        try:
            completed = self.run_named("held")
        finally:
            script.signal(signal.SIGKILL)
        script.wait()
        self.assertEqual(completed.returncode, 2, completed.stderr)
        self.assertIn(f"{directory} is in use by process {script.process.pid}", completed.stderr)

    def test_changed_settings_under_the_same_name_are_refused_and_nothing_is_touched(self) -> None:
        before = {p: p.read_bytes() for p in files.artefact_files(self.reference)}
        completed = self.run_named("reference", "--domain.lora.rank", "5")
        self.assertEqual(completed.returncode, 2, completed.stderr)
        self.assertIn("lora.rank was 4, now 5", completed.stderr)
        self.assertEqual({p: p.read_bytes() for p in files.artefact_files(self.reference)}, before)


class WithoutDev(unittest.TestCase):
    def test_resumed_run_without_dev_data_publishes_its_last_state(self) -> None:
        place = Workspace()
        place.run("prepare_data", *place.sources, "--data.heldout_share", "0")
        directory = place.models / "domain" / "resumed"
        sizes = [f"--domain.train.{name}=128" for name in ("batch_tokens", "micro_batch_tokens")]
        command = ["--domain.train.save_every_steps=2", "--domain.train.keep=best", *sizes]
        script = place.start("train_domain_adapter", "--run.name", "resumed", *command)
        script.wait_until(lambda: len(metrics(directory)) >= 5)
        script.signal(signal.SIGTERM)
        self.assertEqual(script.wait().returncode, 75)
        last_json(place.run("train_domain_adapter", "--run.name", "resumed", *command))
        last_json(place.run("train_domain_adapter", "--run.name", "whole", *command))
        found, expected = ((place.models / "domain" / name / "adapter") for name in ("resumed", "whole"))
        self.assertEqual(files.sha256_file(found / WEIGHTS), files.sha256_file(expected / WEIGHTS))


class Numbers(Runs):
    def test_first_loss_is_the_mean_nll_per_predicted_token_of_the_documents(self) -> None:
        manifest = files.read_json(self.reference / "manifest.json")
        data = Prepared(Path(manifest["parents"][0]["path"]))
        settings = TrainSection(**SETTINGS, max_sequence_tokens=128)
        packed = PackedDocuments(data.documents("corpus"), settings, 0, 0)
        model = self.base()
        total = count = 0
        for rows in packed.steps(0)[0]:
            for piece in (p for row in rows for p in packed.rows(0)[row]):
                ids = torch.tensor(data.documents("corpus")[piece.document]["input_ids"][piece.start : piece.end + 1])
                with torch.no_grad():
                    logits = model(ids[None, :-1]).logits[0] if len(ids) > 1 else torch.zeros(0, 1)
                total += float(F.cross_entropy(logits, ids[1:], reduction="sum")) if len(ids) > 1 else 0.0
                count += len(ids) - 1
        self.assertAlmostEqual(losses(self.reference)[0] / (total / count), 1.0, places=5)

    def test_loss_does_not_depend_on_micro_batches(self) -> None:
        for name, micro in (("micro-1", 128), ("micro-4", 512)):
            flags = [f"--domain.train.micro_batch_tokens={micro}", "--domain.train.batch_tokens=512"]
            last_json(self.run_named(name, *flags, "--domain.lora.dropout=0", "--domain.train.epochs=1"))
        one, four = (losses(self.place.models / "domain" / name) for name in ("micro-1", "micro-4"))
        self.assertEqual(len(one), len(four))
        for a, b in zip(one, four, strict=True):
            self.assertAlmostEqual(a / b, 1.0, places=5)

    def test_a_nan_in_one_base_weight_stops_the_run_and_names_the_step(self) -> None:
        directory = temporary_directory() / "base"
        shutil.copytree(self.place.models / "base" / "tiny-minimax-m2", directory)
        (directory / "manifest.json").unlink()  # with it, the change itself would be refused
        state = load_file(directory / "model.safetensors")
        state["model.layers.1.self_attn.o_proj.weight"][3, 5] = float("nan")
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        completed = self.run_named("nan", "--base.source", str(directory))
        self.assertEqual(completed.returncode, 3, completed.stderr)
        self.assertIn("the loss of step 1 is NaN or infinite", completed.stderr)
        self.assertNotIn("Traceback", completed.stderr)
        self.assertFalse((self.place.models / "domain" / "nan" / "manifest.json").exists())

    def test_task_training_leaves_the_domain_adapter_as_it_was(self) -> None:
        before = files.sha256_file(self.reference / "adapter" / WEIGHTS)
        result = last_json(self.place.run("train_task_adapter", "--domain_adapter", str(self.reference)))
        self.assertEqual(files.sha256_file(self.reference / "adapter" / WEIGHTS), before)
        self.assertEqual(files.verify(self.reference)["digest"], files.read_json(self.reference / MANIFEST)["digest"])
        parents = {p["kind"]: p["digest"] for p in files.read_json(Path(result["run"]) / MANIFEST)["parents"]}
        self.assertEqual(parents["domain"], files.read_json(self.reference / MANIFEST)["digest"])

    def test_max_steps_overrides_epochs_and_what_will_be_trained_is_said_before(self) -> None:
        steps = len(metrics(self.reference)) // 2 + 2  # of the reference's two passes
        completed = self.run_named("overridden", "--domain.train.epochs=1", f"--domain.train.max_steps={steps}")
        found = last_json(completed)
        self.assertEqual(found["steps"], steps)
        said = next(line for line in completed.stderr.splitlines() if "what will be trained" in line)
        self.assertRegex(said, rf"steps={steps}\b.*passes=1\.\d+.*trained_tokens=[1-9]")
        self.assertEqual(max(m["epoch"] for m in metrics(self.place.models / "domain" / "overridden")), 1)
        self.assertEqual("teach little" in completed.stderr, steps < FEWEST_STEPS)

    def test_other_data_than_the_newest_adapter_had_is_said_with_the_way_back(self) -> None:
        before = files.read_json(self.reference / MANIFEST)["parents"][0]["path"]
        other = last_json(self.place.run("prepare_data", *self.place.sources, "--data.dev_share", "0.3"))
        self.assertNotEqual(Path(before), Path(other["run"]))
        changed = self.run_named("other_data", "--domain.train.max_steps=2")  # which takes the newest
        self.assertIn(
            "other data than the newest domain adapter had; --inputs.prepared takes that again", changed.stderr
        )
        self.assertIn(str(before), changed.stderr)
        same = self.run_named("same_data", "--domain.train.max_steps=2")
        self.assertNotIn("other data than", same.stderr)
        last_json(self.place.run("prepare_data", *self.place.sources))  # the newest again, for the other tests

    def test_a_learning_rate_that_ruins_the_model_is_said(self) -> None:
        warning = "made the model worse"
        # the toy itself knows nothing that could be lost: what it learnt before is
        start = ["--domain.train.max_steps=3", f"--domain.init_from={self.reference}"]
        self.assertNotIn(warning, self.run_named("learning", *start).stderr)
        bad = self.run_named("ruined", *start, "--domain.train.learning_rate=100")
        self.assertIn(warning, bad.stderr)
        self.assertIn("lower --domain.train.learning_rate (it is 100)", bad.stderr)

    def test_training_lowers_the_loss(self) -> None:
        found = losses(self.reference)
        quarter = len(found) // 4
        self.assertLess(sum(found[-quarter:]), sum(found[:quarter]))

    def test_the_published_adapter_is_the_best_on_dev_or_the_last_as_asked(self) -> None:
        # dev documents unlike the corpus: learning the one unlearns the other before the end
        place = Workspace()
        # and unlike each other: near duplicates would stand on one side of dev and held-out
        foreign = [{"text": "".join(Random(at).choices("7+5=12; ÄÖÜ?", k=400))} for at in range(4)]
        heldout = write_jsonl(place.root / "heldout.jsonl", foreign)
        last_json(place.run("prepare_data", *place.sources, "--data.corpus_heldout", str(heldout)))
        for keep in ("best", "last"):
            flags = [f"--domain.train.keep={keep}", "--domain.train.learning_rate=0.05"]
            result = last_json(place.run("train_domain_adapter", *TRAIN, *flags))
            manifest = files.read_json(Path(result["run"]) / MANIFEST)
            measured = manifest["measured"]
            dev_losses = dict(measured["dev_losses"])
            self.assertEqual(len(dev_losses), 2 * 2, "two measurements in each of two epochs")
            best = min(dev_losses, key=lambda step: dev_losses[step])
            self.assertLess(best, measured["steps"], "the last is the best: this run tells nothing")
            self.assertEqual(measured["kept_step"], best if keep == "best" else measured["steps"])
            data = Prepared(Path(manifest["parents"][0]["path"])).documents("dev_documents")
            packed = PackedDocuments(data, TrainSection(**SETTINGS, max_sequence_tokens=128), 0, 0)
            model = peft_model.add(self.base(), "domain", adapter_files.load(Path(result["adapter"]))).eval()
            scores = score_documents(model, packed, batch_tokens=128, device=torch.device("cpu"), what="dev")
            found = sum(score.nll for score in scores) / sum(score.tokens for score in scores)
            self.assertAlmostEqual(found / dev_losses[measured["kept_step"]], 1.0, places=5)

    def base(self) -> torch.nn.Module:
        with logger.quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(self.place.models / "base" / "tiny-minimax-m2")
        return model.requires_grad_(False).eval()


@functools.cache
def prepared_workspace() -> Workspace:
    """Prepared data and one finished run, `reference`."""
    place = Workspace()
    place.prepare()
    last_json(place.run("train_domain_adapter", "--run.name", "reference", *TRAIN))
    return place


def metrics(directory: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl with a training loss, whole ones only."""
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if "loss" in row]


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in metrics(directory)]


def newest_checkpoint(directory: Path) -> Path:
    return max((directory / "checkpoints").glob("step-*"), key=lambda path: path.name)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes(bytes(content))


if __name__ == "__main__":
    unittest.main()
