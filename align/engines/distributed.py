"""The process group of one role."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger

from align.config import CudaOption

SHARED_MEMORY_OP = "deepspeed_shm_comm"


def open_store(host: str, timeout_s: float) -> dist.TCPStore:
    """The process group's TCP store, on rank 0. The system picks a free port; read it from ``store.port``.

    By default the store listens on every interface, without a password, so this binds its socket to ``host``.
    """
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024)
    port, timeout = listener.getsockname()[1], timedelta(seconds=timeout_s)
    fd = listener.detach()
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=fd)


def join_store(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """The TCP store of `open_store`, on any other rank."""
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def set_cuda_options(options: Collection[CudaOption]) -> None:
    """Set the options of ``run.cuda`` in this process, before it uses a GPU. They have no effect without one.

    Operations for which torch has no deterministic kernel warn, and run all the same.
    """
    if not torch.cuda.is_available():
        return
    if "tf32" in options:
        torch.set_float32_matmul_precision("high")
    if "deterministic" in options:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read by cuBLAS when it makes its first handle
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


def initialize(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> torch.device:
    """Join the process group, gloo on CPU and NCCL on CUDA, and hand it to DeepSpeed. Returns this rank's device.

    ``timeout_s`` is that of each collective operation.

    On CPU DeepSpeed would probe a compiler for every operator it has, and compile a shared-memory collective at the
    first start: this takes a minute, and leaves a lock file that hangs later starts if the process is killed meanwhile.
    This fills DeepSpeed's table of operators beforehand, with that operator unavailable, so DeepSpeed uses gloo.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    deepspeed_logger.setLevel("WARNING")
    cuda = torch.cuda.is_available()
    if not cuda:
        deepspeed.ops.__dict__["__compatible_ops__"] = {SHARED_MEMORY_OP: False}
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    # With a device NCCL connects now, so that a wrong network interface shows at the start, and not in the first step.
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if cuda else None,
    )
    deepspeed.init_distributed(backend)
    return device


def initialize_alone() -> torch.device:
    """Start a process group of one process, unless one is running. Returns this process's device."""
    if dist.is_initialized():
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return initialize(dist.HashStore(), rank=0, world_size=1, timeout_s=600.0)
