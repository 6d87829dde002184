"""The manifest of a checkpoint, and the check that a folder matches its manifest.

``manifest.json`` is the only file without a record. It holds the sha256 of its own content and is accepted only in the
exact text in which it was written, so every change to it is detected.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from align.checkpoint.files import MANIFEST, FileRecord, is_plain
from align.errors import ConfigError

SCHEMA = 2
"""Version of the manifest and of what a checkpoint holds.

2: recipe keys and model fingerprints were renamed and changed.
"""
KEYS = {"schema": int, "step": int, "round": int, "epoch": int, "files": list, "facts": dict, "metrics": dict}
RECORD_KEYS = {"name": str, "size": int, "sha256": str}
READERS = 4
"""Files that are hashed in parallel."""


class DamagedError(Exception):
    """A folder that is not a valid checkpoint: which file, and why."""

    def __init__(self, file: str, reason: str):
        super().__init__(f"{file}: {reason}")
        self.file, self.reason = file, reason


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds, and when it was written."""

    schema: int
    """`SCHEMA` of the version that wrote it."""
    step: int
    """Steps that were done."""
    round: int
    """Round that this step belongs to."""
    epoch: int
    """Number of the owner of the run folder that wrote it."""
    files: tuple[FileRecord, ...]
    """Every file except the manifest."""
    facts: dict[str, Any]
    """JSON that a resume compares: versions, world sizes and ZeRO stages by role, fingerprints."""
    metrics: dict[str, float]
    """Metrics of the step, for `CheckpointConfig.best_by`."""

    def text(self) -> str:
        """The text of ``manifest.json``."""
        files = sorted((asdict(record) for record in self.files), key=lambda record: record["name"])
        metrics = {name: float(value) for name, value in self.metrics.items()}
        facts = json.loads(json.dumps(self.facts))  # as JSON returns them: keys are text, tuples are lists
        return sealed({**vars(self), "files": files, "facts": facts, "metrics": metrics})

    @classmethod
    def read(cls, text: bytes, where: Path) -> Manifest:
        """Parse the text of the file ``where``. Raises ValueError if it is damaged, `ConfigError` if it is intact but
        has another schema."""
        content = unsealed(text)
        if content.get("schema") != SCHEMA:
            message = f"has schema {content.get('schema')!r}, and this version of align reads {SCHEMA}"
            remedy = "resume with the version of align that wrote it, or start in a new run.dir"
            raise ConfigError(message, where=str(where), remedy=remedy)
        if content.keys() != KEYS.keys():
            raise ValueError(f"has the keys {', '.join(content)}, not {', '.join(KEYS)}")
        if wrong := [key for key, kind in KEYS.items() if type(content[key]) is not kind]:
            raise ValueError(f"{wrong[0]} is {content[wrong[0]]!r}, not of type {KEYS[wrong[0]].__name__}")
        if not all(type(value) is float for value in content["metrics"].values()):
            raise ValueError("metrics holds a value that is not a float")
        return cls(**{**content, "files": read_records(content["files"])})


def sealed(content: Mapping[str, Any]) -> str:
    """``content`` as the text of a manifest, with the sha256 of itself."""
    body = json.dumps(content, sort_keys=True)
    seal = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**content, "sha256": seal}, sort_keys=True, indent=2) + "\n"


def unsealed(text: bytes) -> dict[str, Any]:
    """The content of a sealed text. Raises ValueError if the text was changed."""
    try:
        content = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(content, dict) or "sha256" not in content:
        raise ValueError("is not a manifest: it has no sha256")
    del content["sha256"]
    if sealed(content).encode() != text:
        raise ValueError("was changed after it was written: its sha256 does not match")
    return content


def read_records(entries: Any) -> tuple[FileRecord, ...]:
    """The file records of a manifest. Raises ValueError."""
    if not isinstance(entries, list):
        raise ValueError("lists no files")
    files = tuple(_record(entry) for entry in entries)
    if len({record.name for record in files}) < len(files):
        raise ValueError("names a file twice")
    return files


def _record(entry: Any) -> FileRecord:
    if not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != RECORD_KEYS:
        raise ValueError(f"has a file without name, size and sha256: {entry!r}")
    if not is_plain(entry["name"]):
        raise ValueError(f"names a file outside the checkpoint: {entry['name']!r}")
    return FileRecord(**entry)


