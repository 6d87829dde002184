"""What lint finds, on rows made to have it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import layouts
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from align.config import DataConfig
from align.data import dataset, toy
from align.data.chat import Renderer
from align.data.lint import LintReport, lint, sign_test
from align.errors import DataError

HELD_OUT = layouts.preference("held out", 0, **{"domain": "stem", "language": "english"})


def run(
    folder: Path, train: list[Any], validation: list[Any] | None = None, renderer: Any = None, **options: Any
) -> LintReport:
    layouts.write(folder, "helpsteer3", train, [HELD_OUT] if validation is None else validation)
    return lint(DataConfig(path=str(folder), **options), "preferences", renderer)


def found(report: LintReport) -> dict[str, int]:
    """Counts by name, the two biases left out."""
    return {one.name: one.count for one in report.findings if one.name not in ("position", "length")}


def one(report: LintReport, name: str) -> Any:
    return next(finding for finding in report.findings if finding.name == name)


def table(report: LintReport, title: str) -> list[tuple[Any, ...]]:
    return next(one.rows for one in report.tables if one.title == title)


class TestSignTest:
    @pytest.mark.parametrize("trials", [0, 1, 2, 7, 30])
    def test_against_all_sequences_of_tosses(self, trials: int):
        for successes in range(trials + 1):
            far = abs(successes - trials / 2)
            as_far = sum(math.comb(trials, k) for k in range(trials + 1) if abs(k - trials / 2) >= far)
            assert sign_test(successes, trials) == pytest.approx(as_far / 2**trials, rel=1e-12)

    def test_many(self):
        # The normal approximation, which is good to a few per mille here.
        z = (50_500 - 0.5 - 50_000) / math.sqrt(100_000 / 4)
        assert sign_test(50_500, 100_000) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=5e-3)
        assert 0 < sign_test(20_000, 38_000) < 1e-20


class TestRows:
    def test_a_sound_source(self, tmp_path: Path):
        report = run(tmp_path, [layouts.preference("a"), layouts.preference("b", 2)])
        assert found(report) == {"ties": 1}
        assert report.worst() == "info"
        assert report.rows == {"train": 2, "validation": 1}

    def test_nothing_stops_at_the_first_bad_row(self, tmp_path: Path):
        bad = [b"{", layouts.preference(mark=9), b"[", layouts.preference("x", response1="")]
        report = run(tmp_path, [layouts.preference("a"), *bad], [b"}"])
        assert found(report) == {
            "row is not JSON": 3,
            "overall_preference is outside -3 to 3": 1,
            "response1 is the preferred response but is empty": 1,
            "empty_validation": 1,
        }
        assert report.worst() == "error"
        assert report.rows == {"train": 5, "validation": 1}
        not_json = one(report, "row is not JSON")
        places = [*(f"preference/train.jsonl.gz:{n}" for n in (2, 4)), "preference/validation.jsonl.gz:1"]
        assert (not_json.places, not_json.share) == (places, 0.5)

    def test_five_places_are_named(self, tmp_path: Path):
        report = run(tmp_path, [layouts.preference(str(n), 0) for n in range(9)])
        ties = one(report, "ties")
        assert (ties.count, ties.share) == (10, 1.0)
        assert ties.places == [f"preference/train.jsonl.gz:{n}" for n in range(1, 6)]

    def test_repetitions(self, tmp_path: Path):
        train = [
            layouts.preference("a"),
            layouts.preference("a"),
            layouts.preference("a", 1),  # the same responses, the other way round
            layouts.preference("v"),  # in validation too
            layouts.preference("v", response2="cat sun"),  # only its prompt is
        ]
        report = run(tmp_path, train, [layouts.preference("v"), layouts.preference("v")])
        assert found(report) == {"duplicates": 3, "contradictory": 1, "overlap": 1, "shared_prompts": 2}
        assert one(report, "duplicates").places[-1] == "preference/validation.jsonl.gz:2"

    def test_responses(self, tmp_path: Path):
        train = [
            layouts.preference("a", response2=" "),
            layouts.preference("b", response2="cat dog"),
            layouts.preference("c", 0, response2="cat dog"),  # a tie says so itself
        ]
        assert found(run(tmp_path, train)) == {"empty": 1, "identical": 1, "ties": 2}

    def test_what_a_format_drops(self, tmp_path: Path):
        rows = [layouts.rated("a", "x", 1), layouts.rated("a", "y", 2), layouts.rated("b")]
        layouts.write(tmp_path, "helpsteer", rows, [layouts.rated("v", "x", 1), layouts.rated("v", "y", 2)])
        report = lint(DataConfig(path=str(tmp_path), format="helpsteer"), "preferences")
        assert (found(report), report.rows) == ({"single": 1}, {"train": 2, "validation": 1})
        far = layouts.disagreement("a", helpfulness=[0, 3])
        layouts.put(tmp_path / "disagreements/disagreements.jsonl", [far, layouts.disagreement("held out 4")])
        data = DataConfig(path=str(tmp_path), format="helpsteer2_disagreements")
        assert found(lint(data, "ratings"))["spread"] == 1
        assert "spread" not in found(lint(replace(data, max_spread=3), "ratings"))

    def test_tables(self, tmp_path: Path):
        turns = [*layouts.turns("a"), {"role": "assistant", "content": "b"}, *layouts.turns("c")]
        train = [
            layouts.preference("a", 3),
            layouts.preference("b", -1, language="java"),
            layouts.preference(context=turns),
        ]
        report = run(tmp_path, train)
        assert table(report, "preference") == [
            *((-3, 0, "0.0%"), (-2, 1, "25.0%"), (-1, 1, "25.0%"), (0, 1, "25.0%")),
            *((1, 0, "0.0%"), (2, 0, "0.0%"), (3, 1, "25.0%")),
        ]
        assert table(report, "language and domain") == [("python", 2, 0, 2), ("java", 1, 0, 1), ("english", 0, 1, 1)]
        assert table(report, "turns of the user") == [(1, 3, "75.0%"), (2, 1, "25.0%")]


class TestBiases:
    def rows(self, longer: int, shorter: int, second: int) -> list[Any]:
        """Pairs whose preferred response is three characters longer or one shorter; the first ``second`` prefer the
        second response."""
        rows = []
        for n in range(longer + shorter):
            chosen, rejected = ("abcd", "a") if n < longer else ("a", "ab")
            pair = (rejected, chosen) if n < second else (chosen, rejected)
            rows.append(layouts.preference(str(n), 1 if n < second else -1, response1=pair[0], response2=pair[1]))
        return rows

    def test_balanced(self, tmp_path: Path):
        report = run(tmp_path, self.rows(10, 10, second=10))
        assert (one(report, "position").severity, one(report, "length").severity) == ("info", "info")
        assert one(report, "length").what.endswith("mean difference +1.0 characters (10 of 20, p = 1)")

    def test_biased(self, tmp_path: Path):
        report = run(tmp_path, self.rows(12, 1, second=0))
        position, length = one(report, "position"), one(report, "length")
        assert (position.count, position.share, position.severity) == (0, 0.0, "warning")
        assert (length.count, length.share, length.severity) == (12, 12 / 13, "warning")
        assert "p = 0.00024" in position.what  # 2 / 2**13
        assert "p = 0.0034" in length.what  # 2 * 14 / 2**13

    def test_what_occurs_twice_counts_once(self, tmp_path: Path):
        report = run(tmp_path, self.rows(1, 0, second=0) * 20)
        assert (one(report, "position").count, one(report, "length").count) == (0, 1)
        assert "(0 of 1, p = 1)" in one(report, "position").what

    def test_no_position_where_the_format_has_none(self, tmp_path: Path):
        layouts.write(tmp_path, "openai", [layouts.chosen(str(n)) for n in range(20)], [layouts.chosen("v")])
        report = lint(DataConfig(path=str(tmp_path), format="openai"), "preferences")
        assert "position" not in [finding.name for finding in report.findings]


class TestRatings:
    def run(self, folder: Path, rows: list[Any]) -> LintReport:
        layouts.write(folder, "openai", rows, [layouts.messages("v")])
        return lint(DataConfig(path=str(folder), format="openai"), "ratings")

    def test_attributes(self, tmp_path: Path):
        rows = [layouts.messages(str(n), "x" * (n + 1), helpfulness=n, own=2) for n in range(4)]
        report = self.run(tmp_path, [*rows, layouts.messages("d", "", own=2, b=1), layouts.messages("e", b=1)])
        assert table(report, "ratings") == [
            ("helpfulness", 4, 1.5, 1.118, 0.0, 3.0, 1.0),
            ("own", 5, 2.0, 0.0, 2.0, 2.0, None),
            ("b", 2, 1.0, 0.0, 1.0, 1.0, None),
        ]
        assert found(report) == {"constant": 2, "unrated": 1, "empty": 1}
        assert one(report, "constant").what.endswith(": own, b")

    def test_length_of_what_is_helpful(self, tmp_path: Path):
        lengths, marks = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [2, 0, 1, 4, 0, 1, 3, 2, 4, 1, 3, 4]
        rows = [layouts.messages(str(n), "x" * n, helpfulness=m) for n, m in zip(lengths, marks, strict=True)]
        # r = 0.4772, atanh(r) * sqrt(12 - 3) = 1.558, two-sided p of a normal = 0.1192
        length = one(self.run(tmp_path, rows), "length")
        assert length.what == "helpfulness and length in characters correlate by +0.477 (n = 12, p = 0.12)"
        assert length.severity == "info"


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    made = toy.tokenizer()
    for name, value in options.items():
        setattr(made, name, value)
    return made


class TestTokens:
    """In the toy's tokens a prompt has three more than words, and a response one more."""

    ROWS = (
        layouts.preference("cat"),
        layouts.preference("cat dog sun cat dog sun"),
        layouts.preference("hen", response1="cat dog cat dog"),
        layouts.preference("owl", response1="cat  dog", response2="cat dog"),
        layouts.preference("sun", response1="cat dog hen", response2="cat dog hen owl"),
        layouts.preference("pig", response1="cat dog hen", response2="cat dog hen"),
    )

    def run(self, folder: Path, renderer: Renderer) -> LintReport:
        limits = {"max_prompt_tokens": 6, "max_response_tokens": 3}
        return run(folder, list(self.ROWS), renderer=renderer, **limits)

    def test_rows(self, tmp_path: Path):
        report = self.run(tmp_path, Renderer(tokenizer()))
        assert found(report) == {
            "long_prompt": 1,
            "long_response": 3,
            "identical": 1,
            "identical_tokens": 1,
            "identical_truncated": 1,
            "ties": 1,
        }
        assert one(report, "identical_truncated").places == ["preference/train.jsonl.gz:5"]
        assert table(report, "tokens") == [("prompt", 4, 5, 9), ("response", 3, 5, 5)]

    def test_agrees_with_what_training_drops(self, tmp_path: Path):
        renderer = Renderer(tokenizer())
        report = self.run(tmp_path, renderer)
        rows = dataset.load_dataset(DataConfig(path=str(tmp_path))).train
        _, counts = dataset.tokenize_pairs(rows, renderer, 6, 3)
        # A pair that is too long is not compared there.
        assert counts == {"rows": 6, "ties": 0, "too_long": 4, "identical": 1, "kept": 1}
        assert found(report)["long_prompt"] + found(report)["long_response"] == counts["too_long"]

    @pytest.mark.parametrize(
        ("template", "options", "name"),
        [
            (toy.CHAT_TEMPLATE, {"pad_token": "</s>"}, "pad_is_eos"),
            (
                toy.CHAT_TEMPLATE.replace("{% if message.role == 'assistant' %} {{ eos_token }}{% endif %}", ""),
                {},
                "no_end_of_turn",
            ),
        ],
    )
    def test_of_the_tokenizer(self, tmp_path: Path, template: str, options: dict[str, Any], name: str):
        made = tokenizer(**options, chat_template=template)
        assert made.eos_token == "</s>"
        report = self.run(tmp_path, Renderer(made))
        assert (one(report, name).severity, one(report, name).count) == ("warning", 1)
        assert name not in found(self.run(tmp_path, Renderer(tokenizer())))

    def test_a_tokenizer_that_adds_what_the_template_writes(self, tmp_path: Path, adds_bos: PreTrainedTokenizerFast):
        report = self.run(tmp_path, Renderer(adds_bos))
        assert one(report, "added_bos").severity == "warning"
        adds_bos.chat_template = toy.CHAT_TEMPLATE.replace("{{ bos_token }}", "")
        assert "added_bos" not in found(self.run(tmp_path, Renderer(adds_bos)))

    @pytest.fixture
    def adds_bos(self) -> PreTrainedTokenizerFast:
        made = toy.tokenizer()
        made.backend_tokenizer.post_processor = TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", made.bos_token_id)]
        )
        return made

    def test_a_prompt_that_begins_twice(self, tmp_path: Path):
        made = tokenizer(chat_template="{{ bos_token }} " + toy.CHAT_TEMPLATE)
        report = run(tmp_path, [layouts.preference("cat"), layouts.preference("dog")], renderer=Renderer(made))
        assert found(report)["double_bos"] == 3
        assert report.worst() == "error"

    def test_a_row_that_the_template_refuses(self, tmp_path: Path):
        refuse = "{% if messages[0].content == 'dog' %}{{ raise_exception('no dogs') }}{% endif %}"
        made = tokenizer(chat_template=refuse + toy.CHAT_TEMPLATE)
        report = run(tmp_path, [layouts.preference("cat"), layouts.preference("dog")], renderer=Renderer(made))
        refused = one(report, "not_rendered")
        assert (refused.count, refused.places) == (1, ["preference/train.jsonl.gz:2"])
        assert "no dogs" in refused.what


def test_a_damaged_file_is_no_finding(tmp_path: Path):
    layouts.write(tmp_path, "helpsteer3", [layouts.preference()], [HELD_OUT])
    (tmp_path / "preference" / "train.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(DataError, match="the file is damaged"):
        lint(DataConfig(path=str(tmp_path)), "preferences")
