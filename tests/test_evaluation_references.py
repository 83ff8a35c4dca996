"""Our numbers against others': SQuAD's rules, plain transformers, scipy, and lm-evaluation-harness if installed."""

from __future__ import annotations

import importlib.util
import logging
import os
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset

from config import InferenceSection, LoraSection, TrainSection
from tests.support import ARCHITECTURES, plain_tokenizer, random_factors, saved_model, temporary_directory
from utils import logger
from utils.adapters import adapter_files, inference_layers
from utils.data import answer_metrics
from utils.data.batches import PackedDocuments
from utils.evaluation.intervals import ratio_interval
from utils.evaluation.lm_eval import lm_eval_tasks
from utils.inference import generation, scoring
from utils.inference.scoring import DocumentScore, ItemScore
from utils.models import chat
from utils.models.architectures import toy

CPU = torch.device("cpu")
SYSTEM = "You answer briefly."
WINDOW = 48
HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
NO_LM_EVAL = "lm-evaluation-harness is not installed; to compare with it: pip install 'lm-eval>=0.4.9'"
TASK: dict[str, Any] = {"system": None, "history": [], "context": None, "choices": None, "answer_index": None}
EXAMPLES = [
    {**TASK, "id": "a", "document": "d1", "question": "What does f do?", "answers": ["returns the mean", "mean"]},
    {
        **TASK,
        "id": "b",
        "document": "d1",
        "question": "Which one?",
        "answers": ["the second value"],
        "choices": ["a first", "the second value", "none of the values"],
        "answer_index": 1,
    },
    {
        **TASK,
        "id": "c",
        "document": "d2",
        "question": "And then?",
        "context": "A parser reads arguments. " * 6,
        "answers": ["it stops"],
        "choices": ["it stops", "it reads arguments again", "it raises"],
        "answer_index": 0,
        "history": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
    },
    {**TASK, "id": "d", "document": "d3", "question": "Own system?", "answers": ["yes"], "system": "Say yes."},
    {
        **TASK,
        "id": "e",
        "document": "d3",
        "question": "What is a median of data?",
        "answers": ["the middle value"],
        "choices": ["statistics", "the middle value", "json"],
        "answer_index": 1,
    },
]
DOCUMENTS = ["Return the sum of data.", "json.dumps writes text.\n\n" * 9, "x" * 3 + " mean, median and mode " * 5]

# (text, expected answers, exact match, F1), by the rules of the official script (evaluate-v1.1.py, Rajpurkar et al.
# 2016): lower case, then no ASCII punctuation, then no a/an/the as words, then single spaces; the best gold counts
SQUAD = [
    ("Denver Broncos", ["Denver Broncos"], 1, 1),
    ("the  DENVER\tbroncos!", ["Denver Broncos"], 1, 1),
    ("U.S. Army", ["US army"], 1, 1),  # a full stop goes without leaving a space
    ("well-known", ["well known"], 0, 0),  # so does a hyphen: "wellknown"
    ("an a the", ["!!"], 1, 1),  # both are empty; F1 as in evaluate-v2.0.py, evaluate-v1.1.py gives 0 for no words
    ("", ["word"], 0, 0),
    ("word", ["The"], 0, 0),
    ("another theme", ["other me"], 0, 0),  # articles go as words only
    ("a-b", ["ab"], 1, 1),  # punctuation goes first, so no article "a" is left
    ("'The'", [""], 1, 1),
    ("the’s", ["’s"], 1, 1),  # a typographic apostrophe is no ASCII punctuation, but it ends a word
    ("caf\u00e9\u00a0noir", ["Caf\u00c9 noir"], 1, 1),  # any Unicode space separates
    ("cat cat dog", ["cat dog dog"], 0, 2 / 3),  # words count as often as in both: 2 of 3 and 2 of 3
    ("big cat", ["the very big black cat"], 0, 2 * 1 * 0.5 / 1.5),
    ("in 1969, in July", ["July 1969"], 0, 2 * 0.5 * 1 / 1.5),
    ("big cat", ["dog", "cat", "a big, big cat"], 0, 2 * 1 * (2 / 3) / (5 / 3)),  # 0, 2/3 and 4/5
    ("cat", ["dog", "CAT."], 1, 1),
    ("24–10", ["2410"], 0, 0),  # an en dash stays
    ("$5", ["5"], 1, 1),
    # scripts without blanks, as CMRC and MLQA score them: characters, and no punctuation of any script
    ("加油。", ["加油"], 1, 1),
    ("加油站", ["加油"], 0, 2 * (2 / 3) * 1 / (5 / 3)),
    ("用HEPA滤芯", ["「HEPA 滤芯」！"], 0, 2 * (3 / 4) * 1 / (7 / 4)),
    ("毎週、点検", ["毎週点検する"], 0, 2 * 1 * (4 / 6) / (10 / 6)),
    ("น้ำ มัน", ["น้ำมัน"], 1, 1),
    ("３バー", ["3バー"], 1, 1),
    ("서울 입니다", ["서울"], 0, 2 * 0.5 * 1 / 1.5),  # Hangul has blanks
]


