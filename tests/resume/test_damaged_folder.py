"""Whatever is damaged in a run folder, `align train` resumes from what is sound or stops with the file and a remedy."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import checkpoints, metrics
from safetensors import SafetensorError
from transformers import PreTrainedModel

from align import launch
from align.checkpoint import verify_result
from align.cli import main
from align.run.identity import FORMAT

RECIPE = """
algorithm: rloo
run: {{dir: x, steps: 4, seed: 2, logged_samples: 1, progress: none, trackers: [], max_restarts: 0}}
checkpoint: {{every: 1, keep_latest: 2}}
executor: local
data: {{path: {data}, format: helpsteer3, max_rows: 8}}
policy: {{path: {policy}, dtype: float32, optimizer: {{lr: 2e-2}}}}
reward: {{path: {reward}, dtype: float32}}
prompts_per_step: 1
truncated: keep
sampling: {{num_samples: 2, max_tokens: 2}}
evaluation: {{every: 2, prompts: 1, keep_best: true}}
"""


CHECKPOINT = (
    *("driver.json", "driver.safetensors", "manifest.json", "policy/engine.json"),
    *("policy/rank-00000.safetensors", "policy/rng-00000.safetensors"),
)
MODEL = (
    *(
        "README.md",
        "align_manifest.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ),
    *("tokenizer.json", "tokenizer_config.json"),
)
OLDER, NEWEST, BEST = "checkpoints/step-000001", "checkpoints/step-000002", "best/step-000002"
FILES = (
    *("config.yaml", "data.json", "environment.json", "evaluations.jsonl", "identity.json", "metrics.jsonl"),
    *("samples.jsonl", "starts.jsonl", "startup.json", "checkpoints/latest"),
    *("lock/epoch-000001.json", "lock/epoch-000001.released"),
    *(f"{folder}/{name}" for folder in (OLDER, NEWEST) for name in CHECKPOINT),
    *(f"{BEST}/{name}" for name in MODEL),
)
FOLDERS = ("checkpoints", OLDER, NEWEST, f"{OLDER}/policy", f"{NEWEST}/policy", "best", BEST, "lock")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        remove(path)
        make(path)

    return change


DAMAGE = {
    "truncated": truncate,
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "missing": remove,
    "a folder": replaced(Path.mkdir),
    "not readable": replaced(lambda path: path.symlink_to(path.name)),  # root may read all but a link to itself
    "a pipe": replaced(os.mkfifo),
}
REPLACED = {"missing": remove, "a file": replaced(Path.touch), "not readable": DAMAGE["not readable"]}
USUAL = {(f"{OLDER}/driver.json", "flipped"), ("metrics.jsonl", "truncated"), (f"{BEST}/model.safetensors", "flipped")}
"""Cases that are always run, beside one of each file."""


def cases(names: tuple[str, ...], damage: dict[str, Callable[[Path], None]]) -> list:
    """Every name with every damage; one damage of every second name is run always, the rest with `full`."""
    usual = {(name, [*damage][i % len(damage)]) for i, name in enumerate(names[::2])} | USUAL
    return [
        pytest.param(name, kind, marks=[] if (name, kind) in usual else pytest.mark.full)
        for name in names
        for kind in damage
    ]


def train(recipe: Path, folder: Path, *overrides: str, fault: str = "") -> tuple[int, str]:
    """Exit status and stderr of ``align train``, in this process."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as errors:
        patch.setenv("ALIGN_FAULT", fault)
        with contextlib.redirect_stdout(io.StringIO()):
            status = main(["train", str(recipe), f"run.dir={folder}", *overrides])
    return status, errors.getvalue()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, toy_data, tiny_policy, tiny_reward) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE.format(data=toy_data, policy=tiny_policy, reward=tiny_reward))
    return path


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(recipe, folder) == (0, "")
    return folder


