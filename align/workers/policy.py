"""Policy, sampler and reference: causal language models that sample, score tokens and, for the policy, learn."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.config import ModelConfig, PolicyConfig, PreviousPolicyConfig, RoleConfig, SamplerConfig, SamplingConfig
from align.data import collate
from align.engines.deepspeed import Engine
from align.engines.rollout import RolloutContext, RolloutEngine, engine_class, generate_awake, is_exact
from align.engines.transfer import TransferAddress, TransferGroup
from align.errors import ModelError
from align.models import export, exported_files, heads, readme, verify_export
from align.roles import CompletedFuture, Future, LossFunction, Metrics
from align.types import Batch, Packed, Prompts, Rollouts, Sequences
from align.workers.base import (
    ChainedFuture,
    Role,
    TrainedRole,
    TrainedWorker,
    Worker,
    WorkerGroup,
    by_rank,
    merged,
    worker_method,
)

MAX_ROLLOUTS_IN_FLIGHT = 1000
"""Largest number of rollouts in flight, far above any max_off_policy_steps."""


TRANSFER_TIMEOUT_S = 3600.0
"""Longest wait of a policy for its samplers: they may still generate."""


@dataclass
class Canary:
    """What a policy computes on `align.models.verify_export.probe`, at temperature 1. A sampler that got its weights
    computes the same up to rounding."""

    logprob_BT: list[list[float]]
    dtype: str
    """Of the policy's weights."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: bytes) -> Canary:
        return Canary(**json.loads(text))


@dataclass
class LocalTransfer:
    """Weights on their way to a sampler in the same process."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    canary: Canary = field(default_factory=lambda: Canary([], ""))


class ReferenceWorker(Worker):
    """A causal language model that computes log-probabilities."""

    stateless = True

    def load(self) -> None:
        self._build(self._causal_lm())

    def _build(self, model: PreTrainedModel) -> None:
        self.model = model
        assert isinstance(self.spec.section, ModelConfig)
        self.engine = Engine(heads.TokenLogprobs(model), self.spec.section, self.device, self.spec.total_steps)

    @worker_method
    def logprobs(self, sequences: Sequences, temperature: float) -> Tensor:
        """log pi(token t | before) of this rank's sequences, (B, T)."""
        return self.engine.infer(sequences, temperature=temperature, entropy=False)["logprob_BT"]

    _loaded_step = -1
    """Optimizer step of the weights that an engine with separate weights holds."""

    @functools.cached_property
    def rollout_engine(self) -> RolloutEngine:
        """The engine that the recipe names, made at the first rollout."""
        section = self.spec.section
        assert isinstance(section, PolicyConfig | PreviousPolicyConfig)
        name = section.engine if isinstance(section, PolicyConfig) else "decoder"
        return engine_class(name)(RolloutContext(section, self.model, self.spec.seed, self.engine))

    def _sampled(self, prompts: Prompts, sampling: SamplingConfig) -> Rollouts:
        """Responses of the engine, on the weights as they are now."""
        self.rollout_engine.wake()
        if not self.rollout_engine.shares_weights and self._loaded_step != self.engine.step:
            self.rollout_engine.load_weights(export.merged_weights(self.model, self.engine.full))
            self._loaded_step = self.engine.step
        return generate_awake(self.rollout_engine, prompts, sampling)


