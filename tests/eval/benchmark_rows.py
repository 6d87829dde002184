"""Rows of every benchmark as its authors publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rm_row(number: int, **changes: Any) -> dict[str, Any]:
    chosen, rejected = ([f"{kind}{number}" * n for n in (1, 2, 3)] for kind in ("good", "bad"))
    return {"id": number, "prompt": f"question {number}?", "chosen": chosen, "rejected": rejected, **changes}


def judge_row(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "pair_id": f"pair-{number}",
        "source": "mmlu-pro-law" if number % 2 else "livecodebench",
        "question": f"question {number}?",
        "response_A": f"answer {number}",
        "response_B": f"another answer {number}",
        "label": "A>B" if number % 3 else "B>A",
        **changes,
    }


def reward_row(number: int, **changes: Any) -> dict[str, Any]:
    subset = ("alpacaeval-easy", "hep-go")[number % 2]
    row = {"id": number, "prompt": f"question {number}?", "chosen": "yes", "rejected": "no", "subset": subset}
    return row | changes


def reward2_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {"id": str(number), "prompt": f"question {number}?", "chosen": ["yes"], "rejected": ["no", "nay", "never"]}
    return row | {"num_correct": 1, "subset": "Math"} | changes
