"""When a run goes on, when it refuses to, and how it stops."""

import json
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from harness import alive, assert_same, checkpoints, metrics, steps_done, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rloo(write_recipe) -> str:
    return write_recipe("rloo")


@pytest.fixture(scope="module")
def whole(runs, rloo, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert runs.run("train", rloo, f"run.dir={folder}", log="whole") == 0, runs.text("whole")
    return folder


@pytest.fixture(scope="module")
def half(runs, rloo, tmp_path_factory) -> Path:
    """A run that was killed before its fifth step: checkpoints of 2 and 4, and four lines of metrics."""
    folder = tmp_path_factory.mktemp("half") / "run"
    status = runs.run("train", rloo, f"run.dir={folder}", fault="role=driver,phase=step,step=6,kind=sigkill")
    assert status == -signal.SIGKILL
    assert [path.name for path in checkpoints(folder)] == ["step-000002", "step-000004"]
    assert steps_done(folder) == 5
    return folder


@pytest.fixture
def folder(half, tmp_path) -> Path:
    """A copy of the half-way run, under another path."""
    shutil.copytree(half, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


# Refusals


@pytest.mark.parametrize(
    ("change", "says", "allow"),
    [
        ("policy.optimizer.lr=3e-3", "policy.optimizer.lr: 0.002 in the checkpoint, 0.003 now", "policy.optimizer.lr"),
        ("run.seed=2", "run.seed: 1 in the checkpoint, 2 now", None),
        pytest.param(
            *("prompts_per_step=8", "prompts_per_step: 7 in the checkpoint, 8 now", "prompts_per_step"),
            marks=pytest.mark.full,
        ),
        pytest.param("kl_coef=0.2", "kl_coef: 0.1 in the checkpoint, 0.2 now", "kl_coef", marks=pytest.mark.full),
        ("run.steps=7", "run.steps: 6 in the checkpoint, 7 now", "run.steps"),
        ("data.max_rows=50", "data: rows: ", "[data,data.max_rows]"),
        ("policy.lora.rank=4", "policy.lora.rank: 2 in the checkpoint, 4 now", None),
        ("evaluation.every=2", "evaluation.every: 3 in the checkpoint, 2 now", "evaluation"),
    ],
)
def test_another_recipe_is_refused_with_the_difference_and_may_be_allowed(change, says, allow, runs, rloo, folder):
    train = ("train", rloo, f"run.dir={folder}", change)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "lock" not in path.parts}
    assert runs.run(*train, log=f"refused {change}") == 78
    message = runs.text(f"refused {change}")
    assert says in message
    assert "run.allow_change=" in message
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "lock" not in path.parts}
    assert after == before
    if allow:
        allow = allow.strip("[]")
        assert runs.run(*train, f"run.allow_change=[{allow}]", log=f"allowed {change}") == 0, runs.text(
            f"allowed {change}"
        )
        assert metrics(folder)[-1]["step"] == (7 if "steps" in change else 6)


def test_other_weights_under_the_same_path_are_refused(runs, rloo, folder, tmp_path, tiny_policy):
    """The path of a model may change, its content may not."""
    model = tmp_path / "elsewhere"
    shutil.copytree(tiny_policy, model)
    train = ("train", rloo, f"run.dir={folder}", f"policy.path={model}")
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert runs.run(*train, log="weights") == 78
    assert "model: policy: " in runs.text("weights")
    shutil.copy(tiny_policy / "model.safetensors", weights)
    assert runs.run(*train) == 0, runs.text()


def test_what_does_not_matter_may_change_and_the_result_is_the_same(runs, rloo, folder, whole):
    harmless = ["run.progress=plain", "checkpoint.keep_latest=5", "run.max_time=10h", "checkpoint.overlap=false"]
    assert runs.run("train", rloo, f"run.dir={folder}", *harmless) == 0, runs.text()
    assert_same(folder, whole)


