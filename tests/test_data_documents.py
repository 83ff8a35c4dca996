"""Documents, splits and the Python demo domain: every format is a real file, every error names file and line."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import unicodedata
import unittest
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from tests.support import ROOT, run_program
from utils.data.documents import CHARACTERS_PER_BATCH, ReadLimits, read_documents
from utils.data.domains.python_docs import _entries, python_documents, python_qa, standard_modules
from utils.data.extraction import worker
from utils.data.extraction.cleaning import clean_text
from utils.data.splits import hash_share, leaks, split_by_document
from utils.data.tables import ProblemList, UniqueIds, digest16, iter_rows
from utils.exceptions import DataError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def write_pdf(path: Path, pages: list[list[str]], *, password: str | None = None) -> None:
    """A minimal valid PDF: one text line per string, Helvetica, cross-reference table included."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, lines in enumerate(pages):
        shown = " ".join(f"({line}) Tj T*" for line in lines)
        stream = f"BT /F1 12 Tf 14 TL 72 720 Td {shown} ET".encode()
        resources = "/MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >>"
        objects.append(f"<< /Type /Page /Parent 2 0 R {resources} /Contents {5 + 2 * i} 0 R >>".encode())
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    body, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    body += b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\n" % (size, table, size)
    path.write_bytes(body + b"startxref\n%d\n%%%%EOF\n" % body.index(b"xref\n"))
    if password is not None:
        from pypdf import PdfWriter

        writer = PdfWriter(clone_from=path)
        writer.encrypt(password, algorithm="RC4-128")
        writer.write(path)


def hub_dataset(splits: dict[str, list], files: Sequence[str] = ()) -> SimpleNamespace:
    """What `datasets.load_dataset_builder` gives for a dataset on the hub with these rows and these files."""
    config = SimpleNamespace(data_files={"train": list(files)})
    return SimpleNamespace(config=config, as_streaming_dataset=lambda: splits)


