"""Python functions as judges: how they are called, and what comes of what they return."""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from align.config import FunctionRewardConfig
from align.data.chat import Dialogue, Message
from align.errors import ConfigError, DataError
from align.rewards import functions
from align.rewards.functions import FunctionScorer
from align.utils import plugins

DIALOGUES = [
    Dialogue((Message("system", "be kind"), Message("user", "hello")), "hi"),
    Dialogue((Message("user", "bye"),), "see you"),
]

Write = Callable[[str], str]


def scorer(name: str) -> FunctionScorer:
    return FunctionScorer(FunctionRewardConfig(function=name))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Puts source into a file and names its function ``f``."""

    def written(source: str) -> str:
        (tmp_path / "judge.py").write_text(textwrap.dedent(source))
        return f"{tmp_path / 'judge.py'}:f"

    return written


def test_it_is_called_as_in_trl(write: Write, tmp_path: Path):
    source = f"""
        import json
        def f(prompts, completions, **kwargs):
            json.dump([prompts, completions, kwargs], open({str(tmp_path / "seen.json")!r}, "w"))
            return [len(one[0]["content"]) for one in completions]
    """
    scores = scorer(write(source)).score(DIALOGUES, [[5, 2], [6, 7, 2]])
    assert scores.tolist() == [2.0, 7.0]
    assert scores.dtype == torch.float32
    prompts, completions, others = json.loads((tmp_path / "seen.json").read_text())
    assert prompts == [
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}],
        [{"role": "user", "content": "bye"}],
    ]
    assert completions == [[{"role": "assistant", "content": "hi"}], [{"role": "assistant", "content": "see you"}]]
    assert others == {"completion_ids": [[5, 2], [6, 7, 2]]}


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("def f(completions): return [1, None]", [1.0, math.nan]),
        ("def f(completions): return [True, float('nan')]", [1.0, math.nan]),
        ("import numpy\ndef f(prompts): return numpy.array([0.5, 2.0])", [0.5, 2.0]),
        ("import torch\ndef f(prompts): return torch.tensor([3, 4])", [3.0, 4.0]),
        ("import numpy\ndef f(prompts): return [numpy.float32(0.5), numpy.int64(2)]", [0.5, 2.0]),
        ("def f(completion_ids): return tuple(len(ids) for ids in completion_ids)", [1.0, 2.0]),
        ("class Judge:\n  def __call__(self, prompts): return [6, 7]\nf = Judge()", [6.0, 7.0]),
    ],
)
def test_what_it_may_return(write: Write, source: str, wanted: list[float]):
    found = scorer(write(source)).score(DIALOGUES, [[1], [2, 3]])
    torch.testing.assert_close(found, torch.tensor(wanted), equal_nan=True)


def test_no_responses_are_no_call(write: Write):
    assert scorer(write("def f(prompts): return 1 / 0")).score([]).shape == (0,)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("def f(prompts): return [1.0]", ["returned 1 values for 2 responses", "judge.py:f"]),
        ("def f(prompts): return 1.0", ["returned float for 2 responses"]),
        ("def f(prompts): return [1.0, 'good']", ["value 1 of 2 is 'good'", "None"]),
        ("def f(prompts): return [[1.0], [2.0]]", ["value 0 of 2 is [1.0]"]),
        ("def f(prompts): return {}['x']", ["raised KeyError: 'x'", "may return None"]),
    ],
)
def test_what_it_may_not_return(write: Write, source: str, parts: list[str]):
    judge = scorer(write(source))
    with pytest.raises(DataError) as caught:
        judge.score(DIALOGUES)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("def g(prompts): return []", ["has no function f", "it has: g"]),
        ("f = 3", ["has no function f"]),
        ("def f(prompts, answer): return []", ["requires the argument answer", "prompts, completions, completion_ids"]),
        ("def f(prompts, /): return []", ["is positional"]),
        ("async def f(prompts): return []", ["is asynchronous"]),
        ("import nowhere_to_be_found", ["ModuleNotFoundError", "nowhere_to_be_found"]),
        ("def f(:", ["SyntaxError"]),
    ],
)
def test_what_is_refused_before_a_run(write: Write, source: str, parts: list[str]):
    with pytest.raises(ConfigError) as caught:
        functions.load(write(source))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_where_a_function_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "judges_of_a_test.py"
    package.write_text("def f(prompts): return [1.5] * len(prompts)")
    monkeypatch.syspath_prepend(tmp_path)
    assert scorer("judges_of_a_test:f").score(DIALOGUES).tolist() == [1.5, 1.5]
    assert plugins.function_fingerprint("judges_of_a_test:f") == hashlib.sha256(package.read_bytes()).hexdigest()
    for name in (f"{tmp_path}/none.py:f", "no_such_module:f"):
        with pytest.raises(ConfigError, match="installed on every node"):
            functions.load(name)


def test_ids_that_nobody_has(write: Write):
    judge = scorer(write("def f(completion_ids): return [0.0] * len(completion_ids)"))
    with pytest.raises(DataError, match="requires completion_ids"):
        judge.score(DIALOGUES)
