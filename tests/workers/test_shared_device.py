"""Roles on one GPU give memory back after each call, and what CUDA's branch of a process group is called with."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from align.cluster import roles
from align.config import ClusterConfig, PolicyConfig, ReferenceConfig
from align.engines import distributed
from align.run import Clock
from align.workers.base import Worker, WorkerSpec, worker_method


class Calculator(Worker):
    """A worker without a model."""

    @worker_method
    def double(self, number: float) -> float:
        """Twice a number."""
        return 2 * number

    @worker_method
    def fail(self) -> None:
        """Not a number."""
        raise ArithmeticError("seven is not eight")


def spec(**changes: Any) -> WorkerSpec:
    return WorkerSpec("policy", 0, 1, PolicyConfig(path="-"), 0, 1, 1.0, **changes)


@pytest.mark.parametrize(("shares", "on_gpu", "times"), [(True, True, 2), (False, True, 0), (True, False, 0)])
def test_caches_are_released_after_each_call_also_a_failed_one(monkeypatch, shares: bool, on_gpu: bool, times: int):
    released: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append(True))
    worker = Calculator(spec(shares_device=shares))
    assert worker.double(4.0).value == 8.0
    with pytest.raises(ArithmeticError):
        worker.fail()
    assert len(released) == times


def specs_of(monkeypatch: pytest.MonkeyPatch, slots: dict[str, tuple[int, ...]], section: ClusterConfig) -> Any:
    """The worker specs that would start on Ray, by role."""
    started: dict[str, list[WorkerSpec]] = {}

    class Recorder:
        def __init__(self, *_: Any):
            pass

        def __enter__(self) -> Recorder:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def start_roles(self, workers: Any, *_: Any) -> dict[str, Any]:
            started.update({name: specs for name, (_, specs, _) in workers.items()})
            return dict.fromkeys(workers)

    monkeypatch.setattr(roles, "RayCluster", Recorder)
    monkeypatch.setattr(roles, "_role_class", lambda name, config: type("Role", (), {"worker": Calculator, **ROLE}))
    configs = {name: (PolicyConfig if name == "policy" else ReferenceConfig)(path="-") for name in slots}
    with roles.start_roles(configs, "ray", slots, section, Path("logs"), roles.StartOptions(clock=Clock())):
        pass
    return started


ROLE = {"__init__": lambda self, ranks, section: None}


def test_roles_know_whether_another_one_has_a_slot_of_theirs(monkeypatch):
    slots = {"policy": (0, 1), "reference": (1, 2), "critic": (3,)}
    started = specs_of(monkeypatch, slots, ClusterConfig())
    assert {name: {item.shares_device for item in made} for name, made in started.items()} == {
        "policy": {True},
        "reference": {True},
        "critic": {False},
    }


@pytest.mark.parametrize(
    ("section", "seconds"),
    [
        (ClusterConfig(), 600.0),
        (ClusterConfig(call_timeout_s=60.0), 60.0),
        (ClusterConfig(phase_timeout_s={"collective": 45.0}), 45.0),
    ],
)
def test_a_collective_has_a_limit_of_its_own(monkeypatch, section: ClusterConfig, seconds: float):
    started = specs_of(monkeypatch, {"policy": (0,)}, section)
    assert started["policy"][0].collective_timeout_s == seconds
    assert started["policy"][0].timeout_s == section.call_timeout_s


def test_options_of_gpus_are_set_before_a_gpu_is_used_and_only_there(monkeypatch):
    made: list[Any] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode, warn_only: made.append((mode, warn_only)))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", made.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    distributed.set_cuda_options(("deterministic", "tf32"))
    assert made == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    distributed.set_cuda_options(())
    assert made == []
    distributed.set_cuda_options(("deterministic", "tf32"))
    assert made == ["high", (True, True)]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.backends.cudnn.benchmark is False


def test_a_group_on_gpus_connects_at_once_through_its_own_device(monkeypatch):
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: calls.append({"backend": backend} | options)
    )
    monkeypatch.setattr(distributed.deepspeed, "init_distributed", lambda backend: None)
    device = distributed.initialize(dist.HashStore(), 3, 8, 12.0)
    assert device == torch.device("cuda", 0)
    (made,) = calls
    assert (made["backend"], made["rank"], made["world_size"]) == ("nccl", 3, 8)
    assert (made["timeout"], made["device_id"]) == (timedelta(seconds=12), device)
