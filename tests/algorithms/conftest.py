"""What the roles say of a rollout, written by hand: what all policy gradients are tested on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from align.algorithms._rollout import ScoredRollouts
from align.types import Packed, Rollouts, Sequences

Rows = Sequence[Sequence[float]]


def _seen(
    x: Rows,
    score: Sequence[float],
    finished: Sequence[bool] | None = None,
    K: int = 1,
    *,
    logprob: Rows | None = None,
    old: Rows | None = None,
    second: Sequence[float] | None = None,
    padding: float = 0.0,
) -> ScoredRollouts:
    """Row i is a response of ``len(x[i])`` tokens with x = log pi - log pi_ref at each; K neighbours share a prompt.

    ``logprob`` of the rollout is -1 on every token, ``old`` the same and every response finished, if not given. Columns
    beyond a response hold ``padding``. All prompts are the same text.
    """
    logprob = logprob or [[-1.0] * len(row) for row in x]
    reference = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(logprob, x, strict=True)]
    num_prompts, longest = len(x) // K, max(map(len, x))
    logprob_BT, reference_BT, old_BT = (
        torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])
        for rows in (logprob, reference, old or logprob)
    )
    sequences = Sequences(
        Packed.from_lists([[5, 6]] * num_prompts),
        Packed.from_lists([[7] * len(row) for row in x]),
        torch.arange(num_prompts).repeat_interleave(K),
    )
    finished_B = torch.ones(len(x), dtype=torch.bool) if finished is None else torch.tensor(finished)
    rollouts = Rollouts(sequences, logprob_BT, logprob_BT, finished_B, 0.7, 1)
    return ScoredRollouts(
        rollouts, torch.tensor(score), None if second is None else torch.tensor(second), reference_BT, old_BT
    )


@pytest.fixture(scope="session")
def seen() -> Callable[..., ScoredRollouts]:
    """Makes a `Seen` of what is given; see `_seen`."""
    return _seen
