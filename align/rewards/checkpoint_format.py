"""How a reward checkpoint gives a score: resolved from the recipe and the checkpoint's own files.

No weights are read here, so everything is checked before a run starts.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from align.config import CheckpointRewardConfig, CriticConfig, EnsembleRewardConfig, RewardConfig
from align.data.attributes import resolve_attributes
from align.errors import ConfigError, ModelError
from align.models import load
from align.models.weights import stored_file
from align.prechecks.roles import require_head
from align.rewards import card
from align.rewards.card import Card, ScoreMoments

CARD_KINDS = ("sequence_classification", "attributes", "lm_head_row0")
"""Kinds that ``align_reward.json`` may name."""


@dataclass(frozen=True)
class HeadSpec:
    """How the score of one checkpoint is computed."""

    kind: str
    """As ``reward.head``, never ``auto``."""
    names: tuple[str, ...]
    """Outputs of the head; empty for one score."""
    weights: tuple[float, ...]
    """Weight of each output in the score."""
    moments: ScoreMoments | None
    """Normalization of scores; None if they are not normalized."""
    chat_template: str | None
    """Text of the chat template; None for the tokenizer's own."""
    date: str | None
    by_align: bool
    """The model was trained by align, on conversations that end with the end-of-turn token whatever the template
    writes after it."""


def members(config: CheckpointRewardConfig) -> list[CheckpointRewardConfig]:
    """The models of a reward role, ``path`` first. Further members are loaded from the hub's default branch and run no
    code from their repositories."""
    names = (item.name for item in fields(CheckpointRewardConfig) if item.name != "kind")
    first = CheckpointRewardConfig(**{name: getattr(config, name) for name in names})
    paths = config.paths if isinstance(config, EnsembleRewardConfig) else []
    return [first, *(replace(first, path=path, revision=None, init={}, trust_remote_code=False) for path in paths)]


def head_specs(config: CheckpointRewardConfig) -> list[HeadSpec]:
    """The head of each of `members`. Raises `ModelError` and `ConfigError` with a remedy."""
    specs = [_head_spec(member) for member in members(config)]
    if (config.weights or config.attributes) and not any(spec.names for spec in specs):
        kinds = ", ".join(dict.fromkeys(spec.kind for spec in specs))
        raise ConfigError(
            f"{config.path}: weights and attributes are given, but the checkpoint is read as {kinds}",
            remedy="remove them, or name a checkpoint whose head has several outputs (reward.head=attributes)",
        )
    return specs


def require_attributes(config: RewardConfig, names: Sequence[str]) -> None:
    """Raise `ConfigError` unless the reward is one model whose head has all attributes ``names``."""
    specs = head_specs(config) if isinstance(config, CheckpointRewardConfig) else []
    outputs = specs[0].names if len(specs) == 1 else ()
    if missing := [name for name in names if name not in outputs]:
        raise ConfigError(
            f"{config.source}: it does not rate {', '.join(missing)}; it has {', '.join(outputs) or 'one score'}",
            remedy="use one reward model whose head has these attributes, or set steering.attributes to the ones it "
            "has",
        )


def critic_start(critic: CriticConfig) -> HeadSpec:
    """The head of the reward model that a critic is initialized from."""
    require_head(critic)
    reward = CheckpointRewardConfig(
        path=critic.path,
        revision=critic.revision,
        init=critic.init,
        trust_remote_code=critic.trust_remote_code,
        head=critic.reward_head,
        attributes=critic.attributes,
        weights=critic.weights,
    )
    return head_specs(reward)[0]


def _head_spec(config: CheckpointRewardConfig) -> HeadSpec:
    outputs = load.labels(config)  # first: it refuses a path without a checkpoint
    file = stored_file(config, card.NAME)
    stored = card.read(Path(file).parent) if file else None
    kind = config.head if config.head != "auto" else _kind(config, stored, outputs)
    names = _names(config, stored, outputs) if kind == "attributes" else ()
    weights = _weights(config, stored, names) if kind == "attributes" else ()
    template = stored.chat_template if stored else None
    if config.chat_template is not None:
        try:
            # An empty file counts as none.
            template = Path(config.chat_template).expanduser().read_text(encoding="utf-8") or template
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"reward.chat_template cannot be read: {error}", remedy="give a file") from error
    return HeadSpec(
        kind,
        names,
        weights,
        _moments(config, stored, names, weights) if config.normalize else None,
        template,
        config.date if config.date is not None or stored is None else stored.date,
        stored is not None and bool(stored.loss),
    )


