"""The surroundings of a worker process: its threads, its log, and silence towards telemetry."""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path


def worker_environment(num_cores: int, num_workers: int, loopback: bool) -> dict[str, str]:
    """Variables of a worker on a machine of ``num_cores`` with ``num_workers`` in all; set before torch is imported.

    Threads are the worker's share of the cores, and OpenMP does not spin while it waits: with several processes on few
    cores spinning costs 3 to 60 times on small matrices.
    """
    threads = str(max(1, num_cores // max(1, num_workers)))
    environment = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "GOMP_SPINCOUNT": "0",
        "TOKENIZERS_PARALLELISM": "false",
        **quiet(),
    }
    if loopback:
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return environment


def driver_environment() -> dict[str, str]:
    """Variables of the driver, set before torch is imported.

    With ``executor: local`` it computes, alone with all cores. Its threads wait actively, but not for long: measured on
    two cores, libgomp's default spinning made steps 4 times slower as soon as one core was taken by a neighbour.
    """
    return {"GOMP_SPINCOUNT": "10000", **quiet()}


def quiet() -> dict[str, str]:
    """Variables that keep libraries from calling home and from progress bars in log files."""
    return {
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }


def open_log(path: Path) -> None:
    """Send everything this process writes to ``path``, stacks of fatal signals included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("a", buffering=1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log.fileno(), stream.fileno())
    faulthandler.enable(log)
