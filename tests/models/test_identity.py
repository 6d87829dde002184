"""The fingerprint of a model changes with its weights, and not with how it is run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from align.config import ModelConfig, PolicyConfig
from align.models import identity
from align.models.identity import model_fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of two weight files."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    for number in (1, 2):
        save_file({"w": torch.full((4,), float(number))}, tmp_path / "model" / f"model-{number}-of-2.safetensors")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"an older format")
    (tmp_path / "model" / "README.md").write_text("hello")
    return tmp_path / "model"


def test_the_same_model_has_one_fingerprint(folder: Path):
    key = model_fingerprint(ModelConfig(path=str(folder)), 0)
    assert len(key) == 64
    assert key == model_fingerprint(ModelConfig(path=str(folder)), 0)
    # What the numbers do not depend on: the file's date, how the model is run, other files, the seed of a run.
    os.utime(folder / "config.json", (0, 0))
    (folder / "README.md").write_text("another")
    assert key == model_fingerprint(ModelConfig(path=str(folder), max_tokens_per_micro_batch=7, zero_stage=3), 1)
    copy = folder.with_name("copy")
    folder.rename(copy)
    assert key == model_fingerprint(ModelConfig(path=str(copy)), 0)


@pytest.mark.parametrize(
    "name", ["config.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors", "pytorch_model.bin"]
)
def test_other_weights_have_another_key(folder: Path, name: str):
    before = model_fingerprint(ModelConfig(path=str(folder)), 0)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert model_fingerprint(ModelConfig(path=str(folder)), 0) != before


def test_weights_under_another_name_have_another_key(folder: Path):
    before = model_fingerprint(ModelConfig(path=str(folder)), 0)
    (folder / "model-2-of-2.safetensors").rename(folder / "other.safetensors")
    assert model_fingerprint(ModelConfig(path=str(folder)), 0) != before


def test_random_weights_are_known_by_their_architecture_and_seed(folder: Path):
    init = {"model_type": "llama", "hidden_size": 32}
    key = model_fingerprint(ModelConfig(path=str(folder), init=init), 0)
    assert key == model_fingerprint(ModelConfig(path="elsewhere", init=dict(reversed(init.items()))), 0)
    others = [
        model_fingerprint(ModelConfig(path=str(folder), init=init), 1),
        model_fingerprint(ModelConfig(path=str(folder), init=init | {"hidden_size": 64}), 0),
        model_fingerprint(ModelConfig(path=str(folder)), 0),
    ]
    assert len({key, *others}) == 4


def test_a_hub_id_is_known_by_the_commit_it_resolves_to(monkeypatch: pytest.MonkeyPatch):
    commits = {None: "aaa", "v1": "aaa", "v2": "bbb"}
    monkeypatch.setattr(
        identity, "cached_file", lambda path, name, revision: f"/hub/models--x/snapshots/{commits[revision]}/{name}"
    )
    keys = {rev: model_fingerprint(ModelConfig(path="x/y", revision=rev), 0) for rev in commits}
    assert keys[None] == keys["v1"] != keys["v2"]
    assert model_fingerprint(ModelConfig(path="x/z"), 0) != keys[None]


def test_a_policy_is_known_by_its_weights_and_not_by_how_it_is_trained(folder: Path):
    assert model_fingerprint(PolicyConfig(path=str(folder)), 0) == model_fingerprint(ModelConfig(path=str(folder)), 0)
