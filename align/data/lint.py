"""Check a data source before training: reads every row, collects problems and statistics, and continues after a
bad row.

Biases are tested with the exact two-sided sign test: the p-value is the probability that a fair coin lies at least as
far from the middle, without a normal approximation. The test ignores rows that equal an earlier row.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.config import DataConfig, RowKind
from align.data.chat import Renderer
from align.data.dataset import dataset_items
from align.data.detect import resolve_format
from align.data.mixing import SPLITS
from align.data.rows import BadRow, Preference, Prompt, Rating
from align.errors import DataError

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
PLACES = 5
"""Most places listed for a finding."""
SIGNIFICANT = 0.01
"""A bias less likely than this by chance is a warning."""
CHOSEN_FIRST = ("openai", "trl", "helpsteer3_edit_quality")
"""Formats whose first response is the preferred one by construction."""

CHECKS: dict[str, tuple[Severity, str]] = {
    "template": ("error", "the chat template cannot be used"),
    "double_bos": ("error", "the prompt begins with two beginning-of-sequence tokens"),
    "not_rendered": ("error", "the template cannot render the row"),
    "duplicates": ("warning", "rows that repeat an earlier row of their split"),
    "contradictory": ("warning", "rows that repeat an earlier row of their split with another label"),
    "overlap": ("warning", "rows of train that are also in validation"),
    "shared_prompts": ("warning", "rows of train whose prompt is in validation"),
    "identical": ("warning", "both responses are the same text"),
    "identical_tokens": ("warning", "both responses have the same tokens but different text"),
    "identical_truncated": (
        "warning",
        "the responses differ only beyond the length limit, so they are equal once truncated",
    ),
    "empty": ("warning", "a response is empty"),
    "long_prompt": ("warning", "the prompt is longer than the limit, so the row is dropped"),
    "long_response": ("warning", "a response is longer than the limit, so the row is dropped"),
    "pad_is_eos": (
        "warning",
        "the padding token is the end-of-sequence token; masking padding masks the end of the response too",
    ),
    "added_bos": (
        "warning",
        "the tokenizer adds a beginning-of-sequence token and the template writes one: tokenize its text with "
        "add_special_tokens=False, as align does, or there will be two",
    ),
    "no_end_of_turn": (
        "warning",
        "the template writes no end-of-turn token after an answer; align adds the end-of-sequence token",
    ),
    "unrated": ("warning", "no attribute is rated"),
    "spread": ("info", "the annotators differ by more than data.max_spread, so the row is dropped"),
    "single": ("info", "a prompt with only one response, so there is no pair"),
    "ties": ("info", "neither response is preferred; only the prompt is used"),
}
"""Severity and description of each check, by name. A `BadRow` is reported under its reason, as an error."""


@dataclass
class LintFinding:
    """One kind of problem or bias, and how often it occurs."""

    name: str
    severity: Severity
    what: str
    count: int = 0
    share: float | None = None
    """Fraction of the rows read, or of the total that ``what`` names; None for a finding that is not about rows."""
    places: list[str] = field(default_factory=list)
    """The first `PLACES` occurrences, as file:line, with files relative to the source."""


@dataclass(frozen=True)
class LintTable:
    """A table of statistics."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


@dataclass(frozen=True)
class LintReport:
    """Findings and statistics of a source."""

    source: str
    format: str
    reads: str
    rows: Mapping[str, int]
    """Number of rows read from each split, including bad rows."""
    findings: list[LintFinding]
    """Sorted by severity, the most severe first."""
    tables: list[LintTable]

    def worst(self) -> Severity | None:
        """The severity of the worst finding."""
        return self.findings[0].severity if self.findings else None


