"""Rows and folders of every format, in the schema that its publisher documents."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
NINE = ("quality", "toxicity", "humor", "creativity", *ATTRIBUTES)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

FILES = {
    "helpsteer3": ("preference/train.jsonl.gz", "preference/validation.jsonl.gz"),
    "feedback": ("feedback/train.jsonl.gz", "feedback/validation.jsonl.gz"),
    "edit": ("edit/train.jsonl.gz", "edit/validation.jsonl.gz"),
    "principle": ("principle/train.jsonl.gz", "principle/validation.jsonl.gz"),
    "helpsteer3_edit_quality": ("edit_quality/train.jsonl.gz", "edit_quality/validation.jsonl.gz"),
    "helpsteer": ("train.jsonl.gz", "validation.jsonl.gz"),
    "helpsteer2": ("train.jsonl.gz", "validation.jsonl.gz"),
    "openai": ("train.jsonl", "validation.jsonl"),
    "nemo": ("train.jsonl", "val.jsonl"),
}
"""Files of both splits."""


def encode(rows: list[Any]) -> bytes:
    """Lines of a file; bytes are taken as they are."""
    return b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in rows)


def put(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(encode(rows)) if file.suffix == ".gz" else encode(rows))
    return file


def write(folder: Path, layout: str, train: list[Any], validation: list[Any]) -> Path:
    """A folder of one of `FILES`."""
    for name, rows in zip(FILES[layout], (train, validation), strict=True):
        put(folder / name, rows)
    return folder


def turns(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


PLACE = {"domain": "code", "language": "python"}


def preference(prompt: str = "cat", mark: Any = -2, **changes: Any) -> dict[str, Any]:
    """A row of HelpSteer3-Preference."""
    said = {"response1": "cat dog", "response2": "cat pig", "overall_preference": mark}
    opinions = {"individual_preference": [{"score": mark, "reasoning": ""}]}
    return {**PLACE, "context": turns(prompt), **said, **opinions} | changes


def feedback(prompt: str = "cat", **changes: Any) -> dict[str, Any]:
    """A row of HelpSteer3's ``feedback``."""
    said = {"response1": "cat dog", "response2": "cat pig"}
    told = {"feedback1": ["The response is mostly helpful."], "feedback2": ["It errs.", "It is short."]}
    return {**PLACE, "context": turns(prompt), **said, **told} | changes


def edit(prompt: str = "cat", **changes: Any) -> dict[str, Any]:
    """A row of HelpSteer3's ``edit``."""
    said = {"original_response": "cat pig", "edited_response": "cat dog", "change_summary": "pig became dog"}
    return {**PLACE, "context": turns(prompt), "feedback": ["a", "b", "c"], **said} | changes


def edit_quality(prompt: str = "cat", **changes: Any) -> dict[str, Any]:
    """A row of HelpSteer3's ``edit_quality``."""
    said = {"original_response": "cat", "good_edited_response": "cat dog", "bad_edited_response": "cat pig"}
    return {**PLACE, "context": turns(prompt), "feedback": ["a", "b", "c"], **said} | changes


def principle(prompt: str = "cat", **changes: Any) -> dict[str, Any]:
    """A row of HelpSteer3's ``principle``."""
    said = {"response": "cat dog", "principle": "accuracy of the answer", "fulfilment": "Yes"}
    return {**PLACE, "context": turns(prompt), **said} | changes


def rated(prompt: str = "cat", response: str = "cat dog", helpfulness: Any = 3, **changes: Any) -> dict[str, Any]:
    """A row of HelpSteer or HelpSteer2."""
    others = {"correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **others} | changes


def disagreement(prompt: str = "cat", response: str = "cat dog", **changes: Any) -> dict[str, Any]:
    """A row of HelpSteer2's ``disagreements``."""
    marks = {"helpfulness": [3, 4, 3], "correctness": [4], "coherence": [4, 4], "complexity": [1, 2], "verbosity": [0]}
    return {"prompt": prompt, "response": response, **marks} | changes


def chosen(prompt: str = "cat", **changes: Any) -> dict[str, Any]:
    """A pair as OpenAI's messages."""
    answers = {"chosen": [{"role": "assistant", "content": "cat dog"}], "rejected": "cat pig"}
    return {"prompt": turns(prompt), **answers, "strength": 2} | changes


def messages(prompt: str = "cat", response: str = "cat dog", **ratings: Any) -> dict[str, Any]:
    """A rated response as OpenAI's messages."""
    return {"messages": [*turns(prompt), {"role": "assistant", "content": response}], "ratings": ratings}


def nemo(prompt: str = "cat", response: str = "cat dog", label: Any = "helpfulness:3,verbosity:1") -> dict[str, Any]:
    """A row of NeMo's conversations."""
    said = [
        {"from": "User", "value": prompt, "label": None},
        {"from": "Assistant", "value": response, "label": label},
    ]
    return {"system": SYSTEM, "mask": "User", "type": "VALUE_TO_TEXT", "conversations": said}


def nemo_text(prompt: str = "cat", response: str = "cat dog", **labels: float) -> dict[str, Any]:
    """A row that NeMo's reward trainers read."""
    said = f"<extra_id_0>System\n{SYSTEM}\n<extra_id_1>User\n{prompt}\n<extra_id_1>Assistant\n{response}\n<extra_id_2>"
    return {"text": said, "label": [float(labels.get(name, -100)) for name in NINE]}
