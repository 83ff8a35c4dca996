"""What is counted in the documents that were read: their languages, and on request personal data that has a form."""

from __future__ import annotations

import importlib.util
import sys
import unittest
from unittest import mock

from datasets import Dataset

from utils.data.corpus.languages import UNKNOWN, languages
from utils.data.corpus.personal_data import NOT_COUNTED, personal_data
from utils.exceptions import DataError

TEXTS = {
    "en": "The operator closes the supply valve before the drain is opened, and the lead waits until it has settled.",
    "de": "Der Schichtleiter schließt das Ventil, bevor der Abfluss geöffnet wird, und wartet auf die Anzeige.",
    "fr": "Le chef d'équipe ferme la vanne avant d'ouvrir la vidange et attend que l'aiguille ne bouge plus.",
    "zh": "操作员在打开排水阀之前先关闭供水阀，因为管道内的压力必须降到两巴以下。之后组长等待压力表稳定。",
}


class Languages(unittest.TestCase):
    def test_each_document_counts_for_its_language_and_short_ones_for_none(self) -> None:
        texts = [*TEXTS.values(), TEXTS["de"] + " Montags.", "Ventil 7", ""]
        found = languages(Dataset.from_dict({"text": texts}))
        self.assertEqual(found, {"de": 2, "en": 1, "fr": 1, "zh": 1, UNKNOWN: 2})
        self.assertEqual(next(iter(found)), "de", "the most frequent first")

    def test_of_a_large_corpus_a_sample_from_all_over_it_is_looked_at(self) -> None:
        texts = [TEXTS["en"]] * 2000 + [TEXTS["fr"]] * 2000
        found = languages(Dataset.from_dict({"text": texts}))
        self.assertEqual(found, {"en": 125, "fr": 125})


class PersonalData(unittest.TestCase):
    def test_without_presidio_the_command_that_installs_it_is_said(self) -> None:
        with mock.patch.dict(sys.modules, {"presidio_analyzer": None}), self.assertRaises(DataError) as raised:
            personal_data(["text"], 1)
        self.assertIn("pip install presidio-analyzer", str(raised.exception))

    @unittest.skipUnless(importlib.util.find_spec("presidio_analyzer"), "pip install presidio-analyzer")
    def test_what_has_a_form_is_counted_with_its_checksum(self) -> None:
        texts = [
            "Write to jo.doe@example.com or call +49 30 901820.",
            "IBAN DE89370400440532013000, card 4012 8888 8888 1881, host 192.168.0.17",
            "IBAN DE89370400440532013001, version 1.2.3, part 12345: none of them is any.",
        ]
        found = personal_data(texts, len(texts))
        kinds = {kind: number for kind, number in found["found"].items() if number}
        self.assertEqual(
            kinds, {"email_address": 1, "phone_number": 1, "iban_code": 1, "credit_card": 1, "ip_address": 1}
        )
        self.assertEqual((found["documents"], found["not_counted"]), (2, NOT_COUNTED))


if __name__ == "__main__":
    unittest.main()
