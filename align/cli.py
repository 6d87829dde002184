"""The ``align`` command.

Commands name the module that runs them, so that ``align show`` and every configuration error come without loading
torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from align import __version__, config
from align.errors import AlignError
from align.redact import redact
from align.workers.process import driver_environment

FAILED = DIFFERS = 1
INTERRUPTED = 130
PIPE_WIDTH = 240
"""Columns of a table that goes to a file or a pipe, so that nothing is folded."""


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML file, such as recipes/rloo/llama3.3-70b-helpsteer3.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the recipe")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="align", description="RLHF policy alignment with the HelpSteer reward models")
    parser.add_argument("--version", action="version", version=f"align {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="run a recipe")
    _recipe_arguments(train)
    train.add_argument(
        "--dry-run", action="store_true", help="check recipe and placement, print the plan, start nothing"
    )
    replay = commands.add_parser("replay", help="run the step of a bundle again and compare")
    replay.add_argument("bundle", type=Path, help="folder of the bundle, such as runs/x/bundles/step-000012")
    replay.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the recipe")
    show = commands.add_parser("show", help="print a recipe resolved, with where each value came from")
    _recipe_arguments(show)
    toy = commands.add_parser("toy", help="write the bundled task as a data folder in HelpSteer3's layout")
    toy.add_argument("folder", type=Path)
    toy.add_argument("--train", type=int, default=6000, help="rows of the training split (%(default)s)")
    toy.add_argument("--validation", type=int, default=300, help="rows of the validation split (%(default)s)")
    toy.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    compare = commands.add_parser("compare", help="judge a policy before and after training on the bundled task")
    compare.add_argument("before", type=Path, help="model folder")
    compare.add_argument("after", type=Path, help="model folder")
    compare.add_argument("--reward", type=Path, required=True, help="reward-model folder")
    compare.add_argument("--data", type=Path, required=True, help="folder written by `align toy`")
    compare.add_argument("--prompts", type=int, default=200, help="held-out prompts (%(default)s)")
    compare.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser


def _show(loaded: config.Loaded, console: Console) -> None:
    table = Table("key", "value", "from", box=None, header_style="bold")
    for key, value, origin in config.show(loaded):
        style = "dim" if origin == "default" else ""
        table.add_row(key, repr(value) if isinstance(value, str) else str(value), origin, style=style)
    console.print(table)
    for note in loaded.config.notes():
        console.print(f"note: {note}", highlight=False)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.command in ("train", "show"):
        loaded = config.load(arguments.recipe, arguments.overrides)
        if arguments.command == "show":
            _show(loaded, console)
        elif arguments.dry_run:
            _show(loaded, console)
            importlib.import_module("align.plan").describe(loaded.config, console)
        else:
            importlib.import_module("align.launch").train(loaded, console)
    elif arguments.command == "replay":
        launch = importlib.import_module("align.launch")
        if not launch.replay(arguments.bundle, arguments.overrides, console):
            return DIFFERS
    elif arguments.command == "toy":
        toy = importlib.import_module("align.data.toy")
        folder = toy.write(arguments.folder, arguments.train, arguments.validation, arguments.seed)
        console.print(
            f"wrote {folder}: {arguments.train} + {arguments.validation} rows, and a tokenizer", highlight=False
        )
    else:
        importlib.import_module("align.evaluation.compare").main(arguments, console)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Errors a user can act on are printed as one message; the exit status is that of the error.

    Any other error is printed with its traceback and ends with 1. Neither shows a secret of the environment.
    """
    for name, value in driver_environment().items():
        os.environ.setdefault(name, value)
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    try:
        return _run(_parser().parse_args(argv), console)
    except AlignError as error:
        print(redact(f"align: {error}"), file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt as interrupt:
        print("align: interrupted", file=sys.stderr)
        return interrupt.args[0] if interrupt.args else INTERRUPTED
    except Exception:
        print(redact(traceback.format_exc()), file=sys.stderr, end="")
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
