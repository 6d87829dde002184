"""Workers on Ray when something is wrong: what the driver says, and how soon."""

import os
import re
import signal
import time

import pytest

from align.cluster.pool import RayCluster
from align.config import ClusterConfig, ModelConfig
from align.errors import PlacementError, WorkerError
from align.run import Clock
from align.workers.base import Worker, WorkerSpec, worker_method

pytestmark = pytest.mark.slow


class Toy(Worker):
    """A worker without a model that does as it is told."""

    def start(self, host: str, port: int) -> None:
        self.addressed = (host, port)

    @worker_method
    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    @worker_method
    def process(self) -> int:
        return os.getpid()

    @worker_method
    def fail(self) -> None:
        raise ArithmeticError("seven is not eight")

    @worker_method
    def sleep(self, seconds: float) -> int:
        time.sleep(seconds)
        return self.spec.rank

    @worker_method
    def die(self, rank: int) -> None:
        if self.spec.rank != rank:
            time.sleep(60)
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


SECTION = ClusterConfig(start_timeout_s=120.0, call_timeout_s=60.0, phase_timeout_s={"late": 1.0})


ANNOUNCED: list[str] = []


@pytest.fixture(scope="module")
def cluster():
    """Three slots."""
    with RayCluster(SECTION, 3, announce=ANNOUNCED.append) as running:
        yield running


@pytest.fixture(scope="module")
def ranks(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory):
    """A role of three ranks, a slot each. The tests below run in order, and the one that kills a rank comes last."""
    specs = [WorkerSpec("toy", rank, 3, ModelConfig(path="-"), 0, 1, 20.0) for rank in range(3)]
    return cluster.start_roles({"toy": (Toy, specs, (0, 1, 2))}, tmp_path_factory.mktemp("logs"), Clock())["toy"]


def test_each_start_is_announced_and_each_log_begins_at_once(ranks):
    lines = [re.sub(r"[\d.]+ s\b", "N s", line) for line in ANNOUNCED]
    assert lines == [
        "starting Ray on this machine, for 3 slots",
        "Ray: up in N s (slots 3, nodes 1)",
        f"toy: starting on slots 0-2, logs in {ranks.spec.logs[0].parent}",
        "toy: loading -, processes are up after N s",
        "toy: ready after N s",
    ]
    for rank, log in enumerate(ranks.spec.logs):
        assert f"toy-{rank}: starting a process on slot {rank}" in log.read_text().splitlines()[0]


def test_answers_come_in_rank_order_with_their_time(ranks):
    value = ranks.call("sleep", Toy.sleep, [(0.4,), (0.0,), (0.0,)], list).result()
    assert value == [0, 1, 2]
    assert 0.4 <= ranks.clock.busy["sleep"] < 2.0
    processes = ranks.call("process", Toy.process, ranks.everywhere(), list).result()
    assert len({*processes, os.getpid()}) == 4


def test_threads_are_shared_out_and_telemetry_is_off(ranks):
    def of(name: str) -> set[str | None]:
        return set(ranks.call("environment", Toy.environment, ranks.everywhere(name), list).result())

    assert of("OMP_NUM_THREADS") == {str(max(1, (os.cpu_count() or 1) // 3))}
    assert of("GOMP_SPINCOUNT") == {"0"}
    assert of("RAY_USAGE_STATS_ENABLED") == {"0"}
    assert of("HF_HUB_DISABLE_TELEMETRY") == {"1"}


def test_an_exception_comes_with_its_traceback_and_log(ranks):
    with pytest.raises(WorkerError) as caught:
        ranks.call("fail", Toy.fail, ranks.everywhere(), list).result()
    message = str(caught.value)
    assert message.startswith("toy-")
    assert "failed in fail" in message
    assert "ArithmeticError: seven is not eight" in message
    assert "log: " in message


def test_a_late_answer_names_who_and_what(ranks):
    with pytest.raises(WorkerError, match="toy-1: no answer to late within 1 s, step 0: in sleep") as caught:
        ranks.call("late", Toy.sleep, [(0.0,), (6.0,), (0.0,)], list).result()
    assert "raise cluster.phase_timeout_s.late" in str(caught.value)


def test_a_dead_rank_ends_the_wait_at_once_though_its_peer_hangs(ranks):
    begun = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        ranks.call("die", Toy.die, ranks.everywhere(1), list).result()
    assert time.monotonic() - begun < 30.0  # the peer sleeps for 60 s
    message = str(caught.value)
    assert message.startswith("toy-1 died in die")
    assert "last words" in message
    assert str(ranks.members[1].log) in message


def test_a_placement_that_does_not_fit_is_refused_at_once(cluster):
    cluster.__exit__()  # one Ray at a time in a process
    there = (os.cpu_count() or 1) * 2
    begun = time.monotonic()
    with pytest.raises(PlacementError) as caught, RayCluster(SECTION, there + 3):
        pass
    assert time.monotonic() - begun < 60.0  # cluster.start_timeout_s is 120
    message = str(caught.value)
    assert f"asks for {there + 3} slots, {there} are there" in message
    assert "3 are missing" in message
    assert "slots_per_core" in message
