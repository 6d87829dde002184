"""What the numbers of a run depend on beside its configuration."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "deepspeed", "ray", "trl", "omegaconf", "datasets", "peft", "numpy")


def environment() -> dict[str, Any]:
    """Versions, git revision of the code, machine and time. Holds no environment variable."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        revision = ""
    return {
        "align": metadata.version("align"),
        "python": sys.version.split()[0],
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "git_revision": revision or None,
        "machine": {"node": platform.node(), "system": platform.platform(), "cores": os.cpu_count()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
