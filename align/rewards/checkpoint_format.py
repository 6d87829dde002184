"""How a reward checkpoint gives its score: what the recipe and the checkpoint's own files say together.

Nothing here reads a weight, so that all of it is checked before a run starts.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from align.config import CriticConfig, EnsembleConfig, ModelConfig, RewardConfig
from align.data.attributes import resolve
from align.errors import ConfigError, ModelError
from align.generators import opening
from align.models import identity, load
from align.models.weights import stored_file
from align.prechecks.roles import require_head
from align.rewards import card
from align.rewards.card import Card, Moments
from align.utils import plugins

BY_CARD = ("sequence_classification", "attributes", "lm_head_row0")
"""Kinds that a checkpoint may give itself."""


@dataclass(frozen=True)
class Reading:
    """How one checkpoint is read."""

    kind: str
    """As ``reward.kind``, never ``auto``."""
    names: tuple[str, ...]
    """Of the head's outputs; none for one score."""
    weights: tuple[float, ...]
    """Of each output in the score."""
    moments: Moments | None
    """What scores are normalized by; None where they are not."""
    chat_template: str | None
    """Text of the template that conversations are rendered by; None for the tokenizer's own."""
    date: str | None
    by_align: bool
    """Trained here, on conversations that end with the end-of-turn token, whatever the template writes after it."""

    @property
    def own_template(self) -> bool:
        """Whether recipe or checkpoint say how conversations are rendered for this model."""
        return self.chat_template is not None or self.date is not None


def members(section: RewardConfig) -> list[RewardConfig]:
    """The models of a reward role, ``path`` first. The others come from the hub's default branch and run no code of
    their own."""
    alone = replace(section, ensemble=EnsembleConfig())
    others = [
        replace(alone, path=path, revision=None, init={}, trust_remote_code=False) for path in section.ensemble.paths
    ]
    return [alone, *others]


def read(section: RewardConfig) -> list[Reading]:
    """How each of `members` is read. Raises `ModelError` and `ConfigError` with a remedy."""
    found = [_read(member) for member in members(section)]
    if (section.weights or section.attributes) and not any(one.names for one in found):
        kinds = ", ".join(dict.fromkeys(one.kind for one in found))
        raise ConfigError(
            f"{section.path}: weights and attributes are given, but the checkpoint is read as {kinds}",
            remedy="leave them out, or name a checkpoint whose head has several outputs (reward.kind=attributes)",
        )
    return found


def require_attributes(section: RewardConfig, names: Sequence[str]) -> None:
    """Raises `ConfigError` for a judge that does not give each of the attributes ``names`` a number of its own."""
    judged = read(section) if section.is_model else []
    missing = [name for name in names if len(judged) != 1 or name not in judged[0].names]
    if missing:
        has = ", ".join(judged[0].names) if len(judged) == 1 else ""
        raise ConfigError(
            f"{section.path or section.kind}: it does not rate {', '.join(missing)}, but has {has or 'one score'}",
            remedy="give one reward model with a head of these attributes, or name those that it has in "
            "steering.attributes",
        )


def start_of(critic: CriticConfig) -> Reading:
    """How the reward model is read that a critic starts from."""
    require_head(critic)
    reward = RewardConfig(
        path=critic.path,
        revision=critic.revision,
        init=critic.init,
        trust_remote_code=critic.trust_remote_code,
        kind=critic.kind,
        attributes=critic.attributes,
        weights=critic.weights,
    )
    return read(reward)[0]


def _read(section: RewardConfig) -> Reading:
    outputs = load.labels(section)  # first, because it refuses what is no checkpoint at all
    found = _card(section)
    kind = section.kind if section.kind != "auto" else _kind_of(section, found, outputs)
    names = _names(section, found, outputs) if kind == "attributes" else ()
    weights = _weights(section, found, names) if kind == "attributes" else ()
    moments = None
    if section.normalize:
        moments = found.moments if found else None
        if moments is None or not (math.isfinite(moments.mean) and math.isfinite(moments.std) and moments.std > 0):
            raise ModelError(
                f"{section.path}: normalize needs mean and standard deviation of its scores, {card.NAME} holds "
                f"{'none' if moments is None else f'{moments.mean} and {moments.std}'}",
                remedy="train it with algorithm: reward_model, which measures them, or set reward.normalize=false and "
                "shaping.mean and shaping.std",
            )
        if found is not None and names and _weights(replace(section, weights={}), found, names) != weights:
            raise ModelError(
                f"{section.path}: normalize needs the mean and standard deviation of a score by these weights, "
                f"{card.NAME} holds those by {dict(found.weights)}",
                remedy="leave reward.weights out, or set reward.normalize=false and shaping.mean and shaping.std",
            )
    return Reading(
        kind,
        names,
        weights,
        moments,
        _template(section) or (found.chat_template if found else None),
        section.date if section.date is not None or found is None else found.date,
        found is not None and bool(found.loss),
    )


