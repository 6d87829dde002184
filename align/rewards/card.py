"""``align_reward.json``: what a reward model's folder says of itself beside Hugging Face's files. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

NAME = "align_reward.json"
VERSION = 1


@dataclass(frozen=True)
class Moments:
    """Scores of held-out responses: what ``reward.normalize`` subtracts and divides by."""

    mean: float
    std: float
    """Over ``count``, not ``count - 1``."""
    count: int

    @classmethod
    def of(cls, score_B: Tensor) -> Moments:
        """Of these scores."""
        exact_B = score_B.double()
        return cls(float(exact_B.mean()), float(exact_B.std(correction=0)), len(score_B))


@dataclass(frozen=True)
class Card:
    """How the scores of a checkpoint are read and what they were learned from."""

    kind: str
    """As ``reward.kind``, never ``auto``."""
    attributes: tuple[str, ...] = ()
    """Names of the head's outputs, in their order; none for one score."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Goodness weights; attributes that are not named count 0."""
    moments: Moments | None = None
    """Of the score after weights; None where nothing was measured."""
    chat_template: str | None = None
    """Text of the template that conversations were rendered by; None for the tokenizer's own."""
    date: str | None = None
    """What the template got as ``date_string``."""
    data: str = ""
    """Fingerprint of the rows that it learned from."""
    loss: str = ""
    """Loss that it was trained by."""

    def dumps(self) -> str:
        """The file's text."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    def files(self) -> dict[str, str]:
        """Text by name of what a model's folder gets: the card."""
        return {NAME: self.dumps()}


def read(folder: Path) -> Card | None:
    """The card of a model folder; None where it has none. Raises `ModelError` for one that cannot be read."""
    file = folder / NAME
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = found.pop("version")
        if version != VERSION:
            raise ModelError(f"version {version} of this file is not known", where=str(file), remedy="update align")
        if unknown := found.keys() - {one.name for one in fields(Card)}:
            raise ModelError(f"unknown keys: {', '.join(sorted(unknown))}", where=str(file))
        moments = found.pop("moments", None)
        attributes = tuple(found.pop("attributes", ()))
        return Card(**found, attributes=attributes, moments=None if moments is None else Moments(**moments))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "export the model again, or delete the file and name reward.kind"
        raise ModelError(f"cannot be read: {error!r}", where=str(file), remedy=remedy) from error
