"""Options that depend on the site: sbatch, memory, the environment of a job, and containers."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.load import flatten_config
from align.errors import ConfigError

SBATCH_OPTIONS = ("partition", "account", "qos", "mem", "constraint", "reservation")
"""Options of sbatch that the launcher has under the same name. All others are given as ``--sbatch=--name=value``."""
RESERVED_OPTIONS = {
    **{name: f"give --{name}" for name in (*SBATCH_OPTIONS, "nodes", "time", "cpus-per-task", "gpus-per-node")},
    **{name: f"give --{name}" for name in ("array", "dependency", "export")},
    "signal": "give --signal-before SECONDS",
    "no-requeue": "give --max-restarts 0",
    **dict.fromkeys(("output", "error"), "the log is in <run.dir>/logs/slurm/"),
    **dict.fromkeys(
        ("ntasks", "ntasks-per-node", "requeue", "open-mode", "chdir", "parsable", "wrap"), "leave this option out"
    ),
    "test-only": "give --dry-run, and run `sbatch --test-only` on the script that it prints",
}
"""Options of sbatch that the launcher sets, with what to do instead."""
GPU_REQUESTS = ("gres", "gpus", "gpus-per-task")
"""Options that request GPUs instead of ``--gpus-per-node``."""
MEMORY_REQUESTS = ("mem-per-cpu", "mem-per-gpu")
"""Options that request memory instead of ``--mem``."""
CACHES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
"""Variables that name caches of models and data."""
DEFAULT_CACHE = "~/.cache/huggingface"


def add_options(arguments: argparse.ArgumentParser) -> None:
    """Add the options that depend on the site."""
    add = arguments.add_argument
    for name in SBATCH_OPTIONS:
        default = " (0: all memory of a node; site: no --mem)" if name == "mem" else ""
        add(f"--{name}", default="0" if name == "mem" else None, help=f"as for sbatch{default}")
    add("--dependency", help="as for sbatch, for the first job of a chain")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, as --sbatch=--exclusive",
    )
    add("--export", help="as for sbatch: ALL, NONE or variables (SBATCH_EXPORT, else ALL)")
    add("--setup", type=Path, metavar="FILE", help="bash that each step sources first: modules, conda, HF_HOME")
    add("--container", metavar="IMAGE", help="run the steps in this image")
    add("--container-runtime", choices=("pyxis", "apptainer"), help="default: apptainer for *.sif, else pyxis")
    add("--container-mounts", metavar="LIST", help="more mounts, SOURCE:TARGET[:ro],...")


def sbatch_options(args: argparse.Namespace) -> list[str]:
    """Options for the command line of sbatch, each one argument. Raises `ConfigError`."""
    for option in args.sbatch:
        name = _name(option)
        if not re.fullmatch(r"--[a-z][a-z-]*(=.*)?", option, re.ASCII | re.DOTALL):
            raise ConfigError(
                f"--sbatch={option} is not a long option of sbatch",
                remedy="write it with two dashes and its value after =, as --sbatch=--mail-type=END",
            )
        if name in RESERVED_OPTIONS:
            raise ConfigError(f"--sbatch={option}: the launcher sets --{name} itself", remedy=RESERVED_OPTIONS[name])
    return [*args.sbatch, *([f"--export={args.export}"] if args.export is not None else [])]


def _name(option: str) -> str:
    return option.removeprefix("--").partition("=")[0]


def directives(args: argparse.Namespace) -> dict[str, Any]:
    """Directives of the job script for GPUs, memory and `SBATCH_OPTIONS`."""
    names = {_name(option) for option in args.sbatch}
    values: dict[str, Any] = {}
    if args.gpus_per_node and not names.intersection(GPU_REQUESTS):
        values["gpus-per-node"] = args.gpus_per_node
    for name in SBATCH_OPTIONS:
        value = getattr(args, name)
        replaced = name == "mem" and (value == "site" or names.intersection(MEMORY_REQUESTS))
        if value is not None and not replaced:
            values[name] = value
    return values


def require_exported(args: argparse.Namespace, configs: Iterable[Any]) -> None:
    """Refuse a job that would lack a variable which its config names, such as that of a token."""
    chosen = args.export if args.export is not None else os.environ.get("SBATCH_EXPORT", "ALL")
    exported = [part.partition("=")[0] for part in chosen.split(",")]
    if "ALL" in exported:
        return
    for config in configs:
        for key, name in flatten_config(config).items():
            if key.endswith("_env") and name and name not in exported:
                names = ",".join([*(part for part in chosen.split(",") if part != "NONE"), str(name)])
                raise ConfigError(
                    f"{key}={name}: the job does not get this variable, sbatch exports {chosen!r}",
                    remedy=f"give --export={names}",
                )


def read_setup(file: Path | None) -> str | None:
    """The text of ``--setup``. Raises `ConfigError` if the file cannot be read or parsed by bash."""
    if file is None:
        return None
    try:
        text = file.expanduser().read_text(encoding="utf-8")
        parsed = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--setup={file} cannot be read: {error}", remedy="give a file of bash commands") from error
    if parsed.returncode:
        raise ConfigError(f"--setup={file} is not bash: {parsed.stderr.strip().splitlines()[0]}")
    return text


def container_arguments(args: argparse.Namespace, folders: Sequence[Path], configs: Sequence[Any]) -> list[str]:
    """Arguments of the job script after LAUNCH and PYTHON: options of srun, then ``--`` and a command before each
    step's command.

    The container mounts ``folders``, `/tmp`, what the configs name (models, data, templates, functions), and the caches
    of the Hugging Face hub.
    """
    if not args.container:
        for name in ("container_runtime", "container_mounts"):
            if getattr(args, name):
                raise ConfigError(f"--{name.replace('_', '-')} requires --container", remedy="give --container=IMAGE")
        return []
    mounted = {Path("/tmp"), *folders, *_caches(os.environ)}
    for config in configs:
        mounted |= _folders_of(config)
    mounts = [f"{path}:{path}" for path in sorted(mounted)]
    if bad := [path for path in mounted if set(":,") & set(str(path))]:
        raise ConfigError(f"{bad[0]} cannot be mounted: its name has a colon or a comma", remedy="rename it")
    mounts += list(filter(None, [args.container_mounts]))
    runtime = args.container_runtime or ("apptainer" if args.container.endswith(".sif") else "pyxis")
    image = Path(args.container).expanduser()
    name = str(image.absolute()) if image.exists() else args.container
    if runtime == "pyxis":
        return [f"--container-image={name}", f"--container-mounts={','.join(mounts)}"]
    if not image.exists() and "://" not in name:
        raise ConfigError(f"--container={name}: there is no such image", remedy="give a .sif file or a URI")
    gpu = ["--nv"] if args.gpus_per_node else []
    return ["--", "apptainer", "exec", *gpu, f"--bind={','.join(mounts)}", name]


def _caches(environment: Mapping[str, str]) -> set[Path]:
    folders = [environment[name] for name in CACHES if environment.get(name)] or [DEFAULT_CACHE]
    return {path.absolute() for path in (Path(name).expanduser() for name in folders) if path.is_dir()}


def _folders_of(config: Any) -> set[Path]:
    """Folders of the absolute paths in a config, and folders that links in them point to."""
    folders = set()
    for value in flatten_config(config).values():
        for text in value if isinstance(value, list) else [value]:
            path = Path(str(text).partition(".py:")[0] + ".py" if ".py:" in str(text) else str(text))
            if path.is_absolute() and path.exists():
                folder = path if path.is_dir() else path.parent
                folders |= {folder, *(entry.resolve().parent for entry in folder.iterdir() if entry.is_symlink())}
    return folders