def test_a_folder_that_holds_something_else_is_left_alone(runs, rloo, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert runs.run("train", rloo, f"run.dir={tmp_path}", log="else") == 78
    assert "does not hold a run" in runs.text("else")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_never_wants_a_new_folder(runs, rloo, folder):
    assert runs.run("train", rloo, f"run.dir={folder}", "run.resume=never", log="never") == 78
    assert "is not empty" in runs.text("never")


def test_a_finished_run_is_done_at_once(runs, rloo, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    assert runs.run("train", rloo, f"run.dir={whole}", log="again") == 0
    assert "done before" in runs.text("again")
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_second_run_is_refused_with_the_owner(runs, rloo, tmp_path):
    train = ("train", rloo, f"run.dir={tmp_path / 'run'}")
    pid = runs.start(*train, fault="role=driver,phase=step,step=3,kind=sigstop", log="first")
    assert until(lambda: steps_done(tmp_path / "run") == 2)
    assert runs.run(*train, log="second") == 77
    assert f"process {pid}" in runs.text("second")
    runs.kill(pid)
    runs.wait(pid)
    assert runs.run(*train, log="third") == 0, runs.text("third")  # a dead owner's lock is stale
    assert "is taken over from" in runs.text("third")


# Damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    [
        "policy/rank-00000.safetensors",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("driver.json", "manifest.json")),
    ],
)
def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_taken(name, runs, rloo, folder, whole):
    flip(folder / "checkpoints" / "step-000004" / name)
    assert runs.run("train", rloo, f"run.dir={folder}", log=f"flip {name}") == 0, runs.text(f"flip {name}")
    message = runs.text(f"flip {name}")
    assert name in message
    assert "resuming after step 2" in message
    assert (folder / "checkpoints" / "step-000004.bad" / "why").exists()
    assert_same(folder, whole)


def test_without_a_sound_checkpoint_it_never_starts_afresh(runs, rloo, folder):
    for checkpoint in checkpoints(folder):
        flip(checkpoint / "policy" / "rank-00000.safetensors")
    for _ in range(2):
        assert runs.run("train", rloo, f"run.dir={folder}", log="none sound") == 78
    assert "none is valid" in runs.text("none sound")
    assert steps_done(folder) == 5


def test_checkpoints_that_are_gone_are_missed(runs, rloo, folder):
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    assert runs.run("train", rloo, f"run.dir={folder}", log="gone") == 78
    assert "were deleted" in runs.text("gone")


def test_a_damaged_checkpoint_that_was_named_is_refused_and_a_sound_one_offered(runs, rloo, folder, tmp_path):
    newest = folder / "checkpoints" / "step-000004"
    flip(newest / "policy" / "rank-00000.safetensors")
    new = ("train", rloo, f"run.dir={tmp_path / 'new'}", f"run.resume={newest}")
    assert runs.run(*new, log="named") == 78
    assert "policy/rank-00000.safetensors" in runs.text("named")
    assert str(folder / "checkpoints" / "step-000002") in runs.text("named")


def test_another_run_goes_on_from_a_checkpoint(runs, rloo, folder, whole, tmp_path):
    """The whole history comes along, and the run it was taken from stays as it was."""
    before = sorted(path for path in folder.rglob("*"))
    checkpoint = folder / "checkpoints" / "step-000002"
    train = ("train", rloo, f"run.dir={tmp_path / 'fork'}", f"run.resume={checkpoint}")
    assert runs.run(*train, fault="role=driver,phase=step,step=6,kind=sigkill") == -signal.SIGKILL
    assert runs.run(*train, log="fork") == 0, runs.text("fork")
    assert "resuming after step 4" in runs.text("fork")  # its own checkpoint is newer
    assert_same(tmp_path / "fork", whole)
    assert sorted(path for path in folder.rglob("*")) == before
    gone = (*train[:-1], f"run.resume={tmp_path / 'gone' / 'checkpoints' / 'step-000002'}")
    assert runs.run(*gone, log="gone") == 0, runs.text("gone")  # where it began is not asked for any more
    old = ("train", rloo, f"run.dir={folder}", f"run.resume={checkpoint}")
    assert runs.run(*old, log="older") == 78
    assert "not the newest checkpoint" in runs.text("older")


