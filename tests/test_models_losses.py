"""Likelihoods: the training loss is cross-entropy, and many candidates scored in one row equal each scored alone."""

from __future__ import annotations

import math
import random
import unittest
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from datasets import Dataset

from config import TrainSection
from tests.support import ARCHITECTURES, relative, toy
from utils.data.batches import PackedDocuments
from utils.exceptions import NonFiniteError
from utils.inference import scoring
from utils.inference.scoring import DocumentScore, ItemScore, Question
from utils.models import losses
from utils.models.losses import CHUNK_POSITIONS, IGNORED, FrozenHeadNLL, NextTokenLoss, token_nll

CPU = torch.device("cpu")


def case(positions: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(positions)
    hidden_NH = torch.randn(positions, 24, generator=generator).to(dtype)
    head_VH = torch.randn(50, 24, generator=generator).to(dtype)
    return hidden_NH, head_VH, torch.randint(0, 50, (positions,), generator=generator)


class TrainingLoss(unittest.TestCase):
    def check(self, positions: int, dtype: torch.dtype, tolerance: float) -> None:
        hidden_NH, head_VH, labels_N = case(positions, dtype)
        ours = hidden_NH.clone().requires_grad_()
        theirs = hidden_NH.double().requires_grad_()
        loss = FrozenHeadNLL.apply(ours, head_VH, labels_N)
        expected = F.cross_entropy(theirs @ head_VH.double().t(), labels_N, reduction="sum")
        (loss * 0.37).backward()
        (expected * 0.37).backward()
        self.assertLess(abs(float(loss.detach()) / float(expected.detach()) - 1), tolerance)
        self.assertEqual(ours.grad.dtype, dtype)
        self.assertLess(relative(ours.grad.double(), theirs.grad), tolerance)

    def test_loss_and_gradient_are_those_of_cross_entropy_in_float32(self) -> None:
        for positions in (1, CHUNK_POSITIONS - 1, CHUNK_POSITIONS, CHUNK_POSITIONS + 1, 3 * CHUNK_POSITIONS):
            self.check(positions, torch.float32, 1e-5)

    def test_loss_and_gradient_are_those_of_cross_entropy_in_bfloat16(self) -> None:
        for positions in (5, CHUNK_POSITIONS + 1):
            # 8 bits of mantissa
            self.check(positions, torch.bfloat16, 2**-6)

    def test_loss_of_a_model_is_that_of_its_own_logits_with_gradients(self) -> None:
        for architecture, build in ARCHITECTURES.items():
            model = build()[0].eval()
            model.lm_head.requires_grad_(False)
            ids = torch.randint(8, 700, (2, 20), generator=torch.Generator().manual_seed(0))
            labels = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5, ids, IGNORED)
            positions = torch.arange(20).expand(2, -1)
            weight = model.get_submodule("model.layers.0.self_attn.q_proj").weight
            found = []
            for loss in (
                NextTokenLoss(model)(ids, positions, labels),
                F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum"),
            ):
                found.append((float(loss.detach()), torch.autograd.grad(loss, weight)[0]))
            with self.subTest(architecture):
                self.assertAlmostEqual(found[0][0] / found[1][0], 1.0, places=5)
                self.assertLess(relative(found[0][1], found[1][1]), 1e-4)

    def test_a_batch_without_labels_costs_nothing_and_can_be_differentiated(self) -> None:
        model = toy.tiny_llama()[0]
        ids = torch.full((1, 4), 9)
        loss = NextTokenLoss(model)(ids, torch.arange(4)[None], torch.full_like(ids, IGNORED))
        loss.backward()
        self.assertEqual(float(loss.detach()), 0.0)

    def test_a_model_that_changes_its_logits_after_the_head_is_scored_by_its_own_logits(self) -> None:
        model = toy.tiny_llama()[0].eval()
        self.assertTrue(losses._plain_logits(model))
        model.config.final_logit_softcapping = 30.0
        self.assertFalse(losses._plain_logits(model))

    def test_token_nll_is_cross_entropy_at_each_labelled_position_in_row_order(self) -> None:
        for architecture, build in ARCHITECTURES.items():
            model = build()[0].eval()
            ids = torch.randint(8, 700, (3, 80), generator=torch.Generator().manual_seed(0))
            labels = torch.full_like(ids, IGNORED)
            labels[:, 10:70] = ids[:, 11:71]
            found = token_nll(model, ids, torch.arange(80).expand(3, -1), labels)
            with torch.no_grad():
                logits = model(ids).logits[:, 10:70].flatten(0, 1)
                expected = F.cross_entropy(logits, ids[:, 11:71].flatten(), reduction="none")
            with self.subTest(architecture):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Questions(unittest.TestCase):
    def items(self) -> list[Question]:
        generator = random.Random(0)

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(generator.randrange(8, 700) for _ in range(count))

        return [
            Question("a", "d1", tokens(12), (tokens(5), tokens(4), tokens(9)), 2, (1, 0, 2), 1),
            Question("b", "d2", tokens(1), (tokens(4),), 2, (), None),
            Question("c", "d2", tokens(30), (tokens(4), tokens(4)), 2, (0, 1), 0),
        ]

    def test_candidates_in_one_row_score_as_each_of_them_alone(self) -> None:
        items = self.items()
        for architecture, build in ARCHITECTURES.items():
            model = build()[0].eval().requires_grad_(False)
            for batch_tokens in (1, 4096):
                found = scoring.score_questions(
                    model, items, batch_tokens=batch_tokens, pad_id=2, device=CPU, what="test"
                )
                for item, score in zip(items, found, strict=True):
                    expected = [self.alone(model, item, candidate) for candidate in item.candidates]
                    with self.subTest(architecture, item=item.name, batch_tokens=batch_tokens):
                        self.assertEqual(score.name, item.name)
                        self.assertAlmostEqual(score.answer_nll / expected[0][0], 1.0, delta=1e-5)
                        self.assertAlmostEqual(score.end_nll / expected[0][1], 1.0, delta=1e-5)
                        self.assertEqual(score.answer_tokens, len(item.candidates[0]) - item.skip - 1)
                        for at, nll in zip(item.choice_of, score.choice_nlls, strict=True):
                            self.assertAlmostEqual(nll / expected[at][0], 1.0, delta=1e-5)

    def alone(self, model: torch.nn.Module, item: Question, candidate: tuple[int, ...]) -> tuple[float, float]:
        """(NLL of the candidate without its skipped beginning and its end, NLL of its end-of-turn token)."""
        ids = torch.tensor([*item.prompt, *candidate])
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0]
        nll = F.cross_entropy(logits[len(item.prompt) - 1 : -1], ids[len(item.prompt) :], reduction="none")
        return float(nll[item.skip : -1].sum()), float(nll[-1])

    def test_question_holds_the_gold_answer_first_and_each_choice_once(self) -> None:
        tokenizer = toy.tiny_tokenizer()
        free = {"id": 2, "document": "m", "question": "q", "answers": ["b"], "choices": None, "answer_index": None}
        row = {**free, "id": 1, "choices": ["a", "b", "c"], "answer_index": 1}
        (found, plain), left_out = scoring.questions([row, free], tokenizer, "s", 4096)
        texts = [tokenizer.decode(c, skip_special_tokens=False) for c in found.candidates]
        self.assertEqual(texts, [f"\n</think>\n\n{letter}[e~[" for letter in "bac"])
        self.assertEqual((found.choice_of, found.answer_index, left_out), ((1, 0, 2), 1, []))
        self.assertEqual(tokenizer.decode(found.candidates[0][: found.skip]), "\n</think>\n\n")
        self.assertEqual((plain.choice_of, plain.answer_index, len(plain.candidates)), ((), None, 1))
        self.assertEqual(scoring.questions([row], tokenizer, "s", 5)[1], ["1"])

    def test_a_nan_weight_is_an_error_and_not_a_score(self) -> None:
        model = toy.tiny_llama()[0].eval().requires_grad_(False)
        with torch.no_grad():
            model.lm_head.weight[3, 3] = float("nan")
        with self.assertRaises(NonFiniteError):
            scoring.score_questions(model, self.items(), batch_tokens=4096, pad_id=2, device=CPU, what="test")


