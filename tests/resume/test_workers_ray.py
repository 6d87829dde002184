"""On Ray: workers that are killed, and other numbers of processes."""

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from harness import assert_same, checkpoints, metrics, until
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.mark.long
@pytest.mark.timeout(900)  # the roles come up four times, beside other tests
def test_a_worker_without_state_then_the_driver_then_a_worker_with_state(on_ray, runs, tmp_path):
    """One run is killed three times: a role is replaced in place, the driver is started again, all roles come anew."""
    train, whole = on_ray("ppo")
    train = (*train, f"run.dir={tmp_path / 'run'}", "run.max_restarts=1")
    pid = runs.start(*train, fault="role=reward,phase=score,step=2,kind=sigkill", log="first")
    assert until(lambda: checkpoints(tmp_path / "run"), 300.0), runs.text("first")
    runs.kill(pid)
    assert runs.wait(pid) == -signal.SIGKILL, runs.text("first")
    assert "reward-0 died in score" in runs.text("first")
    assert "from the last checkpoint" not in runs.text("first")
    fault = "role=policy,rank=1,phase=update,step=5,kind=sigkill"
    assert runs.run(*train, fault=fault, log="second") == 0, runs.text("second")
    text = runs.text("second")
    assert "resuming after step" in text.partition("policy-1 died in update")[0]
    assert re.search(r"policy-1 died in update", text), text
    assert "restart 1 of 1, from the last checkpoint" in text
    assert_same(tmp_path / "run", whole)


@pytest.mark.full
@pytest.mark.parametrize(
    ("role", "rank", "phase"),
    [("policy", 1, "update"), ("critic", 0, "critic_update"), ("policy", 0, "generate"), ("policy", 0, "save")],
)
def test_a_killed_worker_with_state_is_never_replaced_and_the_run_goes_on_by_itself(
    role, rank, phase, on_ray, runs, tmp_path
):
    train, whole = on_ray("ppo")
    log = f"worker {role} {phase}"
    fault = f"role={role},rank={rank},phase={phase},step=4,kind=sigkill"
    assert runs.run(*train, f"run.dir={tmp_path / 'run'}", "run.max_restarts=1", fault=fault, log=log) == 0, runs.text(
        log
    )
    text = runs.text(log)
    assert re.search(rf"{role}-{rank} died in {phase}", text), text
    assert "restart 1 of 1, from the last checkpoint" in text
    assert_same(tmp_path / "run", whole)


@pytest.mark.full
@pytest.mark.parametrize("role", ["reference", "reward"])
def test_a_killed_worker_without_state_is_replaced_in_place(role, on_ray, runs, tmp_path):
    train, whole = on_ray("ppo")
    log = f"stateless {role}"
    phase = {"reward": "score"}.get(role, role)
    fault = f"role={role},phase={phase},step=4,kind=sigkill"
    assert runs.run(*train, f"run.dir={tmp_path / 'run'}", "run.max_restarts=1", fault=fault, log=log) == 0, runs.text(
        log
    )
    assert f"{role}-0 died in {phase}" in runs.text(log)
    assert "from the last checkpoint" not in runs.text(log)
    assert_same(tmp_path / "run", whole)


@pytest.mark.full
def test_without_restarts_left_it_ends_with_76_and_the_cause(on_ray, runs, tmp_path):
    train, whole = on_ray("ppo")
    folder = f"run.dir={tmp_path / 'run'}"
    fault = "role=policy,rank=1,phase=update,step=4,kind=sigkill"
    assert runs.run(*train, folder, fault=fault, log="none left") == 76
    assert "policy-1 died in update" in runs.text("none left")
    assert runs.run(*train, folder, log="none left") == 0, runs.text("none left")
    assert_same(tmp_path / "run", whole)


def responses(folder: Path, step: int) -> list[str]:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [line["response"] for line in lines if line["step"] == step]


@pytest.mark.full
def test_on_one_two_and_one_processes_and_from_zero_2_to_3(on_ray, runs, tmp_path):
    """The same samples at the step after, and weights within 1e-6."""
    train, whole = on_ray("rloo")
    folder = f"run.dir={tmp_path / 'run'}"
    without = ("policy.lora=null", "policy.optimizer.lr=1e-4", "run.logged_samples=14")
    straight = tmp_path / "straight"
    assert runs.run(*train, *without, f"run.dir={straight}", log="worlds") == 0, runs.text("worlds")
    stops = [
        (2, "placement={policy: 0, reference: 1, reward: 1}", "policy.zero_stage=2"),
        (3, "placement={policy: 0-1, reference: 2, reward: 3}", "policy.zero_stage=2"),
        (4, "placement={policy: 0-1, reference: 2, reward: 3}", "policy.zero_stage=3"),
        (None, "placement={policy: 0, reference: 1, reward: 1}", "policy.zero_stage=3"),
    ]
    for stop, *split in stops:
        fault = f"role=driver,phase=step,step={stop},kind=sigterm" if stop else ""
        status = runs.run(*train, *without, *split, folder, fault=fault, log="worlds")
        assert status == (75 if stop else 0), runs.text("worlds")
    for step in range(1, 7):
        assert responses(tmp_path / "run", step) == responses(straight, step), step
    ours, theirs = (load_file(one / "final" / "model.safetensors") for one in (tmp_path / "run", straight))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6, msg=name)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 7))
    worlds = {
        path.name: json.loads((path / "manifest.json").read_text())["facts"]["roles"] for path in checkpoints(whole)
    }
    assert all(found["policy"] == {"world_size": 2, "zero_stage": 2} for found in worlds.values())
