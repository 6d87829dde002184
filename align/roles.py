"""The roles of a run as algorithms see them: a few typed methods that return futures.

Algorithms are written against these protocols and do not depend on whether a role runs in this process or
in a hundred others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from align.checkpoint import FileRecord
    from align.config import SamplingConfig
    from align.data.chat import Dialogue
    from align.types import Batch, Prompts, Rollouts, Sequences

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Metrics = dict[str, float]


@dataclass(frozen=True)
class Loss:
    """What a loss function returns for one micro-batch.

    The engine minimizes ``sum(sum) / sum(count)`` over every micro-batch and rank of the optimizer step, so a mean over
    tokens does not change with micro-batch size, padding, packing or the number of workers. ``count`` may depend on the
    columns of the batch only, never on model outputs: it is needed before the first backward pass.
    ``metrics`` are reduced in the same way, each by its own count. ``others`` are terms that are added to the quotient,
    each divided by its own count under the same rule: a mean over pairs plus a mean over tokens is one loss.
    """

    sum: Tensor
    count: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]]
    others: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def terms(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """All terms as (sum, count)."""
        return ((self.sum, self.count), *self.others)


LossFunction = Callable[..., Loss]
"""A module-level function, or a ``functools.partial`` of one, so that it pickles by reference.

It is called with the outputs of the model (``logprob_BT`` and ``entropy_BT`` of a policy, ``score_B`` or
``attribute_BA`` of a reward model, ``value_BT`` of a critic), ``mask_BT`` and the columns of the batch, all by keyword.
"""


class Future(Protocol[T_co]):
    """The result of a call in flight."""

    def result(self) -> T_co:
        """Wait for the result; raises `align.errors.WorkerError` if the worker fails."""
        ...

    def done(self) -> bool:
        """Whether `result` would not wait long."""
        ...


@dataclass(frozen=True)
class CompletedFuture(Generic[T]):
    """A result that is available without waiting."""

    value: T

    def result(self) -> T:
        return self.value

    def done(self) -> bool:
        return True


def wait_for_all(*futures: Future[Any]) -> tuple[Any, ...]:
    """Wait for several results that are computed concurrently."""
    return tuple(future.result() for future in futures)


@runtime_checkable
class StatefulRole(Protocol):
    """A role whose state a checkpoint stores, so that a resumed run equals an uninterrupted run."""

    def save(self, folder: Path, overlap: bool) -> Future[list[FileRecord]]:
        """Copy weights, optimizer state and random numbers of all ranks, and write them below ``folder``.

        With ``overlap`` the future completes as soon as they are copied, without records; `saved` returns these. At
        most one save may be in flight. Raises `align.errors.SaveError`, which names the file.
        """
        ...

    def saved(self) -> Future[list[FileRecord]]:
        """Wait until what `save` began is on the disk: records of all ranks, names relative to the folder, given once.
        Raises `align.errors.SaveError`."""
        ...

    def restore(self, folder: Path) -> Future[None]:
        """Load what `save` wrote there; the number of ranks and the ZeRO stage may differ.

        Raises `align.errors.ModelError` if files or parameters are missing or unexpected.
        """
        ...

    def state_bytes(self) -> Future[int]:
        """About what `save` would write, in bytes, all ranks together."""
        ...

    def counters(self) -> dict[str, Any]:
        """What the driver's side counts, for a checkpoint; JSON."""
        ...

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Restore the counters that `counters` returned."""
        ...


@runtime_checkable
class MeteredRole(Protocol):
    """A role that measures its own work."""

    def drain(self) -> Metrics:
        """Numbers since the last call, for the line of the step."""
        ...


class TrainableRole(Protocol):
    """A role that trains on batches."""

    def update(self, batch: Batch, loss: LossFunction) -> Future[Metrics]:
        """One optimizer step."""
        ...


class SamplingRole(Protocol):
    """A frozen policy that samples."""

    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> Future[Rollouts]:
        """K responses to each prompt."""
        ...


class PolicyRole(SamplingRole, TrainableRole, Protocol):
    """The actor."""

    def logprobs(self, sequences: Sequences, temperature: float) -> Future[Tensor]:
        """log pi(token t | before), shape (B, T), 0 where there is no token."""
        ...

    def old_logprobs(self, rollouts: Rollouts) -> Future[Tensor]:
        """log pi(token t | before) under the weights as they are now, (B, T), before this step's first update.

        Those of the rollout itself where the policy sampled with the weights that it has now; else a forward pass.
        """
        ...

    def export(self, folder: Path, extra: Mapping[str, str] | None = None) -> Future[None]:
        """Write weights, config and tokenizer in Hugging Face layout, with the ``extra`` files, text by name."""
        ...


class CriticRole(TrainableRole, Protocol):
    """A value function in training."""

    def values(self, sequences: Sequences) -> Future[Tensor]:
        """Value of the state before token t is chosen, shape (B, T), 0 where there is no token."""
        ...


class ReferenceRole(Protocol):
    """A frozen policy."""

    def logprobs(self, sequences: Sequences, temperature: float) -> Future[Tensor]:
        """log pi_ref(token t | before), shape (B, T), 0 where there is no token."""
        ...


class RewardRole(Protocol):
    """A frozen reward model."""

    def score(self, sequences: Sequences) -> Future[Tensor]:
        """One number a sequence, shape (B,), read at its last token."""
        ...

    def rate(self, dialogues: Sequence[Dialogue], names: Sequence[str]) -> Future[Tensor]:
        """The attributes ``names`` of each response, (B, A) in that order, as the model renders them itself."""
        ...


class TrainedRewardRole(TrainableRole, Protocol):
    """A reward model in training."""

    def score(self, sequences: Sequences) -> Future[Tensor]:
        """One number a sequence, shape (B,), read at its last token; of a model without attributes."""
        ...

    def attributes(self, sequences: Sequences) -> Future[Tensor]:
        """A numbers a sequence, shape (B, A), read at its last token; of a model with attributes."""
        ...

    def export(self, folder: Path, extra: Mapping[str, str]) -> Future[None]:
        """Write weights, config and tokenizer in Hugging Face layout, with the ``extra`` files, text by name."""
        ...
