"""Which reserved bundle becomes which slot, so that the slots of a role lie on as few nodes as possible.

Ray packs bundles onto nodes, in no order that a recipe could rely on. NVLink and NVSwitch connect the GPUs of a node
about ten times faster than the network connects nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

MAX_ORDERS = 5000
"""Orders of nodes that are compared; more are possible only for nodes of many different sizes."""


def slot_order(node_of: Mapping[int, str], roles: Sequence[Sequence[int]]) -> list[int]:
    """Bundles in the order of slots. ``node_of`` gives the node of each bundle, ``roles`` the slots of each role.

    Slots of a node are adjacent. Of all orders of the nodes it takes one in which the roles lie on the fewest nodes in
    total; among these, larger nodes come first, then nodes by their id.
    """
    bundles = defaultdict(list)
    for bundle, node in sorted(node_of.items()):
        bundles[node].append(bundle)
    by_size: dict[int, list[str]] = defaultdict(list)
    for node in sorted(bundles, key=lambda node: (-len(bundles[node]), node)):
        by_size[len(bundles[node])].append(node)
    counts = {size: len(nodes) for size, nodes in by_size.items()}
    best = min(islice(_arrangements(counts), MAX_ORDERS), key=lambda sizes: _nodes_of_roles(sizes, roles))
    queues = {size: iter(nodes) for size, nodes in by_size.items()}
    return [bundle for size in best for bundle in bundles[next(queues[size])]]


def _arrangements(counts: Mapping[int, int]) -> Iterator[tuple[int, ...]]:
    """All different orders of node sizes, those with larger nodes first earlier."""
    if not any(counts.values()):
        yield ()
        return
    for size in sorted(counts, reverse=True):
        if counts[size]:
            for rest in _arrangements({**counts, size: counts[size] - 1}):
                yield (size, *rest)


def _nodes_of_roles(sizes: Sequence[int], roles: Sequence[Sequence[int]]) -> int:
    """Nodes on which the roles lie, summed over roles, if nodes of ``sizes`` take the slots one after another."""
    node_of_slot = [node for node, size in enumerate(sizes) for _ in range(size)]
    return sum(len({node_of_slot[slot] for slot in slots}) for slots in roles)
