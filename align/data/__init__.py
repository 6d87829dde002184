"""Preferences and ratings as token ids. Submodules load on first use, so ``from align import data`` loads no torch."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from align.data.attributes import HELPSTEER_ATTRIBUTES as HELPSTEER_ATTRIBUTES
from align.data.attributes import NEMO_ATTRIBUTES as NEMO_ATTRIBUTES

if TYPE_CHECKING:
    from . import cache as cache
    from . import chat as chat
    from . import collate as collate
    from . import editing as editing
    from . import helpsteer as helpsteer
    from . import judging as judging
    from . import messages as messages
    from . import prompts as prompts
    from . import steered as steered
    from . import tasks as tasks
    from . import toy as toy
    from . import verdicts as verdicts

_SUBMODULES = (
    "cache",
    "chat",
    "collate",
    "editing",
    "helpsteer",
    "judging",
    "messages",
    "prompts",
    "steered",
    "tasks",
    "toy",
    "verdicts",
)


def __getattr__(name: str) -> ModuleType:
    if name not in _SUBMODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
