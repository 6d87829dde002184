"""Files that grow by a line at a time, and that a resumed run cuts back to where its checkpoint was taken."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from align.errors import SaveError
from align.utils import fault_injection
from align.utils.disk import open_file, saving

CHUNK = 1 << 20


class JsonLines:
    """One JSON object a line, appended whole or not at all.

    A line that the disk does not take stays in memory and is tried again with the next one, so that a full disk costs
    no line while the run lives; `sync`, which a checkpoint needs, raises.
    """

    def __init__(self, path: Path, report: Callable[[str], None], fence: Callable[[], None] = lambda: None):
        """``report`` gets lines for the user; ``fence`` raises when another process owns the file."""
        self.path, self._report, self._fence = path, report, fence
        self._waiting: list[bytes] = []
        self._file: FileIO | None = None

    def open(self, end: int = 0, source: Path | None = None) -> None:
        """Begin to append after the first ``end`` bytes of ``source``, which is the file itself where none is given.

        The file is written anew, so that a process which still has the old one open cannot spoil it. Raises
        `ConfigError` where the source cannot be read, and as `saving` does.
        """
        source = source or self.path
        with saving(self.path):
            if os.path.lexists(source) or end:
                self._rewrite(source, end)
            self._waiting.clear()
            self._file = FileIO(self.path, "ab")
            self._end = os.fstat(self._file.fileno()).st_size

    def _rewrite(self, source: Path, end: int) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.unlink(missing_ok=True)
        with partial.open("w+b") as new:
            if os.path.lexists(source):
                with open_file(source) as old:
                    _copy(old, new, end)
            if new.tell() < end:
                self._report(f"{source} is shorter than it was at the checkpoint; its last lines are lost")
                new.seek(0)
                new.truncate(new.read().rfind(b"\n") + 1)
            new.flush()
            os.fsync(new.fileno())
        os.replace(partial, self.path)

    def append(self, line: Mapping[str, Any], step: int) -> None:
        """Write one line, and those that wait. Raises what the fence raises."""
        self._fence()
        self._waiting.append((json.dumps(finite(line), ensure_ascii=False) + "\n").encode())
        try:
            fault_injection.maybe_inject("driver", 0, "metrics", step)
            self._flush()
        except OSError as error:
            self._report(f"{self.path}: {error.strerror}; {len(self._waiting)} lines wait in memory")

    def _flush(self) -> None:
        assert self._file is not None, "open comes first"
        while self._waiting:
            line, done = self._waiting[0], 0
            try:
                while done < len(line):  # a disk that is nearly full takes a part first
                    done += self._file.write(line[done:])
            except OSError:
                self._file.truncate(self._end)
                raise
            self._end += done
            self._waiting.pop(0)

    def sync(self) -> int:
        """Bring everything to the disk; returns the length in bytes. Raises `SaveError`."""
        try:
            self._flush()
            assert self._file is not None
            os.fsync(self._file.fileno())
        except OSError as error:
            raise SaveError(
                f"cannot be written: {error.strerror}", where=str(self.path), remedy="make room on that disk"
            ) from error
        return self._end

    def close(self) -> None:
        """Write what waits, and end."""
        if self._file is None:
            return
        try:
            self._flush()
        except OSError as error:
            self._report(f"{self.path}: {error.strerror}; {len(self._waiting)} lines are lost")
        self._file.close()


def _copy(old: Any, new: Any, end: int) -> None:
    left = end
    while left and (piece := old.read(min(CHUNK, left))):
        new.write(piece)
        left -= len(piece)


def finite(line: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that are not finite as text, since JSON has no word for them; within lists of mappings too."""
    return {name: _word(value) for name, value in line.items()}


def _word(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [finite(item) if isinstance(item, Mapping) else _word(item) for item in value]
    return value


def copy_tree(source: Path, target: Path) -> None:
    """A copy of a folder beside a name, renamed when it is whole; nothing where there is no source."""
    if not source.is_dir() or target.exists():
        return
    partial = target.with_name(target.name + ".partial")
    with saving(target):
        shutil.rmtree(partial, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, partial)
        os.rename(partial, target)
