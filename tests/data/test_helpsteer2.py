"""Reading HelpSteer2 (two rated rows to a pair) and HelpSteer2-Preference (one file for both splits)."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from align.config import DataConfig, RecipeConfig
from align.config.load import build_config
from align.data import dataset, toy
from align.data.chat import Message, Renderer
from align.data.dataset import Preference, SplitCounts
from align.errors import DataError

DIALOGUE = "a\n<extra_id_1>Assistant\nb\n\nb\n<extra_id_1>User\nc"
TURNS = (Message("user", "a"), Message("assistant", "b\n\nb"), Message("user", "c"))


def rated(prompt: str = "cat", response: str = "cat dog", helpfulness: Any = 3, **changes: Any) -> dict[str, Any]:
    ratings = {"helpfulness": helpfulness, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}
    return {"prompt": prompt, "response": response, **ratings} | changes


def pair(prompt: str = "cat", helpfulness1: int = 3, helpfulness2: int = 1) -> list[dict[str, Any]]:
    return [rated(prompt, "cat dog", helpfulness1), rated(prompt, "cat pig", helpfulness2)]


def opinions(*strengths: Any) -> list[dict[str, Any]]:
    return [{"statement": "@Response 1 is better.", "elaboration": "", "strength": one} for one in strengths]


def compared(prompt: str = "cat", split: str = "train", strength: Any = -2, **changes: Any) -> dict[str, Any]:
    return {
        "split": split,
        "prompt": prompt,
        "response_1": "cat dog",
        "response_2": "cat pig",
        "preference_strength": strength,
        "preference_statement": "@Response 1 is better.",
        "preference_elaboration": "",
        "three_most_similar_preferences": opinions(-2, -2, -1),
        "all_preferences_unprocessed": [{"strength": one, "justification": ""} for one in (-2, -2, -1, -100)],
    } | changes


HELD_OUT = compared("held out", "val")


def encode(rows: list[Any], suffix: str) -> bytes:
    content = b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in rows)
    return gzip.compress(content) if suffix.endswith("gz") else content


def write(folder: Path, train: list[Any], validation: list[Any] | None = None, suffix: str = "jsonl.gz") -> Path:
    """A folder of HelpSteer2; rows are objects, or bytes taken as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("validation", pair("held out") if validation is None else validation)):
        (folder / f"{split}.{suffix}").write_bytes(encode(rows, suffix))
    return folder


def write_compared(folder: Path, rows: list[Any], suffix: str = "jsonl.gz") -> Path:
    """A folder of HelpSteer2-Preference."""
    (folder / "preference").mkdir(parents=True, exist_ok=True)
    (folder / "preference" / f"preference.{suffix}").write_bytes(encode(rows, suffix))
    return folder


def load(folder: Path, **options: Any) -> dataset.PreferenceData:
    return dataset.load_dataset(DataConfig(path=str(folder), format="helpsteer2", **options))


def load_compared(folder: Path, **options: Any) -> dataset.PreferenceData:
    return dataset.load_dataset(DataConfig(path=str(folder), format="helpsteer2_preference", **options))


def prompts(rows: list[Preference]) -> list[str]:
    return [row.context[0].content for row in rows]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(toy.tokenizer())


