"""Order of rows: a pure function of (seed, step)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from align.data.prompts import Order, PromptStream
from align.errors import DataError
from align.types import Packed


def test_each_epoch_visits_every_row_once_across_batch_borders():
    order = Order(size=5, batch_size=3, seed=7)
    rows = torch.cat([order.indices(step) for step in range(1, 6)]).tolist()  # 15 rows, three epochs
    epochs = [rows[0:5], rows[5:10], rows[10:15]]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew


def test_a_step_does_not_depend_on_what_was_asked_before():
    in_turn = [Order(10, 4, 3).indices(step).tolist() for step in range(1, 9)]
    assert Order(10, 4, 3).indices(8).tolist() == in_turn[7]
    assert Order(10, 4, 4).indices(8).tolist() != in_turn[7]


def test_the_order_is_pinned():
    # Resuming with another version of numpy or of this module must not change the order.
    assert Order(6, 6, 0).indices(1).tolist() == [0, 2, 1, 5, 4, 3]


def test_a_batch_larger_than_the_data_wraps():
    rows = Order(size=2, batch_size=5, seed=0).indices(1).tolist()
    assert sorted(rows[:2]) == sorted(rows[2:4]) == [0, 1]
    assert len(rows) == 5


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**64 + 5])
def test_any_seed(seed: int):
    assert sorted(Order(4, 4, seed).indices(1).tolist()) == [0, 1, 2, 3]


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match="no rows"):
        Order(size=0, batch_size=1, seed=0)


def test_senseless_arguments():
    with pytest.raises(ValueError, match="batch_size"):
        Order(size=1, batch_size=0, seed=0)
    with pytest.raises(ValueError, match="count from 1"):
        Order(size=1, batch_size=1, seed=0).indices(0)


def test_stream_numbers_prompts_within_the_step():
    stream = PromptStream(Packed.from_lists([[1], [2, 3], [4, 5, 6]]), batch_size=2, seed=1, stop_ids=(7,))
    batch = stream.batch(2)
    chosen = stream.order.indices(2).tolist()
    assert batch.tokens.lists() == [[[1], [2, 3], [4, 5, 6]][row] for row in chosen]
    assert batch.index_P.tolist() == [0, 1]
    assert batch.step == 2
    assert batch.stop_ids == (7,)


def test_the_package_loads_no_torch_and_names_its_submodules():
    script = (
        "import sys; from align import data; assert 'torch' not in sys.modules; assert 'prompts' in dir(data); "
        "assert data.prompts.Order(1, 1, 0); assert not hasattr(data, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
