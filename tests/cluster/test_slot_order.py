"""Which node each slot lies on: by hand, against all orders, and on a Ray cluster of nodes with pretended GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from align.cluster.slot_order import slot_order

HERE = Path(__file__).parent


def nodes(text: str, roles: list[tuple[int, ...]]) -> str:
    """Nodes in the order of slots; ``text`` names the node of each bundle."""
    node_of = dict(enumerate(text))
    order = slot_order(node_of, roles)
    assert sorted(order) == list(range(len(text)))
    return "".join(node_of[bundle] for bundle in order)


def span(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


@pytest.mark.parametrize(
    ("bundles", "roles", "expected"),
    [
        ("AAAAAAAABBBBCCCCCCCC", [], "AAAAAAAACCCCCCCCBBBB"),  # what Ray gives for 20 slots on nodes of 8 GPUs
        ("AAAAAAAABBBBCCCCCCCC", [span(0, 7), span(8, 15), span(16, 19)], "AAAAAAAACCCCCCCCBBBB"),
        ("AAAAAAAABBBBCCCCCCCC", [span(0, 3), span(4, 11), span(12, 19)], "BBBBAAAAAAAACCCCCCCC"),
        ("BBAAAAAAAA", [span(0, 7), span(8, 9)], "AAAAAAAABB"),
        ("BBAAAAAAAA", [span(0, 1), span(2, 9)], "BBAAAAAAAA"),
        ("ABABAB", [span(0, 2), span(3, 5)], "AAABBB"),
        ("A", [(0,), (0,), (0,)], "A"),
    ],
)
def test_by_hand(bundles: str, roles: list[tuple[int, ...]], expected: str):
    assert nodes(bundles, roles) == expected


def test_no_order_of_whole_nodes_is_better():
    bundles, roles = "AAAABBCCCDDDD", [span(0, 2), span(3, 6), span(7, 10), span(11, 12), (0, 3, 7)]
    count = lambda placed: sum(len({placed[slot] for slot in slots}) for slots in roles)  # noqa: E731
    every = ["".join(node * bundles.count(node) for node in order) for order in permutations("ABCD")]
    assert count(nodes(bundles, roles)) == min(map(count, every))


def test_many_nodes_of_one_size_have_one_order():
    bundles = "ABCDEFGH" * 64
    assert nodes(bundles, [span(0, 255), span(256, 511)]) == "".join(node * 64 for node in "ABCDEFGH")


@pytest.fixture(scope="module")
def placed() -> dict[str, Any]:
    """What `fake_nodes.py` prints."""
    run = subprocess.run(
        [sys.executable, str(HERE / "fake_nodes.py")],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(("slots", "sizes"), [(8, [8]), (10, [8, 2]), (12, [8, 4]), (20, [8, 8, 4]), (24, [8, 8, 8])])
def test_nodes_of_a_reservation(placed: dict[str, Any], slots: int, sizes: list[int]):
    """Ray chooses how many bundles a node gets; whole nodes come first, and a node's slots are adjacent."""
    runs = placed["nodes"][str(slots)]
    assert runs == sorted(runs, reverse=True)
    assert runs == sizes


def test_actors_of_seven_roles_share_a_gpu_and_roles_of_eight_fill_a_node(placed: dict[str, Any]):
    seven = placed["seven roles on a slot"]
    assert len(seven) == 7
    assert len({(place["node"], place["gpu"]) for place in seven}) == 1
    assert all(place["gpu"].isdigit() for place in seven)  # one GPU, although each has a seventh of it
    wide = placed["roles of eight"]
    for role in ("policy", "reward"):
        assert len({place["node"] for place in wide[role]}) == 1
        assert [place["gpu"] for place in wide[role]] == ["0", "7"]
    assert {place["threads"] for place in wide["policy"]} == {"1"}
