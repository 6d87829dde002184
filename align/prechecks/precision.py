"""Where ``dtype: auto`` cannot be told, and what it is where it can."""

from __future__ import annotations

from align.config import precision
from align.config.load import LoadedConfig
from align.errors import ConfigError
from align.prechecks.roles import cast_sections


def dtype_notes(loaded: LoadedConfig) -> list[str]:
    """A line for what ``dtype: auto`` is here, and one for roles that hold bfloat16 where it is slow.

    Raises `ConfigError` where the driver's machine cannot tell: it has no GPU, and the workers' machines are others.
    """
    config, here = loaded.config, precision.automatic()
    held = {f"{name}.dtype": one.dtype for name, one in cast_sections(config).items()}
    automatic = [key for key in held if key in loaded.automatic]
    elsewhere = config.executor == "ray" and config.cluster.address and here.dtype == "float32"
    if automatic and elsewhere:
        raise ConfigError(
            f"{', '.join(automatic)}: auto looks at the driver's machine ({here.reason}), and roles run on the "
            f"machines of cluster.address={config.cluster.address}",
            where=f"{loaded.recipe}",
            remedy="name the format: dtype: bfloat16 for GPUs and CPUs with bfloat16 units, else float32",
        )
    slow = [key for key, dtype in held.items() if dtype == "bfloat16"]
    lines = [f"{', '.join(automatic)}: auto is {here.dtype}, {here.reason}"] if automatic else []
    if slow and here.dtype == "float32" and not elsewhere:
        lines.append(f"{', '.join(slow)}: bfloat16 is slow here, {here.reason}; float32 is not")
    return lines
