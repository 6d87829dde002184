"""Functions that answer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from align.config import FunctionGeneratorConfig, SamplingConfig
from align.data.chat import Message
from align.errors import ConfigError, DataError
from align.generators.base import Completion, Request
from align.generators.functions import FunctionGenerator
from align.utils import plugins

REQUEST = Request((Message("system", "be brief"), Message("user", "two words")), sample=3, opening="well")


def generator(folder: Path, source: str) -> FunctionGenerator:
    file = folder / "answers.py"
    file.write_text(source)
    return FunctionGenerator(FunctionGeneratorConfig(function=f"{file}:answer"))


def test_it_is_given_messages_sample_and_opening(tmp_path: Path):
    two = generator(tmp_path, "def answer(messages, sample): return f\"{messages[-1]['content']} {sample}\"")
    assert two.complete([REQUEST], SamplingConfig()) == [Completion("two words 3", True, 4, 3)]
    three = generator(tmp_path, "def answer(messages, sample, opening): return opening")
    assert three.complete([REQUEST, REQUEST], SamplingConfig(), margins=True)[1] == Completion("well", True, 4, 1)
    assert three.metrics() == {"requests": 2.0} and three.metrics() == {"requests": 0.0}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def answer(messages): return ''", "does not take two or three arguments"),
        ("def answer(messages, sample, *, key): return ''", "does not take two or three arguments"),
        ("async def answer(messages, sample): return ''", "is asynchronous"),
        ("def other(messages, sample): return ''", "has no function answer"),
        ("import no_such_module_of_mine", "ModuleNotFoundError"),
        ("answer = max", "does not have a signature"),
    ],
)
def test_what_cannot_be_called_is_refused(tmp_path: Path, source: str, message: str):
    with pytest.raises(ConfigError, match=message):
        generator(tmp_path, source)


DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Said:
    text: str

def answer(messages, sample): return Said("{text}").text
"""


def test_files_of_one_name_are_modules_of_their_own_that_know_their_types(tmp_path: Path):
    before = set(sys.modules)
    for name in "ab":
        (tmp_path / name).mkdir()
    first, second = (generator(tmp_path / name, DATACLASS.format(text=name)) for name in "ab")
    assert [one.complete([REQUEST], SamplingConfig())[0].text for one in (first, second)] == ["a", "b"]
    assert len(set(sys.modules) - before) == 2
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        generator(tmp_path, "1 / 0")
    assert len(set(sys.modules) - before) == 2


def test_a_function_without_a_file_cannot_be_known_again():
    with pytest.raises(ConfigError, match="time has no file to fingerprint"):
        plugins.function_fingerprint("time:sleep")


@pytest.mark.parametrize(
    ("body", "message"), [("return 1 / 0", "raised ZeroDivisionError"), ("return 7", "returned 7, not text")]
)
def test_what_goes_wrong_names_the_function(tmp_path: Path, body: str, message: str):
    with pytest.raises(DataError, match=message):
        generator(tmp_path, f"def answer(messages, sample): {body}").complete([REQUEST], SamplingConfig())
