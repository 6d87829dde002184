"""Rollout engines sample responses, in the worker of a policy or of a sampler.

An engine is a class that implements `RolloutEngine`. The recipe keys ``policy.engine`` and ``sampler.engine`` name it:
a key of `align.config.models.ROLLOUT_ENGINES`, ``module:Class`` or ``path/file.py:Class``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.config import SamplingConfig
from align.config.models import ROLLOUT_ENGINES
from align.engines.deepspeed import Engine
from align.engines.transfer import TransferAddress, TransferGroup
from align.types import Prompts, Rollouts, Sequences
from align.utils import plugins


@dataclass(frozen=True)
class RolloutContext:
    """Arguments of an engine's constructor, on each rank."""

    section: Any
    """Config of the role: `PolicyConfig`, `SamplerConfig` or `PreviousPolicyConfig`."""
    model: PreTrainedModel
    """The worker's model. A policy's is in training, and each update changes its weights; a sampler's is a copy."""
    seed: int
    """Seed of the run, the first of the numbers that determine the noise of every token."""
    training: Engine | None = None
    """The engine that trains ``model``, which may be sharded (`Engine.full`, `Engine.agree`). None in a sampler."""


class RolloutEngine(Protocol):
    """Samples K responses to each prompt on one rank; its constructor takes a `RolloutContext`."""

    exact: ClassVar[bool]
    """True if the log-probabilities of its rollouts are those of a training forward pass on the same weights, up to
    rounding. If False, the policy recomputes ``old_logprobs`` for every rollout."""
    shares_weights: ClassVar[bool]
    """True if it samples with the tensors of ``context.model``. If False, a policy's worker calls `load_weights` before
    the first rollout after each update, with all weights whole on every rank (at ZeRO 3 the worker gathers them)."""

    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> Rollouts:
        """Sample responses to this rank's prompts; ``prompts`` may be empty.

        Sequence i is sample ``i % K`` of prompt ``i // K``, with K = ``sampling.num_samples``. Tensors are on the CPU;
        ``_BT`` ones are float32, have the length of the longest response, and are 0 after the end of a response.
        ``logprob_BT`` is at ``sampling.temperature``, before top-k, top-p and min-p; ``untempered_logprob_BT`` at
        temperature 1. Temperature 0 is greedy: then ``Rollouts.temperature`` is 1. A response ends with the first id of
        ``prompts.stop_ids`` or of the model's ``generation_config.eos_token_id``, which it includes and which sets
        ``finished_B``, or after ``sampling.max_tokens`` tokens. ``Rollouts.step`` is ``prompts.step``.

        The noise of a token is a function of (seed, ``prompts.step``, ``prompts.index_P``, sample, position), see
        `align.ops.sampling.uniform`. An engine that draws other noise must derive it from these numbers:
        otherwise a resumed run differs from an uninterrupted one.
        """
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights. Names and shapes are those of an exported checkpoint, with adapters merged
        (`align.models.export.merged_weights`). A tensor is valid until the next pair is taken."""
        ...

    def logprobs(self, sequences: Sequences) -> Tensor:
        """Log-probabilities of the response tokens on the engine's weights, (B, T), at temperature 1. Tensors are on
        the CPU, float32, and 0 where there is no token. A sampler compares them with the policy's after each transfer
        of weights."""
        ...

    receivers: int
    """Number of processes of this engine that receive weights (`align.engines.transfer`)."""

    def join_transfer(self, address: TransferAddress, first: int) -> None:
        """Join the group of ``address`` as members ``first``, ``first + 1``, ...; called before the first transfer,
        and after a restart with a new address."""
        ...

    def receive_weights(self) -> None:
        """Receive one transfer, and load its weights."""
        ...

    def sleep(self) -> None:
        """Called after a rollout in a worker that also trains: free memory that is not needed until `wake`."""
        ...

    def wake(self) -> None:
        """Called before each rollout in a worker that also trains, and before `load_weights`."""
        ...


class InProcessReceiver:
    """Receives weights in the process of the engine, for an engine that has no worker processes."""

    receivers = 1
    context: RolloutContext

    def join_transfer(self, address: TransferAddress, first: int) -> None:
        self._transfer = TransferGroup(address, address.store(), first, self.context.model.device)

    def receive_weights(self) -> None:
        self.load_weights(self._transfer.receive())

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """See `RolloutEngine.load_weights`."""
        raise NotImplementedError


def engine_class(name: str) -> Callable[[RolloutContext], RolloutEngine]:
    """The class of an engine. Raises `ConfigError` if it cannot be imported."""
    return plugins.load_function(ROLLOUT_ENGINES.get(name, name))


def is_exact(name: str) -> bool:
    """Whether the engine's log-probabilities can serve as ``old_logprobs`` (`RolloutEngine.exact`)."""
    return bool(engine_class(name).exact)  # type: ignore[attr-defined]


def generate_awake(engine: RolloutEngine, prompts: Prompts, sampling: SamplingConfig) -> Rollouts:
    """Generate without gradients, then put the engine to sleep, also after an error."""
    try:
        with torch.no_grad():
            return engine.generate(prompts, sampling)
    finally:
        engine.sleep()
