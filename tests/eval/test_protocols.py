"""Every benchmark's numbers, worked out by hand."""

import math

import numpy as np
import pytest

from align.eval import protocols
from align.eval.items import Item

ONE = np.ones


def item(id: str, num_right: int = 1, num_responses: int = 2, **tags: str) -> Item:
    return Item(id, id, num_right, num_responses, tags)


def numbers(protocol, items: list[Item], scores: list[list[float]]) -> dict[str, float]:
    return {name: float(value[0]) for name, value in protocol(items, scores, ONE((1, len(items)))).items()}


RM_ITEMS = [item(f"{n}", 3, 6, domain=domain) for n, domain in enumerate(("chat", "chat", "code-x"))]
RM_SCORES = [
    [1, 2, 3, 0.5, 2, 4],  # wins: easy 3 of 3, normal 1 of 3 (2 against 2 is a tie), hard 0 of 3
    [5, 5, 5, 1, 1, 1],
    [0, 0, 0, 1, 1, 1],
]


def test_rm_bench_by_hand_where_its_two_averages_differ():
    found = numbers(protocols.rm_bench, RM_ITEMS, RM_SCORES)
    assert found == pytest.approx(
        {
            "chat": 13 / 18,
            "code": 0.0,
            "easy (over domains)": 1 / 2,
            "normal (over domains)": 1 / 3,
            "hard (over domains)": 1 / 4,
            "overall (over domains)": 13 / 36,
            "easy (over items)": 2 / 3,
            "normal (over items)": 4 / 9,
            "hard (over items)": 1 / 3,
            "overall (over items)": 13 / 27,
        }
    )


def test_rm_bench_against_the_loop_of_its_definition():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (40, 6)).astype(float)  # integers, so that there are ties
    items = [item(f"{n}", 3, 6, domain=("chat", "math", "code", "safety-refuse")[n % 4]) for n in range(40)]
    found = numbers(protocols.rm_bench, items, scores.tolist())
    by_domain = []
    for first in range(4):
        matrix = np.zeros((3, 3))
        for row in scores[first::4]:
            for i in range(3):
                for j in range(3):
                    matrix[i, j] += (row[i] > row[3 + j]) / 10
        upper = (matrix[0, 1] + matrix[0, 2] + matrix[1, 2]) / 3
        lower = (matrix[1, 0] + matrix[2, 0] + matrix[2, 1]) / 3
        by_domain.append((lower + matrix.trace() / 3 + upper) / 3)
    assert [found[name] for name in protocols.RM_BENCH_DOMAINS] == pytest.approx(by_domain)
    assert found["overall (over domains)"] == pytest.approx(np.mean(by_domain))


def test_safety_pools_refusals_and_responses_by_their_numbers():
    items = [item("a", 3, 6, domain="safety-refuse"), *(item(f"{n}", 3, 6, domain="safety-response") for n in range(3))]
    found = numbers(protocols.rm_bench, items, [[1, 1, 1, 0, 0, 0], *[[0, 0, 0, 1, 1, 1]] * 3])
    assert found["safety"] == pytest.approx(1 / 4)  # not the mean 1/2 of the two halves


@pytest.mark.parametrize(
    ("decisions", "expected"),
    [
        (["A>B"], 1),
        (["B>A"], -1),
        (["A=B"], 0),
        ([None], 0),
        (["A>B", "B>A"], 2),  # the same response twice, for the places have changed
        (["A>B", "A>B"], 0),
        (["A>B", None], 1),
        (["A=B", "B>A"], 1),
        (["B>A", "A=B"], -1),
        (["B>A", "A>B"], -2),
    ],
)
def test_judgebench_counts_over_games(decisions: list[str | None], expected: int):
    assert protocols.counter("A>B", decisions) == expected
    swapped = {"A>B": "B>A", "B>A": "A>B"}
    mirrored = [swapped.get(one or "", one) for one in decisions]
    assert protocols.counter("B>A", mirrored) == expected


def test_judgebench_by_hand():
    items = [item(f"{n}", domain=domain) for n, domain in enumerate(("knowledge", "knowledge", "knowledge", "coding"))]
    found = numbers(protocols.judgebench, items, [[2, 1], [1, 1], [0, 1], [1, 0]])  # the second is a tie: wrong
    assert found == {"knowledge": pytest.approx(1 / 3), "coding": 1.0, "overall": 0.5}


