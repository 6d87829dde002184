"""Jobs as they are submitted: what is refused before, what the script says, and what never becomes shell."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from submission import RECIPE, calls_of, directives, settings, submit

from align import cli
from align.config import RewardServiceConfig
from align.config.load import build_config, load_recipe
from align.errors import AlignError, ConfigError, LockError, PlacementError
from launchers import slurm

HOSTILE = "a b'$(touch owned)\"; touch owned #`touch owned`%j"
"""A folder's name that would be dangerous in a shell and in Slurm's patterns."""


def test_a_dry_run_prints_the_job_and_writes_nothing(recipe: Path, sbatch: Path, capsys, tmp_path: Path):
    assert submit(recipe, "--dry-run", "--partition=gpu", "--mem=200G", "run.steps=7") == 0
    printed = capsys.readouterr().out
    assert directives(printed) == [
        "--requeue",
        "--open-mode=append",
        "--ntasks-per-node=1",
        "--job-name=run",
        "--nodes=2",
        "--time=1-00:00:00",
        "--cpus-per-task=8",
        "--signal=B:USR1@600",
        "--gpus-per-node=2",
        "--partition=gpu",
        "--mem=200G",
    ]
    expected = {"max_restarts": "20", "retries": "3", "cpus": "8", "gpus": "2", "start_seconds": "180"}
    assert settings(printed) == {**expected, "resume": "auto"}
    command = shlex.split(printed.splitlines()[-1].removeprefix("# "))
    launch = tmp_path / "run" / "launch"
    assert command == [
        "sbatch",
        "--parsable",
        f"--chdir={launch}",
        f"--output={tmp_path}/run/logs/slurm/job-%j.log",
        f"{launch}/job.sbatch",
        str(launch),
        sys.executable,
    ]
    assert calls_of(sbatch) == []
    assert not (tmp_path / "run").exists()


def test_the_rendered_job_is_bash_without_marks(recipe: Path, service: Path):
    for arguments in ([str(recipe), "--nodes=1"], [str(service), "--nodes=1", "--service=reward", "replicas.max=4"]):
        script = slurm.plan(slurm.parser().parse_intermixed_args([*arguments, "--gpus-per-node=4", "--time=60"])).script
        assert "#%" not in script
        assert ("serve reward" in script) == (arguments[0] == str(service))
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_dry_run_of_a_service(service: Path, sbatch: Path, capsys, tmp_path: Path):
    assert submit(service, "--dry-run", "--service=reward", nodes=1, gpus=3) == 0
    printed = capsys.readouterr().out
    assert {"--job-name=serving", "--nodes=1", "--gpus-per-node=3", "--cpus-per-task=12"} <= set(directives(printed))
    assert settings(printed) == {"max_restarts": "20", "retries": "3"}
    launch = f"{tmp_path}/serving/launch"
    assert shlex.split(printed.splitlines()[-1])[-3:] == [f"{launch}/job.sbatch", launch, sys.executable]
    assert calls_of(sbatch) == [] and not (tmp_path / "serving").exists()


def test_a_service_is_submitted_with_all_it_reads(service: Path, sbatch: Path, capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.py").write_text("def length(completions): return [0.0 for _ in completions]\n")
    function = ["reward.kind=function", "reward.function=scores.py:length", "dir=serving"]
    assert submit(service, "--service=reward", *function, nodes=1, gpus=3) == 0
    launch = tmp_path / "serving" / "launch"
    loaded = build_config(RewardServiceConfig, launch / "config.yaml").config
    assert loaded.reward.function == f"{tmp_path}/scores.py:length" and loaded.replicas.max == 3
    assert (launch / "runs").read_text() == f"{tmp_path}/serving\n"
    assert len(calls_of(sbatch)) == 1
    output = capsys.readouterr().out
    assert "service-*.log" in output and "scancel 101" in output and "STOP" not in output


@pytest.mark.parametrize(
    ("arguments", "nodes", "gpus", "error", "message"),
    [
        ([], 2, 3, ConfigError, "one node and no array. Got --nodes=2"),
        (["--array=port=1,2"], 1, 3, ConfigError, "no array. Got --array=port=1,2"),
        ([], 1, 2, PlacementError, "the replicas require 3 GPUs, the job has 2"),
        (["--cpus-per-task=1"], 1, 0, PlacementError, "require 3 slots of CPUs, the job has 2"),
        (["replicas.shards=4", "replicas.max=1", "reward.zero_stage=3"], 1, 3, PlacementError, "require 4 GPUs"),
        (["host=0.0.0.0"], 1, 3, ConfigError, "it needs token_env"),
        (['reward.path=""'], 1, 3, ConfigError, "path must be a folder or a hub id"),
        (["run.dir=x"], 1, 3, ConfigError, "unknown key"),
    ],
)
def test_a_service_that_cannot_be_is_refused(service: Path, sbatch: Path, arguments, nodes, gpus, error, message):
    with pytest.raises(error, match=message):
        submit(service, "--service=reward", *arguments, nodes=nodes, gpus=gpus)
    assert calls_of(sbatch) == []


def test_what_the_job_reads_is_written_before_it_is_submitted(recipe: Path, sbatch: Path, tmp_path: Path, capsys):
    assert submit(recipe, "run.steps=7") == 0
    launch = tmp_path / "run" / "launch"
    assert load_recipe(launch / "config.yaml").config.run.steps == 7
    assert (launch / "runs").read_text() == f"{tmp_path / 'run'}\n"
    assert (launch / "code" / "align" / "cli.py").read_bytes() == Path(cli.__file__).read_bytes()
    assert (launch / "code" / "slurm" / "common.sh").exists()
    assert not list(launch.rglob("__pycache__"))
    assert json.loads((launch / "code" / "revision.json").read_text()).keys() == {"git_revision", "changed"}
    assert {item.name for item in (tmp_path / "run").iterdir()} == {"launch", "logs"}
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert len(calls_of(sbatch)) == 1
    output = capsys.readouterr().out
    for line in (
        "job 101",
        "srun --jobid 101 --overlap --pty bash",
        "scancel --signal=USR1 --batch 101",
        f"touch {tmp_path}/run/STOP",
        f"{tmp_path}/run/logs/slurm/job-101.log",
    ):
        assert line in output


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["policy.optimizer.lrr=1"], ConfigError, "unknown key"),
        (
            ["placement.reward=0-4"],
            PlacementError,
            r"requires 5 slots, the job has 4 \(2 nodes .* 2 GPUs each\), 1 are",
        ),
        (["placement.actor=0"], ConfigError, "no role is called actor"),
        (["--time=tomorrow"], ConfigError, "--time='tomorrow'"),
        (["--partition=gpu\n#SBATCH --wrap=x"], ConfigError, "--partition"),
        (["--constraint=a b"], ConfigError, "--constraint"),
        (["--signal-before=86400"], ConfigError, "leaves nothing"),
        (["--array=run.seed"], ConfigError, "is not key=value,value"),
        (["--array=run.seed=1"], ConfigError, "is not key=value,value"),
        (["--array=run.seed=1,x"], ConfigError, "expected a whole number"),
        (["--array=run.seed=1,2", "--chain=2"], ConfigError, "cannot be combined"),
        (["--sbatch=--nodes=3"], ConfigError, "--sbatch=--nodes=3: the launcher sets --nodes itself"),
        (["--sbatch=--no-requeue"], ConfigError, "give --max-restarts 0"),
        (["--sbatch=-x"], ConfigError, "not a long option"),
        (["--sbatch=exclusive"], ConfigError, "not a long option"),
        (["--setup=nowhere.sh"], ConfigError, "--setup=nowhere.sh cannot be read"),
        (["--setup=/proc/self/status"], ConfigError, "is not bash"),
        (["--container=nowhere.sif"], ConfigError, "there is no such image"),
        (["--container-runtime=apptainer"], ConfigError, "--container-runtime requires --container"),
        (['run.dir="a\\nb"'], ConfigError, "has characters"),
    ],
)
def test_what_cannot_run_is_refused_with_78_before_anything_is_queued(
    recipe: Path, sbatch: Path, arguments: list[str], error: type[AlignError], message: str, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as raised:
        submit(recipe, *arguments)
    assert raised.value.exit_status == 78
    assert calls_of(sbatch) == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("slots_per_core", "fits"), [(1, False), (2, True)])
def test_without_gpus_slots_are_the_cpus_of_all_nodes(recipe: Path, sbatch: Path, slots_per_core: int, fits: bool):
    """Two nodes with one CPU have 2 and 4 slots; the placement asks for 4."""
    arguments = [f"cluster.slots_per_core={slots_per_core}", "--cpus-per-task=1"]
    if fits:
        assert submit(recipe, *arguments, gpus=0) == 0
    else:
        with pytest.raises(PlacementError, match="requires 4 slots, the job has 2"):
            submit(recipe, *arguments, gpus=0)


def test_hostile_names_and_values_stay_text(tmp_path: Path, sbatch: Path, monkeypatch):
    """They reach sbatch as single arguments, and the recipe as YAML; the script holds none of them."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    recipe = folder / f"{HOSTILE}.yaml"
    recipe.write_text(RECIPE.format(run="unnamed", folder=tmp_path))
    monkeypatch.chdir(folder)
    best_by = "x'; touch owned; $(touch owned)"
    assert submit(recipe, f"run.dir={json.dumps(HOSTILE)}", f"checkpoint.best_by={json.dumps(best_by)}") == 0
    (call,) = calls_of(sbatch)
    launch = folder / HOSTILE / "launch"
    assert f"--chdir={launch}" in call
    assert f"--output={str(folder / HOSTILE).replace('%', '%%')}/logs/slurm/job-%j.log" in call
    assert call[-3:] == [f"{launch}/job.sbatch", str(launch), sys.executable]
    script = (launch / "job.sbatch").read_text()
    assert "owned" not in script.replace("touch_owned", "")
    assert next(line for line in directives(script) if "job-name" in line) == (
        "--job-name=a_b___touch_owned____touch_owned___touch_owned__j"
    )
    assert load_recipe(launch / "config.yaml").config.checkpoint.best_by == best_by
    assert not list(tmp_path.rglob("owned"))


