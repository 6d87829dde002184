"""``align_reward.json``: metadata of a reward model beside Hugging Face's files. Loads no torch."""

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
class ScoreMoments:
    """Mean and standard deviation of scores of held-out responses, used by ``reward.normalize``."""

    mean: float
    std: float
    """Divided by ``count``, not ``count - 1``."""
    count: int

    @classmethod
    def of(cls, score_B: Tensor) -> ScoreMoments:
        exact_B = score_B.double()
        return cls(float(exact_B.mean()), float(exact_B.std(correction=0)), len(score_B))


@dataclass(frozen=True)
class Card:
    """How the score of a checkpoint is computed, and how it was trained."""

    kind: str
    """As ``reward.head``, never ``auto``."""
    attributes: tuple[str, ...] = ()
    """Outputs of the head, in order; empty for one score."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of the attributes in the score; others count 0."""
    moments: ScoreMoments | None = None
    """ScoreMoments of the weighted score; None if they were not measured."""
    chat_template: str | None = None
    """Text of the chat template used in training; None for the tokenizer's own."""
    date: str | None = None
    """``date_string`` of the template."""
    data: str = ""
    """Fingerprint of the training rows."""
    loss: str = ""
    """Training loss."""

    def dumps(self) -> str:
        """The file's text."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    def files(self) -> dict[str, str]:
        """Text by file name, for an exported folder."""
        return {NAME: self.dumps()}


def read(folder: Path) -> Card | None:
    """The card of a model folder, or None. Raises `ModelError` for a card that cannot be read."""
    file = folder / NAME
    if not file.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = content.pop("version")
        if version != VERSION:
            raise ModelError(f"version {version} of this file is unknown", where=str(file), remedy="update align")
        if unknown := content.keys() - {item.name for item in fields(Card)}:
            raise ModelError(f"unknown keys: {', '.join(sorted(unknown))}", where=str(file))
        moments = content.pop("moments", None)
        attributes = tuple(content.pop("attributes", ()))
        return Card(**content, attributes=attributes, moments=None if moments is None else ScoreMoments(**moments))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "export the model again, or delete the file and set reward.head"
        raise ModelError(f"cannot be read: {error!r}", where=str(file), remedy=remedy) from error
