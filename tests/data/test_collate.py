"""Layouts index by index on a tiny batch, and how rows are divided over micro-batches and ranks."""

from __future__ import annotations

import random

import pytest
import torch

from align.data import collate
from align.types import Packed, Sequences


def tiny() -> Sequences:
    """Prompts [1 2] and [3 4 5]; responses [6 7] and [8] to the first, [9 10 11] and nothing to the second."""
    return Sequences(
        Packed.from_lists([[1, 2], [3, 4, 5]]),
        Packed.from_lists([[6, 7], [8], [9, 10, 11], []]),
        torch.tensor([0, 0, 1, 1]),
    )


def ragged(seed: int, num_prompts: int, K: int, longest: int = 9) -> Sequences:
    """Prompts of 1 to ``longest`` tokens with K responses of 0 to ``longest``; every token id is different."""
    chance, number = random.Random(seed), iter(range(1, 10**6))
    prompts = [[next(number) for _ in range(chance.randint(1, longest))] for _ in range(num_prompts)]
    responses = [[next(number) for _ in range(chance.randint(0, longest))] for _ in range(num_prompts * K)]
    return Sequences(
        Packed.from_lists(prompts), Packed.from_lists(responses), torch.arange(num_prompts).repeat_interleave(K)
    )


# Layouts


def attention_of(sequences: Sequences) -> collate.PackedAttention:
    attention = collate.packed(sequences).attention
    assert attention is not None
    return attention


def test_packed_by_hand():
    layout = collate.packed(tiny())
    # position in flat:          0  1  2  3  4  5  6  7  8   9  10
    assert layout.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    assert layout.position_ids.tolist() == [[0, 1, 0, 1, 2, 2, 3, 2, 3, 4, 5]]
    assert layout.attention_mask is None
    # The first token of a response is predicted by the last of its prompt (1 or 4), others by the token before.
    assert layout.predicting_N.tolist() == [1, 5, 1, 4, 8, 9]
    assert layout.target_N.tolist() == [6, 7, 8, 9, 10, 11]
    assert layout.last_B.tolist() == [6, 7, 10, 4]  # the last without a response ends with its prompt
    assert layout.mask_BT.tolist() == [[True, True, False], [True, False, False], [True] * 3, [False] * 3]


def test_padded_right_by_hand():
    layout = collate.padded(tiny())
    assert layout.input_ids.tolist() == [
        [1, 2, 6, 7, 0, 0],
        [1, 2, 8, 0, 0, 0],
        [3, 4, 5, 9, 10, 11],
        [3, 4, 5, 0, 0, 0],
    ]
    assert layout.attention_mask is not None
    assert layout.attention_mask.sum(1).tolist() == [4, 3, 6, 3]
    assert layout.attention_mask.equal((layout.input_ids > 0).long())
    assert layout.position_ids.tolist() == [
        [0, 1, 2, 3, 3, 3],
        [0, 1, 2, 2, 2, 2],
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 2, 2, 2],
    ]
    # Row i begins at flat index 6 i.
    assert layout.predicting_N.tolist() == [1, 2, 6 + 1, 12 + 2, 12 + 3, 12 + 4]
    assert layout.target_N.tolist() == [6, 7, 8, 9, 10, 11]
    assert layout.last_B.tolist() == [3, 6 + 2, 12 + 5, 18 + 2]
    assert layout.attention is None


def test_padded_left_by_hand():
    layout = collate.padded(tiny(), side="left")
    assert layout.input_ids.tolist() == [
        [0, 0, 1, 2, 6, 7],
        [0, 0, 0, 1, 2, 8],
        [3, 4, 5, 9, 10, 11],
        [0, 0, 0, 3, 4, 5],
    ]
    assert layout.attention_mask is not None
    assert layout.attention_mask.equal((layout.input_ids > 0).long())
    assert layout.position_ids.tolist() == [
        [0, 0, 0, 1, 2, 3],
        [0, 0, 0, 0, 1, 2],
        [0, 1, 2, 3, 4, 5],
        [0, 0, 0, 0, 1, 2],
    ]
    assert layout.predicting_N.tolist() == [3, 4, 6 + 4, 12 + 2, 12 + 3, 12 + 4]
    assert layout.last_B.tolist() == [5, 11, 17, 23]  # always the last column


