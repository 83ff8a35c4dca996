"""Packed rows and padded pairs train exactly the tokens they should, as if each document or pair stood alone."""

from __future__ import annotations

import random
import unittest
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from config import TrainSection
from tests.support import ARCHITECTURES, toy
from utils.data.batches import BucketedPairs, PackedDocuments, group, pack
from utils.data.labelled.long_contexts import fitting_prompt
from utils.data.pair_rows import Pair, PairReport, check_usable, tokenise_pairs
from utils.exceptions import DataError
from utils.models import chat
from utils.models.losses import IGNORED, NextTokenLoss

ROW = 32
TRAIN = TrainSection(max_sequence_tokens=ROW, micro_batch_tokens=2 * ROW, batch_tokens=4 * ROW)
LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=150)


def documents(lengths: list[int], seed: int = 0) -> Dataset:
    generator = random.Random(seed)
    ids = [[generator.randrange(8, 700) for _ in range(length)] for length in lengths]
    return Dataset.from_dict(
        {"id": [f"d{i}" for i in range(len(ids))], "input_ids": ids, "num_tokens": lengths, "text": [""] * len(ids)}
    )


# each turn begins with all that was said before it
CHATML = (
    "{% for m in messages %}]~b]{{ m.role }}\n{{ m.content }}[e~[\n{% endfor %}"
    "{% if add_generation_prompt %}]~b]assistant\n{% endif %}"
)


def conversation(number: int, turns: int) -> dict[str, Any]:
    """An example with so many assistant turns, its answer included."""
    said = [
        turn
        for at in range(turns - 1)
        for turn in (
            {"role": "user", "content": f"Question {number} {at}?"},
            {"role": "assistant", "content": f"Answer {number} {at} " * (at + 1)},
        )
    ]
    return {"id": str(number), "question": "And the last?", "answers": [f"So {number}."], "history": said}


