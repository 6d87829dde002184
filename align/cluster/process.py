"""Setup of a worker process: environment, threads, log, and end."""

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
"""Names of the variables that Ray and its workers inherit from the driver. Others may hold secrets of other programs.
``HF_TOKEN`` is inherited because workers read models from the hub, ``ALIGN_REWARD_TOKEN``, ``ALIGN_..._KEY``,
``OPENAI_API_KEY`` and ``NVIDIA_API_KEY`` because workers call services and endpoints, and ``SLURM_JOB_ID`` because jobs
find their leftover processes by it."""
STACKS = signal.SIGUSR2
"""Signal that makes a worker write the stacks of all threads into its log."""
PR_SET_PDEATHSIG = 1


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of the driver's environment that Ray and its workers inherit."""
    return {name: value for name, value in environment.items() if INHERITED.fullmatch(name)}


def worker_environment(num_cores: int, num_workers: int, loopback: bool) -> dict[str, str]:
    """Variables of one of ``num_workers`` workers on a machine of ``num_cores``, set before torch is imported.

    A worker gets its share of the cores as threads. OpenMP does not spin while it waits: several processes on few cores
    take 3 to 60 times as long for small matrices if it spins.
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

    With ``executor: local`` it computes, alone with all cores. Its threads spin for a short time: measured on two
    cores, libgomp's default spinning made steps 4 times slower when another process used one core.
    """
    return {"GOMP_SPINCOUNT": "10000", **quiet()}


def quiet() -> dict[str, str]:
    """Variables that turn off telemetry of libraries and progress bars in log files."""
    return {
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }


def open_log(path: Path) -> None:
    """Redirect the output of this process to ``path``, with the stacks of fatal signals and of `STACKS`. Secrets of the
    environment are redacted from Python's output.

    The signal handler itself writes the stacks, so they appear even while the interpreter's lock is held.
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
    """Make the system kill this process when its parent ends.

    A worker that is stopped, or that holds the interpreter's lock, cannot notice that its raylet is gone.
    """
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def state(pid: int) -> str:
    """State letter of a process of this machine as in proc(5): R, S, D, T (stopped), Z; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def signal_workers(pids: list[int], number: int) -> dict[int, str]:
    """Send a signal to those of ``pids`` that are Ray workers. Returns the state that each had before."""
    states = {pid: state(pid) for pid in pids}
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):  # the system may have reused the pid
                os.kill(pid, number)
        except OSError:
            continue  # the process has ended
    return states
