"""Ratings to pairs, fewer labels, and folders of one format from folders of another."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import layouts
import pytest

from align.cli import main
from align.commands import build_parser
from align.config import DataConfig
from align.data import convert, dataset
from align.data.chat import Message
from align.data.rows import Preference, Rating
from align.errors import DataError


def rated(prompt: str, response: str, **ratings: float) -> Rating:
    return Rating((Message("user", prompt),), response, ratings, "stem", "english")


class TestPairs:
    ROWS = (
        rated("a", "x", helpfulness=3.0, humor=0.0),
        rated("a", "y", helpfulness=1.0, humor=0.4),
        rated("a", "z", humor=4.0),
        rated("b", "x", helpfulness=2.0),
        rated("b", "y", helpfulness=2.0),
        rated("c", "x", helpfulness=0.0),
        rated("c", "", helpfulness=4.0),
        rated("a", "w", helpfulness=4.0),
    )

    def test_by_helpfulness(self):
        found, counts = convert.pairs_from_ratings(self.ROWS)
        assert found == [Preference((Message("user", "a"),), "x", "y", -2, "stem", "english")]
        assert counts == {"unrated": 1, "single": 1, "pairs": 3, "ties": 1, "empty": 1, "kept": 1}

    def test_by_another_attribute_and_with_strengths_of_1_to_3(self):
        found, counts = convert.pairs_from_ratings(self.ROWS, "humor")
        assert [(row.response1, row.response2, row.preference) for row in found] == [
            ("x", "y", 1),
            ("x", "z", 3),
            ("y", "z", 3),
        ]
        assert counts == {"unrated": 5, "single": 0, "pairs": 3, "ties": 0, "empty": 0, "kept": 3}

    def test_agrees_with_reading_helpsteer2_as_preferences(self, tmp_path: Path):
        marks = [(a, b) for a in range(5) for b in range(5)]
        rows = [layouts.rated(f"{pair}", f"{i}", mark) for pair in marks for i, mark in enumerate(pair)]
        layouts.write(tmp_path, "helpsteer2", rows, [layouts.rated("v"), layouts.rated("v", "x")])
        data = DataConfig(path=str(tmp_path), format="helpsteer2")
        found, counts = convert.pairs_from_ratings(dataset.load_dataset(data, "ratings").train)
        assert found == [row for row in dataset.load_dataset(data).train if row.preference]
        assert (counts["ties"], counts["kept"]) == (5, 20)


def test_only_some_labels():
    found, counts = convert.select_attributes(TestPairs.ROWS[:3], ["helpfulness", "verbosity"])
    assert [row.ratings for row in found] == [{"helpfulness": 3.0}, {"helpfulness": 1.0}]
    assert counts == {"rows": 3, "unrated": 1, "kept": 2}


def contents(folder: Path) -> list[str]:
    return sorted(str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file())


def load(folder: Path, form: Any, reads: Any) -> Any:
    return dataset.load_dataset(DataConfig(path=str(folder), format=form), reads)


class TestFolders:
    @pytest.mark.parametrize(("to", "form"), [("openai", "openai"), ("nemo", "nemo"), ("nemo_text", "nemo")])
    def test_ratings_there_and_back(self, tmp_path: Path, to: str, form: str):
        train = [rated("a", "x", helpfulness=3.0, verbosity=1.5), rated("b", "y", humor=0.0)]
        convert.write_dataset(tmp_path / "out", to, {"train": train, "validation": train[:1]})
        read = load(tmp_path / "out", form, "ratings")
        found = [(row.context, row.response, row.ratings) for row in read.train]
        assert found == [(row.context, row.response, row.ratings) for row in train[1:]]
        assert read.counts["train"].in_validation == 1

    @pytest.mark.parametrize(
        ("to", "form"), [("openai", "openai"), ("nemo", "nemo"), ("nemo_text", "nemo"), ("helpsteer3", "helpsteer3")]
    )
    def test_preferences_there_and_back(self, tmp_path: Path, to: str, form: str):
        context = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
        marks = [-3, -2, -1, 0, 1, 2, 3]
        train = [Preference(context, f"x{mark}", "y", mark, "stem", "english") for mark in marks]
        counts = convert.write_dataset(tmp_path / "out", to, {"train": train, "validation": train[:1]})
        assert counts["train"] == ({"written": 7} if to == "helpsteer3" else {"written": 6, "ties": 1})
        rows = [row for row in train[1:] if row.preference or to == "helpsteer3"]
        found = [
            (row.context, row.chosen, row.rejected, row.strength)
            for row in load(tmp_path / "out", form, "preferences").train
        ]
        assert found == [(row.context, row.chosen, row.rejected, row.strength) for row in rows]

    @pytest.mark.parametrize("form", ["openai", "nemo", "helpsteer3"])
    def test_written_again_the_files_are_the_same(self, tmp_path: Path, form: Any):
        rows = {"openai": layouts.chosen, "helpsteer3": layouts.preference}.get(form)
        pair = [layouts.nemo("a", one, "quality:2") for one in ("x", "y")]
        held_out = [layouts.nemo("v", one, "quality:1") for one in ("x", "y")]
        layouts.write(tmp_path / "a", form, [rows("a"), rows("b")] if rows else pair, [rows("v")] if rows else held_out)
        names = ("a", "b", "c")
        for source, out in pairwise(names):
            read = load(tmp_path / source, form, "preferences")
            convert.write_dataset(tmp_path / out, form, {"train": read.train, "validation": read.validation})
        assert (
            load(tmp_path / "b", form, "preferences").fingerprint
            == load(tmp_path / "a", form, "preferences").fingerprint
        )
        assert contents(tmp_path / "c") == sorted(layouts.FILES[form])
        assert [(tmp_path / "b" / f).read_bytes() for f in layouts.FILES[form]] == [
            (tmp_path / "c" / f).read_bytes() for f in layouts.FILES[form]
        ]

    def test_whole_or_not_at_all(self, tmp_path: Path):
        ties = [Preference((Message("user", "a"),), "x", "y", 0, "", "")]
        good = [Preference((Message("user", "a"),), "x", "y", 1, "", "")]
        with pytest.raises(DataError, match="no rows of validation can be written: ties 1"):
            convert.write_dataset(tmp_path / "out", "openai", {"train": good, "validation": ties})
        assert contents(tmp_path) == []
        (tmp_path / "out").mkdir()
        with pytest.raises(DataError, match="out: the output path exists already"):
            convert.write_dataset(tmp_path / "out", "openai", {"train": good, "validation": good})

    def test_rows_that_a_format_cannot_hold_are_counted(self, tmp_path: Path):
        rows = [
            rated("a", "x", clarity=1.0),
            rated("a", "y", helpfulness=1.0),
            rated("<extra_id_1>User", "y", humor=1.0),
        ]
        counts = convert.write_dataset(tmp_path / "out", "nemo_text", {"train": rows, "validation": rows})
        assert counts["train"] == {
            "written": 1,
            "ratings has an attribute that is not one of NeMo's nine": 1,
            "user contains a turn marker of NeMo's format": 1,
        }


class TestCommand:
    def run(self, *arguments: Any) -> int:
        return main(["data", "convert", *map(str, arguments)])

    @pytest.fixture
    def helpsteer2(self, tmp_path: Path) -> Path:
        rows = [
            layouts.rated("a", "x", 3),
            layouts.rated("a", "y", 1),
            layouts.rated("b", "x", 2),
            layouts.rated("b", "y", 2),
        ]
        return layouts.write(
            tmp_path / "in", "helpsteer2", rows, [layouts.rated("v", "x", 0), layouts.rated("v", "y", 4)]
        )

    def test_ratings_to_pairs(self, helpsteer2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        out = tmp_path / "out"
        assert self.run(helpsteer2, out, "--from", "helpsteer2", "--to", "helpsteer3", "--pairs-by", "helpfulness") == 0
        assert [(row.chosen, row.strength) for row in load(out, "helpsteer3", "preferences").train] == [("x", 2)]
        said = capsys.readouterr().out
        assert "train: read 4, kept 4\ntrain, pairs by helpfulness: pairs 2, ties 1, kept 1\n" in said
        assert "train: written 1\nvalidation: written 1\n" in said

    def test_helpfulness_alone_for_nemo(self, helpsteer2: Path, tmp_path: Path):
        out = tmp_path / "out"
        arguments = ["--from", "helpsteer2", "--to", "nemo_text", "--rows", "ratings", "--attributes", "helpfulness"]
        assert self.run(helpsteer2, out, *arguments) == 0
        lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
        assert [line["label"] for line in lines] == [
            [-100.0] * 4 + [mark] + [-100.0] * 4 for mark in (3.0, 1.0, 2.0, 2.0)
        ]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--to", "helpsteer3", "--rows", "ratings"], "--to helpsteer3 cannot hold ratings"),
            (["--to", "openai", "--attributes", "humor"], "--attributes requires ratings"),
            (["--to", "openai", "--max-rows", "3"], "max_rows is even with format helpsteer2"),
            (["--to", "openai", "--rows", "ratings", "--attributes", "humor"], "no rows of train can be written"),
        ],
    )
    def test_refused(self, helpsteer2: Path, tmp_path: Path, capsys, arguments: list[str], message: str):
        assert self.run(helpsteer2, tmp_path / "out", "--from", "helpsteer2", *arguments) == 78
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_bad_rows_are_told(self, helpsteer2: Path, tmp_path: Path, capsys):
        layouts.put(helpsteer2 / "train.jsonl.gz", [layouts.rated("a"), b"{", b"["])
        arguments = ["--from", "helpsteer2", "--to", "openai", "--rows", "ratings"]
        assert self.run(helpsteer2, tmp_path / "out", *arguments) == 78
        assert "train.jsonl.gz:2: row is not JSON" in capsys.readouterr().err
        assert self.run(helpsteer2, tmp_path / "out", *arguments, "--bad-rows", "skip") == 0
        assert "train: read 3, kept 1, row is not JSON 2\n" in capsys.readouterr().out

    def test_every_target_is_a_choice(self):
        given = ["data", "convert", "a", "b", "--from", "openai", "--to"]
        assert [build_parser().parse_args([*given, to]).to for to in convert.OUTPUT_FORMATS] == list(
            convert.OUTPUT_FORMATS
        )
        with pytest.raises(SystemExit):
            build_parser().parse_args([*given, "parquet"])