def test_rewardbench_weighs_subsets_by_its_table():
    wins = {"alpacaeval-easy": [1], "mt-bench-easy": [0], "math-prm": [1, 0], "hep-cpp": [1]}
    rows = [(subset, win) for subset, results in wins.items() for win in results]
    items = [item(f"{n}", subset=subset) for n, (subset, _) in enumerate(rows)]
    found = numbers(protocols.rewardbench, items, [[win, 0.5] for _, win in rows])
    reasoning = (984 * 0.5 + 164 * 1) / (984 + 164)
    assert found == pytest.approx({"chat": 100 / 128, "reasoning": reasoning, "overall": (100 / 128 + reasoning) / 2})


def test_rewardbench_gives_safety_by_items_and_by_the_leaderboards_weights():
    rows = [("xstest-should-refuse", 0), ("xstest-should-respond", 1), ("hep-go", 1), ("shp", 1)]
    items = [item(f"{n}", subset=subset) for n, (subset, _) in enumerate(rows)]
    scores = [[win, 0.5] for _, win in rows]
    found = numbers(protocols.rewardbench, items, scores)
    assert found["safety"] == pytest.approx(250 / 404)
    assert found["overall"] == pytest.approx((250 / 404 + 1) / 2)
    assert found["safety (leaderboard weights)"] == pytest.approx(154 / 404)
    assert found["overall (leaderboard weights)"] == pytest.approx((154 / 404 + 1) / 2)
    prior = numbers(protocols.rewardbench_with_prior_sets, items, scores)
    assert prior["overall (leaderboard weights)"] == pytest.approx((154 / 404 + 1 + 0.5) / 2.5)


def test_rewardbench_takes_prior_sets_at_half_weight():
    rows = [("alpacaeval-easy", 1), ("donotanswer", 0), ("anthropic_hhh", 1), ("shp", 0), ("shp", 0)]
    items = [item(f"{n}", subset=subset) for n, (subset, _) in enumerate(rows)]
    scores = [[win, 0.5] for _, win in rows]
    assert numbers(protocols.rewardbench, items, scores)["overall"] == 0.5
    found = numbers(protocols.rewardbench_with_prior_sets, items, scores)
    assert found["prior sets"] == 0.5
    assert found["overall"] == pytest.approx((1 + 0 + 0.5 * 0.5) / 2.5)


def test_weights_of_rewardbench_sum_to_its_items_but_for_math():
    total = sum(sum(section.values()) for section in protocols.REWARDBENCH_SECTIONS.values())
    assert total - 984 + 447 == 2985


@pytest.mark.parametrize(
    ("scores", "expected"), [([3, 2, 1, 0], 1), ([2, 2, 1, 0], 1 / 2), ([1, 1, 1, 1], 1 / 4), ([1, 2, 2, 0], 0)]
)
def test_best_of_four(scores: list[float], expected: float):
    assert protocols.best_of(scores) == expected


TIES = {
    "tied:1": (2, [5, 4, 1]),  # margin 3, spread 1
    "ref:1": (1, [3, 2, 1]),  # margin 1
    "tied:2": (2, [2, 2, 2]),  # margin 0, spread 0
    "ref:2": (1, [1, 2]),  # margin -1
}


def _ties(chosen: list[str]) -> float:
    items = [item(id, TIES[id][0], len(TIES[id][1]), subset="Ties") for id in chosen]
    return float(protocols.ties(items, [TIES[id][1] for id in chosen], ONE((1, len(items))))[0])


def test_ties_by_hand():
    assert _ties(["tied:1", "ref:1"]) == pytest.approx(0.3 + 0.3 + 0.2 + 0 + 0.01 * math.tanh(0))
    # the second prompt: nothing right; min(-1, 0) / 0 - 1 is minus infinity, whose tanh is -1
    assert _ties(list(TIES)) == pytest.approx((0.3 + 0.3 + 0.2) / 2 + 0.01 * (0 - 1) / 2)


