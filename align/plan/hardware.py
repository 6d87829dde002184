"""GPUs: memory, ceilings of compute and bandwidth, and the shares of them that the estimates assume."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """A GPU. Rates are for each second."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Operations of a bfloat16 matrix product."""
    bandwidth: float
    """Bytes of device memory."""
    link: float = 450e9
    """Bytes to another GPU of the same node: NVLink, one direction, datasheet."""
    network: float = 50e9
    """Bytes to another node: one 400 Gb/s port for each GPU, nominal."""
    source: str = ""
    """Where the ceilings come from."""


GPUS = {
    "H200": Gpu("H200", 141 * GB, 790e12, 4.3e12, source="measured on an H200: matrix product, copy"),
    "H100": Gpu("H100", 80 * GB, 790e12, 3.0e12, source="an H200's matrix product; datasheet 3.35 TB/s x 0.9"),
    "A100": Gpu("A100", 80 * GB, 250e12, 1.8e12, 300e9, 25e9, "datasheet 312 TFLOP/s x 0.8, 2.04 TB/s x 0.9"),
}
"""Of an H200 the datasheet says 989 TFLOP/s and 4.8 TB/s, so what is measured is 0.8 and 0.9 of it; the others take the
same shares of theirs."""

DECODE, FORWARD, TRAIN, COPY = 0.55, 0.60, 0.52, 0.7
"""Assumed shares of the ceilings: bandwidth in decoding, matrix products in forward passes and in training, links and
network. They are goals for a tuned program and not measurements."""