# Stopping


@pytest.mark.parametrize(
    "name",
    [
        *("sigterm", "sigusr1"),
        *(pytest.param(name, marks=pytest.mark.full) for name in ("sigusr2", "sigint", "sighup")),
    ],
)
def test_a_signal_saves_and_ends_with_75(name, runs, rloo, whole, tmp_path):
    train = ("train", rloo, f"run.dir={tmp_path / 'run'}", "checkpoint.every=0")
    assert runs.run(*train, fault=f"role=driver,phase=step,step=3,kind={name}", log=name) == 75
    assert f"stopped by {name.upper()} at step 3" in runs.text(name)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000003"]
    assert runs.run(*train) == 0, runs.text()
    assert_same(tmp_path / "run", whole)


def test_the_stop_file(runs, rloo, whole, tmp_path):
    train = ("train", rloo, f"run.dir={tmp_path / 'run'}")
    pid = runs.start(*train, fault="role=driver,phase=step,step=3,kind=slow", log="file")
    assert until(lambda: steps_done(tmp_path / "run") == 2)
    (tmp_path / "run" / "STOP").touch()
    assert runs.wait(pid) == 75
    assert "the file STOP" in runs.text("file")
    assert runs.run(*train, log="still there") == 78
    assert "remove" in runs.text("still there")
    (tmp_path / "run" / "STOP").unlink()
    assert runs.run(*train) == 0, runs.text()
    assert_same(tmp_path / "run", whole)


def test_the_time_budget(runs, rloo, whole, tmp_path):
    """It stops before the time is up, with a step's and a save's time left."""
    train = ("train", rloo, f"run.dir={tmp_path / 'run'}")
    status = runs.run(*train, "run.max_time=1s", log="time")
    assert status == 75
    assert "run.max_time" in runs.text("time")
    assert runs.run(*train) == 0, runs.text()
    assert_same(tmp_path / "run", whole)


def test_a_second_signal_leaves_without_saving(runs, rloo, whole, tmp_path):
    """In one process when the step is done."""
    train = ("train", rloo, f"run.dir={tmp_path / 'run'}")
    pid = runs.start(*train, fault="role=driver,phase=step,step=4,kind=slow", log="second signal")
    assert until(lambda: steps_done(tmp_path / "run") == 3)
    for _ in range(2):
        time.sleep(1.5)
        runs.kill(pid, signal.SIGTERM)
    assert runs.wait(pid) == 128 + signal.SIGTERM
    assert "quitting without saving" in runs.text("second signal")
    assert checkpoints(tmp_path / "run")[-1].name == "step-000002"
    assert runs.run(*train) == 0, runs.text()
    assert_same(tmp_path / "run", whole)


def test_a_third_signal_kills_and_the_last_checkpoint_is_sound(runs, rloo, whole, tmp_path):
    """In one process the driver computes itself and hears nothing until the step ends."""
    train = ("train", rloo, f"run.dir={tmp_path / 'run'}")
    pid = runs.start(*train, fault="role=policy,phase=update,step=5,kind=hang", log="third")
    assert until(lambda: steps_done(tmp_path / "run") == 4)
    for _ in range(3):
        time.sleep(1.5)
        runs.kill(pid, signal.SIGTERM)
    assert runs.wait(pid) == -signal.SIGTERM
    assert "SIGTERM: finishing step and saving" in runs.text("third")
    assert runs.run(*train) == 0, runs.text()
    assert_same(tmp_path / "run", whole)


# The disk


