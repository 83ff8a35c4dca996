"""Pictures of a composition: pages that stand alone, and the same drawings in the evaluation's report."""

from __future__ import annotations

import math
import unittest
from typing import Any

from tests.report_support import INTERFERENCE, SEARCH, soup, text_of, whole
from tests.support import temporary_directory
from utils.composition import pictures


def point(weights: list[float], method: str = "sum", domain: float | None = 3.0) -> dict[str, Any]:
    return {"method": method, "weights": weights, "answer_nll": 2.0 + sum(weights), "domain_nll": domain}


def searched(points: list[dict[str, Any]], chosen: dict[str, Any]) -> dict[str, Any]:
    return {"chosen": chosen, "reason": "sum: the <simplest>", "points": points, "pareto": points[:1]}


GRID = [(0.0, 0.5), (0.5, 0.5), (1.0, 0.5), (0.0, 1.0), (0.5, 1.0), (1.0, 1.0)]


class Pages(unittest.TestCase):
    def test_a_page_stands_alone_names_its_json_and_escapes_what_it_is_given(self) -> None:
        directory = temporary_directory()
        named = INTERFERENCE | {"adapters": ["<domain>", "task"]}
        made = (
            (pictures.write_search, SEARCH | {"reason": "sum: the <simplest>"}, "search", 2, "The <simplest>."),
            (pictures.write_interference, named, "interference", 3, "More of the <domain> adapter would raise the"),
        )
        for write, found, name, charts, words in made:
            path = directory / f"{name}.html"
            write(found, path)
            text = path.read_text(encoding="utf-8")
            page = soup(text)
            with self.subTest(name):
                self.assertEqual(len(page.select("figure.chart")), charts)
                self.assertIn(words, text_of(page))
                self.assertIn(f"Every number is in {name}.json.", text_of(page))
                self.assertEqual(page.select("script, link, img, [src], [href]"), [])
                self.assertEqual(page.title.get_text(), page.h1.get_text())

    def test_the_report_shows_the_same_drawings(self) -> None:
        report = whole()[1]
        drawn = [*pictures.search(SEARCH), *pictures.interference(INTERFERENCE), *pictures.effects(INTERFERENCE)]
        self.assertEqual(len(drawn), 2 + 3 + 2)
        for one in drawn:
            self.assertIn(str(one), report)


class Search(unittest.TestCase):
    def test_further_adapters_at_weight_one_belong_to_the_curves(self) -> None:
        moved = [point([0.25, 1.0, 0.5]), point([0.75, 1.0, 0.5])]
        points = [*(point([*weights, 1.0]) for weights in GRID), *moved]
        curves = soup(pictures.search(searched(points, moved[0]))[0])
        self.assertEqual([len(line["points"].split()) for line in curves.select(".plot polyline")], [3, 3])
        self.assertEqual(len(curves.select(".plot .star")), 1)

    def test_curves_beyond_six_look_different_still(self) -> None:
        points = [point([domain, task / 4]) for domain in (0.0, 0.5, 1.0) for task in range(1, 9)]
        curves = soup(pictures.search(searched(points, point([1.0, 1.0])))[0])
        looks = [str(entry.svg) for entry in curves.select(".legend li")]
        looks = [look.partition("<title>")[0] + look.partition("</title>")[2] for look in looks]
        self.assertEqual((len(looks), len(set(looks))), (9, 9))

    def test_weights_of_another_method_are_no_star_among_the_sums(self) -> None:
        chosen = point([1.0, 1.0, 0.5, 0.5], "depth_gate")
        curves, both = map(soup, pictures.search(searched([*(point(list(w)) for w in GRID), chosen], chosen)))
        self.assertEqual((len(curves.select(".plot .star")), len(both.select(".plot .star"))), (0, 1))

    def test_missing_domain_losses_are_said_and_not_drawn(self) -> None:
        points = [point(list(weights), domain=None) for weights in GRID]
        curves, note = pictures.search(searched(points, points[0]) | {"pareto": []})
        self.assertIn("answer loss on dev", curves)
        self.assertIn(pictures.NO_DOMAIN_LOSS, note)

    def test_what_was_measured_on_a_part_of_dev_says_so(self) -> None:
        points = [point(list(weights)) | {"items": "a part, corrected"} for weights in GRID]
        _, both = map(str, pictures.search(searched(points, point([1.0, 1.0]))))
        self.assertEqual(both.count("estimated from a part of dev"), len(GRID) + 1)  # and the one of the front

    def test_a_loss_that_is_no_number_is_left_out(self) -> None:
        points = [point(list(weights)) for weights in GRID]
        points[1]["answer_nll"] = math.nan
        curves, both = map(soup, pictures.search(searched(points, points[0])))
        self.assertEqual([len(line["points"].split()) for line in curves.select(".plot polyline")], [2, 3])
        self.assertNotIn("nan", str(both))


class Interference(unittest.TestCase):
    def test_sizes_are_those_on_inputs_where_they_were_measured(self) -> None:
        on_inputs = {"activation_first_to_base": [0.1, 0.2, 0.1], "activation_second_to_base": [0.2, 0.2, 0.2]}
        measured = INTERFERENCE | {"per_layer": INTERFERENCE["per_layer"] | on_inputs}
        for found, title in ((INTERFERENCE, "Size of the update"), (measured, "Size of the change on task inputs")):
            self.assertIn(title, pictures.interference(found)[1])

    def test_without_dev_data_the_updates_alone_are_drawn(self) -> None:
        titles = [soup(one).figcaption.get_text() for one in pictures.interference(INTERFERENCE | {"derivatives": {}})]
        self.assertEqual(titles, ["Size of the update", "Do they point the same way?"])


if __name__ == "__main__":
    unittest.main()
