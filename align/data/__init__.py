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
    from . import dataset as dataset
    from . import editing as editing
    from . import genrm as genrm
    from . import genrm_prompts as genrm_prompts
    from . import openai as openai
    from . import prompts as prompts
    from . import sft_targets as sft_targets
    from . import steerlm_dataset as steerlm_dataset
    from . import toy as toy
    from . import trl as trl

_SUBMODULES = (
    "cache",
    "chat",
    "collate",
    "editing",
    "dataset",
    "genrm",
    "openai",
    "prompts",
    "steerlm_dataset",
    "sft_targets",
    "toy",
    "trl",
    "genrm_prompts",
)


def __getattr__(name: str) -> ModuleType:
    if name not in _SUBMODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
