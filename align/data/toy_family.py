"""The bundled task for the rest of the HelpSteer family: what people say of answers, edits, verdicts and principles.

The instructions, answers and scores are those of `align.data.toy`. Every config of HelpSteer3 is written, so that
judges that write verdicts, feedback and edit models can be trained and judged on a CPU in minutes. Feedback names the
score by HelpSteer3's words (not, slightly, partially, mostly, perfectly helpful) and one thing that is true of the
answer. The tokenizer knows the words of all of these and writes a text back as it was.
"""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align.data import toy
from align.data.attributes import NEMO_ATTRIBUTES
from align.data.helpsteer3 import PHRASES

PRINCIPLES = {
    "says no word too much": lambda right, words: len(words) <= len(right),
    "begins with the right word": lambda right, words: words[:1] == right[:1],
}
"""What a response may fulfil, with the rule that decides."""

ROLES = ("system", "user", "assistant", "principle", "response_1", "response_2")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

_END = "▁"
"""Ends every word. So a word is one token wherever it stands, and the blank between two words needs none."""
_PIECES = rf"[A-Za-z_]+{_END}|[^A-Za-z_{_END}]"
_WORDS = (
    "The response is helpful Word should be It have words are asked for All right was changed to One removed Now "
    "has Response Yes No and no improve edit feedback ranking overall json score_"
)
_BLOCKS = [
    f"[The {end} of {what}]"
    for what in ("Analysis on Response 1", "Analysis on Response 2", "Individual Scores", "Ranking Score")
    for end in ("Begin", "End")
]
"""Lines of a verdict, each of which is one token."""


def write_toy_family(folder: str | Path, num_train: int, num_validation: int, seed: int) -> Path:
    """Write the configs of HelpSteer3 (``preference``, ``feedback``, ``edit``, ``edit_quality``, ``principle``), the
    ratings in HelpSteer2's layout, and ``tokenizer/`` into ``folder``; the same bytes for one seed.

    Each config has ``num_train`` and ``num_validation`` rows, of the same instructions, each with one of its own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pairs, rng = toy.draw_rows(random.Random(seed)), random.Random(seed + 1)
    for split, count in (("validation", num_validation), ("train", num_train)):
        split_rows = list(islice(pairs, count))
        toy.write_lines(
            folder / f"{split}.jsonl.gz", [rating for row in split_rows for rating in toy.rate_responses(row)]
        )
        for config, made in _CONFIGS.items():
            (folder / config).mkdir(parents=True, exist_ok=True)
            toy.write_lines(folder / config / f"{split}.jsonl.gz", [made(row, rng) for row in split_rows])
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def feedback(instruction: str, response: str, rng: random.Random) -> str:
    """What a person says of a response: HelpSteer3's sentence about its score, and one true remark."""
    return f"The response is {_phrase(instruction, response)} helpful. {_remark(instruction, response, rng)}"


def _phrase(instruction: str, response: str) -> str:
    return PHRASES[int(toy.score(instruction, response))]


def _remark(instruction: str, response: str, rng: random.Random) -> str:
    right, words = toy.answer(instruction), response.split()
    wrong = [i for i, word in enumerate(right) if words[i : i + 1] != [word]]
    remarks = [f"Word {i + 1} should be {right[i]}." for i in wrong]
    if len(words) != len(right):
        remarks.append(f"It should have {len(right)} words.")
    return rng.choice(remarks) if remarks else "All words are right."


def _with_reasons(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A pair in which everybody says why: the right answer, to which a verdict holds both responses. ``rng`` is not
    used."""
    reason = f"It should be {' '.join(toy.answer(row['context'][-1]['content']))}."
    opinions = [{"score": opinion["score"], "reasoning": reason} for opinion in row["individual_preference"]]
    return {**row, "individual_preference": opinions}


def _feedback(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    instruction = row["context"][-1]["content"]
    comments = {f"feedback{i}": [feedback(instruction, row[f"response{i}"], rng) for _ in range(3)] for i in (1, 2)}
    return {**_place(row), "response1": row["response1"], "response2": row["response2"], **comments}


def _edit(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A wrong answer and the right one. The summary repeats the remarks that were followed, as they are."""
    instruction = row["context"][-1]["content"]
    original = toy.answer_below(instruction, 4, rng)
    comments = [feedback(instruction, original, rng) for _ in range(3)]
    followed = list(dict.fromkeys(text.partition(". ")[2] for text in comments))
    return {
        **_place(row),
        "original_response": original,
        "edited_response": " ".join(toy.answer(instruction)),
        "feedback": comments,
        "change_summary": "Now: " + " ".join(followed),
    }


def _edit_quality(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A wrong answer, the right one as its good edit, and a bad edit that scores no more than the original."""
    instruction = row["context"][-1]["content"]
    original = toy.answer_below(instruction, 4, rng)
    bad = toy.answer_below(instruction, 1 + int(toy.score(instruction, original)), rng)
    comments = [feedback(instruction, original, rng) for _ in range(3)]
    return {
        **_place(row),
        "original_response": original,
        "good_edited_response": " ".join(toy.answer(instruction)),
        "bad_edited_response": bad,
        "feedback": comments,
    }


def _principle(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    principle = rng.choice(list(PRINCIPLES))
    response = row[rng.choice(("response1", "response2"))]
    fulfilled = PRINCIPLES[principle](toy.answer(row["context"][-1]["content"]), response.split())
    return {**_place(row), "response": response, "principle": principle, "fulfilment": "Yes" if fulfilled else "No"}


def _place(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("domain", "language", "context")}


_CONFIGS = {
    "preference": _with_reasons,
    "feedback": _feedback,
    "edit": _edit,
    "edit_quality": _edit_quality,
    "principle": _principle,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; digits, signs and blanks beside them are tokens of their own, and so are the fixed lines of a
    verdict. Words of the task come first."""
    marks = [f"<{role}>" for role in ROLES]
    requests = sorted({word for request in toy.OPERATIONS for word in request.split()})
    named = " ".join(PRINCIPLES).split()
    words = [*toy.WORDS, *toy.FILLER, *requests, *_WORDS.split(), *PHRASES, *NEMO_ATTRIBUTES, *named]
    signs = [*" \n0123456789", *".,:;{}[]()\"'\\-/<>!?*#"]
    entries = ["<pad>", "<s>", "</s>", "<unk>", *marks, *(f"{word}{_END}" for word in dict.fromkeys(words)), *signs]
    words_tokenizer = Tokenizer(models.WordLevel({entry: id for id, entry in enumerate(entries)}, unk_token="<unk>"))
    words_tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex("(?<=[A-Za-z_])(?![A-Za-z_])"), _END),
            normalizers.Replace(Regex(f"{_END} (?=[A-Za-z_])"), _END),
        ]
    )
    words_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    words_tokenizer.decoder = decoders.Sequence(
        [decoders.Fuse(), decoders.Replace(Regex(f"{_END}(?=[A-Za-z_])"), " "), decoders.Replace(_END, "")]
    )
    lines = [*_BLOCKS, "\\boxed{", "<think>", "</think>", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]
    words_tokenizer.add_tokens([AddedToken(line, normalized=False) for line in lines])
    return PreTrainedTokenizerFast(
        tokenizer_object=words_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=marks,
        chat_template=CHAT_TEMPLATE,
    )
