"""Faults in workers on Ray: which one is named, with what cause, how soon; and roles without state come back."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from toy_workers import GROUP_TIMEOUT_S, Frozen, NoConstructor, NoLoad, Toy, specs

from align.cluster import actor
from align.cluster.pool import RayCluster, RayFuture, RayWorkerGroup
from align.cluster.process import STACKS, state
from align.config import ClusterConfig
from align.errors import DivergedError, WorkerError
from align.run import Clock
from align.utils import fault_injection

pytestmark = pytest.mark.slow

LATE_S = 1.0
ROLES = {"policy": Toy, "critic": Toy, "reference": Frozen, "reward": Frozen}
SECTION = ClusterConfig(start_timeout_s=200.0, call_timeout_s=60.0, phase_timeout_s={"late": LATE_S}, slots_per_core=4)


class Company:
    """Roles of two ranks each on one Ray, and what was reported."""

    def __init__(self, logs: Path):
        self.logs, self.clock = logs, Clock()
        self.reported: list[str] = []
        self.cluster = RayCluster(SECTION, 8, report=self.reported.append)
        self.ranks: dict[str, RayWorkerGroup] = {}

    def bring_up(self, roles: dict[str, type[Toy]], size: int) -> dict[str, RayWorkerGroup]:
        """New processes, in place of all that are there; ``size`` ranks a role."""
        self.cluster.end_workers()
        slots = [tuple(range(size * index, size * index + size)) for index in range(len(roles))]
        wanted = {name: (roles[name], specs(name, size), there) for name, there in zip(roles, slots, strict=True)}
        self.ranks = self.cluster.start_roles(wanted, self.logs, self.clock)
        return self.ranks

    def send(self, role: str, method: str, *arguments: object, phase: str = "update") -> RayFuture:
        """The answers of all ranks."""
        ranks = self.ranks[role]
        return ranks.call(phase, getattr(Toy, method), ranks.everywhere(*arguments), list)

    def log(self, role: str, rank: int) -> str:
        """What a worker wrote."""
        return (self.logs / f"{role}-{rank}.log").read_text()

    def process(self, role: str, rank: int) -> int:
        """Its number."""
        place = self.ranks[role].members[rank].place
        assert place is not None
        return place.pid


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    """Ray without a role."""
    company = Company(tmp_path_factory.mktemp("logs"))
    with company.cluster:
        yield company


@pytest.fixture(scope="module")
def company(alone: Company) -> Company:
    """Four roles. The first tests of this file leave them whole, later ones kill one after the other."""
    alone.bring_up(ROLES, 2)
    return alone


@pytest.fixture(autouse=True)
def step(alone: Company) -> Iterator[int]:
    """A step of its own for each test, and no fault or report of another."""
    alone.clock.step += 1
    alone.reported.clear()
    yield alone.clock.step
    fault_injection.arm(None)


def gone(pid: int) -> bool:
    """Whether a process ends within five seconds."""
    deadline = time.monotonic() + 5.0
    while state(pid) not in ("", "Z") and time.monotonic() < deadline:
        time.sleep(0.05)
    return state(pid) in ("", "Z")


def wait_for_save(asked: RayFuture) -> None:
    """Let all ranks come to an end of a call that failed; collective calls do by their timeout."""
    references = asked._call.references
    assert len(ray.wait(references, num_returns=len(references), timeout=60.0)[0]) == len(references)


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]


@pytest.mark.full
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("hang", "fault", "said"),
    [
        ("stopped", "sigstop", "it does not react: it is stopped (SIGSTOP)"),
        ("lock", "gil", "in raise_fault (align/utils/fault_injection.py"),
        ("loop", None, "in meet (tests/cluster/toy_workers.py"),
        ("deadlock", None, "waits for its peers in recv"),
    ],
)
def test_a_hang_is_named_with_stacks_of_all(company: Company, step: int, tmp_path: Path, role, hang, fault, said):
    free = tmp_path / "free"
    sizes = {log: log.stat().st_size for log in company.logs.iterdir()}
    company.send(role, "regroup", str(tmp_path)).result()
    fault_injection.arm(f"role={role},rank=1,phase=late,step={step},kind={fault}" if fault else None)
    begun = time.monotonic()
    asked = company.send(role, "meet", hang, free, phase="late")
    with pytest.raises(WorkerError) as caught:
        asked.result()
    took = time.monotonic() - begun
    print(f"\nhang {hang} {role}: {took - LATE_S:.2f} s beyond its deadline")
    os.kill(company.process(role, 1), signal.SIGCONT)
    free.touch()
    assert took < LATE_S + 30.0  # call_timeout_s is 60
    named = f"{role}-0, {role}-1" if hang == "deadlock" else f"{role}-1"
    line = first_line(caught.value)
    assert line.startswith(f"{named}: no answer to late within 1 s, step {step}: ")
    assert said in line
    assert "raise cluster.phase_timeout_s.late" in line
    first = next(text for text in str(caught.value).splitlines() if text.startswith(f"  | {role}-0: "))
    assert "waits for its peers in " in first
    for log, size in sizes.items():
        written = log.read_text()[size:]
        assert "(most recent call first)" in written or log.name == f"{role}-1.log", log.name
    wait_for_save(asked)
    company.send(role, "regroup", f"{tmp_path}-after").result()


@pytest.mark.parametrize(
    ("how", "line", "remedy"),
    [
        ("cuda", "ran out of memory in generate, step {}: OutOfMemoryError: CUDA out of", "policy.max_num_seqs"),
        ("host", "ran out of memory in generate, step {}: MemoryError", "policy.max_num_seqs"),
        ("store", "failed in generate, step {}: ObjectStoreFullError: Failed to put", "larger object store"),
        ("lock", "failed in generate, step {}: TypeError: cannot pickle '_thread.lock' object", "policy-"),
    ],
)
def test_a_failure_without_peers_has_its_cause_and_remedy(company: Company, step: int, how, line, remedy):
    with pytest.raises(WorkerError) as caught:
        company.send("policy", "fail", how, phase="generate").result()
    said, _, advice = first_line(caught.value).partition("; remedy: ")
    assert said[: len("policy-")] == "policy-"
    assert said.partition(" ")[2].startswith(line.format(step))
    assert remedy in advice
    assert "log: " in str(caught.value)


def test_a_memory_fault_on_purpose_names_micro_batches(company: Company, step: int):
    fault_injection.arm("role=critic,rank=1,phase=update,kind=oom")
    with pytest.raises(WorkerError) as caught:
        company.send("critic", "double", torch.ones(1)).result()
    line = first_line(caught.value)
    assert line.startswith(f"critic-1 ran out of memory in update, step {step}: MemoryError: a fault on purpose")
    assert line.endswith("lower critic.max_tokens_per_micro_batch if it was memory")


@pytest.mark.parametrize(("how", "error"), [("diverged", DivergedError), ("bug", WorkerError)])
def test_who_raised_is_named_while_its_peer_waits(company: Company, step: int, tmp_path: Path, how, error):
    begun = time.monotonic()
    asked = company.send("policy", "meet", how)
    with pytest.raises(error) as caught:
        asked.result()
    assert time.monotonic() - begun < 4.0
    assert first_line(caught.value).startswith(
        f"policy-1, update, step {step}: the loss is nan"
        if how == "diverged"
        else f"policy-1 failed in update, step {step}: ArithmeticError: seven is not eight"
    )
    wait_for_save(asked)
    company.send("policy", "regroup", f"{tmp_path}-after").result()


def looked_at(asked: RayFuture) -> float:
    """Seconds until it calls itself done."""
    begun = time.monotonic()
    while not asked.done():
        assert time.monotonic() - begun < 30.0
        time.sleep(0.01)
    return time.monotonic() - begun


def test_who_looks_now_and_then_hears_of_a_failure_while_its_peer_waits(company: Company, step: int, tmp_path: Path):
    ranks = company.ranks["policy"]
    asked = ranks.call("update", Toy.meet, [("deadlock",), ("bug",)], list)
    assert looked_at(asked) < GROUP_TIMEOUT_S / 2
    with pytest.raises(WorkerError, match=f"policy-1 failed in update, step {step}: ArithmeticError"):
        asked.result()
    wait_for_save(asked)
    company.send("policy", "regroup", f"{tmp_path}-after").result()


def test_who_looks_now_and_then_hears_of_a_deadline_which_runs_from_the_first_look(company: Company, step: int):
    asked = company.send("critic", "sleep", LATE_S + 4.0, phase="late")
    assert LATE_S / 2 < looked_at(asked) < LATE_S + 3.0
    begun = time.monotonic()
    with pytest.raises(WorkerError, match=f"critic-0, critic-1: no answer to late within 1 s, step {step}"):
        asked.result()
    assert time.monotonic() - begun < LATE_S
    wait_for_save(asked)


def test_who_looks_now_and_then_hears_that_ray_is_gone(company: Company, monkeypatch: pytest.MonkeyPatch):
    asked = company.send("critic", "sleep", 6.0)
    monkeypatch.setattr(company.cluster.monitor, "daemons", SimpleNamespace(dead=lambda: "the raylet at here:1"))
    assert looked_at(asked) < 4.0
    with pytest.raises(WorkerError, match="the raylet at here:1, is gone"):
        asked.result()
    company.cluster.monitor.broken = False
    wait_for_save(asked)


@pytest.mark.parametrize(("kind", "number"), [("nan_answer", "nan"), ("inf_answer", "inf")])
def test_an_answer_spoilt_on_purpose_is_spoilt_once_and_on_one_rank(company: Company, kind: str, number: str):
    fault_injection.arm(f"role=reward,rank=1,phase=score,kind={kind}")
    whole, spoilt = company.send("reward", "double", torch.ones(2), phase="score").result()
    assert whole.tolist() == [2.0, 2.0]
    assert str(spoilt[0].item()) == number
    assert spoilt[1] == 2.0
    assert [one.tolist() for one in company.send("reward", "double", torch.ones(2), phase="score").result()] == [
        [2, 2]
    ] * 2


def test_what_cannot_be_sent_is_refused_before_it_is(company: Company):
    with pytest.raises(WorkerError, match="policy: update, step .* cannot be sent to its workers: TypeError"):
        company.send("policy", "double", threading.Lock())


def test_a_second_signal_ends_a_wait_within_a_second(company: Company):
    told = threading.Event()

    def interrupted() -> None:
        if told.is_set():
            raise KeyboardInterrupt

    company.cluster.monitor.interrupted = interrupted
    threading.Timer(0.5, told.set).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        company.send("critic", "sleep", 4.0).result()
    company.cluster.monitor.interrupted = lambda: None
    assert time.monotonic() - begun < 2.5


def test_workers_of_other_nodes_are_signalled_by_a_task_there(company: Company, monkeypatch: pytest.MonkeyPatch):
    """Here the only node stands for another one."""
    elsewhere = SimpleNamespace(get_node_id=lambda: "the driver's node")
    monkeypatch.setattr(actor.ray, "get_runtime_context", lambda: elsewhere)
    members = company.ranks["critic"].members
    sizes = [member.log.stat().st_size for member in members]
    assert actor.signal_all(members, STACKS, elsewhere=False) == {}
    states = actor.signal_all(members, STACKS)
    assert states.keys() == {"critic-0", "critic-1"}
    assert set(states.values()) <= {"S", "R"}
    time.sleep(0.3)
    for member, size in zip(members, sizes, strict=True):
        assert member.log.read_text()[size:].count("Current thread") == 1


@pytest.mark.parametrize(
    ("role", "kind"), [("reference", "sigkill"), pytest.param("reward", "exit", marks=pytest.mark.full)]
)
def test_a_role_without_state_comes_back_with_equal_answers(company: Company, step: int, role: str, kind: str):
    """Rank 1 dies at the call; the other calls under way are asked again too; the other roles keep their processes."""
    company.cluster.restarts_left = 1
    numbers = torch.arange(3.0)
    expected = company.send(role, "double", numbers).result()
    others = {name: company.process(name, 0) for name in ROLES if name != role}
    before = [company.process(role, rank) for rank in (0, 1)]
    fault_injection.arm(f"role={role},rank=1,phase=score,step={step},kind={kind}")
    begun = time.monotonic()
    asked = [company.send(role, "summed", numbers, phase="score"), company.send(role, "double", numbers)]
    summed, doubled = asked[1].result(), asked[0].result()
    print(f"\nrenewed {role} after {kind}: {time.monotonic() - begun:.2f} s")
    assert all(torch.equal(a, b) for a, b in zip(expected, summed, strict=True))
    assert all(torch.equal(one, 2 * numbers) for one in doubled)
    assert all(map(gone, before))
    assert others == {name: company.process(name, 0) for name in others}
    (line,) = company.reported
    assert line.startswith(f"{role}-1 died in score, step {step}: ") or line.startswith(f"{role}-1 died in update")
    assert f"restarting the stateless role {role}, 0 restarts left" in line


@pytest.mark.full
def test_a_role_that_dies_again_while_it_comes_up_counts_twice(company: Company):
    company.cluster.restarts_left = 2
    fault_injection.arm("role=reward,rank=0,phase=load,kind=sigkill")
    os.kill(company.process("reward", 1), signal.SIGKILL)
    company.send("reward", "double", torch.ones(1)).result()
    assert [line.split(" died in ")[0] for line in company.reported] == ["reward-1", "reward-0"]
    assert "reward-0 died in load" in company.reported[1]


@pytest.mark.full
def test_restarts_come_to_an_end(company: Company, step: int):
    company.cluster.restarts_left = 0
    fault_injection.arm("role=reward,rank=0,phase=score,kind=sigkill")
    with pytest.raises(WorkerError, match=f"reward-0 died in score, step {step}: its process exited"):
        company.send("reward", "double", torch.ones(1), phase="score").result()
    assert company.reported == []


@pytest.mark.parametrize(("role", "kind"), [("policy", "sigkill"), ("critic", "exit")])
def test_a_role_with_state_never_comes_back_and_its_dead_rank_is_named(company: Company, step: int, role, kind):
    """Rank 0 waits in a collective call, and its gloo error comes at the same time as the death."""
    company.cluster.monitor.members.pop("reward", None)  # has lost its processes above
    company.cluster.monitor.calls.clear()
    company.cluster.restarts_left = 5
    fault_injection.arm(f"role={role},rank=1,phase=update,kind={kind}")
    begun = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        company.send(role, "summed", torch.ones(1)).result()
    took = time.monotonic() - begun
    print(f"\ndeath by {kind} told after {took:.2f} s")
    assert took < 30.0  # call_timeout_s is 60
    line = first_line(caught.value)
    assert line.startswith(f"{role}-1 died in update, step {step}: its process exited unexpectedly")
    assert f"; remedy: run again, or lower {role}.max_tokens_per_micro_batch" in line
    assert str(company.logs / f"{role}-1.log") in str(caught.value)
    assert company.reported == []


def test_a_policy_in_trouble_while_it_sends_is_named_and_not_its_sampler(alone: Company, step: int):
    """It is slow at first, and then it dies."""
    policy = alone.bring_up({"policy": Toy, "sampler": Toy}, 1)["policy"]
    alone.cluster.restarts_left = 5

    def send() -> RayFuture:
        return alone.send("sampler", "receive", policy.start(Toy.weights, policy.everywhere())[0], phase="late")

    assert send().result() == [3.0]
    assert alone.cluster.started == []  # nothing holds the weights any more
    fault_injection.arm("role=policy,phase=sync,kind=sigstop")
    with pytest.raises(WorkerError) as caught:
        send().result()
    assert first_line(caught.value).startswith(
        f"policy-0: no answer to late within 1 s, step {step}: it does not react"
    )
    assert "waited for: sampler-0" in str(caught.value)
    os.kill(alone.process("policy", 0), signal.SIGCONT)
    alone.send("policy", "process").result()
    fault_injection.arm("role=policy,phase=sync,kind=sigkill")
    with pytest.raises(WorkerError) as caught:
        send().result()
    assert first_line(caught.value).startswith(f"policy-0 died in sync, step {step}: ")


@pytest.mark.full
@pytest.mark.parametrize(
    ("worker", "fault", "line"),
    [
        (NoConstructor, None, "policy-0 failed in start, step {}: LookupError: no home for rank 0"),
        (NoLoad, None, "policy-0 failed in load, step {}: LookupError: no weights here"),
        (Toy, "phase=start,kind=sigkill", "policy-0 died in start, step {}: its process exited"),
        (Toy, "phase=load,kind=exit", "policy-0 died in load, step {}: its process exited"),
    ],
)
def test_who_cannot_come_up_is_named_and_leaves_nothing(alone: Company, step: int, worker, fault, line):
    fault_injection.arm(fault)
    with pytest.raises(WorkerError) as caught:
        alone.bring_up({"policy": worker}, 1)
    assert first_line(caught.value).startswith(line.format(step))
    members = alone.cluster.monitor.members["policy"]
    alone.cluster.end_workers()
    assert all(gone(one.place.pid) for one in members if one.place is not None)
