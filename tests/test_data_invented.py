"""The invented domain is the control it claims to be: known facts, known chance, and a twin that is always wrong."""

from __future__ import annotations

import json
import re
import unittest
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.support import Workspace, last_json, run_program, temporary_directory, write_jsonl
from utils import cli
from utils.artifacts import files
from utils.data.domains.built_in import BuiltIn
from utils.data.domains.invented import ATTRIBUTES, NUM_VALUES, invented_domain
from utils.data.examples import read_task_examples
from utils.exceptions import ConfigError

ASKED = ("dev", "test")
SIZES = ((24, 1), (40, 2), (120, 4), (320, 3))
Fact = tuple[str, str, str]  # attribute, town, value
PATTERNS = [
    (name, wording, re.compile(re.escape(wording).replace(r"\{town\}", r"([A-Z]\w+)").replace(r"\{value\}", r"(\w+)")))
    for name, attribute in ATTRIBUTES.items()
    for wording in attribute.wordings
]


def domain(towns: int = 120, attributes: int = 4, *, shuffled: bool = False, seed: int = 0) -> BuiltIn:
    return invented_domain(
        towns=towns, attributes=attributes, dev_share=0.15, test_share=0.25, shuffled=shuffled, seed=seed
    )


def sentences(documents: Iterable[dict[str, str]]) -> list[str]:
    return [f"{part}." for document in documents for part in document["text"].removesuffix(".").split(". ")]


def read(sentence: str) -> tuple[Fact, str]:
    """The fact that a sentence states, and the wording, found by trying all of them: exactly one may fit."""
    found = []
    for name, wording, pattern in PATTERNS:
        match = pattern.fullmatch(sentence)
        if match and match[2] in ATTRIBUTES[name].values:
            found.append(((name, match[1], match[2]), wording))
    if len(found) != 1:
        raise AssertionError(f"{sentence!r} states {found}")
    return found[0]


def facts(documents: Iterable[dict[str, str]]) -> dict[Fact, set[str]]:
    """Fact -> the wordings in which the documents state it."""
    stated: dict[Fact, set[str]] = defaultdict(set)
    for sentence in sentences(documents):
        fact, wording = read(sentence)
        stated[fact].add(wording)
    return stated


def answered(pairs: Iterable[dict[str, Any]]) -> set[Fact]:
    """The facts that the answers of labelled pairs state; which attribute is asked for is read off the question."""
    found = set()
    for pair in pairs:
        asked = [n for n, a in ATTRIBUTES.items() if a.question.format(town=pair["document"]) == pair["question"]]
        if len(asked) != 1:
            raise AssertionError(f"{pair['question']!r} asks for {asked}")
        found.add((asked[0], pair["document"], pair["answers"][0]))
    return found


def pairs_of(found: BuiltIn, *splits: str) -> list[dict[str, Any]]:
    return [pair for split in splits for pair in found.examples[split]]


class Control(unittest.TestCase):
    def test_no_asked_town_is_in_a_training_pair(self) -> None:
        for size in SIZES:
            found = domain(*size)
            trained = " ".join(json.dumps(pair) for pair in found.examples["train"])
            asked = {pair["document"] for pair in pairs_of(found, *ASKED)}
            self.assertGreaterEqual(len(asked), 2 * NUM_VALUES)
            self.assertEqual([town for town in asked if town in trained], [])

    def test_every_asked_fact_is_in_the_corpus_in_at_least_two_wordings(self) -> None:
        for size in SIZES:
            found = domain(*size)
            stated = facts(found.documents)
            # training facts are there too, so a stacked task adapter can learn to read them out of the domain adapter
            for fact in answered(pairs_of(found, "train", *ASKED)):
                self.assertGreaterEqual(len(stated[fact]), 2, fact)

    def test_held_out_documents_state_the_same_facts_in_sentences_that_the_corpus_lacks(self) -> None:
        for size in SIZES:
            found = domain(*size)
            told, untold = facts(found.documents), facts(found.heldout)
            self.assertEqual(set(told), set(untold))
            self.assertFalse(set(sentences(found.documents)) & set(sentences(found.heldout)))
            self.assertEqual([fact for fact in told if told[fact] & untold[fact]], [])

    def test_every_wording_is_in_the_corpus_so_held_out_sentences_are_new_by_their_fact_alone(self) -> None:
        found = domain()
        used = {wording for wordings in facts(found.documents).values() for wording in wordings}
        self.assertEqual(used, {wording for attribute in ATTRIBUTES.values() for wording in attribute.wordings})

    def test_the_corpus_contradicts_itself_nowhere(self) -> None:
        for shuffled in (False, True):
            values = Counter((name, town) for name, town, _ in facts(domain(shuffled=shuffled).documents))
            self.assertEqual(set(values.values()), {1})

    def test_training_answers_have_every_value_that_is_asked_for(self) -> None:
        for size in SIZES:
            found = domain(*size)
            seen = {(name, value) for name, _, value in answered(found.examples["train"])}
            self.assertLessEqual({(name, value) for name, _, value in answered(pairs_of(found, *ASKED))}, seen)


