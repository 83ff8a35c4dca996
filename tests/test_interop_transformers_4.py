"""Models that we write, loaded by transformers 4 in an environment of its own: the same logits.

make interop-test
"""

from __future__ import annotations

import json
import unittest
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests import toy_architectures
from tests.interop_support import program
from tests.support import plain_logits, random_factors, relative, temporary_directory
from tests.test_export_merge import merged
from utils.models import base_model, older_spellings
from utils.models.base_model import BaseModel

# what rope needs is said in a way of its own by each; theta far from the default that transformers 4 falls back to
ARCHITECTURES = ("llama", "llama3", "gemma3_text", "gpt_neox", "qwen2", "qwen3_moe", "phi3", "glm4_moe")
IDS = torch.arange(3, 40)[None] % toy_architectures.VOCABULARY


class Transformers4(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.python = program("transformers4")

    def theirs(self, *directories: Path) -> dict[str, torch.Tensor]:
        out = temporary_directory()
        save_file({"input_ids": IDS}, out / "ids.safetensors")
        self.python.run(
            "tests/programs/plain_logits.py", out / "logits.safetensors", out / "ids.safetensors", *directories
        )
        return load_file(out / "logits.safetensors")

    def test_what_is_built_or_merged_here_is_the_same_model_there(self) -> None:
        built = {name: built_with_far_theta(name) for name in ARCHITECTURES}
        bare = built_with_far_theta("llama", spelt=False)
        ours = plain_logits(IDS, *map(str, built.values()), str(bare))
        found = self.theirs(*built.values(), bare)
        for name, directory in built.items():
            with self.subTest(name):
                self.assertLess(relative(found[str(directory)], ours[str(directory)]), 1e-5)
        # and without the older words it is another model there, or this would prove nothing
        self.assertGreater(relative(found[str(bare)], ours[str(bare)]), 1e-3)

    def test_a_merged_model_and_its_tokenizer(self) -> None:
        directory = built_with_far_theta("llama", spelt=False)
        base: BaseModel = base_model.identify(directory, str(directory), "", None)
        model = toy_architectures.model("llama")
        factors = random_factors(model, ("q_proj", "v_proj"), 3, 6.0, seed=1, size=0.1)
        target, _ = merged(base, factors)
        ours, found = plain_logits(IDS, str(target), flags=["--tokenizer"]), self.theirs(target, Path("--tokenizer"))
        self.assertLess(relative(found[str(target)], ours[str(target)]), 1e-5)


def built_with_far_theta(name: str, *, spelt: bool = True) -> Path:
    directory = toy_architectures.build(name, temporary_directory() / name)
    path = directory / "config.json"
    settings = json.loads(path.read_text())
    ropes = [settings["rope_parameters"]]
    if "full_attention" in ropes[0]:
        ropes = list(ropes[0].values())
    for number, rope in enumerate(ropes):
        rope["rope_theta"] = 700.0 + 50 * number
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if spelt:
        older_spellings.add(directory)
    return directory


if __name__ == "__main__":
    unittest.main()
