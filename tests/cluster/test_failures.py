"""What an exception of Ray proves, and what the user is told."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from align import launch
from align.cluster.actor import Member, WorkerCall
from align.cluster.failures import Failure, FailureKind, WorkerDiedError, classify_failure
from align.errors import AlignError, DivergedError, LoadError, ModelError, WorkerError


def raised(error: BaseException) -> RayTaskError:
    """As Ray hands on what a worker raised."""
    text = f"Traceback ...\n{type(error).__name__}: {error}"
    return RayTaskError("call", text, error).as_instanceof_cause()  # type: ignore[arg-type]


GLOO = RuntimeError("[/pytorch/third_party/gloo/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3829")
NCCL = torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3384, unhandled system error")
EXAMPLES: list[tuple[RayError, FailureKind]] = [
    (raised(DivergedError("the loss is nan")), FailureKind.ALIGN_ERROR),
    (raised(ModelError("shapes differ")), FailureKind.ALIGN_ERROR),
    (ActorDiedError(), FailureKind.DIED),
    (WorkerCrashedError(), FailureKind.DIED),
    (NodeDiedError("node 7 died"), FailureKind.DIED),
    (OutOfMemoryError("Task was killed due to the node running low on memory."), FailureKind.DIED),
    (raised(ArithmeticError("seven is not eight")), FailureKind.RAISED),
    (raised(MemoryError()), FailureKind.RAISED),
    (raised(ObjectStoreFullError("full")), FailureKind.RAISED),
    (raised(GLOO), FailureKind.PEER),
    (raised(NCCL), FailureKind.PEER),
    (raised(ConnectionResetError("Connection reset by peer")), FailureKind.PEER),
    (raised(ActorDiedError()), FailureKind.SECONDARY),
    (ActorUnavailableError("its node does not answer", None), FailureKind.SECONDARY),
    (GetTimeoutError("late"), FailureKind.SECONDARY),
]


@pytest.mark.parametrize(("error", "kind"), EXAMPLES, ids=lambda value: getattr(value, "name", type(value).__name__))
def test_each_exception_proves_what_it_can(error: RayError, kind: FailureKind):
    assert classify_failure(error) == kind


def told(tmp_path: Path, error: RayError, phase: str = "update") -> AlignError:
    log = tmp_path / "critic-1.log"
    log.write_text("".join(f"line {number}\n" for number in range(40)))
    member = Member("critic", 1, None, log, False)
    return Failure(classify_failure(error), member, WorkerCall(phase, 3, "update", []), error).error()


def test_an_error_of_ours_arrives_as_itself_with_its_rank_and_step(tmp_path):
    error = told(tmp_path, raised(DivergedError("the loss is nan", remedy="lower the learning rate")))
    assert isinstance(error, DivergedError)
    assert error.exit_status == 79
    assert str(error) == "critic-1, update, step 3: the loss is nan\n  remedy: lower the learning rate"


def test_an_error_of_ours_that_has_a_place_keeps_it(tmp_path):
    error = told(tmp_path, raised(ModelError("no head", where="reward.path")))
    assert str(error) == "reward.path: no head"


def test_a_death_tells_its_role_and_shows_the_end_of_the_log(tmp_path):
    error = told(tmp_path, OutOfMemoryError("Task was killed due to the node running low on memory."))
    assert isinstance(error, WorkerDiedError)
    assert error.role == "critic"
    assert error.exit_status == 76
    first, *rest = str(error).splitlines()
    assert first.startswith("critic-1 died in update, step 3: out of memory, Ray killed it before the system would")
    assert first.endswith("; remedy: run again, or lower critic.max_tokens_per_micro_batch if it was memory")
    assert rest == [*(f"  | line {number}" for number in range(25, 40)), f"  log: {tmp_path / 'critic-1.log'}"]


@pytest.mark.parametrize(
    ("error", "phase", "said", "remedy"),
    [
        (
            raised(MemoryError()),
            "update",
            "ran out of memory in update, step 3: MemoryError",
            "critic.max_tokens_per_micro_batch",
        ),
        (
            raised(torch.OutOfMemoryError("CUDA: 2 GiB")),
            "generate",
            "ran out of memory in generate",
            "max_num_seqs",
        ),
        (raised(ObjectStoreFullError("full")), "update", "ObjectStoreFullError: full", "larger object store"),
        (raised(OutOfDiskError("no room")), "update", "failed in update, step 3: OutOfDiskError", "free the disk"),
        (raised(KeyError("x")), "update", "failed in update, step 3: KeyError: 'x'", "critic-1.log"),
        (GetTimeoutError("late"), "update", "its answer could not be fetched", "check the nodes"),
    ],
)
def test_other_failures_are_one_line_with_cause_and_remedy(tmp_path, error, phase, said, remedy):
    shown = told(tmp_path, error, phase)
    assert type(shown) is WorkerError
    line, _, advice = str(shown).splitlines()[0].partition("; remedy: ")
    assert line.startswith("critic-1 ")
    assert said in line
    assert remedy in advice


def test_an_exception_that_cannot_be_sent_is_known_by_its_traceback(tmp_path):
    error = RayTaskError("call", "Traceback ...\n\x1b[36mweird.Error: lost\x1b[39m", None)  # type: ignore[arg-type]
    assert "failed in update, step 3: weird.Error: lost; remedy" in str(told(tmp_path, error))


@pytest.mark.parametrize(
    ("error", "method", "step", "final"),
    [
        (ArithmeticError("no such target"), "start", 0, True),
        (ArithmeticError("no such target"), "create_worker", 0, True),
        (ArithmeticError("no such target"), "start", 3, False),  # it came up before
        (ArithmeticError("no such target"), "update", 0, False),
        (MemoryError(), "start", 0, False),
        (NCCL, "start", 0, False),
        (ActorDiedError(), "start", 0, False),
    ],
)
def test_what_a_role_raises_as_it_first_comes_up_is_final(tmp_path: Path, error: Exception, method, step, final):
    """Loading is deterministic; a process that died, or ran out of memory, may be tried again (status 76)."""
    cause = error if isinstance(error, RayError) else raised(error)
    member = Member("critic", 1, None, tmp_path / "log", False)
    found = Failure(classify_failure(cause), member, WorkerCall("load", step, method, [()]), cause).error()
    assert isinstance(found, LoadError) == final
    assert found.exit_status == (78 if final else 76)


def test_a_final_error_brings_no_role_up_again(monkeypatch: pytest.MonkeyPatch):
    recovered: list[AlignError] = []
    run: Any = SimpleNamespace(recover=lambda error, attempt: recovered.append(error))
    raising = iter([WorkerError("died"), LoadError("no such target")])

    def rounds(prepared: object, run: object) -> None:
        raise next(raising)

    monkeypatch.setattr(launch, "run_rounds", rounds)
    with pytest.raises(LoadError, match="no such target"):
        launch.run_with_recovery(cast(Any, None), run)
    assert [str(error) for error in recovered] == ["died"]
