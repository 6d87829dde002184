"""A loss or a gradient that is not finite, on one rank: no rank changes anything, and training goes on as it was."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from align.engines import distributed

sys.path.append(str(Path(__file__).parent))
suite: Any = importlib.import_module("resuming")

RUNS = [(case, way) for case in suite.SPOILT for way in suite.WAYS]
NAMES = [f"{case.name}-{way}" for case, way in RUNS]
QUICK = [
    pytest.param(case, way, id=name, marks=() if case.kind == "policy" and case.stage in (0, 2) else pytest.mark.slow)
    for (case, way), name in zip(RUNS, NAMES, strict=True)
]


@pytest.fixture(autouse=True, scope="module")
def alone():
    distributed.initialize_alone()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What two processes found, by rank."""
    return suite.on_two_ranks("spoilt", tmp_path_factory.mktemp("ranks"))


def check(found: dict[str, Any], way: str) -> None:
    assert found["changed by the skip"] == []
    assert found["changed by the error"] == []
    assert found["metrics"] == {
        "non_finite": 1.0,
        "skipped_steps": 1.0,
        "trained_tokens": found["good"][0]["trained_tokens"],
    }
    what = f"the loss is {way[:3]}" if way.endswith("loss") else "the norm of the gradient is not finite"
    step = 2 + suite.WAYS.index(way)
    assert found["message"].startswith(f"{what} at optimizer step {step}; no weight was changed\n  remedy: ")
    # The next step is what it is after an empty one, bit for bit.
    assert found["empty"] == {"skipped_steps": 1.0}
    assert found["good"][0] == found["good"][1]
    assert found["end"] == []


@pytest.mark.parametrize(("case", "way"), QUICK)
def test_nothing_changes_and_the_next_step_is_as_after_an_empty_one(case, way):
    check(suite.spoilt(case)[way], way)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "way"), RUNS, ids=NAMES)
def test_one_rank_stops_both(case, way, two_ranks):
    ours, theirs = (rank[case.name][way] for rank in two_ranks)
    assert ours["metrics"] == theirs["metrics"]
    assert ours["message"] == theirs["message"]
    assert ours["good"] == theirs["good"]
    check(ours, way)
    check(theirs, way)


def test_good_steps_say_nothing_of_numbers_that_are_not_finite():
    for found in suite.spoilt(suite.SPOILT[0]).values():
        assert found["good"][0]["skipped_steps"] == 0.0
        assert "non_finite" not in found["good"][0]
