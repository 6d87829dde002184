"""From the stacks that faulthandler writes to who is slow."""

import faulthandler
import threading
from pathlib import Path

import pytest

from align.cluster import actor, failures
from align.cluster.actor import Member, ProcessLocation
from align.cluster.failures import Frame, WorkerStatus, parse_stacks, slowest
from align.utils import fault_injection

ACTOR, TORCH = actor.__file__, str(Path(threading.__file__).parent / "site-packages/torch")
WAITS = f"""Thread 0x00007f0000000001 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 324 in wait

Current thread 0x00007f0000000002 (most recent call first):
  File "{TORCH}/distributed/distributed_c10d.py", line 2800 in all_reduce
  File "{TORCH}/distributed/c10d_logger.py", line 83 in wrapper
  File "{Path(fault_injection.__file__).parents[1]}/engines/deepspeed.py", line 210 in update
  File "{Path(fault_injection.__file__).parents[1]}/workers/base.py", line 66 in timed
  File "{ACTOR}", line 70 in call
  File "{TORCH}/../ray/util/tracing.py", line 461 in _resume_span
"""


def status(text: str, rank: int = 0, reacted: bool = True, state: str = "S") -> WorkerStatus:
    member = Member("policy", rank, None, Path("policy.log"), False, ProcessLocation("node", "127.0.0.1", 7))
    return WorkerStatus(member, parse_stacks(text), reacted, state)


def test_the_thread_that_runs_the_method_is_found_among_all():
    worker = status(WAITS)
    assert [frame.function for frame in worker.frames] == ["all_reduce", "wrapper", "update", "timed"]
    assert worker.own == Frame(f"{Path(fault_injection.__file__).parents[1]}/engines/deepspeed.py", 210, "update")
    assert worker.collective is not None
    assert worker.collective.function == "all_reduce"
    assert str(worker) == "policy-0: in update (align/engines/deepspeed.py:210), waits for its peers in all_reduce"


def test_a_worker_without_a_call_waits_for_work():
    worker = status(WAITS.replace(ACTOR, "/elsewhere.py"))
    assert not worker.busy
    assert str(worker) == "policy-0: it waits for work"


def test_a_stack_too_deep_for_its_root_is_taken_for_the_thread_that_works():
    cut = WAITS.replace(f'  File "{ACTOR}", line 70 in call\n', "  ...\n").partition('  File "' + TORCH + "/../ray")[0]
    assert [frame.function for frame in parse_stacks(cut)] == ["all_reduce", "wrapper", "update", "timed"]


COMPUTES = WAITS.replace("/distributed/", "/nn/")


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([status(WAITS, 0), status(COMPUTES, 1), status(WAITS, 2)], [1]),
        ([status(WAITS, 0), status(COMPUTES, 1), status("", 2, reacted=False, state="T")], [2]),
        ([status(WAITS, 0), status("", 1)], [0]),  # an idle rank is no culprit
        ([status(WAITS, 0), status(WAITS, 1)], [0, 1]),
        ([status("", 0)], []),
    ],
)
def test_the_slowest_are_those_whom_the_others_wait_for(ranks: list[WorkerStatus], named: list[int]):
    assert [worker.member.rank for worker in slowest(ranks)] == named


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("T", "it is stopped (SIGSTOP)"),
        ("D", "it waits for a disk"),
        ("R", "process state R"),
        ("", "nor does its node"),
    ],
)
def test_a_process_that_does_not_react_is_described_by_its_state(state: str, said: str):
    assert status("", reacted=False, state=state).summary == f"it does not react: {said}"


def test_what_this_python_writes_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The format is that of the interpreter that runs, so a change of it fails here."""
    monkeypatch.setattr(failures.actor, "__file__", __file__)

    def call() -> str:
        with (tmp_path / "log").open("w") as log:
            faulthandler.dump_traceback(log, all_threads=True)
        return (tmp_path / "log").read_text()

    def outer() -> str:
        return call()

    frames = parse_stacks(call())
    assert [frame.function for frame in frames] == ["call"]  # nothing within it: the call itself
    assert frames[0].path == __file__
    assert outer()
