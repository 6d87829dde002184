"""The identity of a run: only the run that wrote a checkpoint resumes from it. And the environment of a start."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from align import __version__
from align.config import RecipeConfig
from align.config.load import flatten_config
from align.errors import ConfigError

HARMLESS = (
    r"run\.(dir|resume|allow_change|max_time|max_restarts|logged_samples|trackers|progress|bundle_steps)",
    r"run\.max_non_finite",
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
"""Keys that a resumed run may change: paths, how work is split, what is displayed. Data, models and templates are
compared by content, not by path. Another split of the work changes the last bits of a sum, not what is computed."""
PACKAGES = ("torch", "transformers", "deepspeed", "ray", "trl", "omegaconf", "datasets", "peft", "numpy")
"""Packages that numbers depend on."""
FORMAT = 2
"""Version of ``identity.json``. 2: recipe keys and model fingerprints changed."""
MAX_LISTED = 8
"""Differences that a message lists."""
_HARMLESS = re.compile("|".join(f"(?:{pattern})" for pattern in HARMLESS))


@dataclass(frozen=True)
class Identity:
    """What a run and its checkpoints must agree on."""

    recipe: dict[str, Any]
    """Values by dotted key, without the harmless ones."""
    data: dict[str, str]
    """Fingerprints of the rows, and of vocabulary, template and date."""
    models: dict[str, str]
    """Fingerprint of the model that each role starts from."""

    @classmethod
    def of(cls, recipe: RecipeConfig, data: Mapping[str, str], models: Mapping[str, str]) -> Identity:
        """The identity of a run that is about to start or resume."""
        leaves = flatten_config(recipe)
        kept = {key: value for key, value in leaves.items() if not _HARMLESS.fullmatch(key)}
        return cls(_as_json(kept), dict(data), dict(models))

    def content(self) -> dict[str, Any]:
        """The content of ``identity.json``."""
        return {"format": FORMAT, **asdict(self)}

    def stored_differences(self, text: bytes, allowed: list[str]) -> list[tuple[str, str]]:
        """As `differences`, with the text of ``identity.json``. Raises ValueError if it cannot be read."""
        content = json.loads(text)
        if (version := content.get("format")) != FORMAT:
            raise ValueError(f"has format {version!r}, and this version of align reads {FORMAT}")
        return self.differences(content, allowed)

    def differences(self, facts: Mapping[str, Any], allowed: list[str]) -> list[tuple[str, str]]:
        """Key and line of each difference from the ``facts`` of a manifest, without the ``allowed`` keys."""
        differences = [
            *_differences(facts["recipe"], self.recipe, ""),
            *_differences(facts["data"], self.data, "data: "),
            *_differences(facts["models"], self.models, "model: "),
        ]
        return [(key, line) for key, line in differences if not _allowed(key, allowed)]

    def require(self, facts: Mapping[str, Any], allowed: list[str], where: str) -> None:
        """Raise `ConfigError` with the first differences from the ``facts`` of a manifest; for a run of another
        algorithm, in one line."""
        refused = self.differences(facts, allowed)
        if not refused:
            return
        remedy = "undo the change, or choose another run.dir"
        if any(key == "algorithm" for key, _ in refused):
            then, now = facts["recipe"].get("algorithm"), self.recipe["algorithm"]
            problem = f"the checkpoint belongs to a run of algorithm {then}, and this recipe is {now}"
            raise ConfigError(problem, where=where, remedy="choose another run.dir")
        lines = [f"\n    {line}" for _, line in refused[:MAX_LISTED]]
        if len(refused) > MAX_LISTED:
            lines.append(f"\n    and {len(refused) - MAX_LISTED} more")
        else:
            keys = ",".join(dict.fromkeys(key.split(":")[0] for key, _ in refused))
            remedy += f", or allow it: run.allow_change=[{keys}]"
        raise ConfigError(
            f"this is not the run that the checkpoint belongs to:{''.join(lines)}", where=where, remedy=remedy
        )


def _as_json(value: Any) -> Any:
    """A value as JSON returns it: keys are text, tuples are lists."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    """Key and line of each difference; fingerprints are shortened."""
    absent = "(not there)"
    lines = []
    for key in [*then, *(key for key in now if key not in then)]:
        old, new = then.get(key, absent), now.get(key, absent)
        if old != new:
            short = (str(old)[:12], str(new)[:12]) if prefix else (repr(old), repr(new))
            lines.append((f"{prefix}{key}", f"{prefix}{key}: {short[0]} in the checkpoint, {short[1]} now"))
    return lines


def _allowed(key: str, allowed: list[str]) -> bool:
    return any(key == section or key.startswith((f"{section}.", f"{section}:")) for section in allowed)


def versions() -> dict[str, str]:
    """Versions of `PACKAGES`."""
    return {name: metadata.version(name) for name in PACKAGES}


def environment() -> dict[str, Any]:
    """Versions, git revision of the code, machine and time of start; no environment variables."""
    return {
        "align": __version__,
        "python": sys.version.split()[0],
        "packages": versions(),
        "git_revision": _revision(Path(__file__).parents[1]),
        "machine": {"node": platform.node(), "system": platform.platform(), "cores": os.cpu_count()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _revision(package: Path) -> str | None:
    """Git revision of the code: noted by a launcher beside its copy, or of the repository; None for neither."""
    note = package.parent / "revision.json"
    if note.is_file():
        return json.loads(note.read_text())["git_revision"]
    try:
        git = ["git", "-C", str(package), "rev-parse", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git on this machine
        return None
