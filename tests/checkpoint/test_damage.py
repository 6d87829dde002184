"""Whatever was changed in a checkpoint after it was published, it is refused with the file's name."""

import os
import random
import shutil
import stat
from pathlib import Path

import pytest

from align.checkpoint.manifest import name_of
from align.errors import ConfigError, LockError, SaveError

pytestmark = pytest.mark.usefixtures("without_fsync")
FILES = (
    "policy/rank-00000.safetensors",
    "critic/rank-00000.safetensors",
    "policy/rng-00000.safetensors",
    "rollouts-0.safetensors",
    "policy/engine.json",
    "driver.json",
    "rounds/round-1.json",
    "manifest.json",
)
ANOTHER = {name: "policy/rank-00001.safetensors" if name.endswith("safetensors") else "driver.json" for name in FILES}
ANOTHER["driver.json"] = "policy/engine.json"
"""What a file is exchanged with in its own checkpoint: as long, but for the manifest."""
NOBODY = 65534


@pytest.fixture(scope="module")
def three(tmp_path_factory, small) -> Path:
    """Sound checkpoints of steps 10, 20 and 30."""
    store = small.make_store(tmp_path_factory.mktemp("run") / "checkpoints", keep_latest=3)
    for step in (10, 20, 30):
        small.save(store, step)
    return store.folder


@pytest.fixture
def store(three, tmp_path, small):
    shutil.copytree(three, tmp_path / "checkpoints")
    return small.make_store(tmp_path / "checkpoints", keep_latest=3)


def truncate(permille: int):
    def change(path: Path, file: str) -> None:
        os.truncate(path, path.stat().st_size * permille // 1000)

    return change


def flip(number: int):
    def change(path: Path, file: str) -> None:
        content = bytearray(path.read_bytes())
        bit = random.Random(f"{file} {number}").randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)

    return change


def zero_page(path: Path, file: str) -> None:
    content = bytearray(path.read_bytes())
    assert len(content) >= 2 * 4096 and any(content[4096:8192])
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)


def delete(path: Path, file: str) -> None:
    path.unlink()


def exchange(one: Path, other: Path) -> None:
    contents = one.read_bytes(), other.read_bytes()
    assert contents[0] != contents[1]
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def swap_step(path: Path, file: str) -> None:
    exchange(path, path.parents[file.count("/") + 1] / name_of(20) / file)


def swap_rank(path: Path, file: str) -> None:
    exchange(path, path.parents[file.count("/")] / ANOTHER[file])


def give_away(path: Path, file: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, NOBODY, -1)


def link(path: Path, file: str) -> None:
    outside = path.parents[file.count("/") + 2] / "outside"
    path.rename(outside)  # with the right content
    path.symlink_to(outside)


CHANGES = {
    "truncated to nothing": truncate(0),
    "truncated to half": truncate(500),
    "truncated to 99.9 %": truncate(999),
    **{f"bit flip {number}": flip(number) for number in range(20)},
    "a page of zeros": zero_page,
    "deleted": delete,
    "swapped with another step": swap_step,
    "swapped with another rank": swap_rank,
    "given to another user": give_away,
    "replaced by a link": link,
}


def test_the_matrix_is_complete():
    assert len(FILES) == 8 and len(CHANGES) == 29


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_named_and_an_older_checkpoint_is_taken(store, small, file, change):
    CHANGES[change](store.folder / name_of(30) / file, file)
    possible = {file, ANOTHER[file]} if change == "swapped with another rank" else {file}
    last = 10 if change == "swapped with another step" else 20  # which damages step 20 as well

    with pytest.raises(ConfigError) as refused:
        store.open(store.folder / name_of(30))
    assert refused.value.exit_status == 78
    assert any(f"{name}: " in refused.value.message for name in possible)
    assert refused.value.remedy == f"the newest valid one there is {store.folder / name_of(last)}"
    assert store.steps() == [10, 20, 30]  # nothing was renamed

    found = store.newest()
    assert found.manifest.step == last
    small.check_whole(found)
    assert store.steps() == list(range(10, last + 1, 10))
    why = (store.folder / "step-000030.bad" / "why").read_text()
    assert any(why.startswith(f"{name}: ") for name in possible) and why.strip() in store.notes[0]
    small.save(store, 30)  # the run comes by again
    small.check_whole(store.newest())


def add_file(folder: Path) -> str:
    (folder / "policy" / "zero_to_fp32.py").write_text("print()")
    return "policy/zero_to_fp32.py"


def add_link(folder: Path) -> str:
    (folder / "more").symlink_to(folder.parent)
    return "more"


def add_pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return "pipe"


