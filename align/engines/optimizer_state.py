"""Weights and optimizer state as named pieces on disk; any number of ranks and any ZeRO stage can read them.

    <role>/rank-00000.safetensors   pieces of rank 0, in float32: ``<parameter>|<kind>|<start>`` -> elements of the
                                    flattened parameter from ``start`` on; kinds are weight, exp_avg and exp_avg_sq
    <role>/rng-00000.safetensors    random number generators of rank 0
    <role>/engine.json              counters, see `align.engines.deepspeed.Engine.counters`

AdamW steps on flat tensors: the parameters themselves at ZeRO 0, a partition of each group of parameters at 1 and 2,
the shards of each group at 3. A piece is the range of such a tensor that belongs to one parameter; paddings belong to
no parameter. Frozen parameters are not stored: they come from the model's path.

At ZeRO 1 to 3 AdamW steps on DeepSpeed's float32 copy of the weights. A checkpoint stores this copy, because bfloat16
weights alone would not resume training bit for bit.
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
"""Keys of the moments in the state of ``torch.optim.AdamW``."""
KINDS = (WEIGHT, *MOMENTS)
REMEDY = "resume with the recipe that wrote the checkpoint: its model, LoRA rank and targets"


def tensors_file(rank: int) -> str:
    """Name of the file with the pieces of a rank."""
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
        """The piece's range of ``tensor``, which is ``flat`` or a moment of its shape, as a flat view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def _require_file(path: Path) -> Path:
    if not path.is_file():
        raise ModelError("the checkpoint lacks this file", where=str(path), remedy="resume from another checkpoint")
    return path