class TestRated:
    @pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl"])
    def test_two_rows_become_one(self, tmp_path: Path, suffix: str):
        lines = [
            json.dumps(rated(DIALOGUE, "x", 4)).encode(),
            b"",
            json.dumps(rated(DIALOGUE, "y", 2)).encode() + b"\r",
        ]
        read = load(write(tmp_path, lines, suffix=suffix))
        assert read.train == [Preference(TURNS, "x", "y", -2, domain="", language="english", spread=0)]
        assert read.counts["train"] == SplitCounts(1, {}, 0, 0, 0, 1, spread=0)

    @pytest.mark.parametrize(
        ("first", "second", "preference", "chosen"),
        [
            (3, 2, -1, "cat dog"),
            (4, 1, -3, "cat dog"),
            (4, 0, -3, "cat dog"),  # a difference of 4 is cut to 3
            (0, 4, 3, "cat pig"),
            (1, 3, 2, "cat pig"),
        ],
    )
    def test_the_more_helpful_one_is_chosen(self, tmp_path: Path, first, second, preference, chosen):
        [read] = load(write(tmp_path, pair("cat", first, second))).train
        assert (read.preference, read.chosen, read.strength) == (preference, chosen, abs(preference))

    def test_other_attributes_do_not_decide(self, tmp_path: Path):
        rows = [rated(correctness=0, coherence=0, helpfulness=3), rated(response="cat pig", helpfulness=2)]
        [read] = load(write(tmp_path, rows)).train
        assert read.preference == -1

    def test_ties_duplicates_and_overlap_are_counted(self, tmp_path: Path):
        train = [*pair("a", 2, 2), *pair("b"), *pair("b", 0, 4), *pair("v"), *pair("v")[::-1]]
        read = load(write(tmp_path, train, [*pair("v"), *pair("v")]))
        assert read.counts["train"] == SplitCounts(
            read=5, bad={}, other_domain=0, duplicates=1, in_validation=1, kept=3
        )
        assert read.counts["validation"] == SplitCounts(2, {}, 0, 1, 0, 1)
        assert prompts(read.train) == ["a", "b", "v"]
        assert [row.preference for row in read.train] == [0, -2, 2]

    def test_max_rows_counts_lines(self, tmp_path: Path):
        rows = [*pair("a"), *pair("b"), b"rubbish"]
        read = load(write(tmp_path, rows, [*pair("c"), *pair("d"), *pair("e")]), max_rows=4)
        assert (prompts(read.train), prompts(read.validation)) == (["a", "b"], ["c", "d"])

    def test_rows_are_read_as_they_are_needed(self, tmp_path: Path):
        folder = write(tmp_path, [*pair("a"), b"rubbish"])
        sources, parse = dataset.FORMATS["helpsteer2"]["preferences"]
        [(where, item)] = islice(sources(DataConfig(path=str(folder), format="helpsteer2"))["train"], 1)
        assert where == f"{folder}/train.jsonl.gz:1"
        assert parse(item)[0].context == (Message("user", "a"),)


BAD_RATED = [
    ([b'{"prompt": "c', rated()], 1, "row is not JSON", "prompt"),
    ([rated(), b"[1]"], 2, "row is not a JSON object", "[1]"),
    ([{"prompt": "cat"}, rated()], 1, "response is missing", ""),
    ([rated(), {k: v for k, v in rated().items() if k != "verbosity"}], 2, "verbosity is missing", ""),
    ([rated(helpfulness=5), rated()], 1, "helpfulness is outside 0 to 4", "5"),
    ([rated(), rated(coherence=-1)], 2, "coherence is outside 0 to 4", "-1"),
    ([rated(), rated(complexity=2.0)], 2, "complexity is not an integer", "2.0"),
    ([rated(helpfulness=[3, 4]), rated()], 1, "helpfulness is not an integer", "[3, 4]"),
    ([rated(correctness=True), rated()], 1, "correctness is not an integer", "True"),
    ([rated(response=None), rated()], 1, "response is NoneType, not text", ""),
    ([rated(), rated(prompt=7)], 2, "prompt is int, not text", "7"),
    ([rated("dog"), rated("owl")], 2, "prompt differs from the previous row", "'owl'"),
    ([rated(response=" "), rated(helpfulness=1)], 1, "response is the preferred response but is empty", "' '"),
    ([rated(), rated(response="", helpfulness=4)], 2, "response is the preferred response but is empty", "''"),
    ([rated("\n"), rated("\n")], 1, "prompt ends with an empty user turn", "'\\n'"),
]

BAD_PROMPTS = [
    (
        "a\n<extra_id_1>User\nb",
        "prompt roles do not alternate between user and assistant, or the last is not user",
        "['user', 'user']",
    ),
    (
        "a\n<extra_id_1>Assistant\nb",
        "prompt roles do not alternate between user and assistant, or the last is not user",
        "['user', 'assistant']",
    ),
    (
        "a\n<extra_id_1>User\nb\n<extra_id_1>Assistant\nc",
        "prompt roles do not alternate between user and assistant, or the last is not user",
        "['user', 'user', 'assistant']",
    ),
    (
        "a\n<extra_id_1>Assistant\n<extra_id_1>User\nb",
        "prompt has a turn marker that is not on a separate line",
        "User",
    ),
    ("a <extra_id_1>Assistant\nb", "prompt has a turn marker that is not on a separate line", "<extra_id_1>Assistant"),
    ("<extra_id_1>User\na", "prompt has a turn marker that is not on a separate line", "<extra_id_1>User"),
    ("a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\n ", "prompt ends with an empty user turn", "' '"),
]


