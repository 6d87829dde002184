#!/usr/bin/env python3
"""Run a recipe on an existing Ray cluster.

    python launchers/ray.py recipes/rloo/llama3.3-70b-helpsteer3.yaml --address 10.0.0.7:6379 --token-file ~/.ray/token

All nodes need the same version of ``align``, and the same paths of models and run folder. Without --token-file, and
without a token in Ray's environment variables, the cluster runs code of anybody who reaches it.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.errors import ConfigError
from launchers import common


def token_environment(path: Path) -> dict[str, str]:
    """Variables by which Ray reads a token. Raises `ConfigError` for a file that others may read."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"--token-file: {error.strerror}", where=f"{path}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO) or not stat.S_ISREG(mode):
        problem = f"--token-file: mode {stat.S_IMODE(mode):o}; others must not read it"
        raise ConfigError(problem, where=f"{path}", remedy=f"chmod 600 {path}")
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path.absolute())}


def main(argv: Sequence[str] | None = None) -> int:
    """Replace this process by ``align train``, which then gets the signals and sets the exit status."""
    parser = common.parser(__doc__)
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="address of the cluster's head node")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="token of the cluster, a file of mode 600")
    arguments = parser.parse_intermixed_args(argv)
    if not re.fullmatch(r"[^:\s]+:\d+", arguments.address):
        raise ConfigError(f"--address={arguments.address} is not HOST:PORT", remedy="write it as 10.0.0.7:6379")
    token = token_environment(arguments.token_file.expanduser()) if arguments.token_file else {}
    overrides = [*arguments.overrides, "executor=ray", f"cluster.address={arguments.address}"]
    command = common.train_command(arguments.recipe, overrides)
    os.execve(command[0], command, {**os.environ, **token})


if __name__ == "__main__":
    common.exit_with(main)
