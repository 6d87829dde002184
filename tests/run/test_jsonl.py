"""Files that grow by a line at a time: on a full disk, cut back, and taken over."""

import errno
import json
import math
import os
from pathlib import Path

import pytest

from align.errors import LockError, SaveError
from align.run.jsonl import JsonLines
from align.utils import fault_injection
from align.utils.atomic_write import copy_folder


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def lines(tmp_path: Path, notes: list[str]):
    made = JsonLines(tmp_path / "metrics.jsonl", notes.append)
    made.open()
    yield made
    made.close()
    fault_injection.arm(None)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_is_there_when_append_returns(lines: JsonLines):
    for step in (1, 2, 3):
        lines.append({"step": step}, step)
        assert steps(lines.path) == list(range(1, step + 1))


def test_numbers_that_json_does_not_know_are_words_also_inside(lines: JsonLines):
    lines.append({"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": "ü", "e": 1.5}, 1)
    assert json.loads(lines.path.read_text()) == {"a": "nan", "b": ["inf", {"c": "-inf"}], "d": "ü", "e": 1.5}


@pytest.mark.parametrize("kind", ["enospc", "eio", "erofs"])
def test_what_the_disk_refuses_comes_with_the_next_line(kind: str, lines: JsonLines, notes: list[str]):
    fault_injection.arm(f"role=driver,phase=metrics,step=2,kind={kind}")
    for step in (1, 2):
        lines.append({"step": step}, step)
    assert steps(lines.path) == [1]
    assert notes == [f"{lines.path}: {os.strerror(getattr(errno, kind.upper()))}; 1 lines wait in memory"]
    lines.append({"step": 3}, 3)
    assert steps(lines.path) == [1, 2, 3]


class Full:
    """A file on a disk with room for some bytes."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def test_half_a_line_never_stays(lines: JsonLines):
    lines.append({"step": 1}, 1)
    lines._file = full = Full(lines._file, room=5)
    lines.append({"step": 2}, 2)
    assert lines.path.read_bytes() == b'{"step": 1}\n'
    with pytest.raises(SaveError, match="No space left"):
        lines.sync()
    full.room = 1000
    assert lines.sync() == len(b'{"step": 1}\n{"step": 2}\n')
    assert steps(lines.path) == [1, 2]


def test_cut_back_to_a_length_that_was_noted(lines: JsonLines):
    lines.append({"step": 1}, 1)
    end = lines.sync()
    lines.append({"step": 2}, 2)
    lines.close()
    lines.open(end)
    lines.append({"step": 2, "again": True}, 2)
    assert steps(lines.path) == [1, 2]
    assert "again" in lines.path.read_text()


def test_an_old_writer_cannot_spoil_the_new_file(tmp_path: Path, lines: JsonLines):
    lines.append({"step": 1}, 1)
    new = JsonLines(lines.path, print)
    new.open(lines.sync())
    lines.append({"step": 99}, 99)  # into a file that has no name any more
    new.append({"step": 2}, 2)
    new.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_a_file_that_is_shorter_than_noted_is_said_to_be(lines: JsonLines, notes: list[str]):
    lines.append({"step": 1}, 1)
    lines.close()
    lines.open(1000)
    assert "is shorter than it was at the checkpoint" in notes[0]
    assert steps(lines.path) == [1]


def test_lines_of_another_run_are_copied_up_to_there(tmp_path: Path, lines: JsonLines):
    source = tmp_path / "other.jsonl"
    source.write_text('{"step": 1}\n{"step": 2}\n')
    lines.close()
    lines.open(12, source)
    lines.append({"step": 5}, 5)
    assert steps(lines.path) == [1, 5]
    assert steps(source) == [1, 2]


def test_a_copied_folder_is_whole_or_not_there(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("x")
    (tmp_path / "z.partial").mkdir()
    copy_folder(tmp_path / "a", tmp_path / "z")
    assert (tmp_path / "z" / "b" / "c").read_text() == "x"
    assert not (tmp_path / "z.partial").exists()
    copy_folder(tmp_path / "nowhere", tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_a_file_that_was_taken_over_gets_no_line(tmp_path: Path):
    def fence() -> None:
        raise LockError("taken over")

    lines = JsonLines(tmp_path / "metrics.jsonl", print, fence)
    lines.open()
    with pytest.raises(LockError):
        lines.append({"step": 1}, 1)
    lines.close()
    assert lines.path.read_bytes() == b""
