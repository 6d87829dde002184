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
