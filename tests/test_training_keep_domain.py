"""Keeping the domain while a task adapter is trained: the divergence by its formula, shares, decisions, resuming."""

from __future__ import annotations

import functools
import math
import shutil
import signal
import unittest
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from config import Config, LoraSection, TaskSection, TrainSection
from tests.support import Workspace, last_json, random_factors, relative
from utils.adapters import peft_model
from utils.artifacts import files
from utils.data.batches import BucketedPairs
from utils.data.mixed_in_documents import DocumentRows, DocumentWindows, DomainKeeping, HeldRows, KeptPairs
from utils.data.pair_rows import Pair
from utils.models.architectures import toy
from utils.models.losses import IGNORED, NextTokenLoss
from utils.models.rows import row_support
from utils.models.rows.row_support import RowSupport
from utils.training.keeping import keep_decision
from utils.training.keeping.keep_decision import DomainLook, KeepDomain

WEIGHTS = "adapter/adapter_model.safetensors"
TRAIN = [
    "--task.train.epochs",
    "3",
    "--task.train.learning_rate",
    "0.03",
    "--task.train.save_every_steps",
    "1",
    "--task.lora.dropout",
    "0.1",
]
# everything that is lost at all is too much
AUTO = ["--task.keep_domain", "auto", "--compose.domain_retention", "1"]


def documents(*lengths: int) -> Dataset:
    rows = [{"id": f"d{i}", "input_ids": list(range(1000 * i, 1000 * i + n))} for i, n in enumerate(lengths)]
    return Dataset.from_list([row | {"num_tokens": len(row["input_ids"])} for row in rows])


def pairs(count: int, prompt: int = 30, answer: int = 4, **train: Any) -> BucketedPairs:
    made = [Pair(f"q{i}", tuple(range(prompt + i % 5 + answer)), answer) for i in range(count)]
    return BucketedPairs(
        made, TrainSection(batch_tokens=384, micro_batch_tokens=128, max_sequence_tokens=64, **train), 3, 0
    )


class Divergence(unittest.TestCase):
    """KL(base + domain || base + domain + task), against the definition on logits of the whole model."""

    def setUp(self) -> None:
        torch.manual_seed(0)
        model, _ = toy.tiny_llama()
        model = peft_model.add(model, "domain", random_factors(model, ("q_proj", "up_proj"), 2, 4, 1))
        self.model = peft_model.attach(model, "task", LoraSection(rank=2, target_modules=("q_proj", "down_proj")))
        with torch.no_grad():
            for layer in peft_model.lora_layers(self.model, "task").values():
                torch.nn.init.normal_(layer.lora_B["task"].weight, std=0.3)
        peft_model.activate(self.model, ["domain", "task"], trainable="task")
        self.ids_BT = torch.randint(5, 200, (3, 12))
        self.positions_BT = torch.arange(12).expand(3, -1).contiguous()
        self.labels_BT = torch.full((3, 12), IGNORED)
        self.labels_BT[:, 8:11] = self.ids_BT[:, 9:12]
        self.kept_BT = torch.zeros(3, 12, dtype=torch.bool)
        self.kept_BT[0, :7], self.kept_BT[2, 2:5] = True, True  # the second row holds nothing

    def by_definition(self) -> torch.Tensor:
        with torch.no_grad():
            peft_model.activate(self.model, ["domain"])
            p_NV = self.model(self.ids_BT).logits[self.kept_BT].softmax(-1)
        peft_model.activate(self.model, ["domain", "task"], trainable="task")
        logits_BTV = self.model(self.ids_BT).logits
        log_q_NV = logits_BTV[self.kept_BT].log_softmax(-1)
        wanted = self.labels_BT != IGNORED
        log_probs = logits_BTV[wanted].log_softmax(-1).gather(1, self.labels_BT[wanted][:, None])
        return (p_NV * (p_NV.log() - log_q_NV)).sum() - log_probs.sum()

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, list(peft_model.trainable_parameters(self.model).values())))

    def test_loss_and_gradients_are_those_of_the_definition_for_both_kinds_of_head(self) -> None:
        expected = self.by_definition()
        wanted = self.gradients(expected)
        module = NextTokenLoss(self.model, lambda: peft_model.switched(self.model, ["domain"]))
        for head in ("fused", "model"):
            row_support.attach(self.model, RowSupport(head=head))
            found = module(self.ids_BT, self.positions_BT, self.labels_BT, self.kept_BT)
            self.assertAlmostEqual(float((found / expected).detach()), 1.0, places=5)
            for one, other in zip(self.gradients(found), wanted, strict=True):
                self.assertLess(relative(one, other), 1e-4)

    def test_what_is_on_and_trained_is_the_same_afterwards(self) -> None:
        self.model.train()
        module = NextTokenLoss(self.model, lambda: peft_model.switched(self.model, []))
        module(self.ids_BT, self.positions_BT, self.labels_BT, self.kept_BT)
        peft_model.refuse_other_state(self.model, ["domain", "task"], trainable="task")
        self.assertTrue(all(m.training for m in self.model.modules()))

    def test_without_kept_positions_nothing_is_added_and_no_second_pass_made(self) -> None:
        def refused() -> Any:
            raise AssertionError("a second pass")

        module = NextTokenLoss(self.model, refused)
        plain = module(self.ids_BT, self.positions_BT, self.labels_BT)
        held = module(self.ids_BT, self.positions_BT, self.labels_BT, torch.zeros_like(self.kept_BT))
        self.assertTrue(torch.equal(plain, held))


