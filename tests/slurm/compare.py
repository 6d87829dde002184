"""Compare two runs except for their times: compare.py RUN REFERENCE"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TIMES = ("seconds/", "tokens_per_second/")


def numbers(run: Path) -> list[dict[str, object]]:
    """Lines of metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in lines]


def differences(run: Path, reference: Path) -> list[str]:
    """Where two runs differ, byte for byte."""
    lines = []
    ours, theirs = numbers(run), numbers(reference)
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        lines.append(f"steps {[line['step'] for line in ours]}, not {[line['step'] for line in theirs]}")
    for row, other in zip(ours, theirs, strict=False):
        lines += [f"step {row['step']}: {key}" for key in {*row, *other} if row.get(key) != other.get(key)]
    files = [Path("samples.jsonl"), *(path.relative_to(reference) for path in reference.glob("final/*.safetensors"))]
    lines += [str(file) for file in files if (run / file).read_bytes() != (reference / file).read_bytes()]
    return lines


if __name__ == "__main__":
    different = differences(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(different[:10]) or "the same")
    sys.exit(bool(different))