class Chance(unittest.TestCase):
    def test_guessing_the_commonest_value_is_right_one_time_in_eight(self) -> None:
        for size in SIZES:
            found = domain(*size)
            for split, pairs in found.examples.items():
                by_attribute = defaultdict(list)
                for name, _, value in answered(pairs):
                    by_attribute[name].append(value)
                for name, values in by_attribute.items():
                    shares = {value: count / len(values) for value, count in Counter(values).items()}
                    self.assertEqual(set(shares.values()), {1 / NUM_VALUES}, (split, name))

    def test_one_fact_about_a_town_does_not_give_away_another(self) -> None:
        value_of = {(name, town): value for name, town, value in answered(pairs_of(domain(320), "train", *ASKED))}
        towns = {town for _, town in value_of}
        for one in ATTRIBUTES:
            for other in ATTRIBUTES.keys() - {one}:
                together = Counter((value_of[one, town], value_of[other, town]) for town in towns)
                # 320 towns over 64 pairs: 5 each if they are independent, 40 in one of eight if one decides the other
                self.assertLess(max(together.values()), 20, (one, other))
                self.assertGreater(len(together), 48, (one, other))

    def test_choices_contain_the_answer_once_and_are_the_values_of_what_is_asked(self) -> None:
        for pair in pairs_of(domain(), "train", *ASKED):
            self.assertEqual(pair["choices"].count(pair["answers"][0]), 1)
            self.assertEqual(pair["choices"][pair["answer_index"]], pair["answers"][0])
            name = next(iter(answered([pair])))[0]
            self.assertEqual(sorted(pair["choices"]), sorted(ATTRIBUTES[name].values))

    def test_names_that_begin_alike_are_as_few_as_can_be(self) -> None:
        towns = [town for members in domain().groups.values() for town in members]
        self.assertEqual(len(set(towns)), 120)
        self.assertLessEqual(max(Counter(town[:3] for town in towns).values()), 3)


