"""The roles of a recipe: their sections, their slots, and their paths in full."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from align.config import (
    CriticConfig,
    GeneratorConfig,
    ModelConfig,
    RecipeConfig,
    RewardConfig,
    TrainedModelConfig,
    precision,
)
from align.errors import ConfigError
from align.prechecks import placement


def cast_sections(config: RecipeConfig) -> dict[str, ModelConfig]:
    """The role sections of a recipe by name, the trained ones first; without those it calls absent."""
    absent = config.absent()
    found = {name: one for name, one in vars(config).items() if isinstance(one, ModelConfig) and name not in absent}
    return dict(sorted(found.items(), key=lambda item: not isinstance(item[1], TrainedModelConfig)))


def check(config: RecipeConfig) -> dict[str, tuple[int, ...]]:
    """Slots of every role. Raises `ConfigError` for a placement that cannot be."""
    roles = cast_sections(config)
    slots = placement.resolve(config.placement, roles)
    for name, section in roles.items():
        if isinstance(section, CriticConfig):
            require_head(section)
        if not section.path and not (isinstance(section, RewardConfig) and section.present):
            raise ConfigError(f"{name}.path is empty", remedy="give a folder or a hub id")
        elsewhere = config.executor == "ray" and config.cluster.address
        if section.attention == "flash_attention_2" and not elsewhere and precision.gpu_capability() is None:
            problem = f"{name}.attention: flash_attention_2 runs on GPUs alone, and this machine has none"
            raise ConfigError(problem, remedy=f"set {name}.attention=auto")
    return slots


def remote_code(config: RecipeConfig) -> list[str]:
    """A line for each role that runs code which comes with its model."""
    models = cast_sections(config)
    judges = {name: one.generative.judge for name, one in models.items() if isinstance(one, RewardConfig)}
    models |= {f"{name}.generative.judge": judge for name, judge in judges.items()}
    trusted = {name: one for name, one in models.items() if one.trust_remote_code}
    commit = {name: f" at {one.revision}" if one.revision else "" for name, one in trusted.items()}
    return [f"{name} runs the Python code that comes with {one.path}{commit[name]}" for name, one in trusted.items()]


def require_head(critic: CriticConfig) -> None:
    """Raises `ConfigError` for a critic that is to start from a judge without a head."""
    if critic.head == "trained" and critic.kind in ("yes_no", "generative", "http", "function"):
        raise ConfigError(
            f"critic: a reward of kind {critic.kind} has no head to start from",
            remedy="start the critic from the policy: critic.path=${policy.path} critic.head=new",
        )


def located(section: ModelConfig) -> ModelConfig:
    """The section with local files and folders named in full: workers may have another working directory."""
    if isinstance(section, RewardConfig):
        judge = located(section.generative.judge)
        assert isinstance(judge, GeneratorConfig)
        section = replace(
            section,
            ensemble=replace(section.ensemble, paths=[_full(path) for path in section.ensemble.paths]),
            generative=replace(section.generative, judge=judge),
        )
    if isinstance(section, (RewardConfig, GeneratorConfig)):
        file, colon, function = section.function.rpartition(":")
        section = replace(
            section,
            chat_template=section.chat_template and _full(section.chat_template),
            function=f"{_full(file)}{colon}{function}" if file.endswith(".py") else section.function,
        )
    return replace(section, path=_full(section.path))


def _full(path: str) -> str:
    """The name in full of what is there; a hub id as it is."""
    found = Path(path).expanduser()
    return str(found.absolute()) if path and found.exists() else path
