"""What came with an adapter beside its weights: said where it differs from the base's, and the person chooses."""

from __future__ import annotations

import shutil
import unittest
from pathlib import Path
from typing import Any

from config import BaseModelSection, InputsSection
from tests.support import PRESET, plain_tokenizer, random_factors, saved_model, temporary_directory
from tests.test_composition_layers import composed
from utils import cli
from utils.adapters import adapter_files, adapter_tokenizer
from utils.artifacts.runs import Run
from utils.composition import chosen_adapters
from utils.exceptions import ArtefactError
from utils.export import verification
from utils.models import chat, loading
from utils.models.base_model import BaseModel

ADAPTER, BASE, UNSAID = (InputsSection(tokenizer=choice) for choice in ("adapter", "base", ""))
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + '[e~[' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


class Tokenizers(unittest.TestCase):
    base: BaseModel
    factors: dict[str, Any]
    other: dict[str, Any]

    @classmethod
    def setUpClass(cls) -> None:
        cls.base = saved_model("llama")
        model = loading.load_model(cls.base, BaseModelSection(source=str(cls.base.directory), dtype="float32"))
        cls.factors, cls.other = (random_factors(model, ("q_proj",), 2, 4, seed) for seed in (1, 2))

    def adapter(self, *, template: str = "", tokens: tuple[str, ...] = (), **roles: str) -> Path:
        """An adapter folder as a trainer leaves it: with its whole tokenizer."""
        directory = temporary_directory() / "adapter"
        adapter_files.save(directory, self.factors, self.base)
        own = chat.load_tokenizer(self.base.directory)
        own.add_special_tokens({"additional_special_tokens": list(tokens)} if tokens else {})
        for role, token in roles.items():
            setattr(own, role, token)
        own.chat_template = template or own.chat_template
        own.save_pretrained(directory)
        return directory

    def test_the_bases_own_tokenizer_beside_an_adapter_is_nothing_to_speak_of(self) -> None:
        for directory in (self.adapter(), self.adapter(pad_token="[e~[")):
            self.assertEqual(adapter_tokenizer.compare(directory, self.base), [])
            self.assertEqual(adapter_tokenizer.choose(directory, self.base, UNSAID), {})
        alone = temporary_directory() / "adapter"
        adapter_files.save(alone, self.factors, self.base)
        self.assertEqual(adapter_tokenizer.compare(alone, self.base), [])

    def test_every_difference_is_named_and_both_choices(self) -> None:
        directory = self.adapter(template=TEMPLATE, tokens=("<|reply|>",), eos_token="]~b]")
        with self.assertRaises(ArtefactError) as caught:
            composed(self.base, [self.factors, self.factors], "--task_adapter", str(directory))
        said = str(caught.exception)
        for part in ("another chat template", "1 added tokens (<|reply|>)", "eos_token ]~b] instead of [e~["):
            self.assertIn(part, said)
        for choice in ("--inputs.tokenizer adapter", "--inputs.tokenizer base"):
            self.assertIn(choice, said)

    def test_verify_notes_what_an_adapter_came_with(self) -> None:
        for directory, said in ((self.adapter(), []), (self.adapter(template=TEMPLATE), ["another chat template"])):
            found = verification.verify(directory, ())
            self.assertTrue(found.trusted)
            notes = [note for note in found.notes if "a tokenizer of its own" in note]
            self.assertEqual(len(notes), len(said))
            self.assertTrue(all(phrase in note for note, phrase in zip(notes, said, strict=True)))

    def test_what_is_chosen_renders_prompts_and_goes_into_a_merged_model(self) -> None:
        directory = self.adapter(template=TEMPLATE)
        example, prompt = {"question": "Why?"}, "<system> Be brief.[e~[<user> Why?[e~[<assistant> "
        run = Run(directory, adapter_tokenizer.choose(directory, self.base, ADAPTER))
        chosen = adapter_tokenizer.with_chosen(self.base, [Run(directory, {}), run])
        own = adapter_tokenizer.of(chosen)
        self.assertEqual(own.decode(chat.prompt_ids(own, example, "Be brief.")), prompt)
        self.assertTrue(chosen.deciding_tokenizer())
        self.assertIn("tokenizer_choice", chosen.record())
        merged = temporary_directory() / "merged"
        shutil.copytree(self.base.directory, merged)
        adapter_tokenizer.write(chosen, merged)
        again = chat.load_tokenizer(merged)
        self.assertEqual(again.decode(chat.prompt_ids(again, example, "Be brief.")), prompt)
        # the base's, where that was chosen: nothing changes, and no identity knows of it
        self.assertEqual(adapter_tokenizer.choose(directory, self.base, BASE), {})
        self.assertEqual(adapter_tokenizer.with_chosen(self.base, [Run(directory, {})]), self.base)
        self.assertEqual((self.base.deciding_tokenizer(), "tokenizer_choice" in self.base.record()), ({}, False))

    def test_a_composed_run_remembers_what_was_chosen(self) -> None:
        directory = self.adapter(template=TEMPLATE)
        for choice in ("adapter", "base"):
            flags = ("--task_adapter", str(directory), "--inputs.tokenizer", choice)
            made = composed(self.base, [self.other, self.factors], *flags).parent
            models = made.parent.parent
            given = ["--base.source", str(self.base.directory), "--base.dtype", "float32"]
            places = ["--run.models_dir", str(models), "--run.data_dir", str(models.parent / "data")]
            config = cli.resolve(["--preset", PRESET, *given, *places], {})
            found = chosen_adapters.in_use(config, self.base)
            self.assertEqual((found.is_alone, found.composed.directory if found.composed else None), (False, made))
            used = adapter_tokenizer.with_chosen(self.base, found.adapters).tokenizer_from
            self.assertEqual(used, directory if choice == "adapter" else None)
            self.assertEqual(bool(found.composed.manifest["base"].get("tokenizer_choice")), choice == "adapter")

    def test_a_template_without_a_tokenizer_is_one_too(self) -> None:
        directory = temporary_directory() / "adapter"
        adapter_files.save(directory, self.factors, self.base)
        (directory / "chat_template.jinja").write_text(TEMPLATE)
        self.assertEqual(adapter_tokenizer.compare(directory, self.base), ["another chat template"])
        run = Run(directory, adapter_tokenizer.choose(directory, self.base, ADAPTER))
        self.assertEqual(adapter_tokenizer.of(adapter_tokenizer.with_chosen(self.base, [run])).chat_template, TEMPLATE)

    def test_a_tokenizer_that_the_embeddings_do_not_fit_cannot_be_chosen(self) -> None:
        directory = self.adapter(tokens=("<|reply|>", "<|ask|>"))
        with self.assertRaisesRegex(ArtefactError, "2 of its tokens have no row in the base's embeddings"):
            adapter_tokenizer.choose(directory, self.base, ADAPTER)
        self.assertEqual(adapter_tokenizer.choose(directory, self.base, BASE), {})

    def test_two_adapters_with_two_tokenizers_are_refused(self) -> None:
        runs = []
        for template in (TEMPLATE, TEMPLATE.replace("> ", ">")):
            directory = self.adapter(template=template)
            runs.append(Run(directory, adapter_tokenizer.choose(directory, self.base, ADAPTER)))
        with self.assertRaisesRegex(ArtefactError, "different tokenizers"):
            adapter_tokenizer.with_chosen(self.base, runs)
        self.assertEqual(adapter_tokenizer.with_chosen(self.base, [runs[0], runs[0]]).tokenizer_from, runs[0].directory)

    def test_a_link_out_of_the_folder_is_not_followed(self) -> None:
        directory = self.adapter(template=TEMPLATE)
        (directory / "chat_template.jinja").unlink(missing_ok=True)
        outside = temporary_directory() / "template.jinja"
        outside.write_text(str(plain_tokenizer().chat_template))
        (directory / "chat_template.jinja").symlink_to(outside)
        with self.assertRaisesRegex(ArtefactError, "leads out of"):
            adapter_tokenizer.compare(directory, self.base)


if __name__ == "__main__":
    unittest.main()
