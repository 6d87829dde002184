"""`align toy` writes both versions of the task."""

from pathlib import Path

import pytest

from align.cli import main


@pytest.mark.parametrize("option", [[], ["--family"]])
def test_the_command_writes_a_folder_of_data(option: list[str], tmp_path: Path):
    assert main(["toy", str(tmp_path / "data"), "--train", "20", "--validation", "8", *option]) == 0
    assert (tmp_path / "data" / "preference" / "train.jsonl.gz").is_file()
    assert (tmp_path / "data" / "tokenizer").is_dir()
