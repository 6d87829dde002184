"""`align data lint`: exit status, terminal, Markdown and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layouts
import pytest

from align.cli import main
from align.data import toy

SOUND = [layouts.preference("a"), layouts.preference("b", 2)]
HELD_OUT = [layouts.preference("v"), layouts.preference("w", 2)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return layouts.write(tmp_path / "data", "helpsteer3", SOUND, HELD_OUT)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    toy.tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def lint(*arguments: Any) -> int:
    return main(["data", "lint", *map(str, arguments)])


class TestStatus:
    def test_0_for_a_sound_source(self, source: Path):
        assert lint(source) == lint(source, "--strict") == 0

    def test_1_for_errors_and_for_warnings_when_strict(self, source: Path):
        layouts.write(source, "helpsteer3", [*SOUND, SOUND[0]], HELD_OUT)
        assert (lint(source), lint(source, "--strict")) == (0, 1)
        layouts.write(source, "helpsteer3", [*SOUND, b"{"], HELD_OUT)
        assert lint(source) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "no file for split train"),
            (["--format", "helpsteer2_preference", "--rows", "ratings"], "holds preferences, not ratings"),
            (["--format", "helpsteer2", "--max-rows", "3"], "max_rows is even"),
            (["--date", "1 May 2025"], "need a tokenizer"),
            (["--tokenizer", "nowhere"], "the tokenizer cannot be loaded"),
        ],
    )
    def test_78_for_a_source_that_cannot_be_used(self, tmp_path: Path, capsys, arguments: list[str], message: str):
        if {"--date", "--tokenizer"} & set(arguments):
            (tmp_path / "train.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
        assert lint(tmp_path, *arguments) == 78
        assert message in capsys.readouterr().err


class TestTemplate:
    def test_one_that_writes_the_date_is_an_error_unless_it_is_fixed(self, source: Path, tokenizer: Path, capsys):
        clock = tokenizer.parent / "template.jinja"
        dated = "{{ bos_token }}{% if date_string is not defined %}{{ strftime_now('%d') }}{% endif %}"
        clock.write_text(dated + toy.CHAT_TEMPLATE.removeprefix("{{ bos_token }}"))
        arguments = [source, "--tokenizer", tokenizer, "--chat-template", clock]
        assert lint(*arguments) == 1
        assert "today's date" in capsys.readouterr().out
        assert lint(*arguments, "--date", "1 May 2025") == 0

    def test_limits_are_those_of_the_command(self, source: Path, tokenizer: Path, capsys):
        assert lint(source, "--tokenizer", tokenizer, "--strict") == 0
        assert lint(source, "--tokenizer", tokenizer, "--max-response-tokens", 2, "--strict") == 1
        assert "longer than the limit" in capsys.readouterr().out


class TestPages:
    def test_terminal(self, source: Path, capsys):
        layouts.write(source, "helpsteer3", [*SOUND, b"{", layouts.preference("c", domain="[red]x")], HELD_OUT)
        lint(source)
        said = capsys.readouterr().out
        assert f"{source} (helpsteer3, preferences): train 4, validation 2 rows" in said
        error = next(line for line in said.splitlines() if "row is not JSON" in line)
        assert error.split()[:3] == ["error", "1", "16.7%"]
        assert "preference/train.jsonl.gz:3" in error
        assert "[red]x" in said

    def test_markdown_and_json(self, source: Path, tmp_path: Path):
        layouts.write(source, "helpsteer3", [*SOUND, b"{", layouts.preference("c", domain="a|b_c")], HELD_OUT)
        markdown, plain = tmp_path / "report.md", tmp_path / "report.json"
        assert lint(source, "--markdown", markdown, "--json", plain) == 1
        page, report = markdown.read_text(), json.loads(plain.read_text())
        assert "| error | 1 | 16.7% | row is not JSON | preference/train.jsonl.gz:3 |" in page
        assert "| language | a\\|b\\_c | code | all |\n| --- | --- | --- | --- |\n| python | 1 | 4 | 5 |" in page
        assert report["rows"] == {"train": 4, "validation": 2}
        worst = report["findings"][0]
        assert (worst["name"], worst["severity"], worst["count"]) == ("row is not JSON", "error", 1)
        assert worst["places"] == ["preference/train.jsonl.gz:3"]
        assert {"title", "columns", "rows"} == report["tables"][0].keys()

    def test_a_page_that_cannot_be_written(self, source: Path, tmp_path: Path, capsys):
        assert lint(source, "--markdown", tmp_path / "none" / "report.md") == 78
        assert "cannot be written: No such file" in capsys.readouterr().err
        assert list(tmp_path.glob("*.partial")) == []


class TestRealData:
    def test_human_preference(self, human_preference: Path, tmp_path: Path):
        """As in docs/data.md."""
        assert lint(human_preference, "--json", tmp_path / "report.json") == 1
        found = {one["name"]: one["count"] for one in json.loads((tmp_path / "report.json").read_text())["findings"]}
        assert found == {
            "response1 is the preferred response but is empty": 1,
            "duplicates": 97,
            "empty": 53,
            "ties": 85,
            "position": 437,
            "length": 553,
        }
