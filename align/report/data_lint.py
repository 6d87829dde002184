"""``align data lint``: report the findings of `align.data.lint` in the terminal, as Markdown and as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from align.data import chat, dataset
from align.data.chat import Renderer
from align.data.convert import data_config
from align.data.lint import LintFinding, LintReport, lint
from align.errors import AlignError, ConfigError, DataError
from align.utils.atomic_write import write_atomic

STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}
ERRORS = 1
"""Exit status if there are findings to fix."""
_COLUMNS = ("severity", "count", "share", "finding", "first places")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """``align data lint``. The status is 1 where there are errors, or with ``--strict`` warnings."""
    data = data_config(arguments)
    reads = arguments.reads or dataset.default_row_kind(data)
    renderer, problem = None, ""
    if arguments.tokenizer:
        tokenizer = chat.load_tokenizer(arguments.tokenizer)
        try:
            renderer = Renderer(tokenizer, data.chat_template, data.date)
        except DataError as error:
            problem = error.message
    elif data.chat_template or data.date:
        raise ConfigError("--chat-template and --date need a tokenizer", remedy="add --tokenizer FOLDER")
    report = lint(data, reads, renderer, problem)
    show(report, console)
    if arguments.markdown:
        _write(arguments.markdown, markdown(report))
    if arguments.json:
        _write(arguments.json, json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n")
    return ERRORS if report.worst() in (("error", "warning") if arguments.strict else ("error",)) else 0


def _title(report: LintReport) -> str:
    rows = ", ".join(f"{split} {count}" for split, count in report.rows.items())
    return f"{report.source} ({report.format}, {report.reads}): {rows} rows"


def _cells(finding: LintFinding) -> tuple[str, ...]:
    share = "" if finding.share is None else f"{finding.share:.1%}"
    return finding.severity, str(finding.count), share, finding.what, ", ".join(finding.places)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def show(report: LintReport, console: Console) -> None:
    """Print the report."""
    console.print(_title(report), style="bold", highlight=False, markup=False)
    _print(
        console,
        "",
        _COLUMNS,
        [_cells(finding) for finding in report.findings],
        [STYLES[f.severity] for f in report.findings],
    )
    for table in report.tables:
        _print(console, table.title, table.columns, [tuple(map(_number, row)) for row in table.rows])
    if not report.findings:
        console.print("nothing was found", highlight=False)


def _print(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] = ()
) -> None:
    if not rows:
        return
    table = Table(*map(escape, columns), title=title or None, title_justify="left", box=None, header_style="bold")
    for number, row in enumerate(rows):
        table.add_row(*map(escape, row), style=styles[number] if styles else None)
    console.print(table)


def markdown(report: LintReport) -> str:
    """The report as Markdown."""
    parts = [f"# {_plain(_title(report))}"]
    if report.findings:
        parts.append(_markdown_table(_COLUMNS, [_cells(finding) for finding in report.findings]))
    else:
        parts.append("Nothing was found.")
    for table in report.tables:
        rows = [tuple(map(_number, row)) for row in table.rows]
        parts.append(f"## {table.title}\n\n{_markdown_table(table.columns, rows)}")
    return "\n\n".join(parts) + "\n"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _plain(cell: str) -> str:
    """Escape text for a Markdown table cell."""
    for sign in "\\`*_<|":
        cell = cell.replace(sign, f"\\{sign}")
    return " ".join(cell.split())


def _write(path: Path, content: str) -> None:
    try:
        write_atomic(path, content)
    except AlignError as error:
        raise ConfigError(error.message, where=str(path), remedy="name another file") from error
