"""Order of rows: a pure function of (seed, step)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from align.data.prompts import BatchOrder, PromptStream, first_prompts, group_members, minibatches
from align.errors import DataError
from align.types import Packed


def test_each_epoch_visits_every_row_once_across_batch_borders():
    order = BatchOrder(size=5, batch_size=3, seed=7)
    rows = torch.cat([order.indices(step) for step in range(1, 6)]).tolist()  # 15 rows, three epochs
    epochs = [rows[0:5], rows[5:10], rows[10:15]]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew


def test_a_step_does_not_depend_on_what_was_asked_before():
    in_turn = [BatchOrder(10, 4, 3).indices(step).tolist() for step in range(1, 9)]
    assert BatchOrder(10, 4, 3).indices(8).tolist() == in_turn[7]
    assert BatchOrder(10, 4, 4).indices(8).tolist() != in_turn[7]


def test_the_order_is_pinned():
    # Resuming with another version of numpy or of this module must not change the order.
    assert BatchOrder(6, 6, 0).indices(1).tolist() == [0, 2, 1, 5, 4, 3]


def test_a_batch_larger_than_the_data_wraps():
    rows = BatchOrder(size=2, batch_size=5, seed=0).indices(1).tolist()
    assert sorted(rows[:2]) == sorted(rows[2:4]) == [0, 1]
    assert len(rows) == 5


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**64 + 5])
def test_any_seed(seed: int):
    assert sorted(BatchOrder(4, 4, seed).indices(1).tolist()) == [0, 1, 2, 3]


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match="no rows"):
        BatchOrder(size=0, batch_size=1, seed=0)


def test_senseless_arguments():
    with pytest.raises(ValueError, match="batch_size"):
        BatchOrder(size=1, batch_size=0, seed=0)
    with pytest.raises(ValueError, match="count from 1"):
        BatchOrder(size=1, batch_size=1, seed=0).indices(0)


def test_stream_numbers_prompts_within_the_step():
    stream = PromptStream(Packed.from_lists([[1], [2, 3], [4, 5, 6]]), batch_size=2, seed=1, stop_ids=(7,))
    batch = stream.batch(2)
    chosen = stream.order.indices(2).tolist()
    assert batch.tokens.lists() == [[[1], [2, 3], [4, 5, 6]][row] for row in chosen]
    assert batch.index_P.tolist() == [0, 1]
    assert batch.step == 2
    assert batch.stop_ids == (7,)


TEXTS = [[n] * (n + 1) for n in range(7)]


def test_attempts_of_a_step_are_batches_of_their_own():
    stream = PromptStream(Packed.from_lists(TEXTS), batch_size=2, seed=1, stop_ids=(7,), attempts=3)
    seen = []
    for step in (1, 2):
        for attempt in range(3):
            batch = stream.batch(step, attempt)
            # Numbers go on within the step, so that no two prompts of it share their noise.
            assert batch.index_P.tolist() == [2 * attempt, 2 * attempt + 1]
            assert (batch.step, batch.stop_ids) == (step, (7,))
            seen += [row[0] for row in batch.tokens.lists()]
    # Six batches in a row of the one order: no row twice before every other was seen.
    assert seen == torch.cat([stream.order.indices(n) for n in range(1, 7)]).tolist()
    assert sorted(seen[:7]) == list(range(7))


def test_an_attempt_does_not_depend_on_what_was_asked_before():
    make = lambda attempts: PromptStream(Packed.from_lists(TEXTS), 2, 1, (7,), attempts)  # noqa: E731
    whole = make(2).batch(3, 1)
    assert whole.tokens.lists() == make(2).batch(3, 1).tokens.lists() == make(1).batch(6).tokens.lists()
    assert make(1).batch(3).tokens.lists() == make(1).batch(3, 0).tokens.lists()


def test_the_first_prompts():
    held_out = first_prompts(Packed.from_lists(TEXTS), 3, (7, 8), -1)
    assert held_out.tokens.lists() == TEXTS[:3]
    assert held_out.index_P.tolist() == [0, 1, 2]
    assert (held_out.stop_ids, held_out.step) == ((7, 8), -1)
    assert (
        first_prompts(Packed.from_lists(TEXTS[:2]), 3, (7,), -1).tokens.lists() == TEXTS[:2]
    )  # all where there are fewer


@pytest.mark.parametrize(("groups", "count"), [(10, 3), (8, 4), (5, 5), (64, 8), (7, 1)])
def test_minibatches_are_a_partition_of_each_epoch(groups: int, count: int):
    parts = list(minibatches(groups, count, epochs=3, seed=5, step=2))
    assert len(parts) == 3 * count
    for epoch in range(3):
        rows = [part.tolist() for part in parts[epoch * count : (epoch + 1) * count]]
        assert sorted(row for part in rows for row in part) == list(range(groups))
        assert all(part == sorted(part) for part in rows)
        assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_minibatches_are_shuffled_by_seed_step_and_epoch():
    of = lambda seed, step: [part.tolist() for part in minibatches(12, 3, 2, seed, step)]  # noqa: E731
    assert of(0, 1) == of(0, 1)
    assert len({str(parts) for parts in (of(0, 1)[:3], of(0, 1)[3:], of(0, 2)[:3], of(1, 1)[:3])}) == 4
    # Step 1 and epoch 1 differ from step 2 and epoch 0, which a sum of the two would not.
    assert of(0, 1)[3:] != of(0, 2)[:3]


def test_minibatches_are_pinned():
    assert [part.tolist() for part in minibatches(6, 2, 1, seed=0, step=1)] == [[0, 3, 5], [1, 2, 4]]


def test_a_single_minibatch_keeps_the_order():
    assert [part.tolist() for part in minibatches(4, 1, 2, seed=9, step=3)] == [[0, 1, 2, 3]] * 2


def test_fewer_groups_than_minibatches_leave_some_empty():
    assert sorted(len(part) for part in minibatches(2, 4, 1, seed=0, step=1)) == [0, 0, 1, 1]
    assert [len(part) for part in minibatches(0, 2, 1, seed=0, step=1)] == [0, 0]


def test_members_of_groups():
    assert group_members(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]
    assert group_members(torch.tensor([1]), 1).tolist() == [1]
    assert group_members(torch.tensor([], dtype=torch.int64), 3).tolist() == []


def test_the_package_loads_no_torch_and_names_its_submodules():
    script = (
        "import sys; from align import data; assert 'torch' not in sys.modules; assert 'prompts' in dir(data); "
        "assert data.prompts.BatchOrder(1, 1, 0); assert not hasattr(data, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
