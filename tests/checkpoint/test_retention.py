"""Which checkpoints stay: cases worked out by hand."""

import math

import pytest

from align.checkpoint.store import kept_steps
from align.config import CheckpointConfig
from align.errors import SaveError

RISING = {10: 1.0, 20: 2.0, 30: 3.0, 40: 4.0, 50: 5.0}
HILL = {10: 1.0, 20: 5.0, 30: 4.0, 40: 2.0, 50: 3.0}
CASES = {
    "the latest one": ({}, RISING, set(), {50}, 1),
    "the latest two": ({}, RISING, set(), {40, 50}, 2),
    "fewer than are asked for": ({}, {10: 1.0}, set(), {10}, 3),
    "none": ({}, {}, set(), set(), 1),
    "the two highest": ({"keep_best": 2}, HILL, set(), {20, 30, 50}, 1),
    "the two lowest": ({"keep_best": 2, "best_is": "lowest"}, HILL, set(), {10, 40, 50}, 1),
    "the best is among the latest": ({"keep_best": 1}, RISING, set(), {40, 50}, 2),
    "of equals the later": ({"keep_best": 1}, dict.fromkeys(RISING, 1.0) | {50: 0.0}, set(), {40, 50}, 1),
    "of equals the later, lowest": (
        {"keep_best": 1, "best_is": "lowest"},
        dict.fromkeys(RISING, 1.0) | {50: 2.0},
        set(),
        {40, 50},
        1,
    ),
    "metric missing in some": ({"keep_best": 2}, HILL | {20: None, 30: None}, set(), {40, 50}, 1),
    "metric missing in all": ({"keep_best": 2}, dict.fromkeys(HILL), set(), {50}, 1),
    "not finite is no candidate": ({"keep_best": 1}, HILL | {20: math.nan, 30: math.inf}, set(), {50}, 1),
    "every 20th": ({"keep_every": 20}, RISING, set(), {20, 40, 50}, 1),
    "pinned": ({}, RISING, {10, 30}, {10, 30, 50}, 1),
    "pinned and not there": ({}, RISING, {99}, {50}, 1),
    "all together": ({"keep_best": 1, "keep_every": 40}, HILL, {10}, {10, 20, 40, 50}, 1),
    "by number, not by text": ({}, {999_990: 0.0, 1_000_000: 0.0}, set(), {1_000_000}, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_kept(name):
    settings, values, pinned, wanted, keep_latest = CASES[name]
    section = CheckpointConfig(keep_latest=keep_latest, best_by="score", **settings)
    metrics = {step: {} if value is None else {"score": value} for step, value in values.items()}
    assert kept_steps(metrics, pinned, section) == wanted


def published(store):
    return [path.name for path in sorted(store.folder.iterdir()) if path.is_dir()]


def test_a_run_keeps_its_latest_best_and_pinned_checkpoints(tmp_path, small):
    store = small.make_store(tmp_path / "checkpoints", keep_latest=1, keep_best=1, best_by="score", keep_every=40)
    seen = []
    for step, score in ((10, 1.0), (20, 9.0), (30, 2.0), (40, 3.0), (50, 4.0), (60, 5.0)):
        small.save(store, step, metrics={"score": score})
        if step == 10:
            store.pin(10)
        seen.append(store.steps())
    # 20 is the best, 40 is a multiple of 40, 10 is pinned
    assert seen == [[10], [10, 20], [10, 20, 30], [10, 20, 40], [10, 20, 40, 50], [10, 20, 40, 60]]
    for step in seen[-1]:
        small.check_whole(store.open(store.folder / f"step-{step:06d}"))
    assert store.notes == [] and small.torsos(store.folder) == []


def test_a_pin_needs_a_checkpoint(tmp_path, small):
    store = small.make_store(tmp_path / "checkpoints")
    small.save(store, 10)
    with pytest.raises(SaveError, match="step-000020"):
        store.pin(20)
    assert not (store.folder / "step-000020.pinned").exists()


def test_a_damaged_checkpoint_neither_counts_nor_is_deleted(tmp_path, small):
    store = small.make_store(tmp_path / "checkpoints", keep_latest=2)
    for step in (10, 20):
        small.save(store, step)
    (store.folder / "step-000020/driver.json").unlink()
    small.save(store, 30)
    assert store.steps() == [10, 20, 30]
    assert "step-000020" in store.notes[0] and "driver.json" in store.notes[0]
    small.save(store, 40)
    assert store.steps() == [20, 30, 40]


def test_what_lies_beside_is_left_alone(tmp_path, small):
    store = small.make_store(tmp_path / "checkpoints", keep_latest=1)
    small.save(store, 10)
    for name in ("step-40", "step-000005.bad", "notes.txt"):
        (store.folder / name).mkdir()
    small.save(store, 20)
    assert published(store) == ["notes.txt", "step-000005.bad", "step-000020", "step-40"]
