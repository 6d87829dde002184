"""`align generate` on a tiny model: prompts, attributes, what is written and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from align import cli
from align.config import SamplingConfig, SteeringConfig
from align.data.chat import Message
from align.data.steerlm import SteeringFormat
from align.errors import ConfigError, DataError
from align.eval import generate
from align.generators.base import Completion, Request


class Echo:
    """Answers with the end of what it was asked and the number of the sample."""

    def __init__(self):
        self.asked: list[Request] = []

    def complete(self, requests, sampling, margins=False):
        self.asked += requests
        return [Completion(f"{one.messages[-1].content[-1]}{one.sample}", one.sample == 0, 1, 1) for one in requests]


def test_answers_stand_beside_their_prompts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generate, "CALL", 3)
    asked = generate.prompts(["a", "b"], None)
    form = SteeringFormat.of(SteeringConfig(attributes=["verbosity", "helpfulness"])).asking({"verbosity": 1})
    generator = Echo()
    found = generate.answers(generator, asked, form, SamplingConfig(num_samples=2))  # type: ignore[arg-type]
    told = {"verbosity": 1, "helpfulness": 4}
    assert found == [
        {"prompt": "a", "attributes": told, "answers": ["a0", "a1"], "finished": [True, False]},
        {"prompt": "b", "attributes": told, "answers": ["b0", "b1"], "finished": [True, False]},
    ]
    assert {one.opening for one in generator.asked} == {"<extra_id_2>verbosity:1,helpfulness:4\n"}
    (plain,) = generate.answers(Echo(), asked[:1], None, SamplingConfig())  # type: ignore[arg-type]
    assert plain == {"prompt": "a", "answers": ["a0"], "finished": [True]}


def test_prompts_of_a_file(tmp_path: Path):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = [{"prompt": "p"}, {"messages": turns}, {"context": turns[1:], "domain": "code"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = generate.prompts(["first"], tmp_path / "p.jsonl")
    assert [given for given, _ in found] == ["first", "p", turns, turns[1:]]
    assert [len(context) for _, context in found] == [1, 1, 2, 1]
    assert found[2][1] == (Message("system", "s"), Message("user", "u"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[", "p.jsonl:1: row is not JSON"),
        ('{"text": "x"}', "has not one of prompt, messages and context"),
        ('{"prompt": "x", "messages": []}', "has not one of"),
        ('{"prompt": " "}', "ends with an empty user turn"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "do not alternate"),
    ],
)
def test_rows_that_are_no_prompts(line: str, said: str, tmp_path: Path):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=said):
        generate.prompts([], tmp_path / "p.jsonl")


def test_no_prompt_at_all(tmp_path: Path):
    with pytest.raises(DataError, match="no prompt"):
        generate.prompts([], None)
    with pytest.raises(DataError, match="No such file"):
        generate.prompts([], tmp_path / "none")


@pytest.mark.parametrize("text", ["helpfulness", "helpfulness=", "helpfulness=-1", "a=1,a=2", "a=1,,b=2", "a=1.5", ""])
def test_attributes_that_cannot_be_read(text: str):
    with pytest.raises(ConfigError, match="--attributes"):
        generate.parsed(text)


def test_attributes_are_read_in_any_order():
    assert generate.parsed("verbosity=1, helpfulness=4") == {"verbosity": 1, "helpfulness": 4}
    assert generate.parsed(None) == {}


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory, tiny_family: Path) -> Path:
    """A model that says it was told attributes."""
    folder = tmp_path_factory.mktemp("steered") / "m"
    shutil.copytree(tiny_family, folder)
    for name, text in SteeringFormat.of(SteeringConfig(attributes=["helpfulness", "verbosity"])).files().items():
        (folder / name).write_text(text)
    return folder


def test_the_command(steered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    common = ("--dtype", "float32", "--max-tokens", "6", "--num-samples", "2", "--temperature", "1")
    prompt = ("--prompt", "sort the words : pig ant")
    out = tmp_path / "new" / "a.jsonl"
    told = ("--attributes", "verbosity=0", "--out", str(out))
    assert cli.main(["generate", str(steered), *prompt, *common, *told]) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["prompt"] == prompt[1] and row["attributes"] == {"helpfulness": 4, "verbosity": 0}
    assert len(row["answers"]) == 2 and row["answers"][0] != row["answers"][1]
    capsys.readouterr()
    assert cli.main(["generate", str(steered), *prompt, *common, "--attributes", "verbosity=0"]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.rstrip("\n").splitlines()]
    assert printed[0] == "> sort the words : pig ant"
    assert "\n".join(printed[1:]).split() == " ".join(row["answers"]).split()  # the same seed, the same answers


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--attributes", "humor=1"], "attributes: helpfulness, verbosity"),
        (["--attributes", "verbosity=5"], "outside 0 to 4"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_what_the_command_refuses(steered: Path, extra: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["generate", str(steered), "--prompt", "x", *extra]) == 78
    assert said in capsys.readouterr().err


def test_a_model_without_a_card_is_told_nothing(tiny_family: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["generate", str(tiny_family), "--prompt", "x", "--attributes", "verbosity=1"]) == 78
    said = capsys.readouterr().err
    assert "has no align_steering.json" in said and "leave --attributes out" in said
