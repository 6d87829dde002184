"""Reading HelpSteer3-Preference: rows, counts, what is refused, and the way to token ids."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from align.config import DataConfig
from align.data import dataset, toy
from align.data.chat import Message, Renderer
from align.data.dataset import Preference
from align.errors import DataError

SHARED = Path(os.environ.get("ALIGN_SHARED_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


def row(prompt: str = "repeat the words : cat dog", **changes: Any) -> dict[str, Any]:
    return {
        "domain": "general",
        "language": "english",
        "context": [{"role": "user", "content": prompt}],
        "response1": "cat dog",
        "response2": "cat pig",
        "overall_preference": -2,
        "individual_preference": [{"score": -2, "reasoning": ""}],
    } | changes


def encode(rows: list[Any]) -> bytes:
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in rows)


def write(folder: Path, train: list[Any], validation: list[Any] | None = None, suffix: str = "jsonl.gz") -> Path:
    """A data folder; rows are objects, or bytes taken as they are."""
    (folder / "preference").mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("validation", [row("held out")] if validation is None else validation)):
        content = encode(rows)
        file = folder / "preference" / f"{split}.{suffix}"
        file.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    return folder


def load(folder: Path, **options: Any) -> dataset.PreferenceData:
    return dataset.load_dataset(DataConfig(path=str(folder), **options))


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(toy.tokenizer())


class TestReading:
    def test_fields(self, tmp_path: Path):
        turns = [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
        read = load(write(tmp_path, [row(context=turns, overall_preference=3, domain="code", language="python")]))
        assert read.train == [
            Preference(tuple(Message(**turn) for turn in turns), "cat dog", "cat pig", 3, "code", "python")
        ]

    @pytest.mark.parametrize(
        ("preference", "chosen", "rejected", "strength"),
        [(-3, "cat dog", "cat pig", 3), (-1, "cat dog", "cat pig", 1), (2, "cat pig", "cat dog", 2)],
    )
    def test_negative_means_response1_is_better(self, tmp_path, preference, chosen, rejected, strength):
        [read] = load(write(tmp_path, [row(overall_preference=preference)])).train
        assert (read.chosen, read.rejected, read.strength) == (chosen, rejected, strength)

    def test_context_as_text_is_one_user_turn(self, tmp_path: Path):
        [read] = load(write(tmp_path, [row(context="hello\x00\u2028there")])).train
        assert read.context == (Message("user", "hello\x00\u2028there"),)

    @pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl"])
    def test_suffixes_line_ends_and_blank_lines(self, tmp_path: Path, suffix: str):
        lines = [json.dumps(row("a")).encode() + b"\r", b"", json.dumps(row("b")).encode()]
        read = load(write(tmp_path, lines, suffix=suffix))
        assert [one.context[0].content for one in read.train] == ["a", "b"]
        assert read.counts["train"].read == 2

    def test_duplicates_overlap_domains_and_ties_are_counted(self, tmp_path: Path):
        train = [
            row("a"),
            row("a", overall_preference=1),  # a duplicate whatever its label
            row("a", response1="dog"),  # same prompt, other response
            row("b", overall_preference=0),  # a tie is kept
            row("c", domain="code"),
            row("v"),  # in validation too
            row("v", response2="owl"),  # only its prompt is
        ]
        read = load(write(tmp_path, train, [row("v"), row("v")]), domains=["general"])
        assert read.counts["train"] == dataset.SplitCounts(
            read=7, bad={}, other_domain=1, duplicates=1, in_validation=1, kept=4
        )
        assert read.counts["validation"] == dataset.SplitCounts(2, {}, 0, 1, 0, 1)
        assert [(one.context[0].content, one.preference) for one in read.train] == [
            ("a", -2),
            ("a", -2),
            ("b", 0),
            ("v", -2),
        ]

    def test_max_rows_reads_the_first_of_each_split(self, tmp_path: Path):
        read = load(write(tmp_path, [row("a"), row("b"), b"rubbish"], [row("c"), row("d"), row("e")]), max_rows=2)
        assert (len(read.train), len(read.validation)) == (2, 2)

    def test_fingerprint_follows_content_and_order_only(self, tmp_path: Path):
        def fingerprint(name: str, rows: list[Any], **options: Any) -> str:
            return load(write(tmp_path / name, rows, **options)).fingerprint

        first = fingerprint("a", [row("a"), row("b")])
        assert len(first) == 64
        assert first == fingerprint("b", [row("a"), row("a"), row("b")], suffix="jsonl")
        assert first != fingerprint("c", [row("b"), row("a")])
        assert first != fingerprint("d", [row("a"), row("b", overall_preference=-1)])
        assert first != fingerprint("e", [row("a")], validation=[row("b"), row("held out")])


BAD_ROWS = [
    (b'{"domain": "gen', "row is not JSON", "gen"),
    (b"\xef\xbb\xbf{}", "row is not JSON", "ufeff"),
    (b"[" * 100_000, "row is not JSON", "..."),
    (b'{"domain": "\xff"}', "row is not UTF-8", "xff"),
    (b"[1, 2]", "row is not a JSON object", "[1, 2]"),
    ({k: v for k, v in row().items() if k != "response2"}, "response2 is missing", ""),
    (row(response1=None), "response1 is NoneType, not text", ""),
    (row(response2=["x" * 500]), "response2 is list, not text", "xxx..."),
    (row(language=7), "language is int, not text", "7"),
    (row(overall_preference="2"), "overall_preference is not an integer", "'2'"),
    (row(overall_preference=1.0), "overall_preference is not an integer", "1.0"),
    (row(overall_preference=True), "overall_preference is not an integer", "True"),
    (row(overall_preference=None), "overall_preference is not an integer", ""),
    (row(overall_preference=-100), "overall_preference is outside -3 to 3", "-100"),
    (row(overall_preference=4), "overall_preference is outside -3 to 3", "4"),
    (row(context=[]), "context is neither text nor a list of turns", "[]"),
    (row(context={"role": "user"}), "context is neither text nor a list of turns", "user"),
    (row(context=[{"role": "user"}]), "context has a turn without role and content", "user"),
    (row(context=["hello"]), "context has a turn without role and content", "hello"),
    (row(context=[{"role": "user", "content": 3}]), "context is int, not text", "3"),
    (row(context=""), "context ends with an empty user turn", "''"),
    (row(context=" \n"), "context ends with an empty user turn", "' \\n'"),
    (row(response1="\ud83d"), "response1 has an unpaired surrogate", "\\ud83d"),
    (row(context="\udc00"), "context has an unpaired surrogate", "\\udc00"),
    (row(response1=" "), "response1 is the preferred response but is empty", "' '"),
    (row(response2="", overall_preference=1), "response2 is the preferred response but is empty", "''"),
    *(
        (
            row(context=[{"role": role, "content": "x"} for role in roles]),
            "context roles do not alternate between user and assistant, or the last is not user",
            roles[0],
        )
        for roles in (
            ["assistant", "user"],
            ["user", "assistant"],
            ["user", "user"],
            ["user", "system", "user"],
            ["system"],
            ["human"],
        )
    ),
]


class TestBadRows:
    @pytest.mark.parametrize(("bad", "reason", "shown"), BAD_ROWS)
    def test_stops_naming_file_line_field_and_value(self, tmp_path: Path, bad: Any, reason: str, shown: str):
        folder = write(tmp_path, [row("a"), b"", bad])
        with pytest.raises(DataError) as error:
            load(folder)
        assert error.value.where == f"{folder}/preference/train.jsonl.gz:3"
        assert error.value.message.startswith(reason)
        assert shown in error.value.message
        assert len(error.value.message) < 150
        assert error.value.remedy is not None and "data.bad_rows=skip" in error.value.remedy
        assert error.value.exit_status == 78

    def test_skip_counts_by_reason(self, tmp_path: Path):
        rows = [row("good"), *(bad for bad, _, _ in BAD_ROWS), row("also good")]
        counts = load(write(tmp_path, rows), bad_rows="skip").counts["train"]
        reasons = [reason for _, reason, _ in BAD_ROWS]
        assert counts.bad == {reason: reasons.count(reason) for reason in reasons}
        assert (counts.read, counts.kept) == (len(rows), 2)

    def test_empty_response_that_is_not_preferred_is_legal(self, tmp_path: Path):
        read = load(write(tmp_path, [row("a", response2=""), row("b", response1="", overall_preference=0)]))
        assert read.counts["train"].kept == 2


class TestSources:
    @pytest.mark.parametrize("bad_rows", ["stop", "skip"])
    def test_truncated_gzip_stops(self, tmp_path: Path, bad_rows: str):
        folder = write(tmp_path, [row(str(n)) for n in range(2000)])
        file = folder / "preference" / "train.jsonl.gz"
        file.write_bytes(file.read_bytes()[:-2000])
        with pytest.raises(DataError, match=r"train\.jsonl\.gz:\d+: the file is damaged after this line"):
            load(folder, bad_rows=bad_rows)

    def test_not_gzip_at_all(self, tmp_path: Path):
        folder = write(tmp_path, [row()])
        (folder / "preference" / "train.jsonl.gz").write_bytes(b"plain")
        with pytest.raises(DataError, match=r"train\.jsonl\.gz:0: the file is damaged"):
            load(folder)

    def test_no_folder(self, tmp_path: Path):
        with pytest.raises(DataError, match="no such file or folder"):
            load(tmp_path / "none")

    def test_no_file(self, tmp_path: Path):
        folder = write(tmp_path, [row()])
        (folder / "preference" / "train.jsonl.gz").unlink()
        with pytest.raises(DataError) as error:
            load(folder, format="helpsteer3")
        for name in ("train.jsonl.gz", "train.jsonl"):
            assert f"{folder}/preference/{name}" in error.value.message

    def test_empty_file(self, tmp_path: Path):
        with pytest.raises(DataError, match="no rows are left in split train"):
            load(write(tmp_path, []))

    def test_nothing_left(self, tmp_path: Path):
        with pytest.raises(DataError, match=r"no rows are left in split validation.*other_domain=1"):
            load(write(tmp_path, [row()]), domains=["stem"])

    def test_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        # A folder with a card stands in for the hub: `load_dataset` treats both alike.
        write(tmp_path, [row("a"), row("a"), row("b")])
        (tmp_path / "README.md").write_text(
            "---\nconfigs:\n- config_name: preference\n  data_files:\n"
            "  - split: train\n    path: preference/train.jsonl.gz\n"
            "  - split: validation\n    path: preference/validation.jsonl.gz\n---\n"
        )
        asked = []
        load_dataset = datasets.load_dataset

        def stand_in(path: str, name: str, revision: str | None) -> Any:
            asked.append((path, name, revision))
            return load_dataset(str(tmp_path), name, cache_dir=str(tmp_path / "cache"))

        monkeypatch.setattr(datasets, "load_dataset", stand_in)
        read = dataset.load_dataset(DataConfig(path="nvidia/HelpSteer3", revision="v1"))
        assert asked == [("nvidia/HelpSteer3", "preference", "v1")]
        assert (read.counts["train"].kept, read.counts["train"].duplicates) == (2, 1)
        assert read.fingerprint == load(tmp_path).fingerprint

    def test_hub_out_of_reach(self, monkeypatch: pytest.MonkeyPatch):
        def out_of_reach(*_: Any, **__: Any) -> Any:
            raise ConnectionError("no route to the hub\ntraceback")

        monkeypatch.setattr(datasets, "load_dataset", out_of_reach)
        with pytest.raises(DataError, match="nvidia/HelpSteer3: neither a local folder.*no route to the hub\n  remedy"):
            dataset.load_dataset(DataConfig(path="nvidia/HelpSteer3"))

    def test_hub_without_a_split(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train_sft": []})
        with pytest.raises(DataError, match=r"split train is missing. Splits: \['train_sft'\]"):
            dataset.load_dataset(DataConfig(path="nvidia/HelpSteer3"))


def preference(prompt: str, first: str, second: str, mark: int) -> Preference:
    return Preference((Message("user", prompt),), first, second, mark, "general", "english")


ROWS = [
    preference("cat", "cat dog", "pig", -3),
    preference("cat", "owl", "pig", 0),
    preference("dog sun", "owl", "owl hen", 1),
    preference("hen", "owl  hen", "owl hen", 1),  # the same tokens
    preference("hen hen hen hen hen", "owl", "hen", 1),
    preference("sun", "owl", "hen hen hen hen hen", 2),
    preference("sun", "owl", "", -1),
]


class TestTokens:
    """The prompt "cat" is <s> <user> cat <assistant>: four tokens; a response has one more than words."""

    def words(self, renderer: Renderer, rows: list[list[int]]) -> list[str]:
        return [renderer.text(ids) for ids in rows]

    def test_prompts(self, renderer: Renderer):
        found = dataset.tokenize_prompts(ROWS, renderer, max_tokens=5)
        assert self.words(renderer, found.tokens.lists()) == ["cat", "dog sun", "hen", "sun"]
        assert found.messages[1] == (Message("user", "dog sun"),)
        assert found.counts == {"rows": 7, "repeated": 2, "too_long": 1, "kept": 4}

    def test_pairs(self, renderer: Renderer):
        found, counts = dataset.tokenize_pairs(ROWS, renderer, max_prompt_tokens=5, max_response_tokens=3)
        assert counts == {"rows": 7, "ties": 1, "too_long": 2, "identical": 1, "kept": 3}
        assert self.words(renderer, found.sequences.prompts.lists()) == ["cat", "dog sun", "sun"]
        assert self.words(renderer, found.sequences.responses.lists()) == [
            *("cat dog", "pig"),
            *("owl hen", "owl"),
            *("owl", ""),
        ]
        assert found.sequences.responses.lists()[-1] == [renderer.tokenizer.eos_token_id]
        assert found.sequences.prompt_B.tolist() == [0, 0, 1, 1, 2, 2]
        assert found.strength_P.tolist() == [3.0, 1.0, 1.0]

    def test_preferred_demonstrations(self, renderer: Renderer):
        found, counts = dataset.tokenize_demonstrations(ROWS, renderer, "preferred", 5, 3)
        assert counts == {"rows": 7, "ties": 1, "empty": 0, "too_long": 2, "kept": 4}
        assert self.words(renderer, found.responses.lists()) == ["cat dog", "owl hen", "owl hen", "owl"]
        assert found.prompt_B.tolist() == [0, 1, 2, 3]

    def test_all_demonstrations_share_their_prompt(self, renderer: Renderer):
        found, counts = dataset.tokenize_demonstrations(ROWS, renderer, "all", 5, 3)
        assert counts == {"rows": 7, "ties": 0, "empty": 1, "too_long": 3, "kept": 10}
        assert found.prompt_B.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5]
        assert self.words(renderer, found.prompts.lists()) == ["cat", "cat", "dog sun", "hen", "sun", "sun"]

    def test_nothing_left(self, renderer: Renderer):
        with pytest.raises(DataError, match="no prompts are left in the data: rows 7, repeated 2, too_long 5"):
            dataset.tokenize_prompts(ROWS, renderer, 1)
        with pytest.raises(DataError, match="no pairs are left in the data: rows 1, ties 1"):
            dataset.tokenize_pairs(ROWS[1:2], renderer, 9, 9)
        with pytest.raises(DataError, match="no demonstrations are left in the data: rows 1"):
            dataset.tokenize_demonstrations(ROWS[:1], renderer, "all", 9, 1)


@pytest.mark.skipif(
    not (SHARED / "human-preference").is_dir(), reason="the human-preference data (ALIGN_SHARED_DATA) is not here"
)
class TestRealData:
    """922 + 71 pairs labelled by three people each (PandaLM's test set in the schema of HelpSteer3)."""

    def test_the_one_bad_row_stops(self):
        with pytest.raises(DataError, match=r"train\.jsonl\.gz:263: response1 is the preferred response but is empty"):
            load(SHARED / "human-preference")

    def test_counts(self):
        read = load(SHARED / "human-preference", bad_rows="skip")
        assert read.counts == {
            "train": dataset.SplitCounts(922, {"response1 is the preferred response but is empty": 1}, 0, 88, 0, 833),
            "validation": dataset.SplitCounts(71, {}, 0, 9, 0, 62),
        }
        ties = [sum(one.preference == 0 for one in rows) for rows in (read.train, read.validation)]
        assert ties == [56, 9]
