"""The bundled task: short instructions over a few words, with a rule that scores any answer.

A row asks for something that can be checked ("reverse the words : cat dog sun") and holds two answers of graded
quality, so the whole path from pairs to a better policy can be run and judged on a CPU in minutes. The score of an
answer with words w against the right words t (n of them), m the number of positions where both agree:

- 4  w = t
- 3  w = t followed by filler words only ("okay", "thanks", ...)
- 2  as many words as t, n >= 2, and exactly one of them wrong
- 1  m >= max(n, number of words in w) / 3
- 0  anything else, the empty answer included

Words beyond the right ones only ever lower it, so length buys nothing.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from align.data.attributes import HELPSTEER_ATTRIBUTES
from align.data.chat import Message
from align.errors import DataError

# fmt: off
WORDS = [
    "ant", "apple", "bag", "bear", "bird", "boat", "book", "box", "bread", "cake", "car", "cat", "cup", "desk",
    "dog", "door", "egg", "fish", "fox", "frog", "goat", "hat", "hen", "ice", "jam", "key", "lamp", "leaf", "milk",
    "moon", "nest", "owl", "pen", "pig", "rain", "ship", "star", "sun", "tree", "wolf",
]
FILLER = ["okay", "well", "thanks", "indeed", "hello", "friend"]
# fmt: on

OPERATIONS: dict[str, Callable[[list[str]], list[str]]] = {
    "repeat the words": lambda words: words,
    "reverse the words": lambda words: words[::-1],
    "sort the words": sorted,
    "say the first word": lambda words: words[:1],
    "say the last word": lambda words: words[-1:],
    "drop the first word": lambda words: words[1:],
}
MIN_WORDS, MAX_WORDS = 2, 4

QUALITY_WEIGHTS = {4: 0.38, 3: 0.25, 2: 0.15, 1: 0.11, 0: 0.11}
"""How often each score is aimed at. A Llama of 0.9M parameters that imitates both answers of 8,000 rows (400 steps of
128) scores 2.2 when sampled and 3.9 when greedy: it knows the right words, and not yet to prefer them."""

TIE_SHARE = 0.25
"""Share of rows with two equally good answers that stay; about one row in twenty is a tie."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} <{{ message.role }}> {{ message.content }}"
    "{% if message.role == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def answer(instruction: str) -> list[str]:
    """The right words. Raises `DataError` for a text that is not an instruction of this task."""
    if not _is_instruction(instruction):
        raise DataError(f"not an instruction of the toy task: {instruction[:60]!r}")
    request, _, words = instruction.partition(" : ")
    return OPERATIONS[request](words.split())


def score(instruction: str, response: str) -> float:
    """How good any ``response`` is, 0 to 4, by the rule at the head of this module."""
    right, words = answer(instruction), response.split()
    matches = _matches(right, words)
    if words == right:
        return 4.0
    if words[: len(right)] == right and set(words[len(right) :]) <= set(FILLER):
        return 3.0
    if len(words) == len(right) >= 2 and matches == len(right) - 1:
        return 2.0
    return 1.0 if 3 * matches >= max(len(right), len(words)) else 0.0


def _matches(right: Sequence[str], words: Sequence[str]) -> int:
    return sum(a == b for a, b in zip(right, words, strict=False))


