"""What travels between the stages of a step, and the one place where indices are defined.

``P`` prompts, ``K`` samples per prompt, ``B`` sequences, ``T`` response tokens, ``A`` attributes, ``N`` tokens of a
packed array. A name that ends in ``_BT`` has shape (B, T), and so on for every suffix.

**Column t of every ``_BT`` tensor speaks about response token t**:

- ``logprob_BT[:, t]`` = log pi(token t | everything before it),
- ``value_BT[:, t]`` = value of the state *before* token t is chosen,
- ``mask_BT[:, t]`` = 1 where token t was sampled by the policy, its end-of-sequence token included.

Token ids travel packed (`Packed`), and a prompt that several sequences share is stored once (`Sequences`).
Numbers per response are small and travel padded.

Tensors cross process borders as numpy buffers (`Record.__reduce__`), which Ray ships without copying;
pickling a torch tensor costs 10 to 25 times as much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int, Shaped, jaxtyped
from torch import Tensor

checked = jaxtyped(typechecker=beartype)
"""Checks the annotated shapes and dtypes of a function or dataclass at every call."""


class _Buffer:
    """A CPU tensor in its pickled form."""

    def __init__(self, tensor: Tensor):
        self.bfloat16 = tensor.dtype == torch.bfloat16  # numpy has none
        flat = tensor.detach().cpu().contiguous()
        self.array = (flat.view(torch.int16) if self.bfloat16 else flat).numpy()

    def tensor(self) -> Tensor:
        whole = torch.from_numpy(self.array.copy())  # what Ray hands out is read-only shared memory
        return whole.view(torch.bfloat16) if self.bfloat16 else whole


def _pack_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Buffer(value)
    if isinstance(value, Mapping):
        return {key: _pack_value(item) for key, item in value.items()}
    return value


def _unpack_value(value: Any) -> Any:
    if isinstance(value, _Buffer):
        return value.tensor()
    if isinstance(value, dict):
        return {key: _unpack_value(item) for key, item in value.items()}
    return value


def _rebuild(cls: type[Record], values: list[Any]) -> Record:
    return cls(*map(_unpack_value, values))


class Record:
    """A frozen dataclass of tensors that pickles as flat buffers."""

    def __reduce__(self) -> tuple[Any, ...]:
        values = [_pack_value(getattr(self, f.name)) for f in fields(self)]  # type: ignore[arg-type]
        return _rebuild, (type(self), values)


@checked
@dataclass(frozen=True, eq=False)
class Packed(Record):
    """B ragged rows of token ids in one array: row i is ``ids_N[offsets_B1[i]:offsets_B1[i + 1]]``."""

    ids_N: Int[Tensor, " N"]
    offsets_B1: Int[Tensor, " B1"]

    def __post_init__(self) -> None:
        if len(self.offsets_B1) == 0 or self.offsets_B1[0] != 0 or self.offsets_B1[-1] != len(self.ids_N):
            raise ValueError(f"offsets must start at 0 and end at {len(self.ids_N)} ids: {self.offsets_B1.tolist()}")

    @classmethod
    def from_lists(cls, rows: Iterable[Iterable[int]]) -> Self:
        """Pack Python lists of token ids."""
        lists = [list(row) for row in rows]
        lengths = torch.tensor([len(row) for row in lists], dtype=torch.int64)
        ids = torch.tensor([token for row in lists for token in row], dtype=torch.int64)
        return cls(ids, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))

    @classmethod
    def concatenate(cls, parts: Iterable[Packed]) -> Packed:
        """The rows of several arrays, one after the other."""
        parts = list(parts)
        lengths = torch.cat([part.lengths_B for part in parts])
        return Packed(torch.cat([p.ids_N for p in parts]), torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))

    def __len__(self) -> int:
        return len(self.offsets_B1) - 1

    @property
    def lengths_B(self) -> Tensor:
        """Tokens of each row."""
        return self.offsets_B1.diff()

    def row(self, index: int) -> Tensor:
        """Ids of one row."""
        return self.ids_N[int(self.offsets_B1[index]) : int(self.offsets_B1[index + 1])]

    def lists(self) -> list[list[int]]:
        """The rows as Python lists."""
        ids, offsets = self.ids_N.tolist(), self.offsets_B1.tolist()
        return [ids[a:b] for a, b in pairwise(offsets)]

    def select(self, index_B: Tensor) -> Packed:
        """The rows ``index_B``, in that order."""
        lengths = self.lengths_B[index_B]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        within = torch.arange(int(offsets[-1])) - offsets[:-1].repeat_interleave(lengths)
        return Packed(self.ids_N[self.offsets_B1[:-1][index_B].repeat_interleave(lengths) + within], offsets)

    def mask(self) -> Tensor:
        """True where a padded (B, T) layout of these rows holds a token."""
        longest = int(self.lengths_B.max()) if len(self) else 0
        return torch.arange(longest)[None, :] < self.lengths_B[:, None]

    def padded(self, fill: int) -> Tensor:
        """The rows as a right-padded (B, T) tensor."""
        mask = self.mask()
        return torch.full(mask.shape, fill, dtype=self.ids_N.dtype).masked_scatter(mask, self.ids_N)


@checked
@dataclass(frozen=True, eq=False)
class Prompts(Record):
    """Prompts of one step."""

    tokens: Packed
    index_P: Int[Tensor, " P"]
    """Number of each prompt within the whole step, whatever rank it is sent to; part of the noise's name."""
    stop_ids: tuple[int, ...]
    """Token ids that end a response."""
    step: int

    def select(self, index: Tensor) -> Prompts:
        """The prompts ``index``; they keep their numbers."""
        return Prompts(self.tokens.select(index), self.index_P[index], self.stop_ids, self.step)

    def __len__(self) -> int:
        return len(self.tokens)


