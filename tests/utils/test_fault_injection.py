"""The one hook by which tests make things go wrong."""

import math
import os
import signal

import pytest

from align.errors import ConfigError
from align.utils import fault_injection


@pytest.fixture(autouse=True)
def disarmed():
    yield
    fault_injection.arm(None)


def test_nothing_is_due_when_nothing_is_armed():
    fault_injection.arm(None)
    assert fault_injection.next_fault("policy", 0, "update", 1) is None
    fault_injection.arm("")
    assert fault_injection.next_fault("policy", 0, "update", 1) is None
    fault_injection.maybe_inject("driver", 0, "step", 1)


def test_a_fault_waits_for_its_role_rank_phase_and_step():
    fault_injection.arm("role=critic,rank=1,phase=update,step=3,kind=sigkill")
    misses = [
        ("critic", 0, "critic_update", 3),
        ("policy", 1, "update", 3),
        ("critic", 1, "values", 3),
        ("critic", 1, "critic_update", 2),
    ]
    assert [fault_injection.next_fault(*where) for where in misses] == [None] * 4
    assert fault_injection.next_fault("critic", 1, "critic_update", 3) == "sigkill"
    assert fault_injection.next_fault("critic", 1, "critic_update", 3) is None  # once


@pytest.mark.parametrize(("at", "times", "struck"), [(1, 1, [1]), (3, 1, [3]), (2, 3, [2, 3, 4])])
def test_at_which_fit_and_how_often(at: int, times: int, struck: list[int]):
    fault_injection.arm(f"role=policy,at={at},times={times},kind=error")
    assert [n for n in range(1, 7) if fault_injection.next_fault("policy", 0, "update", n)] == struck


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
        fault_injection.arm(text)
    assert says in str(caught.value)


def test_signals_reach_this_process():
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    fault_injection.arm("role=driver,kind=sigusr2")
    fault_injection.maybe_inject("driver", 0, "step", 1)
    signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2]


@pytest.mark.parametrize("kind", fault_injection.REFUSALS)
def test_refusals_are_those_of_the_system(kind: str):
    with pytest.raises(OSError) as caught:
        fault_injection.raise_fault(kind)
    assert caught.value.errno == fault_injection.REFUSALS[kind]
    assert caught.value.strerror == os.strerror(fault_injection.REFUSALS[kind])


def test_errors():
    with pytest.raises(RuntimeError, match="on purpose"):
        fault_injection.raise_fault("error")
    with pytest.raises(MemoryError):
        fault_injection.raise_fault("oom")


@pytest.mark.parametrize("what", ["loss", "gradient", "answer"])
def test_numbers_are_spoilt_once_and_where_they_should(what: str):
    fault_injection.raise_fault(f"nan_{what}")
    others = {"loss", "gradient", "answer"} - {what}
    assert all(fault_injection.corrupt(other) is None for other in others)
    assert math.isnan(fault_injection.corrupt(what))
    assert fault_injection.corrupt(what) is None
    fault_injection.raise_fault(f"inf_{what}")
    assert fault_injection.corrupt(what) == math.inf
