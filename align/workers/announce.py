"""Lines that say what is being brought up: which role, from where, how large, and when it is ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from align.config import GeneratorConfig, ModelConfig, RewardConfig
from align.utils.redact import redact

Announce = Callable[[str], None]
"""Called with one line at a time."""


def to_stdout(line: str) -> None:
    """An `Announce` that prints at once."""
    print(redact(line), flush=True)


def silent(line: str) -> None:
    """An `Announce` that prints nothing."""


def loading(section: ModelConfig) -> str:
    """What a role does before it can answer: ``loading ./model (269 MB)``."""
    if isinstance(section, (RewardConfig, GeneratorConfig)) and section.kind in ("http", "endpoint", "function"):
        source = section.source if isinstance(section, RewardConfig) else section.function or section.endpoint.url
        return f"opening {source}"
    if isinstance(section, RewardConfig) and section.kind == "generative":
        return loading(section.generative.judge)
    if section.init:
        return "making random weights"
    folder = Path(section.path).expanduser()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    return f"loading {section.path}" + (f" ({_bytes(size)})" if size else "")


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


@contextmanager
def announced(announce: Announce, name: str, section: ModelConfig, place: str) -> Iterator[None]:
    """Announce the start of a role, and after the context its end with the seconds that it took."""
    announce(f"{name}: {loading(section)} {place}")
    begun = time.monotonic()
    yield
    announce(f"{name}: ready in {time.monotonic() - begun:.1f} s")
