"""Ratings and their prediction on cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from align.ops import losses
from align.types import NOT_RATED

NAN = math.nan


def test_summary_by_hand():
    found = losses.rating_metrics(torch.tensor([1.0, 2.0, 9.0, 4.0]), torch.tensor([2.0, 2.0, NOT_RATED, 5.0]))
    assert found["mse"] == pytest.approx(2 / 3)
    # deviations (-4, -1, 5) / 3 and (-1, -1, 2): 15 / 3 over sqrt(42 / 9 * 6)
    assert found["correlation"] == pytest.approx(5 / math.sqrt(28))


def test_correlation_is_that_of_torch():
    torch.manual_seed(1)
    predicted, label = torch.randn(50), torch.randint(0, 5, (50,)).float()
    want = torch.corrcoef(torch.stack([predicted, label]).double())[0, 1].item()
    assert losses.rating_metrics(predicted, label)["correlation"] == pytest.approx(want, abs=1e-12)


def test_where_nothing_can_be_said_nothing_is():
    assert losses.rating_metrics(torch.ones(2), torch.full((2,), NOT_RATED)) == {}
    assert losses.rating_metrics(torch.ones(2), torch.tensor([1.0, 3.0])) == {"mse": 2.0}
    assert losses.rating_metrics(torch.tensor([1.0, 3.0]), torch.ones(2)) == {"mse": 2.0}


def test_goodness_reads_no_attribute_without_weight():
    weight = torch.tensor([0.5, 0.0, -2.0])
    assert losses.goodness(torch.tensor([[2.0, NAN, 1.0], [0.0, 7.0, 4.0]]), weight).tolist() == [-1.0, -8.0]
    label = torch.tensor([[2.0, NOT_RATED, 1.0], [2.0, 1.0, NOT_RATED]])
    found = losses.label_goodness(label, weight)
    assert found[0].item() == -1.0
    assert found[1].isnan()


def test_differences_of_every_two_responses_to_one_prompt():
    label = torch.tensor([1.0, 3.0, 3.0, 2.0, 0.0, NAN, 5.0])
    score = torch.tensor([0.5, 2.0, 7.0, 1.0, 4.0, 6.0, 0.0])
    prompt = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    # prompt 0: (1 over 0) 1.5 and (2 over 0) 6.5, 1 and 2 are alike; prompt 1: (3 over 4) -3, row 5 is not rated
    assert sorted(losses.rated_differences(score, label, prompt).tolist()) == [-3.0, 1.5, 6.5]
    assert len(losses.rated_differences(score[:1], label[:1], prompt[:1])) == 0


def test_sums_that_differ_by_rounding_are_equal():
    label = torch.tensor([[0.0, 3.0], [3.0, 0.0]])
    sums = losses.label_goodness(torch.cat([label, label + 1]), torch.tensor([0.1, 0.1]))
    assert len(losses.rated_differences(torch.arange(4.0), sums, torch.tensor([0, 0, 1, 1]))) == 0
    together = losses.rated_differences(torch.arange(4.0), sums, torch.zeros(4, dtype=torch.int64))
    assert sorted(together.tolist()) == [1, 2, 2, 3]  # rows 2 and 3 over rows 0 and 1


@pytest.mark.parametrize(("apart", "number"), [(0.5e-6, 0), (2e-6, 1)])
def test_labels_within_the_tolerance_are_ties(apart: float, number: int):
    label = torch.tensor([0.0, apart])
    assert len(losses.rated_differences(torch.tensor([0.0, 1.0]), label, torch.tensor([0, 0]))) == number


def test_loop_over_all_pairs():
    source = torch.Generator().manual_seed(0)
    prompt = torch.tensor([0, 1, 1, 2, 2, 2, 2, 3, 3])
    label, score = torch.randint(0, 3, (9,), generator=source).float(), torch.randn(9, generator=source)
    slow = [
        float(score[i] - score[j]) for i in range(9) for j in range(9) if prompt[i] == prompt[j] and label[i] > label[j]
    ]
    assert sorted(losses.rated_differences(score, label, prompt).tolist()) == pytest.approx(sorted(slow))