@checked
@dataclass(frozen=True, eq=False)
class Sequences(Record):
    """B responses, each with the prompt ``prompt_B[i]`` of ``prompts``; neighbours may share one."""

    prompts: Packed
    responses: Packed
    prompt_B: Int[Tensor, " B"]

    def __post_init__(self) -> None:
        if len(self.responses) != len(self.prompt_B):
            raise ValueError(f"{len(self.responses)} responses but {len(self.prompt_B)} prompt indices")

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def mask_BT(self) -> Tensor:
        """True where response token t of sequence i exists."""
        return self.responses.mask()

    def select(self, index_B: Tensor) -> Sequences:
        """The sequences ``index_B``, with only the prompts they use."""
        used, prompt_B = self.prompt_B[index_B].unique(return_inverse=True)
        return Sequences(self.prompts.select(used), self.responses.select(index_B), prompt_B)

    @classmethod
    def concatenate(cls, parts: Sequence[Sequences]) -> Sequences:
        """The sequences of several records, one after the other; equal prompts are not merged."""
        before = [0, *accumulate(len(part.prompts) for part in parts)]
        return cls(
            Packed.concatenate(part.prompts for part in parts),
            Packed.concatenate(part.responses for part in parts),
            torch.cat([part.prompt_B + first for part, first in zip(parts, before, strict=False)]),
        )

    def batch(self) -> Batch:
        """The sequences as a batch without columns: demonstrations."""
        return Batch(self, {}, unit=1, temperature=1.0)

    def tokens_B(self) -> Tensor:
        """Prompt and response tokens of each sequence."""
        return self.prompts.lengths_B[self.prompt_B] + self.responses.lengths_B