def alone(model: torch.nn.Module, ids: list[int], first_label: int = 1) -> torch.Tensor:
    """Summed NLL of tokens first_label.. of one sequence, by the model's own logits."""
    tensor = torch.tensor(ids)
    logits = model(tensor[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[first_label - 1 : -1], tensor[first_label:], reduction="sum")


class Packing(unittest.TestCase):
    @settings(max_examples=50, deadline=None)
    @given(lengths=LENGTHS, row=st.integers(16, 64), seed=st.integers(0, 1000))
    def test_packing_keeps_every_token_once_and_never_exceeds_a_row(
        self, lengths: list[int], row: int, seed: int
    ) -> None:
        rows = pack(lengths, row, random.Random(seed))
        seen = Counter((p.document, token) for pieces in rows for p in pieces for token in range(p.start, p.end))
        expected = Counter((d, token) for d, length in enumerate(lengths) for token in range(length))
        self.assertEqual(seen, expected)
        self.assertLessEqual(max(sum(p.end - p.start for p in pieces) for pieces in rows), row)

    def test_each_token_but_a_documents_first_is_predicted_exactly_once(self) -> None:
        lengths = [1, 2, 31, 32, 33, 64, 65, 100, 5, 7]
        offset = [sum(lengths[:i]) for i in range(len(lengths))]
        # token ids that are unique over the corpus say which token was predicted
        ids = [list(range(100 + at, 100 + at + length)) for at, length in zip(offset, lengths, strict=True)]
        corpus = documents(lengths).remove_columns("input_ids").add_column("input_ids", ids)
        packed = PackedDocuments(corpus, TRAIN, 0, pad_id=0)
        labels = Counter[int]()
        for step in packed.steps(0):
            counted = 0
            for rows in step:
                batch = packed.batch(0, rows)
                found = batch.labels_BT[batch.labels_BT != IGNORED]
                inputs = batch.input_ids_BT[batch.labels_BT != IGNORED]
                self.assertTrue(torch.equal(found, inputs + 1), "a label is not the token after its input")
                labels.update(found.tolist())
                counted += batch.num_labels
            self.assertEqual(packed.num_labels(0, step), counted)
        self.assertEqual(labels, Counter(token for tokens in ids for token in tokens[1:]))

    def test_packed_loss_equals_the_sum_of_the_losses_of_each_document_alone(self) -> None:
        lengths = [5, 32, 17, 2, 11, 20, 30, 9]
        corpus = documents(lengths)
        for architecture, build in ARCHITECTURES.items():
            model = build()[0].eval()
            packed = PackedDocuments(corpus, TRAIN, 0, pad_id=int(model.config.eos_token_id))
            batch = packed.batch(0, tuple(range(len(packed.rows(0)))))
            self.assertLess(len(packed.rows(0)), len(lengths), "nothing was packed together")
            with self.subTest(architecture), torch.no_grad():
                found = NextTokenLoss(model)(batch.input_ids_BT, batch.position_ids_BT, batch.labels_BT)
                expected = sum(alone(model, row["input_ids"]) for row in corpus)
                self.assertAlmostEqual(float(found / expected), 1.0, delta=1e-5)

    def test_what_is_padded_with_does_not_matter(self) -> None:
        corpus, model = documents([5, 17, 30, 9]), toy.tiny_minimax_m2()[0].eval()
        found = []
        for pad_id in (0, 5, int(model.config.eos_token_id)):
            batch = PackedDocuments(corpus, TRAIN, 0, pad_id).batch(0, (0, 1))
            with torch.no_grad():
                found.append(float(NextTokenLoss(model)(batch.input_ids_BT, batch.position_ids_BT, batch.labels_BT)))
        self.assertAlmostEqual(found[0] / found[1], 1.0, places=6)
        self.assertAlmostEqual(found[0] / found[2], 1.0, places=6)

    def test_steps_depend_on_epoch_and_seed_and_on_nothing_else(self) -> None:
        corpus = documents(list(range(2, 60)))
        one, other = PackedDocuments(corpus, TRAIN, 3, 0), PackedDocuments(corpus, TRAIN, 3, 0)
        first = (one.steps(0), one.rows(0))
        other.steps(1)
        other.batch(1, (0,))
        self.assertEqual((other.steps(0), other.rows(0)), first)
        self.assertNotEqual(one.rows(1), first[1])
        self.assertNotEqual(PackedDocuments(corpus, TRAIN, 4, 0).rows(0), first[1])


class Pairs(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.tokenizer = toy.tiny_tokenizer()

    def test_only_the_answer_and_its_end_of_turn_token_are_trained(self) -> None:
        pairs = [Pair("a", (11, 12, 13, 14, 2), 2), Pair("b", (21, 22, 2), 1)]
        batch = BucketedPairs(pairs, TRAIN, 0, pad_id=2).batch(0, (0, 1))
        self.assertEqual(batch.input_ids_BT.tolist(), [[11, 12, 13, 14, 2], [21, 22, 2, 2, 2]])
        self.assertEqual(batch.labels_BT.tolist(), [[-100, -100, 14, 2, -100], [-100, 2, -100, -100, -100]])
        self.assertEqual(batch.position_ids_BT.tolist(), [[0, 1, 2, 3, 4]] * 2)

    def test_a_share_of_the_prompt_is_trained_as_well_another_in_each_epoch(self) -> None:
        lengths = [(400, 3), (2, 1), (300, 299), (3, 2), (200, 5)]  # the third has one token of prompt
        pairs = [Pair(str(n), tuple(range(1, n + 1)), answer) for n, answer in lengths]
        rows = tuple(range(len(pairs)))
        answers = BucketedPairs(pairs, TRAIN, 3, 0).batch(0, rows).labels_BT
        every = BucketedPairs(pairs, TRAIN, 3, 0, prompt_loss_weight=1.0).batch(0, rows).labels_BT
        for row, (n, _) in enumerate(lengths):
            self.assertEqual(every[row][every[row] != IGNORED].tolist(), list(range(2, n + 1)))
        data = BucketedPairs(pairs, TRAIN, 3, 0, prompt_loss_weight=0.2)
        found = [data.batch(epoch, rows).labels_BT for epoch in range(30)]
        for epoch, labels in enumerate(found):
            self.assertTrue(torch.equal(labels[answers != IGNORED], answers[answers != IGNORED]))
            self.assertTrue(torch.equal(labels[labels != IGNORED], every[labels != IGNORED]))
            self.assertEqual(int((labels != IGNORED).sum()), data.num_labels(epoch, [rows[:2], rows[2:]]))
            self.assertTrue(torch.equal(labels[3:4, :3], data.batch(epoch, (3,)).labels_BT))  # whatever is beside it
        self.assertFalse(torch.equal(found[0], found[1]))
        # 396 + 194 tokens of prompts that follow another one of the prompt, in 30 epochs: 5 standard deviations
        drawn = sum(int(((labels != IGNORED) & (answers == IGNORED)).sum()) for labels in found)
        count = 30 * sum(max(0, n - answer - 1) for n, answer in lengths)
        self.assertAlmostEqual(drawn / count, 0.2, delta=5 * (0.2 * 0.8 / count) ** 0.5)

    def test_tokenised_pair_trains_what_the_template_puts_after_the_prompt(self) -> None:
        example = {"id": "x", "question": "Why?", "answers": ["Because.", "unused"]}
        pairs, report = tokenise_pairs([example], self.tokenizer, "Be brief.", 200)
        self.assertEqual(report, PairReport(1, 0, 0))
        ids, count = list(pairs[0].ids), pairs[0].num_answer_tokens
        decode = self.tokenizer.decode
        expected = "]~!b[]~b]system\nBe brief.[e~[\n]~b]user\nWhy?[e~[\n]~b]ai\n<think>\n"
        self.assertEqual(decode(ids[:-count]), expected)
        self.assertEqual(decode(ids[-count:]), "\n</think>\n\nBecause.[e~[")
        batch = BucketedPairs(pairs, TRAIN, 0, 0).batch(0, (0,))
        self.assertEqual(batch.labels_BT[batch.labels_BT != IGNORED].tolist(), ids[-count:])

    def test_padded_loss_equals_the_sum_of_the_losses_of_each_pair_alone(self) -> None:
        generator = random.Random(1)
        for architecture, build in ARCHITECTURES.items():
            model = build()[0].eval()
            lengths = [(9, 3), (30, 1), (17, 16)]
            pairs = [Pair(str(n), tuple(generator.choices(range(8, 700), k=n)), a) for n, a in lengths]
            batch = BucketedPairs(pairs, TRAIN, 0, int(model.config.eos_token_id)).batch(0, (0, 1, 2))
            with self.subTest(architecture), torch.no_grad():
                found = NextTokenLoss(model)(batch.input_ids_BT, batch.position_ids_BT, batch.labels_BT)
                expected = sum(alone(model, list(p.ids), len(p.ids) - p.num_answer_tokens) for p in pairs)
                self.assertAlmostEqual(float(found / expected), 1.0, delta=1e-5)

    def test_a_long_context_is_shortened_and_the_answer_never(self) -> None:
        context = " ".join(f"word{i}" for i in range(150))
        example = {"id": "x", "question": "Which word?", "answers": ["word 7 of 300"], "context": context}
        for room in (90, 120, 400):
            pairs, report = tokenise_pairs([example], self.tokenizer, "s", room)
            self.assertEqual((report.usable, report.contexts_shortened), (1, 1))
            self.assertLessEqual(len(pairs[0].ids), room)
            self.assertGreater(len(pairs[0].ids), room - 10, "more was cut than had to be")
            text = self.tokenizer.decode(pairs[0].ids)
            self.assertIn("Question: Which word?[e~[", text)
            self.assertTrue(text.endswith("word 7 of 300[e~["))
            self.assertIn("word0 word1", text)

    def test_a_context_that_is_cut_for_training_keeps_the_answer_and_for_scoring_its_beginning(self) -> None:
        words = [f"word{i}" for i in range(150)]
        for at in (0, 1, 75, 149):
            example = {"id": "x", "question": "Which?", "answers": [words[at]], "context": " ".join(words)}
            (pair,), report = tokenise_pairs([example], self.tokenizer, "s", 120)
            prompt = self.tokenizer.decode(pair.ids[: -pair.num_answer_tokens])
            self.assertEqual((report.contexts_shortened, len(pair.ids) > 110), (1, True))
            self.assertRegex(prompt, rf"\b{words[at]}\b")
            scored, _ = fitting_prompt(example, self.tokenizer, "s", 110)
            self.assertIn("user\nword0 word1", self.tokenizer.decode(scored))

    def test_every_turn_of_a_conversation_is_a_pair_or_the_last_alone(self) -> None:
        history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        example = {"id": "x", "question": "Why?", "answers": ["So."], "history": history}
        for all_turns, answers in ((True, ["Hello", "So."]), (False, ["So."])):
            pairs, report = tokenise_pairs([example], self.tokenizer, "s", 200, all_turns=all_turns)
            ends = [self.tokenizer.decode(pair.ids[-pair.num_answer_tokens :]) for pair in pairs]
            self.assertEqual(ends, [f"\n</think>\n\n{answer}[e~[" for answer in answers])
            self.assertEqual(report.usable, len(answers))

    def test_a_conversation_is_one_row_where_each_turn_begins_with_the_one_before_and_trains_the_same(self) -> None:
        tokenizer = toy.tiny_tokenizer()
        tokenizer.chat_template = CHATML
        examples = [conversation(number, turns) for number, turns in enumerate((3, 1, 2, 4))]
        examples[2]["history"][0]["untrained"] = True  # a user's turn: nothing to leave out
        examples[3]["history"][3]["untrained"] = True  # stays context
        apart = [
            pair
            for example in examples
            for turn in chat.turn_examples(tokenizer, example, "s")
            for pair in tokenise_pairs([turn], tokenizer, "s", 400)[0]
        ]
        joined, report = tokenise_pairs(examples, tokenizer, "s", 400, all_turns=True)
        self.assertEqual((len(apart), len(joined), report.usable), (9, 4, 9))

        def trained(pairs: list[Pair]) -> Counter[tuple[int, ...]]:
            """What is predicted, with all that it is predicted from."""
            batch = BucketedPairs(pairs, TRAIN, 0, 0).batch(0, tuple(range(len(pairs))))
            places = (batch.labels_BT != IGNORED).nonzero().tolist()
            rows = batch.input_ids_BT.tolist()
            return Counter((*rows[row][: at + 1], int(batch.labels_BT[row, at])) for row, at in places)

        self.assertEqual(trained(joined), trained(apart))
        data = BucketedPairs(joined, TRAIN, 0, 0, prompt_loss_weight=0.3)
        for step in data.steps(2):
            self.assertEqual(data.num_labels(2, step), sum(data.batch(2, micro).num_labels for micro in step))
        self.assertGreater(sum(data.num_labels(2, step) for step in data.steps(2)), report.usable)
        model = ARCHITECTURES["llama"]()[0].eval()
        losses = []
        for pairs in (apart, joined):
            batch = BucketedPairs(pairs, TRAIN, 0, 0).batch(0, tuple(range(len(pairs))))
            with torch.no_grad():
                losses.append(float(NextTokenLoss(model)(batch.input_ids_BT, batch.position_ids_BT, batch.labels_BT)))
        self.assertAlmostEqual(losses[0] / losses[1], 1.0, places=5)

    def test_a_conversation_that_gets_too_long_is_trained_up_to_there(self) -> None:
        tokenizer = toy.tiny_tokenizer()
        tokenizer.chat_template = CHATML
        example = conversation(0, 3)
        whole, _ = tokenise_pairs([example], tokenizer, "s", 400, all_turns=True)
        pairs, report = tokenise_pairs([example], tokenizer, "s", len(whole[0].ids) - 1, all_turns=True)
        self.assertEqual((report.usable, report.answer_does_not_fit), (2, 1))
        self.assertEqual([pair.ids for pair in pairs], [whole[0].ids[: whole[0].earlier[1][1]]])
        self.assertEqual(pairs[0].trained, whole[0].earlier)

    def test_an_answer_that_does_not_fit_is_left_out_and_counted(self) -> None:
        rows: list[dict[str, Any]] = [
            {"id": "long", "question": "q", "answers": ["word " * 200]},
            {"id": "short", "question": "q", "answers": ["w"]},
        ]
        pairs, report = tokenise_pairs(rows, self.tokenizer, "s", 100)
        self.assertEqual([p.name for p in pairs], ["short"])
        self.assertEqual((report.usable, report.answer_does_not_fit, report.unusable_share), (1, 1, 0.5))
        check_usable(report, 0.5, 100)
        with self.assertRaisesRegex(DataError, "1 of 2 training pairs do not fit 100 tokens"):
            check_usable(report, 0.49, 100)
        with self.assertRaises(DataError):
            check_usable(PairReport(0, 2, 0), 1.0, 100)

    def test_every_pair_is_trained_once_an_epoch_in_an_order_of_its_own(self) -> None:
        pairs = [Pair(str(i), tuple(range(i % 9 + 3)), 2) for i in range(40)]
        data = BucketedPairs(pairs, TRAIN, 0, 0)
        for epoch in range(3):
            rows = sorted(row for step in data.steps(epoch) for micro in step for row in micro)
            self.assertEqual(rows, list(range(40)))
        self.assertEqual(data.steps(1), BucketedPairs(pairs, TRAIN, 0, 0).steps(1))
        self.assertNotEqual(data.steps(0), data.steps(1))
        self.assertNotEqual(data.steps(0), BucketedPairs(pairs, TRAIN, 1, 0).steps(0))
        self.assertEqual(sum(data.num_labels(0, step) for step in data.steps(0)), 2 * 40)


class Grouping(unittest.TestCase):
    @settings(max_examples=200, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 32), min_size=1, max_size=80),
        micro=st.integers(32, 200),
        batch=st.integers(32, 400),
    )
    def test_groups_keep_the_order_and_both_budgets(self, lengths: list[int], micro: int, batch: int) -> None:
        train = TrainSection(max_sequence_tokens=32, micro_batch_tokens=micro, batch_tokens=batch)
        steps = group(list(range(len(lengths))), lengths, train)
        self.assertEqual([row for step in steps for rows in step for row in rows], list(range(len(lengths))))
        for step in steps:
            padded = [max(lengths[row] for row in rows) * len(rows) for rows in step]
            self.assertTrue(all(size <= micro for size in padded))
            self.assertLessEqual(sum(padded), batch)
            self.assertTrue(padded)

    def test_no_micro_batch_pads_more_than_its_step_was_counted_with(self) -> None:
        for lengths, micro in (([1, 17], 34), ([1] * 21 + [10], 20)):
            (step,) = group(
                range(len(lengths)),
                lengths,
                TrainSection(max_sequence_tokens=32, micro_batch_tokens=micro, batch_tokens=32),
            )
            self.assertLessEqual(sum(max(lengths[row] for row in rows) * len(rows) for rows in step), 32)

    def test_a_row_longer_than_the_budget_stands_alone(self) -> None:
        train = TrainSection(max_sequence_tokens=32, micro_batch_tokens=32, batch_tokens=16)
        self.assertEqual(group([0, 1], [32, 32], train), [[(0,)], [(1,)]])


if __name__ == "__main__":
    unittest.main()
