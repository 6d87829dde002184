"""Scores of a group from verdicts on its pairs, and what is added to them: numbers worked out by hand."""

from __future__ import annotations

import pytest

from align.config import FunctionGeneratorConfig, GenerativeConfig
from align.data.genrm_prompts import Verdict
from align.rewards import genrm_groups

JUDGE = FunctionGeneratorConfig(function="m:f")


def test_which_pairs_are_compared():
    assert genrm_groups.pairs(4, "circular", both_orders=True) == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert genrm_groups.pairs(4, "all", both_orders=False) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert genrm_groups.pairs(2, "circular", both_orders=False) == [(0, 1), (1, 0)]  # both orders, as in NeMo-Gym
    assert genrm_groups.pairs(2, "circular", both_orders=True) == [(0, 1)]  # which is asked about both ways already
    for which in ("circular", "all"):
        assert genrm_groups.pairs(1, which, both_orders=True) == []


def test_a_response_has_the_mean_over_its_comparisons():
    """(0, 1): 4 and 2. (1, 2): 3 and 3 with ranking 5, so a = -1.5: 1.5 and 4.5. (2, 0): 3 and 4.
    Means: (4 + 4) / 2, (2 + 1.5) / 2, (4.5 + 3) / 2; without the tie-break 4, 2.5, 3."""
    verdicts = [Verdict(4, 2, 1), Verdict(3, 3, 5), Verdict(3, 4, 4)]
    compared = [(0, 1), (1, 2), (2, 0)]
    assert genrm_groups.from_verdicts(3, compared, verdicts, tie_break=True) == [4, 1.75, 3.75]
    assert genrm_groups.from_verdicts(3, compared, verdicts, tie_break=False) == [4, 2.5, 3]


SCORES = [5.0, 4.0, 3.0, 3.0, 1.0]
TEXTS = [
    f"<think>{'r' * reasoning}</think>{'a' * answer}" for reasoning, answer in ((4, 9), (2, 3), (6, 1), (4, 5), (0, 7))
]


@pytest.mark.parametrize(
    ("section", "gained"),
    [
        # The best fifth of 5 is one, whose score is 5: the shortest reasoning, of response 1 with 4, gets nothing.
        ({"reasoning_bonus": 0.5}, [0, 0, 0, 0, 0]),
        # int(5 * 0.5) - 1 = 1, so that 4 is enough; no reasoning at all (response 4) is not the shortest.
        ({"reasoning_bonus": 0.5, "top": 0.5}, [0, 0.5, 0, 0, 0]),
        # The shortest answer is that of response 2 with 3. int(5 * 0.6) - 1 = 2, the third best has 3.
        ({"answer_bonus": 0.25, "top": 0.6}, [0, 0, 0.25, 0, 0]),
        # A bonus for the reasoning does not open the way to that for the answer.
        ({"reasoning_bonus": 9.0, "answer_bonus": 0.25, "top": 0.5}, [0, 9, 0, 0, 0]),
        # Lengths 4 2 6 4 0 give 1/3 2/3 0 1/3 1, whose mean is 7/15.
        ({"reasoning_length_coef": 3.0}, [-0.4, 0.6, -1.4, -0.4, 1.6]),
        # Lengths 9 3 1 5 7 give 0 3/4 1 1/2 1/4, whose mean is 1/2.
        ({"answer_length_coef": 2.0}, [-1, 0.5, 1, 0, -0.5]),
        ({"style_coef": 5.0}, [0, 0, 0, 0, 0]),  # none of them has any
        ({}, [0, 0, 0, 0, 0]),
    ],
)
def test_bonuses(section: dict[str, float], gained: list[float]):
    found = genrm_groups.adjusted(SCORES, TEXTS, GenerativeConfig(judge=JUDGE, **section))
    assert [after - before for after, before in zip(found, SCORES, strict=True)] == pytest.approx(gained)


def test_the_plainer_of_two_answers_gains_what_the_other_loses():
    section = GenerativeConfig(judge=JUDGE, style_coef=0.05)
    assert genrm_groups.adjusted([3, 3], ["**a** b", "a plain answer"], section) == pytest.approx([2.975, 3.025])


def test_a_single_response_and_equal_ones_gain_nothing():
    section = GenerativeConfig(judge=JUDGE, answer_bonus=1, answer_length_coef=1, reasoning_length_coef=1, style_coef=1)
    assert genrm_groups.adjusted([2.5], ["a"], section) == [2.5]
    assert genrm_groups.adjusted([3, 4], ["", " "], section) == [3, 4]  # no answer is the shortest
    weights = GenerativeConfig(judge=JUDGE, answer_length_coef=1, reasoning_length_coef=1, style_coef=1)
    assert genrm_groups.adjusted([3, 4], ["ab", " ba"], weights) == [3, 4]


@pytest.mark.parametrize(
    ("text", "marks", "characters"),
    [
        ("plain words", 0, 11),
        ("# Head\nwords", 1, 12),
        ("- one\n* two\n 3. three", 3, 21),
        ("a **bold** and __another__", 2, 26),
        ("fine \U0001f600\u2705", 2, 7),
        ("\u4f60\u597d", 0, 2),  # Chinese characters are no emoji
        ("```\n# no heading\n- no item\n```\n**x**", 1, 5),
        ("2 * 3 - 1 #1", 0, 12),
    ],
)
def test_style_is_marks_for_each_character_outside_code(text: str, marks: int, characters: int):
    assert genrm_groups.style_density(text) == marks / characters


def test_nothing_has_no_style():
    assert genrm_groups.style_density("```\ncode\n```") == genrm_groups.style_density("") == 0.0