@checked
@dataclass(frozen=True, eq=False)
class Rollouts(Record):
    """Responses sampled from the policy. Sequences of one prompt are neighbours, in the order of their number k."""

    sequences: Sequences
    logprob_BT: Float[Tensor, "B T"]
    """Log-probability under the distribution sampled from: logits / temperature, before top-k, top-p and min-p."""
    untempered_logprob_BT: Float[Tensor, "B T"]
    """Log-probability at temperature 1."""
    finished_B: Bool[Tensor, " B"]
    """An end-of-sequence token was sampled."""
    temperature: float
    """Sampling temperature; 1 for greedy rollouts, whose log-probabilities are those of the model itself."""
    step: int

    @property
    def mask_BT(self) -> Tensor:
        """True where response token t of sequence i was sampled."""
        return self.sequences.mask_BT

    def select(self, index_B: Tensor) -> Rollouts:
        """The sequences ``index_B``; whole groups, so that the samples of a prompt stay neighbours."""
        sequences = self.sequences.select(index_B)
        T = sequences.mask_BT.shape[1]
        logprob_BT, untempered_BT = self.logprob_BT[index_B, :T], self.untempered_logprob_BT[index_B, :T]
        return Rollouts(sequences, logprob_BT, untempered_BT, self.finished_B[index_B], self.temperature, self.step)

    @classmethod
    def concatenate(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """The rollouts of several requests of one step, one after the other."""
        T = max(part.logprob_BT.shape[1] for part in parts)
        grown = lambda x: torch.nn.functional.pad(x, (0, T - x.shape[1]))  # noqa: E731
        return cls(
            Sequences.concatenate([part.sequences for part in parts]),
            torch.cat([grown(part.logprob_BT) for part in parts]),
            torch.cat([grown(part.untempered_logprob_BT) for part in parts]),
            torch.cat([part.finished_B for part in parts]),
            parts[0].temperature,
            parts[0].step,
        )

    def __len__(self) -> int:
        return len(self.sequences)

    def pairs(self, chosen_P: Tensor, rejected_P: Tensor, strength_P: Tensor) -> Pairs:
        """Pairs of sequences, by their numbers; each pair is of one prompt and no two pairs share one."""
        rows = torch.stack([chosen_P, rejected_P], 1).flatten()
        return Pairs(self.sequences.select(rows), strength_P)

    def batch(self, **columns: Tensor) -> Batch:
        """All sequences, to be learned from at the temperature they were sampled at."""
        return Batch(self.sequences, columns, unit=1, temperature=self.temperature)


@checked
@dataclass(frozen=True, eq=False)
class Pairs(Record):
    """Preferred and rejected responses to P prompts: rows 2i and 2i + 1 of ``sequences``."""

    sequences: Sequences
    strength_P: Float[Tensor, " P"]
    """How much better the preferred response is, 1 to 3 (|overall_preference| of HelpSteer3)."""

    def __len__(self) -> int:
        return len(self.strength_P)

    def select(self, index_P: Tensor) -> Pairs:
        """The pairs ``index_P``, which must not repeat a pair."""
        rows = torch.stack([2 * index_P, 2 * index_P + 1], 1).flatten()
        return Pairs(self.sequences.select(rows), self.strength_P[index_P])

    def batch(self, **columns: Tensor) -> Batch:
        """The pairs as a batch with ``columns`` and ``strength_B``, which holds each pair's strength twice."""
        strength_B = self.strength_P.repeat_interleave(2)
        return Batch(self.sequences, {"strength_B": strength_B, **columns}, unit=2, temperature=1.0)


NOT_RATED = -100.0
"""Label of an attribute that nobody rated: it is left out of every loss and mean."""


@checked
@dataclass(frozen=True, eq=False)
class Ratings(Record):
    """B responses, each with labels of A attributes."""

    sequences: Sequences
    label_BA: Float[Tensor, "B A"]
    """Rating of each attribute, 0 to 4 in the HelpSteer family; `NOT_RATED` where there is none."""

    def __len__(self) -> int:
        return len(self.label_BA)

    def select(self, index_B: Tensor) -> Ratings:
        """The responses ``index_B``."""
        return Ratings(self.sequences.select(index_B), self.label_BA[index_B])

    def batch(self) -> Batch:
        """All responses as a batch with the column ``label_BA``."""
        return Batch(self.sequences, {"label_BA": self.label_BA}, unit=1, temperature=1.0)


@checked
@dataclass(frozen=True, eq=False)
class Batch(Record):
    """Sequences of one optimizer step with the numbers its loss needs.

    ``columns`` are keyword arguments of the loss; their first dimension is B and their names follow the suffix rule.
    ``unit`` adjacent sequences are seen by the loss together (2 for pairs) and are never parted.
    ``temperature`` divides the logits before log-probabilities are taken.
    """

    sequences: Sequences
    columns: Mapping[str, Shaped[Tensor, ...]]
    unit: int
    temperature: float

    def select(self, index_B: Tensor) -> Batch:
        """The sequences ``index_B`` with their columns, ``_BT`` ones cut to the longest response left."""
        sequences = self.sequences.select(index_B)
        longest = int(sequences.responses.lengths_B.max()) if len(sequences) else 0
        columns = {
            name: column[index_B][:, :longest] if name.endswith("_BT") else column[index_B]
            for name, column in self.columns.items()
        }
        return Batch(sequences, columns, self.unit, self.temperature)