def test_attention_groups_by_hand():
    prompts, *responses = attention_of(tiny()).groups
    # Prompts of 2 and 3 tokens share a group; the shorter repeats its last token, which is not valid.
    assert prompts.query_RQ.tolist() == prompts.key_RK.tolist() == [[0, 1, 1], [2, 3, 4]]
    assert prompts.mask_RQK is None
    assert prompts.valid.tolist() == [0, 1, 3, 4, 5]
    # Responses of 1, 2 and 3 tokens: 2 > 1.5 * 1 parts the first from the others, 3 <= 1.5 * 2 does not.
    one, more = responses
    assert one.query_RQ.tolist() == [[7]]
    assert one.key_RK.tolist() == [[0, 1, 7]]
    assert one.mask_RQK is not None
    assert one.mask_RQK.tolist() == [[[True, True, True]]]
    assert more.query_RQ.tolist() == [[5, 6, 6], [8, 9, 10]]
    # Keys: the prompt right-aligned to three places, then the response.
    assert more.key_RK[:, 3:].tolist() == [[5, 6, 6], [8, 9, 10]]
    assert more.key_RK[0, 1:3].tolist() == [0, 1]
    assert more.key_RK[1, :3].tolist() == [2, 3, 4]
    assert more.valid.tolist() == [0, 1, 3, 4, 5]
    assert more.mask_RQK is not None
    F, T = False, True
    assert more.mask_RQK.tolist() == [
        [[F, T, T, T, F, F], [F, T, T, T, T, F], [F, T, T, T, T, T]],
        [[T, T, T, T, F, F], [T, T, T, T, T, F], [T, T, T, T, T, T]],
    ]


def visible_in_groups(attention: collate.PackedAttention) -> dict[int, list[int]]:
    """For each flat token, the flat tokens it attends to, in the order in which a model sees its outputs."""
    seen: list[tuple[int, list[int]]] = []
    for group in attention.groups:
        R, Q = group.query_RQ.shape
        mask = group.mask_RQK
        if mask is None:
            mask = torch.ones(Q, Q, dtype=torch.bool).tril().expand(R, Q, Q)
        for flat in group.valid.tolist():
            r, q = divmod(flat, Q)
            seen.append((int(group.query_RQ[r, q]), group.key_RK[r][mask[r, q]].tolist()))
    return dict(seen[i] for i in attention.order.tolist())


def visible_in_rows(attention: collate.PackedAttention) -> dict[int, list[int]]:
    """The same for rows of any length: query q of Q in a row of K keys sees the first K - Q + q + 1."""
    rows, seen = attention.ragged, {}
    assert rows.query_start_R1.dtype == rows.key_start_R1.dtype == torch.int32
    query_start, key_start = rows.query_start_R1.tolist(), rows.key_start_R1.tolist()
    keys = list(range(key_start[-1])) if rows.key_M is None else rows.key_M.tolist()
    assert len(keys) == key_start[-1]
    lengths = []
    for a, b, c, d in zip(query_start[:-1], query_start[1:], key_start[:-1], key_start[1:], strict=True):
        lengths.append((b - a, d - c))
        seen |= {query: keys[c : d - (b - query) + 1] for query in range(a, b)}
    assert (rows.max_queries, rows.max_keys) == tuple(max(column) for column in zip(*lengths, strict=True))
    assert all(queries > 0 for queries, _ in lengths)
    return seen


@pytest.mark.parametrize("visible", [visible_in_groups, visible_in_rows])
@pytest.mark.parametrize("seed", range(5))
def test_every_token_sees_its_prompt_and_its_past_and_nothing_else(seed: int, visible):
    sequences = ragged(seed, num_prompts=6, K=3)
    prompts, responses = sequences.prompts, sequences.responses
    expected = {}
    for a, b in zip(prompts.offsets_B1[:-1].tolist(), prompts.offsets_B1[1:].tolist(), strict=True):
        expected |= {i: list(range(a, i + 1)) for i in range(a, b)}
    shift = len(prompts.ids_N)
    for row, prompt in enumerate(sequences.prompt_B.tolist()):
        own = range(int(prompts.offsets_B1[prompt]), int(prompts.offsets_B1[prompt + 1]))
        a, b = (shift + int(offset) for offset in responses.offsets_B1[row : row + 2])
        expected |= {i: [*own, *range(a, i + 1)] for i in range(a, b)}
    got = visible(attention_of(sequences))
    assert got == expected
    assert list(got) == sorted(got)  # `order` puts outputs where their tokens are


