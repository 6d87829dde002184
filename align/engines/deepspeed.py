"""DeepSpeed under a head of `align.models.heads`: forward passes by token budget, and exact optimizer steps.

An optimizer step minimizes ``sum of loss sums / sum of counts`` over all micro-batches of all ranks. DeepSpeed averages
gradients over ranks, so each micro-batch's sum is multiplied by ``world_size / total count`` before its backward pass;
the total is known beforehand because a loss's count depends on the batch alone (`align.roles.Loss`).

Every rank makes the same number of forward and backward passes, so that sharded weights are gathered in step: ranks
with fewer micro-batches add empty ones, whose loss is zero.

A step is taken by all ranks or by none. The loss is summed over ranks before the last backward pass; where it is not
finite, that pass gives gradients that are not. A gradient that is not finite, whatever its cause, makes the global norm
so on every rank, and then DeepSpeed (ZeRO 1 to 3) or `Engine._take_step` (0) drops all gradients in place of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from align.config import ModelConfig, OptimizerConfig, TrainedModelConfig
from align.data import collate
from align.engines import optimizer_state
from align.engines.schedule import learning_rate
from align.errors import DivergedError
from align.models import positions
from align.models.heads import Head
from align.roles import Loss, LossFunction, Metrics
from align.types import Batch, Packed, Sequences
from align.utils import fault_injection

_FILLER = Sequences(Packed.from_lists([[0]]), Packed.from_lists([[0]]), torch.zeros(1, dtype=torch.int64))
"""What an empty micro-batch computes on."""

_HOLDER = -1
"""Stands for `Engine.full` among the modules that use a parameter; DeepSpeed numbers modules from 0."""


BUCKET = 500_000_000
"""Gradients that are reduced at a time; DeepSpeed's default, which it allocates whatever the size of the model."""


def _configuration(section: ModelConfig, head: nn.Module | None = None) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": section.zero_stage}
    if head is not None:
        weights = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in head.parameters())
        zero["reduce_bucket_size"] = max(1, min(BUCKET, weights))
    if isinstance(section, TrainedModelConfig) and section.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if section.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # the real sizes are ours; see set_gradient_accumulation_boundary
        "gradient_accumulation_steps": 1,
        "gradient_clipping": section.optimizer.max_grad_norm if isinstance(section, TrainedModelConfig) else 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": section.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }


def _counts(loss: Loss) -> list[float]:
    return [float(count) for _, count in loss.terms]


def _is_matrix(parameter: Any) -> bool:
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2  # a ZeRO 3 shard itself is flat


def _adamw(module: nn.Module, section: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors alone."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if _is_matrix(p)], "weight_decay": section.weight_decay},
        {"params": [p for p in trained if not _is_matrix(p)], "weight_decay": 0.0},
    ]
    present = [group for group in groups if group["params"]]
    return torch.optim.AdamW(present, lr=section.lr, betas=section.betas, eps=section.eps)


@contextmanager
def sharded_loading(section: ModelConfig) -> Iterator[None]:
    """Within it transformers reads a ZeRO 3 model straight into shards, so that no rank ever holds it whole.

    Random weights (``init``) are small or a mistake; they are made whole and sharded afterwards.
    """
    if section.zero_stage != 3 or section.init:
        yield
        return
    marker = HfDeepSpeedConfig(_configuration(section))  # transformers holds a weak reference only
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del marker