class TestBadRated:
    @pytest.mark.parametrize(("rows", "line", "reason", "shown"), BAD_RATED)
    def test_stops_naming_file_line_field_and_value(self, tmp_path, rows, line, reason, shown):
        folder = write(tmp_path, [*pair("a"), b"", *rows])
        with pytest.raises(DataError) as error:
            load(folder)
        assert error.value.where == f"{folder}/train.jsonl.gz:{3 + line}"
        assert error.value.message.startswith(reason)
        assert shown in error.value.message
        assert error.value.remedy is not None and "data.bad_rows=skip" in error.value.remedy

    def test_a_last_row_alone(self, tmp_path: Path):
        folder = write(tmp_path, [*pair("a"), rated("b")], suffix="jsonl")
        with pytest.raises(DataError, match=r"train\.jsonl:3: row is the last row and has no second response"):
            load(folder)

    def test_skip_counts_by_reason_in_pairs(self, tmp_path: Path):
        bad = [one for rows, _, _, _ in BAD_RATED for one in rows]
        counts = load(write(tmp_path, [*pair("a"), *bad, *pair("b"), rated("c")]), bad_rows="skip").counts["train"]
        reasons = [*(reason for _, _, reason, _ in BAD_RATED), "row is the last row and has no second response"]
        assert counts.bad == {reason: reasons.count(reason) for reason in reasons}
        assert (counts.read, counts.kept) == (len(BAD_RATED) + 3, 2)

    @pytest.mark.parametrize(("prompt", "reason", "shown"), BAD_PROMPTS)
    def test_marks_out_of_order(self, tmp_path: Path, prompt: str, reason: str, shown: str):
        with pytest.raises(DataError) as error:
            load(write(tmp_path, pair(prompt)))
        assert error.value.where == f"{tmp_path}/train.jsonl.gz:1"
        assert error.value.message.startswith(reason) and shown in error.value.message

    def test_a_mark_that_is_only_mentioned_is_text(self, tmp_path: Path):
        [read] = load(write(tmp_path, pair("what is <extra_id_1> in T5?"))).train
        assert read.context == (Message("user", "what is <extra_id_1> in T5?"),)