def _moments(
    config: CheckpointRewardConfig, stored: Card | None, names: tuple[str, ...], weights: tuple[float, ...]
) -> ScoreMoments:
    moments = stored.moments if stored else None
    if moments is None or not (math.isfinite(moments.mean) and math.isfinite(moments.std) and moments.std > 0):
        raise ModelError(
            f"{config.path}: normalize needs the mean and standard deviation of its scores, but {card.NAME} has "
            f"{'none' if moments is None else f'{moments.mean} and {moments.std}'}",
            remedy="train it with algorithm: reward_model, which measures them, or set reward.normalize=false and "
            "shaping.mean and shaping.std",
        )
    # ScoreMoments belong to the weights that they were measured with.
    if stored is not None and names and _weights(replace(config, weights={}), stored, names) != weights:
        raise ModelError(
            f"{config.path}: normalize needs the mean and standard deviation of a score with these weights, but "
            f"{card.NAME} has those with {dict(stored.weights)}",
            remedy="remove reward.weights, or set reward.normalize=false and shaping.mean and shaping.std",
        )
    return moments


def _kind(config: CheckpointRewardConfig, stored: Card | None, outputs: tuple[str, ...]) -> str:
    """Resolve ``auto`` by the card, or else by the architecture in the checkpoint's config."""
    if stored is not None:
        if stored.kind not in CARD_KINDS:
            raise ModelError(
                f"{config.path}: {card.NAME} has kind {stored.kind}, which is none of {', '.join(CARD_KINDS)}",
                remedy="set reward.head",
            )
        return stored.kind
    if config.init:
        return "sequence_classification"
    if not outputs:
        raise ModelError(
            f"{config.path}: cannot tell how this checkpoint gives a reward: it is not a sequence classifier",
            remedy="set reward.head=lm_head_row0 for a Llama-3.x-Nemotron-70B-Reward, reward.head=yes_no for a "
            "-Reward-Principle; otherwise use a sequence classifier",
        )
    return "sequence_classification" if len(outputs) == 1 else "attributes"


def _names(config: CheckpointRewardConfig, stored: Card | None, outputs: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the head's outputs, from the recipe, the card or the checkpoint's config."""
    from_recipe, stored_names = resolve_attributes(config.attributes), (stored.attributes if stored else ()) or outputs
    named = any(name != f"LABEL_{i}" for i, name in enumerate(stored_names))
    if from_recipe and named and len(from_recipe) == len(stored_names) and from_recipe != stored_names:
        raise ModelError(
            f"{config.path}: its head has the outputs {', '.join(stored_names)}, reward.attributes are "
            f"{', '.join(from_recipe)}",
            remedy="remove reward.attributes: the checkpoint names them",
        )
    names = from_recipe or stored_names
    if names == outputs and all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        raise ModelError(
            f"{config.path}: the checkpoint does not name the {len(outputs)} outputs of its head",
            remedy="name them in their order: reward.attributes=[helpfulness, ...], or [nemo] for the nine of NeMo",
        )
    if len(names) != len(outputs):
        raise ModelError(
            f"{config.path}: its head has {len(outputs)} outputs, {len(names)} are named: {', '.join(names)}",
            remedy="name each output, in their order: reward.attributes=[...]",
        )
    return names


def _weights(config: CheckpointRewardConfig, stored: Card | None, names: tuple[str, ...]) -> tuple[float, ...]:
    weights: Mapping[str, float] = config.weights or (stored.weights if stored else {})
    if not weights:
        raise ModelError(
            f"{config.path}: there are no weights to combine {', '.join(names)} into a score",
            remedy=f"set weights, for example reward.weights.{names[0]}=1; docs/rewards.md lists those of the papers",
        )
    for name in weights:
        if name not in names:
            close = "".join(f"did you mean `{other}`? " for other in difflib.get_close_matches(name, names, n=1))
            raise ModelError(
                f"{config.path}: reward.weights has {name}, which is not an output of its head",
                remedy=f"{close}outputs: {', '.join(names)}",
            )
    return tuple(float(weights.get(name, 0.0)) for name in names)
