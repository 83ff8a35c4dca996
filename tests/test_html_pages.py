"""Pages that need nothing else: figures, charts, escaping, and colours that can be read."""

from __future__ import annotations

import itertools
import math
import re
import unittest
from random import Random

from tests.report_support import soup, whole
from utils.html import numbers, pages
from utils.html.charts import AxisScale, Bar, Series, bars, chart, thinned


class Figures(unittest.TestCase):
    def test_figures_round_and_never_lie_about_what_is_missing(self) -> None:
        self.assertEqual(str(numbers.exact(0.4805825, numbers.share)), '<data value="0.4805825">48.1%</data>')
        for nothing in (None, math.nan, math.inf, True, "1"):
            self.assertEqual(numbers.exact(nothing, numbers.nats), numbers.MISSING)
        expected = {numbers.perplexity: "8.40 123.5 12,346 1.2e+09", numbers.size: "8 bytes 123 bytes 12.3 kB 1.2 GB"}
        for form, texts in expected.items():
            self.assertEqual(" ".join(form(value) for value in (8.4, 123.45, 12345.6, 1.23e9)), texts)
        whole_and_not = (1234.0, 1234.5, 12345.6, 0.12345, -1e20)
        self.assertEqual(
            [numbers.general(value) for value in whole_and_not], ["1,234", "1,234", "12,346", "0.1235", "−1e+20"]
        )
        self.assertEqual((numbers.gain(-0.0514), numbers.gain(0.5)), ("−0.051", "+0.500"))
        self.assertEqual([numbers.probability(p) for p in (0.00001, 0.0404, 0.92)], ["< 0.0001", "0.04", "0.92"])


