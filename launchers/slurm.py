#!/usr/bin/env python3
"""Submit a recipe as a Slurm job: Ray over all its nodes, saved and requeued by itself. See slurm/README.md.

    python launchers/slurm.py recipes/rloo/llama3.3-70b-helpsteer3.yaml --nodes 6 --gpus-per-node 8 --time 1-00:00:00
    python launchers/slurm.py RECIPE --nodes 2 --gpus-per-node 8 --time 4:00:00 --array 'policy.optimizer.lr=1e-6,2e-6'

The recipe and its placement are checked here, before anything is queued. The run goes on where it stopped when the same
line is given again.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.config import RewardServiceConfig
from align.config.load import write_config
from align.errors import ConfigError, LockError, PlacementError
from align.prechecks import placement
from launchers import common, options
from launchers.prepare import ROOT, Checked, copy_code, validate, validate_service

CPUS_PER_GPU, CPUS_WITHOUT_GPU = 4, 4
"""Defaults of --cpus-per-task on one node."""
TIME = r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}"
"""Forms that sbatch takes: minutes, M:SS, H:MM:SS, D-H, D-H:MM, D-H:MM:SS."""
PLAIN = r"[\w.,:=@%+/()*&|!\[\]-]+"
"""What a directive may hold: no blanks, quotes or other signs that a shell or Slurm's reader of directives gives a
meaning."""
QUEUE_SECONDS = 30
SLOTS_PER_CORE = 2
"""Replicas of a service that one core offers where a node has no GPUs."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = common.parser(__doc__)
    add = arguments.add_argument
    add("--nodes", type=_positive, required=True)
    add("--gpus-per-node", type=int, required=True, help="0: a slot is a worker process on a CPU")
    add("--time", required=True, help="limit of one job, as D-HH:MM:SS")
    options.add_options(arguments)
    add("--cpus-per-task", type=_positive, help=f"cores of a node ({CPUS_PER_GPU} a GPU, {CPUS_WITHOUT_GPU} without)")
    add("--signal-before", type=_positive, default=600, metavar="SECONDS", help="save so long before the limit (600)")
    add("--max-restarts", type=int, metavar="N", help="how often a job is requeued in all (20; in a chain 0)")
    add("--retries", type=int, default=3, help="how often a job is requeued after a fault, status 76 (%(default)s)")
    add("--chain", type=_positive, default=1, metavar="N", help="jobs in a row, where requeueing is not allowed")
    add("--array", metavar="KEY=V1,V2", help="a job array: one run for each value, in run.dir-0-V1, run.dir-1-V2, ...")
    add("--accept-idle", action="store_true", help="submit a job of which some GPUs stay idle")
    add("--python", help="Python of the nodes (this one; in a container python3)")
    add("--service", choices=("reward",), help="RECIPE is a service of docs/reward_service.md, on one node")
    add("--dry-run", action="store_true", help="print the job and the command, write and submit nothing")
    return arguments


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


@dataclass(frozen=True)
class Job:
    """All that is submitted for one or, in an array, several runs."""

    runs: list[Checked]
    folder: Path
    """Where the job script and the code lie: ``launch/`` of the run folder, or of the folder that a sweep is named
    after."""
    script: str
    arguments: list[str]
    """What the script is called with after its own name."""
    options: list[str]
    """Further options of sbatch."""
    setup: str | None
    """Bash that each step reads first."""

    @property
    def logs(self) -> Path:
        """Folder of what the job script says."""
        return self.folder.parent / "logs" / "slurm"

    def command(self, dependency: str | None, is_array: bool) -> list[str]:
        """``sbatch`` as an argument vector; paths stand here because a directive cannot hold every path."""
        name = "job-%A_%a.log" if is_array else "job-%j.log"
        output = f"{str(self.logs).replace('%', '%%')}/{name}"
        given = ["--parsable", f"--chdir={self.folder}", f"--output={output}"]
        given += [*([f"--dependency={dependency}"] if dependency else []), *self.options]
        return ["sbatch", *given, str(self.folder / "job.sbatch"), *self.arguments]


def values_of(sweep: str) -> list[tuple[str, str]]:
    """``key=a,b`` as pairs of override and suffix of the run folder."""
    key, _, text = sweep.partition("=")
    values = [value.strip() for value in text.split(",")]
    if not key or len(values) < 2 or not all(values):
        raise ConfigError(
            f"--array={sweep} is not key=value,value", remedy="as in --array policy.optimizer.lr=1e-6,2e-6"
        )
    return [
        (f"{key}={value}", f"-{number}-{re.sub(r'[^A-Za-z0-9.+-]', '_', value)[:40]}")
        for number, value in enumerate(values)
    ]