class PolicyWorker(TrainedWorker, ReferenceWorker):
    """The actor."""

    inference_arguments = MappingProxyType({"temperature": 1.0})

    def load(self) -> None:
        exported = self.spec.exported
        model = self._causal_lm()
        if exported is not None:
            exported.chat.set_template(self.tokenizer)
            exported_files.set_stop_ids(model, exported.chat.stop_ids)
        self._make_trainable(model, task="CAUSAL_LM")
        self._build(model)

    def _readme(self) -> dict[str, str]:
        exported, model = self.spec.exported, self.model
        if exported is None:
            return {}
        stops: Any = getattr(model.generation_config, "eos_token_id", None)
        trust = self.spec.section.trust_remote_code
        return {readme.NAME: readme.policy(self._origin(exported), exported.chat, self.tokenizer, stops, trust)}

    def _forward_arguments(self, batch: Batch) -> dict[str, float]:
        return {"temperature": batch.temperature}

    @worker_method
    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> Rollouts:
        """Responses to this rank's prompts, with dropout off and on the weights as they are now."""
        return self._sampled(prompts, sampling)

    @worker_method
    def store_address(self) -> tuple[str, int]:
        """Host and port of this role's TCP store, which rank 0 holds."""
        return self.rendezvous

    @worker_method
    def send_weights(self, transfer: TransferAddress | LocalTransfer) -> None:
        """Send all weights as they are now to samplers. Every rank calls this, only rank 0 sends."""
        logprob_BT = self.engine.infer(verify_export.probe(self.tokenizer), temperature=1.0, entropy=False)[
            "logprob_BT"
        ]
        weights = export.merged_weights(self.model, self.engine.full)
        if isinstance(transfer, LocalTransfer):
            transfer.weights = {name: value.clone() for name, value in weights}
            transfer.canary = Canary(logprob_BT.tolist(), str(self.model.dtype))
        elif self.spec.rank > 0:
            for _ in weights:  # gathers the shards of this rank
                pass
        else:
            if self._transfer is None or self._transfer[0] != transfer:
                store = transfer.within(self._store)
                self._transfer = transfer, TransferGroup(transfer, store, 0, self.device)
            group = self._transfer[1]
            group.store.set(
                f"canary/{group.transfers + 1}", Canary(logprob_BT.tolist(), str(self.model.dtype)).to_json()
            )
            group.send(weights)

    _transfer: tuple[TransferAddress, TransferGroup] | None = None


class SamplerWorker(Worker):
    """Samples for the policy on a copy of its weights."""

    def load(self) -> None:
        self.model = self._causal_lm().eval()
        nn.Module.to(self.model, self.device)
        section = self.spec.section
        assert isinstance(section, SamplerConfig)
        self.rollout_engine = engine_class(section.engine)(RolloutContext(section, self.model, self.spec.seed))

    @worker_method
    def receivers(self) -> int:
        """Number of processes of this rank that receive weights."""
        return self.rollout_engine.receivers

    @worker_method
    def receive(self, transfer: TransferAddress | LocalTransfer, first: int) -> None:
        """Load all weights of the policy, and check that both compute the same log-probabilities.

        ``first`` is this rank's first member of the transfer's group. Raises `ModelError` if log-probabilities of a
        fixed batch differ by more than rounding explains.
        """
        if isinstance(transfer, LocalTransfer):
            self.rollout_engine.load_weights(transfer.weights.items())
            canary = transfer.canary
            transfer.weights = {}
        else:
            if self._joined != transfer:
                self.rollout_engine.join_transfer(transfer, first)
                self._joined, self._canary_store, self._transfers = transfer, transfer.store(), 0
            self.rollout_engine.receive_weights()
            self._transfers += 1  # the policy may be at a later transfer already
            canary = Canary.from_json(self._canary_store.get(f"canary/{self._transfers}"))
        self._check(canary)

    _joined: TransferAddress | None = None

    def _check(self, canary: Canary) -> None:
        logprob_BT = self.rollout_engine.logprobs(verify_export.probe(self.tokenizer))
        expected_BT = torch.tensor(canary.logprob_BT)
        apart = verify_export.difference(expected_BT, logprob_BT)
        allowed = verify_export.tolerance(self.model.dtype, getattr(torch, canary.dtype.removeprefix("torch.")))
        if not apart <= allowed:
            raise ModelError(
                f"the sampler does not hold the policy: on a fixed batch its log-probabilities differ by "
                f"{apart:.3g} on average from the policy's, and rounding explains {allowed:.3g}",
                remedy="have the policy sample itself (leave sampler out of placement), name other "
                "policy.lora.targets, or hold both in float32",
            )

    @worker_method
    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> Rollouts:
        """Responses to this rank's prompts on the weights received last."""
        return self.rollout_engine.generate(prompts, sampling)