def sign_test(successes: int, trials: int) -> float:
    """Two-sided p-value: the probability that ``trials`` tosses of a fair coin are at least as far from the middle as
    ``successes``."""
    far = max(successes, trials - successes)
    logs = [
        math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1) - trials * math.log(2)
        for i in range(far, trials + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


class _Findings:
    def __init__(self, source: str) -> None:
        self.source = f"{Path(source).expanduser()}/"
        self.by_name: dict[str, LintFinding] = {}

    def note(self, name: str, where: str = "", detail: str = "") -> None:
        """Count one case of a check, or of a row that is bad for the reason ``name``."""
        severity, what = CHECKS.get(name, ("error", name))
        finding = self.by_name.setdefault(name, LintFinding(name, severity, f"{what}: {detail}" if detail else what))
        finding.count += 1
        if where and len(finding.places) < PLACES:
            finding.places.append(where.removeprefix(self.source))

    def add(self, finding: LintFinding) -> None:
        self.by_name[finding.name] = finding

    def sorted(self, rows: int) -> list[LintFinding]:
        for finding in self.by_name.values():
            if finding.places and rows:
                finding.share = finding.count / rows
        return sorted(self.by_name.values(), key=lambda finding: SEVERITIES.index(finding.severity))


_LocatedRows = list[tuple[str, Any]]
"""Rows, each with its place."""


def lint(data: DataConfig, reads: RowKind, renderer: Renderer | None = None, template: str = "") -> LintReport:
    """Read all rows and report findings.

    ``renderer`` tokenizes the rows for the checks that need token ids. ``template`` is the reason why the requested
    renderer could not be built. Raises `DataError` for a source that is missing or damaged.
    """
    data = resolve_format(data)
    findings = _Findings(data.path)
    splits: dict[str, _LocatedRows] = {}
    read = {}
    placed = dataset_items(data, reads)
    for split in SPLITS:
        splits[split], others = [], 0
        for where, parsed in placed[split]:
            if isinstance(parsed, BadRow):
                findings.note(parsed.reason, parsed.where or where)
                others += 1
                continue
            splits[split] += [(where, row) for row in parsed]
            if not parsed:
                findings.note("single", where)
                others += 1
        read[split] = len(splits[split]) + others
        if not splits[split] and (split == "train" or not placed.divided):
            findings.add(LintFinding(f"empty_{split}", "error", f"{split} has no rows", 1))
    rows = [placed for split in SPLITS for placed in splits[split]]
    distinct = _repetitions(splits, findings)
    lengths, unit = [len(response) for row in distinct for response in _responses(row)], "characters"
    if template:
        findings.note("template", detail=template)
    tokens: dict[int, tuple[int, ...]] = {}
    if renderer is not None:
        _check_tokenizer(renderer, findings)
        tokens = _check_tokens(rows, renderer, data, findings)
        token_lengths = [tokens.get(id(row)) for row in distinct]
        distinct = [row for row, ids in zip(distinct, token_lengths, strict=True) if ids]
        lengths, unit = [length for ids in token_lengths if ids for length in ids[1:]], "tokens"
    _check_texts(rows, data, findings)
    if reads == "preferences":
        tables = _preferences(distinct, lengths, unit, data.format, findings)
    else:
        tables = _ratings(distinct, lengths, unit, findings) if reads == "ratings" else []
    tables += [_domain_table(row for _, row in rows), _turn_table(row for _, row in rows)]
    if renderer is not None:
        tables.append(_token_table(tokens.values()))
    return LintReport(
        data.path or ", ".join(data.sources), data.format, reads, read, findings.sorted(sum(read.values())), tables
    )


def _label(row: Any) -> Any:
    return row.preference if isinstance(row, Preference) else dict(getattr(row, "ratings", {}))


def _responses(row: Any) -> list[str]:
    if isinstance(row, Prompt):
        return []
    return [row.response1, row.response2] if isinstance(row, Preference) else [row.response]


def _repetitions(splits: Mapping[str, _LocatedRows], findings: _Findings) -> list[Any]:
    """Report repeated rows. Returns the distinct rows, without the train rows that are also in validation."""
    labels: dict[str, dict[Any, Any]] = {split: {} for split in SPLITS}
    distinct = []
    held_out = {row.key for _, row in splits["validation"]}, {row.context for _, row in splits["validation"]}
    for split in SPLITS:
        for where, row in splits[split]:
            labels_by_key, in_train = labels[split], split == "train"
            if in_train and row.context in held_out[1]:
                findings.note("shared_prompts", where)
            if row.key in labels_by_key:
                findings.note("duplicates", where)
                if labels_by_key[row.key] != _label(row):
                    findings.note("contradictory", where)
                continue
            labels_by_key[row.key] = _label(row)
            if in_train and row.key in held_out[0]:
                findings.note("overlap", where)
            else:
                distinct.append(row)
    return distinct


def _check_texts(rows: _LocatedRows, data: DataConfig, findings: _Findings) -> None:
    for where, row in rows:
        if data.max_spread is not None and row.spread > data.max_spread:
            findings.note("spread", where)
        responses = _responses(row)
        if not all(response.strip() for response in responses):
            findings.note("empty", where)
        if isinstance(row, Rating):
            if not row.ratings:
                findings.note("unrated", where)
        elif not isinstance(row, Preference):
            continue
        elif row.preference == 0:
            findings.note("ties", where)
        elif responses[0] == responses[1]:
            findings.note("identical", where)


# Tokens.


def _check_tokenizer(renderer: Renderer, findings: _Findings) -> None:
    tokenizer: Any = renderer.tokenizer
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        findings.note("pad_is_eos")
    if not renderer.closes_turns:
        findings.note("no_end_of_turn")
    if renderer.writes_bos and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]:
        findings.note("added_bos")


