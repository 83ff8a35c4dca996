"""Near duplicates: which are found, and that none is on both sides of what is held out."""

from __future__ import annotations

import random
import shutil
import unittest
from pathlib import Path

from datasets import Dataset

from config import DataSection
from tests.support import temporary_directory
from utils.data.corpus.near_duplicates import near_duplicate_clusters, shingles, take_whole_clusters
from utils.data.corpus.prepared_documents import _read_and_split

WORDS = ("valve", "pump", "oil", "bearing", "gauge", "drain", "cover", "clean", "inspect", "lead", "sign", "log")


def text(seed: int, words: int = 120) -> str:
    generator = random.Random(seed)
    return " ".join(f"{generator.choice(WORDS)}{generator.randrange(50)}" for _ in range(words))


class Clusters(unittest.TestCase):
    def setUp(self) -> None:
        self.cache = temporary_directory()
        self.addCleanup(shutil.rmtree, self.cache)

    def clusters(self, *texts: str) -> list[list[int]]:
        return near_duplicate_clusters([Dataset.from_dict({"text": list(texts)})], self.cache)

    def test_revisions_are_found_and_others_are_not(self) -> None:
        many = [text(seed) for seed in range(60)]
        revised = many[7].replace("valve", "valves", 2) + " Rev. 2"
        self.assertEqual(self.clusters(*many, revised, many[3].upper().replace(" ", "\n")), [[3, 61], [7, 60]])
        self.assertEqual(list(self.cache.iterdir()), [])

    def test_a_chain_is_one_cluster_and_short_texts_are_compared_too(self) -> None:
        first = text(1)
        second = first + " one more sentence that was added to it here."
        third = second + " And another one, which makes it longer still."
        self.assertEqual(self.clusters(third, "abc", first, second, "abc", "abd"), [[0, 2, 3], [1, 4]])

    def test_nearly_all_pairs_just_above_the_threshold_are_found(self) -> None:
        texts, pairs = [], 0
        for seed in range(150):
            one = text(seed).split()
            other = [*one[:-11], *text(1000 + seed, 11).split()]
            a, b = shingles(" ".join(one)), shingles(" ".join(other))
            shared = len(set(a.tolist()) & set(b.tolist()))
            if 0.8 <= shared / (len(a) + len(b) - shared) <= 0.88:
                texts += [" ".join(one), " ".join(other)]
                pairs += 1
        self.assertGreater(pairs, 50)
        self.assertGreaterEqual(len(self.clusters(*texts)), 0.98 * pairs)

    def test_clusters_are_taken_whole_or_passed_over(self) -> None:
        self.assertEqual(take_whole_clusters([4, 0, 1, 2, 3], [[1, 3, 4]], 3), [1, 3, 4])
        self.assertEqual(take_whole_clusters([4, 0, 1, 2, 3], [[1, 3, 4]], 2), [0, 2])
        self.assertEqual(take_whole_clusters([3, 1, 0], [], 2), [3, 1])


class Sides(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_directory()
        self.addCleanup(shutil.rmtree, self.folder)
        for part in ("corpus", "held"):
            (self.folder / part).mkdir()

    def split(self, **settings: object) -> tuple[set[str], set[str], dict]:
        data = DataSection(corpus=(str(self.folder / "corpus"),), task="none", **settings)
        counts: dict = {}
        corpus, outside, _ = _read_and_split(data, None, 42, self.folder / "cache", counts)
        return set(corpus["id"]), set(outside["id"]), counts["near_duplicates"]

    def write(self, part: str, name: str, content: str) -> None:
        (Path(self.folder) / part / name).write_text(content)

    def test_copies_of_given_held_out_documents_leave_the_corpus(self) -> None:
        for seed in range(10):
            self.write("corpus", f"{seed}.txt", text(seed))
        self.write("held", "same.txt", text(3))
        self.write("held", "near.txt", text(5) + " Rev. 2")
        self.write("held", "other.txt", text(99))
        corpus, held, counts = self.split(corpus_heldout=(str(self.folder / "held"),))
        self.assertEqual(corpus, {f"{seed}.txt" for seed in range(10) if seed not in (3, 5)})
        self.assertEqual((len(held), counts["dropped_because_held_out"]), (3, 2))

    def test_a_cluster_is_on_one_side_of_our_own_split(self) -> None:
        for seed in range(20):
            self.write("corpus", f"{seed}-a.txt", text(seed))
            self.write("corpus", f"{seed}-b.txt", text(seed) + " Rev. 2")
        corpus, held, _ = self.split(heldout_share=0.2)
        self.assertEqual(len(held), 8)
        self.assertEqual({name.split("-")[0] for name in corpus} & {name.split("-")[0] for name in held}, set())

    def test_on_request_later_near_duplicates_are_dropped(self) -> None:
        for seed in range(12):
            self.write("corpus", f"{seed:02}.txt", text(seed // 2) + " Rev." * (seed % 2))
        corpus, held, counts = self.split(near_duplicates="drop", heldout_share=0.0)
        self.assertEqual(corpus | held, {f"{seed:02}.txt" for seed in range(0, 12, 2)})
        self.assertEqual(counts["dropped"], 6)


if __name__ == "__main__":
    unittest.main()