class Sampler(Role):
    """The driver's side of `SamplerWorker`; the policy's role calls it."""

    worker = SamplerWorker

    _group: tuple[TransferAddress, list[int]] | None = None
    """Where the policy and all receivers meet, and the first member of each rank."""

    def renew(self, policy: WorkerGroup) -> Future[None]:
        """Send the policy's weights to all ranks. Policy and sampler take part at the same time."""
        transfer: Any = LocalTransfer()
        firsts = [0]
        if not self.ranks.in_process:
            self._group = self._group or self._meet(policy)
            transfer, firsts = self._group
        policy.start(PolicyWorker.send_weights, policy.everywhere(transfer))
        arguments = [(transfer, first) for first in firsts]
        return self.ranks.call("sync", SamplerWorker.receive, arguments, lambda parts: None)

    def _meet(self, policy: WorkerGroup) -> tuple[TransferAddress, list[int]]:
        receivers = self.ranks.call("sync", SamplerWorker.receivers, self.ranks.everywhere(), list).result()
        address = policy.call("sync", PolicyWorker.store_address, policy.everywhere(), lambda parts: parts[0])
        host, port = address.result()
        transfer = TransferAddress(host, port, 0, 1 + sum(receivers), TRANSFER_TIMEOUT_S)
        return transfer, list(accumulate([1, *receivers[:-1]]))


class FrozenSamplerWorker(ReferenceWorker):
    """A frozen policy that samples."""

    @worker_method
    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> Rollouts:
        """Responses to this rank's prompts."""
        return self._sampled(prompts, sampling)


class Reference(Role):
    """The driver's side of `ReferenceWorker`."""

    worker = ReferenceWorker
    phase = "reference"

    def logprobs(self, sequences: Sequences, temperature: float) -> Future[Tensor]:
        rows = collate.split(sequences, 1, self.ranks.world_size)
        return self.ranks.call(
            self.phase,
            ReferenceWorker.logprobs,
            [(sequences.select(index), temperature) for index in rows],
            lambda parts: merged(parts, rows),
        )


class PriorPolicy(Reference):
    """The model without attributes, of SteerLM 2.0."""

    phase = "base"


class FrozenSampler(Role):
    """The driver's side of `FrozenSamplerWorker`."""

    worker = FrozenSamplerWorker

    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> Future[Rollouts]:
        return _generate(self.ranks, FrozenSamplerWorker.generate, prompts, sampling)


class Policy(TrainedRole, Reference):
    """The driver's side of `PolicyWorker`.

    It counts its updates to tell whether rollouts come from the current weights or from older weights.
    """

    worker = PolicyWorker
    phase = "logprobs"

    def __init__(self, ranks: WorkerGroup, section: RoleConfig):
        super().__init__(ranks, section)
        self._sampler: Sampler | None = None
        self._version, self._sent = 0, -1
        self._version_at: dict[int, int] = {}  # by step of the rollout
        self._exact = is_exact(section.engine) if isinstance(section, PolicyConfig) else True

    def use_sampler(self, sampler: Sampler) -> None:
        """Have ``sampler`` generate, on weights that are sent to it before each rollout where they have changed."""
        self._sampler = sampler

    def counters(self) -> dict[str, Any]:
        """Updates so far, and at which of them the rollouts were asked for that no step has learned from yet."""
        newest = max(self._version_at, default=0)
        ahead = {step: version for step, version in self._version_at.items() if step > newest - MAX_ROLLOUTS_IN_FLIGHT}
        return {"version": self._version, "version_at": {str(step): version for step, version in ahead.items()}}

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Restore `counters`. A sampler receives the weights again before its next rollout."""
        self._version, self._sent = counters["version"], -1
        self._version_at = {int(step): version for step, version in counters["version_at"].items()}

    def update(self, batch: Batch, loss: LossFunction) -> Future[Metrics]:
        self._version += 1
        return super().update(batch, loss)

    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> Future[Rollouts]:
        self._version_at.setdefault(prompts.step, self._version)  # a greedy baseline comes after its samples
        if self._sampler is None:
            return _generate(self.ranks, PolicyWorker.generate, prompts, sampling)
        renewed: Future[None] = CompletedFuture(None)
        if self._sent != self._version:
            self._sent = self._version
            renewed = self._sampler.renew(self.ranks)
        return ChainedFuture(renewed, _generate(self._sampler.ranks, SamplerWorker.generate, prompts, sampling))

    def old_logprobs(self, rollouts: Rollouts) -> Future[Tensor]:
        if self._exact and self._sampler is None and self._version_at[rollouts.step] == self._version:
            return CompletedFuture(rollouts.logprob_BT)
        return self.logprobs(rollouts.sequences, rollouts.temperature)


def _generate(ranks: WorkerGroup, method: Any, prompts: Prompts, sampling: SamplingConfig) -> Future[Rollouts]:
    index = by_rank(len(prompts), ranks.world_size)
    return ranks.call(
        "generate" if prompts.step > 0 else "held_out",  # only training rollouts count for tokens per second
        method,
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