def _card(section: RewardConfig) -> Card | None:
    file = stored_file(section, card.NAME)
    return card.read(Path(file).parent) if file else None


def _kind_of(section: RewardConfig, found: Card | None, outputs: tuple[str, ...]) -> str:
    """By the card, or else by the architecture that the checkpoint names."""
    if found is not None:
        if found.kind not in BY_CARD:
            raise ModelError(
                f"{section.path}: {card.NAME} is of kind {found.kind}, which is none of {', '.join(BY_CARD)}",
                remedy="name reward.kind",
            )
        return found.kind
    if section.init:
        return "sequence_classification"
    if not outputs:
        raise ModelError(
            f"{section.path}: cannot tell how this checkpoint gives a reward: it is no sequence classifier",
            remedy="set reward.kind=lm_head_row0 for a Llama-3.x-Nemotron-70B-Reward, reward.kind=yes_no for a "
            "-Reward-Principle, else give a sequence classifier",
        )
    return "sequence_classification" if len(outputs) == 1 else "attributes"


def _names(section: RewardConfig, found: Card | None, outputs: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the head's outputs: those of the recipe, of the card, or of the config."""
    given, own = resolve(section.attributes), (found.attributes if found else ()) or outputs
    named = any(name != f"LABEL_{i}" for i, name in enumerate(own))
    if given and named and len(given) == len(own) and given != own:
        raise ModelError(
            f"{section.path}: its head has the outputs {', '.join(own)}, reward.attributes are {', '.join(given)}",
            remedy="leave reward.attributes out: the checkpoint names them",
        )
    names = given or own
    if names == outputs and all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        raise ModelError(
            f"{section.path}: the checkpoint does not name the {len(outputs)} outputs of its head",
            remedy="name them in their order: reward.attributes=[helpfulness, ...], or [nemo] for the nine of NeMo",
        )
    if len(names) != len(outputs):
        raise ModelError(
            f"{section.path}: its head has {len(outputs)} outputs, {len(names)} are named: {', '.join(names)}",
            remedy="name each output, in their order: reward.attributes=[...]",
        )
    return names


def _weights(section: RewardConfig, found: Card | None, names: tuple[str, ...]) -> tuple[float, ...]:
    weights: Mapping[str, float] = section.weights or (found.weights if found else {})
    if not weights:
        raise ModelError(
            f"{section.path}: nothing says how {', '.join(names)} add up to a score",
            remedy=f"give weights, as reward.weights.{names[0]}=1; docs/rewards.md lists those of the papers",
        )
    for name in weights:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = "".join(f"did you mean `{one}`? " for one in near)
            raise ModelError(
                f"{section.path}: a weight is given for {name}, which is no output of its head",
                remedy=f"{hint}outputs: {', '.join(names)}",
            )
    return tuple(float(weights.get(name, 0.0)) for name in names)


def _template(section: RewardConfig) -> str | None:
    if section.chat_template is None:
        return None
    try:
        return Path(section.chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"reward.chat_template cannot be read: {error}", remedy="give a file") from error


def fingerprint(section: ModelConfig, seed: int) -> str:
    """What a role starts from, as `align.models.identity.fingerprint`: all models of an ensemble, the source of a
    function, the model of a judge that writes. Of a service it says nothing; its address stands in the recipe."""
    if not isinstance(section, RewardConfig):
        return identity.fingerprint(section, seed)
    if section.kind == "generative":
        return opening.fingerprint(section.generative.judge, seed)
    if section.kind == "http":
        return hashlib.sha256(b"http").hexdigest()
    if section.kind == "function":
        return plugins.function_fingerprint(section.function)
    models = [identity.fingerprint(one, seed) for one in members(section)]
    return models[0] if len(models) == 1 else hashlib.sha256(" ".join(models).encode()).hexdigest()
