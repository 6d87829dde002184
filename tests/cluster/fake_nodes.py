"""Reserves slots on a Ray cluster of three nodes of 8 pretended GPUs, and prints as JSON which node each slot lies on.

A script of its own, because it connects to another Ray cluster than the other tests.
"""

from __future__ import annotations

import json
import os
import time
from itertools import groupby
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from align.cluster.pool import RayCluster
from align.config import ClusterConfig

NODE: dict[str, Any] = {"num_cpus": 8, "num_gpus": 8, "object_store_memory": 10**8}


@ray.remote
class Place:
    """Says where it is."""

    def place(self) -> dict[str, str]:
        node = ray.get_runtime_context().get_node_id()
        return {"node": node, "gpu": os.environ["CUDA_VISIBLE_DEVICES"], "threads": os.environ["OMP_NUM_THREADS"]}


def reserved(slots: int) -> RayCluster:
    cluster = RayCluster(ClusterConfig(address="unused:1", start_timeout_s=60.0), slots)
    cluster._reserve()
    return cluster


def places(cluster: RayCluster, roles: dict[str, tuple[int, ...]]) -> dict[str, list[dict[str, str]]]:
    """Where the first and the last actor of each role land, made as those of workers are."""
    cluster._arrange(list(roles.values()))
    sharing = [sum(slot in slots for slots in roles.values()) for slot in range(cluster.num_slots)]
    on_node = dict.fromkeys(cluster._node_of_slot, 8)
    actors = {
        role: [
            Place.options(
                num_cpus=1.0 / sharing[slot],
                num_gpus=1.0 / sharing[slot],
                scheduling_strategy=PlacementGroupSchedulingStrategy(cluster._group, cluster._order[slot]),
                runtime_env={"env_vars": cluster._environment(cluster._node_of_slot[slot], on_node)},
            ).remote()
            for slot in sorted({slots[0], slots[-1]})
        ]
        for role, slots in roles.items()
    }
    found = {role: ray.get([actor.place.remote() for actor in made], timeout=120) for role, made in actors.items()}
    for actor in (actor for made in actors.values() for actor in made):
        ray.kill(actor)
    return found


def release(cluster: RayCluster) -> None:
    """Give the slots back, and wait until Ray counts them."""
    remove_placement_group(cluster._group)
    while ray.available_resources().get("GPU", 0) < 24:
        time.sleep(0.1)


def main() -> None:
    nodes = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(**NODE)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="error", configure_logging=False)
    result: dict[str, Any] = {"nodes": {}}
    for slots in (8, 10, 12, 20, 24):
        cluster = reserved(slots)
        result["nodes"][slots] = [len(list(run)) for _, run in groupby(cluster._node_of_slot)]
        if slots == 8:
            seven = {f"role{number}": (0,) for number in range(7)}
            result["seven roles on a slot"] = [place for made in places(cluster, seven).values() for place in made]
        if slots == 20:
            result["roles of eight"] = places(cluster, {"policy": tuple(range(4, 12)), "reward": tuple(range(12, 20))})
        release(cluster)
    print(json.dumps(result))
    ray.shutdown()
    nodes.shutdown()


if __name__ == "__main__":
    main()