def test_relative_paths_become_full_and_hub_names_stay(tmp_path: Path, sbatch: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "old" / "step-000003").mkdir(parents=True)
    snapshot = tmp_path / "hub" / "models--nvidia--some-model" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(run="here/run", folder="models"))
    assert submit(Path("recipe.yaml"), "reward.path=nvidia/some-model", "run.resume=old/step-000003") == 0
    written = load_recipe(tmp_path / "here/run/launch/config.yaml").config
    assert written.run.dir == str(tmp_path / "here/run")
    assert written.policy.path == written.data.path == written.reference.path == str(tmp_path / "models")
    assert written.reward.path == "nvidia/some-model"
    assert written.run.resume == str(tmp_path / "old/step-000003")
    assert settings((tmp_path / "here/run/launch/job.sbatch").read_text())["resume"] == "checkpoint"


def test_a_chain_is_jobs_that_wait_for_one_another(recipe: Path, sbatch: Path, tmp_path: Path):
    assert submit(recipe, "--chain=3", "--dependency=afterok:7") == 0
    dependencies = [[part for part in call if part.startswith("--dependency")] for call in calls_of(sbatch)]
    assert dependencies == [["--dependency=afterok:7"], ["--dependency=afterany:101"], ["--dependency=afterany:102"]]
    launch = tmp_path / "run" / "launch"
    assert (launch / "jobs").read_text().split() == ["101", "102", "103"]
    assert settings((launch / "job.sbatch").read_text())["max_restarts"] == "0"


