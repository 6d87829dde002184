"""The roles of a recipe before they start: their configs, slots, dtypes and absolute paths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from align.config import (
    CriticConfig,
    EnsembleRewardConfig,
    FunctionGeneratorConfig,
    FunctionRewardConfig,
    GenerativeRewardConfig,
    ModelConfig,
    PolicyConfig,
    RecipeConfig,
    RoleConfig,
    SamplerConfig,
    TrainedModelConfig,
    precision,
)
from align.config.load import LoadedConfig
from align.errors import ConfigError
from align.prechecks import placement


class RolePlan(NamedTuple):
    """What it takes to start the roles of a recipe."""

    configs: dict[str, RoleConfig]
    """By name, with absolute paths, trained roles first."""
    slots: dict[str, tuple[int, ...]]
    absent: set[str]
    """Roles that the recipe does not use."""
    total_updates: int
    """Optimizer steps of each trained role."""


def plan_roles(config: RecipeConfig) -> RolePlan:
    """Check the roles of a recipe and plan their start. Raises `ConfigError` as `check_roles`."""
    slots = check_roles(config)
    configs = {name: with_absolute_paths(role) for name, role in role_configs(config).items()}
    return RolePlan(configs, slots, config.absent(), config.run.steps * config.updates_per_step())


def role_configs(config: RecipeConfig) -> dict[str, RoleConfig]:
    """The config of each role that the recipe uses, by name, trained roles first."""
    absent = config.absent()
    roles = {name: role for name, role in vars(config).items() if isinstance(role, RoleConfig) and name not in absent}
    return dict(sorted(roles.items(), key=lambda item: not isinstance(item[1], TrainedModelConfig)))


def check_roles(config: RecipeConfig) -> dict[str, tuple[int, ...]]:
    """The slots of every role. Raises `ConfigError` for an impossible placement, path, head or attention."""
    roles = role_configs(config)
    for name in config.placement.keys() & config.absent():
        problem = f"placement.{name} has slots, but the recipe has no {name}"
        raise ConfigError(problem, remedy=f"remove placement.{name}, or add the section: {name}: {{}}")
    slots = placement.resolve(config.placement, roles)
    on_other_machines = config.executor == "ray" and config.cluster.address
    for name, role in roles.items():
        if isinstance(role, CriticConfig):
            require_head(role)
        if not isinstance(role, ModelConfig):
            continue
        if not role.path:
            raise ConfigError(f"{name}.path is empty", remedy="give a folder or a hub id")
        if role.attention == "flash_attention_2" and not on_other_machines and precision.gpu_capability() is None:
            problem = f"{name}.attention=flash_attention_2 requires a GPU, and this machine has none"
            raise ConfigError(problem, remedy=f"set {name}.attention=auto")
    return slots


def require_head(critic: CriticConfig) -> None:
    """Raise `ConfigError` for a critic that starts from a reward model without a head."""
    if critic.head == "trained" and critic.reward_head == "yes_no":
        raise ConfigError(
            f"critic.head=trained requires a reward model with a head. Got critic.reward_head={critic.reward_head}",
            remedy="start the critic from the policy: critic.path=${policy.path} critic.head=new",
        )


def remote_code(config: RecipeConfig) -> list[str]:
    """A line for each role that runs code from its model's repository."""
    models = role_configs(config)
    models |= {f"{name}.judge": role.judge for name, role in models.items() if isinstance(role, GenerativeRewardConfig)}
    return [
        f"{name} runs the Python code of {model.path}" + (f" at {model.revision}" if model.revision else "")
        for name, model in models.items()
        if model.trust_remote_code
    ]


def dtype_notes(loaded: LoadedConfig) -> list[str]:
    """A line with what ``dtype: auto`` resolves to, and one for roles that hold bfloat16 where it is slow.

    Raises `ConfigError` where this machine cannot decide: it has no GPU, and the workers run on other machines.
    """
    config, here = loaded.config, precision.automatic()
    dtypes = {f"{name}.dtype": role.dtype for name, role in role_configs(config).items()}
    automatic = [key for key in dtypes if key in loaded.automatic]
    elsewhere = config.executor == "ray" and config.cluster.address and here.dtype == "float32"
    if automatic and elsewhere:
        raise ConfigError(
            f"{', '.join(automatic)}: auto looks at the driver's machine ({here.reason}), but roles run on the "
            f"machines of cluster.address={config.cluster.address}",
            where=f"{loaded.recipe}",
            remedy="name the dtype: bfloat16 for GPUs and for CPUs with bfloat16 units, otherwise float32",
        )
    slow = [key for key, dtype in dtypes.items() if dtype == "bfloat16"]
    lines = [f"{', '.join(automatic)}: auto is {here.dtype}, {here.reason}"] if automatic else []
    if slow and here.dtype == "float32" and not elsewhere:
        lines.append(f"{', '.join(slow)}: bfloat16 is slow here, {here.reason}; use float32")
    return lines


def with_absolute_paths(role: RoleConfig) -> RoleConfig:
    """The config with absolute paths of local files and folders: workers may have another working directory."""
    changes: dict[str, Any] = {}
    if isinstance(role, EnsembleRewardConfig):
        changes["paths"] = [_absolute(path) for path in role.paths]
    if isinstance(role, GenerativeRewardConfig):
        changes["judge"] = with_absolute_paths(role.judge)
    if isinstance(role, (FunctionRewardConfig, FunctionGeneratorConfig)):
        changes["function"] = _with_absolute_file(role.function)
    if isinstance(role, (PolicyConfig, SamplerConfig)):
        changes["engine"] = _with_absolute_file(role.engine)
    if isinstance(role, ModelConfig):
        changes["path"] = _absolute(role.path)
        if template := vars(role).get("chat_template"):
            changes["chat_template"] = _absolute(template)
    return replace(role, **changes)


def _with_absolute_file(name: str) -> str:
    """``path/file.py:name`` with the absolute path of the file; any other name unchanged."""
    file, colon, member = name.rpartition(":")
    return f"{_absolute(file)}{colon}{member}" if file.endswith(".py") else name


def _absolute(path: str) -> str:
    """The absolute path of an existing file or folder; a hub id unchanged."""
    local = Path(path).expanduser()
    return str(local.absolute()) if path and local.exists() else path