class Squad(unittest.TestCase):
    def test_exact_match_and_f1_follow_the_official_rules_on_their_edge_cases(self) -> None:
        for text, golds, exact, f1 in SQUAD:
            with self.subTest(text, golds=golds):
                self.assertEqual(answer_metrics.exact_match(text, golds), exact)
                self.assertAlmostEqual(answer_metrics.token_f1(text, golds), f1, places=12)


class Bootstrap(unittest.TestCase):
    def test_interval_agrees_with_scipy_on_the_same_clusters(self) -> None:
        from scipy import stats
        from scipy.stats import bootstrap

        generator = np.random.default_rng(5)
        sizes = generator.integers(1, 30, size=35)
        clusters = np.repeat(np.arange(35), sizes)
        tokens = generator.integers(3, 40, size=len(clusters)).astype(float)
        effect = generator.normal(0.2, 0.4, size=35)[clusters] + generator.normal(0, 0.2, size=len(clusters))
        names = [f"d{c}" for c in clusters]
        ours = ratio_interval((effect * tokens).tolist(), tokens.tolist(), names, resamples=100_000, seed=0)
        # ours is as wide as a t interval of so few clusters: scipy is asked for the same, slightly higher level
        widened = stats.norm.cdf(np.sqrt(35 / 34) * stats.t.ppf(0.975, 34))
        # scipy knows no clusters: it is given each cluster's sums as one observation
        sums = [np.array([values[clusters == c].sum() for c in range(35)]) for values in (effect * tokens, tokens)]
        theirs = bootstrap(
            sums,
            lambda top, bottom, axis=-1: top.sum(axis) / bottom.sum(axis),
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=100_000,
            confidence_level=2 * widened - 1,
            rng=np.random.default_rng(6),
        ).confidence_interval
        width = theirs.high - theirs.low
        self.assertAlmostEqual(ours.low, theirs.low, delta=0.012 * width)
        self.assertAlmostEqual(ours.high, theirs.high, delta=0.012 * width)
        self.assertAlmostEqual(ours.estimate, float((effect * tokens).sum() / tokens.sum()), places=12)
        alone = bootstrap(
            (effect * tokens, tokens),
            lambda top, bottom, axis=-1: top.sum(axis) / bottom.sum(axis),
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=2000,
            rng=np.random.default_rng(6),
        ).confidence_interval
        self.assertGreater(width, 1.5 * (alone.high - alone.low), "without clusters it would look more certain")


def tokenised(tokenizer: Any, texts: list[str] = DOCUMENTS) -> Dataset:
    ids = chat.document_ids(tokenizer, texts)
    lengths = {"num_tokens": [len(row) for row in ids], "utf8_bytes": [len(text.encode()) for text in texts]}
    return Dataset.from_dict({"id": [f"d{i}" for i in range(len(texts))], "text": texts, "input_ids": ids, **lengths})


def scored(model: Any, tokenizer: Any, window: int = WINDOW) -> tuple[list[ItemScore], list[DocumentScore]]:
    """What our evaluation says about the examples and the documents."""
    items, left_out = scoring.questions(EXAMPLES, tokenizer, SYSTEM, 400)
    assert not left_out
    packed = PackedDocuments(
        tokenised(tokenizer), TrainSection(max_sequence_tokens=window, micro_batch_tokens=2 * window), 0, 2
    )
    common: dict[str, Any] = {"batch_tokens": 600, "device": CPU, "what": "test"}
    return (
        scoring.score_questions(model, items, pad_id=2, **common),
        scoring.score_documents(model, packed, **common),
    )


