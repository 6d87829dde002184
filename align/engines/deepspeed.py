"""DeepSpeed runs a head of `align.models.heads`: forward passes by token budget, and exact optimizer steps.

An optimizer step minimizes ``sum of loss sums / sum of counts`` over all micro-batches of all ranks. DeepSpeed averages
gradients over ranks, so each micro-batch's sum is multiplied by ``world_size / total count`` before its backward pass;
the engine computes the total before the first forward pass, because a loss's count depends on the batch alone
(`align.roles.Loss`).

Every rank makes the same number of forward and backward passes, because gathering sharded weights is a collective call:
ranks with fewer micro-batches add empty ones, whose loss is zero.

All ranks take a step or none does. The engine sums the loss over ranks before the last backward pass; if the loss is
not finite, that pass makes the gradients NaN. A NaN or infinite gradient on any rank makes the global norm NaN or
infinite on every rank, and then DeepSpeed (ZeRO 1 to 3) or `Engine._take_step` (ZeRO 0) drops all gradients and skips
the step.
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

_EMPTY = Sequences(Packed.from_lists([[0]]), Packed.from_lists([[0]]), torch.zeros(1, dtype=torch.int64))
"""Input of an empty micro-batch: a prompt and a response of one token each."""

_FULL_HOLDER = -1
"""Id of `Engine.full` in a parameter's ``ds_active_sub_modules``. DeepSpeed numbers modules from 0, so -1 is free."""

BUCKET = 500_000_000
"""Elements of DeepSpeed's gradient bucket, its default. DeepSpeed allocates it whatever the size of the model, so the
engine lowers it to the number of weights."""


def _configuration(section: ModelConfig, head: nn.Module | None = None) -> dict[str, Any]:
    trains_bfloat16 = isinstance(section, TrainedModelConfig) and section.dtype == "bfloat16"
    # DeepSpeed's stage 1 with float32 sums is another optimizer, whose state has another layout. Stage 2 computes the
    # same, and only gives up its part of the gradients earlier.
    zero: dict[str, Any] = {"stage": 2 if trains_bfloat16 and section.zero_stage == 1 else section.zero_stage}
    if head is not None:
        weights = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in head.parameters())
        zero["reduce_bucket_size"] = max(1, min(BUCKET, weights))
    if isinstance(section, TrainedModelConfig) and section.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if section.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,  # `Engine.update` sets micro-batches and accumulation boundaries
        "gradient_accumulation_steps": 1,
        "gradient_clipping": section.optimizer.max_grad_norm if isinstance(section, TrainedModelConfig) else 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": section.dtype == "bfloat16"},
        # Else the gradients of micro-batches are summed in bfloat16, which loses 3 digits over 64 of them.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }


def _counts(loss: Loss) -> list[float]:
    return [float(count) for _, count in loss.terms]


def _is_matrix(parameter: Any) -> bool:
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2  # a ZeRO 3 shard is flat; ds_shape is the full one


def _adamw(module: nn.Module, section: OptimizerConfig, fused: bool = False) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, not on biases and norms. ``fused``: one kernel a tensor, for GPUs."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if _is_matrix(p)], "weight_decay": section.weight_decay},
        {"params": [p for p in trained if not _is_matrix(p)], "weight_decay": 0.0},
    ]
    present = [group for group in groups if group["params"]]
    return torch.optim.AdamW(present, lr=section.lr, betas=section.betas, eps=section.eps, fused=fused or None)