def test_an_array_has_a_run_folder_for_each_value(recipe: Path, sbatch: Path, tmp_path: Path):
    assert submit(recipe, "--array=policy.optimizer.lr=1e-6,2e-6") == 0
    (call,) = calls_of(sbatch)
    launch = tmp_path / "run" / "launch"
    assert call[-2] == str(launch)
    assert f"--output={tmp_path}/run/logs/slurm/job-%A_%a.log" in call
    assert {"--array=0-1", "--job-name=run"} <= set(directives((launch / "job.sbatch").read_text()))
    runs = (launch / "runs").read_text().split()
    assert runs == [f"{tmp_path}/run-0-1e-6", f"{tmp_path}/run-1-2e-6"]
    loaded = [load_recipe(Path(run) / "launch" / "config.yaml").config for run in runs]
    assert [config.run.dir for config in loaded] == runs
    assert [config.policy.optimizer.lr for config in loaded] == [1e-6, 2e-6]


def test_a_run_whose_job_is_still_queued_is_not_submitted_again(recipe: Path, sbatch: Path, tmp_path: Path):
    """Its job reads the files that would be written anew."""
    assert submit(recipe) == 0
    (tmp_path / "queue").write_text("101 101\n")
    with pytest.raises(LockError, match="job 101 of this run is still in the queue") as raised:
        submit(recipe)
    assert raised.value.exit_status == 77
    (tmp_path / "queue").write_text("999 999\n")
    launch = tmp_path / "run" / "launch"
    (launch / "ended").write_text("0\n")
    assert submit(recipe, "run.steps=9") == 0
    assert not (launch / "ended").exists()
    assert load_recipe(launch / "config.yaml").config.run.steps == 9


