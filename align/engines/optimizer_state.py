"""The state of training as named pieces on disk, the same for every number of ranks and every ZeRO stage.

    <role>/rank-00000.safetensors   what rank 0 owns, in float32: ``<parameter>|<kind>|<start>`` -> elements of the
                                    flattened parameter from ``start`` on; kinds are weight, exp_avg and exp_avg_sq
    <role>/rng-00000.safetensors    random number generators of rank 0
    <role>/engine.json              counters, see `align.engines.deepspeed.Engine.counters`

AdamW steps on flat tensors: the parameters themselves at ZeRO 0, a partition of each group of parameters at 1 and 2,
the shards of each group at 3. A piece is a stretch of such a tensor that belongs to one parameter; paddings belong to
none. Parameters that are not trained are not stored: they come from the model's own checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from align.errors import ModelError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names that torch's AdamW has for its averages."""
KINDS = (WEIGHT, *MOMENTS)
REMEDY = "go on with the recipe that wrote the checkpoint: its model, LoRA rank and targets"


def tensors_file(rank: int) -> str:
    """Name of the file with what a rank owns."""
    return f"rank-{rank:05d}.safetensors"


def random_file(rank: int) -> str:
    """Name of the file with a rank's random number generators."""
    return f"rng-{rank:05d}.safetensors"


COUNTERS = "engine.json"


