"""Whatever stands in a file, a flag or an artefact: a right result, or an error of ours that says what is wrong."""

from __future__ import annotations

import functools
import io
import json
import logging
import shutil
import struct
import unittest
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from config import BaseModelSection, Config
from tests.fault_support import LONG
from tests.support import PRESET, temporary_directory
from tests.whole_pipeline import Whole, whole
from utils import cli, flags, secrets
from utils.adapters import adapter_config, adapter_files, parent_runs
from utils.artifacts import files, manifests, runs
from utils.data import tables
from utils.data.documents import DOCUMENT_SUFFIXES, read_documents
from utils.data.examples import read_task_examples
from utils.data.extraction import worker
from utils.data.extraction.pool import ExtractionPool, Reading
from utils.exceptions import PipelineError
from utils.export import verification
from utils.models import chat, loading, sources
from utils.models.base_model import BaseModel
from utils.rollout.edge import golden

CONFIG, WEIGHTS = adapter_config.CONFIG, adapter_config.WEIGHTS
TEXT = st.text(max_size=20) | st.sampled_from(["", "\x00", "\ud800", "../x", "/etc", "(a+)+$", "[", "9" * 30, "nan"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, True, 10**400, 1e308, float("inf")])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
COLUMNS = (
    *("question", "answer", "answers", "context", "choices", "answer_index", "answerKey", "history", "system"),
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "reasoning"),
    *(
        "text",
        "id",
        "document",
        "title",
        "options",
        "A",
        "B",
        "label",
        "weight",
        "image",
        "chosen",
        "tools",
        "response",
    ),
    *("contexts", "data", "paragraphs", "is_impossible", "correct_answer", "distractor1", "source", "url"),
)
TURNS = st.dictionaries(
    st.sampled_from(["role", "from", "content", "value", "text", "tool_calls", "weight", "train", "reasoning_content"]),
    JSON | st.sampled_from(["user", "assistant", "tool", "system", "function_call"]),
)
SETTINGS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters", "x"),
    *("base_model_name_or_path", "revision", "auto_mapping", "megatron_core", "task_type", "peft_type"),
    *("eva_config", "runtime_config", "modules_to_save"),
)


def tries(number: int) -> int:
    """A third of them in `make test`, all in `make fault-test`."""
    return number if LONG else number // 3


# the same cases every time: a new one that fails belongs to who looks for it (FAULT_TESTS=long), not to a passer-by
QUICK = {
    "derandomize": not LONG,
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


def setUpModule() -> None:
    unittest.enterModuleContext(warnings.catch_warnings())
    warnings.simplefilter("ignore")  # of libraries about what they are given here
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)


class Arbitrary(unittest.TestCase):
    def outcome(self, call: Callable[[], Any]) -> Any:
        """The result, or the error of ours as text; any other exception fails the test."""
        try:
            return call()
        except PipelineError as error:
            self.assertEqual(error.exit_code, 2)
            self.assertTrue(str(error).strip())
            return str(error)


class Settings(Arbitrary):
    PATHS = sorted(flags.fields())

    @settings(max_examples=tries(40), **QUICK)
    @given(st.lists(st.tuples(st.sampled_from([*PATHS, *flags.SHORTCUTS.values(), "x.y"]), TEXT), max_size=4), TEXT)
    @example([("run.models_dir", "\x00")], "\ud800")
    @example([("data.corpus", '["a", 1]'), ("compose.weights", "[[1]]")], "")
    @example([("task.lora.target_modules", "[" * 3000)], "")
    def test_flags(self, flags: list[tuple[str, str]], stray: str) -> None:
        arguments = [word for name, value in flags for word in (f"--{name}", value)]
        for given_ones in (arguments, [f"--{name}={value}" for name, value in flags], [stray, *arguments]):
            found = self.outcome(lambda given_ones=given_ones: cli.resolve(given_ones, {}))
            self.assertIsInstance(found, (Config, str))

    @settings(max_examples=tries(30), **QUICK)
    @given(st.sampled_from(PATHS), TEXT | st.sampled_from(["null", "{}", "[]", "true", "1e999"]))
    def test_environment_variables(self, path: str, value: str) -> None:
        name = f"DTA_{path.replace('.', '__').upper()}"
        found = self.outcome(lambda: cli.resolve([], {name: value}))
        if isinstance(found, Config):
            self.assertEqual(found.overrides.get(path), "environment")

    @settings(max_examples=tries(200), **QUICK)
    @given(st.text(), st.text(min_size=8))
    def test_redaction_never_fails_and_never_lets_the_environment_s_value_through(self, text: str, value: str) -> None:
        found = secrets.redact(f"{text}{value}{text}", {"SOME_TOKEN": value})
        self.assertTrue(value not in found or value in secrets.HIDDEN)