def plan(given: argparse.Namespace) -> Job:
    """Check everything that can be checked here. Raises `ConfigError`, `PlacementError`."""
    if given.service:
        return _plan_service(given)
    if given.array and given.chain > 1:
        raise ConfigError("--array and --chain do not go together", remedy="give --max-restarts instead of --chain")
    sweep = values_of(given.array) if given.array else [("", "")]
    own = not given.container  # an image has folders of its own
    runs = [validate(given.recipe, [*given.overrides, *filter(None, [o])], suffix, paths=own) for o, suffix in sweep]
    for run in runs:
        _require_slots(given, run)
        _require_use(given, run)
    folder = validate(given.recipe, given.overrides, paths=False).folder if given.array else runs[0].folder
    return _job(given, runs, folder)


def _job(given: argparse.Namespace, runs: list[Checked], folder: Path) -> Job:
    further = options.sbatch_options(given)
    options.require_exported(given, [run.config for run in runs])
    script, arguments = render(given, runs, folder.name), _script_arguments(given, folder, runs)
    return Job(runs, folder / "launch", script, arguments, further, options.read_setup(given.setup))


def _plan_service(given: argparse.Namespace) -> Job:
    if given.nodes > 1 or given.array:
        what = f"--nodes={given.nodes}" if given.nodes > 1 else f"--array={given.array}"
        raise ConfigError(f"--service {given.service} takes one node and no array, {what}")
    checked = validate_service(given.recipe, given.overrides, paths=not given.container)
    there = given.gpus_per_node or _cpus(given) * SLOTS_PER_CORE
    if checked.num_slots > there:
        kind = "GPUs" if given.gpus_per_node else "slots of CPUs"
        raise PlacementError(
            f"the replicas ask for {checked.num_slots} {kind}, the job has {there}",
            where=f"{given.recipe}",
            remedy="lower replicas.max or replicas.shards, or ask for more",
        )
    _require_use(given, checked)
    return _job(given, [checked], checked.folder)


def _cpus(given: argparse.Namespace) -> int:
    return given.cpus_per_task or (given.gpus_per_node * CPUS_PER_GPU or CPUS_WITHOUT_GPU)


def _ray_cpus(given: argparse.Namespace, run: Checked) -> int:
    """CPUs that Ray of a node counts: without GPUs they are its slots, else each slot needs one beside its GPU."""
    if given.gpus_per_node:
        return max(_cpus(given), given.gpus_per_node)
    return _cpus(given) * run.config.cluster.slots_per_core


def _require_slots(given: argparse.Namespace, run: Checked) -> None:
    on_node = given.gpus_per_node or _ray_cpus(given, run)
    there = given.nodes * on_node
    if run.num_slots > there:
        kind = "GPUs" if given.gpus_per_node else f"{_cpus(given)} CPUs of {run.config.cluster.slots_per_core} slots"
        each = f"{given.gpus_per_node} {kind}" if given.gpus_per_node else kind
        raise PlacementError(
            f"placement asks for {run.num_slots} slots, the job has {there} ({given.nodes} nodes with {each} each), "
            f"{run.num_slots - there} are missing",
            where=f"{given.recipe}",
            remedy="let roles share slots, or ask for more nodes",
        )


def _require_use(given: argparse.Namespace, run: Checked) -> None:
    """Refuse a job that asks for GPUs which no role uses."""
    line = placement.idle(run.slots, given.nodes * given.gpus_per_node)
    if line is not None and not given.accept_idle:
        key = "replicas.max=N" if given.service else "placement.ROLE=FIRST-LAST"
        remedy = f"use them ({key}), ask for fewer, or take that in with --accept-idle"
        raise PlacementError(f"{line} (GPUs of the job)", where=f"{given.recipe}", remedy=remedy)


def render(given: argparse.Namespace, runs: Sequence[Checked], name: str) -> str:
    """The job script: the template with its directives and settings."""
    values = {
        "job-name": re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:60],
        "nodes": given.nodes,
        "time": given.time,
        "cpus-per-task": _cpus(given),
        "signal": f"B:USR1@{given.signal_before}",
        **({"array": f"0-{len(runs) - 1}"} if given.array else {}),
        **options.directives(given),
    }
    for key, value in values.items():
        pattern = TIME if key == "time" else PLAIN
        if not re.fullmatch(pattern, str(value), re.ASCII):
            raise ConfigError(f"--{key}={value!r} is not a value for Slurm", remedy=f"it matches {pattern}")
    restarts = given.max_restarts if given.max_restarts is not None else (0 if given.chain > 1 else 20)
    if given.signal_before >= _seconds(given.time):
        raise ConfigError(
            f"--signal-before={given.signal_before} s leaves nothing of --time={given.time}",
            remedy="give more time, or a shorter --signal-before: a minute, and twice the slowest step and save",
        )
    settings = {"max_restarts": restarts, "retries": given.retries}
    if not given.service:
        resume = runs[0].config.run.resume
        settings |= {
            "cpus": _ray_cpus(given, runs[0]),
            "gpus": given.gpus_per_node,
            "start_seconds": int(runs[0].config.cluster.start_timeout_s),
            "resume": resume if resume in ("auto", "never") else "checkpoint",
        }
    template = (ROOT / "slurm" / ("reward_service.sbatch" if given.service else "train.sbatch")).read_text()
    lines = "\n".join(f"#SBATCH --{key}={value}" for key, value in values.items())
    assigned = " ".join(f"{key}={value}" for key, value in settings.items())
    return re.sub("^.*#%settings$", assigned, template.replace("#%directives", lines), flags=re.MULTILINE)