class Windows(unittest.TestCase):
    def test_a_window_is_consecutive_tokens_of_documents_and_a_function_of_its_number(self) -> None:
        source = documents(3, 700, 40, 1)
        for packs in (True, False):
            made = DocumentWindows(source, 64, 5, 0, packs=packs)
            numbers = range(200)
            for number in numbers:
                self.assertEqual(made.pieces(number), DocumentWindows(source, 64, 5, 0, packs=packs).pieces(number))
                batch = made.batch([number])
                labels, ids = batch.labels_BT[0], batch.input_ids_BT[0]
                trained = labels != IGNORED
                self.assertTrue(torch.equal(labels[trained], ids[trained] + 1))  # each document counts up
                self.assertEqual(batch.num_labels, made.num_labels([number]))
                sizes = [piece.end - piece.start for piece in made.pieces(number)]
                self.assertEqual(len(sizes) == 1 or packs, True)
                self.assertLessEqual(sum(sizes), 64)
            self.assertEqual(made.num_labels(numbers), made.batch(numbers).num_labels)
        self.assertNotEqual(
            [made.pieces(n) for n in numbers], [DocumentWindows(source, 64, 6, 0).pieces(n) for n in numbers]
        )

    def test_documents_are_drawn_by_their_length_and_every_token_can_be(self) -> None:
        made = DocumentWindows(documents(300, 100), 16, 0, 0)
        pieces = [piece for number in range(4000) for piece in made.pieces(number)]
        tokens = [sum(p.end - p.start for p in pieces if p.document == d) for d in (0, 1)]
        self.assertAlmostEqual(tokens[0] / sum(tokens), 0.75, delta=0.03)
        self.assertEqual({p.start for p in pieces if p.document == 1 and p.end - p.start == 16}, set(range(85)))


class Mixing(unittest.TestCase):
    def test_documents_are_the_asked_share_of_the_tokens_and_pairs_stay_what_they_are(self) -> None:
        for share in (0.05, 0.1, 0.5):
            data = KeptPairs(pairs(400), DocumentWindows(documents(5000), 32, 0, 0), share)
            seen: list[int] = []
            tokens = [0, 0]
            steps = [step for epoch in range(2) for step in data.steps(epoch)]
            for number, step in enumerate(steps):
                mixed = data.with_keeping(step, number, DomainKeeping("replay"))
                self.assertEqual(mixed[: len(step)], step)
                added = [n for rows in mixed[len(step) :] for n in rows]
                self.assertTrue(all(isinstance(rows, DocumentRows) for rows in mixed[len(step) :]))
                seen += added
                tokens[0] += sum(len(data.pairs.pairs[row].ids) for rows in step for row in rows)
                tokens[1] += 32 * len(added)
                labels = sum(data.batch(0, rows).num_labels for rows in mixed)
                self.assertEqual(data.num_labels(0, mixed), labels)
            self.assertEqual(seen, list(range(len(seen))), "a window is left out or read twice")
            self.assertAlmostEqual(tokens[1] / sum(tokens), share, delta=0.01)

    def test_micro_batches_decide_nothing_about_which_windows_a_step_has(self) -> None:
        found = []
        for micro in (64, 384):
            made = pairs(60)
            made.train = made.train.model_copy(update={"micro_batch_tokens": micro})
            data = KeptPairs(made, DocumentWindows(documents(500), 32, 0, 0), 0.3)
            mixed = [data.with_keeping(step, n, DomainKeeping("replay")) for n, step in enumerate(data.steps(0))]
            found.append([[n for rows in step if isinstance(rows, DocumentRows) for n in rows] for step in mixed])
        self.assertEqual(*found)

    def test_a_share_of_the_prompts_is_held_from_the_step_on_and_never_an_answer(self) -> None:
        data, keeping = KeptPairs(pairs(500), None, 0.2), DomainKeeping("kl", from_step=4)
        steps = data.steps(0)
        self.assertIs(data.with_keeping(steps[3], 3, keeping), steps[3])
        held = rows = 0
        for number, step in enumerate(steps[4:], 4):
            mixed = data.with_keeping(step, number, keeping)
            self.assertTrue(all(isinstance(micro, HeldRows) for micro in mixed))
            counted = 0
            for micro in mixed:
                batch = data.batch(0, micro)
                self.assertFalse((batch.kept_BT & (batch.labels_BT != IGNORED)).any())
                lengths = [len(data.pairs.pairs[row].ids) - 4 - 1 for row in micro]
                for length, kept in zip(lengths, batch.kept_BT, strict=True):
                    self.assertIn(int(kept.sum()), (0, length))
                held, rows = held + int(batch.kept_BT.any(-1).sum()), rows + len(micro)
                counted += batch.num_labels + int(batch.kept_BT.sum())
            self.assertEqual(data.num_labels(0, mixed), counted)
        self.assertAlmostEqual(held / rows, 0.2, delta=0.06)


