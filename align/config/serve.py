"""What `align serve reward` reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from align.config.rewards import CheckpointRewardConfig, EnsembleRewardConfig, FunctionRewardConfig

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Hosts that only this machine reaches."""


@dataclass(frozen=True)
class ReplicasConfig:
    """Copies of the reward model, each in a process of its own (``executor: ray``)."""

    min: int = 1
    """Replicas at the start, and the fewest."""
    max: int = 1
    """The most. Above ``min``, Ray Serve starts and ends replicas as requests come."""
    target_requests: float = 4.0
    """Requests under way for each replica that it aims at."""
    gpus: float | None = None
    """GPUs of a replica, at most 1; a fraction lets several share one. None: 1 where the machine has GPUs, else 0."""
    shards: int = 1
    """GPUs, or CPU slots where there are none, over which the weights are spread by ZeRO 3: for a model that one GPU
    cannot hold. Above 1 there is one replica, and no Ray Serve."""

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.max:
            raise ValueError(f"min must be at least 1, and max at least min: {self.min}, {self.max}")
        if self.target_requests <= 0:
            raise ValueError(f"target_requests must be positive: {self.target_requests}")
        if self.gpus is not None and not 0 <= self.gpus <= 1:
            raise ValueError(f"gpus lies from 0 to 1: {self.gpus}; spread a larger model by shards")
        if self.shards < 1 or (self.shards > 1 and (self.max > 1 or self.gpus is not None)):
            raise ValueError(
                f"shards must be at least 1; above 1, max is 1 and gpus is not given: {self.shards}, {self.max}, "
                f"{self.gpus}"
            )


@dataclass(frozen=True)
class RewardServiceConfig:
    """A reward model behind HTTP: docs/reward_service.md."""

    reward: CheckpointRewardConfig | EnsembleRewardConfig | FunctionRewardConfig = field(
        default_factory=CheckpointRewardConfig
    )
    """The judge, of any kind but ``http`` and ``generative``."""
    executor: Literal["local", "ray"] = "ray"
    """``ray``: replicas by Ray Serve, on a Ray of the service's own on 127.0.0.1. ``local``: one in this process."""
    dir: str = "runs/reward-service"
    """Folder of logs, and of the files of a Slurm job."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but 127.0.0.1, ::1 and localhost needs a token."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    token_env: str = ""
    """Name of the environment variable that holds the bearer token, of 16 characters and more; empty asks for none."""
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    """Copies of the model."""
    max_batch_size: int = 64
    """Conversations that start a batch at once. ``reward.max_tokens_per_micro_batch`` bounds one forward pass."""
    batch_wait_s: float = 0.01
    """Seconds that a batch waits for more requests."""
    max_conversations: int = 256
    """Conversations of one request."""
    max_request_bytes: int = 16777216
    """Length of a request's body."""
    max_queue: int = 4096
    """Conversations that are waited for at a time; further requests get status 429."""
    request_timeout_s: float = 300.0
    """Seconds until a request gets status 504. A replica whose batch takes longer is replaced."""
    start_timeout_s: float = 1800.0
    """Seconds for replicas to load; later, how long the service may be without any before it ends with status 76."""
    stop_timeout_s: float = 60.0
    """Seconds for requests under way when the service is asked to stop."""

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and not self.token_env:
            raise ValueError(f"host {self.host} can be reached from elsewhere: it needs token_env=NAME")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port lies from 0 to 65535: {self.port}")
        numbers = (self.max_batch_size, self.max_conversations, self.max_request_bytes)
        if min(numbers) < 1 or self.max_queue < self.max_conversations:
            raise ValueError(
                "max_batch_size, max_conversations and max_request_bytes must be positive, max_queue at least "
                f"max_conversations: {', '.join(map(str, numbers))}, {self.max_queue}"
            )
        seconds = (self.request_timeout_s, self.start_timeout_s, self.stop_timeout_s)
        if min(seconds) <= 0 or self.batch_wait_s < 0:
            raise ValueError(
                "request_timeout_s, start_timeout_s and stop_timeout_s must be positive, batch_wait_s not negative: "
                f"{', '.join(map(str, seconds))}, {self.batch_wait_s}"
            )
        if self.replicas.shards > 1 and (self.executor == "local" or self.reward.zero_stage != 3):
            raise ValueError(
                f"replicas.shards above 1 needs executor ray and reward.zero_stage 3: {self.executor}, "
                f"{self.reward.zero_stage}"
            )
