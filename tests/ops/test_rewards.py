"""What becomes of the scores of unfinished responses, and the KL penalty."""

from __future__ import annotations

import pytest
import torch

from align.ops import rewards

SCORE, FINISHED = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("treatment", "reward", "usable"),
    [
        ("exclude", [1.0, -2.0, 0.5], [True, False, True]),
        ("keep", [1.0, -2.0, 0.5], [True, True, True]),
        ("penalise", [1.0, -3.5, 0.5], [True, True, True]),  # -2 - 1.5
    ],
)
def test_unfinished(treatment: rewards.Unfinished, reward: list[float], usable: list[bool]):
    got_reward, got_usable = rewards.treat_unfinished(SCORE, FINISHED, treatment, penalty=1.5)
    assert got_reward.tolist() == reward
    assert got_usable.tolist() == usable
    assert SCORE.tolist() == [1.0, -2.0, 0.5]
    assert FINISHED.tolist() == [True, False, True]


def test_kl_is_subtracted():
    reward = rewards.subtract_kl(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0]), 0.25)
    assert reward.tolist() == [0.25, 3.0]  # 1 - 3/4, 2 + 1
