"""What a run is, so that a checkpoint is only gone on from by the run that it belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.config import RecipeConfig
from align.config.load import flatten_config
from align.errors import ConfigError

HARMLESS = (
    r"run\.(dir|resume|allow_change|max_time|max_restarts|logged_samples|trackers|progress|bundle_steps)",
    r"run\.(non_finite|max_non_finite)",
    r"(checkpoint|cluster|placement)\..*",
    r"placement|executor|benchmarks(\..*)?",
    r"\w+\.(zero_stage|max_tokens_per_micro_batch|offload_optimizer|offload_parameters|gradient_checkpointing)",
    r"\w+\.(max_num_seqs|gather_weights_for_generation)",
    r"data\.(path|revision|streaming|chat_template)|data\.sources\.[\w-]+\.(path|revision)|\w+\.(path|revision)|reference_cache",
    r"\w+\.(paths|chat_template)",
    r"\w+\.judge\.(path|revision|chat_template|max_tokens_per_micro_batch|max_num_seqs)",
    r"\w+\.judge\.(key_env|timeout_s|retries|backoff_s|max_backoff_s|max_concurrency)",
    r"\w+\.(token_env|timeout_s|retries|backoff_s|max_backoff_s|max_concurrency|batch_size|cache_size)",
)
"""Keys that a resumed run may change: where things lie, how work is split, what is shown. Data, models and templates
are compared by their content, not by their path. Splitting work otherwise changes the last bits of a sum, not what is
computed."""

MOST_LISTED = 8
"""Differences that a message lists."""
_HARMLESS = re.compile("|".join(f"(?:{pattern})" for pattern in HARMLESS))


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must agree with."""

    recipe: dict[str, Any]
    """Values by dotted key, harmless ones left out."""
    data: dict[str, str]
    """Fingerprints of the rows, and of vocabulary, template and date."""
    models: dict[str, str]
    """Fingerprint of what each role starts from."""

    @classmethod
    def of(cls, recipe: RecipeConfig, data: Mapping[str, str], models: Mapping[str, str]) -> Identity:
        """The identity of a run that is about to begin or to go on."""
        leaves = flatten_config(recipe)
        kept = {key: value for key, value in leaves.items() if not _HARMLESS.fullmatch(key)}
        return cls(_plain(kept), dict(data), dict(models))

    def differences(self, facts: Mapping[str, Any], allowed: list[str]) -> list[tuple[str, str]]:
        """Key and line of each difference to what a checkpoint's manifest says, but for the ``allowed`` keys."""
        differences = [
            *_differences(facts["recipe"], self.recipe, ""),
            *_differences(facts["data"], self.data, "data: "),
            *_differences(facts["models"], self.models, "model: "),
        ]
        return [(key, line) for key, line in differences if not _allowed(key, allowed)]

    def require(self, facts: Mapping[str, Any], allowed: list[str], where: str) -> None:
        """Raises `ConfigError` with the first differences to what a checkpoint's manifest says; for a run of another
        algorithm, in one line."""
        refused = self.differences(facts, allowed)
        if not refused:
            return
        remedy = "undo the change, or choose another run.dir"
        if any(key == "algorithm" for key, _ in refused):
            then, now = facts["recipe"].get("algorithm"), self.recipe["algorithm"]
            problem = f"the checkpoint belongs to a run of algorithm {then}, and this recipe is {now}"
            raise ConfigError(problem, where=where, remedy="choose another run.dir")
        lines = [f"\n    {line}" for _, line in refused[:MOST_LISTED]]
        if len(refused) > MOST_LISTED:
            lines.append(f"\n    and {len(refused) - MOST_LISTED} more")
        else:
            keys = ",".join(dict.fromkeys(key.split(":")[0] for key, _ in refused))
            remedy += f", or allow it: run.allow_change=[{keys}]"
        raise ConfigError(
            f"this is not the run that the checkpoint belongs to:{''.join(lines)}", where=where, remedy=remedy
        )


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    """(key, line) of what differs; fingerprints are cut short."""
    absent = "(not there)"
    found = []
    for key in [*then, *(key for key in now if key not in then)]:
        old, new = then.get(key, absent), now.get(key, absent)
        if old != new:
            short = (str(old)[:12], str(new)[:12]) if prefix else (repr(old), repr(new))
            found.append((f"{prefix}{key}", f"{prefix}{key}: {short[0]} in the checkpoint, {short[1]} now"))
    return found


def _allowed(key: str, allowed: list[str]) -> bool:
    return any(key == one or key.startswith((f"{one}.", f"{one}:")) for one in allowed)
