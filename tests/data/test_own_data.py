"""Data that is not of the HelpSteer family: what TRL takes, in files of any kind, found without being named."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import datasets
import layouts
import pytest
from trl.data_utils import extract_prompt

from align.cli import main
from align.config import DataConfig, SourceConfig
from align.data import dataset, detect, layout, mixing
from align.data.chat import Message
from align.data.rows import Demonstration, Preference, Prompt
from align.errors import AlignError, ConfigError, DataError

USER, SYSTEM = Message("user", "cat"), Message("system", "s")


def said(*contents: str, system: str = "") -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


IMPLICIT = {"chosen": said("cat", "dog"), "rejected": said("cat", "pig")}
EXPLICIT = {"prompt": "cat", "chosen": "dog", "rejected": "pig"}
PAIR = Preference((USER,), "dog", "pig", -1, "", "")

READ: dict[str, tuple[dict[str, Any], str, Any]] = {
    "implicit prompt": (IMPLICIT, "preferences", PAIR),
    "implicit prompt beside its text": (IMPLICIT | {"prompt": "cat", "score_chosen": 8.5}, "preferences", PAIR),
    "implicit prompt beside its turns": (IMPLICIT | {"prompt": said("cat")}, "preferences", PAIR),
    "implicit prompt of several turns": (
        {"chosen": said("a", "b", "cat", "dog", system="s"), "rejected": said("a", "b", "cat", "pig", system="s")},
        "preferences",
        Preference((SYSTEM, Message("user", "a"), Message("assistant", "b"), USER), "dog", "pig", -1, "", ""),
    ),
    "explicit prompt": (EXPLICIT, "preferences", PAIR),
    "explicit prompt in turns": (
        {"prompt": said("cat"), "chosen": said("", "dog")[1:], "rejected": said("", "pig")[1:]},
        "preferences",
        PAIR,
    ),
    "prompt of a pair": (IMPLICIT, "prompts", Prompt((USER,), "", "")),
    "prompt of text": (EXPLICIT, "prompts", Prompt((USER,), "", "")),
    "prompt alone": ({"prompt": said("cat", system="s")}, "prompts", Prompt((SYSTEM, USER), "", "")),
    "prompt of a conversation": ({"messages": said("cat", "dog")}, "prompts", Prompt((USER,), "", "")),
    "conversation": ({"messages": said("cat", "dog")}, "demonstrations", Demonstration((USER,), "dog", "", "")),
    "completion": ({"prompt": "cat", "completion": "dog"}, "demonstrations", Demonstration((USER,), "dog", "", "")),
    "completion in turns": (
        {"prompt": said("cat"), "completion": said("", "dog")[1:]},
        "demonstrations",
        Demonstration((USER,), "dog", "", ""),
    ),
    "pair to imitate": (EXPLICIT, "demonstrations", PAIR),
}


@pytest.mark.parametrize("name", READ)
def test_a_row_of_each_form(tmp_path: Path, name: str):
    row, reads, parsed = READ[name]
    file = layouts.put(tmp_path / "own.jsonl", [row])
    read = dataset.load_dataset(DataConfig(path=str(file), validation=0), reads)  # type: ignore[arg-type]
    assert read.train == [parsed] and read.train[0].where == f"{file}:1"
    assert detect.resolve_format(DataConfig(path=str(file))).format == "trl"


def test_implicit_prompts_are_those_of_trl(tmp_path: Path):
    rng = random.Random(0)
    rows = []
    for number in range(20):
        before = [f"{number} {i}" for i in range(2 * rng.randrange(3) + 1)]
        rows.append({"chosen": said(*before, f"yes {number}"), "rejected": said(*before, f"no {number}")})
    read = dataset.load_dataset(DataConfig(path=str(layouts.put(tmp_path / "own.jsonl", rows)), validation=0)).train
    for row, known in zip(rows, map(extract_prompt, rows), strict=True):
        [ours] = [one for one in read if one.chosen == row["chosen"][-1]["content"]]
        assert [turn._asdict() for turn in ours.context] == known["prompt"]
        assert [ours.chosen, ours.rejected] == [known[side][0]["content"] for side in ("chosen", "rejected")]


def test_the_rows_of_the_page(tmp_path: Path):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    rows = [json.loads(line) for line in page.split("```json\n")[1].split("```")[0].splitlines()]
    holds = [("preferences", "demonstrations", "prompts")] * 3 + [("demonstrations", "prompts")] * 2 + [("prompts",)]
    for row, known in zip(rows, holds, strict=True):
        data = DataConfig(path=str(layouts.put(tmp_path / "own.jsonl", [row])), validation=0)
        for reads in ("preferences", "demonstrations", "prompts"):
            if reads in known:
                [read] = dataset.load_dataset(data, reads).train  # type: ignore[arg-type]
                assert read.context == (Message("user", "2 + 2?"),)
            else:
                with pytest.raises(DataError, match="is missing"):
                    dataset.load_dataset(data, reads)  # type: ignore[arg-type]


KTO = {"prompt": "cat", "completion": "dog", "label": True}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unpaired": (KTO, "own.jsonl:1: unpaired preferences"),
    "no prompt": ({"chosen": "Human: a Assistant: b", "rejected": "c"}, "own.jsonl:1: prompt is missing"),
    "another prompt": (IMPLICIT | {"prompt": "cow"}, "own.jsonl:1: prompt is not in the conversation of chosen: 'cow'"),
    "parts early": (
        {"chosen": said("a", "b", "c", "d"), "rejected": said("a", "x", "c", "d")},
        "own.jsonl:1: rejected differs from chosen before the last turn",
    ),
    "no answer": ({"chosen": said("a"), "rejected": said("a")}, "own.jsonl:1: chosen does not end with an answer"),
    "an image": (
        EXPLICIT | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        "own.jsonl:1: prompt is list, not text",
    ),
    "the columns match no format": (
        {"question": "a", "answer": "b"},
        "own.jsonl:1: the columns match no format: answer, question",
    ),
    "columns of two formats": (
        layouts.preference() | EXPLICIT,
        "the columns match several formats (helpsteer3; trl with chosen and rejected)",
    ),
    "pairs and completions": (
        EXPLICIT | {"completion": "x"},
        "the columns match several formats (trl with chosen and rejec",
    ),
    "either HelpSteer": (layouts.rated(), "the columns match several formats (helpsteer2; helpsteer)"),
    "prompts where pairs are read": ({"prompt": "a"}, "own.jsonl:1: chosen is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str):
    row, message = REFUSED[name]
    layouts.put(tmp_path / "own.jsonl", [row])
    with pytest.raises(DataError) as caught:
        dataset.load_dataset(DataConfig(path=str(tmp_path / "own.jsonl")))
    assert message in str(caught.value) and caught.value.remedy


ROWS = [{"prompt": f"q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]


def jsonl(folder: Path) -> Path:
    return layouts.put(folder / "own.jsonl", ROWS)


def listed(folder: Path) -> Path:
    (folder / "own.json").write_text(json.dumps(ROWS))
    return folder / "own.json"


def parquet(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS[:25]).to_parquet(str(folder / "data" / "train-00000-of-00002.parquet"))
    datasets.Dataset.from_list(ROWS[25:]).to_parquet(str(folder / "data" / "train-00001-of-00002.parquet"))
    return folder


def table(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_csv(str(folder / "own.csv"))
    return folder / "own.csv"


def saved(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def parts(folder: Path) -> Path:
    layouts.put(folder / "a.jsonl", ROWS[:7])
    layouts.put(folder / "b.jsonl", ROWS[7:])
    return folder


@pytest.mark.parametrize("written", [jsonl, listed, parquet, table, saved, parts])
def test_every_kind_of_source_gives_the_same_rows(tmp_path: Path, written: Any):
    (tmp_path / "data").mkdir()
    path = str(written(tmp_path))
    read = dataset.load_dataset(DataConfig(path=path, validation=0.2))
    known = dataset.load_dataset(
        DataConfig(path=str(layouts.put(tmp_path / "x" / "train.jsonl", ROWS)), validation=0.2)
    )
    assert read.fingerprint == known.fingerprint
    assert len(read.train) + len(read.validation) == 40 and 2 <= len(read.validation) <= 14
    [line] = detect.describe_sources(detect.resolve_format(DataConfig(path=path, validation=0.2)))
    assert line.startswith("data: trl (prompt, chosen, rejected) from ")
    assert "validation: 0.2 of its prompts" in line


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "eval", "test"])
def test_the_names_of_a_validation_split(tmp_path: Path, name: str):
    layouts.put(tmp_path / "train.jsonl", ROWS[:30])
    layouts.put(tmp_path / f"{name}.jsonl", ROWS[30:])
    read = dataset.load_dataset(DataConfig(path=str(tmp_path)))
    assert (len(read.train), len(read.validation)) == (30, 10)
    assert detect.describe_sources(detect.resolve_format(DataConfig(path=str(tmp_path))))[0].endswith(
        f"from {tmp_path}/{name}.jsonl"
    )
    splits = {"train": datasets.Dataset.from_list(ROWS[:30]), name: datasets.Dataset.from_list(ROWS[30:])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert dataset.load_dataset(DataConfig(path=str(tmp_path / "saved"))).fingerprint == read.fingerprint


def test_files_that_do_not_say_what_they_are(tmp_path: Path):
    layouts.put(tmp_path / "train.jsonl", ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(DataError, match=r"train exists in several file types, \.jsonl and \.parquet"):
        dataset.load_dataset(DataConfig(path=str(tmp_path)))
    with pytest.raises(DataError, match="no file for split train"):
        dataset.load_dataset(DataConfig(path=str(layouts.put(tmp_path / "other" / "test.jsonl", ROWS).parent)))
    assert layout.find_split_files("org/name") is None


class TestSplit:
    def split(self, folder: Path, rows: list[Any], **options: Any) -> tuple[set[str], set[str]]:
        layouts.put(folder / "own.jsonl", rows)
        read = dataset.load_dataset(DataConfig(path=str(folder / "own.jsonl"), **options))
        train, held_out = ({row.context[-1].content for row in rows} for rows in (read.train, read.validation))
        return train, held_out

    def test_follows_the_prompt_alone(self, tmp_path: Path):
        rows = [*ROWS, *(row | {"chosen": "another"} for row in ROWS)]
        train, held_out = self.split(tmp_path, rows, validation=0.3)
        assert not train & held_out and held_out
        shuffled = random.Random(0).sample(rows, len(rows))
        more = [*shuffled, *({**ROWS[0], "prompt": f"new {i}"} for i in range(40))]
        grown = self.split(tmp_path, more, validation=0.3, system_prompt="s")
        assert grown[0] >= train and grown[1] >= held_out
        assert self.split(tmp_path, rows, validation=0.5)[1] >= held_out

    def test_its_size(self):
        shares = [mixing.hash_fraction((Message("user", str(i)),)) for i in range(2000)]
        assert abs(sum(one < 0.05 for one in shares) / 2000 - 0.05) < 0.015

    def test_is_pinned(self):
        digest = hashlib.sha256(b'[["user", "cat"]]').hexdigest()
        assert mixing.hash_fraction((USER,)) == int(digest[:16], 16) / 2**64

    def test_a_bad_row_is_of_train(self, tmp_path: Path):
        """Its prompt is not known; what reads the validation split alone does not stop at it."""
        layouts.put(tmp_path / "own.jsonl", [*ROWS, b"{"])
        data = DataConfig(path=str(tmp_path / "own.jsonl"), validation=0.3)
        rows, counts = dataset.load_validation(data)
        assert len(rows) == counts.kept > 0
        with pytest.raises(DataError, match=r"own\.jsonl:41: row is not JSON"):
            dataset.load_dataset(data)


def test_a_system_prompt_only_where_there_is_none(tmp_path: Path):
    rows = [{"prompt": said("a"), "chosen": "x", "rejected": "y"}, {"prompt": said("b", system="own"), **EXPLICIT}]
    rows[1]["prompt"] = said("b", system="own")
    file = layouts.put(tmp_path / "own.jsonl", rows)
    read = dataset.load_dataset(DataConfig(path=str(file), system_prompt="s", validation=0)).train
    assert [row.context[0] for row in read] == [SYSTEM, Message("system", "own")]
    folder = layouts.write(tmp_path / "3", "helpsteer3", [layouts.preference()], [layouts.preference("v")])
    both = dataset.load_dataset(DataConfig(path=str(folder), system_prompt="s"))
    assert both.train[0].context[0] == both.validation[0].context[0] == SYSTEM


def test_columns_have_other_names(tmp_path: Path):
    rows = [{"question": row["prompt"], "a": row["chosen"], "b": row["rejected"], "prompt": 7} for row in ROWS]
    file = layouts.put(tmp_path / "own.jsonl", rows)
    columns = {"prompt": "question", "chosen": "a", "rejected": "b"}
    read = dataset.load_dataset(DataConfig(path=str(file), columns=columns))
    layouts.put(tmp_path / "plain.jsonl", ROWS)
    assert read.fingerprint == dataset.load_dataset(DataConfig(path=str(tmp_path / "plain.jsonl"))).fingerprint
    with pytest.raises(ConfigError, match="no column 'c' for rejected"):
        dataset.load_dataset(DataConfig(path=str(file), columns=columns | {"rejected": "c"}))
    with pytest.raises(ConfigError, match="'promt' is not a column of any format") as caught:
        dataset.load_dataset(DataConfig(path=str(file), columns={"promt": "question"}))
    assert "did you mean `prompt`" in str(caught.value)


class TestSources:
    def data(self, folder: Path, *weights: float) -> DataConfig:
        sources = {}
        for number, weight in enumerate(weights):
            rows = [{**EXPLICIT, "prompt": f"{number} {i}"} for i in range(100)]
            file = layouts.put(folder / str(number) / "train.jsonl", rows)
            layouts.put(folder / str(number) / "test.jsonl", [{**EXPLICIT, "prompt": f"t {number}"}, EXPLICIT])
            sources[f"s{number}"] = SourceConfig(path=str(file.parent), weight=weight)
        return DataConfig(path="", sources=sources)

    def test_weights_by_counting(self, tmp_path: Path):
        read = dataset.load_dataset(self.data(tmp_path, 1.0, 0.25, 0.005))
        source = [row.context[0].content[0] for row in read.train]
        assert [source.count(number) for number in "012"] == [100, 25, 1]
        assert [row.context[0].content for row in read.validation] == ["t 0", "t 1", "t 2", "cat"]
        assert read.counts["validation"].duplicates == 2

    def test_are_the_same_again_and_nested(self, tmp_path: Path):
        first, again = (dataset.load_dataset(self.data(tmp_path, 1.0, 0.25)) for _ in range(2))
        assert first.fingerprint == again.fingerprint
        assert set(first.train) < set(dataset.load_dataset(self.data(tmp_path, 1.0, 0.5)).train)

    def test_of_several_formats(self, tmp_path: Path):
        layouts.write(tmp_path / "3", "helpsteer3", [layouts.preference()], [layouts.preference("v")])
        layouts.put(tmp_path / "chat.jsonl", [{"messages": said("a", "b")}])
        sources = {
            "hs": SourceConfig(path=str(tmp_path / "3")),
            "chat": SourceConfig(path=str(tmp_path / "chat.jsonl")),
        }
        data = DataConfig(path="", sources=sources, validation=0)
        read = dataset.load_dataset(data, "demonstrations")
        assert [type(row) for row in read.train] == [Preference, Demonstration]
        assert [one.format for one in detect.resolve_format(data).sources.values()] == ["helpsteer3", "trl"]
        assert [line.split(": data: ")[1][:10] for line in detect.describe_sources(detect.resolve_format(data))] == [
            "helpsteer3",
            "trl (messa",
        ]
        with pytest.raises(AlignError, match=r"chat\.jsonl:1: chosen is missing"):
            dataset.load_dataset(data)


def test_the_layout_of_helpsteer3_is_found_first(tmp_path: Path):
    layouts.write(tmp_path, "helpsteer3", [layouts.preference()], [layouts.preference("v")])
    layouts.write(tmp_path, "helpsteer2", [layouts.rated()] * 2, [layouts.rated("v")] * 2)
    named, found = (
        dataset.load_dataset(DataConfig(path=str(tmp_path), format=form)) for form in ("helpsteer3", "auto")
    )
    assert found == named
    flat = datasets.Dataset.from_list([layouts.preference(), layouts.preference("v")])
    flat.to_parquet(str(tmp_path / "flat.parquet"))
    assert len(dataset.load_dataset(DataConfig(path=str(tmp_path / "flat.parquet"), validation=0)).train) == 2


def test_lint_and_convert_take_keys_of_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in ROWS]
    file = layouts.put(tmp_path / "own.jsonl", rows)
    assert main(["data", "lint", str(file), "columns={prompt: question}", "data.validation=0.2"]) == 0
    assert "(trl, preferences): train" in capsys.readouterr().out
    out = tmp_path / "out"
    more = ["--to", "openai", "columns={prompt: question}", "system_prompt=be brief", "validation=0.2"]
    assert main(["data", "convert", str(file), str(out), *more]) == 0
    assert json.loads((out / "train.jsonl").read_text().splitlines()[0])["prompt"][0]["content"] == "be brief"
    layouts.put(tmp_path / "chat.jsonl", [{"messages": said("a", "b")}, {"messages": said("c")}])
    assert main(["data", "lint", str(tmp_path / "chat.jsonl"), "validation=0"]) == 1
    assert "does not end with an answer" in capsys.readouterr().out
