"""Training that is saved and restored is the training that was never stopped, bit for bit, on whatever it goes on."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align import checkpoint
from align.engines import distributed, optimizer_state
from align.errors import ModelError, SaveError
from align.workers import base

sys.path.append(str(Path(__file__).parent))
suite: Any = importlib.import_module("resuming")

PLAIN = suite.Case("policy", 1, "float32")
ODD = suite.Case("critic", 2, "float32")
QUICK = {suite.Case("policy", stage, "float32") for stage in range(4)}


def by_name(case: Any) -> str:
    return case.name


@pytest.fixture(autouse=True, scope="module")
def alone():
    distributed.initialize_alone()


@pytest.fixture(scope="module")
def crossed(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of everything that was saved and taken up by other ranks and stages, and what two ranks returned."""
    folder = tmp_path_factory.mktemp("crossed")
    for case in suite.CROSSED:
        suite.leave(case, folder / "left-1" / case.name)
    ranks = suite.on_two_ranks("resumed", folder)
    suite.take_up_all(folder, suite.PAIRWISE)
    for case in suite.CROSSED:
        there = folder / "taken-2" / f"1-{case.name}" / case.name
        suite.take_up(case, there, folder / "back" / case.name)
    return folder, ranks


@pytest.fixture(scope="module")
def crossed_in_every_way(tmp_path_factory) -> Path:
    """The folder of everything that was saved and taken up, whatever the ranks and stages."""
    folder = tmp_path_factory.mktemp("crossed")
    for case in suite.CROSSED:
        suite.leave(case, folder / "left-1" / case.name)
    suite.on_two_ranks("crossed", folder)
    suite.take_up_all(folder, suite.CROSSINGS)
    return folder


# Exact resume


def check(found: dict[str, list[str]]) -> None:
    assert not any(found.values()), found
    assert {"fresh, restored", "fresh, end", "stepped, restored", "stepped, end"} <= found.keys()


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in suite.CASES], ids=by_name
)
def test_one_rank_goes_on_as_if_it_had_never_stopped(case, tmp_path):
    check(suite.resumed(case, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("case", suite.ON_TWO, ids=by_name)
def test_two_ranks_go_on_as_if_they_had_never_stopped(case, crossed):
    for found in crossed[1]:
        check(found[case.name])


# Other stages and numbers of ranks


def assert_same(ours: Path, theirs: Path) -> None:
    found, expected = suite.assembled(ours), suite.assembled(theirs)
    assert len(expected) > 10
    assert suite.differences(found, expected) == []


def assert_close(ours: Path, theirs: Path) -> None:
    found, expected = suite.assembled(ours), suite.assembled(theirs)
    for name, tensor in expected.items():
        assert float((found[name] - tensor).abs().max()) <= 1e-6 * max(1.0, float(tensor.abs().max())), name


def named(crossings: list[tuple[Any, int, Any, int]]) -> list[Any]:
    return [pytest.param(*run, id=f"{run[0].name}-on-{run[1]}-to-{run[2].stage}-on-{run[3]}") for run in crossings]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "there", "other", "here"), named(suite.PAIRWISE))
def test_other_ranks_and_stages_take_up_the_same_state(case, there, other, here, crossed):
    check_taken_up(case, there, other, here, crossed[0])


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize(("case", "there", "other", "here"), named(suite.CROSSINGS))
def test_any_number_of_ranks_and_any_stage_take_up_the_same_state(case, there, other, here, crossed_in_every_way):
    check_taken_up(case, there, other, here, crossed_in_every_way)


def check_taken_up(case: Any, there: int, other: Any, here: int, folder: Path) -> None:
    source = folder / f"left-{there}" / case.name
    taken = folder / f"taken-{here}" / f"{there}-{case.name}" / other.name
    assert len(list((source / "at").glob("*/rank-*"))) == there
    assert len(list((taken / "at").glob("*/rank-*"))) == here
    assert_same(taken / "at", source / "at")
    counters = [json.loads((path / "at" / case.kind / "engine.json").read_text()) for path in (source, taken)]
    assert counters[0]["step"] == counters[1]["step"] == 2
    assert counters[0]["adam_steps"] == counters[1]["adam_steps"]
    assert set(counters[0]["adam_steps"].values()) == {2}
    if case.dtype == "float32":
        assert_close(taken / "after", source / "after")