def _check_tokens(
    rows: _LocatedRows, renderer: Renderer, data: DataConfig, findings: _Findings
) -> dict[int, tuple[int, ...]]:
    """Report problems that only token ids show. Returns the token counts of prompt and responses by ``id`` of a row."""
    lengths = {}
    for where, row in rows:
        try:
            prompt, responses = renderer.dialogue_ids(row.context, _responses(row))
        except DataError as error:
            twice = "two beginning-of-sequence tokens" in error.message
            findings.note("double_bos" if twice else "not_rendered", where, "" if twice else error.message)
            continue
        lengths[id(row)] = len(prompt), *map(len, responses)
        limit = data.max_response_tokens
        if len(prompt) > data.max_prompt_tokens:
            findings.note("long_prompt", where)
        if max(map(len, responses), default=0) > limit:
            findings.note("long_response", where)
        if isinstance(row, Preference) and row.preference and row.response1 != row.response2:
            if responses[0] == responses[1]:
                findings.note("identical_tokens", where)
            elif responses[0][:limit] == responses[1][:limit]:
                findings.note("identical_truncated", where)
    return lengths


# Labels.


def _bias(name: str, what: str, successes: int, trials: int, findings: _Findings) -> None:
    p = sign_test(successes, trials)
    share = successes / trials if trials else None
    severity: Severity = "warning" if p < SIGNIFICANT else "info"
    message = f"{what} ({successes} of {trials}, p = {p:.2g})"
    findings.add(LintFinding(name, severity, message, successes, share))


def _preferences(
    rows: Sequence[Preference], lengths: Sequence[int], unit: str, form: str, findings: _Findings
) -> list[LintTable]:
    both = list(zip(lengths[::2], lengths[1::2], strict=True))
    decided = [(row, pair) for row, pair in zip(rows, both, strict=True) if row.preference]
    if form not in CHOSEN_FIRST:
        second = sum(row.preference > 0 for row, _ in decided)
        _bias("position", "the second response is preferred", second, len(decided), findings)
    gaps = [(pair[1] - pair[0]) * (1 if row.preference > 0 else -1) for row, pair in decided]
    longer, unequal = sum(gap > 0 for gap in gaps), sum(gap != 0 for gap in gaps)
    mean = f"; mean difference {statistics.fmean(gaps):+.1f} {unit}" if gaps else ""
    _bias("length", f"the preferred response is the longer one{mean}", longer, unequal, findings)
    strengths = Counter(row.preference for row in rows)
    shares = [(mark, strengths[mark], _percent(strengths[mark], len(rows))) for mark in range(-3, 4)]
    return [LintTable("preference", ("negative: the first is better", "rows", "share"), shares)]


