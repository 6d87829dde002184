#!/usr/bin/env python3
"""Run a recipe on a Ray cluster that is there.

    python launchers/ray.py recipes/rloo/llama3.3-70b-helpsteer3.yaml --address 10.0.0.7:6379 --token-file ~/.ray/token

``align`` must be installed alike on all nodes, which must see models and run folder under the same path. Without
--token-file, and without a token of Ray's own environment variables, the cluster runs the code of anybody who reaches
it.
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
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"--token-file: {error.strerror}", where=f"{path}") from error
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or not stat.S_ISREG(found.st_mode):
        problem = f"--token-file: mode {stat.S_IMODE(found.st_mode):o}; others must not read it"
        raise ConfigError(problem, where=f"{path}", remedy=f"chmod 600 {path}")
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path.absolute())}


def main(argv: Sequence[str] | None = None) -> int:
    """Becomes ``align train``: signals and exit status are its own."""
    arguments = common.parser(__doc__)
    arguments.add_argument("--address", required=True, metavar="HOST:PORT", help="of the cluster's head")
    arguments.add_argument("--token-file", type=Path, metavar="FILE", help="the cluster's token, mode 600")
    given = arguments.parse_intermixed_args(argv)
    if not re.fullmatch(r"[^:\s]+:\d+", given.address):
        raise ConfigError(f"--address={given.address} is not HOST:PORT", remedy="as in 10.0.0.7:6379")
    token = token_environment(given.token_file.expanduser()) if given.token_file else {}
    overrides = [*given.overrides, "executor=ray", f"cluster.address={given.address}"]
    command = common.train_command(given.recipe, overrides)
    os.execve(command[0], command, {**os.environ, **token})


if __name__ == "__main__":
    common.finish(main)
