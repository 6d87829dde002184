"""Lines that say which role is being loaded, from where, how large it is, and when it is ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from align.config import GenerativeRewardConfig, ModelConfig, RewardConfig, RoleConfig
from align.utils.security import redact

Announce = Callable[[str], None]
"""Gets one line per call."""


def to_stdout(line: str) -> None:
    """An `Announce` that prints at once."""
    print(redact(line), flush=True)


def silent(line: str) -> None:
    """An `Announce` that prints nothing."""


def loading(config: RoleConfig) -> str:
    """What a role does before it can answer, as ``loading ./model (269 MB)``."""
    if isinstance(config, GenerativeRewardConfig):
        return loading(config.judge)
    if not isinstance(config, ModelConfig):
        fields = vars(config)
        return (
            f"opening {config.source if isinstance(config, RewardConfig) else fields.get('url') or fields['function']}"
        )
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
def announced(announce: Announce, name: str, config: RoleConfig, place: str) -> Iterator[None]:
    """Announce that a role is being loaded, and after the context how many seconds it took."""
    announce(f"{name}: {loading(config)} {place}")
    start = time.monotonic()
    yield
    announce(f"{name}: ready in {time.monotonic() - start:.1f} s")
