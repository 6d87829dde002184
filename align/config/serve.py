"""Schema of ``align serve reward``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from align.config.rewards import CheckpointRewardConfig, EnsembleRewardConfig, FunctionRewardConfig

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Hosts that only this machine reaches."""


@dataclass(frozen=True)
class ReplicasConfig:
    """Copies of the reward model, each in a separate process (``executor: ray``)."""

    min: int = 1
    """Replicas at the start, and the minimum."""
    max: int = 1
    """The maximum. Above ``min``, Ray Serve adds and removes replicas with the load."""
    target_requests: float = 4.0
    """Target of the load: requests in flight per replica."""
    gpus: float | None = None
    """GPUs of a replica, at most 1; a fraction lets several share one. Null: 1 if the machine has GPUs, else 0."""
    shards: int = 1
    """GPUs, or CPU slots if there are none, over which ZeRO 3 shards the weights, for a model that one GPU cannot hold.
    Above 1 there is one replica, without Ray Serve."""

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
    """A reward model served over HTTP."""

    reward: CheckpointRewardConfig | EnsembleRewardConfig | FunctionRewardConfig = field(
        default_factory=CheckpointRewardConfig
    )
    """The reward model, of any kind except ``http`` and ``generative``."""
    executor: Literal["local", "ray"] = "ray"
    """``ray``: replicas by Ray Serve, on a Ray cluster that the service starts on 127.0.0.1. ``local``: one replica in
    this process."""
    dir: str = "runs/reward-service"
    """Folder of logs, and of the files of a Slurm job."""
    host: str = "127.0.0.1"
    """Address to listen on. Any except 127.0.0.1, ::1 and localhost requires a token."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    token_env: str = ""
    """Name of the environment variable that holds the bearer token, of at least 16 characters; empty requires none."""
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    """Copies of the model."""
    max_batch_size: int = 64
    """Maximum number of conversations of a batch, which then starts at once. ``reward.max_tokens_per_micro_batch``
    bounds one forward pass."""
    batch_wait_s: float = 0.01
    """Seconds that a batch waits for more requests."""
    max_conversations: int = 256
    """Maximum number of conversations of one request."""
    max_request_bytes: int = 16777216
    """Maximum length of a request's body."""
    max_queue: int = 4096
    """Maximum number of waiting conversations; further requests get status 429."""
    request_timeout_s: float = 300.0
    """Seconds until a request gets status 504. A replica whose batch takes longer is replaced."""
    start_timeout_s: float = 1800.0
    """Seconds for replicas to load; later, how long the service may lack any replica before it exits with status 76."""
    stop_timeout_s: float = 60.0
    """Seconds for requests in flight when the service stops."""

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
