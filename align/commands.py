"""The commands of ``align``: their arguments, their help, and the functions that run them. Loads no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from align import __version__
from align.config import DType
from align.config.base import DataFormat, RowKind

Argument = tuple[tuple[str, ...], dict[str, Any]]
"""Positional and keyword arguments of `argparse.ArgumentParser.add_argument`."""


class Command(NamedTuple):
    """A command, which argparse parses and ``function`` runs."""

    name: str
    function: str
    """``module:function``. It is called with the parsed arguments and the console and returns the exit status."""
    help: str
    arguments: list[Argument]
    requires: Mapping[str, str] = {}
    """Arguments whose path or hub id must exist, with the kind of `align.prechecks.sources.Source`."""
    loads: str | None = None
    """Function of `align.eval.arguments` that builds the config of a command other than ``train``."""


def arg(*names: str, **settings: Any) -> Argument:
    """An argument or option of a command."""
    return names, settings


GROUPS = {
    "eval": "evaluate a reward model or a policy on a benchmark",
    "merge": "merge two models",
    "convert": "convert a model to another format",
    "data": "check training data, or convert it to another format",
    "serve": "serve a model over HTTP",
}
"""First words of commands of two words."""
RECIPE = arg("recipe", type=Path, metavar="RECIPE", help="YAML file, for example recipes/quickstart/rloo.yaml")
OVERRIDES = arg("overrides", nargs="*", metavar="key=value", help="set a key of the recipe, for example run.steps=10")
EVAL_RECIPE = arg(
    "recipe", nargs="*", metavar="RECIPE key=value", help="YAML file (optional), and keys to set, as key=value"
)
SOURCE = arg("path", metavar="SOURCE", help="data folder, file or hub id")
DATA_OPTIONS = [
    arg("--rows", dest="reads", choices=get_args(RowKind), help="kind of rows (default: that of the format)"),
    arg("--revision", help="branch, tag or commit of a hub id"),
    arg("--max-rows", type=int, metavar="N", help="read only the first N rows of each split"),
    arg("overrides", nargs="*", metavar="key=value", help="set a key of the section data, for example validation=0.1"),
]
MODEL = "model folder, hub id, http://HOST/v1#MODEL or module:function"
OUT = "folder for all results; an interrupted evaluation resumes there"

COMMANDS = [
    Command(
        "train",
        "align.cli:train",
        "train a model with a recipe, or resume its run",
        [RECIPE, OVERRIDES, arg("--dry-run", action="store_true", help="check everything a run needs, then stop")],
    ),
    Command(
        "show",
        "align.cli:show",
        "print the values of a recipe that differ from the defaults, and where they come from",
        [RECIPE, OVERRIDES, arg("--all", action="store_true", help="print all values, with the defaults")],
    ),
    Command(
        "plan",
        "align.plan.main:main",
        "compute the memory and time that a recipe needs on GPUs; exit status 78 if it does not fit",
        [
            RECIPE,
            OVERRIDES,
            arg("--gpu", choices=["H100", "H200", "A100"], default="H100", help="kind of GPU (%(default)s)"),
            arg("--gpu-memory", type=float, metavar="GB", help="memory of a GPU (80, H200: 141)"),
            arg("--json", type=Path, metavar="FILE", help="also write the numbers, in bytes and seconds, to this file"),
        ],
    ),
    Command(
        "replay",
        "align.cli:replay",
        "run a recorded training step again and compare; exit status 1 if it differs",
        [arg("bundle", type=Path, metavar="BUNDLE", help="folder such as runs/x/bundles/step-000012"), OVERRIDES],
        {"bundle": "local"},
    ),
    Command(
        "eval reward",
        "align.eval.reward:main",
        "evaluate a reward model on a benchmark",
        [
            EVAL_RECIPE,
            arg("--model", help="model folder or hub id (reward.path)"),
            arg("--benchmark", help="rm-bench, judgebench, rewardbench, rewardbench2 or heldout"),
            arg("--data", help="file, folder or hub id of the benchmark (data.path)"),
            arg("--scores", metavar="FILE", help="evaluate these scores instead of a model"),
            arg("--out", metavar="FOLDER", help=OUT),
            arg("--compare", metavar="PATH", help="folder or items.jsonl of another model, to print differences"),
        ],
        loads="reward",
    ),
    Command(
        "eval policy",
        "align.eval.policy.main:main",
        "evaluate a policy by an LLM judge on a benchmark",
        [
            EVAL_RECIPE,
            arg(
                "--benchmark",
                nargs="+",
                metavar=("NAME", "FILE"),
                help="arena-hard, mt-bench, wildbench or prompts, and the file of its questions (data.path)",
            ),
            arg("--model", metavar="POLICY", help=f"the policy: {MODEL}"),
            arg("--answers", metavar="FILE", help="judge these answers instead of asking a policy"),
            arg("--baseline", help=f"what the policy is compared with: a file of answers, {MODEL}"),
            arg("--judge", help=f"the judge: {MODEL}"),
            arg("--data", help="file, folder or hub id of the questions (data.path)"),
            arg("--out", metavar="FOLDER", help=OUT),
        ],
        loads="policy",
    ),
    Command(
        "generate",
        "align.eval.generate:main",
        "print a model's answers, optionally at chosen attribute values",
        [
            arg("model", metavar="MODEL", help="model folder or hub id"),
            arg("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated"),
            arg("--prompts", type=Path, metavar="FILE", help="JSON lines, each with prompt or messages"),
            arg("--attributes", metavar="NAME=VALUE,...", help="values from 0 to 4, as helpfulness=4,verbosity=1"),
            arg("--num-samples", type=int, default=1, metavar="N", help="answers per prompt (%(default)s)"),
            arg("--temperature", type=float, default=0.7, help="0 is greedy (%(default)s, as HelpSteer2)"),
            arg("--top-p", type=float, default=0.9, help="nucleus sampling (%(default)s, as HelpSteer2)"),
            arg("--max-tokens", type=int, default=1024, metavar="N", help="tokens per answer (%(default)s)"),
            arg("--seed", type=int, default=0, help="random seed (%(default)s)"),
            arg("--dtype", choices=get_args(DType), default="auto", help="dtype of the weights (%(default)s)"),
            arg("--out", type=Path, metavar="FILE", help="write JSON lines to this file instead of printing"),
        ],
        {"model": "model", "prompts": "local"},
    ),
    Command(
        "scale",
        "align.scale.main:main",
        "improve answers at inference time: drafts, feedback, edits, selection (docs/scale.md)",
        [RECIPE, OVERRIDES],
        loads="scale",
    ),
    Command(
        "serve reward",
        "align.cli:serve_reward",
        "serve the scores of a reward model (docs/reward_service.md)",
        [RECIPE, OVERRIDES, arg("--check", action="store_true", help="check the recipe, then stop")],
        loads="service",
    ),
    Command(
        "data lint",
        "align.report.data_lint:main",
        "check training data; exit status 1 if there are errors",
        [
            SOURCE,
            arg("--format", choices=get_args(DataFormat), help="format of the source (auto)"),
            *DATA_OPTIONS,
            arg("--tokenizer", metavar="FOLDER", help="also check lengths and templates, with this tokenizer"),
            arg("--max-prompt-tokens", type=int, metavar="N", help="longest prompt (2048)"),
            arg("--max-response-tokens", type=int, metavar="N", help="longest response (2048)"),
            arg("--chat-template", metavar="FILE", help="use this template instead of the tokenizer's"),
            arg("--date", help="value of date_string in the template"),
            arg("--markdown", type=Path, metavar="FILE", help="also write the report as Markdown"),
            arg("--json", type=Path, metavar="FILE", help="also write the report as JSON"),
            arg("--strict", action="store_true", help="exit status 1 also for warnings"),
        ],
        {"path": "rows"},
    ),
    Command(
        "data convert",
        "align.data.convert:main",
        "convert training data to another format",
        [
            SOURCE,
            arg("out", type=Path, metavar="OUT", help="new folder"),
            arg("--from", dest="format", choices=get_args(DataFormat), help="format of the source (auto)"),
            arg("--to", choices=["openai", "nemo", "nemo_text", "helpsteer3"], required=True, help="format to write"),
            *DATA_OPTIONS,
            arg("--pairs-by", metavar="ATTRIBUTE", help="turn ratings into pairs that this attribute ranks"),
            arg("--attributes", nargs="+", metavar="NAME", help="keep only these ratings"),
            arg("--bad-rows", choices=["stop", "skip"], help="what a malformed row does (stop)"),
            arg("--max-spread", type=int, metavar="N", help="largest difference between annotators (2)"),
        ],
        {"path": "rows"},
    ),
    Command(
        "merge expo",
        "align.rewards.main:merge_expo",
        "extrapolate from a model through the model that was trained from it (ExPO)",
        [
            arg("weak", type=Path, metavar="WEAK", help="model folder"),
            arg("strong", type=Path, metavar="STRONG", help="folder of the model that was trained from WEAK"),
            arg("out", type=Path, metavar="OUT", help="new folder"),
            arg("--alpha", type=float, default=1.52, help="0 is WEAK, 1 is STRONG (%(default)s)"),
        ],
        {"weak": "model", "strong": "model"},
    ),
    Command(
        "convert row0",
        "align.rewards.main:convert_row0",
        "convert a Llama-3.x-Nemotron-70B-Reward to a sequence classifier",
        [
            arg("source", type=Path, metavar="SOURCE", help="model folder; row 0 of its lm_head is the reward"),
            arg("out", type=Path, metavar="OUT", help="new folder"),
        ],
        {"source": "model"},
    ),
    Command(
        "toy",
        "align.cli:toy",
        "write the toy task of the quickstart, in the layouts of HelpSteer3 and HelpSteer2",
        [
            arg("folder", type=Path, metavar="FOLDER", help="new folder"),
            arg("--train", type=int, default=6000, metavar="N", help="rows of the training split (%(default)s)"),
            arg("--validation", type=int, default=300, metavar="N", help="rows of the validation split (%(default)s)"),
            arg("--seed", type=int, default=0, help="random seed (%(default)s)"),
            arg(
                "--family", action="store_true", help="also write feedback, edits, verdicts, principles and a tokenizer"
            ),
        ],
    ),
    Command(
        "compare",
        "align.eval.compare:main",
        "compare a policy before and after training on the toy task",
        [
            arg("before", type=Path, metavar="BEFORE", help="model folder"),
            arg("after", type=Path, metavar="AFTER", help="model folder"),
            arg("--reward", type=Path, metavar="FOLDER", required=True, help="folder of the reward model"),
            arg("--data", type=Path, metavar="FOLDER", required=True, help="folder that `align toy` wrote"),
            arg("--prompts", type=int, default=200, metavar="N", help="held-out prompts (%(default)s)"),
            arg("--json", type=Path, metavar="FILE", help="also write the numbers to this file"),
        ],
        {"before": "model", "after": "model", "reward": "model", "data": "local"},
    ),
]


def build_parser() -> argparse.ArgumentParser:
    """The parser of all `COMMANDS`."""
    parser = argparse.ArgumentParser(
        prog="align",
        description="Align language models with reward models: RLHF on DeepSpeed and Ray.",
        epilog="`align COMMAND --help` describes a command. Configuration: docs/recipes.md.",
    )
    parser.add_argument("--version", action="version", version=f"align {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    groups: dict[str, Any] = {}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group and group not in groups:
            group_parser = commands.add_parser(group, help=GROUPS[group], description=_sentence(GROUPS[group]))
            groups[group] = group_parser.add_subparsers(
                dest="subcommand", required=True, metavar="COMMAND", title="commands"
            )
        subparsers = groups[group] if group else commands
        subparser = subparsers.add_parser(name, help=command.help, description=_sentence(command.help))
        subparser.set_defaults(function=command.function, requires=command.requires, loads=command.loads)
        for names, settings in command.arguments:
            subparser.add_argument(*names, **settings)
    return parser


def _sentence(help: str) -> str:
    return f"{help[0].upper()}{help[1:]}."
