"""Score all items with a reward model, in a folder from which an interrupted evaluation resumes.

Each request appends its items to ``items.jsonl`` and syncs the file; ``manifest.json`` names the model and the items.
Resuming cuts off an incomplete last line, which a killed process may leave.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from align.data.chat import Dialogue
from align.data.rows import BadRow, parse_row
from align.errors import ConfigError, DataError, LockError, ModelError
from align.eval.items import Benchmark, Item
from align.utils.atomic_write import write_atomic

ITEMS, MANIFEST = "items.jsonl", "manifest.json"
RESPONSES_AT_ONCE = 128
"""Responses in a request for each rank; a killed process loses at most one request."""
PLAIN_LINES = 20

Score = Callable[[Sequence[Dialogue], Sequence[int]], Sequence[float]]
"""Function of conversations, and of the item index of each, that returns their scores."""


class Rows:
    """A file of JSON lines, open for appending."""

    def __init__(self, file: IO[bytes], path: Path):
        """Raises `DataError` for a damaged line; drops an incomplete last line."""
        self.path, self._file = path, file
        self.rows: list[dict[str, Any]] = []
        content = file.read()
        end = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:end].splitlines(), start=1):
            try:
                self._keep(parse_row(line))
            except (BadRow, KeyError, TypeError, ValueError) as error:
                remedy = "delete the folder and begin again, or give another one (--out)"
                raise DataError(f"is damaged: {error!r}", where=f"{path}:{number}", remedy=remedy) from None
        file.truncate(end)
        file.seek(end)

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows and sync the file to disk."""
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        for row in rows:
            self._keep(row)


class Store(Rows):
    """The scores in an output folder, open for appending."""

    def __init__(self, file: IO[bytes], path: Path):
        self.scores: dict[str, list[float]] = {}
        """Scores by item id, the right responses first."""
        super().__init__(file, path)

    def _keep(self, row: dict[str, Any]) -> None:
        self.scores[row["id"]] = [float(score) for score in row["scores"]]

    def add(self, scored: Sequence[tuple[Item, list[float]]], verdicts: bool = False) -> None:
        """Append the items with their scores and sync the file to disk."""
        more: dict[str, Any] = {"verdicts": True} if verdicts else {}
        self.write([item.record() | {"scores": scores} | more for item, scores in scored])


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """The locked file, new or existing, open at its start. Raises `LockError` if another process holds the lock, and
    `ConfigError` if the folder cannot be created."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem, remedy = f"cannot be made a folder: {error.strerror}", "give another folder to write to (--out)"
        raise ConfigError(problem, where=str(path.parent), remedy=remedy) from None
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LockError("another process writes here", where=str(path), remedy="wait for it") from error
        file.seek(0)
        yield file


def agree(files: Sequence[Path], manifest: Mapping[str, Any], holds: str) -> None:
    """Write the manifest if all files are empty. Raises `ConfigError` if the folder ``holds`` results of another model
    or other items."""
    folder = files[0].parent
    begun = [file.name for file in files if file.is_file() and file.stat().st_size]
    expected = json.loads(json.dumps(manifest))
    if not begun:
        write_atomic(folder / MANIFEST, json.dumps(expected, indent=2, ensure_ascii=False) + "\n")
        return
    stored = _manifest(folder / MANIFEST)
    if stored is None:
        remedy = "give another folder (--out); a file of scores is given with --scores"
        raise ConfigError(f"the folder has {begun[0]} but no {MANIFEST}", where=str(folder), remedy=remedy)
    for name in {**expected, **stored}:
        if stored.get(name) != expected.get(name):
            problem = f"the folder holds {holds} of another {name}: {stored.get(name)!r}, not {expected.get(name)!r}"
            remedy = "give another folder (--out), or delete this one"
            raise ConfigError(problem, where=str(folder), remedy=remedy)


@contextmanager
def opened(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Store]:
    """Open the store of a new or existing folder.

    Raises `ConfigError` if the folder holds scores of another model or of other items, and `LockError` if another
    process writes there.
    """
    with locked(folder / ITEMS) as file:
        agree([folder / ITEMS], manifest, "scores")
        yield Store(file, folder / ITEMS)


def _manifest(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return parse_row(path.read_bytes())
    except BadRow as error:
        remedy = "delete the folder and begin again, or give another one (--out)"
        raise DataError(f"is damaged: {error}", where=str(path), remedy=remedy) from None


def waiting(benchmark: Benchmark, store: Store) -> list[Item]:
    """The items that have no scores yet."""
    return [item for item in benchmark.items if item.id not in store.scores]


def requests(items: Sequence[Item], most: int) -> Iterator[list[Item]]:
    """Split the items, in order, into batches of at most ``most`` responses and at least one item."""
    batch: list[Item] = []
    for item in items:
        if batch and sum(other.num_responses for other in batch) + item.num_responses > most:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def complete(benchmark: Benchmark, store: Store, score: Score, most: int, console: Console) -> None:
    """Score the items without scores. Raises `ModelError` if items get no finite score; they are not written, so the
    next call scores them again."""
    left, failed = waiting(benchmark, store), 0
    done = len(benchmark.items) - len(left)
    with progress(console, benchmark.name, done, len(benchmark.items)) as advance:
        for batch in requests(left, most):
            dialogues = [dialogue for item in batch for dialogue in item.dialogues]
            scores = iter(score(dialogues, [i for i, item in enumerate(batch) for _ in item.responses]))
            scored = [(item, [float(next(scores)) for _ in item.responses]) for item in batch]
            finite = [(item, values) for item, values in scored if all(map(math.isfinite, values))]
            failed += len(scored) - len(finite)
            store.add(finite)
            advance(len(scored))
    if failed:
        raise ModelError(
            f"{failed} of {len(benchmark.items)} items have no finite score",
            where=str(store.path),
            remedy="the others are kept; the same command asks for these again",
        )


@contextmanager
def progress(console: Console, name: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal, else print a line for each 5 %; yields a function that counts items."""
    if console.is_terminal:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(name, total=total, completed=done)
            yield lambda count: bar.advance(task, count)
        return
    if done:
        console.print(f"{name}: {done} of {total} items are done already", highlight=False)

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if before * PLAIN_LINES // total < done * PLAIN_LINES // total:
            console.print(f"{name}: {done} of {total} items", highlight=False)

    yield advance
