"""Security: damaged, external and hostile artefacts are refused by name, before anything is made from them."""

from __future__ import annotations

import functools
import os
import pickle
import shutil
import signal
import unittest
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from config import BaseModelSection, Config, RolloutSection
from tests.support import (
    PRESET,
    Completed,
    Script,
    Workspace,
    forked,
    last_json,
    pair_row,
    saved_model,
    temporary_directory,
    write_jsonl,
)
from tests.whole_pipeline import Whole, whole
from utils import cli
from utils.adapters import adapter_config, parent_runs
from utils.artifacts import files
from utils.data import prepared
from utils.data.corpus import prepared_documents
from utils.data.documents import read_documents
from utils.data.examples import read_task_examples
from utils.data.extraction import archives, word_text
from utils.data.extraction.extracted import NoTextError
from utils.data.prepared import Prepared
from utils.data.tabular import text_lines
from utils.exceptions import PipelineError
from utils.models import chat, loading, sources
from utils.models.base_model import BaseModel
from utils.rollout.edge import service_state
from utils.training import checkpoints

CONFIG, WEIGHTS = adapter_config.CONFIG, adapter_config.WEIGHTS
COMMIT = "a" * 40
DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "truncated": lambda content, other: content[: len(content) // 2],
    "bit-flipped": lambda content, other: flipped(content),
    "zero-filled": lambda content, other: bytes(len(content)),
    "swapped with another's": lambda content, other: other,
}


class Tampering(unittest.TestCase):
    @contextmanager
    def refused(self, *parts: object) -> Iterator[None]:
        with self.assertRaises(PipelineError) as caught:
            yield
        self.assertEqual(caught.exception.exit_code, 2)
        for part in parts:
            self.assertIn(str(part), str(caught.exception))

    def assert_refused(self, completed: Completed[str], *parts: object) -> None:
        self.assertEqual(completed.returncode, 2, completed.stderr[-2000:])
        self.assertNotIn("Traceback", completed.stderr)
        for part in parts:
            self.assertIn(str(part), completed.stderr)


class Files(Tampering):
    """Every file of an artefact, damaged in every way, is refused with its name."""

    def each_damage(self, artefact: Path, other: Path) -> Iterator[tuple[str, Path]]:
        """Damages one file after the other, and mends it afterwards; its times are as they were."""
        tried = 0
        for path in sorted(p for p in artefact.rglob("*") if p.is_file()):
            if any(part.startswith(".") for part in path.relative_to(artefact).parts):
                continue  # locks, and the state of a longer run: it is no part of the artefact
            sound, stat = path.read_bytes(), path.stat()
            counterpart = other / path.relative_to(artefact)
            foreign = counterpart.read_bytes() if counterpart.is_file() else b"another file"
            for how, damage in DAMAGES.items():
                content = damage(sound, foreign)
                if content == sound:
                    continue
                path.write_bytes(content)
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
                with self.subTest(f"{path.relative_to(artefact)} {how}"):
                    yield how, path
                tried += 1
            path.write_bytes(sound)
        self.assertGreater(tried, 10)

    def test_of_a_checkpoint_and_resuming_falls_back_to_the_one_before(self) -> None:
        root = temporary_directory() / "checkpoints"
        save_checkpoints(root, (4, 8))
        before, newest = (root / f"step-{step:08d}" for step in (4, 8))
        kept = temporary_directory() / "kept"
        shutil.copytree(newest, kept)
        for _, path in self.each_damage(newest, before):
            with self.assertLogs("adapters", "WARNING") as logged:
                self.assertEqual(checkpoints.newest_valid(root), before)
            self.assertIn(named(path), logged.records[0].facts["reason"])
            shutil.rmtree(logged.records[0].facts["path"])
            shutil.copytree(kept, newest)
        self.assertEqual(checkpoints.newest_valid(root), newest)

    def test_of_an_adapter_and_of_a_composition(self) -> None:
        copy, base = whole()[0].copy(), toy_base()
        for kind, other in (("domain", "task"), ("composed", "domain")):
            for _, path in self.each_damage(copy[kind], copy[other]):
                with self.refused(named(path)):
                    parent_runs.any_run(config_for(copy), base, copy[kind], flag="--domain_adapter")
        self.assertEqual(
            parent_runs.any_run(config_for(copy), base, copy["domain"], flag="").manifest["kind"], "domain"
        )

    def test_of_a_merged_model_also_when_its_digest_is_remembered_and_the_file_has_the_same_size_and_time(self) -> None:
        copy = whole()[0].copy()
        section = BaseModelSection(source=str(copy["merged"]))
        fetched = sources.fetch(section, copy.roots[1])
        for _, path in self.each_damage(copy["merged"], copy["base"]):
            with self.refused(named(path)):
                sources.fetch(section, copy.roots[1])
        self.assertEqual(sources.fetch(section, copy.roots[1]), fetched)

    def test_of_the_state_that_a_longer_run_begins_with(self) -> None:
        copy = whole()[0].copy()
        mine, theirs = copy["domain"], copy["task"]
        for _, path in self.each_damage(mine / checkpoints.LAST, theirs / checkpoints.LAST):
            with self.refused(path.parent):
                checkpoints.last_state(mine)
        self.assertEqual(checkpoints.last_state(mine), mine / checkpoints.LAST)

    def test_of_prepared_data(self) -> None:
        copy = whole()[0].copy()
        for _, path in self.each_damage(copy["prepared"], copy["domain"]):
            with self.refused(named(path)):
                parent_runs.prepared_run(config_for(copy, "--inputs.prepared", str(copy["prepared"])), toy_base())

    def test_a_whole_checkpoint_of_another_run_or_step_is_not_gone_on_from(self) -> None:
        mine, theirs = (temporary_directory() / name for name in ("mine", "theirs"))
        for run in (mine, theirs):
            run.mkdir()
            files.write_json(run / "identity.json", {"name": run.name})
            save_checkpoints(run / "checkpoints", (4,))
        shutil.copytree(theirs / "checkpoints" / "step-00000004", mine / "checkpoints" / "step-00000008")
        shutil.copytree(mine / "checkpoints" / "step-00000004", mine / "checkpoints" / "step-00000012")
        with self.assertLogs("adapters", "WARNING") as logged:
            found = checkpoints.newest_valid(mine / "checkpoints")
        self.assertEqual(found, mine / "checkpoints" / "step-00000004")
        self.assertEqual(len(logged.records), 2)
        self.assertIn("another run or step", logged.records[0].facts["reason"])


