"""Report of ``align scale``: terminal tables and a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

from align.report import plots
from align.report.evaluation import STYLE
from align.report.plots import Curve

MEASURES = {"ground_truth": "ground truth", "eval_reward": "score by eval_reward", "select": "score by select"}
"""Plotted measures in order of preference. `select` comes last: it picks the responses, so its scores are biased."""
AXES = {"drafts": "drafts", "feedbacks": "texts of feedback on a draft", "edits": "edits of a draft"}
NAMES = {"feedback_edit": "feedback-edit", "best_of_n": "best-of-n, as many tokens"}
STAGES = {
    "drafts": "drafts",
    "draft_select": "select among drafts",
    "feedback": "feedback",
    "edits": "edits",
    "select": "select",
    "total": "total",
    "eval_reward": "eval_reward",
    "sweep_edits": "further edits for the sweep",
    "best_of": "further samples for best-of-n",
    "best_of_select": "select for best-of-n",
    "best_of_eval_reward": "eval reward model for best-of-n",
}
EXTRA_STYLE = """
.second { fill: none; stroke: var(--wrong); stroke-width: 1.5; stroke-dasharray: 6 4; } .dot { fill: var(--wrong); }
"""
SCORES = ("", "select", "eval_reward", "ground truth", "tokens", "candidates", "edited")
BUDGET = ("stage", "calls", "tokens read", "tokens generated", "of one draft", "seconds", "of one draft")


def _score_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    whole = results["whole"]
    summaries = {
        "one draft": results["one_draft"],
        f"best of {whole['drafts']} drafts": results["drafts_alone"],
        NAMES["feedback_edit"]: whole["feedback_edit"],
        NAMES["best_of_n"]: whole["best_of_n"],
    }
    return [_score_row(name, summary) for name, summary in summaries.items() if summary is not None]


def _score_row(name: str, summary: Mapping[str, float]) -> tuple[str, ...]:
    scores = [f"{summary[key]:.3f}" if key in summary else "" for key in ("select", "eval_reward", "ground_truth")]
    return (
        name,
        *scores,
        f"{summary['tokens']:.1f}",
        f"{summary['candidates']:.1f}",
        f"{100 * summary['edited']:.0f} %",
    )


def _budget_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            STAGES[row["stage"]],
            str(row["calls"]),
            str(row["prompt_tokens"]),
            str(row["tokens"]),
            _relative(row["relative_tokens"]),
            f"{row['seconds']:.1f}",
            _relative(row["relative_seconds"]),
        )
        for row in results["budget"]
    ]


def _relative(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} x"


def _notes(results: Mapping[str, Any]) -> list[str]:
    notes = [
        f"{count} answers were cut off at their limit: {name}" for name, count in results["truncated"].items() if count
    ]
    if names := [name for name, count in results["uncounted"].items() if count]:
        notes.append(f"best-of-n is left out, for tokens are not counted everywhere: {', '.join(names)}")
    return notes


def terminal(results: Mapping[str, Any], console: Console) -> None:
    """Print scores and budget."""
    console.print(f"{results['prompts']} prompts of {results['source']}", highlight=False, style="bold", markup=False)
    for columns, rows in ((SCORES, _score_rows(results)), (BUDGET, _budget_rows(results))):
        table = Table(*columns)
        for row in rows:
            table.add_row(*row, style="bold" if row[0] in ("total", NAMES["feedback_edit"]) else "")
        console.print(table)
    for axis, points in results["sweep"].items():
        table = Table(AXES[axis], *NAMES.values(), "tokens")
        name = _measured(points)
        for point in points:
            scores = [f"{point[key][name]:.3f}" if point[key] else "" for key in NAMES]
            table.add_row(str(point[axis]), *scores, f"{point['feedback_edit']['tokens']:.1f}")
        console.print(table)
    for note in _notes(results):
        console.print(f"note: {note}", highlight=False, markup=False)


def _measured(points: Sequence[Mapping[str, Any]]) -> str:
    return next(name for name in MEASURES if name in points[0]["feedback_edit"])


def page(results: Mapping[str, Any]) -> str:
    """The results as one HTML document."""
    parts = [
        _section("Scores", _table(SCORES, _score_rows(results))),
        _section("Budget", _table(BUDGET, _budget_rows(results))),
    ]
    for axis, points in results["sweep"].items():
        name = _measured(points)
        curves = [
            Curve(NAMES[key], [(point[axis], point[key][name]) for point in points if point[key]], mark, dot)
            for key, mark, dot in (("feedback_edit", "curve", "mark"), ("best_of_n", "second", "dot"))
        ]
        plot = plots.curves([point for point in curves if point.points], AXES[axis], MEASURES[name])
        parts.append(_section(f"{MEASURES[name].capitalize()} against number of {AXES[axis]}", plot))
    notes = "".join(f"<li>{escape(note)}</li>" for note in _notes(results))
    title = "Feedback-edit scaling"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}{EXTRA_STYLE}</style></head><body><h1>{title}</h1>"
        f"<p>{results['prompts']} prompts of <code>{escape(results['source'])}</code>. Scores are means over prompts. "
        "Best-of-n has, prompt by prompt, as many samples of the policy as have no more tokens than the setting beside "
        f"it generated.</p>{f'<ul>{notes}</ul>' if notes else ''}<main>{''.join(parts)}</main></body></html>\n"
    )


def _section(heading: str, inside: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{inside}</section>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = [
        f"<tr{' class=main' if row[0] in ('total', NAMES['feedback_edit']) else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"
