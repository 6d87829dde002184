"""Checkpoints of a run: files that are hashed while they are written, and published all together or not at all."""

from align.checkpoint.files import FileRecord, write_bytes, write_json, write_tensors
from align.checkpoint.manifest import SCHEMA, Manifest, UnsoundError, read_file
from align.checkpoint.results import RESULT_MANIFEST, new_result, require_sound
from align.checkpoint.store import CheckpointStore, SavedCheckpoint, listed

__all__ = [
    "RESULT_MANIFEST",
    "SCHEMA",
    "CheckpointStore",
    "FileRecord",
    "Manifest",
    "SavedCheckpoint",
    "UnsoundError",
    "listed",
    "new_result",
    "read_file",
    "require_sound",
    "write_bytes",
    "write_json",
    "write_tensors",
]