@pytest.mark.parametrize("layout", [collate.packed, collate.padded, lambda s: collate.padded(s, "left")])
@pytest.mark.parametrize("seed", range(3))
def test_states_read_are_those_before_each_target_and_at_each_end(layout, seed: int):
    sequences = ragged(seed, num_prompts=5, K=2)
    made = layout(sequences)
    flat, position = made.input_ids.flatten(), made.position_ids.flatten()
    before, at, last, last_at = [], [], [], []
    for row, prompt in zip(sequences.responses.lists(), sequences.prompt_B.tolist(), strict=True):
        whole = sequences.prompts.row(prompt).tolist() + row
        start = len(whole) - len(row)
        before += whole[start - 1 : -1] if row else []
        at += range(start - 1, len(whole) - 1)
        last.append(whole[-1])
        last_at.append(len(whole) - 1)
    assert flat[made.predicting_N].tolist() == before
    assert position[made.predicting_N].tolist() == at
    assert flat[made.last_B].tolist() == last
    assert position[made.last_B].tolist() == last_at
    assert made.target_N.tolist() == sequences.responses.ids_N.tolist()


def test_rows_of_a_group_differ_by_at_most_half():
    lengths = torch.tensor([10, 1, 15, 0, 16, 2, 100, 3])
    groups = [lengths[rows].tolist() for rows in collate._length_groups(lengths)]
    assert groups == [[1], [2, 3], [10, 15], [16], [100]]  # 15 <= 1.5 * 10 < 16; the empty row is left out


def test_rows_of_any_length_by_hand():
    rows = attention_of(tiny()).ragged
    assert rows.query_start_R1.tolist() == [0, 2, 5, 7, 8, 11]  # two prompts, then three responses that have tokens
    assert rows.key_start_R1.tolist() == [0, 2, 5, 9, 12, 18]
    assert rows.key_M is not None
    assert rows.key_M.tolist() == [*(0, 1, 2, 3, 4), *(0, 1, 5, 6), *(0, 1, 7), *(2, 3, 4, 8, 9, 10)]
    assert (rows.max_queries, rows.max_keys) == (3, 6)


def test_rows_of_prompts_alone_need_no_copies_of_keys():
    rows = attention_of(Sequences(tiny().prompts, Packed.from_lists([[], []]), torch.tensor([0, 1]))).ragged
    assert rows.key_M is None
    assert rows.query_start_R1.tolist() == rows.key_start_R1.tolist() == [0, 2, 5]


def test_layouts_stay_where_they_are_on_a_cpu_and_move_whole_elsewhere():
    layout = collate.packed(tiny())
    assert layout.to(torch.device("cpu")) is layout
    moved = layout.to(torch.device("meta"))
    attention = moved.attention
    assert attention is not None
    tensors = [v for v in vars(moved).values() if isinstance(v, torch.Tensor)]
    tensors += [v for group in attention.groups for v in vars(group).values() if v is not None] + [attention.order]
    tensors += [v for v in vars(attention.ragged).values() if isinstance(v, torch.Tensor)]
    # The layout, the group of prompts without a mask, two groups of responses, the order, rows of any length.
    assert len(tensors) == 6 + 3 + 4 + 4 + 1 + 3
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.attention_mask is None
    assert attention.groups[0].mask_RQK is None


def test_attention_is_described_once_and_only_as_it_is_read():
    attention = attention_of(tiny())
    assert attention.ragged is attention.ragged
    assert "groups" not in vars(attention)  # so no mask is made for a kernel that reads none
    assert attention.groups is attention.groups


# Micro-batches


def tokens(sequences: Sequences, rows: torch.Tensor) -> int:
    """Tokens of a forward pass over ``rows``, each prompt once."""
    part = sequences.select(rows)
    return len(part.prompts.ids_N) + len(part.responses.ids_N)


