"""SVG plots to embed in HTML, without scripts or external files; the page's style sheet sets the colors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 500
LABEL_CHARACTERS = 34
"""Maximum length of a row name; longer names are cut and shown in full on hover."""


@dataclass(frozen=True)
class IntervalRow:
    """A metric with its name and interval."""

    name: str
    value: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Axis:
    """Range and number format of a plot axis."""

    low: float
    high: float
    ticks: tuple[float, ...]
    marked: float
    """The tick with a reference line: chance level, or the middle."""
    labelled: tuple[float, ...]
    unit: str = ""
    factor: float = 1.0
    """Factor from values to axis units."""
    form: str = "{:.1f}"


PERCENT = Axis(0, 100, (0, 25, 50, 75, 100), 50, (0, 50, 100), " %", 100.0)


def _scale(value: float, domain: tuple[float, float], span: tuple[float, float]) -> float:
    part = (value - domain[0]) / (domain[1] - domain[0])
    return round(span[0] + part * (span[1] - span[0]), 1)


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def _figure(height: float, label: str, parts: Sequence[str], width: float = WIDTH) -> str:
    inside = "".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{inside}</svg>'


def intervals(rows: Sequence[IntervalRow], label: str, axis: Axis = PERCENT) -> str:
    """A point and a line for each row, over 0 to 100 % with half marked, or over another axis."""
    left, right, step, top = 212.0, 388.0, 24.0, 8.0
    bottom, ends = top + step * len(rows), (axis.low, axis.high)
    parts = []
    for tick in axis.ticks:
        x = _scale(tick, ends, (left, right))
        parts.append(_line(x, top, x, bottom, "half" if tick == axis.marked else "grid"))
        parts.append(_text(x, bottom + 16, f"{tick:g}{axis.unit}", "middle") if tick in axis.labelled else "")
    for number, row in enumerate(rows):
        y = top + step * (number + 0.5)
        x, low, high = (
            _scale(axis.factor * value, ends, (left, right)) for value in (row.value, row.low or 0, row.high or 0)
        )
        name = row.name if len(row.name) <= LABEL_CHARACTERS else row.name[: LABEL_CHARACTERS - 1] + "…"
        whisker = _line(low, y, high, y, "whisker") if row.low is not None else ""
        texts = (
            _text(left - 12, y + 4, name, "end", "name"),
            _text(right + 52, y + 4, axis.form.format(axis.factor * row.value), "end", "name"),
            _text(WIDTH - 4, y + 4, f"n {row.count}", "end"),
        )
        mark = f'{whisker}<circle class="mark" cx="{x}" cy="{y}" r="4.5"/>'
        parts.append(f"<g><title>{escape(row.name)}: {words(row, axis)}</title>{mark}{''.join(texts)}</g>")
    return _figure(bottom + 26, label, parts)


def words(row: IntervalRow, axis: Axis = PERCENT) -> str:
    """The row's number and interval in a line of text."""
    value, low, high = (
        "" if number is None else axis.form.format(axis.factor * number) for number in (row.value, row.low, row.high)
    )
    return f"{value} [{low}, {high}]" if low and high else value


def reliability(bins: Sequence[dict[str, float]], label: str) -> str:
    """Accuracy over confidence, a point for each bin, its area by the number of verdicts."""
    size, left, top = 300.0, 68.0, 12.0
    x_of = lambda value: _scale(value, (0.5, 1.0), (left, left + size))  # noqa: E731
    y_of = lambda value: _scale(value, (0.0, 1.0), (top + size, top))  # noqa: E731
    parts = []
    for tick in (0, 25, 50, 75, 100):
        parts.append(_line(left, y_of(tick / 100), left + size, y_of(tick / 100), "grid"))
        parts.append(_text(left - 8, y_of(tick / 100) + 4, f"{tick} %", "end"))
    for tick in (50, 60, 70, 80, 90, 100):
        parts.append(_text(x_of(tick / 100), top + size + 18, f"{tick} %", "middle"))
    parts.append(_line(x_of(0.5), y_of(0.5), x_of(1.0), y_of(1.0), "half"))
    most = max((bucket["count"] for bucket in bins), default=1)
    points = [(x_of(bucket["confidence"]), y_of(bucket["accuracy"])) for bucket in bins]
    parts.append(f'<polyline class="curve" points="{" ".join(f"{x},{y}" for x, y in points)}"/>')
    for bucket, (x, y) in zip(bins, points, strict=True):
        title = (
            f"{bucket['count']:.0f} verdicts, confidence {bucket['confidence']:.3f}, accuracy {bucket['accuracy']:.3f}"
        )
        radius = round(3 + 9 * (bucket["count"] / most) ** 0.5, 1)
        parts.append(f'<circle class="mark" cx="{x}" cy="{y}" r="{radius}"><title>{title}</title></circle>')
    parts.append(_text(left + size / 2, top + size + 40, "confidence sigmoid(|d|)", "middle", "name"))
    turn = f'transform="translate(14 {top + size / 2}) rotate(-90)"'
    parts.append(f"<g {turn}>{_text(0, 0, 'verdicts that are right', 'middle', 'name')}</g>")
    return _figure(top + size + 50, label, parts, left + size + 24)


