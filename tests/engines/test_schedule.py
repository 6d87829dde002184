"""Learning rates of single steps, worked by hand."""

from __future__ import annotations

import itertools

import pytest

from align.config import OptimizerConfig
from align.engines.schedule import learning_rate


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # lr 0.8, 4 warm-up steps of 12, floor 1/4: up to step 4 linear, then u = 0, 1/4, 1/2, 3/4, 1.
        ("constant", {1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8, 6: 0.8, 8: 0.8, 10: 0.8, 12: 0.8, 20: 0.8}),
        ("linear", {1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8, 6: 0.65, 8: 0.5, 10: 0.35, 12: 0.2, 20: 0.2}),
        # 0.2 + 0.6 (1 + cos(pi u)) / 2 with cos(pi/4) = sqrt(1/2)
        (
            "cosine",
            {1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8, 6: 0.5 + 0.3 * 0.5**0.5, 8: 0.5, 10: 0.5 - 0.3 * 0.5**0.5, 12: 0.2},
        ),
    ],
)
def test_by_hand(schedule, rates: dict[int, float]):
    section = OptimizerConfig(lr=0.8, schedule=schedule, warmup_steps=4, min_lr_ratio=0.25)
    assert {step: learning_rate(section, step, 12) for step in rates} == pytest.approx(rates, abs=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_without_a_floor_the_last_step_has_rate_zero_and_rates_only_fall(schedule):
    section = OptimizerConfig(lr=0.5, schedule=schedule)
    rates = [learning_rate(section, step, 10) for step in range(1, 11)]
    assert rates[-1] == pytest.approx(0, abs=1e-15)
    assert all(a > b for a, b in itertools.pairwise(rates))
    # u = 1/10 at the first step: 0.45, and 0.25 (1 + cos(pi / 10)).
    assert rates[0] == pytest.approx({"linear": 0.45, "cosine": 0.25 * (1 + 0.9510565162951535)}[schedule], abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_that_is_all_warm_up(schedule):
    section = OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=4)
    assert [learning_rate(section, step, 4) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(section, 2, 3) == 0.5  # shorter than its warm-up
