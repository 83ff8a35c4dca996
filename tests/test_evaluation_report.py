"""The report: one file, the numbers of results.json, everything escaped, and what is absent named."""

from __future__ import annotations

import unittest

from tests.report_support import (
    FOUR,
    bare,
    contamination,
    evaluation,
    name_in,
    soup,
    text_of,
    the_runs,
    whole,
)
from tests.support import temporary_directory
from utils.evaluation.report import evaluation_report
from utils.evaluation.verdict import CLAIMS

SECTIONS = ["rests", "intervals", "matrix", "training", "weights", "interference", "examples", "data", "contamination"]
SECTIONS += ["lineage"]
EVIL = '<script>alert(1)</script> & "quotes" </style> \x00\x1b[31m\x85 \ud800 \u202e\ufffe ]]> {{ 7 * 7 }}'


class Whole(unittest.TestCase):
    def test_every_section_is_there_in_its_order_and_is_not_empty(self) -> None:
        for _, text in (whole(), bare()):
            page = soup(text)
            found = [tag["id"] for tag in page.find_all(id=True)]
            self.assertEqual([name for name in found if name in SECTIONS], SECTIONS)
            self.assertEqual(len(found), len(set(found)))
            for name in SECTIONS:
                self.assertGreater(len(text_of(page.find(id=name).parent)), 50, name)

    def test_nothing_leaves_the_file(self) -> None:
        for _, text in (whole(), bare()):
            page = soup(text)
            self.assertEqual(page.find_all(["script", "link", "iframe", "object", "img", "form", "base"]), [])
            links = {tag["href"] for tag in page.find_all(href=True)}
            self.assertEqual({link for link in links if not link.startswith("#")}, {"results.json"})
            for link in links - {"results.json"}:
                self.assertIsNotNone(page.find(id=link[1:]), link)
            self.assertEqual(
                [t for t in page.find_all(True) if any(a.startswith("on") or a == "src" for a in t.attrs)], []
            )
            self.assertNotRegex(text, r"https?:|url\(|@import|expression\(")
            policy = page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
            self.assertIn("default-src 'none'", policy)
            self.assertNotIn("script-src", policy)

    def test_no_python_value_and_no_template_shows(self) -> None:
        for _, text in (whole(), bare()):
            self.assertNotRegex(text_of(text), r"\bNone\b|\bnan\b|\binf\b|Undefined|\{\{|\{%|<built-in|&lt;")

    def test_the_same_results_give_the_same_page_and_it_is_written_as_text(self) -> None:
        found, _ = bare()
        directory = temporary_directory()
        path = evaluation_report.write(directory, found, [], None)
        self.assertEqual(
            (path, path.read_text(encoding="utf-8")),
            (directory / "report.html", evaluation_report.page(directory.name, found, [], None)),
        )

    def test_verdict_stands_first_in_its_colour_with_its_sentence(self) -> None:
        for word, (colour, gloss) in evaluation_report.WORDS.items():
            found = {**bare()[0], "verdict": word, "sentence": f"{word.capitalize()}: because of <that>."}
            page = soup(evaluation_report.page("x", found, [], None))
            head = page.body.find(True)
            self.assertEqual((head.name, head["class"]), ("header", ["verdict", colour]))
            self.assertEqual(text_of(head.h1), f"{word} Because of <that>.")
            self.assertIn(gloss, text_of(head))
            self.assertIn(word.capitalize(), page.title.get_text())


