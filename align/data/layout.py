"""Which files of a data source hold which split. Loads neither torch nor ``datasets``.

A source is a file, a folder of files, a folder that ``datasets`` wrote with ``save_to_disk`` (a `Dataset` or a
`DatasetDict`), or a hub id.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from align.errors import DataError

TRAIN = ("train", "training")
VALIDATION = ("validation", "valid", "val", "dev", "eval", "test")
"""Names of a split of each kind; of several the first is taken."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
_SHARD = r"(?:[-_.]?(?:part)?[-_.]?\d+(?:-of-\d+)?)?"
"""What may follow the name of a split: ``train-00000-of-00002``."""


def match_splits(names: Iterable[str]) -> dict[str, str]:
    """Which of ``names`` are ``train`` and ``validation``; those that are neither are left out."""
    by_name = {name.lower(): name for name in names}
    kinds = {"train": TRAIN, "validation": VALIDATION}
    matches = {kind: [by_name[name] for name in aliases if name in by_name] for kind, aliases in kinds.items()}
    return {kind: several[0] for kind, several in matches.items() if several}


def find_split_files(path: str) -> dict[str, list[Path]] | None:
    """The files of ``train`` and ``validation``, or the folders that ``save_to_disk`` wrote; a split without a file is
    left out. None if there is no such path. Raises `DataError` for files that do not say which split they are."""
    place = Path(path).expanduser()
    if place.is_file():
        if not place.name.endswith(SUFFIXES):
            remedy = f"use a file with one of these suffixes: {', '.join(SUFFIXES)}"
            raise DataError("cannot be read as a data source", where=str(place), remedy=remedy)
        return {"train": [place]}
    if not place.is_dir():
        return None
    if (place / "dataset_dict.json").is_file():
        names = json.loads((place / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        splits = {kind: [place / name] for kind, name in match_splits(names).items()}
        if "train" not in splits:
            raise DataError(
                f"split train is missing. Splits: {', '.join(names)}", where=path, remedy="rename one to train"
            )
        return splits
    if (place / "state.json").is_file() and (place / "dataset_info.json").is_file():
        return {"train": [place]}
    return _by_name(place)


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """Files of a folder, of its folder ``data``, and of folders that are called as a split."""
    files: dict[str, list[Path]] = defaultdict(list)
    for file in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        stem = file.name.partition(".")[0]
        inner = "" if file.parent == folder else file.parent.name
        own = _label(stem)
        if not file.is_file() or not file.name.endswith(SUFFIXES) or stem.startswith("."):
            continue
        if inner in ("", "data") and (own or not file.name.endswith(".json")):
            files[own].append(file)
        elif inner in TRAIN + VALIDATION:
            files[inner].append(file)
    unnamed = files.pop("", [])
    splits = {kind: files[name] for kind, name in match_splits(files).items()}
    if "train" not in splits and unnamed:
        splits["train"] = unnamed
    for split, several in splits.items():
        kinds = sorted({suffix for file in several for suffix in SUFFIXES if file.name.endswith(suffix)})
        if len(kinds) > 1:
            names = ", ".join(file.name for file in several[:4])
            remedy = "keep one of them, or set data.path to one file"
            raise DataError(
                f"split {split} exists in several file types, {' and '.join(kinds)}: {names}",
                where=str(folder),
                remedy=remedy,
            )
    return splits


def _label(stem: str) -> str:
    """The name of the split that a file is called after; empty for none."""
    match = re.fullmatch(rf"({'|'.join(TRAIN + VALIDATION)}){_SHARD}", stem, re.IGNORECASE)
    return match[1].lower() if match else ""


def format_files(files: Sequence[Path]) -> str:
    """Files in a line."""
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