@dataclass(frozen=True)
class ParameterSlice:
    """``numel`` elements of a parameter from element ``start`` on, at ``offset`` of a tensor that AdamW steps on."""

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int

    def within(self, tensor: Tensor) -> Tensor:
        """The piece's part of ``flat``, or of an average of the same shape, as a flat view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def _present(path: Path) -> Path:
    if not path.is_file():
        raise ModelError("the checkpoint lacks this file", where=str(path), remedy="go on from another checkpoint")
    return path


class StoredState:
    """The pieces of all ranks in the folder of a role, whose hashes the checkpoint's manifest has proved."""

    def __init__(self, folder: Path):
        """Raises `ModelError` for a rank's file that is missing."""
        self.folder = folder
        self.counters: dict[str, Any] = json.loads(_present(folder / COUNTERS).read_text())
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for rank in range(self.counters["world_size"]):
            file = safe_open(_present(folder / tensors_file(rank)), framework="pt")
            for key in file.keys():  # noqa: SIM118 - not a mapping
                name, kind, start = key.rsplit("|", 2)
                self._pieces[name, kind].append((int(start), math.prod(file.get_slice(key).get_shape()), file, key))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises `ModelError` unless exactly the parameters of these sizes are here, each whole and of every kind."""
        where, names = str(self.folder), {name for name, _ in self._pieces}
        for other, what in ((sizes.keys() - names, "lacks"), (names - sizes.keys(), "has, and the model does not,")):
            if other:
                listed = ", ".join(sorted(other)[:3])
                raise ModelError(f"the checkpoint {what} {len(other)} parameters: {listed}", where=where, remedy=REMEDY)
        for name, size in sizes.items():
            for kind in KINDS:
                reached = 0
                for start, count, _, _ in self._pieces.get((name, kind), []):
                    reached = start + count if start == reached else -1
                if reached != size:
                    raise ModelError(f"{name} is not stored as {size} elements of {kind}", where=where, remedy=REMEDY)

    def read(self, name: str, kind: str, start: int, into: Tensor) -> None:
        """Fill the flat tensor ``into`` with the elements from ``start`` on."""
        end = start + len(into)
        for first, count, file, key in self._pieces[name, kind]:
            low, high = max(start, first), min(end, first + count)
            if low < high:
                into[low - start : high - start].copy_(file.get_slice(key)[low - first : high - first])


class TrainingState:
    """What this rank holds of weights and optimizer state."""

    def __init__(self, head: nn.Module, optimizer: Any, zero_stage: int):
        """``optimizer`` is DeepSpeed's for this head."""
        self._optimizer, self._stage = optimizer, zero_stage
        self._adam: torch.optim.AdamW = optimizer.optimizer if zero_stage else optimizer
        self._parameters: dict[str, Any] = {n: p for n, p in head.named_parameters() if p.requires_grad}
        held = (self._piece(name, parameter) for name, parameter in self._parameters.items())
        self._pieces = [piece for piece in held if piece is not None]

    def num_bytes(self) -> int:
        """Size of what `collect` gives, with the keys of a file."""
        return sum(len(KINDS) * (4 * piece.numel + len(piece.name) + 128) for piece in self._owned())

    @torch.no_grad()
    def collect(self) -> dict[str, Tensor]:
        """Copies on the CPU of all pieces that this rank stores, by key."""
        copies = {}
        for piece in self._owned():
            moments = self._adam.state.get(piece.flat, {})
            for kind in KINDS:
                source = piece.flat if kind == WEIGHT else moments.get(kind)
                copy = torch.zeros(piece.numel) if source is None else piece.within(source).to("cpu", copy=True)
                copies[f"{piece.name}|{kind}|{piece.start}"] = copy
        return copies

    def steps(self) -> dict[str, int]:
        """Steps that AdamW made on each parameter, the same on every rank. At ZeRO 0 a parameter that no loss has
        reached has none."""
        made = {id(flat): int(values["step"]) for flat, values in self._adam.state.items() if values}
        if self._stage:
            return dict.fromkeys(self._parameters, max(made.values(), default=0))
        return {name: made.get(id(parameter), 0) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def apply(self, stored: StoredState) -> None:
        """Take over weights and optimizer state; every rank calls this. Raises `ModelError` before anything changes
        where they do not fit."""
        stored.check({name: getattr(p, "ds_numel", p.numel()) for name, p in self._parameters.items()})
        steps: dict[str, int] = stored.counters["adam_steps"]
        for flat in self._flats():
            values = self._adam.state[flat]
            for kind in MOMENTS:
                if kind in values:
                    values[kind].zero_()  # paddings too
                else:
                    values[kind] = torch.zeros_like(flat)
            values["step"] = torch.tensor(float(max(steps.values())))
        for piece in self._pieces:
            values = self._adam.state[piece.flat]
            for kind in KINDS:
                stored.read(piece.name, kind, piece.start, piece.within(piece.flat if kind == WEIGHT else values[kind]))
            if not self._stage:
                values["step"].fill_(steps[piece.name])
        self._publish()

    def _owned(self) -> Sequence[ParameterSlice]:
        """At ZeRO 0 every rank holds everything, and rank 0 stores it."""
        return self._pieces if self._stage or dist.get_rank() == 0 else ()

    def _flats(self) -> Sequence[Tensor]:
        """What AdamW steps on."""
        if self._stage == 3:
            return self._optimizer.fp32_partitioned_groups_flat
        return self._optimizer.single_partition_of_fp32_groups if self._stage else list(self._parameters.values())

    def _piece(self, name: str, parameter: Any) -> ParameterSlice | None:
        if not self._stage:
            return ParameterSlice(name, 0, parameter.numel(), parameter, 0)
        if self._stage < 3:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None  # wholly in the partitions of other ranks
            flat = self._flats()[mapping.param_group_index]
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            return ParameterSlice(name, here.start, here.numel, flat, there.start)
        group, offset, numel = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        start = dist.get_rank() * numel
        count = min(numel, parameter.ds_numel - start)  # the last ranks have padding, or nothing else
        return ParameterSlice(name, start, count, self._flats()[group], offset) if count > 0 else None

    def _publish(self) -> None:
        """Make the weights that the model computes with those that AdamW steps on, as DeepSpeed does after a step."""
        if self._stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self._stage == 3:
            self._optimizer._partition_all_parameters()
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self._optimizer._post_step(set())  # gathers the small parameters that are kept whole


def seed_generators(seed: int) -> None:
    """Start the generators of this process from the seed of the run, those that nothing here draws from too: else two
    runs would differ in them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> dict[str, Tensor]:
    """The generators of this process: torch's, Python's and numpy's legacy one, and torch's of the current GPU."""
    _, words, gauss = random.getstate()
    _, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray([*key, position, has_gauss], dtype=np.int64)),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(folder: Path, seed: int, step: int) -> None:
    """Bring this rank's generators back; a rank that has none stored gets ones seeded by (seed, step, rank)."""
    rank = dist.get_rank()
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # GPUs too
    random.seed(digest)
    np.random.seed(list(digest))
    path = folder / random_file(rank)
    if not path.is_file():
        return
    stored = load_file(path)
    torch.set_rng_state(stored["torch"])
    gauss = stored["python_gauss"].tolist()
    random.setstate((3, tuple(stored["python"].tolist()), gauss[0] if gauss else None))
    *key, position, has_gauss = stored["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, float(stored["numpy_gauss"])))
    if "cuda" in stored and torch.cuda.is_available():
        torch.cuda.set_rng_state(stored["cuda"])
