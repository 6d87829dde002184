"""The surroundings of a worker process: its environment, its threads, its log, its end."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from align.utils.security import RedactedStream

INHERITED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|TERM|TZ|TMPDIR|PWD|LANG|LC_.*|VIRTUAL_ENV|CONDA_.*|PYTHON.*|LD_LIBRARY_PATH|LD_PRELOAD"
    r"|(CUDA|NVIDIA|NCCL|GLOO|UCX|FI|OMP|MKL|KMP|GOMP|TORCH|TORCHDYNAMO|TORCHINDUCTOR|PYTORCH|TRITON|DS|DEEPSPEED)_.*"
    r"|(HF|HUGGINGFACE|TRANSFORMERS|TOKENIZERS|SAFETENSORS|RAY|SLURM|XDG)_.*"
    r"|ALIGN_REWARD_TOKEN\w*|ALIGN_\w+_KEY|OPENAI_API_KEY|SSL_CERT_.*|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|(http|https|no|all|HTTP|HTTPS|NO|ALL)_(proxy|PROXY)"
)
"""Names of variables that Ray and its workers get from the driver; no others, for they may hold secrets of other
programs. ``HF_TOKEN`` is among them, because workers read models from the hub, and ``ALIGN_REWARD_TOKEN``,
``ALIGN_..._KEY``, ``OPENAI_API_KEY`` and ``NVIDIA_API_KEY``, because they ask services and endpoints. ``SLURM_JOB_ID``
is, because jobs find what is left of them by it."""
STACKS = signal.SIGUSR2
"""Signal on which a worker writes the stacks of all its threads into its log."""
PR_SET_PDEATHSIG = 1


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of the driver's environment that Ray and its workers get."""
    return {name: value for name, value in environment.items() if INHERITED.fullmatch(name)}


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
    """Send everything this process writes to ``path``, stacks of fatal signals and of `STACKS` included. What Python
    writes holds no secret of the environment.

    The stacks are written by the signal's handler itself, so they come also while the interpreter's lock is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("a", buffering=1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log.fileno(), stream.fileno())
    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    faulthandler.enable(log)
    faulthandler.register(STACKS, log, all_threads=True)


def die_with_parent() -> None:
    """Have the system kill this process when the one that started it ends, however it ends.

    A worker that is stopped or holds the interpreter's lock cannot see that its raylet is gone.
    """
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def state(pid: int) -> str:
    """State letter of a process of this machine as in proc(5): R, S, D, T (stopped), Z; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def signal_workers(pids: list[int], number: int) -> dict[int, str]:
    """Send a signal to those of ``pids`` that are workers of Ray; returns the state of each before."""
    states = {pid: state(pid) for pid in pids}
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):  # the number may have been given anew
                os.kill(pid, number)
        except OSError:
            continue  # gone meanwhile
    return states
