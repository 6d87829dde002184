"""Lines that say which role is being loaded, from where, how large it is, and when it is ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from align.config import GeneratorConfig, ModelConfig, RewardConfig
from align.utils.redact import redact

Announce = Callable[[str], None]
"""Gets one line per call."""


def to_stdout(line: str) -> None:
    """An `Announce` that prints at once."""
    print(redact(line), flush=True)


def silent(line: str) -> None:
    """An `Announce` that prints nothing."""


def loading(config: ModelConfig) -> str:
    """What a role does before it can answer, as ``loading ./model (269 MB)``."""
    if isinstance(config, (RewardConfig, GeneratorConfig)) and config.kind in ("http", "endpoint", "function"):
        source = config.source if isinstance(config, RewardConfig) else config.function or config.endpoint.url
        return f"opening {source}"
    if isinstance(config, RewardConfig) and config.kind == "generative":
        return loading(config.generative.judge)
    if config.init:
        return "making random weights"
    folder = Path(config.path).expanduser()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    return f"loading {config.path}" + (f" ({_bytes(size)})" if size else "")


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


@contextmanager
def announced(announce: Announce, name: str, config: ModelConfig, place: str) -> Iterator[None]:
    """Announce that a role is being loaded, and after the context how many seconds it took."""
    announce(f"{name}: {loading(config)} {place}")
    start = time.monotonic()
    yield
    announce(f"{name}: ready in {time.monotonic() - start:.1f} s")