@pytest.mark.parametrize("unit", [1, 2, 4])
@pytest.mark.parametrize("budget", [12, 30, 60, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_micro_batches_cover_all_rows_once_within_the_budget(unit: int, budget: int, seed: int):
    sequences = ragged(seed, num_prompts=12, K=4)
    batches = collate.micro_batches(sequences, unit, budget)
    assert sorted(torch.cat(batches).tolist()) == list(range(48))
    for rows in batches:
        units = rows.view(-1, unit)
        assert (units[:, 0] % unit == 0).all()
        assert (units == units[:, :1] + torch.arange(unit)).all()
        assert tokens(sequences, rows) <= budget or len(rows) == unit
    if budget == 10**6:
        assert len(batches) == 1


def test_micro_batches_by_hand():
    # Prompt 0 (2 tokens) with 2 + 1, prompt 1 (3 tokens) with 3 + 0: 5 and 6 tokens, each prompt once.
    assert [b.tolist() for b in collate.micro_batches(tiny(), 1, 11)] == [[0, 1, 2, 3]]
    assert [b.tolist() for b in collate.micro_batches(tiny(), 1, 10)] == [[0, 1], [2, 3]]
    # A budget of 4 parts the rows of prompt 0 (2 + 2 and 2 + 1 tokens, smallest first); row 2 has 6 and stands alone.
    assert [b.tolist() for b in collate.micro_batches(tiny(), 1, 4)] == [[1], [3], [0], [2]]
    assert [b.tolist() for b in collate.micro_batches(tiny(), 2, 4)] == [[0, 1], [2, 3]]  # too long, but never parted
    assert [b.tolist() for b in collate.micro_batches(tiny(), 4, 1)] == [[0, 1, 2, 3]]


def test_samples_of_a_prompt_stay_together_where_they_fit():
    sequences = ragged(3, num_prompts=10, K=4, longest=5)  # at most 25 tokens a prompt
    for rows in collate.micro_batches(sequences, 1, 30):
        assert len(rows) == 4 * len(sequences.prompt_B[rows].unique())


def test_similar_lengths_come_together():
    lengths = [50, 1, 40, 2, 45, 3]
    sequences = Sequences(Packed.from_lists([[1]] * 6), Packed.from_lists([[1] * n for n in lengths]), torch.arange(6))
    assert [b.tolist() for b in collate.micro_batches(sequences, 1, 100)] == [[1, 3, 5, 2, 4], [0]]


def test_no_rows_make_no_micro_batch():
    assert collate.micro_batches(tiny().select(torch.tensor([], dtype=torch.int64)), 1, 10) == []


# Ranks


@pytest.mark.parametrize(("unit", "K"), [(1, 4), (2, 2), (1, 1), (2, 4)])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("num_prompts", [0, 1, 2, 25])
def test_split_covers_all_rows_once_and_keeps_prompts_together(unit: int, K: int, num_ranks: int, num_prompts: int):
    sequences = ragged(num_prompts, num_prompts, K)
    parts = collate.split(sequences, unit, num_ranks)
    assert len(parts) == num_ranks
    assert sorted(torch.cat(parts).tolist()) == list(range(num_prompts * K))
    assert all(part.dtype == torch.int64 and part.tolist() == sorted(part.tolist()) for part in parts)
    owners = [set(sequences.prompt_B[part].tolist()) for part in parts]
    assert sum(len(owned) for owned in owners) == num_prompts  # no prompt on two ranks
    assert sum(len(part) > 0 for part in parts) == min(num_ranks, num_prompts)  # none idle without need
    loads = [int(sequences.tokens_B()[part].sum()) for part in parts]
    heaviest = max((int(sequences.tokens_B()[i * K : (i + 1) * K].sum()) for i in range(num_prompts)), default=0)
    assert max(loads) - min(loads) <= heaviest  # Graham: the fullest rank was the emptiest before its last prompt


def test_split_by_hand():
    # Prompts of 7, 3, 9, 6 and 5 tokens. Longest first: 9 | 7, then 9 | 7 + 6, 9 + 5 | 13, and 14 | 13 + 3.
    lengths = [6, 2, 8, 5, 4]  # and one prompt token each
    sequences = Sequences(Packed.from_lists([[1]] * 5), Packed.from_lists([[1] * n for n in lengths]), torch.arange(5))
    first, second = collate.split(sequences, 1, 2)
    assert first.tolist() == [2, 4]
    assert second.tolist() == [0, 1, 3]


def test_duplicate_prompts_are_different_prompts():
    # The same text twice: by index these are two prompts, and two ranks may share them out.
    sequences = Sequences(
        Packed.from_lists([[1, 2], [1, 2]]), Packed.from_lists([[3], [4], [5], [6]]), torch.tensor([0, 0, 1, 1])
    )
    assert [part.tolist() for part in collate.split(sequences, 1, 2)] == [[0, 1], [2, 3]]


def test_pairs_are_never_parted_though_their_prompt_is_shared_by_several():
    sequences = Sequences(Packed.from_lists([[1]]), Packed.from_lists([[2], [3], [4], [5]]), torch.tensor([0, 0, 0, 0]))
    assert [part.tolist() for part in collate.split(sequences, 2, 2)] == [[0, 1, 2, 3], []]