class Decision(unittest.TestCase):
    SETTINGS = KeepDomain("auto", 0.1, retention=0.9, has_documents=True)

    def look(self, kept: float, *, gain: float = 1.0, noise: float = 0.05) -> DomainLook:
        count = 12
        base = [40.0 + 7 * i for i in range(count)]
        domain = [b - 10 * gain for b in base]
        now = [b - 10 * gain * (kept + noise * (-1) ** i) for i, b in enumerate(base)]
        return DomainLook(base, domain, now, tokens=10 * count)

    def test_share_that_is_left_and_its_error_are_those_of_a_ratio_of_sums(self) -> None:
        share, error = self.look(0.6).kept()
        self.assertAlmostEqual(share, 0.6)
        self.assertAlmostEqual(error, 0.05 / math.sqrt(11), places=6)

    def test_only_a_domain_that_is_shown_to_be_lost_turns_something_on(self) -> None:
        for kept, noise, how in (
            (0.95, 0.05, "off"),
            (0.89, 0.1, "off"),
            (0.8, 0.05, "replay"),
            (-1.0, 0.05, "replay"),
        ):
            found = keep_decision.decide(self.look(kept, noise=noise), self.SETTINGS, 9)
            self.assertEqual(found["how"], how, (kept, found["why"]))
            self.assertEqual(found["from_step"], 9 if how != "off" else 0)
            self.assertAlmostEqual(found["kept"], kept)
        without = KeepDomain("auto", 0.1, retention=0.9)
        self.assertEqual(keep_decision.decide(self.look(0.2), without, 9)["how"], "kl")
        nothing = keep_decision.decide(self.look(0.2, gain=-1.0), self.SETTINGS, 9)
        self.assertEqual(nothing["how"], "off")
        self.assertIn("does not gain", nothing["why"])

    def test_it_looks_once_at_a_quarter_and_not_where_there_is_nothing_to_look_at(self) -> None:
        self.assertEqual(self.SETTINGS.look_step(40), 10)
        self.assertEqual(self.SETTINGS.at_start(40), None)
        self.assertEqual(self.SETTINGS.at_start(1)["how"], "off")
        self.assertEqual(KeepDomain("auto", 0.1, why_not="no dev").at_start(40)["why"], "no dev")
        self.assertEqual(KeepDomain("kl", 0.1, from_step=3).at_start(40)["from_step"], 3)

    def test_settings_that_mean_nothing_are_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "keep_from_step 3 needs"):
            Config(task=TaskSection(keep_from_step=3))
        for share in (0.0, 0.95):
            with self.assertRaises(ValueError):
                TaskSection(replay_share=share)


