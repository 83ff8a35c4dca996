"""Both spellings in a model's folder: what transformers 4 reads is there, transformers 5 sees no difference, and the
identity of a base model is what it was."""

from __future__ import annotations

import json
import tempfile
import unittest
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from tests import toy_architectures, toy_specs
from utils.artifacts import files
from utils.models import base_model, older_spellings

# rope alone, with scaling, one for each kind of layer, under other names; of no kind that transformers 4 knows; none
LLAMA3 = {key: value for key, value in toy_specs._LLAMA3_ROPE.items() if key != "rope_theta"}
WANTED: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 10000.0},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "gemma3_text": {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
    "gpt_neox": {"rotary_emb_base": 10000.0, "rotary_pct": 0.25},
    "qwen3_moe": {"rope_theta": 10000.0, "num_experts": 4},
    "minimax_m2": {"rope_theta": 5000000.0},
    "gemma4_text": {},
    "gpt2": {},
}


def seen(directory: Path) -> dict[str, Any]:
    """The configuration as transformers 5 has it, without where it came from."""
    found = AutoConfig.from_pretrained(directory).to_dict()
    return {key: value for key, value in found.items() if key not in (older_spellings.LISTED, "_name_or_path")}


class Spellings(unittest.TestCase):
    def setUp(self) -> None:
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.place = Path(scratch.name)

    def test_the_older_words_are_there_mean_the_same_and_can_be_taken_away_to_the_byte(self) -> None:
        for name, wanted in WANTED.items():
            with self.subTest(name):
                directory = self.place / name
                toy_architectures.SPECS[name][0]().save_pretrained(directory)
                path = directory / "config.json"
                before, meant = path.read_bytes(), seen(directory)
                older_spellings.add(directory)
                written = json.loads(path.read_text())
                self.assertEqual({key: written.get(key) for key in wanted}, wanted)
                self.assertEqual({k: v for k, v in seen(directory).items() if k in meant}, meant)
                if wanted:
                    self.assertEqual(older_spellings.identified(path), before)
                else:
                    self.assertEqual(path.read_bytes(), before)

    def test_a_text_model_inside_a_multimodal_one(self) -> None:
        toy_architectures.SPECS["qwen2_5_vl"][0]().save_pretrained(self.place)
        older_spellings.add(self.place)
        text = json.loads((self.place / "config.json").read_text())["text_config"]
        self.assertEqual(text["rope_theta"], text["rope_parameters"]["rope_theta"])

    def test_an_older_word_that_says_something_else_changes_the_identity(self) -> None:
        toy_architectures.SPECS["llama"][0]().save_pretrained(self.place)
        path = self.place / "config.json"
        older_spellings.add(self.place)
        plain = older_spellings.identified(path)
        settings = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"rope_theta": 77.0}))
        self.assertNotEqual(older_spellings.identified(path), plain)

    def test_a_base_model_keeps_its_digests_and_its_tokens(self) -> None:
        directory = toy_architectures.build("llama", self.place / "base")
        path = directory / "tokenizer_config.json"
        before = base_model.identify(directory, "here", "", None)
        said = AutoTokenizer.from_pretrained(directory)("Valve 7 opens.").input_ids
        self.assertEqual(json.loads(path.read_text())["tokenizer_class"], "TokenizersBackend")
        older_spellings.add(directory)
        self.assertEqual(json.loads(path.read_text())["tokenizer_class"], "PreTrainedTokenizerFast")
        after = base_model.identify(directory, "here", "", None)
        self.assertEqual((after.digest, after.tokenizer_digest), (before.digest, before.tokenizer_digest))
        self.assertEqual(AutoTokenizer.from_pretrained(directory)("Valve 7 opens.").input_ids, said)

    def test_a_file_that_transformers_did_not_write_stays_as_it_is(self) -> None:
        text = '{"tokenizer_class":"TokenizersBackend", "model_max_length": 64}'
        files.write_text(self.place / "tokenizer_config.json", text)
        older_spellings.add(self.place)
        self.assertEqual((self.place / "tokenizer_config.json").read_text(), text)


if __name__ == "__main__":
    unittest.main()
