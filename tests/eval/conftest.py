"""Small benchmarks, and real ones where they are at hand. Lets the tests of this folder import `benchmark_rows`."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from benchmark_rows import judge_row, lines


@pytest.fixture
def judge_data(tmp_path: Path) -> Path:
    """JudgeBench with eight pairs."""
    return lines(tmp_path / "judgebench" / "gpt.jsonl", [judge_row(n) for n in range(8)]).parent


@pytest.fixture
def shared() -> Path:
    """Real benchmarks, read in place where they are at hand."""
    default = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("ALIGN_SHARED_DATA", default))
    if not (folder / "judgebench").is_dir():
        pytest.skip(f"no folder {folder}/judgebench (ALIGN_SHARED_DATA)")
    return folder