def _seconds(time: str) -> int:
    """A time limit as sbatch reads it: after days and a dash come hours; one colon alone means minutes and seconds."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = [*parts, 0, 0][:3] if dash or len(parts) == 3 else [0, *parts, 0][:3]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _script_arguments(given: argparse.Namespace, folder: Path, runs: Sequence[Checked]) -> list[str]:
    python = given.python or ("python3" if given.container else sys.executable)
    folders = [Path.cwd(), folder, *(run.folder for run in runs)]
    return [str(folder / "launch"), python, *options.container_arguments(given, folders, [run.config for run in runs])]


def write(job: Job) -> None:
    """Write everything a job reads. What an earlier job of the same runs left there goes, when none of them lives."""
    folders = dict.fromkeys([job.folder, *(run.folder / "launch" for run in job.runs)])
    for folder in folders:
        _require_idle(folder)
    for folder in folders:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    for run in job.runs:
        write_config(run.config, run.folder / "launch" / "config.yaml")
    copy_code(job.folder / "code")
    (job.folder / "runs").write_text("".join(f"{run.folder}\n" for run in job.runs))
    (job.folder / "job.sbatch").write_text(job.script)
    if job.setup is not None:
        (job.folder / "setup.sh").write_text(job.setup)
    job.logs.mkdir(parents=True, exist_ok=True)


def _require_idle(folder: Path) -> None:
    """Raises `LockError` where a job that reads this folder has not ended."""
    submitted = folder / "jobs"
    if not submitted.exists():
        return
    command = ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%A %F"]
    alive = set(_slurm(command).split())
    if left := [job for job in submitted.read_text().split() if job in alive]:
        raise LockError(
            f"job {', '.join(left)} of this run is still in the queue",
            where=f"{folder.parent}",
            remedy=f"wait for it, or scancel {' '.join(left)}, or choose another run.dir",
        )


def _slurm(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=QUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{command[0]}: {error}", remedy="run this where Slurm's commands answer") from error
    if done.returncode:
        raise ConfigError(f"{shlex.join(command)}: {done.stderr.strip()}", remedy="see slurm/README.md")
    return done.stdout


def submit(job: Job, given: argparse.Namespace) -> list[str]:
    """Submit one job, or a chain of them; their numbers."""
    numbers: list[str] = []
    for _ in range(given.chain):
        dependency = f"afterany:{numbers[-1]}" if numbers else given.dependency
        numbers.append(_slurm(job.command(dependency, bool(given.array))).strip().partition(";")[0])
        for folder in {job.folder, *(run.folder / "launch" for run in job.runs)}:
            with (folder / "jobs").open("a") as jobs:
                jobs.write(f"{numbers[-1]}\n")
    return numbers


def explain(job: Job, numbers: Sequence[str]) -> str:
    """What to do with a job that is in the queue."""
    first, runs = numbers[0], [run.folder for run in job.runs]
    is_service = isinstance(job.runs[0].config, RewardServiceConfig)
    own = "service-*.log" if is_service else "driver-*.log and logs/ROLE-RANK.log"
    lines = [f"job {', then '.join(numbers)}"]
    lines += [f"  run folder     {shlex.quote(str(run))}" for run in runs]
    lines += [
        f"  logs           {shlex.quote(str(job.logs))}/job-{first}{'_*' if len(runs) > 1 else ''}.log, and in each "
        f"run folder logs/slurm/{own}",
        f"  attach         srun --jobid {first} --overlap --pty bash",
        f"  save, go on    scancel --signal=USR1 --batch {first}",
        f"  save, stop     touch {shlex.quote(str(runs[0] / 'STOP'))}",
        f"  stop at once   scancel {' '.join(numbers)}",
    ]
    if is_service:  # it saves nothing, and answers what it has when it is cancelled
        lines[-3:] = [f"  stop           scancel {' '.join(numbers)}"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when the job is in the queue, else that of the error."""
    given = parser().parse_intermixed_args(argv)
    job = plan(given)
    if given.dry_run:
        print(job.script)
        print("#", shlex.join(job.command(given.dependency, bool(given.array))))
        return 0
    write(job)
    print(explain(job, submit(job, given)))
    return 0


if __name__ == "__main__":
    common.finish(main)