class InThisProcess(ExtractionPool):
    """Reads files here, as a child would: starting hundreds of children takes minutes."""

    def submit(self, path: Path) -> Reading:
        return Reading(path, worker.answer(str(path)))


@mock.patch("utils.data.documents.ExtractionPool", InThisProcess)
class Documents(Arbitrary):
    def read(self, content: bytes, suffix: str) -> Any:
        folder = temporary_directory()
        path = folder / f"file{suffix}"
        path.write_bytes(content)

        def documents() -> list[str]:
            return list(read_documents([str(path)], cache_dir=folder / "cache")[0]["text"])

        found = self.outcome(documents)
        if isinstance(found, list):
            self.assertTrue(all(isinstance(text, str) and "\0" not in text for text in found))
        if suffix in tables.TABLE_SUFFIXES:
            pairs = self.outcome(lambda: read_task_examples(str(path), cache_dir=folder / "cache"))
            if isinstance(pairs, tuple):
                examples, read = pairs
                self.assertEqual(read.rows, read.examples + sum(read.dropped.values()))
                for pair in examples:
                    json.dumps(pair, ensure_ascii=False).encode()
                    calls = pair.get("tool_calls")
                    self.assertTrue(
                        pair["answers"] and all(isinstance(a, str) and (a or calls) for a in pair["answers"])
                    )
        shutil.rmtree(folder)
        return found

    @settings(max_examples=tries(150), **QUICK)
    @given(st.binary(max_size=200), st.sampled_from(DOCUMENT_SUFFIXES))
    @example(b"\xef\xbb\xbf", ".txt")
    @example(b"\xff\xfeh\0i\0", ".csv")
    @example(b"PK\x03\x04" + bytes(60), ".docx")
    @example(b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>", ".pdf")
    @example(b"PAR1" + bytes(20) + b"PAR1", ".parquet")
    @example(b"<div>" * 5000, ".html")
    def test_bytes_under_any_suffix(self, content: bytes, suffix: str) -> None:
        self.read(content, suffix)

    @settings(max_examples=tries(150), **QUICK)
    @given(st.lists(JSON, max_size=4), st.sampled_from([".jsonl", ".json"]))
    @example([{"question": "q", "answers": {"text": [1, None]}}], ".jsonl")
    @example([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], ".jsonl")
    @example([{"question": "q", "choices": {"text": ["a", "b"], "label": 3}, "answerKey": "A"}], ".jsonl")
    @example([{"question": "q", "choices": ["a", "b"], "answer_index": float("nan")}], ".jsonl")
    @example([{"question": "q", "answer": "a", "history": [["x"]]}], ".jsonl")
    def test_rows_of_any_structure(self, rows: list[Any], suffix: str) -> None:
        lines = [json.dumps(row) for row in rows]
        text = "\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]"
        self.read(text.encode(), suffix)

    @settings(max_examples=tries(150), **QUICK)
    @given(st.dictionaries(st.sampled_from(COLUMNS), JSON | st.lists(TURNS, max_size=3), max_size=5))
    def test_rows_that_almost_have_a_shape(self, row: dict[str, Any]) -> None:
        self.read(json.dumps(row).encode(), ".jsonl")

    @settings(max_examples=tries(60), **QUICK)
    @given(st.text(alphabet='",\n\r\tab\x00é[{', max_size=60), st.sampled_from([".csv", ".tsv"]))
    def test_cells_of_any_text(self, text: str, suffix: str) -> None:
        self.read(("question,answer\n" + text).encode(), suffix)
        self.read(text.encode(), suffix)

    @settings(max_examples=tries(60), **QUICK)
    @given(st.data())
    def test_a_parquet_file_with_one_changed_byte(self, data: st.DataObject) -> None:
        content = bytearray(parquet_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        self.read(bytes(content), ".parquet")

    @settings(max_examples=tries(100), **QUICK)
    @given(st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
    @example(b'{"question": "q", "answer": "a", "history": "abc"}')
    @example(b"[" * 30000)
    def test_golden_prompts(self, content: bytes) -> None:
        path = temporary_directory() / "golden.jsonl"
        path.write_bytes(content)
        found = self.outcome(lambda: golden.read(path, "Be brief."))
        self.assertTrue(found)


class Manifests(Arbitrary):
    @settings(max_examples=tries(60), **QUICK)
    @given(JSON | st.dictionaries(st.sampled_from(["files", "digest", "kind", "parents", "identity", "base"]), JSON))
    @example({"files": {"\x00": {"sha256": "0" * 64, "bytes": 0}}, "digest": "0" * 64})
    @example({"files": {"": {"sha256": "0" * 64, "bytes": 0}}, "digest": "0" * 64})
    @example({"files": {"a": {"sha256": "0" * 64, "bytes": True}}, "digest": "0" * 64})
    def test_of_any_structure(self, value: Any) -> None:
        root = temporary_directory()
        directory = root / "task" / "run"
        directory.mkdir(parents=True)
        (directory / files.MANIFEST).write_text(json.dumps(value))
        self.assertIsInstance(self.outcome(lambda: files.verify(directory)), str)
        self.assertIsInstance(self.outcome(lambda: runs.parent(root, "task", "", lambda run: "", flag="--x")), str)
        self.assertFalse(verification.verify(directory, (root,)).trusted)

    @settings(max_examples=tries(60), **QUICK)
    @given(st.data())
    def test_of_ours_with_one_value_replaced_and_sealed_again(self, data: st.DataObject) -> None:
        """A forger knows the format: readers that trust the seal must not stumble over what it seals."""
        kind = data.draw(st.sampled_from(["prepared", "domain", "task", "composed", "merged"]))
        copy, original = workshop(), files.read_json(whole()[0][kind] / files.MANIFEST)
        path = data.draw(st.sampled_from(places(original)))
        forged = replaced(original, path, data.draw(JSON))
        try:
            forged[manifests.SEAL] = manifests.seal(forged, files.fingerprint)
        except (ValueError, TypeError, AttributeError):
            return  # no JSON, or no object
        target = copy[kind] / files.MANIFEST
        try:
            target.write_text(json.dumps(forged))  # halves of characters are written as escapes
            config = cli.resolve(["--preset", PRESET, *copy.flags], {})
            for read in (
                lambda: parent_runs.adapter_runs(config, toy_base()),
                lambda: parent_runs.data_of(config, toy_base(), parent_runs.adapter_runs(config, toy_base())),
                lambda: runs.complete_runs(copy.roots[1], "composed"),
                lambda: sources.fetch(BaseModelSection(source=str(copy["merged"])), copy.roots[1]),
            ):
                self.outcome(read)
            verification.verify(copy["merged"], copy.roots)
        finally:
            shutil.copy(whole()[0][kind] / files.MANIFEST, target)

    @settings(max_examples=tries(30), **QUICK)
    @given(st.binary(max_size=60) | st.sampled_from([b"[" * 50000, b"1" * 5000, b"\xff", b'{"a": NaN}', b""]))
    def test_of_any_bytes(self, content: bytes) -> None:
        directory = temporary_directory()
        (directory / files.MANIFEST).write_bytes(content)
        self.assertIsInstance(self.outcome(lambda: files.read_manifest(directory)), str)
        self.assertFalse(verification.verify(directory, ()).trusted)


class Adapters(Arbitrary):
    def use(self, directory: Path) -> Any:
        with mock.patch.object(adapter_config, "PATIENCE_S", 0.5):
            verification.verify(directory, ())
            return self.outcome(lambda: adapter_files.load(adapter_files.find(directory), toy_base()))

    def folder(self) -> Path:
        directory = temporary_directory() / "adapter"
        shutil.copytree(whole()[0]["domain"] / "adapter", directory)
        return directory

    @settings(max_examples=tries(100), **QUICK)
    @given(st.dictionaries(st.sampled_from(SETTINGS), JSON, min_size=1, max_size=3))
    @example({"lora_alpha": 10**400})
    @example({"target_modules": "(a+)+$"})
    @example({"rank_pattern": {"(.*)*x": 4}})
    @example({"layers_to_transform": [0], "layers_pattern": "("})
    @example({"target_parameters": ["experts.gate_up_proj", 3]})
    def test_settings_of_any_value(self, changes: dict[str, Any]) -> None:
        directory = self.folder()
        (directory / CONFIG).write_text(json.dumps({**files.read_json(directory / CONFIG), **changes}))
        self.use(directory)

    @settings(max_examples=tries(60), **QUICK)
    @given(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60))
    def test_a_configuration_of_any_bytes(self, content: bytes) -> None:
        directory = self.folder()
        (directory / CONFIG).write_bytes(content)
        self.assertIsInstance(self.use(directory), str)

    @settings(max_examples=tries(80), **QUICK)
    @given(st.data())
    def test_weights_with_one_changed_byte_in_the_header(self, data: st.DataObject) -> None:
        directory = self.folder()
        content = bytearray((directory / WEIGHTS).read_bytes())
        end = 8 + struct.unpack("<Q", content[:8])[0]
        content[data.draw(st.integers(0, end - 1))] ^= data.draw(st.integers(1, 255))
        (directory / WEIGHTS).write_bytes(bytes(content))
        self.use(directory)

    def test_weights_in_every_number_format_that_safetensors_knows(self) -> None:
        content = (whole()[0]["domain"] / "adapter" / WEIGHTS).read_bytes()
        for name in ("F4", "F8_E8M0", "F6_E2M3", "C64", "U16", "I64", "BOOL", "BF16", "F64", "XX"):
            directory = self.folder()
            (directory / WEIGHTS).write_bytes(retyped(content, name))
            found = self.use(directory)
            self.assertTrue(isinstance(found, str) or name in ("BF16", "F64"), name)

    @settings(max_examples=tries(40), **QUICK)
    @given(st.binary(max_size=100))
    def test_weights_of_any_bytes(self, content: bytes) -> None:
        directory = self.folder()
        (directory / WEIGHTS).write_bytes(content)
        self.assertIn("is damaged", self.use(directory))


class ModelDirectories(Arbitrary):
    @settings(max_examples=tries(25), **QUICK)
    @given(
        st.sampled_from(["config.json", "tokenizer_config.json", "model.safetensors.index.json", "tokenizer.json"]),
        JSON | st.dictionaries(st.sampled_from(["weight_map", "fast_tokenizer_files", "model_type", "auto_map"]), JSON),
    )
    @example("model.safetensors.index.json", {"weight_map": ["a"]})
    @example("config.json", [1])
    def test_settings_of_any_structure(self, name: str, value: Any) -> None:
        directory = temporary_directory() / "base"
        shutil.copytree(whole()[0]["base"], directory)
        (directory / files.MANIFEST).unlink()
        (directory / name).write_text(json.dumps(value))
        section = BaseModelSection(source=str(directory), dtype="float32")
        self.outcome(lambda: chat.load_tokenizer(sources.fetch(section, directory.parent).directory))
        verification.verify(directory, ())
        self.outcome(lambda: loading.load_model(sources.fetch(section, directory.parent), section))


@functools.cache
def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"question": ["a", "b"], "answer": ["c", None], "text": ["x", "y"]}), sink)
    return sink.getvalue()


@functools.cache
def toy_base() -> BaseModel:
    section = BaseModelSection(source="toy:minimax_m2", name="tiny-minimax-m2", dtype="float32")
    return sources.fetch(section, whole()[0].roots[1])


@functools.cache
def workshop() -> Whole:
    return whole()[0].copy()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested JSON, as keys."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [place for key, one in inner for place in places(one, (*path, key))]
    return [path, *found] if path else found


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    changed = json.loads(json.dumps(value))
    functools.reduce(lambda inner, key: inner[key], path[:-1], changed)[path[-1]] = new
    return changed


def retyped(content: bytes, name: str) -> bytes:
    """The same file with another number format in its header, and as many bytes as that takes where it is known."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    bits = {"F4": 4, "F8_E8M0": 8, "F6_E2M3": 6, "C64": 64, "U16": 16, "I64": 64, "BOOL": 8, "BF16": 16, "F64": 64}
    end = 0
    for entry in header.values():
        if "shape" in entry:
            count = entry["shape"][0] * entry["shape"][1]
            size = count * bits.get(name, 32) // 8
            entry |= {"dtype": name, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes([0, 60]) * (end // 2)


if __name__ == "__main__":
    unittest.main()
