"""The matrix of faults: every role killed in every phase that it has, every signal in every phase.

Each case must end as a run that nobody disturbed. ``make test-faults`` runs all of it; what `.ci/run` runs is in the
other files here.
"""

import json
import re
import signal

import pytest
from harness import assert_same, checkpoints, killed_at_random, metrics

pytestmark = [pytest.mark.slow, pytest.mark.full]

KILLED = -signal.SIGKILL
WORKED = {
    "ppo": "{policy: 0-1, critic: 2, reference: 3, reward: 3}",
    "rloo": "{policy: 0, reference: 2, reward: 3}",
    "dpo": "{policy: 0-1, reference: 2, reward: 3}",
}
TRAINED = ("start", "held_out", "generate", "update", "save", "save_wait", "export")
CRITIC = ("start", "values", "critic_update", "save", "save_wait")
FROZEN = {"reference": ("start", "reference"), "reward": ("start", "score")}
WORKERS = [
    *(("ppo", "policy", rank, phase) for rank in (0, 1) for phase in TRAINED),
    *(("ppo", "critic", 0, phase) for phase in CRITIC),
    *(("rloo", "policy", 0, phase) for phase in TRAINED),
    *(("dpo", "policy", rank, phase) for rank in (0, 1) for phase in TRAINED if phase != "generate"),
    *((name, role, 0, phase) for name in WORKED for role, phases in FROZEN.items() for phase in phases),
]
DRIVER = ("step", "metrics", "checkpoint", "shard", "manifest", "publish", "retain")
SIGNALS = ("sigusr1", "sigusr2", "sigterm", "sigint", "sighup")


@pytest.fixture(scope="module")
def reference(runs, write_recipe, tmp_path_factory):
    """The undisturbed run of a recipe on an executor; returns (arguments but for the folder, folder)."""
    made = {}

    def get(name: str, *options: str):
        if (name, options) not in made:
            train = ("train", write_recipe(name), *options)
            folder = tmp_path_factory.mktemp("reference") / "run"
            assert runs.run(*train, f"run.dir={folder}", log=f"whole {name}") == 0, runs.text(f"whole {name}")
            made[name, options] = train, folder
        return made[name, options]

    return get


@pytest.mark.parametrize(("name", "role", "rank", "phase"), WORKERS)
def test_a_worker_is_killed(name, role, rank, phase, reference, runs, tmp_path):
    """The run names it and the phase, brings it or all roles up again by itself, and ends as if nothing had been."""
    train, whole = reference(name, "executor=ray", f"placement={WORKED[name]}")
    log = f"killed {name} {role} {rank} {phase}"
    at = 1 if phase in ("start", "export") else 2
    fault = f"role={role},rank={rank},phase={phase},at={at},kind=sigkill"
    status = runs.run(*train, f"run.dir={tmp_path / 'run'}", "run.max_restarts=1", fault=fault, log=log)
    assert status == 0, runs.text(log)
    assert re.search(rf"{role}-{rank} (died|failed) in", runs.text(log)), runs.text(log)
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("phase", DRIVER)
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("name", ["ppo", "rloo", "dpo"])
def test_the_driver_is_killed(name, phase, at, reference, runs, tmp_path):
    train, whole = reference(name)
    log = f"driver {name} {phase} {at}"
    fault = f"role=driver,phase={phase},at={at},kind=sigkill"
    assert runs.run(*train, f"run.dir={tmp_path / 'run'}", fault=fault, log=log) == KILLED or at == 3
    assert runs.run(*train, f"run.dir={tmp_path / 'run'}", log=log) == 0, runs.text(log)
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize(
    ("role", "phase"),
    [
        *(("policy", phase) for phase in TRAINED),
        *(("critic", phase) for phase in CRITIC),
        ("reference", "reference"),
        ("reward", "score"),
        ("driver", "publish"),
    ],
)
def test_a_signal_in_a_phase(name, role, phase, reference, runs, tmp_path):
    """Status 75 with a checkpoint of the step under way, or 0 where nothing was left to do; then the same result."""
    train, whole = reference("ppo")
    log = f"signal {name} {role} {phase}"
    at = 1 if phase in ("start", "export") else 2
    fault = f"role={role},phase={phase},at={at},kind={name}"
    status = runs.run(*train, f"run.dir={tmp_path / 'run'}", fault=fault, log=log)
    if phase == "export":  # the best policy, in the middle of a step, or the final one
        assert status in (0, 75), runs.text(log)
    else:
        assert status == 75, runs.text(log)
    assert runs.run(*train, f"run.dir={tmp_path / 'run'}", log=log) == 0, runs.text(log)
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("name", ["ppo", "dpo"])
def test_fifty_kills(name, runs, write_recipe, tmp_path):
    killed_at_random(runs, write_recipe(name), tmp_path, kills=50, seed=1)


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("times", [1, 5])
@pytest.mark.parametrize("name", ["rloo", "ppo", "dpo"])
def test_numbers_that_are_not_finite(name, times, what, kind, runs, write_recipe, tmp_path):
    """One is left out and counted; five in a row end the run, and no checkpoint holds such a number."""
    log = f"{name} {kind} {what} {times}"
    skip = ("train", write_recipe(name), f"run.dir={tmp_path / 'run'}", "run.max_non_finite=5")
    fault = f"role=policy,phase=update,at=2,times={times},kind={kind}_{what}"
    status = runs.run(*skip, fault=fault, log=log)
    assert status == (79 if times == 5 else 0), runs.text(log)
    assert sum(line.get("non_finite", 0.0) for line in metrics(tmp_path / "run")) == times
    for checkpoint in checkpoints(tmp_path / "run"):
        assert "NaN" not in json.dumps(json.loads((checkpoint / "driver.json").read_text()))