class Documents(unittest.TestCase):
    def test_document_scores_equal_each_document_alone_in_windows(self) -> None:
        generator, window = random.Random(0), 32
        lengths = [5, 20, 32, 33, 70, 2]
        rows = [[generator.randrange(8, 700) for _ in range(n)] for n in lengths]
        data = Dataset.from_dict(
            {
                "id": [f"d{i}" for i in range(len(rows))],
                "input_ids": rows,
                "num_tokens": lengths,
                "utf8_bytes": [3 * n for n in lengths],
            }
        )
        packed = PackedDocuments(data, TrainSection(max_sequence_tokens=window, micro_batch_tokens=64), 0, 2)
        for architecture, build in ARCHITECTURES.items():
            model = build()[0].eval().requires_grad_(False)
            found = scoring.score_documents(model, packed, batch_tokens=70, device=CPU, what="test")
            self.assertEqual([d.name for d in found], [f"d{i}" for i in range(len(rows))])
            for score, ids in zip(found, rows, strict=True):
                expected = 0.0
                for start in range(0, len(ids), window):
                    piece = torch.tensor(ids[start : start + window + 1])
                    with torch.no_grad():
                        logits = model(piece[None, :window], use_cache=False).logits[0]
                    expected += float(F.cross_entropy(logits[: len(piece) - 1], piece[1:], reduction="sum"))
                with self.subTest(architecture, document=score.name):
                    self.assertAlmostEqual(score.nll / expected, 1.0, delta=1e-5)
                    self.assertEqual((score.tokens, score.utf8_bytes), (len(ids) - 1, 3 * len(ids)))

    def test_a_row_that_is_not_full_is_computed_as_far_as_it_is_filled(self) -> None:
        lengths = [5, 20]
        data = Dataset.from_dict(
            {
                "id": ["d0", "d1"],
                "input_ids": [list(range(8, 8 + n)) for n in lengths],
                "num_tokens": lengths,
                "utf8_bytes": lengths,
            }
        )
        packed = PackedDocuments(data, TrainSection(max_sequence_tokens=128, micro_batch_tokens=128), 0, 2)
        model = toy.tiny_llama()[0].eval().requires_grad_(False)
        with mock.patch.object(scoring, "token_nll", wraps=scoring.token_nll) as computed:
            found = scoring.score_documents(model, packed, batch_tokens=128, device=CPU, what="test")
        self.assertEqual([call.args[1].shape for call in computed.call_args_list], [(1, sum(lengths))])
        self.assertEqual([score.tokens for score in found], [4, 19])