def attributes(instruction: str, response: str) -> dict[str, int]:
    """The five attributes of HelpSteer and HelpSteer2, each 0 to 4, all 0 for an empty answer.

    helpfulness: `score`. correctness: share of positions that are right. coherence: share of words that belong to the
    answer or are filler. complexity: distinct words less one. verbosity: 2 at the right length, 4 from twice it.
    """
    right, words = answer(instruction), response.split()
    if not words:
        return dict.fromkeys(HELPSTEER_ATTRIBUTES, 0)
    longest = max(len(right), len(words))
    values = (
        int(score(instruction, response)),
        4 * _matches(right, words) // longest,
        4 * sum(word in right or word in FILLER for word in words) // len(words),
        min(4, len(set(words)) - 1),
        min(4, 2 * len(words) // len(right)),
    )
    return dict(zip(HELPSTEER_ATTRIBUTES, values, strict=True))


def instruction_of(messages: Sequence[Message]) -> str:
    """The instruction a conversation ends with."""
    return messages[-1].content


def ground_truth(conversations: Sequence[Sequence[Message]], responses: Sequence[str]) -> Tensor | None:
    """`score` of each response, (P,); None where a conversation does not end with an instruction of this task."""
    instructions = [instruction_of(messages) for messages in conversations]
    if not all(_is_instruction(text) for text in instructions):
        return None
    return torch.tensor([score(text, response) for text, response in zip(instructions, responses, strict=True)])


def _is_instruction(text: str) -> bool:
    request, colon, words = text.partition(" : ")
    return bool(colon) and request in OPERATIONS and bool(words.split())


def write_toy(folder: str | Path, num_train: int, num_validation: int, seed: int) -> Path:
    """Write ``preference/{train,validation}.jsonl.gz`` in HelpSteer3's layout, the same responses rated one by one as
    ``{train,validation}.jsonl.gz`` in HelpSteer2's, and ``tokenizer/`` into ``folder``; the same bytes for one seed.

    Every row has a different instruction, so no validation prompt occurs in train.
    """
    folder = Path(folder)
    (folder / "preference").mkdir(parents=True, exist_ok=True)
    drawing = draw_rows(random.Random(seed))
    for split, count in (("validation", num_validation), ("train", num_train)):
        split_rows = [next(drawing) for _ in range(count)]
        write_lines(folder / "preference" / f"{split}.jsonl.gz", split_rows)
        write_lines(folder / f"{split}.jsonl.gz", [rating for row in split_rows for rating in rate_responses(row)])
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A file of rows, the same bytes for the same rows."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(lines.encode(), mtime=0))


def rate_responses(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Both responses of a row with their `attributes`, in the schema of HelpSteer2."""
    prompt = row["context"][-1]["content"]
    return [
        {"prompt": prompt, "response": row[key], **attributes(prompt, row[key])} for key in ("response1", "response2")
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; ``<pad>``, ``<s>``, ``</s>`` and ``<unk>`` are distinct."""
    roles = ["<system>", "<user>", "<assistant>"]
    requests = sorted({word for request in OPERATIONS for word in request.split()})
    entries = ["<pad>", "<s>", "</s>", "<unk>", *roles, ":", *requests, *FILLER, *WORDS]
    words = Tokenizer(models.WordLevel({word: id for id, word in enumerate(entries)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=roles,
        chat_template=CHAT_TEMPLATE,
    )


def draw_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Rows in the schema of HelpSteer3-Preference, each with a new instruction."""
    instructions: set[str] = set()
    while True:
        words = rng.sample(WORDS, rng.randint(MIN_WORDS, MAX_WORDS))
        instruction = f"{rng.choice(list(OPERATIONS))} : {' '.join(words)}"
        if instruction in instructions:
            continue
        instructions.add(instruction)
        yield _row(instruction, rng)


def _row(instruction: str, rng: random.Random) -> dict[str, Any]:
    first, second = _response(instruction, rng), _response(instruction, rng)
    while score(instruction, first) == score(instruction, second) and rng.random() > TIE_SHARE:
        second = _response(instruction, rng)
    difference = int(score(instruction, second) - score(instruction, first))
    preference = max(-3, min(3, difference))
    # The third person errs by one now and then, as people do; the mean rounds to the other two's mark.
    third = max(-3, min(3, preference + rng.choice([-1, 0, 0, 1])))
    return {
        "domain": "general",
        "language": "english",
        "context": [{"role": "user", "content": instruction}],
        "response1": first,
        "response2": second,
        "overall_preference": preference,
        "individual_preference": [{"score": mark, "reasoning": ""} for mark in (preference, preference, third)],
    }


def answer_below(instruction: str, limit: int, rng: random.Random) -> str:
    """A response of random quality whose `score` is less than ``limit``, at least 1."""
    while True:
        response = _response(instruction, rng)
        if score(instruction, response) < limit:
            return response


def _response(instruction: str, rng: random.Random) -> str:
    """A response of random quality."""
    right = answer(instruction)
    quality = rng.choices(list(QUALITY_WEIGHTS), list(QUALITY_WEIGHTS.values()))[0]
    if quality == 2 and len(right) == 1:
        quality = rng.choice([1, 3])  # one word has no second-best
    while True:
        response = " ".join(_attempt(instruction, right, quality, rng))
        if score(instruction, response) == quality:
            return response


def _attempt(instruction: str, right: list[str], quality: int, rng: random.Random) -> list[str]:
    """Words that most likely score ``quality``.

    Half of the mistakes are plausible ones, a word of the instruction in the wrong place or the answer to another
    request: a reward model that has only seen random words as mistakes is fooled by the first policy that makes better
    ones.
    """
    given = instruction.partition(" : ")[2].split()

    def slip() -> str:
        return rng.choice(given if rng.random() < 0.5 else WORDS)

    if quality == 4:
        return right
    if quality == 3:
        return [*right, *rng.choices(FILLER, k=rng.randint(1, 3))]
    if quality == 0 and rng.random() < 0.5:
        return OPERATIONS[rng.choice(list(OPERATIONS))](given)
    if quality == 0:
        return rng.choices(WORDS + FILLER, k=rng.randint(1, len(right) + 2))
    kept = len(right) - 1 if quality == 2 else (len(right) + 2) // 3
    places = set(rng.sample(range(len(right)), kept))
    words = [word if place in places else slip() for place, word in enumerate(right)]
    # One of one or of two words right would score more than 1.
    return [*words, slip()] if quality == 1 and len(right) <= 2 else words