@pytest.mark.slow
@pytest.mark.parametrize("case", suite.CROSSED, ids=by_name)
def test_from_one_rank_to_two_and_back(case, crossed):
    assert_same(crossed[0] / "back" / case.name / "at", crossed[0] / "left-1" / case.name / "at")


@pytest.mark.slow
def test_pieces_were_cut_and_paddings_left_out(crossed):
    # Three elements on two ranks: at stage 3 each holds two places, the last of which is padding.
    folder = crossed[0] / "left-2" / "critic-3-float32" / "at" / "critic"
    sizes = [
        {key: len(x) for key, x in load_file(folder / optimizer_state.tensors_file(rank)).items()} for rank in (0, 1)
    ]
    assert (sizes[0]["odd|weight|0"], sizes[1]["odd|weight|2"]) == (2, 1)
    assert sum(size for rank in sizes for key, size in rank.items() if key.startswith("odd|")) == 9


# What is stored


def test_minus_zero_is_kept(tmp_path):
    first = suite.trainee(ODD)
    first.learn(suite.batches("critic", 0, 1)[0])
    for piece in first.engine.training._pieces:
        for kind in optimizer_state.KINDS:
            values = first.engine.training._adam.state[piece.flat]
            piece.within(piece.flat if kind == optimizer_state.WEIGHT else values[kind])[::2] = -0.0
    first.save(tmp_path, False)
    second = suite.trainee(ODD)
    second.restore(tmp_path)
    found = second.engine.training.collect()
    assert suite.differences(found, first.engine.training.collect()) == []
    assert all(torch.signbit(x[0]) and x[0] == 0 for x in found.values())


def test_a_checkpoint_before_the_first_step_brings_a_stepped_engine_back_to_it(tmp_path):
    straight = [suite.trainee(ODD).learn(batch) for batch in suite.batches("critic", 0, 1)]
    worker = suite.trainee(ODD)
    worker.save(tmp_path, False)
    for batch in suite.batches("critic", 1, 3):
        worker.learn(batch)
    worker.restore(tmp_path)
    assert worker.engine.step == 0
    assert [worker.learn(batch) for batch in suite.batches("critic", 0, 1)] == straight


def test_frozen_weights_are_not_stored(tmp_path):
    suite.trainee(suite.Case("lora", 1, "bfloat16")).save(tmp_path, False)
    names = {key.split("|")[0] for key in load_file(tmp_path / "lora" / optimizer_state.tensors_file(0))}
    assert len(names) == 2 * 2 * 7
    assert all(".lora_" in name for name in names)


@pytest.mark.parametrize("case", [PLAIN, ODD, suite.Case("lora", 3, "bfloat16")], ids=by_name)
def test_the_estimate_of_bytes_is_what_is_written(case, tmp_path):
    worker = suite.trainee(case)
    worker.learn(suite.batches(case.kind, 0, 1)[0])
    written = sum(record.size for record in worker.save(tmp_path, False).value)
    assert written <= worker.state_bytes().value + 2**14
    assert written >= 0.8 * worker.state_bytes().value


# Random numbers


def draws() -> list[Any]:
    return [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]


def test_every_generator_goes_on_where_it_was(tmp_path):
    worker = suite.trainee(PLAIN)
    suite.seed_everything(4)
    random.gauss(0, 1), np.random.randn()  # each makes two numbers and keeps one
    worker.save(tmp_path, False)
    expected = draws()
    suite.seed_everything(5)
    assert draws() != expected
    worker.restore(tmp_path)
    assert draws() == expected


def test_a_rank_without_stored_generators_gets_ones_of_its_own(tmp_path, monkeypatch):
    found = {}
    for name, seed, step, rank in [("a", 1, 2, 3), ("b", 9, 2, 3), ("c", 1, 9, 3), ("d", 1, 2, 4), ("again", 1, 2, 3)]:
        suite.seed_everything(0)
        monkeypatch.setattr(optimizer_state.dist, "get_rank", lambda rank=rank: rank)
        optimizer_state.restore_random_state(tmp_path, seed, step)
        found[name] = draws()
    assert found["again"] == found.pop("a")
    for i in range(5):
        assert len({str(numbers[i]) for numbers in found.values()}) == 4


# What does not fit is refused


def changed(folder: Path, change: Any) -> None:
    path = folder / "critic" / optimizer_state.tensors_file(0)
    tensors: dict[str, Tensor] = load_file(path)
    change(tensors)
    save_file(tensors, path)


