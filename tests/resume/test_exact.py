"""A run that was killed and resumed is the run that was never stopped, byte for byte."""

import signal
from pathlib import Path

import pytest
from harness import assert_same, killed_at_random, metrics, steps_done
from killed_recipes import ALGORITHMS, ALWAYS_ON_RAY

pytestmark = pytest.mark.slow

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def reference(runs, write_recipe, tmp_path_factory):
    """The uninterrupted run of a recipe by name, made once; returns (recipe, folder)."""
    made: dict[str, tuple[str, Path]] = {}

    def get(name: str) -> tuple[str, Path]:
        if name not in made:
            recipe, folder = write_recipe(name), tmp_path_factory.mktemp("reference") / "run"
            assert runs.run("train", recipe, f"run.dir={folder}", log="reference") == 0, runs.text("reference")
            made[name] = recipe, folder
        return made[name]

    return get


def _group(name: str) -> pytest.MarkDecorator:
    """What is killed on Ray need not be killed here as often; a function is a reward role as any other."""
    return pytest.mark.full if name in ALWAYS_ON_RAY or "function" in name else pytest.mark.long


@pytest.mark.parametrize("name", [pytest.param(name, marks=_group(name)) for name in ALGORITHMS])
def test_killed_between_and_in_steps_and_resumed(name, reference, runs, tmp_path):
    """Killed twice: before the fourth step, and in the middle of the last but one."""
    recipe, whole = reference(name)
    train = ("train", recipe, f"run.dir={tmp_path / 'run'}")
    last = metrics(whole)[-1]["step"]
    assert runs.run(*train, fault="role=driver,phase=step,step=4,kind=sigkill") == KILLED
    role = "reward" if name.startswith("reward_model") else "policy"
    assert runs.run(*train, fault=f"role={role},phase=update,step={last - 1},kind=sigkill") == KILLED
    assert steps_done(tmp_path / "run") < last
    assert runs.run(*train) == 0, runs.text()
    assert_same(tmp_path / "run", whole)


WRITING = [
    ("policy", "held_out"),
    *(("driver", point) for point in ("metrics", "shard", "manifest", "publish")),
    ("policy", "export"),
]
"""Where a run leaves other files behind; killed elsewhere, it leaves the same ones as in the test above."""
THINKING = [
    *(("policy", phase) for phase in ("generate", "update", "save")),
    *(("reward", "score"), ("reference", "reference"), ("driver", "step")),
]
PLACES = [
    *(pytest.param("rloo", *place, marks=pytest.mark.long) for place in WRITING),
    *(pytest.param("rloo", *place, marks=pytest.mark.full) for place in THINKING),
    *(pytest.param("ppo", *place, marks=pytest.mark.full) for place in WRITING + THINKING),
]


@pytest.mark.parametrize(("name", "role", "phase"), PLACES)
def test_killed_in_each_phase(name, role, phase, reference, runs, tmp_path):
    """At the second time that a phase comes, so that there is something to lose."""
    recipe, whole = reference(name)
    train = ("train", recipe, f"run.dir={tmp_path / 'run'}")
    assert runs.run(*train, fault=f"role={role},phase={phase},at=2,kind=sigkill") == KILLED
    assert runs.run(*train) == 0, runs.text()
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "phase", [pytest.param("values", marks=pytest.mark.full), pytest.param("critic_update", marks=pytest.mark.long)]
)
def test_killed_in_each_phase_of_the_critic(phase, reference, runs, tmp_path):
    recipe, whole = reference("ppo")
    train = ("train", recipe, f"run.dir={tmp_path / 'run'}")
    assert runs.run(*train, fault=f"role=critic,phase={phase},step=5,kind=sigkill") == KILLED
    assert runs.run(*train) == 0, runs.text()
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("kills", [pytest.param(6, marks=pytest.mark.long), pytest.param(50, marks=pytest.mark.full)])
def test_kills_at_random_times(kills, runs, write_recipe, tmp_path):
    """Cycles of SIGKILL and resume in one run equal the run that nobody disturbed."""
    killed_at_random(runs, write_recipe("rloo"), tmp_path, kills=kills, seed=0)