@pytest.fixture(scope="module")
def half(recipe, tmp_path_factory) -> Path:
    """A run that failed in its fourth step: checkpoints of 1 and 2, and a best model."""
    folder = tmp_path_factory.mktemp("half") / "run"
    status, errors = train(recipe, folder, fault="role=driver,phase=step,step=4,kind=error")
    assert status == 1, errors
    assert [path.name for path in checkpoints(folder)] == ["step-000001", "step-000002"], errors
    return folder


@pytest.fixture(scope="module")
def untouched(recipe, tmp_path_factory) -> Path:
    """A run that failed before its first step."""
    folder = tmp_path_factory.mktemp("untouched") / "run"
    assert train(recipe, folder, fault="role=driver,phase=step,step=1,kind=error")[0] == 1
    return folder


def test_the_matrix_is_complete(half):
    there = {path.relative_to(half).as_posix(): path for path in half.rglob("*")}
    for name in [name for name in there if "partial-" in name or name.startswith("best/step-000000")]:
        del there[name]  # of the save under way, and the model before the best one, which goes with checkpoint 1
    assert sorted(name for name, path in there.items() if path.is_file()) == sorted(FILES)
    assert sorted(name for name, path in there.items() if path.is_dir()) == sorted(FOLDERS)


def check(recipe: Path, folder: Path, name: str, whole: Path) -> int:
    """It is resumed to the same end, or stops with the file's name and a remedy."""
    status, errors = train(recipe, folder)
    assert "Traceback" not in errors
    if status:
        assert 75 <= status <= 79, (status, errors)
        named = "/lock" if name.startswith("lock/") else name.rpartition("/")[2]
        assert named in errors and "remedy: " in errors
        return status
    for model in (path.relative_to(whole) for path in whole.rglob("model.safetensors")):
        assert (folder / model).read_bytes() == (whole / model).read_bytes()
        verify_result((folder / model).parent)
    assert sorted(path.name for path in (folder / "best").iterdir()) == [BEST.partition("/")[2]]
    if name != "metrics.jsonl":
        assert metrics(folder) == metrics(whole)
    for line in (folder / "metrics.jsonl").read_text(errors="replace").splitlines()[-2:]:
        json.loads(line)  # what is new is not glued to what was cut off
    return 0


@pytest.mark.parametrize(("name", "damage"), cases(FILES, DAMAGE))
def test_a_damaged_file(name, damage, recipe, half, whole, tmp_path):
    shutil.copytree(half, tmp_path / "run")
    DAMAGE[damage](tmp_path / "run" / name)
    check(recipe, tmp_path / "run", name, whole)


@pytest.mark.parametrize(("name", "damage"), cases(FOLDERS, REPLACED))
def test_a_damaged_folder(name, damage, recipe, half, whole, tmp_path):
    shutil.copytree(half, tmp_path / "run")
    REPLACED[damage](tmp_path / "run" / name)
    check(recipe, tmp_path / "run", name, whole)


FINISHED = tuple(f"final/{name}" for name in MODEL)


