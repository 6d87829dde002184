"""The job script and its functions, on stand-ins for Slurm's commands, Ray and the driver."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMON = ROOT / "slurm" / "common.sh"
JOB = "4194304"
"""A number that no process of this machine carries."""

SRUN = """\
#!/bin/bash
# Runs the step here, once, whatever nodes it asked for.
while [[ $1 != bash && $1 != env ]]; do [[ $1 == --chdir=* ]] && cd "${1#*=}"; shift; done
printf '%s\\n' "$*" >>"$STAND_INS/steps"
exec env SLURM_STEP_ID=$$ SLURMD_NODENAME=localhost "$@"
"""
SCONTROL = """\
#!/bin/bash
case "$1 $2" in
  "show hostnames") echo localhost ;;
  "show job") cat "$STAND_INS/job" ;;
  *) echo "$*" >>"$STAND_INS/requeued" ;;
esac
"""
PYTHON = """\
#!/bin/bash
# `ray start` listens where it was told to; a health check is content; `align train` does what the case says.
case "$*" in
  *health-check*) exit 0 ;;
  *'ray.scripts.scripts start '*)
    for word in "$@"; do [[ $word == --port=* ]] && port=${word#*=}; done
    seconds=$(cat "$STAND_INS/ray-seconds")
    exec REAL -c "import socket, time; s = $seconds and socket.create_server(('', ${port:-0})); time.sleep($seconds)" ;;
esac
printf '%s\\n' "$@" >"$STAND_INS/driver"
[[ $RAY_AUTH_TOKEN_PATH ]] && stat -c %a "$RAY_AUTH_TOKEN_PATH" >"$STAND_INS/token"
echo "$RAY_AUTH_MODE" >>"$STAND_INS/token"
. "$STAND_INS/case"
"""


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder of commands, and of what they were asked."""
    folder = tmp_path / "stand-ins"
    folder.mkdir()
    scripts = {
        "srun": SRUN,
        "python": PYTHON.replace("REAL", sys.executable),
        "squeue": "#!/bin/bash\ncat $STAND_INS/state\n",
        "scontrol": SCONTROL,
        "sleep": '#!/bin/bash\n[[ $1 == 600 ]] || exec /bin/sleep "$1"\n',
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "state").write_text("RUNNING\n")
    (folder / "job").write_text("PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=None\n")
    (folder / "ray-seconds").write_text("60")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as the launcher leaves it, with a blank in its name."""
    folder = tmp_path / "a run"
    code = folder / "launch" / "code" / "slurm"
    code.mkdir(parents=True)
    for file in (ROOT / "slurm").iterdir():
        shutil.copy(file, code)
    (folder / "launch" / "runs").write_text(f"{folder}\n")
    return folder


def environment(stand_ins: Path, **more: str) -> dict[str, str]:
    path = f"{stand_ins}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    return {**os.environ, "PATH": path, "STAND_INS": str(stand_ins), **job, **more}


def start(
    run: Path, stand_ins: Path, case: str, settings: str = "", step_arguments: Sequence[str] = (), **more: str
) -> subprocess.Popen[str]:
    """Begin the job. ``case`` is what the driver does, ``settings`` replaces some of the script's."""
    (stand_ins / "case").write_text(case)
    text = (
        (ROOT / "slurm" / more.get("TEMPLATE", "train.sbatch"))
        .read_text()
        .replace("lost_seconds=30", "lost_seconds=${LOST:-1}")
    )
    text = text.replace(" #%settings", f"\nmax_restarts=20 retries=1 {settings}")
    script = run / "launch" / "job.sbatch"
    script.write_text(text)
    command = ["bash", str(script), str(run / "launch"), str(stand_ins / "python"), *step_arguments]
    return subprocess.Popen(command, env=environment(stand_ins, **more), stdout=subprocess.PIPE, text=True)


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = job.communicate(timeout=60)
    return job.returncode, output


def requeues(stand_ins: Path) -> int:
    file = stand_ins / "requeued"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "settings", "more", "status", "requeued", "ended"),
    [
        ("exit 0", "", {}, 0, 0, "0"),
        ("exit 75", "", {}, 75, 1, None),
        ("exit 75", "", {"SLURM_RESTART_COUNT": "19"}, 75, 1, None),
        ("exit 75", "", {"SLURM_RESTART_COUNT": "20"}, 75, 0, None),
        ("exit 75", "max_restarts=0", {}, 75, 0, None),
        ("exit 76", "", {}, 76, 1, None),
        ("exit 76", "retries=0", {}, 76, 0, None),
        ("kill -KILL $$", "", {}, 76, 1, None),
        ("exit 77", "", {}, 77, 0, None),
        ("exit 78", "", {}, 78, 0, "78"),
        ("exit 79", "", {}, 79, 0, "79"),
        ("exit 1", "", {}, 1, 0, None),
        ("exit 130", "", {}, 130, 0, None),
    ],
)
def test_each_status_has_its_consequence(run, stand_ins, case, settings, more, status, requeued, ended):
    assert finish(start(run, stand_ins, case, settings, **more))[0] == status
    assert requeues(stand_ins) == requeued
    file = run / "launch" / "ended"
    assert (file.read_text().strip() if file.exists() else None) == ended
    assert not list((run / "launch").glob("token-*"))
    assert not Path(f"/tmp/ray/j{JOB}.{more.get('SLURM_RESTART_COUNT', 0)}").exists()


