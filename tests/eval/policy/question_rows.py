"""Rows of every benchmark of policies as its authors publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arena_row(number: int, **changes: Any) -> dict[str, Any]:
    category = "hard_prompt" if number % 3 else "creative_writing"
    return {"uid": f"u{number}", "category": category, "subcategory": "x", "prompt": f"question {number}?"} | changes


def old_arena_row(number: int) -> dict[str, Any]:
    turns = [{"content": f"question {number}?"}]
    return {"question_id": f"u{number}", "category": "arena-hard-v0.1", "cluster": "c", "turns": turns}


def mt_row(number: int, **changes: Any) -> dict[str, Any]:
    category = ("writing", "math")[number % 2]
    turns = [f"question {number}?", f"and {number} again?"]
    return {"question_id": 81 + number, "category": category, "turns": turns} | changes


def reference_row(number: int) -> dict[str, Any]:
    turns = [f"right {number}", f"right again {number}"]
    return {
        "question_id": 81 + number,
        "answer_id": "x",
        "model_id": "gpt-4",
        "choices": [{"index": 0, "turns": turns}],
    }


def wild_row(number: int, **changes: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": "hello", "toxic": False}, {"role": "assistant", "content": "hi"}]
    return {
        "id": f"s{number}",
        "session_id": f"s{number}",
        "conversation_input": [*(said if number % 2 else []), {"role": "user", "content": f"question {number}?"}],
        "checklist": ["Is it right?", "Is it short?"],
        "primary_tag": ("Math", "Editing")[number % 2],
        "secondary_tags": [["Data Analysis", "Planning"], []][number % 2],
    } | changes


def arena_answer(number: int, words: str) -> dict[str, Any]:
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": {"answer": words}}]
    return {"uid": f"u{number}", "ans_id": "x", "model": "m", "messages": said, "metadata": {"token_len": 3}}