def log_likelihoods(model: Any, before: list[int], after: list[int]) -> np.ndarray:
    """log p of each token of `after`, one row, all logits, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *after]]), use_cache=False).logits[0].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return np.array([log_p[len(before) - 1 + i, token] for i, token in enumerate(after)])


class Plain(unittest.TestCase):
    """Nothing of ours but the numbers: text in, one row at a time, no packing, nothing shared."""

    def test_every_number_of_a_cell_equals_a_plain_computation_from_the_text(self) -> None:
        for architecture, build in ARCHITECTURES.items():
            model, tokenizer = build()
            model.eval().requires_grad_(False)
            for name, template in (("think", tokenizer), ("plain", plain_tokenizer())):
                items, documents = scored(model, template)
                found = scoring.summary(items, documents)
                nlls = [nll for item in items for nll in item.choice_nlls]
                found["choice_nlls"] = float(np.dot(nlls, np.arange(len(nlls))))
                expected = self.expected(model, template, "\n</think>\n\n" if name == "think" else "")
                with self.subTest(architecture, template=name):
                    self.assertEqual(set(expected) - set(found), set())
                    for key, value in expected.items():
                        self.assertLess(abs(found[key] - value), 1e-4 * max(1, abs(value)), key)
                    self.assertGreater(found["answer_nll"], 1.0)

    def expected(self, model: Any, tokenizer: Any, closing: str) -> dict[str, float]:
        def ids(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        nll = tokens = end = right = right_per_token = 0.0
        choice_nlls: list[float] = []
        for example in EXAMPLES:
            user = example["question"]
            if example["context"]:
                user = f"{example['context']}\n\nQuestion: {user}"
            turns = [{"role": "system", "content": example["system"] or SYSTEM}, *example["history"]]
            prompt = tokenizer.apply_chat_template(
                [*turns, {"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
            )
            before = ids(prompt) + ids(closing)

            def one(text: str, before: list[int] = before) -> np.ndarray:
                return -log_likelihoods(model, before, [*ids(text), tokenizer.eos_token_id])

            gold = one(example["answers"][0])
            nll, tokens, end = nll + gold[:-1].sum(), tokens + len(gold) - 1, end + gold[-1]
            if example["choices"]:
                choices = [one(choice)[:-1] for choice in example["choices"]]
                choice_nlls += [float(choice.sum()) for choice in choices]
                right += int(np.argmin([c.sum() for c in choices])) == example["answer_index"]
                right_per_token += int(np.argmin([c.mean() for c in choices])) == example["answer_index"]
        with_choices = sum(bool(example["choices"]) for example in EXAMPLES)
        document_nll = document_tokens = 0.0
        for text in DOCUMENTS:
            row = [tokenizer.bos_token_id, *ids(text), tokenizer.eos_token_id]
            for start in range(0, len(row) - 1, WINDOW):
                piece = row[start : start + WINDOW + 1]
                document_nll -= log_likelihoods(model, piece[:1], piece[1:]).sum()
                document_tokens += len(piece) - 1
        return {
            "answer_nll": nll / tokens,
            "end_of_turn_nll": end / len(EXAMPLES),
            "choice_nlls": float(np.dot(choice_nlls, np.arange(len(choice_nlls)))),
            "choice_accuracy": right / with_choices,
            "choice_accuracy_per_token": right_per_token / with_choices,
            "domain_nll": document_nll / document_tokens,
            "domain_ppl": float(np.exp(document_nll / document_tokens)),
        }


@unittest.skipUnless(HAS_LM_EVAL, NO_LM_EVAL)
class Harness(unittest.TestCase):
    """The same items through EleutherAI's program."""

    @classmethod
    def setUpClass(cls) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        quiet = mock.patch.dict(os.environ, {"TQDM_DISABLE": "1"})
        quiet.start()
        cls.addClassCleanup(quiet.stop)

    def test_answers_choices_and_documents_score_the_same_token_by_token(self) -> None:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        for architecture, build in ARCHITECTURES.items():
            model, tokenizer = build()
            model.eval().requires_grad_(False)
            scores, documents = scored(model, tokenizer, window=500)
            theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=500, device="cpu")
            items, _ = scoring.questions(EXAMPLES, tokenizer, SYSTEM, 400)
            for item, score in zip(items, scores, strict=True):
                requests = [
                    (("", ""), [*item.prompt, *candidate[: item.skip]], list(candidate[item.skip : -1]))
                    for candidate in item.candidates
                ]
                found = [-ll for ll, _ in theirs._loglikelihood_tokens(requests, disable_tqdm=True)]
                with self.subTest(architecture, item=item.name):
                    self.assertAlmostEqual(score.answer_nll, found[0], delta=1e-3)
                    for at, nll in zip(item.choice_of, score.choice_nlls, strict=True):
                        self.assertAlmostEqual(nll, found[at], delta=1e-3)
            texts = [text + tokenizer.eos_token for text in DOCUMENTS]
            rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
            for score, found in zip(documents, theirs.loglikelihood_rolling(rolling, disable_tqdm=True), strict=True):
                with self.subTest(architecture, document=score.name):
                    self.assertAlmostEqual(score.nll, -found, delta=1e-3)

    def test_merged_model_and_adapter_get_our_numbers_with_the_written_tasks(self) -> None:
        from peft import PeftModel

        directory = temporary_directory()
        base = saved_model("llama", directory / "base")
        tokenizer = plain_tokenizer()
        tokenizer.save_pretrained(base.directory)
        model = toy.tiny_llama()[0].eval().requires_grad_(False)
        lora = LoraSection(rank=4, alpha=8, target_modules=("q_proj", "v_proj", "down_proj"))
        factors = random_factors(model, lora.target_modules, rank=4, alpha=8, seed=1, size=0.1)
        adapter_files.save(directory / "adapter", factors, base, lora=lora)
        loaded = toy.tiny_llama()[0]
        merged = PeftModel.from_pretrained(loaded, directory / "adapter").merge_and_unload()
        with logger.quiet_transformers():
            merged.save_pretrained(directory / "merged")
            tokenizer.save_pretrained(directory / "merged")
        tokenised(tokenizer).save_to_disk(str(directory / "heldout_documents"))
        model = inference_layers.attach(model, {"x": factors})
        inference_layers.select(model, {"x": 1.0})
        given = generation.answer_all(model, tokenizer, EXAMPLES, SYSTEM, InferenceSection(max_new_tokens=6))
        said = [one.answer for one in given]
        # half of the answers become what the model says, so that not everything it generates is wrong
        examples = [{**e, "answers": [*e["answers"], said[i] if i % 2 else "."]} for i, e in enumerate(EXAMPLES)]
        counts = lm_eval_tasks.write(
            directory / "lm_eval", examples, tokenizer, SYSTEM, max_tokens=400, max_new_tokens=6
        )
        self.assertEqual((counts["items"], counts["tokenised_otherwise"]), (5, 0))
        ours = scoring.summary(*scored(model, tokenizer, window=500))
        for key, measure in (("exact_match", answer_metrics.exact_match), ("token_f1", answer_metrics.token_f1)):
            ours[key] = float(np.mean([measure(t, e["answers"]) for t, e in zip(said, examples, strict=True)]))
        self.assertGreater(ours["exact_match"], 0.0)
        for arguments in (f"pretrained={directory}/merged", f"pretrained={base.directory},peft={directory}/adapter"):
            found = self.evaluate(arguments, directory / "lm_eval")
            with self.subTest(arguments):
                self.assertEqual(len(found), 6)
                for key, value in found.items():
                    self.assertAlmostEqual(value, ours[key], delta=1e-3, msg=key)

    def evaluate(self, arguments: str, tasks: Path) -> dict[str, float]:
        import lm_eval
        from lm_eval.tasks import TaskManager

        results = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"{arguments},add_bos_token=False,dtype=float32,max_length=500",
            tasks=["dta"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            batch_size=4,
            device="cpu",
            log_samples=False,
            bootstrap_iters=0,
        )["results"]
        return {
            key.removesuffix(",none"): value
            for task in results.values()
            for key, value in task.items()
            if key.endswith(",none") and "stderr" not in key
        }


if __name__ == "__main__":
    unittest.main()
