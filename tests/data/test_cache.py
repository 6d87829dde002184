"""Numbers kept on disk: found again only for the same model and the same pairs, and never half written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.data import cache
from align.data.cache import cache_key, cached_logprobs
from align.errors import DataError, SaveError
from align.types import Packed, Sequences


def sequences(responses: list[list[int]] | None = None, prompts: list[list[int]] | None = None) -> Sequences:
    responses = responses or [[7], [8, 8], [9, 9, 9], [10]]
    return Sequences(
        Packed.from_lists(prompts or [[1, 2], [3]]), Packed.from_lists(responses), torch.tensor([0, 0, 1, 1])
    )


class Counting:
    """Gives each response the sum of its ids, and counts what it is asked."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, asked: Sequences) -> Tensor:
        self.sizes.append(len(asked))
        return torch.tensor([float(sum(row)) for row in asked.responses.lists()])


# Key


def test_the_key_is_one_of_model_dtype_and_sequences():
    key = cache_key("a model", "float32", sequences())
    assert len(key) == 64 and key == cache_key("a model", "float32", sequences())
    assert len({key, cache_key("another", "float32", sequences()), cache_key("a model", "bfloat16", sequences())}) == 3


@pytest.mark.parametrize(
    "other",
    [
        sequences([[7], [8, 8], [9, 9, 9], [11]]),  # another token
        sequences([[7], [8], [8, 9, 9, 9], [10]]),  # the same tokens, cut elsewhere
        sequences([[8, 8], [7], [9, 9, 9], [10]]),  # another order
        sequences(prompts=[[1], [2, 3]]),
        Sequences(sequences().prompts, sequences().responses, torch.tensor([0, 1, 1, 1])),  # another prompt
        sequences().select(torch.tensor([0, 1])),
    ],
    ids=["token", "cut", "order", "prompts", "prompt of a response", "fewer"],
)
def test_other_pairs_have_another_key(other: Sequences):
    assert cache_key("a model", "float32", other) != cache_key("a model", "float32", sequences())


# What is cached


def test_a_miss_computes_and_a_hit_reads(tmp_path: Path):
    model, place = Counting(), str(tmp_path / "deep" / "cache")
    first = cached_logprobs(place, "key", sequences(), model)
    assert first.tolist() == [7, 16, 27, 10]
    second = cached_logprobs(place, "key", sequences(), model)
    assert second.equal(first)
    assert model.sizes == [4]
    assert [path.name for path in (tmp_path / "deep" / "cache").iterdir()] == ["key.safetensors"]
    assert load_file(tmp_path / "deep" / "cache" / "key.safetensors")["logprob_B"].equal(first)
    assert cached_logprobs(place, "other", sequences(), model).equal(first)
    assert model.sizes == [4, 4]


def test_every_bit_comes_back(tmp_path: Path):
    numbers = torch.randn(4) * 100
    for _ in range(2):
        assert cached_logprobs(str(tmp_path), "key", sequences(), lambda _: numbers).equal(numbers)


def test_the_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cached_logprobs("~/cache", "key", sequences(), Counting())
    assert (tmp_path / "cache" / "key.safetensors").is_file()


def test_large_data_is_asked_for_in_parts_that_part_no_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert cache.CHUNK % 2 == 0
    monkeypatch.setattr(cache, "CHUNK", 2)
    model = Counting()
    assert cached_logprobs(str(tmp_path), "key", sequences(), model).tolist() == [7, 16, 27, 10]
    assert model.sizes == [2, 2]


@pytest.mark.parametrize("content", [b"", b"not a file of numbers", None])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, content: bytes | None):
    model, file = Counting(), tmp_path / "key.safetensors"
    cached_logprobs(str(tmp_path), "key", sequences(), model)
    file.write_bytes(file.read_bytes()[:-4] if content is None else content)  # cut off, or something else
    with pytest.raises(DataError, match="the cache is damaged") as caught:
        cached_logprobs(str(tmp_path), "key", sequences(), model)
    assert str(file) in str(caught.value)
    assert "delete the file" in str(caught.value)
    assert model.sizes == [4]
    file.unlink()
    cached_logprobs(str(tmp_path), "key", sequences(), model)
    assert model.sizes == [4, 4]


def test_a_file_of_another_content_is_an_error(tmp_path: Path):
    save_file({"something": torch.zeros(4)}, tmp_path / "key.safetensors")
    with pytest.raises(DataError, match="damaged"):
        cached_logprobs(str(tmp_path), "key", sequences(), Counting())
    save_file({"logprob_B": torch.zeros(3)}, tmp_path / "short.safetensors")
    with pytest.raises(DataError, match="has 3 values, but the data has 4"):
        cached_logprobs(str(tmp_path), "short", sequences(), Counting())
    cached_logprobs(str(tmp_path), "flipped", sequences(), Counting())
    content = bytearray((tmp_path / "flipped.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="damaged: its sha256 does not match"):
        cached_logprobs(str(tmp_path), "flipped", sequences(), Counting())


def test_a_computation_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "CHUNK", 2)

    def fail_in_the_second_part(asked: Sequences) -> Tensor:
        if asked.responses.lists()[0] == [9, 9, 9]:
            raise RuntimeError("killed")
        return torch.zeros(len(asked))

    with pytest.raises(RuntimeError, match="killed"):
        cached_logprobs(str(tmp_path), "key", sequences(), fail_in_the_second_part)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_is_cut_short_is_not_taken_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(SaveError, match="disk full"):
            cached_logprobs(str(tmp_path), "key", sequences(), Counting())
    assert list(tmp_path.iterdir()) == []
    model = Counting()
    assert cached_logprobs(str(tmp_path), "key", sequences(), model).tolist() == [7, 16, 27, 10]
    assert model.sizes == [4]
