"""Models in the places of policy and baseline, and a function that judges them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fake_judge
import pytest
from question_rows import lines

from align import cli
from align.data import toy
from align.eval.policy import main

WRITTEN = ("answers.jsonl", "baseline.jsonl", "verdicts.jsonl", "items.jsonl", "policy.json")
ASKED = ("sampling.max_tokens=8", "sampling.temperature=1.0", "policy.dtype=float32", "baseline.dtype=float32")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, toy_data: Path, tiny_judge: Path, tiny_yes_no: Path) -> list[str]:
    """The command but for its folder."""
    rows = [{"prompt": f"sort the words : {one} sun {other}"} for one in toy.WORDS[:4] for other in toy.WORDS[4:7]]
    file = lines(tmp_path_factory.mktemp("questions") / "prompts.jsonl", rows)
    speakers = ("--model", tiny_judge, "--baseline", tiny_yes_no, "--judge", f"{fake_judge.__file__}:longer")
    return [*ASKED, *map(str, ("--benchmark", "prompts", file, *speakers))]


def run(out: Path, *words: str) -> dict[str, Any]:
    assert cli.main(["eval", "policy", *words, "--out", str(out)]) == 0
    return json.loads((out / "policy.json").read_text())


@pytest.fixture(scope="module")
def local(asked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a call in this process."""
    out = tmp_path_factory.mktemp("local") / "out"
    run(out, *asked)
    return out


def test_every_answer_is_judged_both_ways(local: Path):
    found = json.loads((local / "policy.json").read_text())
    assert found["sizes"] == {"questions": 12, "judged": 12, "games": 24}
    assert found["judging"]["same winner in both orders"] == 1.0
    answers = [json.loads(line)["answers"][0] for line in (local / "answers.jsonl").read_text().splitlines()]
    assert len(set(answers)) > 3
    assert found["lengths"]["policy"]["characters"] == pytest.approx(sum(map(len, answers)) / 12)


def test_a_second_call_asks_no_model(asked: list[str], local: Path, monkeypatch: pytest.MonkeyPatch):
    before = {name: (local / name).read_bytes() for name in WRITTEN}
    monkeypatch.setattr(main, "_company", None)
    run(local, *asked)
    assert {name: (local / name).read_bytes() for name in WRITTEN} == before


@pytest.mark.slow
@pytest.mark.long
def test_on_ray_with_a_policy_of_two_ranks(asked: list[str], local: Path, tmp_path: Path):
    run(tmp_path / "out", "executor=ray", "placement={policy: 0-1, baseline: 2, judge: 2}", *asked)
    for name in WRITTEN:
        assert (tmp_path / "out" / name).read_bytes() == (local / name).read_bytes(), name
