#!/usr/bin/env python3
"""Submit a recipe as a Slurm job that runs Ray on its nodes, and saves and requeues itself. See slurm/README.md.

    python launchers/slurm.py recipes/rloo/llama3.3-70b-helpsteer3.yaml --nodes 6 --gpus-per-node 8 --time 1-00:00:00
    python launchers/slurm.py RECIPE --nodes 2 --gpus-per-node 8 --time 4:00:00 --array 'policy.optimizer.lr=1e-6,2e-6'

The recipe and its placement are checked before anything is queued. The same command line resumes the run.
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
from launchers.job import ROOT, JobConfig, copy_code, load_run, load_service

CPUS_PER_GPU, CPUS_WITHOUT_GPU = 4, 4
"""Defaults of --cpus-per-task on one node."""
TIME = r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}"
"""Forms that sbatch takes: minutes, M:SS, H:MM:SS, D-H, D-H:MM, D-H:MM:SS."""
PLAIN = r"[\w.,:=@%+/()*&|!\[\]-]+"
"""Characters of a directive: no spaces, quotes or others that have a meaning for a shell or for Slurm's parser."""
QUEUE_SECONDS = 30
SLOTS_PER_CORE = 2
"""Replicas of a service per core, on nodes without GPUs."""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    arguments = common.parser(__doc__)
    add = arguments.add_argument
    add("--nodes", type=_positive, required=True, metavar="N", help="nodes of the job")
    add("--gpus-per-node", type=int, required=True, metavar="N", help="0: worker processes run on CPUs")
    add("--time", required=True, help="time limit of a job, as D-HH:MM:SS")
    options.add_options(arguments)
    add(
        "--cpus-per-task",
        type=_positive,
        metavar="N",
        help=f"cores per node ({CPUS_PER_GPU} per GPU, else {CPUS_WITHOUT_GPU})",
    )
    add(
        "--signal-before",
        type=_positive,
        default=600,
        metavar="SECONDS",
        help="save this long before the time limit (600)",
    )
    add("--max-restarts", type=int, metavar="N", help="requeue a job at most N times (20; 0 with --chain)")
    add("--retries", type=int, default=3, metavar="N", help="requeue at most N times after status 76 (%(default)s)")
    add(
        "--chain",
        type=_positive,
        default=1,
        metavar="N",
        help="submit N jobs, one after another, for sites without requeueing",
    )
    add("--array", metavar="KEY=V1,V2", help="job array with a run per value, in run.dir-0-V1, run.dir-1-V2, ...")
    add("--accept-idle", action="store_true", help="submit even if some GPUs of the job stay idle")
    add("--python", help="Python on the nodes (this one; python3 in a container)")
    add("--service", choices=("reward",), help="RECIPE is a service (docs/reward_service.md), on one node")
    add("--dry-run", action="store_true", help="print the job script and the command; write and submit nothing")
    return arguments


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


@dataclass(frozen=True)
class Job:
    """What is submitted: one run, or the runs of an array."""

    runs: list[JobConfig]
    folder: Path
    """Folder of the job script and the code: ``launch/`` of the run folder, or of ``run.dir`` without suffix for an
    array."""
    script: str
    arguments: list[str]
    """Arguments of the script."""
    options: list[str]
    """More options of sbatch."""
    setup: str | None
    """Bash that each step sources first."""

    @property
    def logs(self) -> Path:
        """Folder of the job script's log."""
        return self.folder.parent / "logs" / "slurm"

    def command(self, dependency: str | None, is_array: bool) -> list[str]:
        """``sbatch`` as an argument vector. Paths are options, because a directive cannot hold every path."""
        name = "job-%A_%a.log" if is_array else "job-%j.log"
        output = f"{str(self.logs).replace('%', '%%')}/{name}"
        paths = ["--parsable", f"--chdir={self.folder}", f"--output={output}"]
        dependencies = [f"--dependency={dependency}"] if dependency else []
        return ["sbatch", *paths, *dependencies, *self.options, str(self.folder / "job.sbatch"), *self.arguments]


def array_values(sweep: str) -> list[tuple[str, str]]:
    """Pairs of override and suffix of the run folder, from ``key=a,b``."""
    key, _, text = sweep.partition("=")
    values = [value.strip() for value in text.split(",")]
    if not key or len(values) < 2 or not all(values):
        raise ConfigError(
            f"--array={sweep} is not key=value,value", remedy="write it as --array policy.optimizer.lr=1e-6,2e-6"
        )
    return [
        (f"{key}={value}", f"-{number}-{re.sub(r'[^A-Za-z0-9.+-]', '_', value)[:40]}")
        for number, value in enumerate(values)
    ]