class Runs(unittest.TestCase):
    place: Workspace
    whole: tuple[Path, dict[str, Any]]

    @classmethod
    def setUpClass(cls) -> None:
        cls.place = domain_trained()
        cls.whole = cls.trained("whole", *AUTO)

    @classmethod
    def trained(cls, name: str, *flags: str) -> tuple[Path, dict[str, Any]]:
        done = cls.place.run("train_task_adapter", *TRAIN, *flags, "--run.name", name)
        directory = Path(last_json(done)["run"])
        return directory, files.read_manifest(directory) | {"said": done.stderr}

    def test_stopped_after_the_look_and_resumed_equals_uninterrupted(self) -> None:
        whole, manifest = self.whole
        keeping = manifest["measured"]["keeping"]
        self.assertEqual((keeping["how"], keeping["decided_itself"]), ("replay", True), keeping)
        self.assertEqual(keeping["from_step"], round(keep_decision.LOOK_SHARE * manifest["measured"]["steps"]))
        self.assertIn("its documents are mixed in", manifest["said"])
        steps = lines(whole)
        script = self.place.start("train_task_adapter", *TRAIN, *AUTO, "--run.name", "stopped")
        stopped = whole.with_name("stopped")
        script.wait_until(lambda: len(lines(stopped)) > keeping["from_step"] + 1)
        script.signal(signal.SIGTERM)
        self.assertEqual(script.wait().returncode, 75)
        newest = max(stopped.glob("checkpoints/step-*"), key=lambda path: path.name)
        self.assertEqual(files.read_json(newest / "state.json")["keeping"], keeping)
        _, again = self.trained("stopped", *AUTO)
        self.assertIn("resumed", again["said"])
        self.assertEqual((whole / WEIGHTS).read_bytes(), (stopped / WEIGHTS).read_bytes())
        self.assertEqual(lines(stopped), steps)
        self.assertEqual(again["measured"]["keeping"], keeping)
        # what was decided, asked for: the same tokens at the same steps
        flags = ["--task.keep_domain", "replay", "--task.keep_from_step", str(keeping["from_step"])]
        asked, _ = self.trained("asked", *flags)
        self.assertEqual((whole / WEIGHTS).read_bytes(), (asked / WEIGHTS).read_bytes())

    def test_a_look_that_finds_nothing_changes_no_byte_and_off_is_a_run_of_before(self) -> None:
        off, manifest = self.trained("off", "--task.keep_domain", "off")
        self.assertNotIn("keep_domain", manifest["identity"])
        auto, decided = self.trained("kept", "--task.keep_domain", "auto", "--compose.domain_retention", "0")
        self.assertEqual(decided["measured"]["keeping"]["how"], "off")
        self.assertIn("not shown to be below", decided["measured"]["keeping"]["why"])
        self.assertEqual((off / WEIGHTS).read_bytes(), (auto / WEIGHTS).read_bytes())

    def test_on_the_base_it_does_what_the_stacked_one_decided(self) -> None:
        _, stacked = self.trained("whole", *AUTO)  # there already, and now the one that was asked for last
        keeping, said = stacked["measured"]["keeping"], stacked["identity"]["keep_domain"]
        _, base = self.trained("base", *AUTO, "--task.on", "base")
        wanted = {"how": "replay", "share": 0.1, "from_step": keeping["from_step"], "documents": said["documents"]}
        self.assertEqual(base["identity"]["keep_domain"], wanted)
        self.assertIn("as the adapter whose baseline this is", base["said"])

    def test_without_documents_replay_is_refused_with_what_needs_none(self) -> None:
        place = Workspace()
        shutil.copytree(self.place.models, place.models, dirs_exist_ok=True)
        shutil.rmtree(place.models / "task", ignore_errors=True)
        last_json(place.run("prepare_data", "--data.corpus", "none", "--data.task", str(place.task)))
        adapter = next((place.models / "domain").glob("*/adapter"))
        lone = place.root / "lone"
        shutil.copytree(adapter, lone)
        flags = ["--domain_adapter", str(lone), "--task.keep_domain"]
        refused = place.run("train_task_adapter", *flags, "replay")
        self.assertEqual(refused.returncode, 2, refused.stderr)
        self.assertIn("--task.keep_domain kl", refused.stderr)
        self.assertNotIn("Traceback", refused.stderr)
        found = last_json(place.run("train_task_adapter", *flags, "auto"))
        keeping = files.read_manifest(Path(found["run"]))["measured"]["keeping"]
        self.assertEqual((keeping["how"], keeping["why"]), ("off", "there are no dev documents to look at"))


@functools.cache
def domain_trained() -> Workspace:
    """A workspace with data and a domain adapter that has learnt something."""
    place = Workspace()
    place.run("prepare_data", *place.sources, "--data.heldout_share", "0.4")
    last_json(place.run("train_domain_adapter", "--domain.train.epochs", "6"))
    return place


def lines(directory: Path) -> list[tuple[float, ...]]:
    """(step, loss, gradient norm) of every step so far."""
    path = directory / "metrics.jsonl"
    text = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [files.json.loads(line) for line in text if line.endswith("}")]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


if __name__ == "__main__":
    unittest.main()