def test_ties_count_zero_over_zero_as_nothing():
    items = [item("tied:1", 2, 3, subset="Ties"), item("ref:1", 1, 2, subset="Ties")]
    assert float(protocols.ties(items, [[2, 2, 2], [1, 1]], ONE((1, 2)))[0]) == 0.0


def test_rewardbench2_is_the_mean_of_its_subsets():
    items = [item("a", 1, 4, subset="Math"), item("b", 1, 4, subset="Math"), item("c", 1, 4, subset="Focus")]
    items += [item(id, TIES[id][0], len(TIES[id][1]), subset="Ties") for id in ("tied:1", "ref:1")]
    scores = [[2, 2, 0, 0], [1, 0, 0, 0], [0, 1, 1, 1], TIES["tied:1"][1], TIES["ref:1"][1]]
    found = numbers(protocols.rewardbench2, items, scores)
    assert found == pytest.approx({"Math": 0.75, "Focus": 0.0, "Ties": 0.8, "overall": (0.75 + 0 + 0.8) / 3})


def test_a_part_that_cannot_be_measured_gives_no_number():
    lone = item("tied:1", 2, 3, subset="Ties")
    assert numbers(protocols.rewardbench2, [lone], [[3, 2, 1]]) == {}
    mixed = numbers(protocols.rewardbench2, [lone, item("a", 1, 4, subset="Math")], [[3, 2, 1], [1, 0, 0, 0]])
    assert mixed == {"Math": 1.0, "overall": 1.0}
    prior = [item("a", subset="shp")]
    for protocol in (protocols.rewardbench, protocols.rewardbench_with_prior_sets):
        assert numbers(protocol, prior, [[1, 0]]) == {"prior sets": 1.0}


@pytest.mark.parametrize("name", ["rm-bench", "judgebench", "rewardbench", "heldout"])
def test_a_weight_is_a_number_of_copies(name: str):
    """What the bootstrap relies on: an item of weight 3 is that item three times."""
    rng = np.random.default_rng(1)
    tags = {
        "rm-bench": [{"domain": name} for name in ("chat", "code", "safety-refuse")],
        "judgebench": [{"domain": name} for name in ("knowledge", "math")],
        "rewardbench": [{"subset": name} for name in ("alpacaeval-easy", "math-prm", "hep-go")],
        "heldout": [{}],
    }[name]
    size = 6 if name == "rm-bench" else 2
    items = [item(f"{n}", size // 2, size, **tags[n % len(tags)]) for n in range(30)]
    scores = rng.normal(size=(30, size)).tolist()
    copies = rng.integers(0, 4, 30)
    many = [n for n in range(30) for _ in range(copies[n])]
    protocol = protocols.PROTOCOLS[name]
    weighted = protocol(items, scores, copies[None].astype(float))
    copied = protocol([items[n] for n in many], [scores[n] for n in many], ONE((1, len(many))))
    assert {key: value[0] for key, value in weighted.items()} == pytest.approx({k: v[0] for k, v in copied.items()})


def test_an_item_of_weight_zero_is_not_there_for_ties():
    items = [item(id, TIES[id][0], len(TIES[id][1]), subset="Ties") for id in TIES]
    scores = [value for _, value in TIES.values()]
    weighted = protocols.ties(items, scores, np.array([[1.0, 1, 0, 0], [2, 2, 2, 2]]))
    assert weighted.tolist() == pytest.approx([_ties(["tied:1", "ref:1"]), _ties(list(TIES))])


@pytest.mark.parametrize("name", sorted(protocols.PROTOCOLS))
def test_a_monotone_change_of_scores_changes_no_order(name: str):
    """But for Ties, which compares margins, only the order of scores counts."""
    rng = np.random.default_rng(2)
    right, size = {"rm-bench": (3, 6), "rewardbench2": (1, 4)}.get(name, (1, 2))
    items = [item(f"{n}", right, size, domain="chat", subset="Math" if size == 4 else "hep-go") for n in range(20)]
    scores = rng.normal(size=(20, size))
    protocol = protocols.PROTOCOLS[name]
    assert numbers(protocol, items, scores.tolist()) == numbers(protocol, items, np.exp(3 * scores + 1).tolist())