class Twin(unittest.TestCase):
    def test_it_states_no_asked_fact_truly(self) -> None:
        for size in SIZES:
            for seed in range(3):
                true, twin = domain(*size, seed=seed), domain(*size, shuffled=True, seed=seed)
                asked = answered(pairs_of(true, "train", *ASKED))
                self.assertFalse(asked & set(facts([*twin.documents, *twin.heldout])))
                self.assertLessEqual(asked, set(facts(true.documents)))

    def test_its_corpus_has_the_same_words_and_the_same_values_of_every_attribute(self) -> None:
        for size in SIZES:
            true, twin = domain(*size), domain(*size, shuffled=True)
            for ours, theirs in ((true.documents, twin.documents), (true.heldout, twin.heldout)):
                words = [Counter(w for d in part for w in re.findall(r"\w+", d["text"])) for part in (ours, theirs)]
                self.assertEqual(words[0], words[1])
                values = [Counter((name, value) for name, _, value in facts(part)) for part in (ours, theirs)]
                self.assertEqual(values[0], values[1])

    def test_within_each_split_it_states_every_value_equally_often(self) -> None:
        twin = domain(shuffled=True)
        for split, towns in twin.groups.items():
            values = Counter((name, value) for name, town, value in facts(twin.documents) if town in towns)
            self.assertEqual(set(values.values()), {len(towns) // NUM_VALUES}, split)

    def test_it_differs_from_the_control_in_values_alone(self) -> None:
        true, twin = domain(), domain(shuffled=True)
        self.assertEqual(true.examples, twin.examples)
        self.assertEqual(true.groups, twin.groups)
        for ours, theirs in zip(true.documents, twin.documents, strict=True):
            read_ours, read_theirs = ([read(s) for s in sentences([d])] for d in (ours, theirs))
            self.assertEqual([(f[:2], w) for f, w in read_ours], [(f[:2], w) for f, w in read_theirs])

    def test_its_wrong_value_says_nothing_else_about_the_right_one(self) -> None:
        true, twin = domain(1000), domain(1000, shuffled=True)
        wrong = {(name, town): value for name, town, value in facts(twin.documents)}
        for attribute in ATTRIBUTES:
            met = Counter((v, wrong[n, t]) for n, t, v in answered(pairs_of(true, "train", *ASKED)) if n == attribute)
            # 56 ways to be wrong, 17.9 towns each if all are equally likely: six standard deviations either way
            self.assertEqual(len(met), NUM_VALUES * (NUM_VALUES - 1))
            self.assertGreater(min(met.values()), 0)
            self.assertLess(max(met.values()), 43)


class Determinism(unittest.TestCase):
    def test_a_seed_gives_the_same_texts_in_every_process_and_another_seed_others(self) -> None:
        digests = []
        for seed, hash_seed in (("0", "1"), ("0", "2"), ("1", "1")):
            done = run_program("digests", "invented_domain", seed, env={"PYTHONHASHSEED": hash_seed})
            digests.append(done.stdout.strip())
        self.assertEqual(digests[0], digests[1])
        self.assertNotEqual(digests[0], digests[2])
        self.assertEqual(digests[0], files.fingerprint(asdict(domain(shuffled=True))))

    def test_shares_are_honoured_in_eights_and_no_split_is_empty(self) -> None:
        self.assertEqual({s: len(t) for s, t in domain().groups.items()}, {"train": 72, "dev": 16, "test": 32})
        for towns in (24, 32, 40, 120):
            for dev, test in ((0.0, 0.0), (0.15, 0.25), (0.0, 0.99), (0.99, 0.0), (0.5, 0.49)):
                found = invented_domain(
                    towns=towns, attributes=1, dev_share=dev, test_share=test, shuffled=False, seed=0
                )
                sizes = [len(members) for members in found.groups.values()]
                self.assertEqual(sum(sizes), towns)
                self.assertTrue(all(size and size % NUM_VALUES == 0 for size in sizes), sizes)

    def test_sizes_that_cannot_be_are_refused(self) -> None:
        for towns, attributes in ((16, 1), (100, 1), (2000, 1), (40, 0), (40, 5)):
            with self.assertRaises(ValueError):
                domain(towns, attributes)


class AsDataSource(unittest.TestCase):
    def test_control_and_twin_are_prepared_by_name_with_the_same_test_pairs(self) -> None:
        workspace = Workspace()
        kept = ["--data.max_documents", "0", "--data.max_train_examples", "0", "--data.max_test_examples", "0"]
        size = [*kept, "--data.task", "invented", "--data.invented_towns", "40", "--data.invented_attributes", "2"]
        runs = {}
        for corpus in ("invented", "invented_shuffled"):
            result = last_json(workspace.run("prepare_data", "--data.corpus", corpus, *size))
            self.assertEqual(result["documents"]["corpus"]["documents"], 160)
            runs[corpus] = Path(result["run"])
        ours, theirs = (run / "task_test.jsonl" for run in runs.values())
        self.assertEqual(ours.read_bytes(), theirs.read_bytes())
        expected = domain(40, 2).examples["test"]
        self.assertEqual([json.loads(line) for line in ours.read_text().splitlines()], expected)

        from datasets import load_from_disk

        for corpus, run in runs.items():
            twin = domain(40, 2, shuffled=corpus == "invented_shuffled")
            for part, documents in (("corpus", twin.documents), ("heldout_documents", twin.heldout)):
                texts = set(load_from_disk(str(run / part))["text"][:])
                self.assertTrue(texts and texts <= {document["text"] for document in documents}, (corpus, part))

    def test_pairs_written_to_a_file_are_read_back_as_they_are(self) -> None:
        pairs = domain(40, 2).examples["train"]
        path = write_jsonl(temporary_directory() / "pairs.jsonl", pairs)
        found, _ = read_task_examples(str(path), cache_dir=temporary_directory())
        self.assertEqual(found, pairs)

    def test_settings_that_would_spoil_the_control_are_refused_in_words(self) -> None:
        cases = {
            ("--data.corpus=invented",): "invented_shuffled corpus",
            ("--data.task=invented",): "invented_shuffled corpus",
            ("--data.corpus=invented_shuffled", "--data.task=mine.jsonl"): "invented_shuffled corpus",
            ("--data.corpus=invented,more.txt", "--data.task=invented"): "stands alone",
            ("--data.corpus=invented", "--data.task=invented", "--data.task_test=t.jsonl"): "its own dev and test",
            ("--data.corpus=invented", "--data.task=invented", "--data.max_documents=9"): "facts that are asked about",
            ("--data.invented_towns=100",): "multiple of 8",
        }
        for arguments, part in cases.items():
            with self.subTest(arguments), self.assertRaises(ConfigError) as caught:
                cli.resolve(arguments, {})
            self.assertIn(part, str(caught.exception))
        cli.resolve(("--data.corpus=invented_shuffled", "--data.task=invented"), {})
        cli.resolve(("--data.corpus=invented", "--data.task=none"), {})


if __name__ == "__main__":
    unittest.main()
