"""Indexing, concatenation, padding and pickling of what travels between stages; shapes that do not fit are refused."""

from __future__ import annotations

import pickle
import pickletools
import random
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from align.types import Batch, Packed, Pairs, Prompts, Record, Rollouts, Sequences

ROWS = [[5], [], [7, 8, 9], [1, 2]]


def sequences() -> Sequences:
    """Three prompts, of which the second has no response; the first has two."""
    return Sequences(
        Packed.from_lists([[1, 2], [3], [4, 5, 6]]), Packed.from_lists([[10], [11, 12], []]), torch.tensor([0, 0, 2])
    )


def rollouts() -> Rollouts:
    logprob = torch.tensor([[-1.0, 0.0], [-2.0, -3.0], [0.0, 0.0]])
    return Rollouts(sequences(), logprob, logprob * 2, torch.tensor([True, False, True]), 0.5, 7)


def pairs() -> Pairs:
    prompts, responses = Packed.from_lists([[1], [2, 3]]), Packed.from_lists([[10], [11, 12], [13], [14, 15, 16]])
    return Pairs(Sequences(prompts, responses, torch.tensor([0, 0, 1, 1])), torch.tensor([3.0, 1.0]))


# Packed


def test_packed_by_hand():
    packed = Packed.from_lists(ROWS)
    assert packed.ids_N.tolist() == [5, 7, 8, 9, 1, 2]
    assert packed.offsets_B1.tolist() == [0, 1, 1, 4, 6]
    assert len(packed) == 4
    assert packed.lengths_B.tolist() == [1, 0, 3, 2]
    assert [packed.row(i).tolist() for i in range(4)] == packed.lists() == ROWS
    assert packed.mask().tolist() == [[True, False, False], [False] * 3, [True] * 3, [True, True, False]]
    assert packed.padded(-1).tolist() == [[5, -1, -1], [-1, -1, -1], [7, 8, 9], [1, 2, -1]]


def test_packed_select_in_any_order_with_repeats():
    packed = Packed.from_lists(ROWS)
    assert packed.select(torch.tensor([2, 0, 2, 1])).lists() == [[7, 8, 9], [5], [7, 8, 9], []]
    assert packed.select(torch.tensor([], dtype=torch.int64)).lists() == []
    assert packed.select(torch.tensor([1])).lists() == [[]]


def test_packed_select_against_lists():
    chance = random.Random(0)
    rows = [[chance.randrange(100) for _ in range(chance.randrange(6))] for _ in range(30)]
    index = [chance.randrange(30) for _ in range(50)]
    assert Packed.from_lists(rows).select(torch.tensor(index)).lists() == [rows[i] for i in index]


def test_packed_concatenate():
    whole = Packed.concatenate([Packed.from_lists(ROWS[:2]), Packed.from_lists([]), Packed.from_lists(ROWS[2:])])
    assert whole.lists() == ROWS
    assert whole.offsets_B1.tolist() == [0, 1, 1, 4, 6]
    assert Packed.concatenate(iter([Packed.from_lists(ROWS)])).lists() == ROWS


def test_packed_without_rows():
    empty = Packed.from_lists([])
    assert len(empty) == 0
    assert empty.lists() == []
    assert empty.mask().shape == empty.padded(0).shape == (0, 0)


@pytest.mark.parametrize("offsets", [[], [1, 3], [0, 2], [0, 4], [0, 1, 2]])
def test_offsets_that_do_not_cover_the_ids(offsets: list[int]):
    with pytest.raises(ValueError, match="end at 3 ids"):
        Packed(torch.tensor([1, 2, 3]), torch.tensor(offsets, dtype=torch.int64))


# Sequences, rollouts, pairs, batches


def test_sequences_by_hand():
    assert len(sequences()) == 3
    assert sequences().mask_BT.tolist() == [[True, False], [True, True], [False, False]]
    assert sequences().tokens_B().tolist() == [3, 4, 3]  # a shared prompt counts for each


