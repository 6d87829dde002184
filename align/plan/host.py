"""Host memory of a node, and bytes on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align.config import RecipeConfig, TrainedModelConfig
from align.plan.sizes import RoleModel

GPUS_PER_NODE = 8
"""Slots of a node: node n holds slots 8 n to 8 n + 7."""
PROCESS = 2e9
"""Bytes of a worker process with torch, transformers and DeepSpeed. An assumption."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of the node with most, by phase."""

    node: int
    loading: float
    training: float
    saving: float
    exporting: float

    @property
    def peak(self) -> float:
        return max(self.loading, self.training, self.saving, self.exporting)


def node_memory(
    models: Mapping[str, RoleModel], slots: Mapping[str, Sequence[int]], config: RecipeConfig
) -> HostMemory:
    """Host bytes of the node that needs most.

    Every process has its libraries. Loading: below ZeRO 3 each process reads all weights, at ZeRO 3 the first rank.
    Training: what is offloaded. Saving: a copy of a trained role's shard, with ``checkpoint.overlap``. Export: the
    first rank collects all weights.
    """
    nodes = {slot // GPUS_PER_NODE for role in slots.values() for slot in role}
    return max((_node(node, models, slots, config) for node in sorted(nodes)), key=lambda memory: memory.peak)


def _node(
    node: int, models: Mapping[str, RoleModel], slots: Mapping[str, Sequence[int]], config: RecipeConfig
) -> HostMemory:
    loading = training = saving = exporting = 0.0
    for name, model in models.items():
        local = sum(slot // GPUS_PER_NODE == node for slot in slots[name])
        first = slots[name][0] // GPUS_PER_NODE == node
        weights = model.width * model.weights
        sharded = model.section.zero_stage == 3
        loading += first * weights if sharded else local * weights
        training += local * (PROCESS + offloaded(model))
        if isinstance(model.section, TrainedModelConfig):
            saving += local * config.checkpoint.overlap * 12 * model.trained / model.ranks
            exporting = max(exporting, first * weights)
    return HostMemory(node, training + loading, training, training + saving, training + exporting)


def offloaded(model: RoleModel) -> float:
    """Host bytes that a rank's offloading takes."""
    section, shards = model.section, model.ranks
    kept = model.width * model.weights / shards if section.offload_parameters else 0.0
    if isinstance(section, TrainedModelConfig) and section.offload_optimizer:
        kept += (12 + model.width) * model.trained / shards
    return kept


def checkpoint_bytes(models: Mapping[str, RoleModel]) -> float:
    """A checkpoint on disk: float32 weight and two moments of each trained weight."""
    return sum(12.0 * model.trained for model in models.values())


def disk_bytes(models: Mapping[str, RoleModel], config: RecipeConfig) -> float:
    """All checkpoints that are kept, one more while it is written, and the exported models."""
    kept = config.checkpoint.keep_latest + config.checkpoint.keep_best + 1
    exported = sum(model.width * model.weights for model in models.values() if model.trained)
    best = getattr(getattr(config, "evaluation", None), "keep_best", False)
    return kept * checkpoint_bytes(models) + exported * (2 if best else 1)