class TestCompared:
    @pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl"])
    def test_fields_and_splits(self, tmp_path: Path, suffix: str):
        rows = [
            compared(DIALOGUE, strength=3),
            compared("v", "val"),
            compared("w", "validation", strength=0),
            compared("a", strength=-1),
        ]
        read = load_compared(write_compared(tmp_path, rows, suffix))
        assert read.train == [
            Preference(TURNS, "cat dog", "cat pig", 3, "", "english", spread=1),
            Preference((Message("user", "a"),), "cat dog", "cat pig", -1, "", "english", spread=1),
        ]
        assert [(row.chosen, row.strength) for row in read.train] == [("cat pig", 3), ("cat dog", 1)]
        assert prompts(read.validation) == ["v", "w"]

    def test_spread_of_the_annotators(self, tmp_path: Path):
        spreads = {"a": (-3, -1), "b": (-3, -1, 0), "c": (2,), "d": (1, 2, -1), "e": (-3, 3, 1)}
        rows = [compared(name, three_most_similar_preferences=opinions(*one)) for name, one in spreads.items()]
        folder = write_compared(tmp_path, [*rows, HELD_OUT])
        # Highest less lowest: 2, 3, 0, 3, 6.
        assert [row.spread for row in load_compared(folder, max_spread=None).train] == [2, 3, 0, 3, 6]
        assert prompts(load_compared(folder).train) == ["a", "c"]
        assert load_compared(folder).counts["train"] == SplitCounts(5, {}, 0, 0, 0, kept=2, spread=3)
        assert prompts(load_compared(folder, max_spread=3).train) == ["a", "b", "c", "d"]

    def test_a_row_dropped_for_its_spread_is_no_overlap(self, tmp_path: Path):
        rows = [compared("v"), compared("v", "val", three_most_similar_preferences=opinions(-3, 3)), HELD_OUT]
        read = load_compared(write_compared(tmp_path, rows))
        assert (prompts(read.train), prompts(read.validation)) == (["v"], ["held out"])

    def test_duplicates_overlap_and_ties_are_counted(self, tmp_path: Path):
        ties = [compared("a", strength=0), compared("a", strength=1)]
        rows = [*ties, compared("v"), compared("v", "val"), compared("b")]
        read = load_compared(write_compared(tmp_path, rows))
        assert read.counts == {
            "train": SplitCounts(read=4, bad={}, other_domain=0, duplicates=1, in_validation=1, kept=2),
            "validation": SplitCounts(1, {}, 0, 0, 0, 1),
        }

    def test_max_rows_counts_rows_of_each_split(self, tmp_path: Path):
        rows = [compared("a"), compared("b"), compared("v", "val"), compared("c"), HELD_OUT]
        read = load_compared(write_compared(tmp_path, rows), max_rows=2)
        assert (prompts(read.train), prompts(read.validation)) == (["a", "b"], ["v", "held out"])

    @pytest.mark.parametrize(
        ("bad", "reason"),
        [
            (b'{"split": "tr', "row is not JSON"),
            ({k: v for k, v in compared().items() if k != "split"}, "split is missing"),
            (compared() | {"split": None}, "split is NoneType, not text"),
            ({k: v for k, v in compared().items() if k != "response_2"}, "response_2 is missing"),
            (compared(strength=-100), "preference_strength is outside -3 to 3"),
            (compared(strength="1"), "preference_strength is not an integer"),
            (compared(response_1=""), "response_1 is the preferred response but is empty"),
            (compared(three_most_similar_preferences="[]"), "three_most_similar_preferences is not a list of opinions"),
            (compared(three_most_similar_preferences=[]), "three_most_similar_preferences is not a list of opinions"),
            (
                compared(three_most_similar_preferences=[{"statement": ""}]),
                "three_most_similar_preferences has an opinion without strength",
            ),
            (
                compared(three_most_similar_preferences=opinions(None)),
                "three_most_similar_preferences is not an integer",
            ),
            (
                compared("a\n<extra_id_1>User\nb"),
                "prompt roles do not alternate between user and assistant, or the last is not user",
            ),
        ],
    )
    def test_bad_rows(self, tmp_path: Path, bad: Any, reason: str):
        folder = write_compared(tmp_path, [compared("a"), HELD_OUT, bad])
        with pytest.raises(DataError) as error:
            load_compared(folder)
        assert error.value.where == f"{folder}/preference/preference.jsonl.gz:3"
        assert error.value.message.startswith(reason)
        counts = load_compared(folder, bad_rows="skip").counts
        assert counts["train"].bad | counts["validation"].bad == {reason: 1}
        assert sum(split.read for split in counts.values()) == 3  # each line in one split


class TestSources:
    def test_no_file_names_the_format(self, tmp_path: Path):
        write(tmp_path, pair())
        with pytest.raises(DataError, match=r"preference/preference\.jsonl\.gz and .*\n.*data\.format=helpsteer2_pref"):
            load_compared(tmp_path)
        (tmp_path / "train.jsonl.gz").unlink()
        with pytest.raises(DataError, match=r"no file for split train. .*\n.*format=helpsteer2, .* train\.jsonl\.gz"):
            load(tmp_path)

    def test_truncated_gzip_stops(self, tmp_path: Path):
        folder = write(tmp_path, [row for n in range(2000) for row in pair(str(n))])
        file = folder / "train.jsonl.gz"
        file.write_bytes(file.read_bytes()[:-2000])
        with pytest.raises(DataError, match=r"train\.jsonl\.gz:\d+: the file is damaged after this line"):
            load(folder, bad_rows="skip")

    def test_hub_of_ratings(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        # A folder of the same layout stands in for the hub: `load_dataset` treats both alike.
        write(tmp_path, [*pair("a"), *pair("a"), *pair("b")])
        write_compared(tmp_path, [compared(), HELD_OUT])
        asked = []
        load_dataset = datasets.load_dataset

        def stand_in(path: str, revision: str | None) -> Any:
            asked.append((path, revision))
            return load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))

        monkeypatch.setattr(datasets, "load_dataset", stand_in)
        read = dataset.load_dataset(DataConfig(path="nvidia/HelpSteer2", revision="v1", format="helpsteer2"))
        assert asked == [("nvidia/HelpSteer2", "v1")]
        assert (read.counts["train"].kept, read.counts["train"].duplicates) == (2, 1)
        assert read.fingerprint == load(tmp_path).fingerprint

    def test_hub_of_preferences(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        far = compared("far", three_most_similar_preferences=opinions(-3, 1))
        write_compared(tmp_path, [compared("a"), far, compared(DIALOGUE), HELD_OUT])
        write(tmp_path, pair())
        asked = []
        load_dataset = datasets.load_dataset

        def stand_in(path: str, data_dir: str, revision: str | None) -> Any:
            asked.append((path, data_dir, revision))
            return load_dataset(str(tmp_path), data_dir=data_dir, cache_dir=str(tmp_path / "cache"))

        monkeypatch.setattr(datasets, "load_dataset", stand_in)
        read = dataset.load_dataset(DataConfig(path="nvidia/HelpSteer2", format="helpsteer2_preference"))
        assert asked == [("nvidia/HelpSteer2", "preference", None)]
        assert read.counts["train"] == SplitCounts(3, {}, 0, 0, 0, kept=2, spread=1)
        assert read.fingerprint == load_compared(tmp_path).fingerprint

    def test_places_on_the_hub(self, monkeypatch: pytest.MonkeyPatch):
        tables = {"train": pair("a"), "validation": [*pair("b"), rated("c")]}
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: tables)
        with pytest.raises(DataError, match="^nvidia/HelpSteer2/validation:3: row is the last row"):
            dataset.load_dataset(DataConfig(path="nvidia/HelpSteer2", format="helpsteer2"))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": [compared(), compared("c", "val", 9)]})
        with pytest.raises(DataError, match="^nvidia/HelpSteer2/preference/preference:2: preference_strength is outs"):
            dataset.load_dataset(DataConfig(path="nvidia/HelpSteer2", format="helpsteer2_preference"))


