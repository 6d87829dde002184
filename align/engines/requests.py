"""What a rollout asks for and what it has sampled so far, whichever loop decodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.config import SamplingConfig
from align.models.heads import restricted
from align.ops import sampling
from align.types import Packed, Prompts, Rollouts, Sequences


@dataclass
class SampledTokens:
    """Tokens sampled so far. Row i is sequence i of the request, column t its token t. One more column takes what
    is computed for sequences that have ended."""

    ids_BT: Tensor
    logprob_BT: Tensor
    untempered_BT: Tensor
    length_B: Tensor
    stops_B: Tensor
    """1 for a sequence that has sampled a stop id."""

    @classmethod
    def empty(cls, num_sequences: int, max_tokens: int, device: torch.device) -> SampledTokens:
        shape = (num_sequences, max_tokens + 1)
        zeros = lambda dtype: torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
        length = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        return cls(zeros(torch.int64), zeros(torch.float32), zeros(torch.float32), length, length.clone())

    def rollouts(self, prompts: Prompts, sample: SamplingConfig) -> Rollouts:
        """Everything sampled, on the CPU."""
        length = self.length_B.cpu()
        longest = int(length.max()) if len(length) else 0
        mask = torch.arange(longest)[None, :] < length[:, None]
        cut = lambda x: torch.where(mask, x[:, :longest].cpu(), torch.zeros((), dtype=x.dtype))  # noqa: E731
        offsets = torch.cat([length.new_zeros(1), length.cumsum(0)])
        prompt_B = torch.arange(len(prompts)).repeat_interleave(sample.num_samples)
        return Rollouts(
            Sequences(prompts.tokens, Packed(self.ids_BT[:, :longest].cpu()[mask], offsets), prompt_B),
            cut(self.logprob_BT),
            cut(self.untempered_BT),
            self.stops_B.cpu() > 0,
            sample.temperature or 1.0,
            prompts.step,
        )


@dataclass
class SamplingRequest:
    """B = P * K sequences to sample, sequence i being sample ``i % K`` of prompt ``i // K``."""

    model: PreTrainedModel
    prompts: Prompts
    sampling: SamplingConfig
    seed: int
    stop_ids: Tensor
    sampled: SampledTokens

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        prompts: Prompts,
        sample: SamplingConfig,
        seed: int,
        before: SamplingRequest | None = None,
    ) -> SamplingRequest:
        """A request to ``model``, whose generation config may add stop ids (Llama 3 has several).

        The tensors of a request ``before`` are used again if they fit.
        """
        device = model.device
        configured = getattr(model.generation_config, "eos_token_id", None)
        own = configured if isinstance(configured, list) else [configured]
        stop_ids = sorted({*prompts.stop_ids, *(id for id in own if id is not None)})
        count = len(prompts) * sample.num_samples
        if before is not None and before.fits(count, sample, stop_ids):
            for tensor in vars(before.sampled).values():
                tensor.zero_()
            return cls(model, prompts, sample, seed, before.stop_ids, before.sampled)
        sampled = SampledTokens.empty(count, sample.max_tokens, device)
        return cls(model, prompts, sample, seed, torch.tensor(stop_ids, dtype=torch.int64, device=device), sampled)

    def fits(self, count: int, sample: SamplingConfig, stop_ids: list[int]) -> bool:
        """Whether another request of ``count`` sequences can take over the tensors of this one."""
        return (len(self.sampled.length_B), self.sampling, self.stop_ids.tolist()) == (count, sample, stop_ids)

    def noise(self, sequence_B: Tensor) -> Tensor:
        """Uniform numbers for every token that each of these sequences may sample, (B, max_tokens)."""
        T, K = self.sampling.max_tokens, self.sampling.num_samples
        sequence_N = sequence_B.repeat_interleave(T)
        prompt_N = self.prompts.index_P.to(sequence_B.device)[sequence_N // K]
        token_N = torch.arange(T, device=sequence_B.device).repeat(len(sequence_B))
        return sampling.uniform(self.seed, self.prompts.step, prompt_N, sequence_N % K, token_N).view(-1, T)

    def draw(self, logits_BV: Tensor, uniform_BT: Tensor, sequence_B: Tensor, alive_B: Tensor) -> tuple[Tensor, Tensor]:
        """Sample the next token of each sequence, among ids that the tokenizer has, and record it where ``alive_B``.

        ``uniform_BT`` is `noise`. Returns the ids, and which sequences continue. Waits for nothing on the device, but
        for top-p. May overwrite the logits.
        """
        s, sampled, T = self.sampling, self.sampled, self.sampling.max_tokens
        t = sampled.length_B[sequence_B]
        uniform_B = uniform_BT.gather(1, t.clamp(max=T - 1)[:, None]).squeeze(1)
        logits_BV = restricted(self.model, logits_BV)
        ids, logprob, untempered = sampling.sample(logits_BV, uniform_B, s.temperature, s.top_k, s.top_p, s.min_p)
        column = torch.where(alive_B, t, T)
        sampled.ids_BT[sequence_B, column] = ids
        sampled.logprob_BT[sequence_B, column] = logprob
        sampled.untempered_BT[sequence_B, column] = untempered
        stopped = (ids[:, None] == self.stop_ids).any(1) & alive_B
        # Added, not set: a row that has ended may have the sequence of a live one, after which it was moved.
        sampled.length_B.index_add_(0, sequence_B, alive_B.long())
        sampled.stops_B.index_add_(0, sequence_B, stopped.long())
        return ids, alive_B & ~stopped & (t + 1 < T)
