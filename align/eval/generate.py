"""``align generate``: generate answers with a local model, optionally conditioned on attribute values."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from align.config import ModelGeneratorConfig, SamplingConfig
from align.data import rows, steerlm
from align.data.chat import Message
from align.data.steerlm import SteeringFormat
from align.engines import distributed
from align.errors import ConfigError, DataError
from align.generators.base import Request, TextGenerator
from align.generators.models import build_generator
from align.models.weights import stored_file
from align.utils.atomic_write import write_atomic
from align.workers.announce import announced

CALL = 256
"""Answers in a batch."""

PromptMessages = tuple[str | list[dict[str, str]], tuple[Message, ...]]
"""A prompt in its input format, and its conversation."""


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Print the answers, or write them to ``--out`` as a JSON line for each prompt."""
    try:
        sampling = SamplingConfig(
            num_samples=arguments.num_samples,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
        )
    except ValueError as error:
        raise ConfigError(f"{error}", where="command line") from None
    requests = prompts(arguments.prompt or [], arguments.prompts)
    section = ModelGeneratorConfig(path=arguments.model, dtype=arguments.dtype)
    form = form_of(section, parsed(arguments.attributes))
    if form is not None and form.date is not None:
        section = ModelGeneratorConfig(path=arguments.model, dtype=arguments.dtype, date=form.date)
    with announced(lambda line: print(line, file=sys.stderr, flush=True), "generate", section, "in this process"):
        generator = build_generator(section, distributed.initialize_alone(), arguments.seed)
    answered = answers(generator, requests, form, sampling)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in answered))
        console.print(f"wrote {arguments.out}: {len(answered)} prompts", highlight=False)
        return 0
    for (_, messages), record in zip(requests, answered, strict=True):
        console.print(f"> {messages[-1].content}", markup=False, highlight=False, soft_wrap=True)
        for answer in record["answers"]:
            console.print(answer, markup=False, highlight=False, soft_wrap=True)
    return 0


def parsed(text: str | None) -> dict[str, int]:
    """Parse ``name=value,name=value``; None gives no values. Raises `ConfigError`."""
    values: dict[str, int] = {}
    for part in (text or "").split(",") if text is not None else []:
        name, _, value = map(str.strip, part.partition("="))
        if not value.isdecimal() or name in values:
            raise ConfigError(
                f"--attributes: {part!r} is not one whole number of an attribute",
                remedy="write --attributes helpfulness=4,verbosity=1, each attribute once",
            )
        values[name] = int(value)
    return values


def form_of(section: ModelGeneratorConfig, given: Mapping[str, int]) -> SteeringFormat | None:
    """The attribute format of the model with the values ``given``; None if it has no attributes. Raises `ConfigError`
    for attributes that the model does not support."""
    file = stored_file(section, steerlm.NAME)
    if file is not None:
        return steerlm.read_steering_card(Path(file)).asking(given)
    if given:
        raise ConfigError(
            f"{section.path} has no {steerlm.NAME}: it was not trained to be told attributes",
            remedy="leave --attributes out, or give a model of algorithm: steerlm or steerlm2",
        )
    return None


def prompts(texts: list[str], file: Path | None) -> list[PromptMessages]:
    """The prompts of the command line and of a file. Raises `DataError` for an invalid row or no prompts."""
    conversations: list[PromptMessages] = [(text, (Message("user", text),)) for text in texts]
    if file is not None:
        try:
            lines = file.read_bytes().splitlines()
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(file), remedy="give a file") from error
        conversations += [_row(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not conversations:
        raise DataError("there is no prompt", remedy="give --prompt TEXT, or --prompts FILE with a row for each")
    return conversations


def _row(line: bytes, where: str) -> PromptMessages:
    """``prompt``, ``messages`` or ``context`` of a row: text, or a list of {role, content} that ends with the user."""
    try:
        row = rows.parse_row(line)
        fields = [name for name in ("prompt", "messages", "context") if name in row]
        if len(fields) != 1:
            raise rows.BadRow("row", "has not one of prompt, messages and context", sorted(row))
        turns = rows.turns(fields[0], row[fields[0]])
        return row[fields[0]], rows.conversation(fields[0], turns)
    except rows.BadRow as error:
        remedy = 'write {"prompt": "..."}, or {"messages": [{"role": "user", "content": "..."}]}'
        raise DataError(f"{error}", where=where, remedy=remedy) from None


def answers(
    generator: TextGenerator, conversations: list[PromptMessages], form: SteeringFormat | None, sampling: SamplingConfig
) -> list[dict[str, Any]]:
    """For each prompt: the request, the answers, and which answers ended before the token limit."""
    requests = []
    for _, messages in conversations:
        steered, opening = (messages, "") if form is None else form.steered(messages)
        requests += [Request(steered, sample, opening) for sample in range(sampling.num_samples)]
    parts = [requests[i : i + CALL] for i in range(0, len(requests), CALL)]
    done = [completion for part in parts for completion in generator.complete(part, sampling)]
    attributes = {} if form is None else {"attributes": dict(zip(form.names, form.values, strict=True))}
    K = sampling.num_samples
    return [
        {
            "prompt": given,
            **attributes,
            "answers": [completion.text for completion in done[i * K : (i + 1) * K]],
            "finished": [completion.finished for completion in done[i * K : (i + 1) * K]],
        }
        for i, (given, _) in enumerate(conversations)
    ]
