"""How long a sequence a model reads: the number of its positions, and what is refused beyond it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from align.config import ModelConfig, PolicyConfig, PriorPolicyConfig, RewardConfig, SamplerConfig
from align.data.prompts import PromptStream
from align.errors import ConversationError, DataError
from align.models import load
from align.types import Packed, Prompts, Sequences

KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
"""Names of the number of positions in configs of transformers, in the order in which they are looked up."""


def positions(config: PreTrainedConfig) -> tuple[int, str] | None:
    """Tokens of the longest sequence and the key of the config that says so; None for a model without a limit.

    ALiBi has none. Rotary positions scaled by ``linear``, ``dynamic`` or ``yarn`` reach ``factor`` times as far, as in
    vLLM; where yarn names ``original_max_position_embeddings``, that is what is multiplied. ``llama3`` and
    ``longrope`` say the scaled number themselves.
    """
    text: Any = config.get_text_config()
    if getattr(text, "alibi", False) or getattr(getattr(text, "attn_config", None), "alibi", False):
        return None
    key = next((key for key in KEYS if isinstance(getattr(text, key, None), int) and getattr(text, key) > 0), None)
    if key is None:
        return None
    stated = getattr(text, key)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(rope, dict):
        return stated, key
    reach = stated
    if rope.get("rope_type", rope.get("type")) in ("linear", "dynamic", "yarn"):
        base = rope.get("original_max_position_embeddings") or stated
        reach = max(stated, int(base * float(rope.get("factor") or 1.0)))
    return reach, key


def require(
    config: PreTrainedConfig,
    tokens: int,
    where: str,
    subject: str = "",
    remedy: str = "lower data.max_prompt_tokens, data.max_response_tokens or sampling.max_tokens",
) -> None:
    """Raise `ConversationError` if ``tokens`` exceed the positions of a model. ``subject`` names what has the tokens;
    senders of the conversation may see it."""
    limit = positions(config)
    if limit is not None and tokens > limit[0]:
        subject = subject or f"a sequence of {tokens} tokens"
        message = f"{subject} exceeds the {limit[0]} positions of the model ({limit[1]})"
        raise ConversationError(message, public=message, where=where, remedy=remedy)


class Longest(NamedTuple):
    """The longest sequence of one part of the data."""

    tokens: int
    """Of prompt and response."""
    words: str
    """What it is, for messages."""
    remedy: str


def longest(material: Any, max_tokens: int, held_out: bool = False) -> Iterator[tuple[str, Longest]]:
    """The parts of what an algorithm learns from, where prompts are answered by at most ``max_tokens`` tokens.

    ``data``: prompts with responses of the data. ``prompts``: prompts to be answered, as the policy reads them;
    ``judged``: as reward models do, where they read others. ``held_out...``: the same of held-out prompts.
    """
    if isinstance(material, Sequences) and len(material):
        tokens = int(material.tokens_B().max())
        words = f"the longest prompt of the data with its response has {tokens} tokens"
        yield "data", Longest(tokens, words, "lower data.max_prompt_tokens and data.max_response_tokens")
    elif isinstance(material, (PromptStream, Prompts, Packed)):
        packed = material if isinstance(material, Packed) else material.tokens
        prompt = int(packed.lengths_B.max()) if len(packed) else 0
        name = "judged" if isinstance(material, Packed) else "" if held_out else "prompts"
        kind = "held-out prompt" if held_out else "prompt"
        words = f"the longest {kind} of {prompt} tokens and sampling.max_tokens={max_tokens} need {prompt + max_tokens}"
        remedy = "lower sampling.max_tokens, or data.max_prompt_tokens, beyond which prompts are dropped"
        yield "_".join(filter(None, ("held_out" * held_out, name))), Longest(prompt + max_tokens, words, remedy)
    elif is_dataclass(material):
        for item in fields(material):
            yield from longest(getattr(material, item.name), max_tokens, held_out or item.name == "held_out")


def check(section: ModelConfig, name: str, parts: Mapping[str, Longest], scores_data: bool = False) -> None:
    """Raise `DataError` where a role has too few positions for what it reads of the data. ``scores_data``: a frozen
    reward model scores responses of the data too."""
    judged = ["judged" if "judged" in parts else "prompts"]
    if isinstance(section, (PolicyConfig, SamplerConfig)):
        read = ["data", "prompts", "held_out"]
    elif isinstance(section, RewardConfig):
        judged.append("held_out_judged" if "held_out_judged" in parts else "held_out")
        read = [*judged, *(["data"] if scores_data else [])]
    else:  # references, critics and reward models in training
        read = judged if isinstance(section, PriorPolicyConfig) else ["data", "prompts"]
    limit = positions(load.config(section))
    most = max((parts[part] for part in read if part in parts), default=None)
    if limit is not None and most is not None and most.tokens > limit[0]:
        raise DataError(
            f"{section.path}: {most.words}, the model has {limit[0]} positions ({limit[1]})",
            where=f"{name}.path",
            remedy=f"{most.remedy}, or take a model with more positions",
        )
