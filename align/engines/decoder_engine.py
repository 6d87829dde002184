"""The default rollout engine: decodes on the worker's own model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from align.config import SamplingConfig
from align.data import collate
from align.engines.decoder import Decoder, decodes, generate
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
        layer_by_layer = training is not None and training.sharded and not section.gather_weights_for_generation
        self._agree = training.agree if training is not None and layer_by_layer else None
        self._decoder: Decoder | None = None
        if decodes(context.model):
            tokens = section.max_tokens_per_micro_batch
            self._decoder = Decoder(context.model, section.max_num_seqs, self._agree, tokens)

    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> Rollouts:
        context = self.context
        arguments = (context.model, prompts, sampling, context.seed, context.section.max_num_seqs)
        if context.training is None or self._agree is not None:
            return generate(*arguments, self._agree, self._decoder)
        with context.training.full(context.model.parameters()):
            return generate(*arguments, decoder=self._decoder)

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
