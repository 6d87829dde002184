"""Small random reward models, and conversations that they score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from align.config import CheckpointRewardConfig, RewardConfig
from align.data import toy
from align.data.chat import Dialogue, Message, Renderer
from align.rewards import texts
from align.rewards.scorers import CheckpointScorer, build_scorer
from align.types import Packed, Sequences

CPU = torch.device("cpu")


NAMES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


FIRST = (Message("user", "reverse the words : cat dog sun"),)


SECOND = (
    Message("user", "say the last word : moon egg"),
    Message("assistant", "egg"),
    Message("user", "sort the words : wolf ant"),
)


DIALOGUES = [
    Dialogue(FIRST, "sun dog cat"),
    Dialogue(SECOND, "ant wolf"),
    Dialogue(FIRST, "cat"),
    Dialogue(SECOND, "wolf ant okay thanks friend"),
    Dialogue(FIRST, "sun dog cat indeed"),
]
"""Conversations of two contexts, not side by side."""


Save = Callable[..., str]


def words() -> PreTrainedTokenizerFast:
    """The tokenizer of the bundled task with two words more."""
    return _with_words(toy.tokenizer(), ["Yes", "No", *texts.QUESTION.split()])


def _with_words(base: PreTrainedTokenizerFast, more: Sequence[str]) -> PreTrainedTokenizerFast:
    entries = list(dict.fromkeys([*sorted(base.get_vocab(), key=base.get_vocab().get), *more]))  # type: ignore[arg-type]
    level = Tokenizer(models.WordLevel({word: id for id, word in enumerate(entries)}, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=level,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        chat_template=toy.CHAT_TEMPLATE,
    )


def section(path: str, **fields: Any) -> RewardConfig:
    return CheckpointRewardConfig(path=path, dtype="float32", **fields)


def opened(path: str, **fields: Any) -> CheckpointScorer:
    judge = build_scorer(section(path, **fields), CPU)
    assert isinstance(judge, CheckpointScorer)
    return judge


def rendered(path: str, dialogue: Dialogue, *more: Message, ask: bool = False) -> torch.Tensor:
    """Ids as a model card makes them."""
    turns = [*dialogue.context, Message("assistant", dialogue.response), *more]
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = tokenizer.apply_chat_template([t._asdict() for t in turns], add_generation_prompt=ask, tokenize=False)
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])


@torch.no_grad()
def last_logits(auto: Any, path: str, ids: torch.Tensor) -> torch.Tensor:
    logits = auto.from_pretrained(path, dtype=torch.float32).eval()(input_ids=ids).logits
    return logits[0, -1] if logits.ndim == 3 else logits[0]


def ids_of(tokenizer: Any, dialogues: Sequence[Dialogue]) -> Sequences:
    """What a policy would have sampled: prompts, and responses with their end-of-sequence token."""
    renderer = Renderer(tokenizer)
    rows = [renderer.dialogue_ids(one.context, [one.response]) for one in dialogues]
    prompts, responses = Packed.from_lists([p for p, _ in rows]), Packed.from_lists([r for _, (r,) in rows])
    return Sequences(prompts, responses, torch.arange(len(rows)))


TAIL = toy.CHAT_TEMPLATE.replace("{{ eos_token }}{% endif %}", "{{ eos_token }} okay{% endif %}")
"""As Qwen's, which writes a newline after the end of a turn."""


def rendered_with(tokenizer: Any, one: Dialogue) -> list[int]:
    turns = [turn._asdict() for turn in (*one.context, Message("assistant", one.response))]
    return tokenizer.encode(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)


def rows_of(found: tuple[Sequences, torch.Tensor]) -> list[list[int]]:
    sequences, order = found
    prompts, responses = sequences.prompts.lists(), sequences.responses.lists()
    rows = [prompts[p] + r for p, r in zip(sequences.prompt_B.tolist(), responses, strict=True)]
    return [rows[i] for i in order.argsort().tolist()]
