"""Which number format ``dtype: auto`` stands for on this machine. Loads no torch.

On GPUs and CPUs with bfloat16 units it is bfloat16, elsewhere float32: a CPU without them computes bfloat16 many times
slower than float32.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Set
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

CPU_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
"""Flags of ``/proc/cpuinfo`` for bfloat16 units: of x86, and the last one of Arm."""
AMPERE = 8, 0
"""Compute capability of the first NVIDIA GPUs with bfloat16 units."""
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


class Precision(NamedTuple):
    """A number format and why it is taken."""

    dtype: Literal["float32", "bfloat16"]
    reason: str


def choose(flags: Set[str], capability: tuple[int, int] | None) -> Precision:
    """The format for a CPU with ``flags``, or for GPUs whose least compute capability is given."""
    if capability is not None:
        if capability >= AMPERE:
            return Precision("bfloat16", "this GPU has bfloat16 units")
        return Precision("float32", "this GPU has no bfloat16 units (compute capability {}.{})".format(*capability))
    units = [flag for flag in CPU_FLAGS if flag in flags]
    if units:
        return Precision("bfloat16", f"this CPU has bfloat16 units ({units[0]})")
    return Precision("float32", f"this CPU has no bfloat16 units ({', '.join(CPU_FLAGS)})")


@cache
def automatic() -> Precision:
    """The format for this machine: by its GPUs where torch is built for CUDA and any is visible, else by its CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # no Linux
        text = ""
    return choose(cpu_flags(text), gpu_capability() if _torch_has_cuda() else None)


def cpu_flags(cpuinfo: str) -> set[str]:
    """Flags of the first CPU in the text of ``/proc/cpuinfo``; x86 calls them flags and Arm Features."""
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return set(line[1].split()) if line else set()


def gpu_capability() -> tuple[int, int] | None:
    """The least compute capability of the GPUs that CUDA's driver shows to this process; None without any."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, number, versions = ctypes.c_int(), ctypes.c_int(), []
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return None
    for device in range(count.value):
        version = []
        for attribute in (_MAJOR, _MINOR):
            if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
                return None
            version.append(number.value)
        versions.append((version[0], version[1]))
    return min(versions, default=None)


def _torch_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    return version is not None and bool(re.search(r"^cuda\b.*=\s*['\"]", version.read_text(encoding="utf-8"), re.M))