class TestOptions:
    @pytest.mark.parametrize("form", ["helpsteer2", "helpsteer2_preference"])
    def test_there_is_no_domain_to_choose(self, form: Any):
        with pytest.raises(ValueError, match=f"domains needs format helpsteer3, .*: rows of {form} have no domain"):
            DataConfig(path="x", format=form, domains=["code"])

    def test_half_a_pair_is_refused(self):
        with pytest.raises(ValueError, match="max_rows is even with format helpsteer2, .*: 3"):
            DataConfig(path="x", format="helpsteer2", max_rows=3)

    def test_negative_spread(self):
        with pytest.raises(ValueError, match="max_spread must not be negative: -1"):
            DataConfig(path="x", max_spread=-1)

    def test_a_recipe_may_give_them(self, tmp_path: Path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("data: {path: x, format: helpsteer2_preference, max_spread: null}\n")
        found = build_config(RecipeConfig, recipe, ["algorithm=sft", "run.dir=x", "run.steps=1"]).config.data
        assert (found.format, found.max_spread) == ("helpsteer2_preference", None)


class TestTokens:
    def test_pairs_of_rated_rows(self, tmp_path: Path, renderer: Renderer):
        dialogue = "cat\n<extra_id_1>Assistant\ndog\n<extra_id_1>User\nsun"
        source = load(write(tmp_path, [*pair("cat", 1, 4), *pair("hen", 2, 2), *pair(dialogue, 2, 1)]))
        found, counts = dataset.tokenize_pairs(source.train, renderer, max_prompt_tokens=20, max_response_tokens=5)
        assert counts == {"rows": 3, "ties": 1, "too_long": 0, "identical": 0, "kept": 2}
        texts = [renderer.text(ids) for ids in found.sequences.responses.lists()]
        assert texts == ["cat pig", "cat dog", "cat dog", "cat pig"]
        assert found.strength_P.tolist() == [3.0, 1.0]
        asked = [Message("user", "cat"), Message("assistant", "dog"), Message("user", "sun")]
        assert found.sequences.prompts.lists()[1] == renderer.prompt_ids(asked)
        assert found.sequences.prompt_B.tolist() == [0, 0, 1, 1]

    def test_pairs_of_compared_rows(self, tmp_path: Path, renderer: Renderer):
        rows = [compared("cat", strength=2), compared("hen", strength=0), compared("sun", strength=-3), HELD_OUT]
        source = load_compared(write_compared(tmp_path, rows))
        found, counts = dataset.tokenize_pairs(source.train, renderer, max_prompt_tokens=20, max_response_tokens=5)
        assert (counts["ties"], counts["kept"]) == (1, 2)
        assert [renderer.text(ids) for ids in found.sequences.responses.lists()] == [
            *("cat pig", "cat dog"),
            *("cat dog", "cat pig"),
        ]
        assert found.strength_P.tolist() == [2.0, 3.0]