def _ratings(rows: Sequence[Rating], lengths: Sequence[int], unit: str, findings: _Findings) -> list[LintTable]:
    names = list(dict.fromkeys(name for row in rows for name in row.ratings))
    table, constant = [], []
    for name in names:
        rated = [(row.ratings[name], length) for row, length in zip(rows, lengths, strict=True) if name in row.ratings]
        values, sizes = [value for value, _ in rated], [length for _, length in rated]
        if len(set(values)) == 1 and len(values) > 1:
            constant.append(name)
        numbers = statistics.fmean(values), statistics.pstdev(values)
        table.append(
            (name, len(values), *(round(n, 3) for n in numbers), min(values), max(values), _correlation(rated))
        )
        if name == "helpfulness" and len(set(values)) > 1 and len(set(sizes)) > 1:
            _length_of_rated(rated, unit, findings)
    if constant:
        what = f"an attribute has one value in all rows: {', '.join(constant)}"
        findings.add(LintFinding("constant", "warning", what, len(constant)))
    columns = ("attribute", "rows", "mean", "deviation", "lowest", "highest", f"correlation with {unit}")
    return [LintTable("ratings", columns, table)]


def _length_of_rated(rated: Sequence[tuple[float, int]], unit: str, findings: _Findings) -> None:
    """Test the correlation with Fisher's z, which is normal with standard deviation 1 / sqrt(n - 3) under no
    correlation."""
    r, n = statistics.correlation(*map(list, zip(*rated, strict=True))), len(rated)
    z = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r))) * math.sqrt(max(0, n - 3))
    p = math.erfc(abs(z) / math.sqrt(2))
    severity: Severity = "warning" if p < SIGNIFICANT else "info"
    what = f"helpfulness and length in {unit} correlate by {r:+.3f} (n = {n}, p = {p:.2g})"
    findings.add(LintFinding("length", severity, what, n))


def _correlation(rated: Sequence[tuple[float, int]]) -> float | None:
    values, lengths = zip(*rated, strict=True)
    constant = len(set(values)) == 1 or len(set(lengths)) == 1
    return None if constant else round(statistics.correlation(values, lengths), 3)


# Tables.


def _percent(count: int, of: int) -> str:
    return f"{count / of:.1%}" if of else ""


def _domain_table(rows: Iterable[Any]) -> LintTable:
    counts = Counter((row.language, row.domain) for row in rows)
    domains = sorted({domain for _, domain in counts})
    by_language = Counter[str]()
    for (language, _), count in counts.items():
        by_language[language] += count
    table = [
        (language or "(none)", *(counts[language, domain] for domain in domains), total)
        for language, total in by_language.most_common()
    ]
    return LintTable("language and domain", ("language", *(domain or "(none)" for domain in domains), "all"), table)


def _turn_table(rows: Iterable[Any]) -> LintTable:
    counts = Counter(sum(message.role == "user" for message in row.context) for row in rows)
    total = sum(counts.values())
    table = [(turns, count, _percent(count, total)) for turns, count in sorted(counts.items())]
    return LintTable("turns of the user", ("turns", "rows", "share"), table)


def _token_table(lengths: Iterable[tuple[int, ...]]) -> LintTable:
    """Uses lower quantiles, so each is a length that occurs in the data."""
    row_lengths = list(lengths)
    table = []
    for name, values in (
        ("prompt", sorted(row[0] for row in row_lengths)),
        ("response", sorted(length for row in row_lengths for length in row[1:])),
    ):
        if values:
            table.append((name, *(values[int(q * (len(values) - 1))] for q in (0.5, 0.95, 1.0))))
    return LintTable("tokens", ("", "median", "95 %", "longest"), table)