REFUSED = {
    "a parameter less": (
        lambda x: [x.pop(f"odd|{kind}|0") for kind in optimizer_state.KINDS],
        "lacks 1 parameters: odd",
    ),
    "a parameter more": (lambda x: x.update({"strange|weight|0": torch.zeros(2)}), "the model does not, 1 .*: strange"),
    "an average less": (lambda x: x.pop("odd|exp_avg|0"), "odd is not stored as 3 elements of exp_avg"),
    "another size": (lambda x: x.update({"odd|weight|0": torch.zeros(4)}), "odd is not stored as 3 elements of weight"),
    "a gap": (lambda x: x.update({"odd|weight|1": x.pop("odd|weight|0")[1:]}), "not stored as 3 elements of weight"),
    "an overlap": (lambda x: x.update({"odd|weight|2": torch.zeros(1)}), "not stored as 3 elements of weight"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_the_model_is_named_and_nothing_changes(what, tmp_path):
    worker = suite.trainee(ODD)
    worker.save(tmp_path, False)
    worker.learn(suite.batches("critic", 0, 1)[0])
    before = suite.image(worker)
    changed(tmp_path, REFUSED[what][0])
    with pytest.raises(ModelError, match=REFUSED[what][1]):
        worker.restore(tmp_path)
    assert suite.differences(suite.image(worker), before) == []


@pytest.mark.parametrize("name", [optimizer_state.tensors_file(0), optimizer_state.COUNTERS])
def test_a_missing_file_is_named(name, tmp_path):
    worker = suite.trainee(ODD)
    worker.save(tmp_path, False)
    (tmp_path / "critic" / name).unlink()
    with pytest.raises(ModelError, match=f"critic/{name}: the checkpoint lacks this file"):
        worker.restore(tmp_path)


@pytest.mark.slow
def test_a_missing_file_of_another_rank_is_named(crossed, tmp_path):
    source = crossed[0] / "left-2" / "critic-2-float32" / "at"
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    (tmp_path / "critic" / optimizer_state.tensors_file(1)).unlink()
    with pytest.raises(ModelError, match="rank-00001"):
        suite.trainee(ODD).restore(tmp_path)


# Saving while training goes on


def test_a_save_that_overlaps_holds_the_state_at_its_beginning(tmp_path, monkeypatch):
    worker, may_write = suite.trainee(ODD), threading.Event()

    def waiting(*arguments: Any) -> Any:
        assert may_write.wait(60)
        return checkpoint.write_tensors(*arguments)

    monkeypatch.setattr(base, "write_tensors", waiting)
    worker.learn(suite.batches("critic", 0, 1)[0])
    before, noise = worker.engine.training.collect(), optimizer_state.random_state()
    assert worker.save(tmp_path, True).value == []
    torch.rand(1)
    worker.learn(suite.batches("critic", 1, 2)[0])
    assert not list(tmp_path.rglob("*.safetensors"))
    may_write.set()
    records = worker.saved().value
    assert worker.saved().value == []  # given once
    assert [record.name for record in records] == [
        "critic/rank-00000.safetensors",
        "critic/rng-00000.safetensors",
        "critic/engine.json",
    ]
    assert suite.differences(load_file(tmp_path / records[0].name), before) == []
    assert suite.differences(load_file(tmp_path / records[1].name), noise) == []
    assert json.loads((tmp_path / records[2].name).read_text())["step"] == 1


def test_what_goes_wrong_while_writing_is_told_by_saved_and_the_next_save_is_free_of_it(tmp_path, monkeypatch):
    worker = suite.trainee(ODD)
    (tmp_path / "critic").mkdir()
    (tmp_path / "critic" / optimizer_state.tensors_file(0)).touch()
    worker.save(tmp_path, True)
    with pytest.raises(SaveError, match=r"critic/rank-00000\.safetensors: cannot be written: File exists"):
        worker.saved()
    with pytest.raises(SaveError, match=r"critic/rank-00000\.safetensors"):
        worker.save(tmp_path, False)
    worker.save(tmp_path, True)  # nobody asks for this one
    (tmp_path / "other").mkdir()
    worker.save(tmp_path / "other", True)
    assert len(worker.saved().value) == 3

    def broken(*arguments: Any) -> Any:
        raise MemoryError("no memory")

    monkeypatch.setattr(base, "write_tensors", broken)
    worker.save(tmp_path, True)
    with pytest.raises(SaveError, match="critic: the training state cannot be written: MemoryError: no memory"):
        worker.saved()
