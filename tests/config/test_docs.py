"""Generated pages of keys: types, defaults, unions, sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from align.config import docs


@dataclass(frozen=True)
class Scorer:
    """What all kinds have."""

    kind: str = "file"
    """Which kind."""


@dataclass(frozen=True)
class FileScorer(Scorer):
    """``kind: file``: see docs/rewards.md."""

    kind: Literal["file"] = "file"
    """The default kind."""
    path: str = "???"
    """A folder | a file."""


@dataclass(frozen=True)
class UrlScorer(Scorer):
    """``kind: url``."""

    kind: Literal["url"] = "url"
    """Selects this kind."""
    retries: int = 3
    """Attempts."""


@dataclass(frozen=True)
class Recipe:
    """A recipe."""

    scorer: FileScorer | UrlScorer | None = field(default_factory=FileScorer)
    """The scorer."""
    others: dict[str, UrlScorer] = field(default_factory=dict)
    """Further ones."""
    server: UrlScorer = field(default_factory=lambda: UrlScorer(retries=5))
    """With another default."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Two numbers."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Anything."""
    suffix: str = "\n"
    """A line break."""
    names: list[str] | None = None
    """Names."""


def rows(schema: type) -> dict[str, tuple[str, str, str]]:
    """Type, default and meaning by key."""
    lines = [line.strip("| ") for line in "".join(docs.format_schema(schema, "X")).splitlines() if line[:3] == "| `"]
    cells = [line.replace("\\|", "&").split(" | ") for line in lines]
    return {key.strip("`"): (kind, default.strip(), meaning) for key, kind, default, meaning in cells}


def test_rows_hold_type_default_and_docstring():
    assert rows(Recipe) == {
        "scorer": ("[Scorer](#scorer) or null", "[FileScorer](#filescorer)", "The scorer."),
        "others": ("mapping to [UrlScorer](#urlscorer)", "`{}`", "Further ones."),
        "server": ("[UrlScorer](#urlscorer)", "`retries: 5`", "With another default."),
        "betas": ("list of 2, each a number", "`[0.9, 0.98]`", "Two numbers."),
        "extra": ("mapping to any value", "`{}`", "Anything."),
        "suffix": ("text", "`\\n`", "A line break."),
        "names": ("list of text or null", "`null`", "Names."),
    }
    assert rows(FileScorer)["path"] == ("text", "**required**", "A folder & a file.")


def test_each_kind_of_a_union_has_a_table_behind_their_common_base():
    assert docs.collect([Recipe]) == [Scorer, FileScorer, UrlScorer]
    assert docs.list_keys([Recipe]) == {FileScorer: ["scorer"], UrlScorer: ["scorer", "others.NAME", "server"]}
    assert docs.list_kinds([Recipe]) == {Scorer: [FileScorer, UrlScorer]}
    text = "\n".join(docs.format_schema(FileScorer, "FileScorer", keys=["scorer"]))
    assert (
        "`kind: file`: see [rewards.md](rewards.md).\nKeys below `scorer`.\nHas these keys and those of [Scorer]"
        in text
    )


def test_a_field_without_a_docstring_is_refused():
    @dataclass(frozen=True)
    class Bare:
        """Has a field without a docstring."""

        name: str = ""

    with pytest.raises(TypeError, match=r"Bare\.name has no docstring"):
        rows(Bare)