def test_a_full_disk_costs_no_line_and_no_checkpoint_that_was_there(runs, rloo, whole, tmp_path):
    """A checkpoint that does not fit is left out with a warning; the third in a row ends the run with 76."""
    disk = tmp_path / "disk"
    disk.mkdir(mode=0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m,mode=700", "none", disk], check=False).returncode:
        pytest.skip("no right to mount a file system in memory")
    try:
        train = ("train", rloo, f"run.dir={disk / 'run'}", "checkpoint.every=1", "run.steps=6")
        pid = runs.start(*train, fault="role=driver,phase=step,step=3,kind=slow", log="full")
        assert until(lambda: steps_done(disk / "run") == 2)
        with (disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        assert runs.wait(pid) == 76, runs.text("full")
        text = runs.text("full")
        assert text.count("no checkpoint was saved") == 2
        assert "bytes" in text
        (disk / "filler").unlink()
        assert [path.name for path in checkpoints(disk / "run")]
        assert runs.run(*train, log="room again") == 0, runs.text("room again")
        assert_same(disk / "run", whole)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


# Numbers that are not finite


@pytest.mark.parametrize("kind", ["nan_loss", pytest.param("inf_gradient", marks=pytest.mark.full)])
def test_a_number_that_is_not_finite_ends_with_79_and_a_bundle_that_replays(kind, runs, rloo, tmp_path):
    train = ("train", rloo, f"run.dir={tmp_path / 'run'}")
    fault = f"role=policy,phase=update,step=5,at=3,kind={kind}"
    assert runs.run(*train, fault=fault, log=kind) == 79
    bundle = tmp_path / "run" / "bundles" / "step-000005"
    assert str(bundle) in runs.text(kind)
    assert "no weight was changed" in runs.text(kind)
    assert json.loads((bundle / "bundle.json").read_text())["checkpoint"].endswith("step-000004")
    assert steps_done(tmp_path / "run") == 4
    assert runs.run("replay", str(bundle), log=f"healthy {kind}") == 1  # without the fault it goes another way
    assert "outcome" in runs.text(f"healthy {kind}")
    assert runs.run("replay", str(bundle), fault=fault, log=f"same {kind}") == 0, runs.text(f"same {kind}")
    assert "the same, number by number" in runs.text(f"same {kind}")


def test_steps_that_are_skipped_are_counted_and_limited(runs, rloo, tmp_path):
    skip = ("train", rloo, "run.max_non_finite=3")
    once = "role=policy,phase=update,step=3,kind=nan_gradient"
    assert runs.run(*skip, f"run.dir={tmp_path / 'once'}", fault=once) == 0, runs.text()
    assert [line.get("non_finite", 0.0) for line in metrics(tmp_path / "once")] == [0, 0, 1, 0, 0, 0]
    always = "role=policy,phase=update,at=3,times=99,kind=nan_gradient"
    assert runs.run(*skip, f"run.dir={tmp_path / 'always'}", fault=always, log="always") == 79
    assert "in a row" in runs.text("always")


def test_a_reward_that_is_not_finite(runs, rloo, tmp_path):
    fault = "role=reward,phase=score,step=3,kind=nan_answer"
    assert runs.run("train", rloo, f"run.dir={tmp_path / 'stop'}", fault=fault, log="reward") == 79
    assert "no finite score" in runs.text("reward")
    dropped = ("train", rloo, f"run.dir={tmp_path / 'drop'}", "reward.failed=drop")
    assert runs.run(*dropped, fault=fault) == 0, runs.text()
    assert metrics(tmp_path / "drop")[2]["failed_scores"] == 1.0


def test_a_step_that_went_well_replays_number_by_number(runs, rloo, whole, tmp_path):
    train = ("train", rloo, f"run.dir={tmp_path / 'run'}", "run.bundle_steps=[4]", "checkpoint.keep_latest=1")
    assert runs.run(*train) == 0, runs.text()
    assert metrics(tmp_path / "run") == metrics(whole)
    bundle = tmp_path / "run" / "bundles" / "step-000004"
    assert [path.name for path in checkpoints(tmp_path / "run")] == [
        "step-000003",
        "step-000006",
    ]  # the first is pinned
    assert runs.run("replay", str(bundle), log="same") == 0, runs.text("same")
    assert runs.run("replay", str(bundle), "sampling.temperature=0.5", "run.allow_change=[sampling]", log="other") == 1
    assert "sampled tokens differ" in runs.text("other")
    assert runs.run("replay", str(tmp_path), log="nothing") == 78


def test_nothing_is_left_running(runs):
    assert not [pid for pid in runs.started if alive(pid)]
