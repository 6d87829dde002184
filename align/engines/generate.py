"""Rollouts of any causal language model by ``transformers.generate``, with the sampler of `align.engines.decoder`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from align.config import SamplingConfig
from align.data import collate
from align.engines.requests import SamplingRequest
from align.types import Packed, Prompts, Rollouts, Sequences


class _HashSampler(LogitsProcessor):
    """Draws with our sampler inside ``transformers.generate``: leaves only the drawn token possible."""

    def __init__(self, request: SamplingRequest, sequence: Tensor):
        """``sequence``: numbers of the request's sequences that are the rows of ``generate``."""
        self.request, self.uniform = request, request.noise(sequence)
        self.sequence, self.row = sequence, torch.arange(len(sequence), device=sequence.device)
        self.alive = torch.ones_like(sequence, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -float("inf"))
        ids, alive = self.request.draw(scores.clone(), self.uniform, self.sequence, self.alive)
        forced[self.row, torch.where(self.alive, ids, self.request.stop_ids[0])] = 0.0
        self.alive = alive
        return forced


@torch.no_grad()
def generate_any(
    model: PreTrainedModel, prompts: Prompts, sample: SamplingConfig, seed: int, num_slots: int
) -> Rollouts:
    """K responses to each prompt, on left-padded prompts; at most ``num_slots`` sequences at one time."""
    request = SamplingRequest.of(model, prompts, sample, seed)
    for sequence in torch.arange(len(request.sampled.length_B)).split(num_slots):
        if len(sequence):
            _generate(request, sequence)
    return request.sampled.rollouts(prompts, sample)


def _generate(request: SamplingRequest, sequence: Tensor) -> None:
    """Sample some sequences of a request to their end."""
    stop_ids, sample = request.stop_ids, request.sampling
    rows = request.prompts.tokens.select(sequence // sample.num_samples)
    empty = Packed(torch.empty(0, dtype=torch.int64), torch.zeros(len(rows) + 1, dtype=torch.int64))
    layout = collate.padded(Sequences(rows, empty, torch.arange(len(rows))), side="left").to(stop_ids.device)
    generator: Any = request.model
    # Penalties and suppressed tokens of the checkpoint would make the sampled distribution differ from the trained one.
    saved_config, generator.generation_config = generator.generation_config, GenerationConfig()
    try:
        generator.generate(
            layout.input_ids,
            attention_mask=layout.attention_mask,
            do_sample=False,
            num_beams=1,
            max_new_tokens=sample.max_tokens,
            eos_token_id=stop_ids.tolist(),
            pad_token_id=int(stop_ids[0]),
            logits_processor=LogitsProcessorList([_HashSampler(request, sequence.to(stop_ids.device))]),
        )
    finally:
        generator.generation_config = saved_config