def test_sequences_select_keeps_only_prompts_in_use():
    selected = sequences().select(torch.tensor([2, 1]))
    assert selected.responses.lists() == [[], [11, 12]]
    assert [selected.prompts.row(int(p)).tolist() for p in selected.prompt_B] == [[4, 5, 6], [1, 2]]
    assert len(selected.prompts) == 2
    assert len(sequences().select(torch.tensor([0, 1])).prompts) == 1


def test_prompts_keep_their_numbers():
    prompts = Prompts(Packed.from_lists(ROWS), torch.tensor([10, 11, 12, 13]), (0, 2), 5).select(torch.tensor([3, 0]))
    assert prompts.tokens.lists() == [[1, 2], [5]]
    assert prompts.index_P.tolist() == [13, 10]
    assert (prompts.stop_ids, prompts.step, len(prompts)) == ((0, 2), 5, 2)


def test_rollouts_become_a_batch_at_their_temperature():
    batch = rollouts().batch(advantage_B=torch.tensor([1.0, 2.0, 3.0]))
    assert (batch.temperature, batch.unit) == (0.5, 1)
    assert batch.columns["advantage_B"].tolist() == [1, 2, 3]
    assert rollouts().mask_BT.equal(sequences().mask_BT)
    assert len(rollouts()) == 3


def test_demonstrations_become_a_batch_without_columns():
    batch = sequences().batch()
    assert (batch.columns, batch.unit, batch.temperature) == ({}, 1, 1.0)


def test_pairs_select_and_batch():
    chosen = pairs().select(torch.tensor([1]))
    assert chosen.sequences.responses.lists() == [[13], [14, 15, 16]]
    assert chosen.sequences.prompts.lists() == [[2, 3]]
    assert chosen.strength_P.tolist() == [1.0]
    turned = pairs().select(torch.tensor([1, 0]))
    assert turned.sequences.responses.lists() == [[13], [14, 15, 16], [10], [11, 12]]
    batch = turned.batch()
    assert batch.columns["strength_B"].tolist() == [1, 1, 3, 3]
    assert (batch.unit, batch.temperature, len(turned)) == (2, 1.0, 2)


def test_batch_select_cuts_padded_columns_to_the_longest_response_left():
    columns = {"value_BT": torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.0, 0.0]]), "advantage_B": torch.tensor([5, 6, 7])}
    batch = Batch(sequences(), columns, unit=1, temperature=0.5)
    short = batch.select(torch.tensor([2, 0]))
    assert short.columns["value_BT"].tolist() == [[0], [1]]
    assert short.columns["advantage_B"].tolist() == [7, 5]
    assert short.sequences.responses.lists() == [[], [10]]
    assert (short.unit, short.temperature) == (1, 0.5)
    assert batch.select(torch.tensor([1])).columns["value_BT"].tolist() == [[2, 3]]
    assert batch.select(torch.tensor([], dtype=torch.int64)).columns["value_BT"].shape == (0, 0)


def test_sequences_concatenate():
    other = Sequences(Packed.from_lists([[1, 2]]), Packed.from_lists([[13, 14, 15]]), torch.tensor([0]))
    whole = Sequences.concatenate([sequences(), other, sequences()])
    assert whole.responses.lists() == [[10], [11, 12], [], [13, 14, 15], [10], [11, 12], []]
    assert whole.prompts.lists() == [[1, 2], [3], [4, 5, 6], [1, 2], [1, 2], [3], [4, 5, 6]]  # equal ones stay apart
    assert whole.prompt_B.tolist() == [0, 0, 2, 3, 4, 4, 6]
    assert whole.mask_BT.shape == (7, 3)
    alone = Sequences.concatenate([other])
    assert (alone.prompts.lists(), alone.responses.lists()) == ([[1, 2]], [[13, 14, 15]])


