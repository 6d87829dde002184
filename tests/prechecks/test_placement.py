"""Slots as written in a recipe."""

from __future__ import annotations

import pytest

from align.errors import ConfigError
from align.prechecks.placement import parse_slots, resolve


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("0", (0,)),
        ("7", (7,)),
        ("0-3", (0, 1, 2, 3)),
        ("2-2", (2,)),
        ("0,2-4", (0, 2, 3, 4)),
        ("8-11,3", (8, 9, 10, 11, 3)),  # in the order written
        (" 0 - 1 , 5 ", (0, 1, 5)),
        ("10-12", (10, 11, 12)),
    ],
)
def test_slots(text: str, slots: tuple[int, ...]):
    assert parse_slots("policy", text) == slots


@pytest.mark.parametrize("text", ["", ",", "0,", "a", "-1", "1-", "3-1", "0-1-2", "0:3", "1.5", "0x1", "0 1", "1 0-2"])
def test_what_is_no_slot(text: str):
    with pytest.raises(ConfigError) as caught:
        parse_slots("policy", text)
    assert "placement.policy" in str(caught.value)
    assert repr(text) in str(caught.value)
    assert caught.value.remedy
    assert "0-3" in caught.value.remedy


@pytest.mark.parametrize("text", ["0,0", "0-3,2", "1-2,0-1"])
def test_a_slot_named_twice(text: str):
    with pytest.raises(ConfigError, match=r"placement\.critic.*twice"):
        parse_slots("critic", text)


def test_roles_may_share_slots_and_default_to_the_first():
    placement = {"policy": "0-1", "reward": "1"}
    assert resolve(placement, ["policy", "reference", "reward"]) == {
        "policy": (0, 1),
        "reference": (0,),
        "reward": (1,),
    }
    assert resolve({}, iter(["reward"])) == {"reward": (0,)}


def test_a_role_of_another_recipe():
    with pytest.raises(ConfigError) as caught:
        resolve({"policy": "0", "critc": "1", "actor": "2"}, ["policy", "critic"])
    assert "actor, critc" in str(caught.value)
    assert caught.value.remedy == "roles of this recipe: policy, critic"
