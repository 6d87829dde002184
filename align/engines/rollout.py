"""Rollout engines: what samples responses in a policy's worker or in a sampler's.

An engine is a class that implements `RolloutEngine`. The recipe keys ``policy.engine`` and ``sampler.engine`` choose it
by a name of `align.config.models.ROLLOUT_ENGINES`, or as ``module:Class`` or ``path/file.py:Class``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.config import SamplingConfig
from align.config.models import ROLLOUT_ENGINES
from align.engines.deepspeed import Engine
from align.types import Prompts, Rollouts
from align.utils import plugins


@dataclass(frozen=True)
class RolloutContext:
    """What an engine is made from, on each rank."""

    section: Any
    """Schema of the role: `PolicyConfig`, `SamplerConfig` or `PreviousPolicyConfig`."""
    model: PreTrainedModel
    """The worker's model: of a policy the live one, whose weights change with each update; of a sampler a copy."""
    seed: int
    """Seed of the run, which names the noise of every token."""
    training: Engine | None = None
    """The engine that holds ``model``, perhaps sharded (`Engine.full`, `Engine.agree`). None in a sampler."""


class RolloutEngine(Protocol):
    """Samples K responses to each prompt on one rank; its constructor takes a `RolloutContext`."""

    exact: ClassVar[bool]
    """True if the log-probabilities of its rollouts are those of a training forward pass on the same weights, up to
    rounding. If False, the policy recomputes ``old_logprobs`` for every rollout."""
    shares_weights: ClassVar[bool]
    """True if it samples with the tensors of ``context.model``. If False, a policy's worker calls `load_weights` before
    the first rollout after each update, with all weights whole on every rank (they are gathered at ZeRO 3)."""

    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> Rollouts:
        """Responses to this rank's prompts, which may be none.

        Sequence i is sample ``i % K`` of prompt ``i // K``, with K = ``sampling.num_samples``. Tensors are on the CPU;
        ``_BT`` ones are float32, have the length of the longest response, and are 0 after the end of a response.
        ``logprob_BT`` is at ``sampling.temperature``, before top-k, top-p and min-p; ``untempered_logprob_BT`` at
        temperature 1. Temperature 0 is greedy: then ``Rollouts.temperature`` is 1. A response ends with the first id of
        ``prompts.stop_ids`` or of the model's ``generation_config.eos_token_id``, which belongs to it and sets
        ``finished_B``, or after ``sampling.max_tokens`` tokens. ``Rollouts.step`` is ``prompts.step``.

        The noise of a token is named by (seed, ``prompts.step``, ``prompts.index_P``, sample, position), see
        `align.ops.sampling.uniform`. An engine that draws other noise must still be a function of these names:
        otherwise a resumed run differs from an uninterrupted one.
        """
        ...

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace all weights. Names and shapes are those of an exported checkpoint, with adapters merged
        (`align.models.export.state_dict`). For a sampler they come through Ray's object store."""
        ...

    def sleep(self) -> None:
        """Called after a rollout in a worker that also trains: free what is not needed until `wake`."""
        ...

    def wake(self) -> None:
        """Called before each rollout in a worker that also trains, and before `load_weights`."""
        ...


def engine_class(name: str) -> Callable[[RolloutContext], RolloutEngine]:
    """The class of an engine. Raises `ConfigError` if it cannot be imported."""
    return plugins.load_function(ROLLOUT_ENGINES.get(name, name))


def is_exact(name: str) -> bool:
    """See `RolloutEngine.exact`."""
    return bool(engine_class(name).exact)  # type: ignore[attr-defined]


def generate_awake(engine: RolloutEngine, prompts: Prompts, sampling: SamplingConfig) -> Rollouts:
    """Generate without gradients, and let the engine sleep afterwards."""
    try:
        with torch.no_grad():
            return engine.generate(prompts, sampling)
    finally:
        engine.sleep()
