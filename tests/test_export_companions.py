"""What lies beside a base model's weights lies beside the merged ones, and no weights that are not merged."""

from __future__ import annotations

import shutil
import unittest
from pathlib import Path

from safetensors.torch import load_file, save_file

from config import BaseModelSection
from tests import toy_architectures
from tests.support import random_factors, temporary_directory
from utils.export import merge, merge_plan
from utils.models import loading
from utils.models.base_model import BaseModel
from utils.models.structure import linear_modules
from utils.models.weights import companion_files
from utils.models.weights.safetensors_io import Checkpoint

BESIDE = {
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "tekken.json": "{}",
    "sentencepiece.bpe.model": "x",
    "LICENSE": "Apache-2.0",
    "NOTICE.txt": "n",
}
LEFT = ("consolidated.safetensors", "pytorch_model.bin", "original.pth", "modeling_own.py", ".cache")


class Companions(unittest.TestCase):
    def base(self) -> BaseModel:
        directory = toy_architectures.build("llama", temporary_directory() / "base")
        for name, text in BESIDE.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(text)
        for name in LEFT[1:]:
            (directory / name).write_text("x")
        shutil.copyfile(directory / "model.safetensors", directory / LEFT[0])
        return BaseModel(directory, str(directory), "", "0" * 64, "0" * 64)

    def merged(self, base: BaseModel) -> Path:
        model = loading.load_model(base, BaseModelSection(source=str(base.directory), dtype="float32"))
        target = temporary_directory() / "merged"
        target.mkdir()
        merge.write(merge_plan.plan(base, random_factors(model, ["q_proj"], 2, 4, 1), "base"), target, "# card")
        return target

    def test_everything_beside_the_weights_is_there_and_unmerged_weights_are_not(self) -> None:
        base = self.base()
        target = self.merged(base)
        for name, text in BESIDE.items():
            self.assertEqual((target / name).read_text(), text)
        self.assertEqual([name for name in LEFT if (target / name).exists()], [])
        self.assertTrue((target / "tokenizer.json").is_file())
        self.assertEqual((target / "README.md").read_text(), "# card")
        changed = load_file(target / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
        before = load_file(base.directory / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
        self.assertFalse(changed.equal(before))

    def test_a_merge_of_a_multimodal_checkpoint_is_the_whole_of_it_with_its_other_weights_untouched(self) -> None:
        directory = toy_architectures.build("gemma3", temporary_directory() / "base")
        base = BaseModel(directory, str(directory), "", "0" * 64, "0" * 64)
        model = loading.load_model(base, BaseModelSection(source=str(directory), dtype="float32"))
        targets = linear_modules.named(model, ("down_proj",))
        factors = {n: f for n, f in random_factors(model, ["down_proj"], 2, 4, 1).items() if n in targets}
        self.assertEqual(len(factors), 2)
        target = temporary_directory() / "merged"
        target.mkdir()
        merge.write(merge_plan.plan(base, factors, "base"), target, "")
        before, after = load_file(directory / "model.safetensors"), load_file(target / "model.safetensors")
        self.assertEqual(set(before), set(after))
        changed = {name for name in before if not before[name].equal(after[name])}
        self.assertEqual(
            {name.split(".layers.")[-1] for name in changed}, {f"{n}.mlp.down_proj.weight" for n in (0, 1)}
        )
        self.assertTrue(any("vision" in name for name in before))

    def test_weights_are_those_that_transformers_reads(self) -> None:
        base = self.base()
        self.assertEqual([path.name for path in Checkpoint(base.directory).headers], ["model.safetensors"])
        shards = temporary_directory()
        save_file(load_file(base.directory / "model.safetensors"), shards / "one-of-one.safetensors")
        shutil.copyfile(base.directory / "config.json", shards / "config.json")
        self.assertEqual([path.name for path in Checkpoint(shards).headers], ["one-of-one.safetensors"])
        self.assertNotIn(Path("README.md"), companion_files.companions(base.directory))


if __name__ == "__main__":
    unittest.main()