def test_a_task_of_an_array_that_is_still_queued_counts(recipe: Path, sbatch: Path, tmp_path: Path):
    assert submit(recipe, "--array=run.seed=1,2") == 0
    (tmp_path / "queue").write_text("205 101\n")  # a task has a number of its own beside the array's
    with pytest.raises(LockError, match="job 101"):
        submit(recipe, f"run.dir={tmp_path}/run-1-2", "run.seed=2")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["placement.policy=0"], "placement uses slots 0,2-3 only: 1 of 4 stay idle (GPUs of the job)"),
        (["placement={policy: 0, reward: 0, reference: 0}"], "placement uses slot 0 only: 15 of 16 stay idle"),
        (["--service=reward"], "placement uses slots 0-2 only: 1 of 4 stay idle (GPUs of the job)"),
    ],
)
def test_idle_gpus_are_refused_unless_accepted(
    recipe: Path, service: Path, sbatch: Path, arguments: list[str], line: str, capsys
):
    big = {"nodes": 2, "gpus": 8} if "16" in line else {"nodes": 1, "gpus": 4}
    path = service if arguments == ["--service=reward"] else recipe
    if "placement={" in arguments[0]:
        path.write_text(path.read_text().replace("0-3, reference: 2, reward: 3", "0"))
        arguments = []
    with pytest.raises(PlacementError) as caught:
        submit(path, *arguments, **big)
    assert line in str(caught.value) and "--accept-idle" in str(caught.value)
    assert calls_of(sbatch) == []
    assert submit(path, *arguments, "--accept-idle", "--dry-run", **big) == 0


def test_paths_that_a_job_would_not_find_are_refused_before_the_queue(recipe: Path, sbatch: Path, tmp_path: Path):
    (tmp_path / "model").mkdir()
    options = [f"policy.path={tmp_path}/modle", f"data.path={tmp_path}/none", "reward.path=no/such"]
    with pytest.raises(ConfigError) as caught:
        submit(recipe, *options)
    assert f"policy.path={tmp_path}/modle: there is no such file or folder" in str(caught.value)
    assert f"did you mean {tmp_path}/model?" in str(caught.value)
    assert f"data.path={tmp_path}/none" in str(caught.value) and "hf download no/such" in str(caught.value)
    assert str(caught.value).count("modle") == 1  # the reference follows the policy, and is not named again
    assert calls_of(sbatch) == []
    assert submit(recipe, *options, "--container=image", "--dry-run") == 0  # the image has folders of its own


def test_a_file_stop_is_pointed_out_before_the_queue(recipe: Path, sbatch: Path, tmp_path: Path):
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "run" / "STOP").touch()
    with pytest.raises(ConfigError, match="STOP"):
        submit(recipe)
    assert calls_of(sbatch) == []


def test_what_sbatch_says_against_a_job_is_shown(recipe: Path, sbatch: Path, tmp_path: Path):
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'invalid partition specified: gpu' >&2\nexit 1\n")
    with pytest.raises(ConfigError, match="invalid partition specified: gpu"):
        submit(recipe, "--partition=gpu")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("2:30", 150), ("1:02:03", 3723), ("1-2", 93600), ("1-02:03", 93780), ("1-02:03:04", 93784)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int):
    """Its manual: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, and all four."""
    assert slurm._seconds(text) == seconds


@pytest.mark.slow
def test_the_script_itself_runs_and_returns_the_status_of_an_error(recipe: Path, sbatch: Path):
    """As a file, from another folder, although its folder holds a ray.py."""
    script = Path(slurm.__file__)
    command = [sys.executable, str(script), str(recipe), "--nodes=1", "--gpus-per-node=1", "--time=60"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=recipe.parent, check=False)
    assert done.returncode == 78
    assert "slurm.py: " in done.stderr and "requires 4 slots, the job has 1" in done.stderr