def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter new values, sharded (ZeRO 3) or whole; every rank calls this with the same ``value``."""
    with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        parameter.copy_(value.to(parameter))  # on other ranks than 0 the gathered copy is dropped


class Engine:
    """A head module on this rank: `infer` for numbers, `update` for training."""

    def __init__(self, head: Head, section: ModelConfig, device: torch.device, total_steps: int):
        """``head.outputs`` names what it returns; ``head.packed`` tells which layout it reads.

        A section without an optimizer gives an engine that only infers: sharded at ZeRO 3, replicated otherwise.
        """
        self.head, self.device, self.total_steps = head, device, total_steps
        self._section = section
        self._optimizer = section.optimizer if isinstance(section, TrainedModelConfig) else None
        self._layout = collate.packed if head.packed else collate.padded
        self.step = 0
        self.sharded = section.zero_stage == 3
        if self._optimizer is not None:
            adamw = _adamw(head, self._optimizer)
            self._module: Any = deepspeed.initialize(model=head, optimizer=adamw, config=_configuration(section, head))[
                0
            ]
        elif self.sharded:
            self._module = deepspeed.initialize(model=head, config=_configuration(section))[0]
        else:
            self._module = head.to(device)
        self._module.eval()

    @property
    def rank(self) -> int:
        """Number of this process within its role."""
        return dist.get_rank()

    @contextmanager
    def full(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Within it, every rank holds these weights whole (ZeRO 3), through forward passes too."""
        if not self.sharded:
            yield
            return
        held: list[Any] = list(parameters)
        with GatheredParameters(held):
            for parameter in held:
                parameter.ds_active_sub_modules.add(_HOLDER)  # else DeepSpeed's hooks release it after each module
            try:
                yield
            finally:
                for parameter in held:
                    parameter.ds_active_sub_modules.discard(_HOLDER)

    def _require_positions(self, sequences: Sequences) -> None:
        if len(sequences):
            positions.require(self.head.model.config, int(sequences.tokens_B().max()), self._section.path)

    @torch.no_grad()
    def infer(self, sequences: Sequences, **arguments: float) -> dict[str, Tensor]:
        """Outputs of the head for every sequence, on the CPU, ``_BT`` ones 0 where there is no token."""
        self._require_positions(sequences)
        rows_of = collate.micro_batches(sequences, 1, self._section.max_tokens_per_micro_batch)
        num_rounds = self.agree(len(rows_of)) if self.sharded else len(rows_of)
        outputs = {name: torch.zeros(shape) for name, shape in self._shapes(sequences).items()}
        for i in range(num_rounds):
            part = sequences.select(rows_of[i]) if i < len(rows_of) else _FILLER
            computed = self._module(self._layout(part).to(self.device), **arguments)
            if i >= len(rows_of):
                continue
            for name, value in computed.items():
                if name.endswith("_BT"):
                    outputs[name][rows_of[i], : value.shape[1]] = value.float().cpu()
                else:
                    outputs[name][rows_of[i]] = value.float().cpu()
        return outputs

    def update(self, batch: Batch, loss: LossFunction, *, skip_non_finite: bool = False, **arguments: float) -> Metrics:
        """One optimizer step on this rank's share of ``batch``.

        Returns ``loss`` (the sum of its terms), the loss's own metrics, ``grad_norm`` before clipping, ``lr`` and
        ``trained_tokens`` (prompts counted once), equal on every rank. A step whose counts are 0 on all ranks has
        nothing to learn from and is left out (``skipped_steps`` is 1). Where the loss or a gradient of any rank is not
        finite, no weight, no optimizer state and no count of steps changes on any rank: raises `DivergedError`, or
        with ``skip_non_finite`` returns ``non_finite`` and ``skipped_steps`` as 1, and ``trained_tokens``.
        """
        self._require_positions(batch.sequences)
        rows_of = collate.micro_batches(batch.sequences, batch.unit, self._section.max_tokens_per_micro_batch)
        parts = [batch.select(rows) for rows in rows_of]
        probed = [self._probe(part, loss) for part in parts] or [self._probe(batch, loss)]
        probes, read = [value for value, _ in probed], probed[0][1]
        own_tokens = len(batch.sequences.prompts.ids_N) + len(batch.sequences.responses.ids_N)
        own = [own_tokens, *map(sum, zip(*map(_counts, probes), strict=True))]
        tokens, *shared = self._sum(torch.tensor(own, dtype=torch.float64)).tolist()
        if not any(shared):
            return {"skipped_steps": 1.0}
        self._module.train()
        means = self._backpropagate(parts, probes, read, shared, loss, arguments)
        self._module.eval()
        total_loss, names = sum(means[: len(shared)]), list(probes[0].metrics)
        taken = self._take_step()
        if taken is None:
            if skip_non_finite:
                return {"non_finite": 1.0, "skipped_steps": 1.0, "trained_tokens": tokens}
            finite = math.isfinite(total_loss)
            raise DivergedError(
                f"{'the norm of the gradient is not finite' if finite else f'the loss is {total_loss}'} at optimizer "
                f"step {self.step + 1}; no weight was changed",
                remedy="lower the learning rate, look at the last lines of metrics.jsonl, or set run.non_finite=skip",
            )
        metrics = {"loss": total_loss, **dict(zip(names, means[len(shared) :], strict=True))}
        return metrics | taken | {"skipped_steps": 0.0, "trained_tokens": tokens}

    def _backpropagate(
        self,
        parts: Sequence[Batch],
        probes: Sequence[Loss],
        read: list[str],
        shared: Sequence[float],
        loss: LossFunction,
        arguments: dict[str, float],
    ) -> list[float]:
        """All forward and backward passes of a step; returns the means of terms and metrics over all ranks.

        ``shared`` holds the counts of the terms over all ranks. Where the mean of a term is not finite, gradients are
        not finite either.
        """
        num_rounds = self.agree(len(parts))
        totals = torch.zeros(len(shared) + len(probes[0].metrics), 2, dtype=torch.float64, device=self.device)
        means: list[float] = []
        for i in range(num_rounds):
            last = i == num_rounds - 1
            self._module.set_gradient_accumulation_boundary(last)
            if i < len(parts):
                value = self._forward(parts[i], loss, arguments)
                if _counts(value) != _counts(probes[i]):
                    raise ValueError("a loss's count must not depend on model outputs (see align.roles.Loss)")
                terms = [s * (dist.get_world_size() / n) for (s, _), n in zip(value.terms, shared, strict=True) if n]
                objective = torch.stack(terms).sum()
                for row, (s, n) in enumerate([*value.terms, *value.metrics.values()]):
                    totals[row] += torch.stack([s.detach().double(), n.double()])
                del value, terms  # else the logits that metrics hang on live through the next forward pass
            else:
                objective = self._nothing(read, arguments)
            if last:
                totals[0, 0] += fault_injection.corrupt("loss") or 0.0
                means = [s / n if n else 0.0 for s, n in self._sum(totals).tolist()]
            with self._spoilt(last, means[: len(shared)]):
                self._module.backward(objective)
            del objective
        return means

    @contextmanager
    def _spoilt(self, last: bool, terms: Sequence[float]) -> Iterator[None]:
        """Within it, gradients of the ``last`` pass are not finite where the loss is not, or a fault is due."""
        spoilt = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        number = None
        if last and not math.isfinite(sum(terms)):
            number = math.nan
        elif last:
            number, spoilt = fault_injection.corrupt("gradient"), spoilt[:1]
        hooks = [p.register_hook(partial(torch.full_like, fill_value=number)) for p in spoilt if number is not None]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _take_step(self) -> Metrics | None:
        """Step on the gradients that are there, or drop them, on all ranks, where their norm is not finite: None."""
        assert self._optimizer is not None
        rate = learning_rate(self._optimizer, self.step + 1, self.total_steps)
        for group in self._module.optimizer.param_groups:
            group["lr"] = rate
        norm = None
        if self._section.zero_stage == 0:  # plain gradients, already averaged; DeepSpeed reports no norm for them
            grads = [p.grad for p in self.head.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads)) if grads else None
            if norm is not None and not math.isfinite(norm):
                self._module.zero_grad()
                return None
        self._module.step()
        if norm is None:
            norm = float(self._module.get_global_grad_norm())
            if self._module.optimizer.overflow:
                return None
        self.step += 1
        return {"grad_norm": norm, "lr": rate}

    @property
    def training(self) -> optimizer_state.TrainingState:
        """What this rank holds of the state of training; only an engine with an optimizer has it."""
        assert self._optimizer is not None
        return optimizer_state.TrainingState(self.head, self._module.optimizer, self._section.zero_stage)

    def counters(self) -> dict[str, Any]:
        """What `restore` needs to know beside the tensors of `training`, as JSON; equal on every rank."""
        return {
            "step": self.step,
            "adam_steps": self.training.steps(),
            "world_size": dist.get_world_size(),
            "zero_stage": self._section.zero_stage,
        }

    def restore(self, folder: Path) -> None:
        """Go back to what is stored in the folder of a role; every rank calls this. Raises `ModelError` where it does
        not fit this model."""
        stored = optimizer_state.StoredState(folder)
        self.training.apply(stored)
        self.step = int(stored.counters["step"])

    def _forward(self, part: Batch, loss: LossFunction, arguments: dict[str, float]) -> Loss:
        sequences = part.sequences
        outputs = self._module(self._layout(sequences).to(self.device), **arguments)
        columns = {name: column.to(self.device) for name, column in part.columns.items()}
        return loss(mask_BT=sequences.mask_BT.to(self.device), **outputs, **columns)

    def _nothing(self, read: list[str], arguments: dict[str, float]) -> Tensor:
        """An empty micro-batch: 0, with a gradient through the outputs ``read``.

        Through these only: at ZeRO 3 DeepSpeed notes a backward pass once for each output of the model that has a
        gradient, and stops when the notes of two ranks differ.
        """
        outputs = self._module(self._layout(_FILLER).to(self.device), **arguments)
        return torch.stack([outputs[name].sum() for name in read]).sum() * 0.0

    def _shapes(self, sequences: Sequences) -> dict[str, tuple[int, ...]]:
        B, T = sequences.mask_BT.shape
        shapes = {"B": (B,), "BT": (B, T), "BA": (B, self.head.num_attributes)}
        return {name: shapes[name.rpartition("_")[2]] for name in self.head.outputs}

    def _probe(self, part: Batch, loss: LossFunction) -> tuple[Loss, list[str]]:
        """Counts and metric names of a micro-batch, without the model, and the outputs of the model through which the
        loss has a gradient; these are the same for every micro-batch."""
        zeros = {name: torch.zeros(shape).requires_grad_() for name, shape in self._shapes(part.sequences).items()}
        value = loss(mask_BT=part.sequences.mask_BT, **zeros, **part.columns)
        total = torch.stack([s.float() for s, _ in value.terms]).sum()
        slopes = torch.autograd.grad(total, list(zeros.values()), allow_unused=True)
        return value, [name for name, slope in zip(zeros, slopes, strict=True) if slope is not None]

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over ranks."""
        total = values.to(self.device)
        dist.all_reduce(total)
        return total

    def agree(self, number: int) -> int:
        """The largest ``number`` of all ranks."""
        value = torch.tensor([number], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)
