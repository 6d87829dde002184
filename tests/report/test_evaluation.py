"""The page of an evaluation: one file, escaped, with marks where the numbers say."""

import re
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from align.report import evaluation, plots
from align.report.plots import IntervalRow


def number(value: float, count: int | None = None) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.05} | ({} if count is None else {"count": count})


NASTY = "<script>alert('&')</script>"
RESULTS: dict[str, Any] = {
    "benchmark": "judgebench",
    "judge": NASTY,
    "source": NASTY,
    "sizes": {"items": 7, "prompts": 5, "responses": 14},
    "notes": [NASTY],
    "bootstrap": {"resamples": 10, "confidence": 0.95, "seed": 3},
    "numbers": {"knowledge": number(0.591), "overall": number(0.623)},
    "slices": {"domain": {NASTY: number(0.5, 3), "b": number(0.25, 4)}},
    "calibration": {
        "expected_calibration_error": 0.125,
        "bins": [{"from": 0.5, "to": 0.55, "count": 4, "confidence": 0.5, "accuracy": 0.25}],
    },
    "margins": {"mean": 1.0, "median": 0.5, "ties": 2, "edges": [-1.0, 0.0, 1.0], "counts": [1, 3]},
    "comparison": {"with": "other", "numbers": {"overall": number(-0.02)}},
}


def figures(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(one) for one in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def marks(figure: ElementTree.Element, tag: str = "circle") -> list[dict[str, str]]:
    return [one.attrib for one in figure.iter(tag) if one.get("class") in ("mark", "bar", "wrong")]


def test_the_page_needs_nothing_else_and_escapes_what_it_is_given():
    page = evaluation.page(RESULTS)
    assert NASTY not in page and page.count("&lt;script&gt;") == 6  # title, heading, source, note, row and its title
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import|http", page)
    assert "prefers-color-scheme: dark" in page and "color-scheme: light dark" in page
    assert len(figures(page)) == 3


def test_the_tables_hold_the_numbers():
    page = evaluation.page(RESULTS)
    assert "<td>overall</td><td>62.3</td><td>52.3 to 67.3</td>" in page
    assert "<td>overall</td><td>-2.0</td><td>-12.0 to 3.0</td>" in page
    assert "7 items of 5 prompts, 14 responses" in page and "Expected calibration error 0.125" in page


def test_what_was_not_measured_has_no_picture():
    page = evaluation.page(RESULTS | {"calibration": None, "margins": None, "comparison": None, "slices": {}})
    assert not figures(page) and "Calibration" not in page and "Difference" not in page


def test_marks_of_intervals_lie_where_the_numbers_say():
    (figure,) = figures(
        plots.intervals([IntervalRow("a", 0.0, 0.0, 0.5, 9), IntervalRow("b", 1.0, None, None, 2)], "x")
    )
    left, right = (float(one["cx"]) for one in marks(figure))
    grid = sorted({float(one.get("x1", "")) for one in figure.iter("line") if one.get("class") in ("grid", "half")})
    assert (left, right) == (grid[0], grid[-1])
    (whisker,) = [one for one in figure.iter("line") if one.get("class") == "whisker"]  # none without an interval
    assert float(whisker.get("x1", "")) == left
    assert float(whisker.get("x2", "")) == pytest.approx((left + right) / 2)


def test_a_long_name_is_cut_and_said_in_full():
    name = "x" * 60
    (figure,) = figures(plots.intervals([IntervalRow(name, 0.5, None, None, 1)], "x"))
    shown = [one.text for one in figure.iter("text") if one.get("class") == "name"]
    assert shown[0] == "x" * 33 + "…" and figure.findtext(".//title") == f"{name}: 50.0"


def test_a_calibrated_judge_lies_on_the_diagonal():
    bins = [{"count": 5, "confidence": c, "accuracy": c} for c in (0.5, 0.75, 1.0)]
    (figure,) = figures(plots.reliability(bins, "x"))
    (diagonal,) = [one for one in figure.iter("line") if one.get("class") == "half"]
    first, middle, last = [(float(one["cx"]), float(one["cy"])) for one in marks(figure)]
    assert first == (float(diagonal.get("x1", "")), float(diagonal.get("y1", "")))
    assert last == (float(diagonal.get("x2", "")), float(diagonal.get("y2", "")))
    assert middle == pytest.approx(((first[0] + last[0]) / 2, (first[1] + last[1]) / 2))


def test_bars_are_as_tall_as_their_counts_and_change_colour_at_zero():
    (figure,) = figures(plots.histogram([-2.0, -1.0, 0.0, 1.0], [0, 2, 4], "x"))
    bars = marks(figure, "rect")
    assert [one["class"] for one in bars] == ["wrong", "wrong", "bar"]
    heights = [float(one["height"]) for one in bars]
    assert heights[0] == 0 and heights[2] == pytest.approx(2 * heights[1])


def test_the_terminal_shows_what_a_markup_reader_would_swallow():
    console = Console(record=True, width=120)
    evaluation.terminal(RESULTS | {"judge": "[red]x", "notes": ["[bold]y"]}, console)
    text = console.export_text()
    assert "judgebench: [red]x, 7 items of 5 prompts" in text and "note: [bold]y" in text
    assert re.search(r"overall +│ 62\.3 │ 52\.3 to 67\.3", text) and re.search(r"overall +│ -2\.0", text)


def test_long_lists_are_left_to_the_files():
    many = {"subset": {f"name {n}": number(0.5, 1) for n in range(evaluation.MOST_ON_TERMINAL + 1)}}
    console = Console(record=True, width=120)
    evaluation.terminal(RESULTS | {"slices": many}, console)
    assert "name 1" not in console.export_text() and "name 1" in evaluation.page(RESULTS | {"slices": many})
