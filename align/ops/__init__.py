"""Pure functions of tensors: log-probabilities, KL, rewards, advantages, losses, sampling.

Submodules load on first use, so that an algorithm's ``Config`` can be read without loading torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import (
        advantages,
        diagnostics,
        genrm,
        kl,
        logprobs,
        losses,
        policy_losses,
        preference_losses,
        rewards,
        sampling,
        steerlm,
    )

__all__ = [
    "advantages",
    "diagnostics",
    "genrm",
    "kl",
    "logprobs",
    "losses",
    "policy_losses",
    "preference_losses",
    "rewards",
    "sampling",
    "steerlm",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