def name_of(step: int) -> str:
    """The folder's name of a step."""
    return f"step-{step:06d}"


def scan(folder: Path) -> tuple[dict[str, int], list[Path]]:
    """Sizes of all files below ``folder`` by name, and all folders, deepest first.

    Raises `DamagedError` for symbolic links and other special files, and for what another user owns or may write.
    """
    sizes: dict[str, int] = {}
    folders: list[Path] = []
    check_owner(folder, ".")
    try:
        for place, below, files in os.walk(folder, onerror=_raise):
            folders.insert(0, Path(place))
            for path in (Path(place, name) for name in (*below, *files)):
                name = path.relative_to(folder).as_posix()
                status = check_owner(path, name)
                if not stat.S_ISDIR(status.st_mode):
                    sizes[name] = status.st_size
    except OSError as error:
        raise DamagedError(str(error.filename), f"cannot be read: {error.strerror}") from error
    return sizes, folders


def _raise(error: OSError) -> None:
    raise error


def check_owner(path: Path, name: str) -> os.stat_result:
    """Raise `DamagedError` unless ``path`` is a file or folder that only this user or root can have written."""
    try:
        status = path.lstat()
    except OSError as error:
        raise DamagedError(name, f"cannot be read: {error.strerror}") from error
    if stat.S_ISLNK(status.st_mode):
        raise DamagedError(name, "is a symbolic link")
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise DamagedError(name, "is neither a file nor a folder")
    if status.st_uid not in (os.geteuid(), 0):
        raise DamagedError(name, f"belongs to user {status.st_uid}, not to user {os.geteuid()} or root")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise DamagedError(name, f"may be written by other users (mode {stat.S_IMODE(status.st_mode):04o})")
    return status


def compare(manifest: Manifest, sizes: Mapping[str, int]) -> None:
    """Raise `DamagedError` unless these are exactly the manifest's files, with their sizes."""
    for record in manifest.files:
        if record.name not in sizes:
            raise DamagedError(record.name, "is missing")
        if sizes[record.name] != record.size:
            raise DamagedError(record.name, f"has {sizes[record.name]} bytes, the manifest says {record.size}")
    if extra := sizes.keys() - {record.name for record in manifest.files}:
        raise DamagedError(min(extra), "is not in the manifest")


def inspect(folder: Path) -> Manifest:
    """The manifest of a published checkpoint, after comparing names and sizes of its files. Raises `DamagedError`.

    A manifest that is intact but of another version is not damage: `ConfigError`.
    """
    sizes, _ = scan(folder)
    if sizes.pop(MANIFEST, None) is None:
        raise DamagedError(MANIFEST, "is missing")
    try:
        manifest = Manifest.read((folder / MANIFEST).read_bytes(), folder / MANIFEST)
    except (OSError, ValueError) as error:
        raise DamagedError(MANIFEST, str(error)) from error
    compare(manifest, sizes)
    if folder.name != name_of(manifest.step):
        raise DamagedError(MANIFEST, f"is that of step {manifest.step}")
    return manifest


def verify(folder: Path) -> Manifest:
    """As `inspect`; also compares the sha256 of every file."""
    manifest = inspect(folder)
    with ThreadPoolExecutor(READERS) as pool:  # hashing releases the interpreter lock
        hashes = pool.map(lambda record: _sha256(folder, record.name), manifest.files)
        for record, sha256 in zip(manifest.files, hashes, strict=True):
            if sha256 != record.sha256:
                raise DamagedError(record.name, "its sha256 is not that of the manifest")
    return manifest


def read_file(folder: Path, name: str) -> bytes:
    """The content of one file of a published checkpoint, after its sha256 was compared. Reads no other file.

    Raises as `inspect` does.
    """
    record = next((record for record in inspect(folder).files if record.name == name), None)
    if record is None:
        raise DamagedError(name, "is not in the manifest")
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise DamagedError(name, f"cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise DamagedError(name, "its sha256 is not that of the manifest")
    return content


def sha256_of(file: BinaryIO) -> str:
    """sha256 of the rest of a file."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _sha256(folder: Path, name: str) -> str:
    try:
        with (folder / name).open("rb") as file:
            return sha256_of(file)
    except OSError as error:
        raise DamagedError(name, f"cannot be read: {error.strerror}") from error
