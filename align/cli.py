"""The entry point of ``align``: it parses the command line, runs the command and prints errors.

Commands name their functions by module (`align.commands`), so that help, ``align show`` and every configuration error
come without loading torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

from rich.console import Console
from rich.table import Table

from align import prechecks
from align.cluster.process import driver_environment
from align.commands import build_parser
from align.config import RecipeConfig, precision
from align.config.load import LoadedConfig, list_values, load_any, load_recipe
from align.errors import AlignError, ConfigError, SaveError
from align.prechecks import plan
from align.utils import disk
from align.utils.security import redact
from align.utils.signals import leaving_at_once

FAILED = DIFFERS = 1
INTERRUPTED = 130
PIPE_WIDTH = 240
"""Columns of a table that goes to a file or a pipe, so that no line is wrapped."""


def _show(loaded: LoadedConfig, console: Console, all_keys: bool = False) -> None:
    table = Table("key", "value", "from", box=None, header_style="bold")
    rows = list_values(loaded, all_keys)
    for key, value, origin in rows:
        style = "dim" if origin == "default" else ""
        shown = f"{origin}: auto" if key in loaded.automatic else origin
        table.add_row(key, redact(repr(value) if isinstance(value, str) else str(value)), shown, style=style)
    console.print(table)
    if not all_keys:
        total = len(list_values(loaded))
        console.print(f"{total - len(rows)} keys with default values are not shown (--all)", highlight=False)
    if any(key.endswith("dtype") for key in loaded.automatic):
        console.print("note: dtype auto is {}: {}".format(*precision.automatic()), highlight=False)
    for note in loaded.config.notes() if isinstance(loaded.config, RecipeConfig) else []:
        console.print(f"note: {note}", highlight=False)


def show(arguments: argparse.Namespace, console: Console) -> int:
    """``align show``."""
    _show(load_any(arguments.recipe, arguments.overrides), console, arguments.all)
    return 0


def train(arguments: argparse.Namespace, console: Console) -> int:
    """``align train``."""
    loaded = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        _show(loaded, console)
        plan.print_plan(loaded.config, console)
    prechecks.check(loaded)
    if loaded.config.run.progress != "none" or arguments.dry_run:
        console.print("checked: paths, run.dir, placement; now tokenizers, models and data", highlight=False)
    planned = []
    if loaded.config.evaluations():  # checked before training, run after it
        planned = importlib.import_module("align.eval.reward").planned(loaded.config)
    if arguments.dry_run:
        prepared = importlib.import_module("align.prepare").prepare(loaded)
        plan.print_checked(prepared.config, prepared.counts, prepared.notes, console)
        importlib.import_module("align.plan.main").print_tail(loaded, console)
        return 0
    importlib.import_module("align.launch").train(loaded, console)
    for evaluate in planned:
        evaluate(console)
    return 0


def replay(arguments: argparse.Namespace, console: Console) -> int:
    """``align replay``."""
    module = importlib.import_module("align.replay")
    return 0 if module.replay(arguments.bundle, arguments.overrides, console) else DIFFERS


def serve_reward(arguments: argparse.Namespace, console: Console) -> int:
    """``align serve reward``."""
    try:
        service = importlib.import_module("align.serve.main")
    except ImportError as error:
        raise ConfigError(
            f"align serve requires the extra 'serve': {error}", remedy="in the checkout: pip install -e '.[serve]'"
        ) from error
    return service.main(arguments, console)


def toy(arguments: argparse.Namespace, console: Console) -> int:
    """``align toy``."""
    module, name = ("toy_family", "write_toy_family") if arguments.family else ("toy", "write_toy")
    write = getattr(importlib.import_module(f"align.data.{module}"), name)
    folder = write(arguments.folder, arguments.train, arguments.validation, arguments.seed)
    console.print(f"wrote {folder}: {arguments.train} + {arguments.validation} rows, and a tokenizer", highlight=False)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. key=value may stand before and after options, which argparse alone does not allow."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    name = next((name for name in ("overrides", "recipe") if isinstance(getattr(arguments, name, None), list)), None)
    if rest and (name is None or not all("=" in text and not text.startswith("-") for text in rest)):
        option = next((text for text in rest if re.match(r"--?\w[\w-]*\.\w", text)), None)
        if name is not None and option:  # a key of the recipe, written as an option
            key = option.lstrip("-")
            remedy = f"write {key if '=' in key else f'{key}=VALUE'}, without dashes"
            raise ConfigError(f"there is no option {option}", where="command line", remedy=remedy)
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and name is not None:
        setattr(arguments, name, [*getattr(arguments, name), *rest])
    return arguments


def _run(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.loads is not None:
        arguments.loaded = _function(f"align.eval.arguments:{arguments.loads}")(arguments)
        prechecks.check(arguments.loaded)
        console.print("checked: paths and placement; now libraries, models and data", highlight=False)
    for name, kind in arguments.requires.items():
        if (source := getattr(arguments, name)) is not None:
            prechecks.sources.require(name, str(source), kind)
    return _function(arguments.function)(arguments, console)


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. An `AlignError` is printed as one message and sets the exit status.

    Any other error is printed with its traceback, and the exit status is 1. Neither shows secrets of the environment.
    """
    for name, value in driver_environment().items():
        os.environ.setdefault(name, value)
    words = sys.argv[1:] if argv is None else argv
    with leaving_at_once() if words[:1] == ["train"] and "--dry-run" not in words else nullcontext():
        return _flush(_run_and_print_errors(words))


def _run_and_print_errors(words: Sequence[str]) -> int:
    """Run a command, print its error, and return its exit status."""
    try:
        return _run(_parse(words), Console(width=None if sys.stdout.isatty() else PIPE_WIDTH))
    except AlignError as error:
        _print_error(f"align: {error}\n")
        is_retried = error.exit_status == ConfigError.exit_status and disk.is_infrastructure(error)
        return SaveError.exit_status if is_retried else error.exit_status
    except KeyboardInterrupt as interrupt:
        _print_error("align: interrupted\n")
        return interrupt.args[0] if interrupt.args else INTERRUPTED
    except Exception as error:
        if disk.is_infrastructure(error):
            _print_error(f"align: {disk.refused(error, None)}\n")
            return SaveError.exit_status
        _print_error(traceback.format_exc())
        return FAILED


def _print_error(text: str) -> None:
    with suppress(OSError):  # stderr may be a file on a full disk
        print(redact(text), file=sys.stderr, end="", flush=True)


def _flush(status: int) -> int:
    """Flush stdout and return the exit status: that of a full disk if the output did not fit."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at its end
        return SaveError.exit_status if disk.is_infrastructure(error) else status
    return status


if __name__ == "__main__":
    sys.exit(main())