def plan(args: argparse.Namespace) -> Job:
    """Check everything that can be checked here. Raises `ConfigError` or `PlacementError`."""
    if args.service:
        return _plan_service(args)
    if args.array and args.chain > 1:
        raise ConfigError("--array and --chain cannot be combined", remedy="give --max-restarts instead of --chain")
    sweep = array_values(args.array) if args.array else [("", "")]
    paths = not args.container  # an image may have other folders
    runs = []
    for override, suffix in sweep:
        overrides = [*args.overrides, override] if override else args.overrides
        runs.append(load_run(args.recipe, overrides, suffix, paths=paths))
    for run in runs:
        _require_slots(args, run)
        _require_use(args, run)
    folder = load_run(args.recipe, args.overrides, paths=False).folder if args.array else runs[0].folder
    return _job(args, runs, folder)


def _job(args: argparse.Namespace, runs: list[JobConfig], folder: Path) -> Job:
    sbatch_options = options.sbatch_options(args)
    options.require_exported(args, [run.config for run in runs])
    script, arguments = render(args, runs, folder.name), _script_arguments(args, folder, runs)
    return Job(runs, folder / "launch", script, arguments, sbatch_options, options.read_setup(args.setup))


def _plan_service(args: argparse.Namespace) -> Job:
    if args.nodes > 1 or args.array:
        option = f"--nodes={args.nodes}" if args.nodes > 1 else f"--array={args.array}"
        raise ConfigError(f"--service {args.service} requires one node and no array. Got {option}")
    service = load_service(args.recipe, args.overrides, paths=not args.container)
    available = args.gpus_per_node or _cpus(args) * SLOTS_PER_CORE
    if service.num_slots > available:
        kind = "GPUs" if args.gpus_per_node else "slots of CPUs"
        raise PlacementError(
            f"the replicas require {service.num_slots} {kind}, the job has {available}",
            where=f"{args.recipe}",
            remedy="lower replicas.max or replicas.shards, or ask for more",
        )
    _require_use(args, service)
    return _job(args, [service], service.folder)


def _cpus(args: argparse.Namespace) -> int:
    return args.cpus_per_task or (args.gpus_per_node * CPUS_PER_GPU or CPUS_WITHOUT_GPU)


def _ray_cpus(args: argparse.Namespace, run: JobConfig) -> int:
    """CPUs that Ray counts on a node: its slots if there are no GPUs, else at least one for each GPU."""
    if args.gpus_per_node:
        return max(_cpus(args), args.gpus_per_node)
    return _cpus(args) * run.config.cluster.slots_per_core


def _require_slots(args: argparse.Namespace, run: JobConfig) -> None:
    on_node = args.gpus_per_node or _ray_cpus(args, run)
    available = args.nodes * on_node
    if run.num_slots > available:
        kind = "GPUs" if args.gpus_per_node else f"{_cpus(args)} CPUs of {run.config.cluster.slots_per_core} slots"
        each = f"{args.gpus_per_node} {kind}" if args.gpus_per_node else kind
        raise PlacementError(
            f"placement requires {run.num_slots} slots, the job has {available} "
            f"({args.nodes} nodes with {each} each), "
            f"{run.num_slots - available} are missing",
            where=f"{args.recipe}",
            remedy="let roles share slots, or ask for more nodes",
        )


def _require_use(args: argparse.Namespace, run: JobConfig) -> None:
    """Refuse a job with GPUs that no role uses."""
    line = placement.idle(run.slots, args.nodes * args.gpus_per_node)
    if line is not None and not args.accept_idle:
        key = "replicas.max=N" if args.service else "placement.ROLE=FIRST-LAST"
        remedy = f"use them ({key}), ask for fewer, or give --accept-idle"
        raise PlacementError(f"{line} (GPUs of the job)", where=f"{args.recipe}", remedy=remedy)


