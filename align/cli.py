"""The ``align`` command.

Commands name the module that runs them, so that ``align show`` and every configuration error come without loading
torch.
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
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from align import __version__, prechecks
from align.cluster.process import driver_environment
from align.config import DType, precision
from align.config.base import DataFormat, RowKind
from align.config.load import LoadedConfig, list_values, load_recipe
from align.errors import AlignError, ConfigError, SaveError
from align.prechecks import plan
from align.utils import disk
from align.utils.redact import redact
from align.utils.signals import leaving_at_once

FAILED = DIFFERS = 1
INTERRUPTED = 130
PIPE_WIDTH = 240
"""Columns of a table that goes to a file or a pipe, so that nothing is folded."""


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML file, such as recipes/rloo/llama3.3-70b-helpsteer3.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the recipe")


def _command(commands: Any, name: str, function: str, help: str, **requires: str) -> argparse.ArgumentParser:
    """A subcommand that ``function``, named as module:function, carries out: it is called with the arguments and the
    console, and returns the exit status. ``requires`` names the arguments that must be there, and what each is (see
    `align.prechecks.sources.Source`)."""
    parser = commands.add_parser(name, help=help)
    parser.set_defaults(function=function, requires=requires, loads=None)
    return parser


def _group(commands: Any, name: str, help: str) -> Any:
    """A command that has subcommands of its own."""
    return commands.add_parser(name, help=help).add_subparsers(dest="subcommand", required=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="align", description="RLHF policy alignment with the HelpSteer reward models")
    parser.add_argument("--version", action="version", version=f"align {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_runs(commands)
    _add_toy(commands)
    _add_eval(commands)
    _add_generate(commands)
    _add_scale(commands)
    _add_models(commands)
    _add_data(commands)
    _add_serve(commands)
    return parser


def _add_runs(commands: Any) -> None:
    train = _command(commands, "train", "align.cli:train", "run a recipe")
    _recipe_arguments(train)
    train.add_argument(
        "--dry-run", action="store_true", help="print the plan, check all that a run checks first, start nothing"
    )
    replay = _command(
        commands, "replay", "align.cli:replay", "run the step of a bundle again and compare", bundle="local"
    )
    replay.add_argument("bundle", type=Path, help="folder of the bundle, such as runs/x/bundles/step-000012")
    replay.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the recipe")
    show = _command(commands, "show", "align.cli:show", "print a recipe resolved, with where each value came from")
    _recipe_arguments(show)


def _add_toy(commands: Any) -> None:
    toy = _command(
        commands,
        "toy",
        "align.cli:toy",
        "write the bundled task as a data folder in HelpSteer3's and HelpSteer2's layout",
    )
    toy.add_argument("folder", type=Path)
    toy.add_argument("--train", type=int, default=6000, help="rows of the training split (%(default)s)")
    toy.add_argument("--validation", type=int, default=300, help="rows of the validation split (%(default)s)")
    toy.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    toy.add_argument(
        "--family", action="store_true", help="also feedback, edits, verdicts and principles, and a tokenizer for them"
    )
    compare = _command(
        commands,
        "compare",
        "align.eval.compare:main",
        "judge a policy before and after training on the bundled task",
        **dict.fromkeys(("before", "after", "reward"), "model"),
        data="local",
    )
    compare.add_argument("before", type=Path, help="model folder")
    compare.add_argument("after", type=Path, help="model folder")
    compare.add_argument("--reward", type=Path, required=True, help="reward-model folder")
    compare.add_argument("--data", type=Path, required=True, help="folder written by `align toy`")
    compare.add_argument("--prompts", type=int, default=200, help="held-out prompts (%(default)s)")
    compare.add_argument("--json", type=Path, help="also write the numbers to this file")


def _add_models(commands: Any) -> None:
    merge = _group(commands, "merge", "make one model of two")
    expo = _command(
        merge,
        "expo",
        "align.rewards.main:merge_expo",
        "extrapolate from one model through another",
        **dict.fromkeys(("weak", "strong"), "model"),
    )
    expo.add_argument("weak", type=Path, metavar="WEAK", help="model folder")
    expo.add_argument("strong", type=Path, metavar="STRONG", help="folder of the model that was trained from WEAK")
    expo.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    expo.add_argument("--alpha", type=float, default=1.52, help="0 is WEAK, 1 is STRONG (%(default)s)")
    convert = _group(commands, "convert", "write a model in another form")
    row0 = _command(
        convert,
        "row0",
        "align.rewards.main:convert_row0",
        "a Llama-3.x-Nemotron-70B-Reward as a sequence classifier",
        source="model",
    )
    row0.add_argument("source", type=Path, metavar="SOURCE", help="model folder whose lm_head's row 0 is the reward")
    row0.add_argument("out", type=Path, metavar="OUT", help="folder to write")


def _add_data(commands: Any) -> None:
    data = _group(commands, "data", "look at a data source, or write it in another format")
    lint = _command(
        data, "lint", "align.report.data_lint:main", "what is wrong with a source; status 1 for errors", path="rows"
    )
    convert = _command(data, "convert", "align.data.convert:main", "write a source in another format", path="rows")
    for parser in (lint, convert):
        parser.add_argument("path", metavar="SOURCE", help="folder, or hub id")
        parser.add_argument("--as", dest="reads", choices=get_args(RowKind), help="default: what the format holds")
        parser.add_argument("--revision", help="branch, tag or commit of a hub id")
        parser.add_argument("--max-rows", type=int, metavar="N", help="read only the first rows of each split")
    formats = get_args(DataFormat)
    lint.add_argument("--format", choices=formats, help="(auto)")
    lint.add_argument("--tokenizer", metavar="FOLDER", help="also check what only token ids show")
    lint.add_argument("--max-prompt-tokens", type=int, metavar="N", help="limit of a prompt (2048)")
    lint.add_argument("--max-response-tokens", type=int, metavar="N", help="limit of a response (2048)")
    lint.add_argument("--chat-template", metavar="FILE", help="in place of the tokenizer's own")
    lint.add_argument("--date", help="text for the template's date_string")
    lint.add_argument("--markdown", type=Path, metavar="FILE", help="also write the report to this file")
    lint.add_argument("--json", type=Path, metavar="FILE", help="also write the report to this file")
    lint.add_argument("--strict", action="store_true", help="status 1 for warnings too")
    convert.add_argument("out", type=Path, metavar="OUT", help="new folder")
    convert.add_argument("--from", dest="format", choices=formats, help="(auto)")
    convert.add_argument("--to", choices=["openai", "nemo", "nemo_text", "helpsteer3"], required=True)
    convert.add_argument("--pairs-by", metavar="ATTRIBUTE", help="make pairs of ratings by this attribute")
    convert.add_argument("--attributes", nargs="+", metavar="NAME", help="keep these ratings alone")
    convert.add_argument("--bad-rows", choices=["stop", "skip"], help="(stop)")
    convert.add_argument("--max-spread", type=int, metavar="N", help="how far annotators may lie apart (2)")
    for parser in (lint, convert):
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="a key of the section data, columns...")


def _add_scale(commands: Any) -> None:
    scale = _command(
        commands,
        "scale",
        "align.scale.main:main",
        "drafts, feedback, edits, and the best of all, see docs/scale.md",
    )
    _recipe_arguments(scale)
    scale.set_defaults(loads="scale")


def _add_generate(commands: Any) -> None:
    generate = _command(
        commands,
        "generate",
        "align.eval.generate:main",
        "answers of a model, at chosen values of its attributes",
        model="model",
        prompts="local",
    )
    generate.add_argument("model", metavar="MODEL", help="model folder, or hub id")
    generate.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    generate.add_argument("--prompts", type=Path, metavar="FILE", help="one JSON object a line: prompt or messages")
    generate.add_argument(
        "--attributes", metavar="NAME=VALUE,...", help="0 to 4, such as helpfulness=4,verbosity=1 (steering.values)"
    )
    generate.add_argument("--num-samples", type=int, default=1, metavar="N", help="answers to a prompt (%(default)s)")
    generate.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (%(default)s, as HelpSteer2)")
    generate.add_argument("--top-p", type=float, default=0.9, help="(%(default)s, as HelpSteer2)")
    generate.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="(%(default)s)")
    generate.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    generate.add_argument("--dtype", choices=get_args(DType), default="auto", help="(%(default)s)")
    generate.add_argument("--out", type=Path, metavar="FILE", help="write JSON lines there instead of printing")


def _add_serve(commands: Any) -> None:
    serve = _group(commands, "serve", "serve a model over HTTP")
    reward = _command(serve, "reward", "align.cli:serve_reward", "scores of a reward model, see docs/reward_service.md")
    _recipe_arguments(reward)
    reward.set_defaults(loads="service")
    reward.add_argument("--check", action="store_true", help="check the configuration, start nothing")


def _add_eval(commands: Any) -> None:
    kinds = _group(commands, "eval", "measure a model on benchmarks")
    reward = _command(kinds, "reward", "align.eval.reward:main", "judge a reward model on a benchmark")
    reward.add_argument(
        "recipe", nargs="*", metavar="RECIPE key=value", help="YAML file, which may be left out; and values"
    )
    reward.set_defaults(loads="reward")
    reward.add_argument("--model", help="model folder or hub id: reward.path")
    reward.add_argument("--benchmark", help="rm-bench, judgebench, rewardbench, rewardbench2 or heldout")
    reward.add_argument("--data", help="file, folder or hub id of the benchmark: data.path")
    reward.add_argument("--scores", help="file of scores to be judged instead of a model")
    reward.add_argument("--out", help="folder for scores, numbers and report; goes on where it was left")
    reward.add_argument("--compare", help="folder or items.jsonl of another model: differences with intervals")
    policy = _command(kinds, "policy", "align.eval.policy.main:main", "have answers of a policy judged")
    policy.add_argument(
        "recipe", nargs="*", metavar="RECIPE key=value", help="YAML file, which may be left out; and values"
    )
    policy.add_argument(
        "--benchmark",
        nargs="+",
        metavar=("NAME", "FILE"),
        help="arena-hard, mt-bench, wildbench or prompts; and its questions: data.path",
    )
    policy.set_defaults(loads="policy")
    speaker = "folder, hub id, http://HOST/v1#MODEL or module:function"
    policy.add_argument("--model", metavar="POLICY", help=f"what answers, a {speaker}")
    policy.add_argument("--answers", metavar="FILE", help="answers that were given before, to be judged instead")
    policy.add_argument("--baseline", help=f"what the policy is compared with, a file of answers, {speaker}")
    policy.add_argument("--judge", help=f"what judges, a {speaker}")
    policy.add_argument("--data", help="file, folder or hub id of the questions: data.path")
    policy.add_argument("--out", help="folder for answers, verdicts, numbers and report; goes on where it was left")


def _show(loaded: LoadedConfig, console: Console) -> None:
    table = Table("key", "value", "from", box=None, header_style="bold")
    for key, value, origin in list_values(loaded):
        style = "dim" if origin == "default" else ""
        shown = f"{origin}: auto" if key in loaded.automatic else origin
        table.add_row(key, redact(repr(value) if isinstance(value, str) else str(value)), shown, style=style)
    console.print(table)
    if any(key.endswith("dtype") for key in loaded.automatic):
        console.print("note: dtype auto is {}: {}".format(*precision.automatic()), highlight=False)
    for note in loaded.config.notes():
        console.print(f"note: {note}", highlight=False)


def show(arguments: argparse.Namespace, console: Console) -> int:
    """``align show``."""
    _show(load_recipe(arguments.recipe, arguments.overrides), console)
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
    wanted = loaded.config.evaluations()
    planned = importlib.import_module("align.eval.reward").planned(loaded.config) if wanted else []
    if arguments.dry_run:
        prepared = importlib.import_module("align.prepare").prepare(loaded)
        plan.print_checked(prepared.config, prepared.counts, prepared.notes, console)
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
            f"a service needs more packages: {error}", remedy="in the checkout: pip install -e '.[serve]'"
        ) from error
    return service.main(arguments, console)


def toy(arguments: argparse.Namespace, console: Console) -> int:
    """``align toy``."""
    module = importlib.import_module("align.data.toy_family" if arguments.family else "align.data.toy")
    folder = module.write(arguments.folder, arguments.train, arguments.validation, arguments.seed)
    console.print(f"wrote {folder}: {arguments.train} + {arguments.validation} rows, and a tokenizer", highlight=False)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; values may stand before options and after them, which argparse alone does not allow."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    name = next((name for name in ("overrides", "recipe") if isinstance(getattr(arguments, name, None), list)), None)
    if rest and (name is None or not all("=" in text and not text.startswith("-") for text in rest)):
        if name is not None and (option := next((text for text in rest if re.match(r"--?\w[\w-]*\.\w", text)), None)):
            given = option.lstrip("-") if "=" in option else f"{option.lstrip('-')}=VALUE"
            raise ConfigError(f"{option} is no option", where="command line", remedy=f"write {given}, without dashes")
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
        if (given := getattr(arguments, name)) is not None:
            prechecks.sources.require(name, str(given), kind)
    return _function(arguments.function)(arguments, console)


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Errors a user can act on are printed as one message; the exit status is that of the error.

    Any other error is printed with its traceback and ends with 1. Neither shows a secret of the environment.
    """
    for name, value in driver_environment().items():
        os.environ.setdefault(name, value)
    words = sys.argv[1:] if argv is None else argv
    with leaving_at_once() if words[:1] == ["train"] and "--dry-run" not in words else nullcontext():
        return _flushed(_answered(words))


def _answered(words: Sequence[str]) -> int:
    """The exit status of a command, after its error was printed."""
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
    with suppress(OSError):  # stderr may go to the disk that is full
        print(redact(text), file=sys.stderr, end="", flush=True)


def _flushed(status: int) -> int:
    """The exit status, which is that of a full disk where the output did not fit."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at its end
        return SaveError.exit_status if disk.is_infrastructure(error) else status
    return status


if __name__ == "__main__":
    sys.exit(main())
