"""What the launchers share: arguments, the command, resuming, errors. Loads neither torch nor Ray."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from align.config import RunConfig
from align.errors import AlignError


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the recipe and overrides; each launcher adds its options."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file, as recipes/quickstart/rloo.yaml")
    arguments.add_argument("overrides", nargs="*", metavar="key=value", help="set a key of the recipe")
    return arguments


def train_command(recipe: Path, overrides: Sequence[str]) -> list[str]:
    """``align train`` with this Python, as an argument vector: no shell reads it."""
    return [sys.executable, "-m", "align.cli", "train", str(recipe), *overrides]


def resume_overrides(run: RunConfig) -> list[str]:
    """Overrides of ``run.resume`` for the second start of a run.

    ``never`` would refuse the folder, which is not empty any more, and a checkpoint that the recipe names may be older
    than the run's own.
    """
    has_checkpoint = any((Path(run.dir).expanduser() / "checkpoints").glob("step-*"))
    outdated = run.resume == "never" or (run.resume != "auto" and has_checkpoint)
    return ["run.resume=auto"] if outdated else []


def exit_with(main: Callable[[], int]) -> None:
    """Exit with the status of ``main``, or print an `AlignError` and exit with its status."""
    try:
        status = main()
    except AlignError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        status = error.exit_status
    sys.exit(status)