def test_rollouts_select_cuts_to_the_longest_response_left():
    short = rollouts().select(torch.tensor([0, 2]))
    assert short.sequences.responses.lists() == [[10], []]
    assert short.logprob_BT.tolist() == [[-1], [0]]
    assert short.untempered_logprob_BT.tolist() == [[-2], [0]]
    assert short.finished_B.tolist() == [True, True]
    assert (short.temperature, short.step, len(short)) == (0.5, 7, 2)
    turned = rollouts().select(torch.tensor([2, 1]))
    assert turned.sequences.responses.lists() == [[], [11, 12]]
    assert turned.logprob_BT.tolist() == [[0, 0], [-2, -3]]
    assert turned.finished_B.tolist() == [True, False]
    none = rollouts().select(torch.tensor([], dtype=torch.int64))
    assert (len(none), none.logprob_BT.shape) == (0, (0, 0))


def test_rollouts_concatenate_pads_to_the_longest():
    parts = [rollouts().select(torch.tensor(rows)) for rows in ([0], [1, 2], [0])]
    whole = Rollouts.concatenate(parts)
    assert whole.sequences.responses.lists() == [[10], [11, 12], [], [10]]
    assert whole.sequences.prompts.lists() == [[1, 2], [1, 2], [4, 5, 6], [1, 2]]
    assert whole.sequences.prompt_B.tolist() == [0, 1, 2, 3]  # groups are by index: equal prompts do not merge
    assert whole.logprob_BT.tolist() == [[-1, 0], [-2, -3], [0, 0], [-1, 0]]
    assert whole.untempered_logprob_BT.tolist() == [[-2, 0], [-4, -6], [0, 0], [-2, 0]]
    assert whole.finished_B.tolist() == [True, False, True, True]
    assert (whole.temperature, whole.step) == (0.5, 7)


def test_rollouts_pairs():
    prompts, responses = Packed.from_lists([[1], [2]]), Packed.from_lists([[10], [11, 11], [12], [13, 13, 13]])
    drawn = Sequences(prompts, responses, torch.tensor([0, 0, 1, 1]))
    zeros = torch.zeros(4, 3)
    whole = Rollouts(drawn, zeros, zeros, torch.ones(4, dtype=torch.bool), 0.5, 1)
    made = whole.pairs(torch.tensor([3, 0]), torch.tensor([2, 1]), torch.tensor([0.5, 2.0]))
    assert made.sequences.responses.lists() == [[13, 13, 13], [12], [10], [11, 11]]
    assert [made.sequences.prompts.row(int(p)).tolist() for p in made.sequences.prompt_B] == [[2], [2], [1], [1]]
    assert made.strength_P.tolist() == [0.5, 2.0]
    none = torch.tensor([], dtype=torch.int64)
    assert len(whole.pairs(none, none, torch.zeros(0)).sequences) == 0


def test_pairs_come_with_their_strength_and_other_columns():
    batch = pairs().batch(reference_B=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert batch.columns["strength_B"].tolist() == [3, 3, 1, 1]
    assert batch.columns["reference_B"].tolist() == [1, 2, 3, 4]
    part = batch.select(torch.tensor([2, 3]))
    assert {name: column.tolist() for name, column in part.columns.items()} == {
        "strength_B": [1, 1],
        "reference_B": [3, 4],
    }


# Refusals


def test_more_prompt_numbers_than_responses():
    with pytest.raises(ValueError, match="2 responses but 3 prompt indices"):
        Sequences(Packed.from_lists([[1]]), Packed.from_lists([[2], [3]]), torch.tensor([0, 0, 0]))


def wrong(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Packed(torch.zeros(2), torch.tensor([0, 2])),  # ids that are no integers
        lambda: Packed(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([0, 1])),
        lambda: Rollouts(sequences(), wrong(3, 2), wrong(3, 3), torch.ones(3, dtype=torch.bool), 1.0, 1),  # T differs
        lambda: Rollouts(sequences(), wrong(3, 2), wrong(3, 2), torch.ones(4, dtype=torch.bool), 1.0, 1),  # B differs
        lambda: Rollouts(sequences(), wrong(3, 2), wrong(3, 2), torch.ones(3), 1.0, 1),  # a mask that is no bool
        lambda: Rollouts(sequences(), wrong(6), wrong(6), torch.ones(3, dtype=torch.bool), 1.0, 1),
        lambda: Pairs(sequences(), torch.tensor([1, 2])),  # strengths that are no floats
        lambda: Pairs(sequences(), wrong(2, 1)),
        lambda: Prompts(Packed.from_lists([[1]]), torch.tensor([0.0]), (), 1),
    ],
)
def test_shapes_and_types_that_do_not_fit(build):
    with pytest.raises(TypeCheckError):
        build()


