"""The number of positions of a model, and the checks that refuse longer sequences."""

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
"""Keys of transformers configs that hold the number of positions, in order of lookup."""


def positions(config: PreTrainedConfig) -> tuple[int, str] | None:
    """The length of the longest sequence, in tokens, and its key in the config; None for a model without a limit.

    ALiBi has no limit. Rotary positions scaled by ``linear``, ``dynamic`` or ``yarn`` reach ``factor`` times as far, as
    in vLLM; for yarn the factor multiplies ``original_max_position_embeddings`` if that is set. Configs of ``llama3``
    and ``longrope`` already hold the scaled number.
    """
    text: Any = config.get_text_config()
    if getattr(text, "alibi", False) or getattr(getattr(text, "attn_config", None), "alibi", False):
        return None
    key = next((key for key in KEYS if isinstance(getattr(text, key, None), int) and getattr(text, key) > 0), None)
    if key is None:
        return None
    num_positions = getattr(text, key)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(rope, dict):
        return num_positions, key
    reach = num_positions
    if rope.get("rope_type", rope.get("type")) in ("linear", "dynamic", "yarn"):
        base = rope.get("original_max_position_embeddings") or num_positions
        reach = max(num_positions, int(base * float(rope.get("factor") or 1.0)))
    return reach, key


def require(
    config: PreTrainedConfig,
    tokens: int,
    where: str,
    subject: str = "",
    remedy: str = "lower data.max_prompt_tokens, data.max_response_tokens or sampling.max_tokens",
) -> None:
    """Raise `ConversationError` if ``tokens`` exceed the positions of a model. ``subject`` names the sequence in the
    message, which senders of the conversation may see."""
    limit = positions(config)
    if limit is not None and tokens > limit[0]:
        subject = subject or f"a sequence of {tokens} tokens"
        message = f"{subject} exceeds the {limit[0]} positions of the model ({limit[1]})"
        raise ConversationError(message, public=message, where=where, remedy=remedy)


class LongestSequence(NamedTuple):
    """The longest sequence of one part of the data."""

    tokens: int
    """Tokens of prompt and response together."""
    words: str
    """Description of the sequence for messages."""
    remedy: str


def longest(train_data: Any, max_tokens: int, held_out: bool = False) -> Iterator[tuple[str, LongestSequence]]:
    """The longest sequence of each part of the training data, with responses of at most ``max_tokens`` tokens.

    ``data``: prompts with responses of the data. ``prompts``: prompts to sample from, in the policy's token ids;
    ``reward``: the same in the reward model's ids, where those differ. ``held_out...``: the same for held-out prompts.
    """
    if isinstance(train_data, Sequences) and len(train_data):
        tokens = int(train_data.tokens_B().max())
        words = f"the longest prompt of the data with its response has {tokens} tokens"
        yield "data", LongestSequence(tokens, words, "lower data.max_prompt_tokens and data.max_response_tokens")
    elif isinstance(train_data, (PromptStream, Prompts, Packed)):
        packed = train_data if isinstance(train_data, Packed) else train_data.tokens
        prompt = int(packed.lengths_B.max()) if len(packed) else 0
        name = "reward" if isinstance(train_data, Packed) else "" if held_out else "prompts"
        kind = "held-out prompt" if held_out else "prompt"
        words = f"the longest {kind} of {prompt} tokens and sampling.max_tokens={max_tokens} need {prompt + max_tokens}"
        remedy = "lower sampling.max_tokens, or data.max_prompt_tokens, beyond which prompts are dropped"
        yield "_".join(filter(None, ("held_out" * held_out, name))), LongestSequence(prompt + max_tokens, words, remedy)
    elif is_dataclass(train_data):
        for item in fields(train_data):
            yield from longest(getattr(train_data, item.name), max_tokens, held_out or item.name == "held_out")


def check(section: ModelConfig, name: str, parts: Mapping[str, LongestSequence], scores_data: bool = False) -> None:
    """Raise `DataError` if a role has too few positions for the parts of the data that it reads. ``scores_data``: a
    frozen reward model scores responses of the data too."""
    reward_parts = ["reward" if "reward" in parts else "prompts"]
    if isinstance(section, (PolicyConfig, SamplerConfig)):
        read = ["data", "prompts", "held_out"]
    elif isinstance(section, RewardConfig):
        reward_parts.append("held_out_reward" if "held_out_reward" in parts else "held_out")
        read = [*reward_parts, *(["data"] if scores_data else [])]
    else:  # references, critics and reward models in training
        read = reward_parts if isinstance(section, PriorPolicyConfig) else ["data", "prompts"]
    limit = positions(load.config(section))
    most = max((parts[part] for part in read if part in parts), default=None)
    if limit is not None and most is not None and most.tokens > limit[0]:
        raise DataError(
            f"{section.path}: {most.words}, the model has {limit[0]} positions ({limit[1]})",
            where=f"{name}.path",
            remedy=f"{most.remedy}, or take a model with more positions",
        )
