"""``align_judge.json``: how the judge in a model's folder learned to be asked and to answer. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

from align.config import GenerativeConfig, VerdictConfig
from align.errors import ConfigError, ModelError

NAME = "align_judge.json"
VERSION = 1
KEYS = {name: f"reward.generative.{name}" for name in ("form", "custom_roles", "judge.date")}
"""Where a recipe has what is compared."""


def files(verdict: VerdictConfig, date: str | None) -> dict[str, str]:
    """Text by name of what a judge's folder gets: the card. ``date`` is what the template got as ``date_string``."""
    card = json.dumps({"version": VERSION, **asdict(verdict), "date": date}, indent=2, ensure_ascii=False) + "\n"
    return {NAME: card}


def require_same(section: GenerativeConfig, keys: Mapping[str, str] = MappingProxyType(KEYS)) -> None:
    """Raise `ConfigError` where a judge would be asked otherwise than its folder says that it learned, and `ModelError`
    for a card that cannot be read. Nothing is known of a judge without a card. ``keys`` are those of messages."""
    file = Path(section.judge.path).expanduser() / NAME
    if section.judge.kind != "model" or not file.is_file():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise ModelError(f"version {found['version']} of this file is not known", where=str(file))
        learned = {name: found[name] for name in ("form", "custom_roles")} | {"judge.date": found.get("date")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"cannot be read: {error!r}", where=str(file), remedy="export the judge again") from error
    asked = {"form": section.form, "custom_roles": section.custom_roles, "judge.date": section.judge.date}
    said, wanted = (
        " ".join(
            f"{keys[name]}={x if isinstance(x, str) else json.dumps(x)}"
            for name, x in one.items()
            if asked[name] != learned[name]
        )
        for one in (learned, asked)
    )
    if said:
        raise ConfigError(
            f"this judge learned with {said} and would be asked with {wanted}",
            where=section.judge.path,
            remedy=f"ask as it learned: {said}",
        )
