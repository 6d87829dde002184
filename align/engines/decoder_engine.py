"""The default rollout engine: decodes on the worker's own model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from align.config import SamplingConfig
from align.data import collate
from align.engines.decoder import decoder_of, generate_by
from align.engines.rollout import InProcessReceiver, RolloutContext
from align.errors import ModelError
from align.models.heads import TokenLogprobs
from align.models.weights import named_weights
from align.types import Prompts, Rollouts, Sequences


class DecoderEngine(InProcessReceiver):
    """The default `align.engines.rollout.RolloutEngine`."""

    exact = True
    shares_weights = True

    def __init__(self, context: RolloutContext):
        self.context = context
        section, training = context.section, context.training
        # Weights that are gathered whole, or fetched layer by layer with ``agree``.
        self._gathers = training is not None and (not training.sharded or section.gather_weights_for_generation)
        agree = None if training is None or self._gathers else training.agree
        tokens = section.max_tokens_per_micro_batch
        self._decoder = decoder_of(context.model, section.max_num_seqs, agree, tokens)

    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> Rollouts:
        context = self.context
        arguments = (self._decoder, context.model, prompts, sampling, context.seed, context.section.max_num_seqs)
        if context.training is None or not self._gathers:
            return generate_by(*arguments)
        with context.training.full(context.model.parameters()):
            return generate_by(*arguments)

    @torch.no_grad()
    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        weights, loaded = dict(named_weights(self.context.model)), set()
        for name, value in tensors:
            if name in weights:
                weights[name].copy_(value)
            loaded.add(name)
        if loaded != weights.keys():
            raise ModelError(f"policy and sampler differ in weights: {sorted(loaded ^ weights.keys())[:3]}")

    @torch.no_grad()
    def logprobs(self, sequences: Sequences) -> Tensor:
        head = TokenLogprobs(self.context.model)
        layout = (collate.packed if head.packed else collate.padded)(sequences).to(self.context.model.device)
        return head(layout, temperature=1.0, entropy=False)["logprob_BT"].float().cpu()

    def sleep(self) -> None:
        """Release the cache on a GPU, where training needs its memory. The weights stay in use."""
        if self._decoder is not None and self.context.model.device.type != "cpu":
            self._decoder.free()

    def wake(self) -> None:
        """Nothing to do: the next rollout makes the cache."""