class OtherBase(Tampering):
    """The same shapes and another model, revision or tokenizer: refused before training, composing or merging."""

    def variants(self) -> dict[str, tuple[BaseModel, str]]:
        """Base models that everything would fit, and what is said about each."""
        same = whole()[0]["base"]

        def changed(name: str, change: Callable[[dict[str, Any]], object]) -> BaseModel:
            directory = temporary_directory() / "other"
            shutil.copytree(same, directory)
            (directory / files.MANIFEST).unlink()
            settings = files.read_json(directory / name)
            change(settings)
            files.write_json(directory / name, settings)
            return fetched(directory)

        revision = changed("config.json", lambda settings: settings.update(rms_norm_eps=1e-3))
        tokenizer = changed("tokenizer.json", lambda settings: settings["model"]["merges"].reverse())
        template = changed("tokenizer_config.json", lambda settings: settings.update(clean_up_tokenization_spaces=True))
        return {
            "weights": (saved_model("minimax_m2", seed=1), "made for another base model"),
            "revision": (revision, "made for another base model"),
            "tokenizer": (tokenizer, "made with another tokenizer or chat template"),
            "tokenizer settings": (template, "made with another tokenizer or chat template"),
        }

    def test_no_stage_uses_an_adapter_of_another_base_revision_or_tokenizer(self) -> None:
        place, _ = whole()
        pinned, newest = config_for(place), cli.resolve(["--preset", PRESET, *place.flags[:4]], {})
        for name, (base, reason) in self.variants().items():
            for config in (pinned, newest):
                with self.subTest(name):
                    with self.refused(reason):
                        parent_runs.domain_run(config, base)  # what the task adapter is trained on
                    with self.refused(reason):
                        parent_runs.adapter_runs(config, base)  # what is composed and merged
            if name.startswith("tokenizer"):
                with self.subTest(name), self.refused("prepared with another tokenizer"):
                    parent_runs.prepared_run(newest, base)

    def test_the_scripts_refuse_it_and_write_nothing(self) -> None:
        copy = whole()[0].copy()
        other = saved_model("minimax_m2", seed=1).directory
        before = listed(copy.root)
        flags = ["--preset", PRESET, "--base.source", str(other), "--base.dtype", "float32", *copy.flags]
        for script, more in (
            ("train_task_adapter", ()),
            ("compose", ()),
            ("inference", ("--merge_path", str(copy.root / "never"))),
        ):
            self.assert_refused(forked(script, *flags, *more), "made for another base model")
        self.assertEqual(listed(copy.root), before)


