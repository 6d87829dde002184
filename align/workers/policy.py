"""Policy and reference: causal language models that sample, score tokens and, for the policy, learn."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.data import collate
from align.engines import generation
from align.engines.deepspeed import Engine
from align.models import heads, load
from align.roles import Future
from align.sections import Policy as PolicySection
from align.sections import Sampling
from align.types import Batch, Packed, Prompts, Rollouts, Sequences
from align.workers.base import Role, TrainedRole, TrainedWorker, Worker, answered, by_rank, merged


class ReferenceWorker(Worker):
    """A causal language model that answers with log-probabilities."""

    def load(self) -> None:
        spec = self.spec
        model = load.causal_lm(spec.section, len(self.tokenizer), spec.seed)
        self._build(model)

    def _build(self, model: PreTrainedModel) -> None:
        self.model = model
        self.engine = Engine(heads.TokenLogprobs(model), self.spec.section, self.device, self.spec.total_steps)

    @answered
    def logprobs(self, sequences: Sequences, temperature: float) -> Tensor:
        """log pi(token t | before) of this rank's sequences, (B, T)."""
        return self.engine.infer(sequences, temperature=temperature)["logprob_BT"]


class PolicyWorker(TrainedWorker, ReferenceWorker):
    """The actor."""

    def load(self) -> None:
        spec = self.spec
        model = load.causal_lm(spec.section, len(self.tokenizer), spec.seed)
        self._make_trainable(model, task="CAUSAL_LM")
        self._build(model)

    def _forward_arguments(self, batch: Batch) -> dict[str, float]:
        return {"temperature": batch.temperature}

    @answered
    def generate(self, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """Responses to this rank's prompts, with dropout off and on the weights as they are now."""
        section, seed = self.spec.section, self.spec.seed
        assert isinstance(section, PolicySection)
        if self.engine.sharded and not section.gather_for_rollouts:
            return generation.generate(self.model, prompts, sampling, seed, section.generation_slots, self.engine.agree)
        with self.engine.full(self.model.parameters()):
            return generation.generate(self.model, prompts, sampling, seed, section.generation_slots)


class Reference(Role):
    """The driver's side of `ReferenceWorker`."""

    worker = ReferenceWorker
    phase = "reference"

    def logprobs(self, sequences: Sequences, temperature: float) -> Future[Tensor]:
        """See `align.roles.Reference`."""
        rows = collate.split(sequences, 1, self.ranks.world_size)
        return self.ranks.call(
            self.phase,
            ReferenceWorker.logprobs,
            [(sequences.select(index), temperature) for index in rows],
            lambda parts: merged(parts, rows),
        )


class Policy(TrainedRole, Reference):
    """The driver's side of `PolicyWorker`."""

    worker = PolicyWorker
    phase = "logprobs"

    def generate(self, prompts: Prompts, sampling: Sampling) -> Future[Rollouts]:
        """See `align.roles.Policy`."""
        index = by_rank(len(prompts), self.ranks.world_size)
        return self.ranks.call(
            "generate",
            PolicyWorker.generate,
            [(prompts.select(part), sampling) for part in index],
            lambda parts: _merged_rollouts(prompts, parts, index, sampling.num_samples),
        )


def _merged_rollouts(prompts: Prompts, parts: list[Rollouts], index: list[Tensor], num_samples: int) -> Rollouts:
    rows = [(part[:, None] * num_samples + torch.arange(num_samples)).flatten() for part in index]
    order = torch.cat(rows).argsort()
    responses = Packed.concatenate(part.sequences.responses for part in parts).select(order)
    prompt_B = torch.arange(len(prompts)).repeat_interleave(num_samples)
    return Rollouts(
        Sequences(prompts.tokens, responses, prompt_B),
        merged([part.logprob_BT for part in parts], rows),
        merged([part.untempered_logprob_BT for part in parts], rows),
        merged([part.finished_B for part in parts], rows),
        parts[0].temperature,
        prompts.step,
    )
