"""The same on Ray, with the policy on two ranks: drivers that are killed."""

import signal

import pytest
from harness import assert_same, steps_done
from killed_recipes import PLACEMENTS

pytestmark = [pytest.mark.slow, pytest.mark.full]

KILLED = -signal.SIGKILL


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_killed_driver(name, on_ray, runs, tmp_path):
    train, whole = on_ray(name)
    folder, log = f"run.dir={tmp_path / 'run'}", f"killed {name}"
    assert runs.run(*train, folder, fault="role=driver,phase=step,step=4,kind=sigkill", log=log) == KILLED
    assert steps_done(tmp_path / "run") == 3
    assert runs.run(*train, folder, log=log) == 0, runs.text(log)
    assert "resuming after step 2" in runs.text(log)
    assert_same(tmp_path / "run", whole)
