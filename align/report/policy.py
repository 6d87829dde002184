"""Report of ``align eval policy``: terminal tables and a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from align.report import evaluation, plots
from align.report.plots import Axis, IntervalRow

AXES = {
    "percent": Axis(0, 100, (0, 25, 50, 75, 100), 50, (0, 50, 100), " %"),
    "mark": Axis(1, 10, (1, 2.5, 4, 5.5, 7, 8.5, 10), 5.5, (1, 5.5, 10), form="{:.2f}"),
    "points": Axis(-80, 100, (-80, -40, 0, 40, 80, 100), 0, (-80, 0, 100)),
}
"""Plot axis by unit; groups with other units have only a table."""
UNITS = {"percent": "%", "mark": "1 to 10", "points": "points", "log odds": "log odds"}
FORMS = {"percent": "{:.1f}", "mark": "{:.2f}", "points": "{:.1f}", "log odds": "{:+.3f}"}
LENGTHS = ("characters", "tokens", "empty", "cut off")


def rows(numbers: Mapping[str, Mapping[str, Any]]) -> list[IntervalRow]:
    """Metrics of a group, by name."""
    return [
        IntervalRow(name, interval["value"], interval["low"], interval["high"], interval["count"])
        for name, interval in numbers.items()
    ]


def _cells(row: IntervalRow, unit: str) -> tuple[str, str, str, str]:
    form = FORMS[unit].format
    interval = "" if row.low is None or row.high is None else f"{form(row.low)} to {form(row.high)}"
    return row.name, form(row.value), interval, str(row.count)


def _title(results: Mapping[str, Any]) -> str:
    against = f" against {results['baseline']}" if results["baseline"] else ""
    return f"{results['benchmark']}: {results['policy']}{against}"


def facts(results: Mapping[str, Any]) -> dict[str, str]:
    """Statistics of the judge's verdicts, by name."""
    judging, sizes = results["judging"], results["sizes"]
    lines = {"verdicts that cannot be read": f"{judging['unreadable']} of {sizes['games']}"}
    lines["asked again"] = f"{judging['asked again']} of {sizes['games']}"
    for name in ("same winner in both orders", "ties", "won by the first"):
        lines |= {name: f"{100 * judging[name]:.1f} %"} if name in judging else {}
    return lines | {"verdicts": ", ".join(f"{name} {count}" for name, count in judging["verdicts"].items())}


def _length(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if isinstance(value, int) else f"{value:.1f}"


def terminal(results: Mapping[str, Any], console: Console) -> None:
    """Print the metrics by group, and statistics of the judge's verdicts."""
    boot = results["bootstrap"]
    interval = f"{100 * boot['confidence']:.0f} % interval" if boot["resamples"] else ""
    console.print(_title(results), highlight=False, style="bold", markup=False)
    console.print(f"judged by {results['judge']}", highlight=False, markup=False)
    for group in results["groups"]:
        if len(group["numbers"]) > evaluation.MOST_ON_TERMINAL:
            continue
        table = Table(group["name"], UNITS[group["unit"]], interval, "n")
        for row in rows(group["numbers"]):
            table.add_row(*map(escape_markup, _cells(row, group["unit"])))
        console.print(table)
    table = Table("mean length of an answer", *LENGTHS)
    for name, lengths in results["lengths"].items():
        table.add_row(name, *(_length(lengths[kind]) for kind in LENGTHS))
    console.print(table)
    for name, value in facts(results).items():
        console.print(f"{name}: {value}", highlight=False, markup=False)
    for note in results["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)


def page(results: Mapping[str, Any]) -> str:
    """The results as one HTML document."""
    boot, sizes = results["bootstrap"], results["sizes"]
    parts = []
    for group in results["groups"]:
        table_rows, unit = rows(group["numbers"]), group["unit"]
        heading = group["name"].capitalize()
        table = _table(("", UNITS[unit], "interval", "n"), [_cells(row, unit) for row in table_rows])
        picture = plots.intervals(table_rows, heading, AXES[unit]) if unit in AXES else ""
        parts.append(evaluation.section(heading, table if heading == "Overall" or not picture else picture))
    lengths = [
        (name, *(_length(statistics[kind]) for kind in LENGTHS)) for name, statistics in results["lengths"].items()
    ]
    parts.append(evaluation.section("Mean length of an answer", _table(("", *LENGTHS), lengths)))
    parts.append(evaluation.section("Judging", _table(("", ""), [*facts(results).items()])))
    interval = (
        f" Intervals hold {100 * boot['confidence']:g} % of {boot['resamples']} bootstrap resamples of questions, seed "
        f"{boot['seed']}."
        if boot["resamples"]
        else ""
    )
    lead = (
        f"{sizes['judged']} of {sizes['questions']} questions from <code>{escape(results['source'])}</code>, judged by "
        f"<code>{escape(results['judge'])}</code>.{interval}"
    )
    return evaluation.document(_title(results), lead, results["notes"], parts)


def _table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>"
