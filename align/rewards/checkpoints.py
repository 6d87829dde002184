"""Commands that write a reward model's folder anew, with its card: ``align merge expo`` and ``align convert row0``."""

from __future__ import annotations

import argparse
from dataclasses import replace

from rich.console import Console

from align.models import convert, merge
from align.rewards import card
from align.rewards.card import Card


def expo(arguments: argparse.Namespace, console: Console) -> int:
    """``align merge expo``."""
    found = card.read(arguments.strong)
    texts = {} if found is None else replace(found, moments=None).files()
    weights = merge.expo(arguments.weak, arguments.strong, arguments.out, arguments.alpha, texts)
    console.print(f"wrote {arguments.out}: {weights} weights, alpha {arguments.alpha}", highlight=False)
    if found is not None and found.moments is not None:
        console.print(
            f"{card.NAME}: that of {arguments.strong} without its moments, which are of other scores", highlight=False
        )
    return 0


def row_zero(arguments: argparse.Namespace, console: Console) -> int:
    """``align convert row0``."""
    found = card.read(arguments.source) or Card("lm_head_row0")
    texts = replace(found, kind="sequence_classification").files()
    name = convert.row_zero(arguments.source, arguments.out, texts)
    console.print(f"wrote {arguments.out}: {name} with one label", highlight=False)
    return 0
