"""From packed sequences to what a forward pass reads: micro-batches by token budget, packed or padded layouts.

The packed layout holds each prompt once and each response once, without padding:

    ids = [prompt 0 | prompt 1 | ... | response 0 | response 1 | ...]

so the K samples of a prompt, or the two responses of a pair, share its prompt's keys and values. `PackedAttention` says
what a token may attend to: prompts attend to themselves, responses to their prompt and themselves. The padded layout
repeats the prompt for each response and suits any architecture. Both give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from align.types import Packed, Sequences

GROUP_RATIO = 1.5
"""Rows of one attention group differ at most by this factor in length, which bounds the padding inside attention."""


@dataclass(frozen=True)
class AttentionGroup:
    """Rows of similar length that attend as one padded batch of R rows, Q queries and K keys.

    ``query_RQ`` and ``key_RK`` index the flat tokens; surplus queries repeat the row's last token and are not among
    ``valid``.
    """

    query_RQ: Tensor
    key_RK: Tensor
    mask_RQK: Tensor | None
    """True where a query may look; None for plain causal attention of a row to itself."""
    valid: Tensor
    """Positions in ``query_RQ.flatten()`` that are real, row after row."""


@dataclass(frozen=True)
class RaggedRows:
    """Rows of any length for a kernel without padding. Queries are the flat tokens, in their order.

    Row i attends with queries ``query_start_R1[i]`` to ``query_start_R1[i + 1]`` to the keys of the same row, and its
    last query is its last key: causal attention aligned at the bottom right.
    """

    query_start_R1: Tensor
    """int32, as kernels want it."""
    key_start_R1: Tensor
    key_M: Tensor | None
    """Flat token of each key; None where keys are the flat tokens themselves."""
    max_queries: int
    max_keys: int


@dataclass(frozen=True)
class PackedAttention:
    """Which tokens of a packed layout attend to which, in the two forms that kernels read.

    Each form is made on the host at its first use, and moved to ``device`` once.
    """

    sequences: Sequences
    device: torch.device

    @cached_property
    def groups(self) -> tuple[AttentionGroup, ...]:
        """For kernels of padded batches: prompts, then responses."""
        prompts, responses = self.sequences.prompts, self.sequences.responses
        groups = [_prompt_group(rows, prompts, self.device) for rows in _length_groups(prompts.lengths_B)]
        of_responses = _length_groups(responses.lengths_B)
        return (*groups, *(_response_group(rows, self.sequences, self.device) for rows in of_responses))

    @cached_property
    def order(self) -> Tensor:
        """Where the concatenated valid outputs of `groups` belong among the flat tokens, inverted."""
        return torch.cat([group.query_RQ.flatten()[group.valid] for group in self.groups]).argsort()

    @cached_property
    def ragged(self) -> RaggedRows:
        """For kernels of variable length: prompts, then responses, all in one call."""
        prompts, responses = self.sequences.prompts, self.sequences.responses
        rows = responses.lengths_B.nonzero().squeeze(1)
        prompt_R, response_length_R = self.sequences.prompt_B[rows], responses.lengths_B[rows]
        num_prompt_tokens = len(prompts.ids_N)
        query_length = torch.cat([prompts.lengths_B, response_length_R])
        key_length = torch.cat([prompts.lengths_B, prompts.lengths_B[prompt_R] + response_length_R])
        key_M = None
        if len(rows):  # each prompt for itself, then for each response its prompt and itself
            start_R2 = torch.stack([prompts.offsets_B1[prompt_R], num_prompt_tokens + responses.offsets_B1[rows]], 1)
            length_R2 = torch.stack([prompts.lengths_B[prompt_R], response_length_R], 1)
            own = torch.arange(num_prompt_tokens)
            key_M = torch.cat([own, _concatenated(start_R2.flatten(), length_R2.flatten())]).to(self.device)
        return RaggedRows(
            _starts(query_length).to(self.device, torch.int32),
            _starts(key_length).to(self.device, torch.int32),
            key_M,
            int(query_length.max()),
            int(key_length.max()),
        )


@dataclass(frozen=True)
class Layout:
    """One micro-batch as a model reads it. Indices point into hidden states flattened to (tokens, hidden)."""

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    attention: PackedAttention | None
    """Of the packed layout, which has no mask."""
    predicting_N: Tensor
    """For each response token, the state from which it is predicted."""
    target_N: Tensor
    """Ids of the response tokens."""
    last_B: Tensor
    """State of the last token of each sequence, where scores are read."""
    mask_BT: Tensor

    def to(self, device: torch.device) -> Layout:
        """The same layout on ``device``."""
        if device.type == "cpu":
            return self
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        attention = None if self.attention is None else PackedAttention(self.attention.sequences, device)
        return Layout(**{**moved, "attention": attention})


def _within(offsets_B1: Tensor) -> Tensor:
    """0, 1, 2, ... in each row of a packed array."""
    lengths = offsets_B1.diff()
    return torch.arange(int(offsets_B1[-1])) - offsets_B1[:-1].repeat_interleave(lengths)


def _starts(length_R: Tensor) -> Tensor:
    """Offsets of rows that lie one after the other, (R + 1,)."""
    return torch.cat([length_R.new_zeros(1), length_R.cumsum(0)])


def _concatenated(start_R: Tensor, length_R: Tensor) -> Tensor:
    """``start, start + 1, ..., start + length - 1`` of each row, row after row."""
    return start_R.repeat_interleave(length_R) + _within(_starts(length_R))


def _length_groups(lengths_B: Tensor) -> list[Tensor]:
    """Row numbers in groups whose longest row is at most `GROUP_RATIO` times the shortest; empty rows are left out."""
    order = lengths_B.argsort(stable=True)
    order = order[lengths_B[order] > 0]
    groups: list[Tensor] = []
    start, sorted_lengths = 0, lengths_B[order].tolist()
    for i, length in enumerate(sorted_lengths):
        if length > GROUP_RATIO * sorted_lengths[start]:
            groups.append(order[start:i])
            start = i
    return groups + ([order[start:]] if len(order) else [])


def _ragged_index(start_R: Tensor, length_R: Tensor) -> tuple[Tensor, Tensor]:
    """Flat indices of rows ``start .. start + length`` as (R, L), short rows repeating their last, and which are
    real."""
    column_L = torch.arange(int(length_R.max()))
    index_RL = start_R[:, None] + column_L[None, :].minimum(length_R[:, None] - 1)
    return index_RL, column_L[None, :] < length_R[:, None]


def _prompt_group(rows: Tensor, prompts: Packed, device: torch.device) -> AttentionGroup:
    index, real = _ragged_index(prompts.offsets_B1[rows], prompts.lengths_B[rows])
    index = index.to(device)
    return AttentionGroup(index, index, None, real.flatten().nonzero().squeeze(1).to(device))


def _response_group(rows: Tensor, sequences: Sequences, device: torch.device) -> AttentionGroup:
    """Keys are the prompt, right-aligned, then the response itself."""
    prompts, responses, prompt_R = sequences.prompts, sequences.responses, sequences.prompt_B[rows]
    start = len(prompts.ids_N) + responses.offsets_B1[rows]
    query, real_query = _ragged_index(start, responses.lengths_B[rows])
    prompt_length = prompts.lengths_B[prompt_R]
    widest, Q = int(prompt_length.max()), query.shape[1]
    shift = torch.arange(widest)[None, :] - (widest - prompt_length)[:, None]
    prompt_key = prompts.offsets_B1[prompt_R][:, None] + shift.clamp(min=0)
    # The mask is the largest of all, so it is made where it is read.
    real_prompt, key = (shift >= 0).to(device), torch.arange(Q, device=device)
    causal = (key[None, :] <= key[:, None])[None].expand(len(rows), Q, Q)
    mask = torch.cat([real_prompt[:, None, :].expand(len(rows), Q, widest), causal], dim=2)
    keys, valid = torch.cat([prompt_key, query], 1), real_query.flatten().nonzero().squeeze(1)
    return AttentionGroup(query.to(device), keys.to(device), mask, valid.to(device))


def packed(sequences: Sequences) -> Layout:
    """The layout without padding, each prompt once. All sequences must have at least a prompt token."""
    prompts, responses, prompt_B = sequences.prompts, sequences.responses, sequences.prompt_B
    num_prompt_tokens = len(prompts.ids_N)
    within = _within(responses.offsets_B1)
    lengths, last_prompt_B = responses.lengths_B, prompts.offsets_B1[1:][prompt_B] - 1
    own_N = torch.arange(len(responses.ids_N)) + num_prompt_tokens
    return Layout(
        input_ids=torch.cat([prompts.ids_N, responses.ids_N])[None],
        position_ids=torch.cat(
            [_within(prompts.offsets_B1), within + prompts.lengths_B[prompt_B].repeat_interleave(lengths)]
        )[None],
        attention_mask=None,
        attention=PackedAttention(sequences, torch.device("cpu")),
        predicting_N=torch.where(within == 0, last_prompt_B.repeat_interleave(lengths), own_N - 1),
        target_N=responses.ids_N,
        last_B=torch.where(lengths > 0, num_prompt_tokens + responses.offsets_B1[1:] - 1, last_prompt_B),
        mask_BT=sequences.mask_BT,
    )


def padded(sequences: Sequences, side: Literal["left", "right"] = "right") -> Layout:
    """One row a sequence, prompt and response, padded with id 0 under an attention mask.

    Padding has the position of the row's first or last token, so the largest position of a row tells its length.
    """
    responses, prompt_B = sequences.responses, sequences.prompt_B
    prompt_length = sequences.prompts.lengths_B[prompt_B]
    length_B = prompt_length + responses.lengths_B
    longest = int(length_B.max())
    first_B = torch.zeros_like(length_B) if side == "right" else longest - length_B
    column_BL = torch.arange(longest)[None, :] - first_B[:, None]
    real_BL = (column_BL >= 0) & (column_BL < length_B[:, None])
    rows = [p + r for p, r in zip(sequences.prompts.select(prompt_B).lists(), responses.lists(), strict=True)]
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    start_B = torch.arange(len(length_B)) * longest + first_B
    lengths = responses.lengths_B
    predicting = (start_B + prompt_length - 1).repeat_interleave(lengths) + _within(responses.offsets_B1)
    return Layout(
        input_ids=torch.zeros(real_BL.shape, dtype=torch.int64).masked_scatter(real_BL, flat),
        position_ids=column_BL.clamp(min=0).minimum(length_B[:, None] - 1),
        attention_mask=real_BL.long(),
        attention=None,
        predicting_N=predicting,
        target_N=responses.ids_N,
        last_B=start_B + length_B - 1,
        mask_BT=sequences.mask_BT,
    )


def micro_batches(sequences: Sequences, unit: int, max_tokens: int) -> list[Tensor]:
    """Row numbers of micro-batches of at most ``max_tokens`` tokens, similar lengths together.

    A prompt counts once. ``unit`` adjacent rows are never parted, and all rows of a prompt stay together where they
    fit. A single unit longer than the budget gets a separate micro-batch.
    """
    lengths, prompt_lengths = sequences.responses.lengths_B.tolist(), sequences.prompts.lengths_B.tolist()
    prompt_of = sequences.prompt_B.tolist()
    items: list[tuple[int, list[int]]] = []  # (tokens, rows)
    previous = None
    for first in range(0, len(lengths), unit):
        rows = list(range(first, first + unit))
        tokens, prompt = sum(lengths[row] for row in rows), prompt_of[first]
        if prompt == previous and items[-1][0] + tokens <= max_tokens:
            items[-1] = (items[-1][0] + tokens, items[-1][1] + rows)
        else:
            items.append((tokens + prompt_lengths[prompt], rows))
        previous = prompt
    batches: list[list[int]] = []
    filled = max_tokens + 1
    for tokens, rows in sorted(items, key=lambda item: item[0]):
        if filled + tokens > max_tokens:
            batches.append([])
            filled = 0
        batches[-1] += rows
        filled += tokens
    return [torch.tensor(batch) for batch in batches]


def split(sequences: Sequences, unit: int, num_ranks: int) -> list[Tensor]:
    """Row numbers for each of ``num_ranks``, balanced by tokens; ranks may get none when there are few prompts. Rows of
    a prompt stay together, in order."""
    starts = [0] + [i for i in range(unit, len(sequences), unit) if sequences.prompt_B[i] != sequences.prompt_B[i - 1]]
    return balanced(starts, sequences.tokens_B().tolist(), num_ranks)


def balanced(starts: list[int], sizes: list[int], num_ranks: int) -> list[Tensor]:
    """Row numbers for each rank: rows of ``sizes`` in blocks that begin at ``starts`` and stay together, in order.

    Longest first, each to the rank with the least so far (Graham 1969).
    """
    ends = [*starts[1:], len(sizes)] if sizes else []
    blocks = sorted(zip(starts, ends, strict=False), key=lambda block: (-sum(sizes[block[0] : block[1]]), block))
    loads, rows = [0] * num_ranks, [list[int]() for _ in range(num_ranks)]
    for a, b in blocks:
        rank = loads.index(min(loads))
        loads[rank] += sum(sizes[a:b])
        rows[rank] += range(a, b)
    return [torch.tensor(sorted(index), dtype=torch.int64) for index in rows]