class Numbers(unittest.TestCase):
    """What a person reads is what results.json says."""

    def test_matrix_has_every_number_in_its_row_and_column(self) -> None:
        found, text = whole()
        seen = 0
        for table, measures in zip(
            soup(text).select("table.matrix"),
            (evaluation_report.LIKELIHOODS, evaluation_report.ANSWERS, evaluation_report.LOSSES),
            strict=True,
        ):
            self.assertEqual([name_in(th_row) for th_row in table.select("tbody tr")], list(found["cells"]))
            heads = [th.find(string=True) for th in table.select("thead th.n")]
            self.assertEqual(heads, [measure.title for measure in measures])
            for row in table.select("tbody tr"):
                cell = found["cells"][name_in(row)]
                for measure, shown in zip(measures, row.find_all("td"), strict=True):
                    value = cell.get(measure.key, cell["format"].get(measure.key))
                    given = [float(data["value"]) for data in shown.find_all("data")]
                    self.assertEqual(given, [value, *cell["intervals"].get(measure.key, [])], measure.key)
                    self.assert_reads_as(shown.find("data").get_text(), value)
                    seen += 1
        self.assertEqual(seen, 8 * (6 + 6 + 5))

    def test_best_of_each_column_is_marked_and_nothing_else(self) -> None:
        found, text = whole()
        matrices = zip(
            soup(text).select("table.matrix"),
            (evaluation_report.LIKELIHOODS, evaluation_report.ANSWERS, evaluation_report.LOSSES),
            strict=True,
        )
        for table, measures in matrices:
            for at, measure in enumerate(measures):
                column = {name_in(row): row.find_all("td")[at] for row in table.select("tbody tr")}
                values = {name: measure.of(found["cells"][name]) for name in column}
                best = {"low": min, "high": max, "": lambda _: None}[measure.better](values.values())
                expected = (
                    {name for name, value in values.items() if value == best}
                    if len(set(values.values())) > 1
                    else set()
                )
                marked = {name for name, td in column.items() if "best" in td["class"]}
                self.assertEqual(marked, expected, measure.key)
                self.assertEqual({name for name, td in column.items() if "(best)" in td.get_text()}, expected)

    def test_intervals_are_those_of_the_contrasts_and_differences(self) -> None:
        found, text = whole()
        expected = {**found["contrasts"], **{k.removesuffix(" - composed"): v for k, v in found["differences"].items()}}
        rows = soup(text).select(".forest .row:not(.axis-row)")
        self.assertEqual([row.find("b").get_text() for row in rows], list(expected))
        for row, one in zip(rows, expected.values(), strict=True):
            given = [float(data["value"]) for data in row.find_all("data")]
            p = one.get("p_holm", one["p"])
            self.assertEqual(given, [one["estimate"], one["low"], one["high"], one["clusters"], one["detectable"], p])
            result = row.select_one(".result b").get_text()
            if "holds" in one:
                self.assertEqual(result, "shown" if one["holds"] else "not shown")
            else:
                self.assertEqual(result == "better", one["low"] > 0)

    def test_picture_of_an_interval_is_to_scale(self) -> None:
        found, text = whole()
        for row in soup(text).select(".forest .row:not(.axis-row)"):
            name = row.find("b").get_text()
            one = found["contrasts"].get(name) or found["differences"][f"{name} - composed"]
            svg = row.svg
            line, point, null = svg.select_one(".interval"), svg.circle, svg.select_one(".null")
            at = {"low": line["x1"], "high": line["x2"], "estimate": point["cx"], "null": null["x1"]}
            place = {key: float(value.rstrip("%")) for key, value in at.items()}
            scale = (place["high"] - place["low"]) / (one["high"] - one["low"])
            for key in ("estimate", "null"):
                self.assertAlmostEqual(place[key] - place["low"], scale * (one[key] - one["low"]), delta=0.01, msg=name)
            self.assertEqual(point["class"], ["dot"] if row.select_one(".good, .bad") else ["ring"], name)

    def test_tiles_examples_seeds_and_counts_are_those_of_the_results(self) -> None:
        found, text = whole()
        page = soup(text)
        composed = found["cells"]["composed"]
        big = [float(tile.find("data")["value"]) for tile in page.select(".tiles .big")]
        self.assertEqual(
            big, [composed[key] for key in ("answer_nll", "f1", "choice_accuracy", "domain_ppl", "general_ppl")]
        )
        cards = page.select("article")
        examples = [*found["examples"]["won"], *found["examples"]["lost"]]
        self.assertEqual(len(cards), len(examples))
        for card, example in zip(cards, examples, strict=True):
            given = [float(data["value"]) for data in card.find_all("data")]
            nll = example["nll"]
            self.assertEqual(given, [nll["task"] - nll["composed"], nll["task"], nll["composed"]])
            for said in (example["question"], example["gold"], *example["said"].values()):
                self.assertIn(said, card.get_text())
        seeds = next(table for table in page.find_all("table") if "seed 7" in table.get_text())
        for row in seeds.select("tbody tr"):
            self.assertEqual([float(d["value"]) for d in row.find_all("data")], found["by_seed"][name_in(row)])
        said = text_of(page.find(id="data").parent)
        for part in ("43,364", "150,672", "7 documents: exact duplicates", "2 pairs: train pairs that are in test"):
            self.assertIn(part, said)

    def assert_reads_as(self, text: str, value: float) -> None:
        """The text is the number, rounded by at most half of its last digit."""
        shown = text.replace("−", "-").replace(",", "")
        unit = 0.01 if shown.endswith("%") else 1.0
        digits = shown.rstrip("%")
        last = (
            10.0 ** -len(digits.partition(".")[2]) if "e" not in digits else 0.1 * 10 ** float(digits.partition("e")[2])
        )
        self.assertAlmostEqual(float(digits) * unit, value, delta=0.5001 * last * unit)


