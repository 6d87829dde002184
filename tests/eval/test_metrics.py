"""Slices, calibration, margins and intervals, against hand-worked cases and slow loops."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from align.eval import metrics
from align.eval.items import Item
from align.eval.protocols import heldout
from align.ops import losses


def item(id: str, prompt: str = "", lengths: tuple[int, ...] = (10, 10), strength: int = 0, **tags: str) -> Item:
    return Item(id, prompt or id, 1, len(lengths), tags, strength, lengths)


def accuracy(items: list[Item], scores, **more):
    return metrics.bootstrap(lambda w: heldout(items, scores, w), [one.prompt for one in items], **more)["accuracy"]


CHANCE = {"resamples": 400, "confidence": 0.95, "seed": 0}


class TestBootstrap:
    def test_one_prompt_has_no_spread(self):
        items = [item(f"{n}", prompt="same") for n in range(4)]
        assert accuracy(items, [[1, 0], [1, 0], [1, 0], [0, 1]], **CHANCE) == (0.75, 0.75, 0.75)

    def test_items_of_a_prompt_are_drawn_together(self):
        items = [item(f"{n}", prompt="ab"[n // 50]) for n in range(100)]
        scores = [[1, 0]] * 50 + [[0, 1]] * 50
        assert accuracy(items, scores, **CHANCE) == (0.5, 0.0, 1.0)  # of two prompts: both, one of each, both
        apart = [item(f"{n}") for n in range(100)]
        _, low, high = accuracy(apart, scores, **CHANCE)
        assert 0.36 < low < 0.44 and 0.56 < high < 0.64

    def test_agrees_with_the_normal_interval_of_a_mean(self):
        items, scores = [item(f"{n}") for n in range(900)], [[1.0, 0.0]] * 630 + [[0.0, 1.0]] * 270
        value, low, high = accuracy(items, scores, resamples=2000, confidence=0.95, seed=3)
        half = 1.96 * (0.7 * 0.3 / 900) ** 0.5
        assert value == pytest.approx(0.7) and (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.004)

    def test_is_what_a_loop_over_copies_gives(self):
        rng = np.random.default_rng(5)
        items, scores = [item(f"{n}", prompt=f"{n % 7}") for n in range(20)], rng.normal(size=(20, 2)).tolist()
        _, low, high = accuracy(items, scores, resamples=200, confidence=0.9, seed=11)
        draws, slow = np.random.default_rng(11).multinomial(7, np.full(7, 1 / 7), size=200), []
        for counts in draws:
            rows = [n for n in range(20) for _ in range(counts[n % 7])]
            slow.append(np.mean([scores[n][0] > scores[n][1] for n in rows]))
        assert [low, high] == pytest.approx(np.quantile(slow, [0.05, 0.95]))

    def test_does_not_depend_on_how_many_are_drawn_at_a_time(self, monkeypatch: pytest.MonkeyPatch):
        items, scores = [item(f"{n}") for n in range(10)], [[n % 3, 1] for n in range(10)]
        whole = accuracy(items, scores, **CHANCE)
        monkeypatch.setattr(metrics, "MOST_WEIGHTS", 30)
        assert accuracy(items, scores, **CHANCE) == whole

    def test_none_without_resamples(self):
        assert accuracy([item("a")], [[1, 0]], resamples=0, confidence=0.9, seed=0) == (1.0, None, None)

    def test_a_slice_that_is_missing_from_a_resample_spoils_none(self):
        items = [item("a", domain="x"), *(item(f"{n}", domain="y") for n in range(6))]
        found = metrics.accuracies(items, metrics.pairs(items, [[1, 0]] * 7), **CHANCE)["domain"]["x"]
        assert (found.value, found.low, found.high, found.count) == (1.0, 1.0, 1.0, 1)


def test_pairs_are_right_against_wrong():
    rm = Item("a", "a", 2, 4, {}, lengths=(10, 20, 5, 40))
    tie = Item("b", "b", 2, 3, {"subset": "Ties"}, lengths=(1, 1, 1))
    found = metrics.pairs([tie, rm], [[0, 0, 0], [4, 3, 1, 2.5]])
    assert found.item_P.tolist() == [1] * 4
    assert found.difference_P.tolist() == [3, 1.5, 2, 0.5]
    assert found.ratio_P.tolist() == [2, 0.25, 4, 0.5]


def test_slices_by_hand():
    items = [
        item("a", strength=1, lengths=(100, 201), domain="code", language="go"),
        item("b", strength=3, lengths=(100, 100), domain="code", language="rust"),
        item("c", strength=3, lengths=(300, 100), domain="stem"),
        item("d", strength=3, lengths=(95, 100), domain="stem"),
    ]
    found = metrics.accuracies(items, metrics.pairs(items, [[1, 0], [0, 1], [1, 0], [1, 1]]), **CHANCE)
    plain = {kind: {name: (one.value, one.count) for name, one in named.items()} for kind, named in found.items()}
    assert plain == {
        "strength": {"1": (1.0, 1), "3": (1 / 3, 3)},
        "domain": {"code": (0.5, 2), "stem": (0.5, 2)},
        "language": {"go": (1.0, 1), "rust": (0.0, 1)},
        "length": {
            "right one under half as long": (1.0, 1),
            "alike (0.9 to 1.1)": (0.0, 2),
            "right one at least twice as long": (1.0, 1),
        },
    }


def test_every_length_has_one_place():
    bounds = list(metrics.LENGTHS.values())
    assert bounds[0][0] == 0 and bounds[-1][1] == np.inf
    assert all(left[1] == right[0] for left, right in pairwise(bounds))


def test_unknown_lengths_and_a_single_domain_make_no_slices():
    items = [item("a", lengths=(), domain="code"), item("b", lengths=(), domain="code")]
    items = [Item(one.id, one.id, 1, 2, one.tags) for one in items]
    assert metrics.accuracies(items, metrics.pairs(items, [[1, 0], [0, 1]]), **CHANCE) == {}


def test_calibration_by_hand():
    log3 = float(np.log(3))  # confidence 0.75
    items = [item(f"{n}") for n in range(4)]
    found = metrics.calibration(metrics.pairs(items, [[log3, 0], [log3, 0], [0, log3], [0, 0]]))
    tie, sure = found["bins"]
    assert tie == {"from": 0.5, "to": 0.55, "count": 1, "confidence": 0.5, "accuracy": 0.0}
    assert sure["count"] == 3 and sure["confidence"] == pytest.approx(0.75) and sure["accuracy"] == pytest.approx(2 / 3)
    assert found["expected_calibration_error"] == pytest.approx((0.5 + 3 * (0.75 - 2 / 3)) / 4)


def test_bins_of_the_diagram_add_up_to_the_error():
    difference = torch.from_numpy(np.random.default_rng(0).normal(1, 2, 500))
    bins = losses.reliability(difference)
    assert bins[:, 0].sum() == 500
    slow = sum(abs(right - confidence) for _, confidence, right in bins.tolist()) / 500
    assert losses.expected_calibration_error(difference) == pytest.approx(slow)


def test_margins_have_zero_between_two_bins_and_lose_none():
    items = [item(f"{n}") for n in range(200)]
    scores = [[x, 0.0] for x in np.random.default_rng(0).normal(1, 2, 199)] + [[1e6, 0.0]]
    found = metrics.margins(metrics.pairs(items, scores))
    assert 0.0 in found["edges"] and sum(found["counts"]) == 200
    below = sum(count for edge, count in zip(found["edges"], found["counts"], strict=False) if edge < 0)
    assert below == sum(a < b for a, b in scores)
    assert found["edges"][-1] < 1e5  # one far away does not flatten all others
    assert metrics.margins(metrics.pairs(items[:2], [[1, 1], [1, 1]]))["ties"] == 2
