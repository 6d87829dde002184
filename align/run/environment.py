"""What the numbers of a run depend on beside its configuration."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from align import __version__

PACKAGES = ("torch", "transformers", "deepspeed", "ray", "trl", "omegaconf", "datasets", "peft", "numpy")


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on."""
    return {name: metadata.version(name) for name in PACKAGES}


def environment() -> dict[str, Any]:
    """Versions, git revision of the code, machine and time. Holds no environment variable."""
    return {
        "align": __version__,
        "python": sys.version.split()[0],
        "packages": versions(),
        "git_revision": _revision(Path(__file__).parents[1]),
        "machine": {"node": platform.node(), "system": platform.platform(), "cores": os.cpu_count()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _revision(package: Path) -> str | None:
    """The git revision of the code: noted by a launcher beside its copy, or the repository's; None for neither."""
    noted = package.parent / "revision.json"
    if noted.is_file():
        return json.loads(noted.read_text())["git_revision"]
    try:
        git = ["git", "-C", str(package), "rev-parse", "HEAD"]
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git on this machine
        return None