class CorpusTest(unittest.TestCase):
    """A temporary folder, and short ways to write a file into it, read it, and read what was wrong."""

    def setUp(self) -> None:
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name) / "sources"
        self.folder.mkdir()
        self.cache = Path(temporary.name) / "cache"

    def write(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def read(self, *sources: str, **options):
        dataset, report = read_documents(sources or [str(self.folder)], cache_dir=self.cache, **options)
        return {row["id"]: row["text"] for row in dataset}, report

    def error(self, *sources: str, **options) -> str:
        before = sorted(self.cache.glob("*"))
        with self.assertRaises(DataError) as caught:
            self.read(*sources, **options)
        self.assertEqual(sorted(self.cache.glob("*")), before, "a failed read leaves nothing behind")
        return str(caught.exception)


class TestFormats(CorpusTest):
    def test_plain_text_formats_are_read_as_they_are(self):
        for number, suffix in enumerate((".txt", ".md", ".markdown", ".rst", ".TXT")):
            self.write(f"{number}{suffix}", f"# Title {number}\n\nBody.\n")
        texts, report = self.read()
        self.assertEqual(texts["0.txt"], "# Title 0\n\nBody.")
        self.assertEqual((report.files, report.documents), (5, 5))

    def test_html_gives_the_text_and_not_the_scripts(self):
        page = (
            "<html><head><title>T</title><script>var x</script></head><body><h1>Heat</h1><p>Warm &amp; dry.</p></body>"
        )
        for name in ("a.html", "b.htm"):
            self.write(name, page.replace("Heat", name))
        texts, _ = self.read()
        self.assertIn("Warm & dry.", texts["a.html"])
        self.assertNotIn("var x", texts["b.htm"])

    def test_pdf_pages_are_joined_and_line_end_hyphens_removed(self):
        write_pdf(self.folder / "a.pdf", [["The thermo-", "meter of Graeco-", "Roman times."], ["Second page."]])
        texts, _ = self.read()
        self.assertEqual(texts["a.pdf"], "The thermometer of Graeco-Roman times.\n\nSecond page.")

    def test_docx_gives_paragraphs_and_tables_in_order(self):
        from docx import Document

        document = Document()
        document.add_paragraph("Before.")
        table = document.add_table(rows=2, cols=2)
        for row, column, text in ((0, 0, "name"), (0, 1, "value"), (1, 0, "merged")):
            table.cell(row, column).text = text
        table.cell(1, 0).merge(table.cell(1, 1))
        document.add_paragraph("After.")
        document.save(str(self.folder / "a.docx"))
        texts, _ = self.read()
        self.assertEqual(texts["a.docx"], "Before.\n\nname | value\nmerged\n\nAfter.")

    def test_jsonl_keeps_ids_and_prefers_the_text_column(self):
        self.write("a.jsonl", '{"id": 7, "text": "seven", "body": "no"}\n\n{"Content": "eight"}\n')
        texts, _ = self.read()
        self.assertEqual(texts, {"7": "seven", "a.jsonl#3": "eight"})

    def test_json_may_be_a_list_or_lines_or_one_object(self):
        self.write("list.json", json.dumps([{"text": "one"}, {"text": "two"}], indent=2))
        self.write("lines.json", '{"text": "three"}\n{"text": "four"}\n')
        self.write("object.json", json.dumps({"text": "five"}, indent=2))
        texts, _ = self.read()
        self.assertEqual(
            texts,
            {
                "list.json#1": "one",
                "list.json#2": "two",
                "lines.json#1": "three",
                "lines.json#2": "four",
                "object.json#1": "five",
            },
        )

    def test_csv_and_tsv_cells_stay_text(self):
        with (self.folder / "a.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["id", "text"], ["007", 'two\nlines, "quoted"'], ["008", "NA"]])
        self.write("b.tsv", "text\tlabel\r\nhello there\tx\r\n")
        texts, _ = self.read()
        self.assertEqual(texts, {"007": 'two\nlines, "quoted"', "008": "NA", "b.tsv#2": "hello there"})

    def test_a_csv_cell_may_be_a_long_document(self):
        self.write("a.csv", "text\n" + "word " * 40_000 + "\n")
        _, report = self.read()
        self.assertEqual(report.characters, 5 * 40_000 - 1)

    def test_parquet_rows_are_read_even_from_a_path_with_brackets(self):
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.table({"id": ["x", None], "text": ["first", "second"]})
        parquet.write_table(table, self.folder / "data[1].parquet")
        texts, _ = self.read()
        self.assertEqual(texts, {"x": "first", "data[1].parquet#2": "second"})

    def test_columns_are_exactly_id_and_text(self):
        self.write("a.jsonl", '{"id": "a", "text": "t", "extra": 1}')
        dataset, _ = read_documents([str(self.folder)], cache_dir=self.cache)
        self.assertEqual(
            {name: value.dtype for name, value in dataset.features.items()}, {"id": "string", "text": "string"}
        )


class TestCleaning(CorpusTest):
    def test_text_is_nfc_with_unix_line_ends_and_no_controls(self):
        self.assertEqual(clean_text("e\u0301 \r\nb\x07\tc\rd\x0ce"), "é\nb\ufffd\tc\nd\ne")
        self.assertTrue(unicodedata.is_normalized("NFC", clean_text("A\u030angstro\u0308m")))

    def test_three_blank_lines_become_two_and_two_stay(self):
        self.assertEqual(clean_text("a\n\n \n\n\n\nb\n\n\nc\n\n"), "a\n\n\nb\n\n\nc")

    def test_byte_order_mark_is_accepted(self):
        self.write("a.txt", b"\xef\xbb\xbftext")
        self.write("b.jsonl", b'\xef\xbb\xbf{"text": "row"}\n')
        texts, _ = self.read()
        self.assertEqual(texts, {"a.txt": "text", "b.jsonl#1": "row"})


class TestDrops(CorpusTest):
    def test_duplicates_after_cleaning_are_dropped_and_counted(self):
        self.write("a.txt", "same\r\ntext  \n")
        self.write("b.txt", "same\ntext")
        texts, report = self.read()
        self.assertEqual((list(texts), report.dropped), (["a.txt"], {"duplicate": 1}))

    def test_empty_files_and_null_or_empty_rows_are_dropped_and_counted(self):
        self.write("empty.pdf", b"")
        self.write("blank.txt", " \n\n")
        self.write("a.jsonl", '{"text": null}\n{"text": ""}\n{"text": "kept"}\n')
        self.write("b.csv", "text,n\n,1\n")
        texts, report = self.read()
        self.assertEqual((list(texts), report.dropped), (["a.jsonl#3"], {"empty": 5}))

    def test_repeated_ids_become_unique(self):
        self.write(
            "a.jsonl", "".join(f'{{"id": "{i}", "text": "{n}"}}\n' for n, i in enumerate(["x", "x~2", "x", "x"]))
        )
        texts, _ = self.read()
        self.assertEqual(list(texts), ["x", "x~2", "x~3", "x~4"])

    def test_unique_ids_do_not_search_from_the_start_each_time(self):
        ids = UniqueIds()
        with mock.patch("utils.data.tables.digest16", wraps=digest16) as digests:
            self.assertEqual([ids.claim("a") for _ in range(1_000)][-1], "a~1000")
        self.assertLess(digests.call_count, 10_000)

    def test_folder_is_recursive_sorted_without_hidden_and_foreign_files(self):
        for name in ("b/two.txt", "b/.hidden.txt", ".git/x.txt", "a.txt", "b/photo.png", "Makefile"):
            self.write(name, f"text of {name}")
        texts, report = self.read()
        self.assertEqual(list(texts), ["a.txt", "b/two.txt"])
        self.assertEqual(report.dropped, {"suffix .png not read": 1, "suffix (none) not read": 1})
        self.assertEqual([Path(path).name for path in report.skipped_files], ["Makefile", "photo.png"])

    def test_a_link_to_the_parent_folder_does_not_loop(self):
        self.write("sub/a.txt", "text")
        os.symlink(self.folder, self.folder / "sub" / "up")
        _, report = self.read()
        self.assertEqual(report.files, 1)

    def test_a_pdf_without_text_is_dropped_in_a_folder_and_an_error_by_name(self):
        write_pdf(self.folder / "scan.pdf", [[], []])
        write_pdf(self.folder / "secret.pdf", [["text"]], password="word")
        self.write("damaged.pdf", b"%PDF-1.4 nothing")
        self.write("damaged.docx", b"PK nothing")
        self.write("a.txt", "text")
        with self.assertLogs("utils.data.corpus.read_report", "WARNING") as logged:
            _, report = self.read()
        self.assertEqual(report.dropped, {"no text could be extracted": 4})
        self.assertEqual(len(report.skipped_files), 4)
        self.assertEqual(len(logged.output), 4)
        self.assertRegex(self.error(str(self.folder / "scan.pdf")), "scan.pdf: no text .*2 pages.*OCR")
        self.assertRegex(self.error(str(self.folder / "secret.pdf")), "secret.pdf: no text .*encrypted")
        self.assertRegex(self.error(str(self.folder / "damaged.docx")), "damaged.docx: no text")

    def test_rows_of_a_table_in_a_folder_that_are_not_utf_8_are_left_out_and_counted(self):
        rows = [b'{"text": "fine"}', b'{"text": "na\xefve"}', b'{"text": "plain"}', b'{"text": "caf\xe9"}', b"{"]
        self.write("a.jsonl", b"\n".join(rows))
        self.write("b.jsonl", '{"text": "a mark \ufffd of its own"}\n')
        with self.assertLogs("utils.data.corpus.read_report", "WARNING") as logged:
            dataset, report = self.read()
        self.assertEqual(sorted(dataset.values()), ["a mark \ufffd of its own", "fine", "plain"])
        self.assertEqual(report.dropped, {"rows that are not UTF-8": 2, "malformed rows": 1})
        self.assertIn("a.jsonl:2: not UTF-8", " ".join(logged.output))

    def test_report_counts_characters_and_bytes_and_is_json(self):
        self.write("a.txt", "naïve")
        _, report = self.read()
        self.assertEqual((report.characters, report.utf8_bytes), (5, 6))
        self.assertEqual(json.loads(json.dumps(report.to_json()))["documents"], 1)


class TestErrors(CorpusTest):
    def error(self, *sources: str, **options) -> str:
        return super().error(*sources, **{"limits": ReadLimits(on_unreadable="stop"), **options})

    def test_malformed_line_is_named_with_file_and_line(self):
        path = self.write("a.jsonl", '{"text": "fine"}\n\n{"text": "broken\n{"text": "fine too"}\n[1]\n')
        message = self.error()
        self.assertIn(f"{path}:3: not valid JSON", message)
        self.assertIn(f"{path}:5: a list, not an object", message)

    def test_truncated_last_line_is_an_error(self):
        path = self.write("a.jsonl", '{"text": "fine"}\n{"text": "cut o')
        self.assertRegex(self.error(), rf"{path}:2: not valid JSON.*may be truncated")

    def test_malformed_json_list_is_named_once_with_its_line(self):
        path = self.write("a.json", '[\n{"text": "a"},\n{"text": "b"\n{"text": "c"}\n]')
        message = self.error()
        self.assertIn(f"{path}:4: not valid JSON", message)
        self.assertNotIn("problems", message)

    def test_bad_utf8_is_named_with_file_line_and_byte(self):
        path = self.write("a.txt", b"fine\ncaf" + b"\xe9 noir\n")
        rows = self.write("b.csv", b"text\nna\xefve\n")
        message = self.error()
        self.assertIn(f"{path}:2: not UTF-8, at byte 4", message)
        self.assertIn(f"{rows}:2: not UTF-8, at byte 3", message)

    def test_a_text_of_which_too_much_cannot_be_decoded_is_refused_by_name(self):
        path = self.write("a.txt", b"one\ntw\0o\n")
        self.assertIn(f"{path}: 1 of 8 characters could not be decoded", self.error())

    def test_half_a_surrogate_pair_is_named_with_its_line(self):
        path = self.write("a.jsonl", '{"text": "ok \\ud83d\\ude00"}\n{"text": "half \\ud83d"}\n')
        self.assertIn(f"{path}:2: half of a surrogate pair", self.error())

    def test_missing_text_column_lists_the_columns_and_the_fix(self):
        path = self.write("a.csv", "title,words\nx,y\nx,z\n")
        message = self.error()
        self.assertIn(f"{path}:2: no text column", message)
        self.assertIn("columns title, words", message)
        self.assertIn("name the column with the text 'text'", message)

    def test_task_file_is_not_taken_for_documents(self):
        self.write("task.jsonl", '{"document": "d1", "question": "q", "answers": ["a"]}\n')
        self.assertIn("no text column", self.error())

    def test_text_that_is_not_a_string_is_an_error(self):
        path = self.write("a.jsonl", '{"text": ["a", "b"]}\n')
        self.assertIn(f"{path}:1: 'text' is a list", self.error())

    def test_ragged_and_unclosed_csv_rows_are_named_with_their_first_line(self):
        ragged = self.write("a.csv", 'text,n\n"two\nlines",1\none,two,three\n')
        unclosed = self.write("b.csv", 'text,n\nfine,1\n"never closed,2\n')
        message = self.error()
        self.assertIn(f"{ragged}:4: 3 cells, but the first line names 2 columns", message)
        self.assertIn(f"{unclosed}:3: not valid CSV", message)

    def test_damaged_parquet_is_an_error(self):
        path = self.write("a.parquet", b"PAR1 nothing PAR1")
        self.assertIn(f"{path}: not readable as parquet", self.error())

    def test_all_problems_of_all_files_come_in_one_error_and_20_are_shown(self):
        self.write("a.jsonl", "{broken\n" * 15)
        self.write("b.jsonl", "{broken\n" * 15)
        message = self.error(str(self.folder), "no/such/folder")
        self.assertIn("b.jsonl:5:", message)
        self.assertNotIn("b.jsonl:6:", message)
        self.assertIn("and 11 more", message)

    def test_missing_path_is_named_with_the_fix(self):
        message = self.error("no/such/file.txt")
        self.assertIn("'no/such/file.txt' does not exist", message)
        self.assertIn(f"correct the path; it starts at the current folder, {Path.cwd()}", message)
        self.write("a note.md", "Text.")
        self.assertIn(f"-> did you mean {self.folder / 'a note.md'}?", self.error(str(self.folder / "a_note.md")))
        self.assertNotIn("current folder", self.error(str(self.folder / "zzzzzz")))
        self.assertIn("'' does not exist", self.error(""))

    def test_unknown_suffix_is_an_error_by_name(self):
        self.assertIn("photo.png: files of this kind are not read", self.error(self.write("photo.png", b"x")))

    def test_empty_corpus_says_what_was_dropped(self):
        self.write("a.txt", "")
        self.write("b.png", "")
        self.assertIn("the corpus is empty: 1 files read, dropped: 1 empty, 1 suffix .png not read", self.error())

    def test_unimportable_reader_is_an_error_and_not_a_dropped_file(self):
        write_pdf(self.folder / "a.pdf", [["text"]])
        with mock.patch.dict(sys.modules, {"pypdfium2": None}):
            reply = worker.answer(str(self.folder / "a.pdf"))
        with mock.patch("utils.data.extraction.pool.json.loads", return_value=reply):
            self.assertIn("the reader of .pdf files cannot be imported", self.error())


class TestStorage(CorpusTest):
    def test_an_edited_file_is_read_again(self):
        path = self.write("a.txt", "old")
        self.assertEqual(self.read(path)[0], {"a.txt": "old"})
        self.write("a.txt", "new")
        self.assertEqual(self.read(path)[0], {"a.txt": "new"})

    def test_many_and_large_rows_survive_batching_in_order(self):
        self.write("a.jsonl", "".join(json.dumps({"id": i, "text": f"{i} " * 3}) + "\n" for i in range(1_001)))
        with mock.patch("utils.data.documents.CHARACTERS_PER_BATCH", 100):
            texts, report = self.read()
        self.assertEqual(list(texts), [str(i) for i in range(1_001)])
        self.assertEqual(texts["1000"], "1000 1000 1000")
        self.assertLess(CHARACTERS_PER_BATCH * 4, 2**31)
        self.assertEqual(report.documents, 1_001)


class TestHub(CorpusTest):
    def test_unpinned_hub_dataset_is_an_error_that_says_how(self):
        for revision in (None, "main", COMMIT[:7]):
            message = self.error("org/name", hub_revision=revision)
            self.assertIn("not pinned to a commit", message)
            self.assertIn("git ls-remote https://huggingface.co/datasets/org/name", message)

    def test_pinned_hub_dataset_is_streamed_at_its_commit(self):
        splits = {"train": [{"text": "one"}, {"text": "two"}], "test": [{"text": "never"}]}
        dataset = hub_dataset(splits, [f"hf://datasets/org/name@{COMMIT}/data/train.parquet"])
        with mock.patch("datasets.load_dataset_builder", return_value=dataset) as load:
            texts, _ = self.read("org/name:config", hub_revision=COMMIT)
        self.assertEqual(list(texts.values()), ["one", "two"])
        self.assertEqual(load.call_args.args, ("org/name", "config"))
        self.assertEqual(load.call_args.kwargs["revision"], COMMIT)
        self.assertNotIn("trust_remote_code", load.call_args.kwargs)

    def test_a_hub_dataset_that_names_files_from_elsewhere_is_refused_before_a_row_is_read(self):
        for stray in (
            "/etc/hostname",
            "https://example.org/data.csv",
            f"hf://datasets/org/name@{'b' * 40}/train.csv",
            f"hf://datasets/org/name@{COMMIT}/../other@{COMMIT}/train.csv",
        ):
            dataset = hub_dataset({"train": [{"text": "never"}]}, [f"hf://datasets/org/name@{COMMIT}/a.csv", stray])
            with mock.patch("datasets.load_dataset_builder", return_value=dataset):
                message = self.error("org/name", hub_revision=COMMIT)
            self.assertIn("takes files from outside of that commit", message)
            self.assertIn(stray[:70], message)

    def test_hub_failure_is_an_error_with_the_reason(self):
        with mock.patch("datasets.load_dataset_builder", side_effect=ConnectionError("no route")):
            self.assertIn("ConnectionError: no route", self.error("org/name", hub_revision=COMMIT))


class TestSplits(unittest.TestCase):
    examples = [  # noqa: RUF012 - never changed
        {"id": f"{d}-{i}", "document": f"d{d}", "question": f"q{d}{i}", "context": None, "answers": ["a"]}
        for d in range(300)
        for i in range(3)
    ]

    def test_documents_stay_whole_and_nothing_is_lost(self):
        splits = split_by_document(self.examples, dev_share=0.1, test_share=0.2, seed=1)
        documents = {name: {e["document"] for e in part} for name, part in splits.items()}
        self.assertEqual(sum(map(len, splits.values())), len(self.examples))
        self.assertEqual(sum(map(len, documents.values())), 300)
        self.assertTrue(40 <= len(documents["test"]) <= 80 and 15 <= len(documents["dev"]) <= 45, documents)

    def test_split_does_not_depend_on_order_but_on_the_seed(self):
        options = {"dev_share": 0.1, "test_share": 0.2}
        first = split_by_document(self.examples, **options, seed=1)
        second = split_by_document(self.examples[::-1], **options, seed=1)
        other = split_by_document(self.examples, **options, seed=2)
        ids = [{e["id"] for e in splits["test"]} for splits in (first, second, other)]
        self.assertEqual(ids[0], ids[1])
        self.assertNotEqual(ids[0], ids[2])

    def test_no_split_is_empty_from_three_documents_on(self):
        for number in (3, 4, 5, 8):
            for seed in range(30):
                for dev_share, test_share in ((0.1, 0.1), (0.0, 0.0), (0.45, 0.5), (0.0, 0.99), (0.99, 0.0)):
                    part = self.examples[: 3 * number]
                    splits = split_by_document(part, dev_share=dev_share, test_share=test_share, seed=seed)
                    self.assertTrue(all(splits.values()), (number, seed, dev_share, test_share))

    def test_fewer_than_three_documents_is_an_error_with_the_fix(self):
        with self.assertRaisesRegex(DataError, "2 documents cannot be split(.|\n)*give each row the `document`"):
            split_by_document(self.examples[:6], dev_share=0.1, test_share=0.1, seed=0)

    def test_shares_that_leave_no_training_data_are_an_error(self):
        with self.assertRaisesRegex(DataError, "no training data"):
            split_by_document(self.examples, dev_share=0.5, test_share=0.5, seed=0)

    def test_leaks_ignore_case_and_white_space_but_not_the_context(self):
        train = [{"question": "What  is\nHeat?", "context": None, "answers": ["Energy"]}]
        same = {"question": "what is heat?", "context": "", "answers": [" energy "]}
        other = {"question": "what is heat?", "context": "In cooking.", "answers": ["energy"]}
        self.assertEqual(leaks(train, [other, same]), [same])

    def test_hash_share_is_fixed_and_below_one(self):
        expected = int(hashlib.sha256(b"42:json").hexdigest(), 16) / 2**256
        self.assertAlmostEqual(hash_share("json", 42), expected, places=12)
        with mock.patch("utils.data.splits.hashlib.sha256") as sha256:
            sha256.return_value.digest.return_value = b"\xff" * 32
            self.assertLess(hash_share("a", 0), 1.0)


class TestPythonDocs(unittest.TestCase):
    modules = ("json", "os", "textwrap", "shlex", "builtins", "unittest", "this_module_does_not_exist")

    def test_documents_and_questions_are_the_same_in_another_process(self):
        runs = [
            run_program("digests", "python_docs", *self.modules, env={"PYTHONHASHSEED": seed}) for seed in ("1", "2")
        ]
        self.assertEqual([run.returncode for run in runs], [0, 0], runs[0].stderr)
        self.assertEqual(runs[0].stdout, runs[1].stdout)

    def test_what_other_libraries_do_to_the_standard_library_does_not_show(self):
        import shlex

        before = list(python_documents(("shlex",)))
        _entries.cache_clear()
        with mock.patch.object(shlex, "quote", lambda s: s), mock.patch.object(shlex.shlex, "extra", create=True):
            self.assertEqual(list(python_documents(("shlex",))), before)
        self.assertIn("shlex.quote", [entry["id"] for entry in before])

    def test_a_failing_child_process_is_an_error(self):
        with mock.patch.object(sys, "executable", "/bin/false"), self.assertRaisesRegex(DataError, "exit code 1"):
            list(python_documents(("shlex", "no cache has this")))

    def test_documents_are_named_signed_distinct_and_without_addresses(self):
        documents = {entry["id"]: entry for entry in python_documents(self.modules)}
        dumps = documents["json.dumps"]
        self.assertEqual(dumps["module"], "json")
        self.assertTrue(dumps["text"].startswith("json.dumps(obj, *, skipkeys=False"))
        self.assertIn("\n\nSerialize ``obj`` to a JSON formatted ``str``.", dumps["text"])
        self.assertEqual(documents["json.tool"]["module"], "json", "a submodule counts as its top-level module")
        self.assertTrue(documents["builtins.max"]["text"].startswith("builtins.max(iterable, *[, default=obj"))
        self.assertIn("os.getcwd", documents)
        bodies = [entry["text"].partition("\n\n")[2] for entry in documents.values()]
        self.assertEqual(len(bodies), len(set(bodies)))
        self.assertFalse([entry["id"] for entry in documents.values() if " at 0x" in entry["text"]])

    def test_answers_are_short_unambiguous_sentences_and_choices_hold_them_once(self):
        examples = python_qa(self.modules)
        answers = [example["answers"][0] for example in examples]
        self.assertEqual(len(answers), len({answer.casefold() for answer in answers}))
        self.assertTrue(all(15 <= len(answer) <= 200 for answer in answers))
        by_id = {example["id"]: example for example in examples}
        self.assertEqual(by_id["json.dumps"]["question"], "What does `json.dumps` do?")
        self.assertEqual(by_id["json.dumps"]["document"], "json")
        of_module: dict[str, set[str]] = {}
        for example in examples:
            of_module.setdefault(example["document"], set()).add(example["answers"][0])
        for example in examples:
            if example["choices"] is None:
                self.assertLess(len(of_module[example["document"]]), 4)
                continue
            self.assertEqual(len(set(example["choices"])), 4)
            self.assertEqual(example["choices"][example["answer_index"]], example["answers"][0])
            self.assertLessEqual(set(example["choices"]), of_module[example["document"]])
        positions = [example["answer_index"] for example in examples if example["choices"]]
        self.assertTrue(all(positions.count(i) > len(positions) / 6 for i in range(4)), "the right choice moves")

    def test_the_standard_library_is_large_enough_and_importing_it_is_silent(self):
        done = run_program("count_python_docs")
        self.assertEqual(done.stderr, "")
        documents, characters = map(int, done.stdout.split())
        self.assertGreater(documents, 3_500)
        self.assertGreater(characters, 800_000)
        self.assertNotIn("antigravity", standard_modules())


class TestRealData(CorpusTest):
    def test_shared_corpora_are_read_whole(self):
        for name in ("policyqa", "openstax_anatomy"):
            path = SHARED_DATA / name / "corpus.jsonl"
            if not path.is_file():
                self.skipTest(f"{path} is not here: the shared test data is not part of the repository")
            with self.subTest(name):
                texts, report = self.read(str(path))
                rows = list(iter_rows(path, ProblemList()))
                self.assertEqual(report.documents + sum(report.dropped.values()), len(rows))
                self.assertEqual(len(texts), report.documents)
                self.assertLessEqual(set(texts), {row.values["id"] for row in rows})


class TestImports(unittest.TestCase):
    def test_importing_the_readers_loads_no_heavy_library(self):
        heavy = ("datasets", "pyarrow", "numpy", "pypdfium2", "mammoth", "lxml", "docutils")
        modules = "utils.data.documents, utils.data.examples, utils.data.splits, utils.data.domains.python_docs"
        code = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        self.assertEqual(done.stdout.strip(), "[]")


if __name__ == "__main__":
    unittest.main()