class StoredState:
    """The pieces of all ranks in a role's folder. `align.checkpoint` has verified the hashes of its files before."""

    def __init__(self, folder: Path):
        """Opens the files of all ranks that wrote, whatever the number of ranks now; raises `ModelError` if one is
        missing."""
        self.folder = folder
        self.counters: dict[str, Any] = json.loads(_require_file(folder / COUNTERS).read_text())
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for rank in range(self.counters["world_size"]):
            file = safe_open(_require_file(folder / tensors_file(rank)), framework="pt")
            for key in file.keys():  # noqa: SIM118 - not a mapping
                name, kind, start = key.rsplit("|", 2)
                self._pieces[name, kind].append((int(start), math.prod(file.get_slice(key).get_shape()), file, key))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raises `ModelError` unless the checkpoint holds exactly the parameters of ``sizes`` (elements by name), each
        complete in every kind."""
        where, names = str(self.folder), {name for name, _ in self._pieces}
        for other, what in ((sizes.keys() - names, "lacks"), (names - sizes.keys(), "has, and the model does not,")):
            if other:
                listed = ", ".join(sorted(other)[:3])
                raise ModelError(f"the checkpoint {what} {len(other)} parameters: {listed}", where=where, remedy=REMEDY)
        for name, size in sizes.items():
            for kind in KINDS:
                reached = 0  # pieces are sorted by start; a gap or an overlap between two makes this -1
                for start, count, _, _ in self._pieces.get((name, kind), []):
                    reached = start + count if start == reached else -1
                if reached != size:
                    raise ModelError(f"{name} is not stored as {size} elements of {kind}", where=where, remedy=REMEDY)

    def read(self, name: str, kind: str, start: int, into: Tensor) -> None:
        """Copy elements of parameter ``name`` from ``start`` on into the flat tensor ``into``."""
        end = start + len(into)
        for first, count, file, key in self._pieces[name, kind]:
            low, high = max(start, first), min(end, first + count)
            if low < high:
                into[low - start : high - start].copy_(file.get_slice(key)[low - first : high - first])


class TrainingState:
    """This rank's part of weights and optimizer state."""

    def __init__(self, head: nn.Module, optimizer: Any, zero_stage: int):
        """``optimizer`` is DeepSpeed's optimizer of ``head``; at ZeRO 0 it is AdamW."""
        self._optimizer, self._stage = optimizer, zero_stage
        self._adam: torch.optim.AdamW = optimizer.optimizer if zero_stage else optimizer
        self._parameters: dict[str, Any] = {n: p for n, p in head.named_parameters() if p.requires_grad}
        held = (self._piece(name, parameter) for name, parameter in self._parameters.items())
        self._pieces = [piece for piece in held if piece is not None]

    def num_bytes(self) -> int:
        """Bytes that `collect` copies, in float32, and about 128 more for each key in the file."""
        return sum(len(KINDS) * (4 * piece.numel + len(piece.name) + 128) for piece in self._owned())

    @torch.no_grad()
    def collect(self) -> dict[str, Tensor]:
        """Copies on the CPU of all pieces that this rank stores, by key.

        They are copies so that training can continue during the write. A parameter that AdamW has not yet stepped on
        has no moments; they are stored as 0, AdamW's start, so that every piece has every kind.
        """
        copies = {}
        for piece in self._owned():
            moments = self._adam.state.get(piece.flat, {})
            for kind in KINDS:
                source = piece.flat if kind == WEIGHT else moments.get(kind)
                copy = torch.zeros(piece.numel) if source is None else piece.within(source).to("cpu", copy=True)
                copies[f"{piece.name}|{kind}|{piece.start}"] = copy
        return copies

    def steps(self) -> dict[str, int]:
        """Steps of AdamW on each parameter, equal on every rank; 0 at ZeRO 0 if it never had a gradient."""
        made = {id(flat): int(values["step"]) for flat, values in self._adam.state.items() if values}
        if self._stage:  # AdamW's tensors span parameters, and it steps on all of them in each step
            return dict.fromkeys(self._parameters, max(made.values(), default=0))
        return {name: made.get(id(parameter), 0) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def apply(self, stored: StoredState) -> None:
        """Load weights and optimizer state. Collective: every rank calls this. Raises `ModelError` if the stored
        parameters do not match this model's, and then nothing has changed."""
        # Every rank checks all parameters, not only its pieces, so that all ranks raise or none does. A rank that
        # raised alone would leave the others waiting in `_publish`.
        stored.check({name: getattr(p, "ds_numel", p.numel()) for name, p in self._parameters.items()})
        steps: dict[str, int] = stored.counters["adam_steps"]
        # AdamW makes its state at its first step, so a new process has none yet.
        for flat in self._flats():
            values = self._adam.state[flat]
            for kind in MOMENTS:
                if kind in values:
                    values[kind].zero_()  # paddings belong to no piece, and nothing else resets them
                else:
                    values[kind] = torch.zeros_like(flat)
            # A fused AdamW counts on the device of the weights, any other on the host.
            where = flat.device if self._adam.defaults.get("fused") else "cpu"
            values["step"] = torch.tensor(float(max(steps.values())), device=where)
        for piece in self._pieces:
            values = self._adam.state[piece.flat]
            for kind in KINDS:
                stored.read(piece.name, kind, piece.start, piece.within(piece.flat if kind == WEIGHT else values[kind]))
            if not self._stage:  # AdamW keeps a count for each parameter; elsewhere one for each flat tensor
                values["step"].fill_(steps[piece.name])
        self._publish()  # last: it computes the model's weights from the master copy read above

    def _owned(self) -> Sequence[ParameterSlice]:
        """Pieces that this rank stores. At ZeRO 0 every rank holds all pieces, and rank 0 stores them."""
        return self._pieces if self._stage or dist.get_rank() == 0 else ()

    def _flats(self) -> Sequence[Tensor]:
        """The tensors that AdamW steps on."""
        if self._stage == 3:
            return self._optimizer.fp32_partitioned_groups_flat
        return self._optimizer.single_partition_of_fp32_groups if self._stage else list(self._parameters.values())

    def _piece(self, name: str, parameter: Any) -> ParameterSlice | None:
        if not self._stage:
            return ParameterSlice(name, 0, parameter.numel(), parameter, 0)
        if self._stage < 3:
            # DeepSpeed's addresses: lp is the parameter in the model, hp the float32 partition of this rank.
            mapping = parameter._hp_mapping
            if mapping is None:
                return None  # all its elements are in the partitions of other ranks
            flat = self._flats()[mapping.param_group_index]
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            return ParameterSlice(name, here.start, here.numel, flat, there.start)
        group, offset, numel = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        start = dist.get_rank() * numel  # shards of a parameter have equal size, in the order of ranks
        count = min(
            numel, parameter.ds_numel - start
        )  # the shards of the last ranks end in padding, or are only padding
        return ParameterSlice(name, start, count, self._flats()[group], offset) if count > 0 else None

    def _publish(self) -> None:
        """Copy the weights that AdamW steps on to those that the model computes with, as DeepSpeed does after a step.

        At ZeRO 0 they are the same tensors. At ZeRO 1 to 3 this gathers over ranks, so every rank must call it.
        """
        if self._stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self._stage == 3:
            self._optimizer._partition_all_parameters()
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self._optimizer._post_step(set())  # gathers the small parameters that DeepSpeed keeps whole on every rank


def seed_generators(seed: int) -> None:
    """Seed the generators of this process (torch, Python, numpy) with the seed of the run.

    This includes generators that align draws nothing from: a checkpoint stores all of them, and those of two equal runs
    must be equal.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> dict[str, Tensor]:
    """States of this process's generators: torch, Python, numpy's legacy generator, and torch on the current GPU."""
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
    """Restore this rank's generators. A rank without stored generators, because the run had fewer ranks, gets new ones
    seeded by (seed, step, rank)."""
    rank = dist.get_rank()
    # Seed first: the stored state may lack the GPU's generator, if the run was on a CPU.
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
