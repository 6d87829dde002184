"""``align_judge.json``: how the judge in a model's folder learned to be asked and to answer. Loads no torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from align.errors import ConfigError, ModelError
from align.sections import Generative, Verdict

NAME = "align_judge.json"
VERSION = 1


def files(verdict: Verdict) -> dict[str, str]:
    """Text by name of what the folder of a judge gets."""
    return {NAME: json.dumps({"version": VERSION, **asdict(verdict)}, indent=2, ensure_ascii=False) + "\n"}


def require_same(section: Generative) -> None:
    """Raise `ConfigError` where a judge would be asked otherwise than its folder says that it learned, and `ModelError`
    for a card that cannot be read. Nothing is known of a judge without a card."""
    file = Path(section.judge.path).expanduser() / NAME
    if section.judge.kind != "model" or not file.is_file():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise ModelError(f"version {found['version']} of this file is not known", where=str(file))
        learned = {"form": found["form"], "custom_roles": found["custom_roles"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot be read: {error!r}", where=str(file), remedy="export the judge again") from error
    asked = {name: getattr(section, name) for name in learned}
    if asked != learned:
        said, wanted = (
            " ".join(f"reward.generative.{name}={str(x).lower()}" for name, x in one.items())
            for one in (learned, asked)
        )
        raise ConfigError(
            f"this judge learned with {said} and would be asked with {wanted}",
            where=section.judge.path,
            remedy=f"ask as it learned: {said}",
        )