class Escaping(unittest.TestCase):
    def test_what_data_say_is_text_wherever_it_stands(self) -> None:
        root = temporary_directory()
        found = evaluation(question=EVIL)
        runs, composed = the_runs(root, found)
        for example in found["examples"]["won"]:
            example["gold"], example["said"] = EVIL, {cell: EVIL * 20 for cell in example["said"]}
        found["contamination"] = contamination(EVIL)
        for key in ("cautions", "untested", "missing", "versions"):
            found[key] = [EVIL] if key == "cautions" else {EVIL: EVIL}
        found["untested"] = {"H4": EVIL}
        found["command"] = "scripts/evaluate.py --run.name x;y"
        found["lineage"].append({"kind": EVIL, "path": EVIL, "digest": EVIL})
        found["sentence"], found["reads"]["sentence"] = EVIL, EVIL
        found["cells"][EVIL] = found["cells"]["random"] | {"meaning": EVIL}
        found["differences"][f"{EVIL} - composed"] = found["differences"]["random - composed"]
        text = evaluation_report.page(EVIL, found, runs, composed, {"evaluate": {EVIL: EVIL}})
        page = soup(text)
        self.assertEqual(page.find_all("script"), [])
        self.assertEqual(len(page.find_all("style")), 1)
        self.assertGreater(page.get_text().count("<script>alert(1)</script>"), 60)
        self.assertNotIn("49 ", text_of(page.h1))
        text.encode("utf-8")
        self.assertNotRegex(text, "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe]")
        self.assertIn("\\x1b[31m", page.get_text())

    def test_long_texts_are_folded_and_whole(self) -> None:
        found = evaluation()
        long = "word " * 400 + "end"
        found["examples"]["won"][0]["said"]["composed"] = long
        card = soup(evaluation_report.page("x", found, [], None)).select_one("article")
        self.assertIsNone(card.details.get("open"))
        self.assertIn(long, card.details.get_text())
        self.assertLess(len(card.summary.get_text()), 300)


class Absent(unittest.TestCase):
    def test_measures_without_data_are_absent_with_the_reason(self) -> None:
        said = text_of(bare()[1])
        for reason in (evaluation_report.NO_HELDOUT, evaluation_report.NO_CHOICES, evaluation_report.NO_ANSWERS):
            self.assertIn(reason, said)
        self.assertIn("No choice accuracy, choice accuracy by token: the test questions come without choices.", said)
        heads = [th.find(string=True) for th in soup(bare()[1]).select(".matrix thead th.n")]
        self.assertEqual(heads, ["answer NLL", "general perplexity", "general NLL", "end of turn"])
        self.assertNotIn("No ", text_of(soup(whole()[1]).find(id="matrix").parent))

    def test_what_was_not_tested_comes_with_the_command_that_tests_it(self) -> None:
        found = evaluation(FOUR, (3,))
        found["missing"] = {"wrong_domain": "the domain adapter is external"}
        page = soup(evaluation_report.page("x", found, [], None))
        listed = {text_of(item) for item in page.select(".untested li")}
        command = f"python {found['command']}"
        for claim, flag in (("H4", "--evaluate.controls"), ("other seeds", "--evaluate.seeds 1,2")):
            item = next(item for item in listed if item.startswith(claim))
            self.assertTrue(item.endswith(f"{command} {flag}"), item)
        self.assertIn(CLAIMS["H4"], " ".join(listed))
        self.assertTrue(any("is external" in item for item in listed))
        self.assertEqual(soup(whole()[1]).select(".untested"), [])

    def test_a_flag_that_was_given_is_not_given_twice(self) -> None:
        self.assertEqual(evaluation_report.command({"command": "e.py --a 1"}, "--a 1,2"), "python e.py --a 1")
        self.assertEqual(evaluation_report.command({}, "--b"), "python scripts/evaluate.py --b")

    def test_missing_pictures_and_measurements_say_so(self) -> None:
        for found in (evaluation(FOUR, (0,)), bare()[0]):
            said = text_of(evaluation_report.page("x", found, [], None))
            for part in (
                "No metrics lie",
                "Not measured: whether test questions",
                "not among the runs",
                "One training seed",
            ):
                self.assertIn(part, said)
        found = evaluation(FOUR)
        found["composition"]["recipe"]["weights"] = []
        said = text_of(evaluation_report.page("x", found, [], None))
        self.assertIn("They were not: weights of 1, untested.", said)
        self.assertIn("python scripts/compose.py --compose.search", said)
        self.assertIn("made for the evaluation alone", said)
        self.assertIn("Nothing is composed here", text_of(bare()[1]))

    def test_too_few_documents_give_no_interval_and_no_broken_picture(self) -> None:
        found = evaluation(FOUR)
        for one in (*found["contrasts"].values(), *found["differences"].values()):
            one.update(low=None, high=None, detectable=None, p=1.0, clusters=3)
        text = evaluation_report.page("x", found, [], None)
        rows = soup(text).select(".forest .row:not(.axis-row)")
        self.assertEqual(len(rows), 6)
        for row in rows:
            self.assertIn("[no interval]", text_of(row))
            self.assertIn("too few", row.svg.find("title").get_text())
            self.assertEqual(row.svg.select_one(".interval")["class"], ["interval", "dashed"])

    def test_contamination_is_shown_with_what_is_left_without_the_flagged_questions(self) -> None:
        said = text_of(soup(whole()[1]).find(id="contamination").parent)
        for part in (
            "Same documents: the documents of 75.0% of the 48 test questions are in the corpus.",
            "3 questions are flagged as contaminated; without them (45 are left): It helps still",
            "near duplicate corpus 3 (6.2%) yes hardly <changed>",
        ):
            self.assertIn(part, said)
        self.assertNotIn("dev pairs", said)  # nothing stands there
        self.assertNotIn("Not measured", said)


if __name__ == "__main__":
    unittest.main()