class Charts(unittest.TestCase):
    def test_scale_maps_linearly_and_keeps_outliers_on_the_edge(self) -> None:
        scale = AxisScale(2.0, 4.0)
        self.assertEqual([scale.at(v) for v in (1.0, 2.0, 2.5, 4.0, 9.0)], [0.0, 0.0, 25.0, 100.0, 100.0])
        self.assertEqual(AxisScale(0.0, 1.0).ticks(), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
        self.assertEqual(AxisScale.over([3.0]), AxisScale(1.5, 4.5))

    def test_ticks_are_round_few_and_inside(self) -> None:
        self.assertEqual(AxisScale(-0.05, 1.05).ticks(), [0.0, 0.25, 0.5, 0.75, 1.0])
        self.assertEqual(AxisScale(-0.05, 1.05).ticks(whole=True), [0.0, 1.0])
        self.assertEqual(AxisScale(0.0, 0.3).ticks(whole=True), [0.0])
        self.assertEqual(AxisScale(0.0, 11.0).ticks(), [0.0, 2.5, 5.0, 7.5, 10.0])
        self.assertEqual(AxisScale(0.0, 11.0).ticks(whole=True), [0.0, 5.0, 10.0])
        random = Random(0)
        for _ in range(500):
            size = 10 ** random.uniform(-8, 8)
            low = random.uniform(-size, size)
            scale = AxisScale(low, low + size * 10 ** random.uniform(-3, 3))
            ticks, tolerance = scale.ticks(), 1e-6 * (scale.high - scale.low)
            self.assertTrue(2 <= len(ticks) <= 6, scale)
            self.assertGreaterEqual(ticks[0], scale.low - tolerance)
            self.assertLessEqual(ticks[-1], scale.high + tolerance)

    def test_thinning_keeps_the_mean_and_short_series(self) -> None:
        points = [(float(i), float(i % 7)) for i in range(1000)]
        found = thinned(points, 100)
        self.assertEqual(len(found), 100)
        self.assertAlmostEqual(sum(y for _, y in found) / 100, sum(y for _, y in points) / 1000)
        self.assertEqual(thinned(points[:50]), points[:50])
        self.assertEqual(thinned([]), [])

    def test_chart_puts_points_where_they_belong_and_says_them_in_words(self) -> None:
        series = Series("a <b>", "domain", [(0.0, 1.0), (1.0, 3.0), (2.0, 2.0)], mark="dot")
        figure = soup(chart("T", [series, Series("empty", "task", [])], x="x", y="y"))
        points = [tuple(map(float, p.split(","))) for p in figure.polyline["points"].split()]
        self.assertEqual(points[0][0] + points[2][0], 2 * points[1][0])
        self.assertAlmostEqual((points[0][1] - points[1][1]) / (points[0][1] - points[2][1]), 2.0, places=3)
        self.assertEqual(
            figure.select_one("svg[role=img]")["aria-label"], "T: a <b>, 3 points, from 1 to 2, lowest 1, highest 3. "
        )
        self.assertEqual(len(figure.select(".legend li")), 1)

    def test_points_that_are_no_numbers_are_left_out_with_their_hover_texts(self) -> None:
        points = [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (3.0, 2.0)]
        figure = soup(chart("T", [Series("a", "task", points, mark="dot", hover="pqrs")], x="x", y="y"))
        self.assertEqual([title.get_text() for title in figure.select(".plot title")], ["p", "s"])
        self.assertEqual(chart("T", [Series("a", "task", points[1:3])], x="x", y="y"), "")

    def test_bars_are_as_long_as_their_values_below_their_names(self) -> None:
        groups = {
            "<first>": [Bar("ours", "composed", 2.0), Bar("<cp>", "other", 1.0, "1.0 s")],
            "": [Bar("x", "task", 4)],
        }
        groups["none"] = [Bar("lost", "task", math.nan)]
        figure = soup(bars("T", groups, x="seconds", reference=(8.0, "the <limit>")))
        lengths = [float(bar["width"].rstrip("%")) for bar in figure.select("rect")]
        self.assertEqual([round(length / lengths[1], 3) for length in lengths], [2.0, 1.0, 4.0])
        line = figure.select_one(".plot .reference")
        self.assertAlmostEqual(float(line["x1"].rstrip("%")) / lengths[1], 8.0, places=3)
        texts = [text for text in figure.select(".plot text") if text["x"] == "0"]
        self.assertEqual([text.contents[0].strip() for text in texts], ["<first>", "ours", "<cp>", "x"])
        tops = [float(text["y"]) for text in texts]
        self.assertEqual(tops, sorted(set(tops)))
        self.assertEqual(figure.select_one(".legend li").get_text(), "the <limit>")
        said = "T: <first>, ours: 2; <first>, <cp>: 1.0 s; x: 4"
        self.assertEqual(figure.select_one("svg[role=img]")["aria-label"], said)
        self.assertEqual(bars("T", {"": []}, x="seconds"), "")


class Readable(unittest.TestCase):
    """Width and structure of a whole report, as far as they can be read without a browser."""

    def test_every_wide_table_scrolls_in_a_box_that_a_keyboard_reaches(self) -> None:
        page = soup(whole()[1])
        for table in page.find_all("table"):
            if table.get("class") not in (["facts"], ["any"]):
                box = table.parent
                self.assertEqual((box["class"], box["role"], box["tabindex"]), (["scroll"], "region", "0"))
                self.assertTrue(box["aria-label"])
        style = page.style.get_text()
        self.assertRegex(style, r"\.scroll\{[^}]*position:relative;overflow-x:auto")
        self.assertEqual(
            page.find("meta", attrs={"name": "viewport"})["content"], "width=device-width, initial-scale=1"
        )
        self.assertRegex(style, r"@media print\{")

    def test_tables_have_headers_and_pictures_have_names(self) -> None:
        page = soup(whole()[1])
        for table in page.find_all("table"):
            for row in table.select("tbody tr"):
                self.assertEqual(row.find(["th", "td"]).get("scope"), "row")
            for head in table.select("thead th"):
                self.assertEqual(head["scope"], "col")
        for svg in page.find_all("svg", role="img"):
            self.assertTrue(svg.get("aria-label") or svg.find("title", recursive=False))
        levels = [int(tag.name[1]) for tag in page.find_all(re.compile(r"^h\d$"))]
        self.assertEqual(levels[0], 1)
        self.assertTrue(all(b - a <= 1 for a, b in itertools.pairwise(levels)), levels)
        self.assertEqual(page.html["lang"], "en")


class Shell(unittest.TestCase):
    def test_shell_escapes_its_title_and_leaves_its_body(self) -> None:
        page = soup(pages.shell("<b>&", "<p>fine</p>"))
        self.assertEqual((page.title.get_text(), page.p.get_text()), ("<b>&", "fine"))

    def test_text_has_contrast_in_light_dark_and_print(self) -> None:
        style = soup(pages.shell("t", "")).style.get_text()
        schemes = [
            dict(re.findall(r"--([a-z-]+):(#[0-9a-f]{6})", block)) for block in re.findall(r":root\{[^}]*\}", style)
        ]
        self.assertEqual(len(schemes), 3)
        for scheme in schemes:
            for ground in ("page", "panel"):
                for ink in ("text", "muted", "link", "good", "bad", "warn", "calm"):
                    self.assertGreaterEqual(contrast(scheme[ink], scheme[ground]), 4.5, (ink, ground, scheme["page"]))
            for ink in ("domain", "task", "composed", "other"):  # lines and dots
                self.assertGreaterEqual(contrast(scheme[ink], scheme["page"]), 3.0, ink)


def contrast(first: str, second: str) -> float:
    """WCAG 2.2 contrast ratio of two colours #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


if __name__ == "__main__":
    unittest.main()
