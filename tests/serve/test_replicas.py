"""Replicas of the reward service by Ray Serve, with Ray replaced by fakes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from align.config import CheckpointRewardConfig, ReplicasConfig, RewardServiceConfig
from align.data.chat import Dialogue, Message
from align.errors import PlacementError
from align.rewards import http_protocol

replicas = pytest.importorskip("align.serve.replicas", reason="needs the extra 'serve'")

DIALOGUES = [Dialogue((Message("user", f"copy {word}"),), word) for word in ("b", "d e", "a b c", "c c c c")]


@pytest.mark.parametrize(
    "error",
    [
        replicas.RayServeException("no controller"),
        replicas.RayError("gone"),
        KeyError("reward"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_while_ray_serve_cannot_say_there_is_no_replica(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def status() -> Any:
        if broken:
            raise error
        deployment = SimpleNamespace(replica_states={"RUNNING": 2, "STARTING": 1})
        return SimpleNamespace(applications={"reward": SimpleNamespace(deployments={"reward": deployment})})

    monkeypatch.setattr(replicas.serve, "status", status)
    monkeypatch.setattr(replicas, "STATUS_S", 0.0)
    scorer, broken = replicas.ReplicaBackend(None), False
    assert asyncio.run(scorer.replicas()) == 2
    last, broken = scorer.last_running, True
    assert asyncio.run(scorer.replicas()) == 0 and scorer.last_running == last


def test_faults_of_ray_and_of_ray_serve_are_503():
    unavailable = replicas.serve.exceptions.DeploymentUnavailableError
    assert not issubclass(unavailable, replicas.RayError)
    for error in (unavailable("reward"), replicas.ray.exceptions.RayActorError()):

        async def remote(_: Any, error: Exception = error) -> Any:
            raise error

        handle = SimpleNamespace(score=SimpleNamespace(remote=remote))
        with pytest.raises(http_protocol.HTTPError) as refused:
            asyncio.run(replicas.ReplicaBackend(handle).score(DIALOGUES))  # type: ignore[arg-type]
        assert (refused.value.status, refused.value.retry_after_s) == (503, replicas.RESTARTING_S)
        assert type(error).__name__ in refused.value.message


@pytest.mark.parametrize(
    ("gpus", "resources", "room"),
    [
        (0.6, {"GPU": 2.0, "CPU": 8.0}, 2),  # 3 * 0.6 is less than 2, yet no GPU holds two
        (0.5, {"GPU": 2.0, "CPU": 8.0}, 4),
        (0.3, {"GPU": 1.0, "CPU": 8.0}, 3),
        (0.1, {"GPU": 1.0, "CPU": 8.0}, 10),
        (1.0, {"GPU": 2.0, "CPU": 8.0}, 2),
        (None, {"GPU": 2.0, "CPU": 8.0}, 2),
        (0.0, {"GPU": 2.0, "CPU": 8.0}, 8),
        (None, {"CPU": 4.0}, 4),
        (0.5, {"CPU": 4.0}, 0),
    ],
)
def test_how_many_replicas_there_is_room_for(
    gpus: float | None, resources: dict[str, float], room: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(replicas.ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(replicas.serve, "deployment", lambda _, **options: options)

    def options(number: int) -> Any:
        return replicas._deployment(
            RewardServiceConfig(
                reward=CheckpointRewardConfig(path="m"), replicas=ReplicasConfig(min=number, max=number, gpus=gpus)
            )
        )["ray_actor_options"]

    with pytest.raises(PlacementError, match=f"there is room for {room}: "):
        options(room + 1)
    if room:
        request = options(room)
        cards = 0 if gpus == 0 or "GPU" not in resources else gpus or 1.0
        assert (request["num_gpus"], request["num_cpus"]) == (cards, 0 if cards else 1)
