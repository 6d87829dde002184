"""``align scale`` with models: killed and gone on with, and on Ray, it writes what it writes undisturbed."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from harness import until

pytestmark = pytest.mark.slow

RECIPE = """
prompts: {{path: {data}, max_prompts: 8}}
editing: {{question: feedback, instruction: "edit {{feedback}}"}}
policy: {{path: {family}, dtype: float32}}
feedback: {{path: {yes_no}, dtype: float32}}
edit: {{path: {family}, dtype: float32}}
select: {{path: {attributes}, dtype: float32, weights: {{helpfulness: 1.0, verbosity: -0.5}}}}
drafts: 2
feedbacks: 3
edits: 2
draft_sampling: {{max_tokens: 8, temperature: 1.0}}
feedback_sampling: {{max_tokens: 6}}
edit_sampling: {{max_tokens: 8}}
sweep: {{feedbacks: [1]}}
max_best_of: 16
prompts_at_once: 2
batch_size: 16
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory, family_data, tiny_family, tiny_yes_no, tiny_attributes) -> tuple[str, str]:
    """``align scale`` but for the folder."""
    paths = {"data": family_data, "family": tiny_family, "yes_no": tiny_yes_no, "attributes": tiny_attributes}
    recipe = tmp_path_factory.mktemp("scale") / "recipe.yaml"
    recipe.write_text(RECIPE.format(**paths))
    return "scale", str(recipe)


@pytest.fixture(scope="module")
def whole(command, runs, tmp_path_factory) -> Path:
    """The folder of a command that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert runs.run(*command, f"out={folder}", log="whole") == 0, runs.text("whole")
    return folder


def lines(folder: Path) -> list[bytes]:
    """Those that are written to their end."""
    path = folder / "results.jsonl"
    return [one for one in path.read_bytes().splitlines(keepends=True) if one.endswith(b"\n")] if path.exists() else []


def untimed(folder: Path) -> list[dict]:
    found = sorted(map(json.loads, lines(folder)), key=lambda row: row["id"])
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def alike(one: Any, other: Any) -> bool:
    """Equal but for the last digits of scores, which hang on who is scored in the same call."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == (pytest.approx(other, abs=1e-5) if isinstance(other, float) else other)


def assert_same(one: Path, other: Path) -> None:
    """The same but for the clock."""
    for a, b in zip(untimed(one), untimed(other), strict=True):
        assert {**a, "scores": {}} == {**b, "scores": {}}
        assert alike(a["scores"], b["scores"])
    a, b = (json.loads((folder / "scaling.json").read_text()) for folder in (one, other))
    assert alike({**a, "budget": []}, {**b, "budget": []})


def test_killed_twice_and_gone_on_with(command, whole, runs, tmp_path):
    folder = tmp_path / "out"
    kept: list[bytes] = []
    for least in (1, 4):
        pid = runs.start(*command, f"out={folder}", log="killed")
        assert until(lambda: len(lines(folder)) >= least), runs.text("killed")  # noqa: B023
        runs.kill(pid)
        assert runs.wait(pid) == -signal.SIGKILL, runs.text("killed")
        assert lines(folder)[: len(kept)] == kept
        kept = lines(folder)
        assert len(kept) < 8
    with (folder / "results.jsonl").open("ab") as file:
        file.write(kept[0][:40])  # a line that was being written
    assert runs.run(*command, f"out={folder}", log="killed") == 0, runs.text("killed")
    assert lines(folder)[: len(kept)] == kept
    assert_same(folder, whole)
    drafts = [one["text"] for row in untimed(whole) for one in row["samples"]]
    assert len(set(drafts)) > len(drafts) / 2


@pytest.mark.long
def test_four_models_on_slots_of_their_own(command, whole, runs, tmp_path):
    folder = tmp_path / "out"
    ray = ("executor=ray", "placement={policy: 0, feedback: 1, edit: 2, select: 3}")
    assert runs.run(*command, *ray, f"out={folder}", log="ray") == 0, runs.text("ray")
    assert len(list((folder / "logs").iterdir())) == 4
    assert_same(folder, whole)