def render(args: argparse.Namespace, runs: Sequence[JobConfig], name: str) -> str:
    """The job script: the template with directives and settings filled in."""
    values = {
        "job-name": re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:60],
        "nodes": args.nodes,
        "time": args.time,
        "cpus-per-task": _cpus(args),
        "signal": f"B:USR1@{args.signal_before}",
        **({"array": f"0-{len(runs) - 1}"} if args.array else {}),
        **options.directives(args),
    }
    for key, value in values.items():
        pattern = TIME if key == "time" else PLAIN
        if not re.fullmatch(pattern, str(value), re.ASCII):
            raise ConfigError(
                f"--{key}={value!r} is not a value for Slurm", remedy=f"write a value that matches {pattern}"
            )
    restarts = args.max_restarts if args.max_restarts is not None else (0 if args.chain > 1 else 20)
    if args.signal_before >= _seconds(args.time):
        raise ConfigError(
            f"--signal-before={args.signal_before} s leaves nothing of --time={args.time}",
            remedy="give more --time, or less --signal-before: at least a minute and twice the slowest step and save",
        )
    settings = {"max_restarts": restarts, "retries": args.retries}
    if not args.service:
        resume = runs[0].config.run.resume
        settings |= {
            "cpus": _ray_cpus(args, runs[0]),
            "gpus": args.gpus_per_node,
            "start_seconds": int(runs[0].config.cluster.start_timeout_s),
            "resume": resume if resume in ("auto", "never") else "checkpoint",
        }
    template = (ROOT / "slurm" / ("reward_service.sbatch" if args.service else "train.sbatch")).read_text()
    lines = "\n".join(f"#SBATCH --{key}={value}" for key, value in values.items())
    assigned = " ".join(f"{key}={value}" for key, value in settings.items())
    return re.sub("^.*#%settings$", assigned, template.replace("#%directives", lines), flags=re.MULTILINE)


def _seconds(time: str) -> int:
    """A time limit in seconds, as sbatch reads it: D-H:M:S, H:M:S, M:S or M."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = [*parts, 0, 0][:3] if dash or len(parts) == 3 else [0, *parts, 0][:3]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _script_arguments(args: argparse.Namespace, folder: Path, runs: Sequence[JobConfig]) -> list[str]:
    python = args.python or ("python3" if args.container else sys.executable)
    folders = [Path.cwd(), folder, *(run.folder for run in runs)]
    return [str(folder / "launch"), python, *options.container_arguments(args, folders, [run.config for run in runs])]


def write(job: Job) -> None:
    """Write everything that a job reads. Replaces the files of earlier jobs, unless one of them is still queued."""
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
    """Raise `LockError` if a job that reads this folder has not ended."""
    submitted = folder / "jobs"
    if not submitted.exists():
        return
    command = ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%A %F"]
    in_queue = set(_slurm(command).split())
    if unfinished := [job for job in submitted.read_text().split() if job in in_queue]:
        raise LockError(
            f"job {', '.join(unfinished)} of this run is still in the queue",
            where=f"{folder.parent}",
            remedy=f"wait for it, or scancel {' '.join(unfinished)}, or choose another run.dir",
        )


def _slurm(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=QUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{command[0]}: {error}", remedy="run this on a machine with Slurm's commands") from error
    if done.returncode:
        raise ConfigError(f"{shlex.join(command)}: {done.stderr.strip()}", remedy="see slurm/README.md")
    return done.stdout


def submit(job: Job, args: argparse.Namespace) -> list[str]:
    """Submit a job, or a chain of jobs. Returns their numbers."""
    numbers: list[str] = []
    for _ in range(args.chain):
        dependency = f"afterany:{numbers[-1]}" if numbers else args.dependency
        numbers.append(_slurm(job.command(dependency, bool(args.array))).strip().partition(";")[0])
        for folder in {job.folder, *(run.folder / "launch" for run in job.runs)}:
            with (folder / "jobs").open("a") as jobs:
                jobs.write(f"{numbers[-1]}\n")
    return numbers


def explain(job: Job, numbers: Sequence[str]) -> str:
    """What the user sees after submitting: folders, logs, and commands for the job."""
    first, runs = numbers[0], [run.folder for run in job.runs]
    is_service = isinstance(job.runs[0].config, RewardServiceConfig)
    log = "service-*.log" if is_service else "driver-*.log and logs/ROLE-RANK.log"
    lines = [f"job {', then '.join(numbers)}"]
    lines += [f"  run folder     {shlex.quote(str(run))}" for run in runs]
    lines += [
        f"  logs           {shlex.quote(str(job.logs))}/job-{first}{'_*' if len(runs) > 1 else ''}.log, and in each "
        f"run folder logs/slurm/{log}",
        f"  attach         srun --jobid {first} --overlap --pty bash",
        f"  save, requeue  scancel --signal=USR1 --batch {first}",
        f"  save, stop     touch {shlex.quote(str(runs[0] / 'STOP'))}",
        f"  stop at once   scancel {' '.join(numbers)}",
    ]
    if is_service:  # a service has no state to save; scancel drains its requests
        lines[-3:] = [f"  stop           scancel {' '.join(numbers)}"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Submit the job and return 0."""
    args = parser().parse_intermixed_args(argv)
    job = plan(args)
    if args.dry_run:
        print(job.script)
        print("#", shlex.join(job.command(args.dependency, bool(args.array))))
        return 0
    write(job)
    print(explain(job, submit(job, args)))
    return 0


if __name__ == "__main__":
    common.exit_with(main)
