"""How many tokens a recipe's step has, with every prompt and response as long as the recipe allows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from align.config import ModelConfig, OnPolicyConfig, RecipeConfig, SamplingConfig


@dataclass(frozen=True)
class Workload:
    """Sequences of a step. ``K`` responses share a prompt; ``unit`` of them are never parted in a micro-batch."""

    prompts: int
    K: int
    prompt_tokens: int
    response_tokens: int
    unit: int
    trained_K: int
    """Responses to a prompt that an update learns from."""
    samples: bool
    """Whether the step samples its responses."""
    updates: int = 1
    """Optimizer steps of a step."""
    passes: int = 1
    """Passes of the updates over the batch."""

    @property
    def sequences(self) -> int:
        return self.prompts * self.K

    @property
    def positions(self) -> int:
        """Tokens of the longest prompt with its response."""
        return self.prompt_tokens + self.response_tokens

    def micro_batch(self, section: ModelConfig, ranks: int, unit: int = 1) -> MicroBatch:
        """The largest micro-batch of a rank: ``max_tokens_per_micro_batch`` tokens, the longest unit if that is longer,
        and no more than the rank's share of a step."""
        share = math.ceil(self.prompts / ranks) * (self.prompt_tokens + self.K * self.response_tokens)
        unit_tokens = self.prompt_tokens + unit * self.response_tokens
        tokens = min(max(section.max_tokens_per_micro_batch, unit_tokens), share)
        responses = max(unit, min(self.K, (tokens - self.prompt_tokens) // self.response_tokens))
        groups = tokens / (self.prompt_tokens + responses * self.response_tokens)
        predicted = groups * responses * self.response_tokens
        keys = groups * (self.prompt_tokens + responses * self.positions)
        return MicroBatch(tokens, int(predicted), int(keys))


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of a packed forward pass: all, those of responses, and keys with each prompt repeated for its
    responses."""

    tokens: int
    predicted: int
    keys: int


def of_recipe(config: RecipeConfig) -> Workload:
    """The step of a recipe."""
    values: dict[str, Any] = vars(config)
    data = config.data
    if isinstance(config, OnPolicyConfig):
        sampling: SamplingConfig = config.sampling
        trained = {"best_of_n": 1, "online_dpo": 2}.get(config.algorithm, sampling.num_samples)
        unit = {"steerlm2": sampling.num_samples, "online_dpo": 2}.get(config.algorithm, 1)
        return Workload(
            prompts=config.prompts_per_step,
            K=sampling.num_samples,
            prompt_tokens=data.max_prompt_tokens,
            response_tokens=sampling.max_tokens,
            unit=unit,
            trained_K=trained,
            samples=True,
            updates=config.updates_per_step(),
            passes=config.epochs,
        )
    pairs = config.reads() == "preferences" and config.algorithm not in ("sft", "steerlm")
    K = 2 if pairs else 1
    return Workload(values["batch_size"], K, data.max_prompt_tokens, data.max_response_tokens, K, K, samples=False)
