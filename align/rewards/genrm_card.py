"""``align_judge.json``: the prompt format that a generative reward model was trained on. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from align.config import GenerativeConfig, VerdictConfig
from align.errors import ConfigError, ModelError

NAME = "align_judge.json"
VERSION = 1
KEYS = {name: f"reward.{name}" for name in ("form", "custom_roles", "judge.date")}
"""Recipe keys of the settings that must agree."""


def files(verdict: VerdictConfig, date: str | None) -> dict[str, str]:
    """Text by file name, for an exported folder. ``date`` is the template's ``date_string``."""
    card = json.dumps({"version": VERSION, **asdict(verdict), "date": date}, indent=2, ensure_ascii=False) + "\n"
    return {NAME: card}


def require_same(config: GenerativeConfig, keys: Mapping[str, str] = MappingProxyType(KEYS)) -> None:
    """Raise `ConfigError` if the recipe's prompt format differs from the judge's training, and `ModelError` if the card
    cannot be read. A judge without a card passes. ``keys`` names the settings in messages."""
    file = Path(config.judge.path).expanduser() / NAME
    if config.judge.kind != "model" or not file.is_file():
        return
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        if card["version"] != VERSION:
            raise ModelError(f"version {card['version']} of this file is unknown", where=str(file))
        trained = {name: card[name] for name in ("form", "custom_roles")} | {"judge.date": card.get("date")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot be read: {error!r}", where=str(file), remedy="export the judge again") from error
    recipe = {"form": config.form, "custom_roles": config.custom_roles, "judge.date": config.judge.date}
    different = [name for name in recipe if recipe[name] != trained[name]]

    def settings(values: Mapping[str, Any]) -> str:
        texts = {n: values[n] if isinstance(values[n], str) else json.dumps(values[n]) for n in different}
        return " ".join(f"{keys[name]}={text}" for name, text in texts.items())

    if different:
        raise ConfigError(
            f"this judge was trained with {settings(trained)}, but the recipe uses {settings(recipe)}",
            where=config.judge.path,
            remedy=f"set {settings(trained)}",
        )