@pytest.mark.slow
def test_the_driver_is_told_where_ray_is_and_has_a_token_of_its_own(run, stand_ins):
    assert finish(start(run, stand_ins, "exit 0"))[0] == 0
    module, name, train, recipe, executor, address = (stand_ins / "driver").read_text().splitlines()
    assert (module, name, train, recipe, executor) == (
        "-m", "align.cli", "train", f"{run}/launch/config.yaml", "executor=ray",
    )  # fmt: skip
    host, port = address.removeprefix("cluster.address=").split(":")
    assert not host.startswith("127.")
    assert 20000 <= int(port) < 32000
    assert (stand_ins / "token").read_text().split() == ["600", "token"]


@pytest.mark.slow
@pytest.mark.parametrize(("last", "status"), [("true", 0), ("false", 78)])
def test_each_step_reads_what_the_site_needs_within_its_container(run, stand_ins, last: str, status: int):
    (run / "launch" / "setup.sh").write_text(f'export SITE="$INSIDE $#"\necho read >>"$STAND_INS/setup"\n{last}\n')
    case = '[[ $SLURM_EXPORT_ENV == ALL ]] && echo "$SITE" >"$STAND_INS/site"; exit 0'
    job = start(run, stand_ins, case, step_arguments=["--mpi=none", "--", "env", "INSIDE=container"])
    assert finish(job)[0] == status
    if status == 0:
        assert (stand_ins / "site").read_text() == "container 0\n"  # no argument of the step reached the file
        assert (stand_ins / "setup").read_text().split() == ["read"] * 2  # Ray and driver; the end does without


@pytest.mark.slow
@pytest.mark.parametrize(("number", "word"), [(signal.SIGUSR1, "USR1"), (signal.SIGTERM, "TERM")])
def test_a_signal_to_the_script_reaches_the_driver_as_usr2(run, stand_ins, number, word):
    job = start(run, stand_ins, "trap 'exit 75' USR2; touch $STAND_INS/ready; while :; do sleep 0.1; done")
    wait_for(stand_ins / "ready")
    job.send_signal(number)
    status, output = finish(job)
    assert (status, requeues(stand_ins)) == (75, 1)
    assert f"{word}: asking the run to save and stop" in output


@pytest.mark.slow
def test_after_sigterm_the_end_of_ray_is_the_end_of_the_driver(run, stand_ins):
    """Slurm is ending all of it, and the script must clean up before it is killed itself."""
    (stand_ins / "ray-seconds").write_text("8")
    job = start(run, stand_ins, "trap '' USR2; touch $STAND_INS/ready; exec sleep 50", LOST="600")
    wait_for(stand_ins / "ready")
    job.send_signal(signal.SIGTERM)
    assert finish(job)[0] == 75
    assert not list((run / "launch").glob("token-*"))


@pytest.mark.slow
def test_a_driver_that_had_not_begun_to_listen_is_requeued_without_being_a_fault(run, stand_ins):
    """Its handler is not there yet, so USR2 kills it; there is nothing to lose."""
    job = start(run, stand_ins, "touch $STAND_INS/ready; exec sleep 50")
    wait_for(stand_ins / "ready")
    job.send_signal(signal.SIGUSR1)
    assert finish(job)[0] == 75
    assert requeues(stand_ins) == 1
    assert not (run / "launch" / "faults").exists()