class OurAdapter(Tampering):
    def test_an_edited_setting_is_refused_by_digest_whatever_it_is(self) -> None:
        for change in (
            {"lora_alpha": 800},
            {"r": 2},
            {"target_modules": ["q_proj"]},
            {"base_model_name_or_path": "../../etc"},
            {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
        ):
            copy = whole()[0].copy()
            path = copy["domain"] / "adapter" / CONFIG
            files.write_json(path, {**files.read_json(path), **change})
            with self.subTest(change), self.refused(path, "restore"):
                parent_runs.adapter_runs(config_for(copy), toy_base())

    def test_a_link_out_of_a_run_is_refused(self) -> None:
        copy = whole()[0].copy()
        outside = temporary_directory() / "outside"
        shutil.move(copy["domain"] / "adapter", outside)
        (copy["domain"] / "adapter").symlink_to(outside)
        with self.refused("leads out of"):
            parent_runs.adapter_runs(config_for(copy), toy_base())

    def test_merged_weights_with_a_leftover_adapter_are_refused_where_they_are_served_and_adapted(self) -> None:
        copy = whole()[0].copy()
        for name in (CONFIG, WEIGHTS):
            shutil.copy(copy["domain"] / "adapter" / name, copy["merged"])
        with self.refused(CONFIG, "no part of the artefact"):
            service_state.open_side(
                str(copy["merged"]), "", slots=copy.root, slot="canary", known=None, section=RolloutSection()
            )
        with self.refused(CONFIG, "remove it: a base model has none"):
            sources.fetch(BaseModelSection(source=str(copy["merged"])), copy.roots[1])
        done = forked(
            "inference", "--preset", PRESET, *copy.flags, "--merge_path", str(copy["merged"]), "--weights=1,0.5"
        )
        self.assert_refused(done, CONFIG, "no part of the artefact")


class ForeignAdapter(Tampering):
    """An adapter of another tool has no digest: what does not fit is refused, what cannot be known is said."""

    def foreign(self, **settings: Any) -> Path:
        directory = temporary_directory() / "foreign"
        shutil.copytree(whole()[0]["domain"] / "adapter", directory)
        files.write_json(directory / CONFIG, {**files.read_json(directory / CONFIG), **settings})
        return directory

    def use(self, directory: Path) -> None:
        parent_runs.external_run(config_for(whole()[0]), toy_base(), "domain", directory)

    def test_settings_that_do_not_fit_the_factors_are_refused(self) -> None:
        for settings, parts in (
            ({"r": 2}, ("rank 4, its config says 2",)),
            ({"r": 8}, ("rank 4, its config says 8",)),
            ({"target_modules": ["q_proj"]}, ("which its targets do not name",)),
            ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate"]}, ("no factors for",)),
            # PEFT refuses these: no module is targeted
            ({"target_modules": [], "target_parameters": None}, ("targets is nothing of the base",)),
            ({"target_modules": ["nothing"], "target_parameters": None}, ("targets is nothing of the base",)),
            ({"layers_to_transform": [1_000_000_000], "target_parameters": None}, ("targets is nothing",)),
            ({"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}, ("auto_mapping", "runs no code")),
            (
                {"auto_mapping": {"base_model_class": "X", "parent_library": "transformers.models.x; os"}},
                ("runs no code",),
            ),
            ({"megatron_core": "my_module"}, ("megatron_core",)),
            ({"megatron_config": {"a": 1}}, ("megatron_config",)),
        ):
            with self.subTest(settings), self.refused(*parts):
                self.use(self.foreign(**settings))

    def test_an_alpha_a_hundred_times_too_large_is_remarked_and_the_right_one_is_not(self) -> None:
        remark = "unusually large beside the weights"
        with self.assertLogs("adapters", "INFO") as logged:
            self.use(self.foreign())
        self.assertNotIn(remark, " ".join(logged.output))
        with self.assertLogs("adapters", "WARNING") as logged:
            self.use(self.foreign(lora_alpha=800))
        self.assertIn(remark, " ".join(logged.output))

    def test_a_base_path_that_leads_anywhere_is_only_read_and_compared(self) -> None:
        for named in ("../../etc", "/etc", "/proc/self", "a" * 5000, "\x00", "https://example.org/model"):
            with self.subTest(named[:20]), self.assertLogs("adapters", "WARNING") as logged:
                self.use(self.foreign(base_model_name_or_path=named))
            self.assertIn("cannot be verified", logged.output[0])
        with self.refused("made for another base model"):
            self.use(self.foreign(base_model_name_or_path=str(saved_model("minimax_m2", seed=1).directory)))

    def test_links_out_of_the_folder_are_refused_and_those_of_a_hub_cache_are_not(self) -> None:
        for name in (CONFIG, WEIGHTS):
            directory = self.foreign()
            outside = temporary_directory() / name
            shutil.move(directory / name, outside)
            (directory / name).symlink_to(outside)
            with self.refused(f"{name} leads out of"):
                self.use(directory)
            blob = temporary_directory() / "models--org--name" / "blobs" / "0123"
            blob.parent.mkdir(parents=True)
            shutil.move(outside, blob)
            (directory / name).unlink()
            (directory / name).symlink_to(blob)
            self.use(directory)
        root = temporary_directory() / "root"
        root.mkdir()
        (root / "adapter").symlink_to(self.foreign())
        with self.refused("no adapter in PEFT's format"):
            self.use(root)

    def test_an_expression_that_never_ends_is_stopped(self) -> None:
        endless = r"(.*.*)*(.*.*)*(.*.*)*x\d"
        for settings in ({"target_modules": endless}, {"rank_pattern": {endless: 4}}, {"alpha_pattern": {endless: 4}}):
            with (
                self.subTest(settings),
                mock.patch.object(adapter_config, "PATIENCE_S", 0.3),
                self.refused("longer than 0.3 s"),
            ):
                self.use(self.foreign(**settings))
        self.assertEqual(signal.getitimer(signal.ITIMER_REAL), (0.0, 0.0))


class Pickles(Tampering):
    """A pickle that would create a file: it is refused wherever it stands, and the file does not exist."""

    def setUp(self) -> None:
        self.victim = temporary_directory() / "created"
        self.payload = pickle.dumps(Payload(self.victim))
        self.addCleanup(lambda: self.assertFalse(self.victim.exists(), "the pickle was run"))

    def test_the_payload_works(self) -> None:
        pickle.loads(self.payload)
        self.assertTrue(self.victim.exists())
        self.victim.unlink()

    def test_as_the_weights_of_an_adapter(self) -> None:
        for name in ("adapter_model.bin", WEIGHTS):
            directory = temporary_directory() / "foreign"
            shutil.copytree(whole()[0]["domain"] / "adapter", directory)
            (directory / WEIGHTS).unlink()
            (directory / name).write_bytes(self.payload)
            completed = forked("compose", "--preset", PRESET, *whole()[0].flags, "--compose.also", str(directory))
            self.assert_refused(completed, directory, "pickled weights" if name != WEIGHTS else "is damaged")

    def test_as_the_weights_of_a_base_model(self) -> None:
        for name in ("pytorch_model.bin", "model.pt", "model.safetensors"):
            directory = temporary_directory() / "base"
            shutil.copytree(whole()[0]["base"], directory)
            (directory / files.MANIFEST).unlink()
            (directory / "model.safetensors").unlink()
            (directory / name).write_bytes(self.payload)
            with self.subTest(name), self.refused(directory):
                base = fetched(directory)
                loading.load_model(base, BaseModelSection(source=str(directory), dtype="float32"))

    def test_in_a_checkpoint_whose_manifest_was_forged_for_it(self) -> None:
        root = temporary_directory() / "checkpoints"
        save_checkpoints(root, (4,))
        directory = root / "step-00000004"
        (directory / "optimizer.safetensors").write_bytes(self.payload)
        files.seal(directory, {"kind": "checkpoint", "step": 4, "run": ""})
        self.assertEqual(checkpoints.newest_valid(root), directory, "the forged manifest is consistent")
        with self.assertRaises(Exception) as caught:
            checkpoints.load(directory, torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]))
        self.assertIn("header", str(caught.exception).lower())


class ModelDirectory(Tampering):
    """A base model from elsewhere: no code, no path out of it, no weight made up."""

    def setUp(self) -> None:
        self.directory = temporary_directory() / "base"
        shutil.copytree(whole()[0]["base"], self.directory)
        (self.directory / files.MANIFEST).unlink()

    def change(self, name: str, **settings: Any) -> None:
        path = self.directory / name
        files.write_json(path, {**(files.read_json(path) if path.exists() else {}), **settings})

    def test_as_it_is_it_is_accepted(self) -> None:
        fetched(self.directory)

    def test_a_config_that_names_code_on_a_hub_is_refused(self) -> None:
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
            for settings in ({key: "org/kernel"}, {"text_config": {key: "org/kernel@v1:layer"}}):
                self.setUp()
                self.change("config.json", **settings)
                with self.subTest(settings), self.refused("names code on a hub", "org/kernel"):
                    fetched(self.directory)
        self.setUp()
        self.change("config.json", attn_implementation="sdpa")
        fetched(self.directory)

    def test_code_that_a_model_brings_is_not_run(self) -> None:
        victim = self.directory.parent / "created"
        (self.directory / "evil.py").write_text(f"open({str(victim)!r}, 'w')\nclass Evil: ...\n")
        section = BaseModelSection(source=str(self.directory), dtype="float32")
        auto_map = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
        self.change("config.json", auto_map=auto_map)
        self.change("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
        loading.load_model(fetched(self.directory), section)
        chat.load_tokenizer(self.directory)
        self.change("config.json", model_type="evil")
        with self.refused(self.directory):
            loading.load_model(fetched(self.directory), section)
        self.assertFalse(victim.exists())

    def test_paths_that_lead_out_are_refused(self) -> None:
        outside = self.directory.parent / "outside"
        outside.mkdir()
        shutil.copy(self.directory / "tokenizer.json", outside / "tokenizer.9.json")
        self.change("tokenizer_config.json", fast_tokenizer_files=["../outside/tokenizer.9.json"])
        with self.refused("fast_tokenizer_files leads out of"):
            fetched(self.directory)
        self.change("tokenizer_config.json", fast_tokenizer_files=None)
        self.change("model.safetensors.index.json", weight_map={"a": "../outside/model.safetensors"})
        with self.refused("weight_map leads out of"):
            fetched(self.directory)
        (self.directory / "model.safetensors.index.json").unlink()
        secret = outside / "secret.txt"
        secret.write_text("secret")
        (self.directory / "merges.txt").symlink_to(secret)  # a merge would copy it into its result
        with self.refused("merges.txt leads out of"):
            fetched(self.directory)

    def test_missing_weights_are_not_made_up(self) -> None:
        state = load_file(self.directory / "model.safetensors")
        lost = "model.layers.1.self_attn.o_proj.weight"
        del state[lost]
        save_file(state, self.directory / "model.safetensors", metadata={"format": "pt"})
        with self.refused("lack 1 tensors", lost):
            loading.load_model(fetched(self.directory), BaseModelSection(source=str(self.directory), dtype="float32"))

    def test_a_model_built_here_and_changed_since_is_refused_before_it_is_used(self) -> None:
        copy = whole()[0].copy()
        section = BaseModelSection(source="toy:minimax_m2", name="tiny-minimax-m2", dtype="float32")
        sources.fetch(section, copy.roots[1])
        path = copy["base"] / "model.safetensors"
        stat = path.stat()
        path.write_bytes(flipped(path.read_bytes()))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with self.refused("model.safetensors was changed after it was written"):
            sources.fetch(section, copy.roots[1])


class Data(Tampering):
    def read(self, content: bytes, name: str) -> list[str]:
        """A file as documents and, when it is a table, as labelled pairs: texts, or an error of both."""
        folder = temporary_directory()
        self.addCleanup(shutil.rmtree, folder)
        (folder / name).write_bytes(content)
        texts = list(read_documents([str(folder / name)], cache_dir=folder / "cache")[0]["text"])
        if not name.endswith(".txt"):
            read_task_examples(str(folder / name), cache_dir=folder / "cache")
        return texts

    def test_each_kind_of_damage_is_an_error_with_file_and_line_or_has_its_treatment(self) -> None:
        row = b'{"text": "t", "question": "q", "answer": "a"}\n'
        for what, content, name, said in (
            ("cut in a line", row + row[:20], "a.jsonl", "a.jsonl:2: not valid JSON"),
            ("cut in a quoted cell", b'text,question,answer\nt,q,"a', "a.csv", "a.csv:2: not valid CSV"),
            ("cut in a character", "é".encode()[:1], "a.txt", "a.txt:1: not UTF-8, at byte 1"),
            ("empty", b"", "a.jsonl", "the corpus is empty: 1 files read, dropped: 1 empty"),
            ("empty text", b"", "a.txt", "the corpus is empty: 1 files read, dropped: 1 empty"),
            ("white space only", b" \n \n", "a.jsonl", "the corpus is empty"),
            ("a NUL byte", row + b'{"text": "a\0b"}\n', "a.jsonl", "a.jsonl:2: contains a NUL byte"),
            ("UTF-16 that does not say so", "text".encode("utf-16-le"), "a.csv", "a.csv:1: contains a NUL byte"),
            ("Latin-1", row + '{"text": "é"}'.encode("latin-1"), "a.jsonl", "a.jsonl:2: not UTF-8, at byte 11"),
            ("half a surrogate", b'{"text": "\\ud800"}', "a.jsonl", "a.jsonl:1: half of a surrogate pair"),
            ("a number of 5,000 digits", b'{"text": ' + b"1" * 5000 + b"}", "a.jsonl", "a.jsonl:1: not valid JSON"),
            ("100,000 brackets", b'{"text": ' + b"[" * 100_000, "a.jsonl", "a.jsonl:1: not valid JSON"),
        ):
            with self.subTest(what), self.refused(said):
                self.read(content, name)
        mark = b"\xef\xbb\xbf"
        self.assertEqual(self.read(mark + row, "a.jsonl"), ["t"])
        self.assertEqual(self.read(mark + b"text,question,answer\nt,q,a\n", "a.csv"), ["t"])
        self.assertEqual(self.read("text,question,answer\nt,q,a\n".encode("utf-16"), "a.csv"), ["t"])

    def test_a_hundred_megabytes_on_one_line_are_an_error_with_file_and_line(self) -> None:
        words, size = b"word " * 20_971_520, "a document of 104,857,600 characters"
        rows = b'{"text": "short"}\n{"text": "' + words + b'"}\n'
        for content, name, said in (
            (words, "a.txt", f"a.txt: {size}"),
            (rows, "a.jsonl", f"a.jsonl:2: {size}"),
            (b"text\nshort\n" + words + b"\n", "a.csv", f"a.csv:3: {size}"),
        ):
            with self.subTest(name), self.refused(said, "split it"):
                self.read(content, name)
        folder = temporary_directory()
        self.addCleanup(shutil.rmtree, folder)
        (folder / "a.jsonl").write_bytes(rows.replace(b'"text": ', b'"question": "q", "answer": '))
        with self.refused("a.jsonl:2: an example of 104,", "shorten it"):
            read_task_examples(str(folder / "a.jsonl"), cache_dir=folder)

    def test_a_line_longer_than_memory_is_not_read_to_its_end(self) -> None:
        with mock.patch.object(text_lines, "LONGEST_LINE", 1000):
            for name in ("a.jsonl", "a.csv", "a.json"):
                with self.subTest(name), self.refused(f"{name}:2: a line of more than 1,000 bytes"):
                    self.read(b"\n" + b"x" * 5000, name)

    def test_a_word_file_that_unpacks_to_gigabytes_is_not_unpacked(self) -> None:
        path = temporary_directory() / "bomb.docx"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("word/media/x", "w") as entry:
            for _ in range(4):
                entry.write(bytes(1 << 20))
        with mock.patch.object(archives, "LARGEST_ARCHIVE", 1 << 20), self.assertRaises(NoTextError) as refused:
            word_text.extract_docx(path)
        self.assertIn("it unpacks to 4,194,304 bytes", str(refused.exception))

    def test_a_question_that_holds_line_separators_is_one_pair_when_it_is_read_again(self) -> None:
        place = Workspace()
        rows = [{**pair_row(i), "question": f"What\u2028is\x85f{i}?\x0b\x1c"} for i in range(12)]
        task = write_jsonl(place.root / "rows.jsonl", rows)
        made = last_json(place.run("prepare_data", "--data.corpus", "none", "--data.task", str(task)))
        found = [e["question"] for split in prepared.SPLITS for e in Prepared(Path(made["run"])).examples(split)]
        # U+0085 is the byte of an ellipsis in cp1252
        expected = (row["question"].strip().replace("\x85", "\u2026") for row in rows)
        self.assertEqual(sorted(found), sorted(expected))

    def test_many_long_documents_are_tokenised_in_groups_and_give_the_same_ids(self) -> None:
        tokenizer = chat.load_tokenizer(whole()[0]["base"])
        texts = [f"document {i} " * (i + 1) for i in range(30)]
        grouped = [
            ids for group in prepared_documents._groups(texts, 200) for ids in chat.document_ids(tokenizer, group)
        ]
        self.assertEqual(grouped, chat.document_ids(tokenizer, texts))
        self.assertTrue(all(len(g) == 1 or sum(map(len, g)) <= 200 for g in prepared_documents._groups(texts, 200)))

    def test_data_that_changed_between_run_and_resume_is_refused_and_the_right_data_goes_on(self) -> None:
        copy = whole()[0].copy()
        places = ["--preset", PRESET, *copy.flags[:4]]
        run = [*places, "--run.name", "stopped", "--domain.train.epochs", "40", "--inputs.prepared"]
        script = Script("train_domain_adapter", *run, str(copy["prepared"]))
        made = copy.roots[1] / "domain" / "stopped"
        script.wait_until(lambda: any((made / "checkpoints").glob("step-*/manifest.json")))
        script.signal(signal.SIGTERM)
        self.assertEqual(script.wait().returncode, 75)
        arrow = next((copy["prepared"] / "corpus").glob("*.arrow"))
        sound = arrow.read_bytes()
        arrow.write_bytes(flipped(sound))
        self.assert_refused(forked("train_domain_adapter", *run, str(copy["prepared"])), arrow, "was changed after")
        arrow.write_bytes(sound)
        corpus = write_jsonl(
            copy.root / "other.jsonl", [{"id": f"o{i}", "text": f"Other text {i}."} for i in range(12)]
        )
        other = last_json(forked("prepare_data", *places, "--data.corpus", str(corpus), "--data.task", "none"))["run"]
        refused = forked("train_domain_adapter", *run, other)
        self.assert_refused(
            refused,
            "holds a run with other settings: data was",
            "give this run its own --run.name",
            f"--inputs.prepared {copy['prepared']}",
        )
        self.assertTrue(any((made / "checkpoints").glob("step-*")), "what was done is kept")


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.victim,)


def flipped(content: bytes) -> bytes:
    """One bit of the byte in the middle."""
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def named(path: Path) -> str:
    """What has to be said: the file; of a manifest of something else, that these files are not its own."""
    return str(path.parent if path.name == files.MANIFEST else path)


def save_checkpoints(root: Path, steps: tuple[int, ...]) -> None:
    parameter = torch.nn.Parameter(torch.ones(64))
    optimizer = torch.optim.AdamW([parameter])
    for step in steps:
        parameter.grad = torch.full((64,), float(step))
        optimizer.step()
        weights = {"w": parameter.detach().clone()}
        checkpoints.save(
            root,
            checkpoints.TrainingState(step=step),
            weights,
            weights,
            checkpoints.optimizer_tensors(optimizer),
            keep=2,
        )


def config_for(place: Whole, *more: str) -> Config:
    return cli.resolve(["--preset", PRESET, *place.flags, *more], {})


def fetched(directory: Path) -> BaseModel:
    return sources.fetch(BaseModelSection(source=str(directory), dtype="float32"), directory.parent / "models")


@functools.cache
def toy_base() -> BaseModel:
    section = BaseModelSection(source="toy:minimax_m2", name="tiny-minimax-m2", dtype="float32")
    return sources.fetch(section, whole()[0].roots[1])


def listed(root: Path) -> list[tuple[str, str]]:
    """Every file but locks and remembered digests, with its digest."""
    found = [p for p in sorted(root.rglob("*")) if p.is_file() and ".digests" not in p.parts and p.name != files.LOCK]
    return [(str(p), files.sha256_file(p)) for p in found]


if __name__ == "__main__":
    unittest.main()
