"""Checkpoints of a run: files that are hashed while they are written, and published together or not at all."""

from align.checkpoint.files import FileRecord, write_bytes, write_json, write_tensors
from align.checkpoint.manifest import SCHEMA, DamagedError, Manifest, read_file
from align.checkpoint.results import RESULT_MANIFEST, new_result, verify_result
from align.checkpoint.store import CheckpointStore, SavedCheckpoint, list_folder

__all__ = [
    "RESULT_MANIFEST",
    "SCHEMA",
    "CheckpointStore",
    "DamagedError",
    "FileRecord",
    "Manifest",
    "SavedCheckpoint",
    "list_folder",
    "new_result",
    "read_file",
    "verify_result",
    "write_bytes",
    "write_json",
    "write_tensors",
]