class Summary(unittest.TestCase):
    ITEMS = (
        ItemScore("a", "d", 6.0, 3, 0.5, [6.0, 4.0], [3, 1], 0),
        ItemScore("b", "d", 2.0, 1, 1.5, [2.0, 9.0], [1, 9], 0),
        ItemScore("c", "e", 4.0, 2, 1.0),
    )

    def test_numbers_of_a_cell_follow_their_formulas(self) -> None:
        documents = [DocumentScore("x", 6.0, 2, 10), DocumentScore("y", 3.0, 4, 20)]
        found = scoring.summary(self.ITEMS, documents)
        self.assertAlmostEqual(found["answer_nll"], (6 + 2 + 4) / (3 + 1 + 2))
        self.assertAlmostEqual(found["end_of_turn_nll"], 1.0)
        self.assertAlmostEqual(found["domain_nll"], 9 / 6)
        self.assertAlmostEqual(found["domain_ppl"], math.exp(9 / 6))
        self.assertAlmostEqual(found["domain_nll_per_byte"], 9 / 30)

    def test_choice_accuracy_by_sum_and_per_token(self) -> None:
        found = scoring.summary(self.ITEMS, [])
        # by sum a picks its second choice (4 < 6) and b its first; per token a picks 6/3 and b picks 9/9
        self.assertEqual((found["choice_accuracy"], found["choice_accuracy_per_token"]), (0.5, 0.5))
        self.assertEqual([i.chosen(normalised=False) for i in self.ITEMS], [1, 0, None])
        self.assertEqual([i.chosen(normalised=True) for i in self.ITEMS], [0, 1, None])

    def test_what_the_data_does_not_support_is_absent(self) -> None:
        self.assertEqual(set(scoring.summary(self.ITEMS[2:], [])), {"answer_nll", "end_of_turn_nll"})
        self.assertEqual(scoring.summary([], []), {})

    def test_batches_stay_within_their_tokens_unless_one_item_does_not(self) -> None:
        lengths = [3, 4, 4, 7, 50]
        found = scoring._batches(range(5), lengths, 12)
        self.assertEqual(found, [[0, 1, 2], [3], [4]])

    def test_autocast_leaves_float32_models_alone(self) -> None:
        model = SimpleNamespace(parameters=lambda: iter([torch.zeros(2)]))
        with losses.autocast(model, CPU):  # type: ignore[arg-type]
            self.assertFalse(torch.is_autocast_enabled("cpu"))


if __name__ == "__main__":
    unittest.main()