def open_file(folder: Path) -> str:
    (folder / "driver.json").chmod(0o622)
    return "driver.json"


def open_folder(folder: Path) -> str:
    (folder / "policy").chmod(0o770)
    return "policy"


def open_all(folder: Path) -> str:
    folder.chmod(0o777)
    return "."


def rename(folder: Path) -> str:
    (folder / "driver.json").rename(folder / "driver")
    return "driver.json"


@pytest.mark.parametrize("change", [add_file, add_link, add_pipe, open_file, open_folder, open_all, rename])
def test_a_folder_that_others_may_have_changed_is_refused(store, change):
    file = change(store.folder / name_of(30))
    with pytest.raises(ConfigError, match=f"valid checkpoint: {file}: "):
        store.open(store.folder / name_of(30))
    assert store.newest().manifest.step == 20


def test_a_checkpoint_that_is_a_link_or_a_file_is_set_aside(store, tmp_path):
    (store.folder / name_of(30)).rename(tmp_path / name_of(30))
    (store.folder / name_of(30)).symlink_to(tmp_path / name_of(30))
    (store.folder / name_of(40)).write_text("")
    assert store.newest().manifest.step == 20
    assert (store.folder / "step-000030.bad").is_symlink() and (store.folder / "step-000040.bad").is_file()
    assert not (tmp_path / name_of(30) / "why").exists()


def test_the_folder_of_checkpoints_is_refused_where_others_may_write(store):
    store.folder.chmod(0o777)
    for call in (store.newest, lambda: store.begin(40, 0)):
        with pytest.raises(ConfigError, match=r"checkpoints: may be written by other users \(mode 0777\)"):
            call()
    assert store.steps() == [10, 20, 30]


def test_it_may_lie_elsewhere_behind_a_link(store, tmp_path, small):
    store.folder.rename(tmp_path / "scratch")
    store.folder.symlink_to(tmp_path / "scratch")
    assert store.newest().manifest.step == 30
    small.save(store, 40)
    assert (tmp_path / "scratch" / name_of(40) / "manifest.json").is_file()


def test_no_checkpoint_is_a_fresh_start_and_damaged_ones_are_not(store, tmp_path, small):
    assert small.make_store(tmp_path / "nowhere").newest() is None
    (tmp_path / "empty").mkdir(mode=0o700)
    assert small.make_store(tmp_path / "empty").newest() is None
    for step in (10, 20, 30):
        (store.folder / name_of(step) / "driver.json").unlink()
    for _ in range(2):  # all are set aside the first time
        with pytest.raises(ConfigError, match="none is valid") as refused:
            store.newest()
        assert refused.value.exit_status == 78
    assert len(store.notes) == 3 and store.steps() == []


def test_each_damaged_checkpoint_of_a_step_is_kept(store, small):
    for _ in range(3):
        (store.folder / name_of(30) / "driver.json").unlink()
        assert store.newest().manifest.step == 20
        small.save(store, 30)
    names = [path.name for path in sorted(store.folder.glob("*.bad*"))]
    assert names == ["step-000030.bad", "step-000030.bad-2", "step-000030.bad-3"]


@pytest.mark.parametrize(
    "name", ["nowhere", "step-000050", "partial-step-000030.0.00000000", "step-000030.bad", "copy"]
)
def test_only_a_published_name_is_opened(store, name):
    if name not in ("nowhere", "step-000050"):
        shutil.copytree(store.folder / name_of(30), store.folder / name)
    with pytest.raises(ConfigError) as refused:
        store.open(store.folder / name)
    assert refused.value.remedy == f"the newest valid one there is {store.folder / name_of(30)}"


def test_a_file_that_the_manifest_does_not_name_is_not_given_out(store):
    checkpoint = store.newest()
    assert checkpoint.path("driver.json") == store.folder / name_of(30) / "driver.json"
    for name in ("judge/engine.json", "../step-000010/driver.json", "manifest.json"):
        with pytest.raises(ConfigError, match="the checkpoint has no file"):
            checkpoint.path(name)


# The pointer


def pointer_missing(folder: Path) -> None:
    (folder / "latest").unlink()


def pointer_empty(folder: Path) -> None:
    (folder / "latest").write_text("")


def pointer_garbage(folder: Path) -> None:
    (folder / "latest").write_bytes(bytes(range(256)))


def pointer_to_nothing(folder: Path) -> None:
    (folder / "latest").write_text("step-000099\n")


def pointer_to_unpublished(folder: Path) -> None:
    shutil.copytree(folder / name_of(30), folder / "partial-step-000040.0.00000000")
    (folder / "latest").write_text("partial-step-000040.0.00000000\n")


