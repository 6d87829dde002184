"""Snapshots of a run: files that are hashed while they are written, and published all together or not at all."""

from align.checkpoint.files import FileRecord, write_bytes, write_json, write_tensors
from align.checkpoint.manifest import SCHEMA, Manifest
from align.checkpoint.snapshots import Snapshot, Snapshots

__all__ = [
    "SCHEMA",
    "FileRecord",
    "Manifest",
    "Snapshot",
    "Snapshots",
    "write_bytes",
    "write_json",
    "write_tensors",
]
