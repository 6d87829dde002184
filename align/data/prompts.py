"""The order in which rows are visited, as a pure function of (seed, step).

Nothing is stored: a run that resumes at step s asks for step s and gets what it would have got. Each epoch is a
permutation of all rows, and batches run on across the border of two epochs, so no row is dropped or seen
twice before every other was seen once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.config import RecipeConfig
from align.errors import ConfigError, DataError
from align.types import Packed, Prompts


def require_rows(recipe: RecipeConfig, num_rows: int) -> None:
    """Raise `ConfigError` for a batch of more rows than there are, unless ``data.repeat_within_batch`` allows it."""
    key, batch = recipe.rows_per_step()
    if batch < 1:
        raise ConfigError(f"{key} is {batch}", remedy=f"set {key} to a positive number")
    if batch > num_rows and not recipe.data.repeat_within_batch:
        raise ConfigError(
            f"{key} is {batch}, and the data has {num_rows} rows to draw from: a batch would repeat rows",
            remedy=f"lower it to at most {num_rows}, use more data, or set data.repeat_within_batch=true",
        )


@dataclass(frozen=True)
class BatchOrder:
    """Row numbers of each step's batch.

    Raises `DataError` when there are no rows and `ValueError` for a batch of none.
    """

    size: int
    """Rows to choose from."""
    batch_size: int
    """Rows of a step; may exceed ``size``, then a batch spans several epochs (`require_rows`)."""
    seed: int
    """Seed of the run."""

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise DataError("no rows to draw batches from", remedy="see the counts of dropped rows above")
        if self.batch_size <= 0:
            raise ValueError(f"batch_size must be positive: {self.batch_size}")

    def indices(self, step: int) -> Tensor:
        """Row numbers of step ``step`` = 1, 2, ..., shape (batch_size,), int64."""
        if step < 1:
            raise ValueError(f"steps count from 1: {step}")
        start, stop = (step - 1) * self.batch_size, step * self.batch_size
        first, last = start // self.size, (stop - 1) // self.size
        rows = np.concatenate([_permutation(self.size, self.seed, epoch) for epoch in range(first, last + 1)])
        return torch.from_numpy(rows[start - first * self.size : stop - first * self.size])


@dataclass(frozen=True)
class PromptStream:
    """Batches of prompts, resumable by step number."""

    tokens: Packed
    """All prompts."""
    batch_size: int
    """Prompts of a step, P."""
    seed: int
    """Seed of the run."""
    stop_ids: tuple[int, ...]
    """Ids that end a response."""

    @property
    def order(self) -> BatchOrder:
        """Which rows of ``tokens`` each step holds."""
        return BatchOrder(len(self.tokens), self.batch_size, self.seed)

    attempts: int = 1
    """Batches that a step may ask for; more than one where groups are sampled again until enough have spread."""

    def batch(self, step: int, attempt: int = 0) -> Prompts:
        """Prompts of attempt 0, 1, ... of step ``step`` = 1, 2, ..., numbered by their place in the step."""
        rows = self.order.indices((step - 1) * self.attempts + attempt + 1)
        number = torch.arange(self.batch_size) + attempt * self.batch_size
        return Prompts(self.tokens.select(rows), number, self.stop_ids, step)


def first_prompts(tokens: Packed, count: int, stop_ids: tuple[int, ...], step: int) -> Prompts:
    """The first ``count`` prompts, or all where there are fewer, under the name of a step that no training has."""
    index = torch.arange(min(count, len(tokens)))
    return Prompts(tokens.select(index), index, stop_ids, step)


def minibatches(num_groups: int, count: int, epochs: int, seed: int, step: int) -> Iterator[Tensor]:
    """Numbers of the groups in each of ``count`` minibatches of each epoch, sorted; sizes differ by one at most.

    A permutation for each (seed, step, epoch); every group is in one minibatch of an epoch.
    """
    for epoch in range(epochs):
        shuffled = _permutation(num_groups, seed, (step << 32) | epoch)
        yield from (part.sort().values for part in torch.from_numpy(shuffled).tensor_split(count))


def _permutation(size: int, seed: int, number: int) -> np.ndarray:
    # numpy keeps the raw words of a bit generator fixed for ever, but not `Generator.permutation` (NEP 19).
    key = np.array([seed % 2**64, number], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable").astype(np.int64)


def group_members(groups: Tensor, size: int) -> Tensor:
    """Numbers of the sequences in groups of ``size`` neighbours, group after group."""
    return (groups[:, None] * size + torch.arange(size)).flatten()
