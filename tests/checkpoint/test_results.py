"""Model folders that are published as a result are whole, and what is changed in them later is found."""

import errno
import os
import shutil

import pytest

from align.checkpoint import RESULT_MANIFEST, DamagedError, new_result, verify_result
from align.errors import ConfigError, ModelError, SaveError
from align.utils import disk
from align.utils.atomic_write import write_atomic

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40, "tokenizer/vocab.txt": b"a\nb\n"}


@pytest.fixture
def result(tmp_path):
    write(tmp_path / "final")
    return tmp_path / "final"


def write(out) -> None:
    with new_result(out) as temporary:
        for name, content in FILES.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(content)


def pipe(path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path) -> None:
    path.unlink()
    path.mkdir()


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "flipped": flip,
    "folder": folder,
    "pipe": pipe,
    "link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


def test_a_published_result_is_sound_and_files_of_others_do_not_matter(result):
    (result / "README.md").write_text("mine")
    verify_result(result)
    assert sorted(path.name for path in result.parent.iterdir()) == ["final"]
    assert {name: (result / name).read_bytes() for name in FILES} == FILES


@pytest.mark.parametrize("name", [*FILES, RESULT_MANIFEST])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_named(result, damage, name):
    DAMAGE[damage](result / name)
    with pytest.raises(DamagedError) as unsound:
        verify_result(result)
    assert unsound.value.file == name


def test_what_is_no_folder_is_no_result(tmp_path):
    for make in (lambda path: None, lambda path: path.touch(), os.mkfifo, lambda path: path.symlink_to("nowhere")):
        make(tmp_path / "final")
        with pytest.raises(DamagedError, match=RESULT_MANIFEST):
            verify_result(tmp_path / "final")
        (tmp_path / "final").unlink(missing_ok=True)


def test_a_result_that_is_there_is_left_alone(result):
    with pytest.raises(ModelError, match="exists already"):
        write(result)
    verify_result(result)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG])
@pytest.mark.parametrize("rust", [False, True], ids=["OSError", "of a library in Rust"])
def test_a_disk_that_refuses_leaves_nothing(tmp_path, number, rust):
    """tokenizers and safetensors raise errors that are no OSError."""
    error = Exception(f"I/O error: refused (os error {number})") if rust else OSError(number, os.strerror(number))

    def write_one() -> None:
        with new_result(tmp_path / "final") as temporary:
            (temporary / "config.json").write_text("{}")
            raise error

    with pytest.raises(SaveError) as refused:
        write_one()
    assert refused.value.exit_status == 76 and refused.value.remedy
    assert refused.value.where == str(tmp_path / "final")
    assert not list(tmp_path.iterdir())


def test_every_fsync_comes_before_the_name_and_any_may_be_refused(tmp_path, monkeypatch):
    """Three files, the manifest, two folders; then the parent, when the result has its name."""
    fsync, synced = os.fsync, []

    def noting(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if len(synced) == refuse_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    for refuse_at in range(1, 8):
        synced.clear()
        with pytest.raises(SaveError, match="Input/output error"):
            write(tmp_path / "final")
        assert (tmp_path / "final").exists() == (refuse_at == 7)
    assert synced[-1] == str(tmp_path)
    shutil.rmtree(tmp_path / "final")
    refuse_at = 0
    synced.clear()
    write(tmp_path / "final")
    temporary = str(tmp_path / "final.partial")
    names = [*FILES, RESULT_MANIFEST, ".", "tokenizer"]
    assert sorted(synced) == sorted([*(os.path.normpath(f"{temporary}/{name}") for name in names), str(tmp_path)])


@pytest.mark.parametrize("mode", ["full", "a folder in the way"])
def test_a_file_that_cannot_be_replaced_stays(tmp_path, monkeypatch, mode):
    path = tmp_path / "config.yaml"
    if mode == "full":
        path.write_text("old")
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(SaveError, match=r"config\.yaml: cannot be written: No space left"):
            write_atomic(path, "new")
        assert path.read_text() == "old"
    else:
        path.mkdir()
        with pytest.raises(ConfigError, match=r"config\.yaml.*: cannot be written: Is a directory\n.*move away"):
            write_atomic(path, "new")
    assert [item.name for item in tmp_path.iterdir()] == ["config.yaml"]


def test_the_cause_of_an_error_tells_whether_a_retry_may_help():
    error = ConfigError("cannot be read")
    assert not disk.is_infrastructure(error)
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert disk.is_infrastructure(error) and disk.is_infrastructure(error.__context__)
    assert not disk.is_infrastructure(FileNotFoundError(errno.ENOENT, "No such file"))
