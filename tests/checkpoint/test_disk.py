"""A disk that is full, protected, broken or gone costs the checkpoint that was being taken, and nothing else."""

import errno
import math
import os
import shutil
import subprocess

import pytest
import torch

from align import checkpoint
from align.checkpoint import store as checkpoints
from align.errors import SaveError
from align.utils import fault_injection

PAGE = 4096
KINDS = {
    "policy/rank-00000.safetensors": lambda folder, name: checkpoint.write_tensors(folder, name, {"x": numbers(1)}),
    "critic/rank-00000.safetensors": lambda folder, name: checkpoint.write_tensors(folder, name, {"x": numbers(2)}),
    "policy/rng-00000.safetensors": lambda folder, name: checkpoint.write_tensors(folder, name, {"x": numbers(3)}),
    "driver.json": lambda folder, name: checkpoint.write_json(folder, name, numbers(4).tolist()),
}
FACTS = {"fingerprints": ["0123456789"] * 20_000}


def numbers(seed: int) -> torch.Tensor:
    return torch.randn(64 * 1024, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def disk(tmp_path):
    """A file system in memory of its own: 8 MiB, 1000 inodes."""
    place = tmp_path / "disk"
    place.mkdir()
    options = "size=8m,nr_inodes=1000,mode=0700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip() if done else 'no mount'}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def store(disk, small):
    store = small.make_store(disk / "checkpoints", keep_latest=1)
    small.save(store, 10)
    return store


def fill(disk, num_pages: int) -> None:
    """Leave so many pages free."""
    free = os.statvfs(disk).f_bfree
    assert free >= num_pages
    (disk / "ballast").write_bytes(bytes(PAGE) * (free - num_pages))
    assert os.statvfs(disk).f_bfree == num_pages


def check_refused(refused, name: str, number: int) -> None:
    assert refused.value.exit_status == 76
    assert refused.value.where.endswith(name)
    assert os.strerror(number) in refused.value.message and refused.value.remedy


def check_untouched(store, small, step: int = 10) -> None:
    assert store.steps() == [step] and small.torsos(store.folder) == []
    small.check_whole(store.newest())


@pytest.mark.parametrize("percent", [0, 25, 50, 75, 99])
@pytest.mark.parametrize("kind", KINDS)
def test_disk_full_within_a_file(disk, store, small, kind, percent):
    partial = store.begin(20, 0)
    for name, write in KINDS.items():
        if name != kind:
            write(partial, name)
            continue
        pages = math.ceil(write(disk, "trial").size / PAGE)
        (disk / "trial").unlink()
        fill(disk, pages * percent // 100)
        with pytest.raises(SaveError) as refused:
            write(partial, name)
        check_refused(refused, kind, errno.ENOSPC)
        break
    store.abandon(partial)
    check_untouched(store, small)
    (disk / "ballast").unlink()
    small.check_whole(small.save(store, 20))


@pytest.mark.parametrize("percent", [0, 25, 50, 75, 99])
def test_disk_full_within_the_manifest(disk, store, small, percent):
    partial = store.begin(20, 0)
    manifest = small.manifest(20, small.write(partial, 20), facts=FACTS)
    fill(disk, math.ceil(len(manifest.text()) / PAGE) * percent // 100)
    with pytest.raises(SaveError) as refused:
        store.publish(partial, manifest)
    check_refused(refused, "manifest.json", errno.ENOSPC)
    store.abandon(partial)
    check_untouched(store, small)
    (disk / "ballast").unlink()
    small.check_whole(small.save(store, 20))


def test_disk_full_at_the_pointer_costs_the_pointer_alone(disk, store, small):
    partial = store.begin(20, 0)
    manifest = small.manifest(20, small.write(partial, 20))
    fill(disk, math.ceil(len(manifest.text()) / PAGE))
    store.publish(partial, manifest)
    assert len(store.notes) == 1 and "latest: cannot be written: No space left" in store.notes[0]
    assert (store.folder / "latest").read_text() == "step-000010\n"
    check_untouched(store, small, step=20)  # and step 10 made room


def test_a_save_that_will_not_fit_is_refused_before_it_begins(disk, store, small):
    free = os.statvfs(disk).f_bavail * PAGE
    fits = int((free - checkpoints.SPARE_BYTES) / (1 + checkpoints.SPARE_FRACTION))
    store.abandon(store.begin(20, fits))
    with pytest.raises(SaveError) as refused:
        store.begin(20, fits + 3)
    assert refused.value.where == str(store.folder) and str(free) in refused.value.message
    assert refused.value.exit_status == 76 and "keep_latest" in refused.value.remedy
    check_untouched(store, small)


def take_inodes(disk, leave: int) -> None:
    (disk / "many").mkdir(exist_ok=True)
    for _ in range(os.statvfs(disk).f_favail - leave):
        (disk / "many" / str(len(os.listdir(disk / "many")))).touch()
    assert os.statvfs(disk).f_favail == leave


@pytest.mark.parametrize("leave", [0, 1, 5])
def test_inodes_run_out(disk, store, small, leave):
    partial = store.begin(20, 0)
    take_inodes(disk, leave)
    with pytest.raises(SaveError) as refused:
        small.write(partial, 20)
    assert os.strerror(errno.ENOSPC) in refused.value.message and "inodes" in refused.value.remedy
    store.abandon(partial)
    check_untouched(store, small)
    with pytest.raises(SaveError, match=r"needs 256 inodes here, \d+ are free"):
        store.begin(20, 0)
    shutil.rmtree(disk / "many")
    small.check_whole(small.save(store, 20))


def test_a_disk_that_becomes_read_only(disk, store, small):
    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)

    partial = store.begin(20, 0)
    files = small.write(partial, 20)
    remount("ro")
    calls = {
        "manifest.json": lambda: store.publish(partial, small.manifest(20, files)),
        "driver": lambda: checkpoint.write_bytes(partial, "driver", b"1"),
        "checkpoints/partial-": lambda: store.begin(30, 0),
        "step-000010.pinned": lambda: store.pin(10),
    }
    for name, call in calls.items():
        with pytest.raises(SaveError) as refused:
            call()
        assert name in refused.value.where and os.strerror(errno.EROFS) in refused.value.message
    store.abandon(partial)  # which cannot remove it now
    store.clean()
    assert "cannot be deleted" in store.notes[0]
    small.check_whole(store.newest())
    remount("rw")
    store.clean()
    check_untouched(store, small)


def test_a_damaged_checkpoint_on_a_read_only_disk_is_passed_over(disk, small):
    store = small.make_store(disk / "checkpoints", keep_latest=2)
    for step in (10, 20):
        small.save(store, step)
    (store.folder / "step-000020/driver.json").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert store.newest().manifest.step == 10
    assert "driver.json: is missing" in store.notes[0] and "Read-only" in store.notes[1]


# Without a file system of its own: every call refused in turn


def attempt(store, small, number: int) -> tuple[int, int]:
    """Save step 20 after a fault was prepared: how many errors that raised, and how many notes it left."""
    refused = None
    try:
        small.save(store, 20)
    except SaveError as error:
        refused = error
    if refused:
        assert refused.where.startswith(str(store.folder)) and os.strerror(number) in refused.message
    assert all(os.strerror(number) in note for note in store.notes)
    return int(refused is not None), len(store.notes)


def check_mended(store, small) -> None:
    """The newest checkpoint is sound, nothing half-written stays, and saving works again."""
    small.check_whole(store.newest())
    assert not any(name.startswith("partial-") for name in small.torsos(store.folder))
    small.save(store, 20)
    store.clean()
    check_untouched(store, small, step=20)


def prepared(tmp_path, small, at: int):
    (tmp_path / str(at)).mkdir()
    store = small.make_store(tmp_path / str(at) / "checkpoints", keep_latest=1)
    small.save(store, 10)
    return store


@pytest.mark.usefixtures("without_fsync")
@pytest.mark.parametrize("kind", fault_injection.REFUSALS)
@pytest.mark.parametrize("point", ["checkpoint", "shard", "manifest", "publish", "retain"])
def test_every_point_refused(tmp_path, small, point, kind):
    found = []
    for at in range(1, 100):
        store = prepared(tmp_path, small, at)
        fault_injection.arm(f"role=driver,phase={point},step=20,at={at},kind={kind}")
        found.append(attempt(store, small, fault_injection.REFUSALS[kind]))
        fault_injection.arm(None)
        if found[-1] == (0, 0):
            break
        check_mended(store, small)
    # 8 files; of publish 4 folders, the rename and the parent are refused, the pointer and its rename noted
    raised, noted = {"checkpoint": (1, 0), "shard": (8, 0), "manifest": (1, 0), "publish": (6, 2), "retain": (0, 2)}[
        point
    ]
    assert found == [(1, 0)] * raised + [(0, 1)] * noted + [(0, 0)]


def test_every_fsync_refused(tmp_path, small, monkeypatch):
    found, fsync = [], os.fsync
    for at in range(1, 100):
        store = prepared(tmp_path, small, at)
        calls = iter(range(1, 1000))

        def refusing(descriptor: int, at=at, calls=calls) -> None:
            if next(calls) == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", refusing)
        found.append(attempt(store, small, errno.EIO))
        monkeypatch.setattr(os, "fsync", fsync)
        if found[-1] == (0, 0):
            break
        check_mended(store, small)
    # 8 files, the manifest, 4 folders, the parent; then the pointer, its folder and the deletion
    assert found == [(1, 0)] * 14 + [(0, 1)] * 3 + [(0, 0)]


def test_the_folder_of_checkpoints_is_on_the_disk_before_its_first_checkpoint(tmp_path, small, monkeypatch):
    def refusing(descriptor: int) -> None:
        raise OSError(errno.EIO, f"{os.strerror(errno.EIO)} in {os.readlink(f'/proc/self/fd/{descriptor}')}")

    monkeypatch.setattr(os, "fsync", refusing)
    with pytest.raises(SaveError, match=rf"Input/output error in {tmp_path}\n"):
        small.make_store(tmp_path / "checkpoints").begin(10, 0)


def test_a_folder_that_is_deleted_underneath(tmp_path, small):
    store = small.make_store(tmp_path / "run" / "checkpoints", keep_latest=1)
    store.folder.parent.mkdir()
    small.save(store, 10)
    partial = store.begin(20, 0)
    shutil.rmtree(store.folder)
    with pytest.raises(SaveError, match=r"driver.json: cannot be written: No such file"):
        checkpoint.write_json(partial, "driver.json", {})
    store.abandon(partial)
    small.check_whole(small.save(store, 20))
    partial = store.begin(30, 0)
    files = small.write(partial, 30)
    shutil.rmtree(store.folder)
    with pytest.raises(SaveError, match="No such file"):
        store.publish(partial, small.manifest(30, files))
    store.abandon(partial)
    shutil.rmtree(store.folder.parent)
    with pytest.raises(SaveError, match=r"checkpoints: cannot be written: No such file"):
        store.begin(40, 0)
