"""Whether Ray's own processes live. Ray itself tells late, or ends the driver without a message after a minute."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping
from itertools import cycle, islice

import ray

CONNECT_TIMEOUT_S = 1.0
MISSES = 3
"""Looks in a row without an answer after which a process is called dead; a refused connection counts twice."""
AT_A_TIME = 8
"""Nodes looked at in one turn."""


class Daemons:
    """Ray's control store (GCS) and the raylet of each node, looked at by opening a connection."""

    def __init__(self, names_on: Mapping[str, str]):
        """``names_on`` tells which workers are on a node, by Ray's id of it, for messages."""
        store = ray.get_runtime_context().gcs_address.rpartition(":")
        self._store = f"Ray's control store (gcs_server) at {store[0]}:{store[2]}"
        self._addresses = {self._store: (store[0], int(store[2]))}
        for node in ray.nodes():
            if node["Alive"] and node["NodeID"] in names_on:
                host, port = node["NodeManagerAddress"], node["NodeManagerPort"]
                self._addresses[f"the raylet at {host}:{port}, node of {names_on[node['NodeID']]}"] = (host, port)
        self._raylets = cycle([name for name in self._addresses if name != self._store] or [self._store])
        self._missed: Counter[str] = Counter()

    def dead(self) -> str | None:
        """The one that is gone, in words; None while all looked at this time answer."""
        for name in {self._store: None, **dict.fromkeys(islice(self._raylets, AT_A_TIME))}:
            try:
                socket.create_connection(self._addresses[name], timeout=CONNECT_TIMEOUT_S).close()
                self._missed[name] = 0
            except ConnectionRefusedError:
                self._missed[name] += 2
            except OSError:
                self._missed[name] += 1
            if self._missed[name] >= MISSES:
                return name
        return None