@contextmanager
def sharded_loading(section: ModelConfig) -> Iterator[None]:
    """Within the context, transformers reads a ZeRO 3 model directly into shards, so no rank holds the whole model.

    Models with random weights (``init``) are small: each rank makes them whole and shards them afterwards.
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
    """Set a parameter, sharded (ZeRO 3) or whole. Collective: every rank calls this with the same ``value``."""
    with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        parameter.copy_(value.to(parameter))  # DeepSpeed keeps the gathered copy of rank 0 and broadcasts it


class Engine:
    """A head module on this rank: `infer` computes outputs, `update` trains."""

    def __init__(self, head: Head, section: ModelConfig, device: torch.device, total_steps: int):
        """``head.outputs`` names the head's outputs; ``head.packed`` selects its input layout, packed or padded.

        Without an optimizer in ``section`` the engine only infers: sharded at ZeRO 3, replicated otherwise.
        """
        self.head, self.device, self.total_steps = head, device, total_steps
        self._section = section
        self._optimizer = section.optimizer if isinstance(section, TrainedModelConfig) else None
        self._layout = collate.packed if head.packed else collate.padded
        self.step = 0
        self.sharded = section.zero_stage == 3
        if self._optimizer is not None:
            on_gpu = device.type == "cuda" and not section.offload_optimizer  # type: ignore[attr-defined]
            adamw = _adamw(head, self._optimizer, fused=on_gpu)
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
        """Rank of this process within its role."""
        return dist.get_rank()

    @contextmanager
    def full(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Within the context, every rank holds these weights whole (ZeRO 3), during forward passes too. Collective."""
        if not self.sharded:
            yield
            return
        held: list[Any] = list(parameters)
        with GatheredParameters(held):
            for parameter in held:
                parameter.ds_active_sub_modules.add(_FULL_HOLDER)  # else DeepSpeed's hooks shard it after each module
            try:
                yield
            finally:
                for parameter in held:
                    parameter.ds_active_sub_modules.discard(_FULL_HOLDER)

    def _require_positions(self, sequences: Sequences) -> None:
        if len(sequences):
            positions.require(self.head.model.config, int(sequences.tokens_B().max()), self._section.path)

    @torch.no_grad()
    def infer(self, sequences: Sequences, **arguments: float) -> dict[str, Tensor]:
        """Outputs of the head for every sequence, float32 on the CPU; ``_BT`` outputs are 0 where there is no token,
        and everywhere if ``arguments`` tell the head to leave them out.

        At ZeRO 3 this is collective: every rank calls it, also with no sequences.
        """
        self._require_positions(sequences)
        rows_of = collate.micro_batches(sequences, 1, self._section.max_tokens_per_micro_batch)
        # Each forward pass gathers sharded weights, a collective call, so all ranks make equally many passes.
        num_rounds = self.agree(len(rows_of)) if self.sharded else len(rows_of)
        outputs = {name: torch.zeros(shape) for name, shape in self._shapes(sequences).items()}
        for i in range(num_rounds):
            part = sequences.select(rows_of[i]) if i < len(rows_of) else _EMPTY
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

        Collective: every rank calls this, also with an empty ``batch``. Returns, equal on every rank, ``loss`` (the sum
        of its terms), the metrics of ``loss``, ``grad_norm`` before clipping, ``lr`` and ``trained_tokens`` (each
        prompt counted once). If all counts are 0 on all ranks, it skips the step (``skipped_steps`` is 1). If the loss
        or a gradient of any rank is not finite, weights, optimizer state and step count stay as they are on every rank,
        and it raises `DivergedError`, or with ``skip_non_finite`` returns ``non_finite`` and ``skipped_steps`` as 1 and
        ``trained_tokens``.
        """
        self._require_positions(batch.sequences)
        rows_of = collate.micro_batches(batch.sequences, batch.unit, self._section.max_tokens_per_micro_batch)
        parts = [batch.select(rows) for rows in rows_of]
        # Counts first: each micro-batch's sum is divided by the total count of all ranks before its backward pass. A
        # rank without sequences probes its empty batch, because it needs the names of metrics and outputs too.
        probed = [self._probe(part, loss) for part in parts] or [self._probe(batch, loss)]
        probes, differentiable = [value for value, _ in probed], probed[0][1]
        own_tokens = len(batch.sequences.prompts.ids_N) + len(batch.sequences.responses.ids_N)
        own = [own_tokens, *map(sum, zip(*map(_counts, probes), strict=True))]
        tokens, *shared = self._sum(torch.tensor(own, dtype=torch.float64)).tolist()  # float32 rounds from 2**24
        if not any(shared):  # the same on all ranks, so that no rank waits for another in a backward pass
            return {"skipped_steps": 1.0}
        self._module.train()
        means = self._backpropagate(parts, probes, differentiable, shared, loss, arguments)
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
                remedy="lower the learning rate, look at the last lines of metrics.jsonl, or set run.max_non_finite=5",
            )
        metrics = {"loss": total_loss, **dict(zip(names, means[len(shared) :], strict=True))}
        return metrics | taken | {"skipped_steps": 0.0, "trained_tokens": tokens}

    def _backpropagate(
        self,
        parts: Sequence[Batch],
        probes: Sequence[Loss],
        differentiable: list[str],
        shared: Sequence[float],
        loss: LossFunction,
        arguments: dict[str, float],
    ) -> list[float]:
        """All forward and backward passes of a step; returns the means of terms and metrics over all ranks.

        ``shared`` holds the counts of the terms, summed over all ranks. If the mean of a term is not finite, the
        gradients are NaN.
        """
        num_rounds = self.agree(len(parts))
        totals = torch.zeros(len(shared) + len(probes[0].metrics), 2, dtype=torch.float64, device=self.device)
        means: list[float] = []
        for i in range(num_rounds):
            last = i == num_rounds - 1
            # ZeRO 0 and 1 reduce gradients over ranks in the backward pass at the boundary, `step` then uses them.
            self._module.set_gradient_accumulation_boundary(last)
            if i < len(parts):
                value = self._forward(parts[i], loss, arguments)
                if _counts(value) != _counts(probes[i]):
                    raise ValueError("a loss's count must not depend on model outputs (see align.roles.Loss)")
                # DeepSpeed averages gradients over ranks: times world_size makes that average a sum.
                terms = [s * (dist.get_world_size() / n) for (s, _), n in zip(value.terms, shared, strict=True) if n]
                objective = torch.stack(terms).sum()
                for row, (s, n) in enumerate([*value.terms, *value.metrics.values()]):
                    totals[row] += torch.stack([s.detach().double(), n.double()])
                del value, terms  # else the graph of the metrics keeps the logits during the next forward pass
            else:
                objective = self._empty_objective(differentiable, arguments)
            if last:  # before its backward pass, whose gradients must be NaN if the loss of any rank is not finite
                totals[0, 0] += fault_injection.corrupt("loss") or 0.0
                means = [s / n if n else 0.0 for s, n in self._sum(totals).tolist()]
            with self._non_finite_gradients(last, means[: len(shared)]):
                self._module.backward(objective)
            del objective
        return means

    @contextmanager
    def _non_finite_gradients(self, last: bool, terms: Sequence[float]) -> Iterator[None]:
        """Within the context, the ``last`` backward pass gives NaN gradients if a term is not finite.

        Hooks do this because a loss can be infinite with finite gradients, and the gradient norm decides whether a
        step is taken. An injected fault makes the gradients of the first parameter non-finite.
        """
        targets = [parameter for parameter in self.head.parameters() if parameter.requires_grad]
        number = None
        if last and not math.isfinite(sum(terms)):
            number = math.nan
        elif last:
            number, targets = fault_injection.corrupt("gradient"), targets[:1]
        hooks = [p.register_hook(partial(torch.full_like, fill_value=number)) for p in targets if number is not None]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _take_step(self) -> Metrics | None:
        """One AdamW step on the accumulated gradients. If their norm is not finite, all ranks drop them; returns None.

        ``grad_norm`` is the global norm before clipping.
        """
        assert self._optimizer is not None
        rate = learning_rate(self._optimizer, self.step + 1, self.total_steps)
        for group in self._module.optimizer.param_groups:
            group["lr"] = rate
        norm = None
        if self._section.zero_stage == 0:  # gradients are averaged and whole here; DeepSpeed reports no norm for them
            grads = [p.grad for p in self.head.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads)) if grads else None
            if norm is not None and not math.isfinite(norm):
                self._module.zero_grad()
                return None
        self._module.step()
        if norm is None:
            norm = float(self._module.get_global_grad_norm())
            if self._module.optimizer.overflow:  # DeepSpeed skipped the step on all ranks and dropped the gradients
                if self._section.zero_stage < 3:
                    self._module.optimizer.averaged_gradients.clear()  # which it forgets if the optimizer is offloaded
                return None
        self.step += 1
        return {"grad_norm": norm, "lr": rate}

    @property
    def training(self) -> optimizer_state.TrainingState:
        """This rank's part of weights and optimizer state; only an engine with an optimizer has it."""
        assert self._optimizer is not None
        return optimizer_state.TrainingState(self.head, self._module.optimizer, self._section.zero_stage)

    def counters(self) -> dict[str, Any]:
        """Numbers that `restore` reads beside the tensors of `training`, as JSON; equal on every rank."""
        return {
            "step": self.step,
            "adam_steps": self.training.steps(),
            "world_size": dist.get_world_size(),
            "zero_stage": self._section.zero_stage,
        }

    def restore(self, folder: Path) -> None:
        """Load weights, optimizer state and step from a role's checkpoint ``folder``.

        Collective: every rank calls this. Raises `ModelError` if the stored parameters do not match this model.
        """
        stored = optimizer_state.StoredState(folder)
        self.training.apply(stored)
        self.step = int(stored.counters["step"])

    def _forward(self, part: Batch, loss: LossFunction, arguments: dict[str, float]) -> Loss:
        sequences = part.sequences
        outputs = self._module(self._layout(sequences).to(self.device), **arguments)
        columns = {name: column.to(self.device) for name, column in part.columns.items()}
        return loss(mask_BT=sequences.mask_BT.to(self.device), **outputs, **columns)

    def _empty_objective(self, differentiable: list[str], arguments: dict[str, float]) -> Tensor:
        """An empty micro-batch: 0, with a gradient through the outputs ``differentiable``.

        No other output may have a gradient: at ZeRO 3 DeepSpeed records a backward pass once for each output of the
        model that has a gradient, and fails if the records of two ranks differ.
        """
        outputs = self._module(self._layout(_EMPTY).to(self.device), **arguments)
        return torch.stack([outputs[name].sum() for name in differentiable]).sum() * 0.0

    def _shapes(self, sequences: Sequences) -> dict[str, tuple[int, ...]]:
        B, T = sequences.mask_BT.shape
        shapes = {"B": (B,), "BT": (B, T), "BA": (B, self.head.num_attributes)}
        return {name: shapes[name.rpartition("_")[2]] for name in self.head.outputs}

    def _probe(self, part: Batch, loss: LossFunction) -> tuple[Loss, list[str]]:
        """The loss of a micro-batch on outputs of 0, and the names of the outputs through which it has a gradient.

        This runs no model: the counts and metric names of the result are valid, its sums are not. The names are the
        same for every micro-batch.
        """
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
        """The largest ``number`` of all ranks. Collective: every rank calls this."""
        value = torch.tensor([number], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)
