"""A process that is killed anywhere in a save leaves the old checkpoint or the new one, whole, and never a mixture."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from align.utils import fault_injection

pytestmark = pytest.mark.usefixtures("without_fsync")
STEPS = (10, 20, 30)
POINTS = ("checkpoint", "shard", "manifest", "publish", "retain")
CALLS = ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir")
"""Through which the store and the library change folders."""


def outcome(work: Callable[[], None]) -> int:
    """How a child ends that does ``work``: 0, or the negative number of the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def save_all(small, folder, keep_latest: int) -> None:
    store = small.make_store(folder, keep_latest=keep_latest)
    for step in STEPS if keep_latest > 1 else STEPS[:2]:
        small.save(store, step)


def check_and_go_on(small, folder, keep_latest: int) -> int:
    """What the next owner of the run finds: the step of the newest checkpoint, 0 for none."""
    store = small.make_store(folder, keep_latest=keep_latest, epoch=1)
    store.clean()
    assert not folder.exists() or small.torsos(folder) == []
    there = store.steps()
    for step in there:
        small.check_whole(store.open(folder / f"step-{step:06d}"))
    found = store.newest()
    assert (found.manifest.step if found else 0) == max(there, default=0)
    small.save(store, 40)
    small.check_whole(store.newest())
    assert store.steps() == [*there, 40][-keep_latest:]
    assert (folder / "latest").read_text() == "step-000040\n"
    assert small.torsos(folder) == [] and store.notes == []
    return max(there, default=0)


def kill_at_each(arm: Callable[[int], None], small, tmp_path, keep_latest: int) -> Iterator[int]:
    """The newest step after a kill at the first point, the second, ...; ``arm`` is called in the child."""
    for at in range(1, 1000):
        folder = tmp_path / str(at) / "checkpoints"
        folder.parent.mkdir()

        def work(at=at, folder=folder) -> None:
            arm(at)
            save_all(small, folder, keep_latest)

        status = outcome(work)
        if status == 0:
            return
        assert status == -signal.SIGKILL
        yield check_and_go_on(small, folder, keep_latest)


@pytest.mark.parametrize("keep_latest", [1, 2])
def test_there_are_points_enough(tmp_path, small, monkeypatch, keep_latest):
    met: list[str] = []
    monkeypatch.setattr(fault_injection, "maybe_inject", lambda role, rank, point, step: met.append(point))
    save_all(small, tmp_path / "checkpoints", keep_latest)
    # for each step 8 files; 4 folders, rename, parent, pointer, its rename; two for the one deletion
    steps = keep_latest + 1
    assert Counter(met) == {
        "checkpoint": steps,
        "shard": 8 * steps,
        "manifest": steps,
        "publish": 8 * steps,
        "retain": 2,
    }
    assert len(met) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("keep_latest", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_killed_before_each_point(tmp_path, small, point, keep_latest):
    def arm(at: int) -> None:
        fault_injection.arm(f"role=driver,phase={point},at={at},kind=sigkill")

    newest = list(kill_at_each(arm, small, tmp_path, keep_latest))
    steps = STEPS[: keep_latest + 1]
    before = (0, *steps[:-1])
    wanted = {
        "checkpoint": list(before),
        "shard": [step for step in before for _ in range(8)],
        "manifest": list(before),
        # 4 folders and the rename, which has happened from the sixth on
        "publish": [step for pair in zip(before, steps, strict=True) for step in (*pair[:1] * 5, *pair[1:] * 3)],
        "retain": [steps[-1]] * 2,
    }
    assert newest == wanted[point]


@pytest.mark.slow
def test_killed_after_each_call_that_changes_a_folder(tmp_path, small):
    def arm(at: int) -> None:
        calls = 0

        def deadly(call):
            def wrapped(*arguments, **named):
                nonlocal calls
                result = call(*arguments, **named)
                calls += 1
                if calls == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return wrapped

        for name in CALLS:
            setattr(os, name, deadly(getattr(os, name)))

    newest = list(kill_at_each(arm, small, tmp_path, keep_latest=1))
    assert len(newest) >= 50
    assert newest == sorted(newest) and set(newest) == {0, 10, 20}