@pytest.mark.parametrize(
    "change", [pointer_missing, pointer_empty, pointer_garbage, pointer_to_nothing, pointer_to_unpublished]
)
def test_the_pointer_decides_nothing(store, small, change):
    assert (store.folder / "latest").read_text() == "step-000030\n"
    change(store.folder)
    assert store.newest().manifest.step == 30
    store.clean()
    small.save(store, 50)
    assert (store.folder / "latest").read_text() == "step-000050\n"
    assert small.torsos(store.folder) == []


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_of_two_writers_the_one_that_was_replaced_changes_nothing(tmp_path, small):
    owner = tmp_path / "owner"
    owner.write_text("1")

    def fence(epoch: int):
        def check() -> None:
            if int(owner.read_text()) != epoch:
                raise LockError("the run folder was taken over")

        return check

    first = small.make_store(tmp_path / "checkpoints", epoch=1, fence=fence(1), keep_latest=1)
    small.save(first, 10)
    partial = first.begin(20, 0)
    files = small.write(partial, 20)
    owner.write_text("2")
    second = small.make_store(tmp_path / "checkpoints", epoch=2, fence=fence(2), keep_latest=1)
    small.check_whole(second.newest())
    ours = second.begin(20, 0)
    second.publish(ours, small.manifest(20, small.write(ours, 20), epoch=2))
    published = {name: content for name, content in tree(second.folder).items() if "partial-" not in name}

    with pytest.raises(LockError):
        first.publish(partial, small.manifest(30, files, epoch=1))
    for call in (first.clean, lambda: first.pin(20)):
        with pytest.raises(LockError):
            call()
    first.abandon(partial)
    assert tree(second.folder) == published
    small.check_whole(second.newest())


def test_a_replaced_writer_deletes_nothing(tmp_path, small):
    store = small.make_store(tmp_path / "checkpoints", keep_latest=2)
    for step in (10, 20):
        small.save(store, step)

    def fence() -> None:
        raise LockError("the run folder was taken over")

    replaced = small.make_store(store.folder, keep_latest=1, fence=fence)
    before = tree(store.folder)
    with pytest.raises(LockError):
        replaced.retain()
    (store.folder / name_of(20) / "driver.json").chmod(0o666)
    with pytest.raises(LockError):
        replaced.newest()
    assert tree(store.folder) == before


def test_a_writer_that_is_replaced_after_its_rename_leaves_pointer_and_old_checkpoints(store, small):
    asked = iter([None, LockError("the run folder was taken over")])

    def fence() -> None:
        if error := next(asked):
            raise error

    with pytest.raises(LockError):
        small.save(small.make_store(store.folder, keep_latest=1, fence=fence), 40)
    assert store.steps() == [10, 20, 30, 40]
    assert (store.folder / "latest").read_text() == "step-000030\n"
    small.check_whole(store.newest())


def test_torsos_of_a_later_owner_are_left_alone(tmp_path, small):
    store = small.make_store(tmp_path / "checkpoints", epoch=3)
    small.save(store, 10)
    for name in ("partial-step-000020.4.0123abcd", "partial-step-000020.3.0123abcd", "old-step-000005.12.0123abcd"):
        shutil.copytree(store.folder / name_of(10), store.folder / name)
    (store.folder / "partial-latest.2.0123abcd").write_text("")
    (store.folder / "partial-notes").mkdir()
    store.clean()
    assert small.torsos(store.folder) == [
        "old-step-000005.12.0123abcd",
        "partial-notes",
        "partial-step-000020.4.0123abcd",
    ]


# The same step twice


def test_the_same_checkpoint_again_is_dropped(store, small):
    before = tree(store.folder)
    later = small.make_store(store.folder, keep_latest=3, epoch=5)
    checkpoint = small.save(later, 30, metrics={"seconds": 1.0})
    assert checkpoint.folder.name == name_of(30) and checkpoint.manifest.epoch == 0
    assert tree(store.folder) == before


def test_another_checkpoint_of_the_same_step_is_refused(store, small):
    before = tree(store.folder)
    with pytest.raises(SaveError, match=r"step-000030: is published already, with other content"):
        small.save(store, 30, round=2)
    assert tree(store.folder) == before


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(store, small):
    (store.folder / name_of(30) / "driver.json").unlink()
    small.save(store, 30)
    small.check_whole(store.newest())
    assert (store.folder / "step-000030.bad").is_dir() and "driver.json" in store.notes[0]


def test_modes_are_for_this_user_alone_whatever_the_umask(tmp_path, small):
    before = os.umask(0)
    try:
        store = small.make_store(tmp_path / "checkpoints")
        small.save(store, 10)
        store.pin(10)
    finally:
        os.umask(before)
    for path in (store.folder, *store.folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
