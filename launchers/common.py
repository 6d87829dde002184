"""What the launchers share: arguments, the command, going on again, errors. Loads neither torch nor Ray."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from align.config import RunConfig
from align.errors import AlignError


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Recipe and overrides; a launcher adds its own."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("recipe", type=Path, help="YAML file, such as recipes/quickstart/rloo.yaml")
    arguments.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the recipe")
    return arguments


def train_command(recipe: Path, overrides: Sequence[str]) -> list[str]:
    """``align train`` with this Python, as an argument vector: no shell reads it."""
    return [sys.executable, "-m", "align.cli", "train", str(recipe), *overrides]


def resume_again(run: RunConfig) -> list[str]:
    """What ``run.resume`` must become where a run is started for the second time.

    ``never`` would find a folder that is not empty, and a checkpoint that is named may be older than the run's own.
    """
    has_checkpoint = any((Path(run.dir).expanduser() / "checkpoints").glob("step-*"))
    outdated = run.resume == "never" or (run.resume != "auto" and has_checkpoint)
    return ["run.resume=auto"] if outdated else []


def finish(main: Callable[[], int]) -> None:
    """Leave with the status of a launcher's ``main``, or with that of an error a user can act on, which is printed."""
    try:
        status = main()
    except AlignError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        status = error.exit_status
    sys.exit(status)