@pytest.mark.slow
@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_what_slurm_has_decided_is_left_alone(run, stand_ins, state):
    (stand_ins / "state").write_text(state)
    assert finish(start(run, stand_ins, "exit 75"))[0] == 75
    assert requeues(stand_ins) == 0


@pytest.mark.slow
def test_a_preemption_is_no_fault(run, stand_ins):
    """Slurm told the steps alone, which took Ray from the driver."""
    (stand_ins / "job").write_text("PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=2026-01-01T00:10:00\n")
    assert finish(start(run, stand_ins, "exit 76", "retries=0"))[0] == 75
    assert requeues(stand_ins) == 1
    assert not (run / "launch" / "faults").exists()


@pytest.mark.slow
def test_a_file_stop_ends_the_job_for_good(run, stand_ins):
    assert finish(start(run, stand_ins, f"touch '{run}/STOP'; exit 75"))[0] == 75
    assert requeues(stand_ins) == 0
    (stand_ins / "steps").unlink()
    assert finish(start(run, stand_ins, "exit 0"))[0] == 75  # the next job of a chain
    assert not (stand_ins / "steps").exists()


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, 78, 79])
def test_a_job_whose_run_is_over_starts_nothing(run, stand_ins, status):
    (run / "launch" / "ended").write_text(f"{status}\n")
    assert finish(start(run, stand_ins, "exit 1"))[0] == status
    assert not (stand_ins / "steps").exists()


@pytest.mark.slow
def test_faults_are_counted_over_the_starts_of_a_job(run, stand_ins):
    """One is tried again; another job's do not count."""
    (run / "launch" / "faults").write_text("7.0\n7.1\n")
    assert finish(start(run, stand_ins, "exit 76"))[0] == 76
    assert finish(start(run, stand_ins, "exit 76", SLURM_RESTART_COUNT="1"))[0] == 76
    assert requeues(stand_ins) == 1
    assert (run / "launch" / "faults").read_text().split() == ["7.0", "7.1", f"{JOB}.0", f"{JOB}.1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("resume", "checkpoint", "added"),
    [
        ("auto", True, []),
        ("never", False, ["run.resume=auto"]),
        ("never", True, ["run.resume=auto"]),
        ("checkpoint", False, []),
        ("checkpoint", True, ["run.resume=auto"]),
    ],
)
def test_a_second_start_goes_on_from_the_newest_checkpoint_of_the_run(run, stand_ins, resume, checkpoint, added):
    if checkpoint:
        (run / "checkpoints" / "step-000002").mkdir(parents=True)
    for more in ([], added):
        finish(start(run, stand_ins, "exit 75", f"resume={resume}"))
        assert (stand_ins / "driver").read_text().splitlines()[6:] == more


@pytest.mark.slow
def test_ray_that_does_not_start_is_a_fault(run, stand_ins):
    (stand_ins / "ray-seconds").write_text("0")
    assert finish(start(run, stand_ins, "exit 0", "start_seconds=2"))[0] == 76
    assert requeues(stand_ins) == 1
    assert not (stand_ins / "driver").exists()


@pytest.mark.slow
def test_a_driver_that_does_not_notice_the_end_of_ray_is_killed(run, stand_ins):
    (stand_ins / "ray-seconds").write_text("5")
    status, output = finish(start(run, stand_ins, "exec sleep 50"))
    assert (status, requeues(stand_ins)) == (76, 1)
    assert "a part of Ray has ended" in output


@pytest.mark.slow
def test_a_task_of_an_array_has_its_own_run(run, stand_ins, tmp_path):
    other = tmp_path / "other"
    (other / "launch").mkdir(parents=True)
    (run / "launch" / "runs").write_text(f"{run}\n{other}\n")
    assert finish(start(run, stand_ins, "exit 0", SLURM_ARRAY_TASK_ID="1"))[0] == 0
    assert f"{other}/launch/config.yaml" in (stand_ins / "driver").read_text()
    assert (other / "launch" / "ended").exists() and not (run / "launch" / "ended").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("case", "status", "requeued"), [("exit 0", 0, 0), ("exit 76", 76, 1), ("exit 78", 78, 0)])
