"""JSON Lines files that grow line by line; a resumed run truncates them to their length at the checkpoint."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from align.errors import SaveError
from align.utils import fault_injection
from align.utils.atomic_write import open_atomic
from align.utils.disk import open_file, saving

CHUNK_BYTES = 1 << 20


class JsonLines:
    """One JSON object per line, each appended completely or not at all.

    A line that the disk refuses stays in memory and is written with the next one, so a full disk loses no line while
    the run lives. `sync`, which a checkpoint needs, raises.
    """

    def __init__(self, path: Path, report: Callable[[str], None], fence: Callable[[], None] = lambda: None):
        """``report`` prints a line for the user; ``fence`` raises if another process owns the file."""
        self.path, self._report, self._fence = path, report, fence
        self._waiting: list[bytes] = []
        self._file: FileIO | None = None

    def open(self, end: int = 0, source: Path | None = None) -> None:
        """Start to append after the first ``end`` bytes of ``source`` (default: the file itself).

        The file is rewritten, so a process that still has the old one open cannot damage it. Raises `ConfigError` if
        the source cannot be read, and as `saving` does.
        """
        source = source or self.path
        with saving(self.path):
            if os.path.lexists(source) or end:
                self._rewrite(source, end)
            self._waiting.clear()
            self._file = FileIO(self.path, "ab")
            self._end = os.fstat(self._file.fileno()).st_size

    def _rewrite(self, source: Path, end: int) -> None:
        with open_atomic(self.path) as new:
            if os.path.lexists(source):
                with open_file(source) as old:
                    while new.tell() < end and (piece := old.read(min(CHUNK_BYTES, end - new.tell()))):
                        new.write(piece)
            if new.tell() < end:
                self._report(f"{source} is shorter than it was at the checkpoint; its last lines are lost")
                new.seek(0)
                new.truncate(new.read().rfind(b"\n") + 1)

    def append(self, line: Mapping[str, Any], step: int) -> None:
        """Write a line, after those that wait in memory. Raises what ``fence`` raises."""
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
                while done < len(line):  # a nearly full disk accepts a part of the line
                    done += self._file.write(line[done:])
            except OSError:
                self._file.truncate(self._end)
                raise
            self._end += done
            self._waiting.pop(0)

    def sync(self) -> int:
        """Write what waits, and fsync; returns the length in bytes. Raises `SaveError`."""
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
        """Write what waits, and close the file."""
        if self._file is None:
            return
        try:
            self._flush()
        except OSError as error:
            self._report(f"{self.path}: {error.strerror}; {len(self._waiting)} lines are lost")
        self._file.close()


def finite(line: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that are not finite as text, since JSON cannot hold them; in lists of mappings too."""
    return {name: _as_text_if_not_finite(value) for name, value in line.items()}


def _as_text_if_not_finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [finite(item) if isinstance(item, Mapping) else _as_text_if_not_finite(item) for item in value]
    return value
