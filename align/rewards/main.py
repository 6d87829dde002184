"""Commands that write a new model folder with its reward card: ``align merge expo`` and ``align convert row0``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoConfig

from align import __version__
from align.config import ModelConfig
from align.data import chat
from align.data.chat import Renderer
from align.errors import DataError
from align.models import convert, exported_files, load, merge, readme
from align.models.exported_files import Chat
from align.rewards import card
from align.rewards.card import Card


def merge_expo(arguments: argparse.Namespace, console: Console) -> int:
    """``align merge expo``."""
    stored = card.read(arguments.strong)
    texts = {} if stored is None else replace(stored, moments=None).files()
    ends = f"`{arguments.weak}` (weak) and `{arguments.strong}` (strong)"
    origin = f"Written by `align merge expo` of align {__version__}: {ends}, extrapolated with alpha {arguments.alpha}."
    texts |= _readme(arguments.strong, origin, stored)
    weights = merge.expo(arguments.weak, arguments.strong, arguments.out, arguments.alpha, texts)
    console.print(f"wrote {arguments.out}: {weights} weights, alpha {arguments.alpha}", highlight=False)
    if stored is not None and stored.moments is not None:
        console.print(
            f"{card.NAME}: copied from {arguments.strong} without the moments, which belong to other scores",
            highlight=False,
        )
    return 0


def convert_row0(arguments: argparse.Namespace, console: Console) -> int:
    """``align convert row0``."""
    stored = card.read(arguments.source) or Card("lm_head_row0")
    texts = replace(stored, kind="sequence_classification").files()
    name = convert.row_zero(arguments.source, arguments.out, texts)
    console.print(f"wrote {arguments.out}: {name} with one label", highlight=False)
    return 0


def _readme(strong: Path, origin: str, stored: Card | None) -> dict[str, str]:
    """``README.md`` that replaces the one of ``strong``, text by file name; short if there is no chat template."""
    tokenizer: Any = chat.load_tokenizer(strong)
    if stored is not None and stored.chat_template is not None:
        tokenizer.chat_template = stored.chat_template
    try:
        renderer = Renderer(tokenizer, date=None if stored is None else stored.date, section="tokenizer")
    except DataError:
        return {readme.NAME: f"# Model\n\n{origin}\n"}
    if not load.labels(ModelConfig(path=str(strong))):
        stops = exported_files.stored_stop_ids(strong) or list(renderer.stop_ids)
        return {readme.NAME: readme.policy(origin, Chat.of(renderer), tokenizer, stops, trust=False)}
    form = Chat.of(renderer, whole=stored is None or not stored.loss)
    pad = AutoConfig.from_pretrained(strong).get_text_config().pad_token_id
    pads = pad is not None and pad == tokenizer.pad_token_id and pad not in form.ids
    weighted = stored is not None and stored.kind == "attributes"
    return {readme.NAME: readme.reward(origin, form, tokenizer, pads, weighted, trust=False)}