def test_records_are_frozen():
    with pytest.raises(FrozenInstanceError):
        pairs().strength_P = torch.zeros(2)  # type: ignore[misc]


# Pickling


def flat(value: object) -> object:
    """Everything a record holds, in comparable form."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, Record):
        return type(value), {name: flat(item) for name, item in vars(value).items()}
    if isinstance(value, dict):
        return {name: flat(item) for name, item in value.items()}
    return value


RECORDS = [
    Packed.from_lists(ROWS),
    Packed.from_lists([]),
    Prompts(Packed.from_lists(ROWS), torch.arange(4), (0, 2), 5),
    rollouts(),
    pairs(),
    Batch(sequences(), {"b_B": torch.tensor([True, False, True]), "x_BT": torch.ones(3, 2).double()}, 1, 0.5),
]


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_pickling_keeps_every_bit(record: Record, protocol: int):
    back = pickle.loads(pickle.dumps(record, protocol))
    assert flat(back) == flat(record)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_pickles_hold_numpy_buffers_and_no_torch_storage(record: Record):
    names = {text for _, text, _ in pickletools.genops(pickle.dumps(record)) if isinstance(text, str)}
    assert any(name.startswith("numpy") for name in names)
    assert not any(name.startswith("torch") for name in names)


def test_buffers_travel_beside_the_pickle():
    buffers: list[pickle.PickleBuffer] = []
    packed = Packed.from_lists([list(range(100_000))])
    header = pickle.dumps(packed, 5, buffer_callback=buffers.append)
    assert len(header) < 1000
    assert [buffer.raw().nbytes for buffer in buffers] == [800_000, 16]
    read_only = [np.frombuffer(buffer.raw(), dtype=np.uint8).tobytes() for buffer in buffers]
    back = pickle.loads(header, buffers=read_only)
    back.ids_N[0] = -1  # a copy of its own, though the buffers cannot be written
    assert back.ids_N[1:].equal(packed.ids_N[1:])
    assert pickle.loads(header, buffers=read_only).ids_N.equal(packed.ids_N)


def test_bfloat16_columns_travel_as_their_bits():
    # numpy has no such type: every one of the 2^16 patterns, numbers that are none included.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    rows = Sequences(Packed.from_lists([[1]]), Packed.from_lists([[2]] * 256), torch.zeros(256, dtype=torch.int64))
    sent = Batch(rows, {"w_BT": bits.view(torch.bfloat16).view(256, 256).T}, 1, 1.0)  # not contiguous
    back = pickle.loads(pickle.dumps(sent)).columns["w_BT"]
    assert (back.dtype, back.shape) == (torch.bfloat16, (256, 256))
    assert back.T.contiguous().view(torch.int16).flatten().equal(bits)
    back.zero_()  # a copy of its own
    assert pickle.loads(pickle.dumps(sent)).columns["w_BT"].view(torch.int16).ne(0).any()


def test_a_slice_and_a_tensor_with_gradient_pickle_as_their_values():
    scores = torch.arange(12.0, requires_grad=True).view(4, 3)[:, 1] * 2
    record = Batch(sequences(), {"score_B": scores[:3]}, 1, 1.0)
    back = pickle.loads(pickle.dumps(record)).columns["score_B"]
    assert back.tolist() == [2.0, 8.0, 14.0]
    assert not back.requires_grad