def histogram(edges: Sequence[float], counts: Sequence[int], label: str) -> str:
    """Bars over the margin; those below zero, where the wrong response won, in another color."""
    height, left, right, top = 200.0, 48.0, WIDTH - 16.0, 12.0
    most = max(counts) or 1
    x_of = lambda value: _scale(value, (edges[0], edges[-1]), (left, right))  # noqa: E731
    y_of = lambda value: _scale(value, (0, most), (top + height, top))  # noqa: E731
    parts = []
    for tick in (0, most // 2, most):
        parts.append(_line(left, y_of(tick), right, y_of(tick), "grid"))
        parts.append(_text(left - 8, y_of(tick) + 4, str(tick), "end"))
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        kind, x, y = ("wrong" if low + high < 0 else "bar"), x_of(low), y_of(count)
        title = f"<title>{low:.3g} to {high:.3g}: {count}</title>"
        tall, wide = round(top + height - y, 1), round(max(1.0, x_of(high) - x - 1), 1)
        parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{wide}" height="{tall}">{title}</rect>')
    parts.append(_line(x_of(0.0), top, x_of(0.0), top + height, "half"))
    for tick in (edges[0], 0.0, edges[-1]):
        near = tick and abs(x_of(tick) - x_of(0.0)) < 40  # its number would lie on that of zero
        parts.append("" if near else _text(x_of(tick), top + height + 18, f"{tick:.3g}", "middle"))
    parts.append(
        _text((left + right) / 2, top + height + 38, "score of the right less the wrong one", "middle", "name")
    )
    return _figure(top + height + 48, label, parts)


@dataclass(frozen=True)
class Curve:
    """Points of a line plot over counts."""

    name: str
    points: Sequence[tuple[float, float]]
    line: str
    """Class of the line in the page's style sheet."""
    mark: str
    """Class of its points."""


def curves(lines: Sequence[Curve], across: str, up: str) -> str:
    """Lines over numbers of things, each number at the same distance from the next, as on a scale of powers of two."""
    height, left, right, top = 220.0, 64.0, WIDTH - 20.0, 34.0
    numbers = sorted({x for curve in lines for x, _ in curve.points})
    values = [y for curve in lines for _, y in curve.points]
    slack = 0.1 * (max(values) - min(values)) or 0.5
    domain = min(values) - slack, max(values) + slack
    place = {x: left + (right - left) * (i + 0.5) / len(numbers) for i, x in enumerate(numbers)}
    y_of = lambda value: _scale(value, domain, (top + height, top))  # noqa: E731
    parts = [_text(round(place[x], 1), top + height + 18, f"{x:g}", "middle") for x in numbers]
    for i in range(5):
        tick = domain[0] + (domain[1] - domain[0]) * i / 4
        parts += [
            _line(left, y_of(tick), right, y_of(tick), "grid"),
            _text(left - 8, y_of(tick) + 4, f"{tick:.2f}", "end"),
        ]
    for number, curve in enumerate(lines):
        points = [(round(place[x], 1), y_of(y)) for x, y in curve.points]
        parts.append(f'<polyline class="{curve.line}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>')
        for (x, y), (given, value) in zip(points, curve.points, strict=True):
            title = f"<title>{escape(curve.name)}, {given:g} {escape(across)}: {value:.3f}</title>"
            parts.append(f'<circle class="{curve.mark}" cx="{x}" cy="{y}" r="4.5">{title}</circle>')
        at = left + number * (right - left) / 2
        parts.append(_line(at, 14, at + 24, 14, curve.line) + _text(at + 30, 18, curve.name, kind="name"))
    parts.append(_text((left + right) / 2, top + height + 40, across, "middle", "name"))
    turn = f'transform="translate(14 {top + height / 2}) rotate(-90)"'
    parts.append(f"<g {turn}>{_text(0, 0, up, 'middle', 'name')}</g>")
    return _figure(top + height + 50, f"{up} against number of {across}", parts)
