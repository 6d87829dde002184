"""A small checkpoint with every kind of file, whose content is a function of the step."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from align import checkpoint
from align.config import CheckpointConfig
from align.utils import fault_injection

SHARDS = (
    "policy/rank-00000.safetensors",
    "policy/rank-00001.safetensors",
    "critic/rank-00000.safetensors",
    "policy/rng-00000.safetensors",
    "rollouts-0.safetensors",
)
TEXTS = ("policy/engine.json", "driver.json", "rounds/round-1.json")


def tensors(step: int, name: str) -> dict[str, torch.Tensor]:
    """Numbers that no other step and no other file has."""
    generator = torch.Generator().manual_seed(1000 * step + SHARDS.index(name))
    return {"weight": torch.randn(40, 40, generator=generator), "exp_avg": torch.randn(1600, generator=generator)}


def numbers(step: int, name: str) -> dict[str, list[int]]:
    """The same for a file of text, which is as long for each step."""
    return {name: [100_000 + 100 * step + TEXTS.index(name)] * 1500}


def write(partial: Path, step: int) -> tuple[checkpoint.FileRecord, ...]:
    """Write every file of a step."""
    shards = [checkpoint.write_tensors(partial, name, tensors(step, name)) for name in SHARDS]
    return (*shards, *(checkpoint.write_json(partial, name, numbers(step, name)) for name in TEXTS))


def manifest(step: int, files: tuple[checkpoint.FileRecord, ...], **changes) -> checkpoint.Manifest:
    """The manifest of a step, of three pages."""
    facts = {"world": {"policy": 2}, "fingerprints": [f"{step:06d}"] * 1200}
    fields = {"round": 1, "epoch": 0, "facts": facts, "metrics": {}} | changes
    return checkpoint.Manifest(checkpoint.SCHEMA, step, files=files, **fields)


def save(store: checkpoint.CheckpointStore, step: int, **changes) -> checkpoint.SavedCheckpoint:
    """Take a checkpoint; as the driver does, abandon it where that fails."""
    partial = store.begin(step, 0)
    try:
        return store.publish(partial, manifest(step, write(partial, step), epoch=store.epoch, **changes))
    except Exception:
        store.abandon(partial)
        raise


def check_whole(checkpoint: checkpoint.SavedCheckpoint) -> None:
    """Every file is that of the checkpoint's step."""
    step = checkpoint.manifest.step
    assert checkpoint.folder.name == f"step-{step:06d}"
    for name in SHARDS:
        found, wanted = load_file(checkpoint.path(name)), tensors(step, name)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    for name in TEXTS:
        assert json.loads(checkpoint.path(name).read_text()) == numbers(step, name)


def make_store(folder: Path, **settings) -> checkpoint.CheckpointStore:
    """A store whose reports are kept in ``notes``."""
    passed = {name: settings.pop(name) for name in ("epoch", "fence") if name in settings}
    notes: list[str] = []
    store = checkpoint.CheckpointStore(folder, CheckpointConfig(**settings), report=notes.append, **passed)
    store.notes = notes  # type: ignore[attr-defined]
    return store


def torsos(folder: Path) -> list[str]:
    """What is half-written or half-deleted."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(("partial-", "old-")))


@pytest.fixture(scope="session")
def small() -> SimpleNamespace:
    """The functions above."""
    functions: list[Callable] = [tensors, numbers, write, manifest, save, check_whole, make_store, torsos]
    return SimpleNamespace(SHARDS=SHARDS, TEXTS=TEXTS, **{function.__name__: function for function in functions})


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    fault_injection.arm(None)


@pytest.fixture
def without_fsync(monkeypatch):
    """Wait for no disk: what a process has written is there for the next one, also where it was killed."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
