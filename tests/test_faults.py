"""The one hook by which tests make things go wrong."""

import math
import os
import signal

import pytest

from align import faults
from align.errors import ConfigError


@pytest.fixture(autouse=True)
def disarmed():
    yield
    faults.arm(None)


def test_nothing_is_due_when_nothing_is_armed():
    faults.arm(None)
    assert faults.due("policy", 0, "update", 1) is None
    faults.arm("")
    assert faults.due("policy", 0, "update", 1) is None
    faults.strike("driver", 0, "step", 1)


def test_a_fault_waits_for_its_role_rank_phase_and_step():
    faults.arm("role=critic,rank=1,phase=update,step=3,kind=sigkill")
    misses = [
        ("critic", 0, "critic_update", 3),
        ("policy", 1, "update", 3),
        ("critic", 1, "values", 3),
        ("critic", 1, "critic_update", 2),
    ]
    assert [faults.due(*where) for where in misses] == [None] * 4
    assert faults.due("critic", 1, "critic_update", 3) == "sigkill"
    assert faults.due("critic", 1, "critic_update", 3) is None  # once


@pytest.mark.parametrize(("at", "times", "struck"), [(1, 1, [1]), (3, 1, [3]), (2, 3, [2, 3, 4])])
def test_at_which_fit_and_how_often(at: int, times: int, struck: list[int]):
    faults.arm(f"role=policy,at={at},times={times},kind=error")
    assert [n for n in range(1, 7) if faults.due("policy", 0, "update", n)] == struck


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("role=policy,kind=sigkil", "sigkil"),
        ("role=policy", "kind None"),
        ("kind=error,step=three", "step=three"),
        ("kind=error,who=me", "who=me"),
        ("sigkill", "sigkill"),
        ("kind=error,rank=", "rank="),
        ("role=driver,phase=update,kind=error", "'update'"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, says: str):
    with pytest.raises(ConfigError, match="ALIGN_FAULT") as caught:
        faults.arm(text)
    assert says in str(caught.value)


def test_signals_reach_this_process():
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    faults.arm("role=driver,kind=sigusr2")
    faults.strike("driver", 0, "step", 1)
    signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2]


@pytest.mark.parametrize("kind", faults.REFUSALS)
def test_refusals_are_those_of_the_system(kind: str):
    with pytest.raises(OSError) as caught:
        faults.commit(kind)
    assert caught.value.errno == faults.REFUSALS[kind]
    assert caught.value.strerror == os.strerror(faults.REFUSALS[kind])


def test_errors():
    with pytest.raises(RuntimeError, match="on purpose"):
        faults.commit("error")
    with pytest.raises(MemoryError):
        faults.commit("oom")


@pytest.mark.parametrize("what", ["loss", "gradient", "answer"])
def test_numbers_are_spoilt_once_and_where_they_should(what: str):
    faults.commit(f"nan_{what}")
    others = {"loss", "gradient", "answer"} - {what}
    assert all(faults.spoilt(other) is None for other in others)
    assert math.isnan(faults.spoilt(what))
    assert faults.spoilt(what) is None
    faults.commit(f"inf_{what}")
    assert faults.spoilt(what) == math.inf
