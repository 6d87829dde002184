"""Files are what the safetensors library reads, and their records are what other hash functions say."""

import hashlib
import json
import math
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from align import checkpoint
from align.errors import SaveError

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def read(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - not a mapping


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,), (3, 5), (2, 3, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_every_dtype_and_shape_reads_back_bit_for_bit(tmp_path, dtype, shape):
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape)
    checkpoint.write_tensors(tmp_path, "x.safetensors", {"tensor": tensor})
    found, metadata = read(tmp_path / "x.safetensors")
    assert found.keys() == {"tensor"} and same_bits(found["tensor"], tensor)
    assert metadata is None


def test_many_dtypes_in_one_file_read_back_and_each_is_aligned_to_its_elements(tmp_path):
    tensors = {f"{i}-{dtype}": torch.ones(i + 1, dtype=dtype) for i, dtype in enumerate(reversed(DTYPES))}
    tensors["ünï|exp_avg|0"] = torch.tensor([-0.0, math.inf, math.nan])
    checkpoint.write_tensors(tmp_path, "a/b/x.safetensors", tensors, {"format": "pt", "step": "40"})
    path = tmp_path / "a/b/x.safetensors"
    found, metadata = read(path)
    assert found.keys() == tensors.keys() and all(same_bits(found[name], tensors[name]) for name in tensors)
    assert metadata == {"format": "pt", "step": "40"}
    text = path.read_bytes()
    length = int.from_bytes(text[:8], "little")
    header = json.loads(text[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensors[name].element_size() == 0 for name in tensors)


def test_the_bytes_are_those_of_the_library(tmp_path):
    tensors = {name: torch.randn(3, 5).to(dtype) for name, dtype in zip("abc", DTYPES[:3], strict=True)}
    checkpoint.write_tensors(tmp_path, "ours", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_no_tensors_are_a_file_as_well(tmp_path):
    checkpoint.write_tensors(tmp_path, "x", {})
    assert read(tmp_path / "x") == ({}, None)


def test_views_parameters_and_transposes_are_written_as_what_they_show(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"row": whole[2], "transpose": whole.T, "step": whole[::2], "parameter": torch.nn.Parameter(whole)}
    checkpoint.write_tensors(tmp_path, "x", tensors)
    found, _ = read(tmp_path / "x")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("num_bytes", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20 + 5])
def test_records_have_the_size_and_sha256_of_the_file(tmp_path, num_bytes):
    content = os.urandom(num_bytes)
    records = [
        checkpoint.write_bytes(tmp_path, "bytes", content),
        checkpoint.write_tensors(
            tmp_path, "p/tensors", {"x": torch.frombuffer(bytearray(content or b" "), dtype=torch.uint8)}
        ),
        checkpoint.write_json(tmp_path, "json", content.hex()),
    ]
    assert (tmp_path / "bytes").read_bytes() == content
    for record in records:
        written = (tmp_path / record.name).read_bytes()
        assert record == checkpoint.FileRecord(record.name, len(written), hashlib.sha256(written).hexdigest())


def test_floats_in_json_read_back_bit_for_bit(tmp_path):
    values = [0.1, 1e-6, -0.0, 1 / 3, 5e-324, 1.7976931348623157e308, math.inf, -math.inf]
    checkpoint.write_json(tmp_path, "x.json", {"values": values, "none": None})
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["none"] is None and [x.hex() for x in found["values"]] == [x.hex() for x in values]


def test_files_and_folders_are_for_this_user_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        checkpoint.write_bytes(tmp_path, "a/b/x", b"1")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b", "a/b/x")]
    assert modes == [0o700, 0o700, 0o600]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/../../x", "a/..", "/x", "./x", "a//b", "a/", "a\0b", "a\nb", "manifest.json"]
)
def test_a_name_outside_the_folder_or_with_two_spellings_is_refused(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(ValueError, match="is not a valid name for a file"):
        checkpoint.write_bytes(folder, name, b"1")
    assert list(folder.iterdir()) == [] and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta"), torch.eye(2).to_sparse()],
    ids=["complex", "meta", "sparse"],
)
def test_a_tensor_that_cannot_be_stored_is_named(tmp_path, tensor):
    with pytest.raises(ValueError, match="'weight'"):
        checkpoint.write_tensors(tmp_path, "x", {"fine": torch.ones(1), "weight": tensor})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensors", "metadata"), [({"__metadata__": torch.ones(1)}, {}), ({"x": torch.ones(1)}, {"step": 3})]
)
def test_a_header_that_the_library_cannot_read_is_refused(tmp_path, tensors, metadata):
    with pytest.raises(ValueError, match="metadata"):
        checkpoint.write_tensors(tmp_path, "x", tensors, metadata)


def test_a_file_is_written_once(tmp_path):
    checkpoint.write_bytes(tmp_path, "x", b"first")
    with pytest.raises(SaveError, match=r"x: cannot be written: File exists"):
        checkpoint.write_bytes(tmp_path, "x", b"second")
    assert (tmp_path / "x").read_bytes() == b"first"


def test_a_file_is_not_written_through_a_link(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x").symlink_to(tmp_path / "outside")
    with pytest.raises(SaveError):
        checkpoint.write_bytes(tmp_path / "in", "x", b"1")
    assert not (tmp_path / "outside").exists()