@pytest.mark.parametrize(
    ("name", "damage"), [*cases(FINISHED, DAMAGE), ("final", "missing"), ("final", "not readable")]
)
def test_a_damaged_final_model_is_written_again(name, damage, recipe, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / name
    DAMAGE[damage](path)
    assert check(recipe, tmp_path / "run", name, whole) == 0
    beside = [path.name for path in (tmp_path / "run").glob("final.*")]
    assert beside == ([] if (name, damage) == ("final", "missing") else ["final.before-1"])


def test_a_damaged_final_model_without_checkpoints_is_not_trained_again_unasked(recipe, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints")
    assert train(recipe, folder)[0] == 0  # it is done, and checkpoints may be deleted
    flip(folder / "final" / "model.safetensors")
    status, errors = train(recipe, folder)
    assert status == 78
    assert "final: is damaged, and there is no checkpoint: model.safetensors: its sha256" in errors


def test_a_damaged_best_model_is_written_again_from_an_earlier_checkpoint(recipe, half, whole, tmp_path):
    """The remedy that the message gives."""
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    flip(folder / BEST / "model.safetensors")
    status, errors = train(recipe, folder)
    assert status == 78
    assert f"{BEST}: is damaged: model.safetensors: its sha256" in errors
    assert "move away the checkpoints after step 1" in errors
    shutil.rmtree(folder / NEWEST)
    assert check(recipe, folder, "", whole) == 0


# A run that failed before its first step


def test_a_changed_recipe_begins_where_no_step_was_taken(recipe, untouched, whole, tmp_path):
    """What the failed attempt wrote is moved away, and the run is that of a new folder."""
    folder = tmp_path / "run"
    shutil.copytree(untouched, folder)
    (folder / "logs" / "slurm").mkdir(parents=True)
    for log in ("logs/policy-0.log", "logs/slurm/driver-1.log"):
        (folder / log).write_text("failed")
    assert train(recipe, folder, "run.seed=5", fault="role=driver,phase=step,step=1,kind=error")[0] == 1
    assert "seed: 5" in (folder / "config.yaml").read_text()
    status, errors = train(recipe, folder)
    assert status == 0
    assert f"no step was taken in {folder}: starting with the changed recipe (keys: run.seed)\n" in errors
    assert metrics(folder) == metrics(whole)
    assert (folder / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()
    assert (folder / "evaluations.jsonl").read_bytes() == (whole / "evaluations.jsonl").read_bytes()
    assert len((folder / "starts.jsonl").read_text().splitlines()) == 1
    names = {path.name for path in whole.iterdir()} | {"logs", "attempt-1", "attempt-2"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "attempt-1/logs/policy-0.log").is_file()
    assert not (folder / "logs/policy-0.log").exists()
    assert (folder / "logs/slurm/driver-1.log").is_file()  # the launcher's, which may be writing it
    assert "seed: 2" in (folder / "attempt-1/config.yaml").read_text()
    assert "seed: 5" in (folder / "attempt-2/config.yaml").read_text()


def test_another_algorithm_begins_where_no_step_was_taken(untouched, recipe, toy_data, tiny_policy, tmp_path):
    folder, other = tmp_path / "run", tmp_path / "sft.yaml"
    shutil.copytree(untouched, folder)
    other.write_text(
        "algorithm: sft\nrun: {dir: x, steps: 1, progress: none, trackers: []}\nexecutor: local\n"
        f"data: {{path: {toy_data}, format: helpsteer3, max_rows: 8}}\nbatch_size: 2\n"
        f"policy: {{path: {tiny_policy}, dtype: float32, optimizer: {{lr: 1e-3}}}}\n"
    )
    status, errors = train(other, folder)
    assert status == 0
    assert "starting with the changed recipe (keys: algorithm, " in errors
    assert " more)" in errors
    assert not (folder / "best").exists()
    status, errors = train(recipe, folder)
    assert status == 78
    assert "the checkpoint belongs to a run of algorithm sft, and this recipe is rloo" in errors
    assert str(folder) in errors and "choose another run.dir" in errors
    assert len(errors.splitlines()) == 2


def test_steps_of_another_recipe_without_a_checkpoint_are_kept(recipe, half, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "metrics.jsonl").read_bytes()
    status, errors = train(recipe, folder, "run.seed=5")
    assert status == 78
    assert "metrics.jsonl of another run, and no checkpoint to resume from (keys: run.seed)" in errors
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_an_identity_of_an_older_format_is_named(recipe, half, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    shutil.rmtree(folder / "checkpoints")
    identity = json.loads((folder / "identity.json").read_text())
    assert identity.pop("format") == FORMAT
    (folder / "identity.json").write_text(json.dumps(identity))
    status, errors = train(recipe, folder)
    assert (status, f"has format None, and this version of align reads {FORMAT}" in errors) == (78, True)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_identity_does_not_lock_a_folder_without_steps(damage, recipe, untouched, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(untouched, folder)
    DAMAGE[damage](folder / "identity.json")
    status, errors = train(recipe, folder)
    if damage == "missing":
        assert (status, "no identity.json" in errors) == (78, True)
    else:
        assert (status, "no step was taken" in errors) == (0, True)
        assert (folder / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()


# A disk that refuses, and requests to stop before the first step

REFUSED = {
    "config.yaml": errno.EDQUOT,
    "identity.json": errno.EROFS,
    "starts.jsonl": errno.EIO,
    "startup.json": errno.EFBIG,
    "final": errno.EIO,
    "align_manifest.json": errno.ENOSPC,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_disk_that_refuses_ends_with_76_and_the_run_is_resumed(name, recipe, half, whole, tmp_path, monkeypatch):
    folder, fsync = tmp_path / "run", os.fsync
    shutil.copytree(half, folder)

    def refusing(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if re.search(rf"/\.?{name}(\.[0-9]+)?(\.partial)?$", path):
            raise OSError(REFUSED[name], os.strerror(REFUSED[name]))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refusing)
        status, errors = train(recipe, folder)
    assert status == 76
    assert f"cannot be written: {os.strerror(REFUSED[name])}\n  remedy: " in errors
    assert name in errors or (name == "align_manifest.json" and f"{folder}/final: " in errors)
    assert not list(folder.glob("final*")) and not list(folder.glob("*.partial"))
    assert check(recipe, folder, "", whole) == 0


def test_a_full_disk_while_the_first_best_model_is_written(recipe, whole, tmp_path, monkeypatch):
    """safetensors raises an error of its own, which is no OSError."""

    save = PreTrainedModel.save_pretrained

    def refusing(model: PreTrainedModel, folder: Path, **options: object) -> None:
        if (tmp_path / "run") not in Path(folder).parents:  # what is tried before the start
            return save(model, folder, **options)
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", refusing)
        status, errors = train(recipe, tmp_path / "run")
    assert status == 76, errors
    assert not list((tmp_path / "run/best").iterdir())
    assert "best/step-000000: cannot be written" in errors and "remedy: free space" in errors
    assert check(recipe, tmp_path / "run", "", whole) == 0


def test_a_signal_before_the_run_owns_its_folder_leaves_at_once(recipe, tmp_path, monkeypatch):
    """While data and models are looked at; status 75 asks for another start."""
    monkeypatch.setattr(launch, "prepare", lambda loaded: os.kill(os.getpid(), signal.SIGUSR1))
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as left:
        train(recipe, tmp_path / "run")
    assert left.value.code == 75
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_signal_while_roles_come_up_stops_before_the_first_step(recipe, whole, tmp_path):
    status, errors = train(recipe, tmp_path / "run", fault="role=policy,phase=load,kind=sigterm")
    assert (status, "stopped by SIGTERM at step 0" in errors) == (75, True)
    assert not (tmp_path / "run/best").exists()
    assert check(recipe, tmp_path / "run", "", whole) == 0


def test_models_of_an_earlier_round(recipe, tmp_path):
    """The one that a round starts from stops the run; after a step back, both are written again."""
    rounds = ("rounds=2", "run.steps=2", "evaluation.every=1")
    assert train(recipe, tmp_path / "whole", *rounds) == (0, "")
    folder = tmp_path / "run"
    assert train(recipe, folder, *rounds, fault="role=driver,phase=step,step=3,kind=sigterm")[0] == 75
    start = folder / json.loads((folder / "checkpoints/step-000003/driver.json").read_text())["start_models"]["2"]
    assert start.parent == folder / "round-1/best"
    for model in (start, folder / "round-1/final"):
        content = (model / "model.safetensors").read_bytes()
        flip(model / "model.safetensors")
        status, errors = train(recipe, folder, *rounds)
        assert status == 78
        assert f"{model}: is damaged: model.safetensors: its sha256 is not that of the manifest" in errors
        (model / "model.safetensors").write_bytes(content)
    flip(folder / "round-1/final/model.safetensors")
    assert "move away the checkpoints after step 2:" in train(recipe, folder, *rounds)[1]
    shutil.rmtree(folder / "checkpoints/step-000003")
    status, errors = train(recipe, folder, *rounds)
    assert status == 0, errors
    models = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("model.safetensors"))
    assert len(models) > 3
    for model in models:
        assert (folder / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
    assert (folder / "round-1/final.before-1").is_dir()
