"""Report of ``align eval reward``: terminal tables and a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from align.report import plots
from align.report.plots import IntervalRow

MOST_ON_TERMINAL = 12
"""The report omits slice kinds with more names than this; the output files contain them."""
TITLES = {
    "strength": "By strength of the preference",
    "domain": "By domain",
    "subset": "By subset",
    "language": "By language",
    "length": "By length",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5c6678; --page: #ffffff; --panel: #f5f7fa; --edge: #d9dfe8;
  --mark: #2563b0; --wrong: #c2562d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #a0a9b8; --page: #14181f; --panel: #1d232c;
  --edge: #343d4a; --mark: #78b0f0; --wrong: #ee9b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 28px 20px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 0 0 12px; }
p, ul { color: var(--soft); margin: 0 0 10px; } ul { padding-left: 20px; } code { overflow-wrap: anywhere; }
main { columns: 2 460px; column-gap: 18px; margin-top: 22px; }
section { background: var(--panel); border: 1px solid var(--edge); border-radius: 8px; padding: 18px;
  margin-bottom: 18px; break-inside: avoid; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--edge); }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.main td { font-weight: 700; } tr:last-child td { border-bottom: 0; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font-size: 13px; }
svg .tick { fill: var(--soft); } .grid { stroke: var(--edge); } .half { stroke: var(--soft); stroke-dasharray: 4 4; }
.whisker { stroke: var(--mark); stroke-width: 2; opacity: .55; } .mark, .bar { fill: var(--mark); }
.wrong { fill: var(--wrong); } .curve { fill: none; stroke: var(--mark); stroke-width: 1.5; opacity: .6; }
.square { max-width: 400px; margin: 0 auto; }
"""


def rows(intervals: Mapping[str, Mapping[str, Any]]) -> list[IntervalRow]:
    """Metrics of a results file, by name."""
    return [
        IntervalRow(name, interval["value"], interval["low"], interval["high"], interval.get("count", 0))
        for name, interval in intervals.items()
    ]


def _interval(row: IntervalRow) -> str:
    return "" if row.low is None or row.high is None else f"{100 * row.low:.1f} to {100 * row.high:.1f}"


def terminal(results: Mapping[str, Any], console: Console) -> None:
    """Print the benchmark metrics, and the slice tables that are short enough."""
    sizes, boot = results["sizes"], results["bootstrap"]
    interval = f"{100 * boot['confidence']:.0f} % interval" if boot["resamples"] else ""
    title = f"{results['benchmark']}: {results['judge']}, {sizes['items']} items of {sizes['prompts']} prompts"
    console.print(title, highlight=False, style="bold", markup=False)
    table = Table("", "%", interval)
    for row in rows(results["numbers"]):
        bold = "bold" if _is_main(row.name) else ""
        table.add_row(escape_markup(row.name), f"{100 * row.value:.1f}", _interval(row), style=bold)
    console.print(table)
    for kind, members in results["slices"].items():
        if len(members) > MOST_ON_TERMINAL:
            continue
        table = Table(TITLES[kind].lower(), "%", interval, "pairs")
        for row in rows(members):
            table.add_row(escape_markup(row.name), f"{100 * row.value:.1f}", _interval(row), str(row.count))
        console.print(table)
    if calibration := results["calibration"]:
        error, margins = calibration["expected_calibration_error"], results["margins"]
        line = (
            f"expected calibration error {error:.3f}; margin {margins['mean']:.3g} on average, {margins['ties']} ties"
        )
        console.print(line, highlight=False)
    if comparison := results["comparison"]:
        console.print(f"difference to {comparison['with']}", highlight=False, markup=False)
        table = Table("", "difference", interval)
        for row in rows(comparison["numbers"]):
            table.add_row(escape_markup(row.name), f"{100 * row.value:+.1f}", _interval(row))
        console.print(table)
    for note in results["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)


def _is_main(name: str) -> bool:
    return name.startswith(("overall", "accuracy"))


def page(results: Mapping[str, Any]) -> str:
    """The results as one HTML document."""
    sizes, boot = results["sizes"], results["bootstrap"]
    parts = [section("Scores", _table(rows(results["numbers"]), "%", "{:.1f}"))]
    if comparison := results["comparison"]:
        heading = f"Difference to {comparison['with']}"
        parts.append(section(heading, _table(rows(comparison["numbers"]), "points", "{:+.1f}")))
    if calibration := results["calibration"]:
        error = f"<p>Expected calibration error {calibration['expected_calibration_error']:.3f}. "
        plot = plots.reliability(calibration["bins"], "Reliability diagram")
        words = "A calibrated judge lies on the dashed line.</p>"
        parts.append(section("Calibration", f'{error}{words}<div class="square">{plot}</div>'))
    if margins := results["margins"]:
        plot = plots.histogram(margins["edges"], margins["counts"], "Histogram of margins")
        words = f"<p>Mean {margins['mean']:.3g}, median {margins['median']:.3g}, {margins['ties']} ties.</p>"
        parts.append(section("Margins", words + plot))
    for kind, members in results["slices"].items():
        parts.append(section(TITLES[kind], plots.intervals(rows(members), TITLES[kind])))
    interval = (
        f"Intervals hold {100 * boot['confidence']:g} % of {boot['resamples']} bootstrap resamples of prompts, seed "
        f"{boot['seed']}. "
        if boot["resamples"]
        else ""
    )
    lead = (
        f"{sizes['items']} items of {sizes['prompts']} prompts, {sizes['responses']} responses, from "
        f"<code>{escape(results['source'])}</code>. {interval}In pictures, every pair of a right and a wrong response "
        "counts once."
    )
    return document(f"{results['benchmark']}: {results['judge']}", lead, results["notes"], parts)


def document(title: str, lead: str, notes: Sequence[str], parts: Sequence[str]) -> str:
    """An HTML page. ``lead`` and ``parts`` are HTML, the other arguments plain text."""
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"<p>{lead}</p>{f'<ul>{listed}</ul>' if listed else ''}<main>{''.join(parts)}</main></body></html>\n"
    )


def section(heading: str, inside: str) -> str:
    """A section of the page; ``inside`` is HTML."""
    return f"<section><h2>{escape(heading)}</h2>{inside}</section>"


def _table(table: Sequence[IntervalRow], unit: str, form: str) -> str:
    lines = [
        f"<tr{' class=main' if _is_main(row.name) else ''}><td>{escape(row.name)}</td>"
        f"<td>{form.format(100 * row.value)}</td><td>{_interval(row)}</td></tr>"
        for row in table
    ]
    return f"<table><tr><th></th><th>{unit}</th><th>interval</th></tr>{''.join(lines)}</table>"
