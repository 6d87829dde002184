"""How attribute labels are written into a prompt (SteerLM: Dong et al. 2023, arXiv 2310.05344). Loads no torch.

The text is NeMo-Aligner's, ``name:value,name:value`` between a prefix and a suffix. A model that learned to read it
says so in ``align_steering.json`` beside its weights.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.steerlm import LABEL_MAX, SteeringConfig
from align.data.attributes import resolve_attributes
from align.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from align.data.chat import Message

NAME = "align_steering.json"
VERSION = 1

USUAL = {"complexity": 2, "verbosity": 2, "toxicity": 0, "humor": 0, "creativity": 0}
"""What is asked for where nothing is said, 4 of all others: complexity and verbosity as in HelpSteer2 (arXiv
2406.08673), the others as in NeMo-Aligner's guide to SteerLM."""

_KEYS = {"names": "steering.attributes"} | {name: f"steering.{name}" for name in ("place", "prefix", "suffix")}
"""What a policy must be told as it learned, and the keys of a recipe that say so."""

Turns = tuple["Message", ...]


@dataclass(frozen=True)
class SteeringFormat:
    """Which attributes are in the prompt, and how they are written."""

    names: tuple[str, ...]
    values: tuple[int, ...]
    """What is asked for where nobody says otherwise, in the order of ``names``."""
    place: str
    """As ``steering.place``."""
    prefix: str
    suffix: str
    date: str | None = None
    """What the chat template gets as ``date_string``."""

    @classmethod
    def of(cls, section: SteeringConfig, date: str | None = None) -> SteeringFormat:
        """As a recipe says. Raises `ConfigError` for a value of an attribute that is not told."""
        names = resolve_attributes(section.attributes)
        usual = tuple(USUAL.get(name, LABEL_MAX) for name in names)
        return cls(names, usual, section.place, section.prefix, section.suffix, date).asking(section.values)

    def asking(self, requested: Mapping[str, int]) -> SteeringFormat:
        """The same form that asks for the values ``requested``, of others for what it did. Raises `ConfigError`."""
        for name, value in requested.items():
            if name not in self.names:
                near = difflib.get_close_matches(name, self.names, n=1)
                hint = "".join(f"did you mean `{name_near}`? " for name_near in near)
                raise ConfigError(
                    f"{name}={value}: this policy was not trained with this attribute",
                    remedy=f"{hint}attributes: {', '.join(self.names)}",
                )
            if not 0 <= value <= LABEL_MAX:
                raise ConfigError(
                    f"{name}={value} is outside 0 to {LABEL_MAX}", remedy="give a whole number from 0 to 4"
                )
        defaults = zip(self.names, self.values, strict=True)
        return replace(self, values=tuple(requested.get(name, value) for name, value in defaults))

    def text(self, values: Sequence[int]) -> str:
        """The attributes as they are told, prefix and suffix included."""
        pairs = ",".join(f"{name}:{value}" for name, value in zip(self.names, values, strict=True))
        return f"{self.prefix}{pairs}{self.suffix}"

    def steered(self, context: Turns, values: Sequence[int] | None = None) -> tuple[Turns, str]:
        """A conversation that asks for ``values``, or for those of the form, and the first words of its answer."""
        labels = self.text(self.values if values is None else values)
        if self.place == "assistant":
            return context, labels
        if self.place == "user":
            *before, last = context
            return (*before, last._replace(content=last.content + labels)), ""
        first = context[0]
        if first.role != "system":
            return (first._replace(role="system", content=labels), *context), ""
        return (first._replace(content=first.content + labels), *context[1:]), ""

    def files(self) -> dict[str, str]:
        """Text by name of what a model's folder gets: the card."""
        card = json.dumps({"version": VERSION, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"
        return {NAME: card}


def read_steering_card(file: Path) -> SteeringFormat:
    """The steering format of a model's card. Raises `ModelError` for an unreadable card."""
    try:
        card: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = card.pop("version")
        if version != VERSION:
            raise ModelError(f"version {version} of this file is not supported", where=str(file), remedy="update align")
        names, values = tuple(card.pop("names")), tuple(card.pop("values"))
        if len(names) != len(values) or not all(type(value) is int for value in values):
            raise ModelError(f"{len(names)} attributes have the values {list(values)}", where=str(file))
        return SteeringFormat(names, values, **card)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "export the model again"
        raise ModelError(f"cannot be read: {error!r}", where=str(file), remedy=remedy) from error


def require_same_steering(form: SteeringFormat, folder: str) -> None:
    """Raise `ConfigError` where a policy would be told attributes otherwise than its folder says that it learned, and
    `ModelError` for a card that cannot be read. Nothing is known of a model without a card."""
    file = Path(folder).expanduser() / NAME
    if not file.is_file():
        return
    learned = read_steering_card(file)
    differing = [name for name in _KEYS if getattr(form, name) != getattr(learned, name)]
    in_card, in_recipe = (
        " ".join(f"{_KEYS[name]}={json.dumps(getattr(steering, name), ensure_ascii=False)}" for name in differing)
        for steering in (learned, form)
    )
    if differing:
        raise ConfigError(
            f"this policy was trained with {in_card}, but the recipe sets {in_recipe}",
            where=folder,
            remedy=f"use the values of its training: {in_card}",
        )