def test_a_service_is_tried_again_after_faults(run, stand_ins, case, status, requeued):
    assert finish(start(run, stand_ins, case, TEMPLATE="reward_service.sbatch"))[0] == status
    assert requeues(stand_ins) == requeued
    arguments = ["-m", "align.cli", "serve", "reward", f"{run}/launch/config.yaml"]
    assert (stand_ins / "driver").read_text().splitlines() == arguments


@pytest.mark.slow
@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 0)])
def test_a_service_is_asked_to_end_and_comes_back_after_a_time_limit_alone(run, stand_ins, number, requeued):
    case = "trap 'exit 0' TERM; touch $STAND_INS/ready; while :; do sleep 0.1; done"
    job = start(run, stand_ins, case, TEMPLATE="reward_service.sbatch")
    wait_for(stand_ins / "ready")
    job.send_signal(number)
    assert finish(job)[0] == 0
    assert requeues(stand_ins) == requeued


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


def function(name: str, *arguments: str, **variables: str) -> str:
    command = ["bash", str(COMMON), name, *arguments]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("scope", "killed"),
    [("job", ["other step", "other step before"]), ("step", ["this step"]), ("earlier", ["other step before"])],
)
def test_what_is_ended_carries_the_number_of_the_job(scope: str, killed: list[str]):
    """Never the job script, which has no step, a stranger, or this step itself with the end of the job."""
    victims = {
        "this step": {"SLURM_JOB_ID": JOB, "SLURM_STEP_ID": "3", "SLURM_RESTART_COUNT": "1"},
        "other step": {"SLURM_JOB_ID": JOB, "SLURM_STEP_ID": "1", "SLURM_RESTART_COUNT": "1"},
        "other step before": {"SLURM_JOB_ID": JOB, "SLURM_STEP_ID": "1"},
        "job script": {"SLURM_JOB_ID": JOB, "SLURM_RESTART_COUNT": "1"},
        "stranger": {"SLURM_JOB_ID": f"{JOB}1", "SLURM_STEP_ID": "1"},
        "nobody": {},
    }
    processes = {name: subprocess.Popen(["sleep", "60"], env={**os.environ, **more}) for name, more in victims.items()}
    try:
        function("kill_processes", scope, SLURM_JOB_ID=JOB, SLURM_STEP_ID="3", SLURM_RESTART_COUNT="1")
        time.sleep(0.1)
        assert [name for name, process in processes.items() if process.poll() is not None] == killed
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def test_ports_differ_between_jobs_and_restarts_and_pass_over_what_is_taken():
    ports = {
        function("port_for", "127.0.0.1", SLURM_JOB_ID=str(job), SLURM_RESTART_COUNT=str(restart))
        for job in (41, 42, 43)
        for restart in range(3)
    }
    assert len(ports) == 9
    first = int(min(ports))
    job = next(job for job in range(1, 1200) if job * 13 % 1200 == (first - 20000) // 10)
    with socket.create_server(("127.0.0.1", first)):
        port = int(function("port_for", "127.0.0.1", SLURM_JOB_ID=str(job)))
    assert port != first and port % 10 == 0 and 20000 <= port < 32000


def test_the_address_of_this_machine_is_not_loopback():
    """Whatever its name resolves to: Debian gives it 127.0.1.1."""
    for name in ("localhost", "no-such-host.invalid", socket.gethostname()):
        address = function("ip_of", name)
        assert socket.inet_aton(address) and not address.startswith("127."), name
        assert function("interface_of", address) not in ("", "lo")


def test_a_folder_is_private_made_anew_and_never_through_a_link(tmp_path: Path):
    folder = tmp_path / "shared" / "own"
    function("make_private_folder", str(folder))
    (folder / "left").touch()
    function("make_private_folder", str(folder))
    assert not list(folder.iterdir())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.parent.stat().st_mode & 0o7777 == 0o1777
    link = tmp_path / "shared" / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        function("make_private_folder", str(link))
    assert (tmp_path / "shared").is_dir()


def test_arguments_stay_arguments(tmp_path: Path):
    hostile = "$(touch owned) `touch owned`; touch owned '\"\\"
    script = (
        f'. {COMMON}; printf "%s" "$1" | {sys.executable} -c "import json, sys; print(json.dumps(sys.stdin.read()))"'
    )
    done = subprocess.run(
        ["bash", "-c", script, "_", hostile], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert json.loads(done.stdout) == hostile and not list(tmp_path.iterdir())
