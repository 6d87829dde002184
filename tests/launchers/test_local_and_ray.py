"""Starting on this machine and on a cluster that is there: what is tried again, which signals arrive, whose token."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from align.config import RunConfig
from align.errors import ConfigError
from launchers import common, local, ray

RECIPE = """\
algorithm: rloo
run: {{dir: {folder}/run, steps: 4}}
data: {{path: {folder}}}
policy: {{path: {folder}, optimizer: {{lr: 1e-6}}}}
reward: {{path: {folder}}}
"""
STAND_IN = """\
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
with (folder / "calls").open("a") as file: file.write(" ".join(sys.argv[2:]) + "\\n")
number = len((folder / "calls").read_text().splitlines()) - 1
plan = (folder / "plan").read_text().split()[number]
if plan.startswith("kill"): os.kill(os.getpid(), int(plan[4:]))
if plan.startswith("wait"):
    signal.signal(int(plan[4:]), lambda *_: sys.exit(75))
    (folder / "ready").touch()
    time.sleep(60)
sys.exit(int(plan))
"""
"""In place of `align train`: the word of ``plan`` with the number of the call is its status, a signal that kills it, or
the one that it waits for."""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    command = [sys.executable, str(tmp_path / "stand_in.py"), str(tmp_path)]
    monkeypatch.setattr(common, "train_command", lambda recipe, overrides: [*command, *overrides])
    before = {number: signal.getsignal(number) for number in local.SIGNALS}
    yield path
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("plan", "status", "calls"),
    [
        ("0", 0, 1),
        ("75 0", 75, 1),
        ("78 0", 78, 1),
        ("79 0", 79, 1),
        ("1 0", 1, 1),
        ("76 0", 0, 2),
        ("76 76 76 0", 76, 3),
        ("kill9 76 0", 0, 3),
        ("kill11 75", 75, 2),
    ],
)
def test_only_faults_are_tried_again(recipe: Path, tmp_path: Path, plan: str, status: int, calls: int):
    (tmp_path / "plan").write_text(plan)
    assert local.main([str(recipe), "--retries", "2", "run.steps=9"]) == status
    assert (tmp_path / "calls").read_text().splitlines() == ["run.steps=9"] * calls


@pytest.mark.parametrize(
    ("resume", "has_checkpoint", "again"),
    [
        ("auto", False, []),
        ("auto", True, []),
        ("never", False, ["run.resume=auto"]),
        ("never", True, ["run.resume=auto"]),
        ("old/checkpoints/step-000003", False, []),
        ("old/checkpoints/step-000003", True, ["run.resume=auto"]),
    ],
)
def test_a_second_start_resumes_from_the_newest_checkpoint_of_the_run(
    tmp_path: Path, resume: str, has_checkpoint: bool, again: list[str]
):
    if has_checkpoint:
        (tmp_path / "checkpoints" / "step-000004").mkdir(parents=True)
    assert common.resume_overrides(RunConfig(dir=str(tmp_path), steps=1, resume=resume)) == again


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_reaches_the_run_and_nothing_is_started_again(recipe: Path, tmp_path: Path, number: signal.Signals):
    (tmp_path / "plan").write_text(f"wait{number.value} 0")

    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert local.main([str(recipe)]) == 75
    thread.join()
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_a_run_that_a_signal_ended_is_not_started_again(recipe: Path, tmp_path: Path):
    """Killed by the signal that was passed on, not by a fault."""
    (tmp_path / "plan").write_text(f"wait{signal.SIGUSR1.value} 0")

    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    assert local.main([str(recipe)]) == 128 + signal.SIGTERM
    thread.join()
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_the_command_is_align_train_with_this_python():
    command = common.train_command(Path("a b.yaml"), ["run.steps=1"])
    assert command == [sys.executable, "-m", "align.cli", "train", "a b.yaml", "run.steps=1"]


def test_a_running_cluster_gets_its_address_and_token(recipe: Path, tmp_path: Path, monkeypatch):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o600)
    became: list = []
    monkeypatch.setattr(os, "execve", lambda *arguments: became.extend(arguments))
    ray.main([str(recipe), "--address", "10.0.0.7:6379", "run.steps=9", "--token-file", str(token)])
    program, command, environment = became
    assert program == sys.executable
    assert command[-3:] == ["run.steps=9", "executor=ray", "cluster.address=10.0.0.7:6379"]
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(token)
    assert "secret" not in " ".join([*command, *environment.values()])


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_token_that_others_can_read_is_refused(recipe: Path, tmp_path: Path, mode: int):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:o}; others must not read it"):
        ray.main([str(recipe), "--address=10.0.0.7:6379", f"--token-file={token}"])


@pytest.mark.parametrize("address", ["10.0.0.7", "auto", ":6379", "a b:1", "ray://h:1"])
def test_an_address_is_host_and_port(recipe: Path, address: str):
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        ray.main([str(recipe), f"--address={address}"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "ray"])
def test_as_a_script_it_runs_from_any_folder(tmp_path: Path, name: str):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    script = Path(common.__file__).with_name(f"{name}.py")
    address = ["--address=127.0.0.1:9"] if name == "ray" else []
    command = [sys.executable, str(script), "recipe.yaml", *address, "placement.nobody=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 78
    assert "no role is called nobody" in done.stderr
