"""Train a prepared recipe: start its roles, run its rounds, and recover when workers are lost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

from rich.console import Console

from align.cluster.roles import StartOptions, start_roles
from align.config import RecipeConfig
from align.config.load import LoadedConfig
from align.data.conversations import ConversationIndex
from align.errors import DivergedError, LoadError, PlacementError, WorkerError
from align.models.exported_files import Exported
from align.prechecks.roles import plan_roles
from align.prepare import Prepared, prepare
from align.run import Run, StopRequests
from align.utils import fault_injection
from align.workers.announce import silent, to_stdout


def train(loaded: LoadedConfig, console: Console) -> None:
    """Train a recipe to its end, or resume it. Data, tokenizers and models are checked before the run folder is made
    and before any worker starts. Raises `StoppedError` when the run was asked to stop and has saved."""
    run_config = loaded.config.run
    fault_injection.arm(os.environ.get("ALIGN_FAULT"))
    prepared = prepare(loaded)
    folder = Path(run_config.dir).expanduser().absolute()
    with StopRequests(folder, run_config.max_seconds) as stopping, open_run(prepared, stopping) as run:
        if run.finished:
            console.print(f"done before: {run.final}", highlight=False)
            return
        run.write_json("data.json", prepared.description)
        counts = ", ".join(f"{n} {name}" for name, n in prepared.counts.items())
        text_roles = [f"{name} reads text ({item.reason})" for name, item in prepared.text_inputs.items()]
        head = f"{prepared.config.algorithm}: {counts}"
        for line in [head, *prepared.notes, *prepared.remote_code, *text_roles]:
            console.print(line, highlight=False)
        if run.progress.step:
            console.print(f"resuming after step {run.progress.step}", highlight=False)
        run_with_recovery(prepared, run)
        final = run.final
    console.print(f"done: {final}", highlight=False)


def open_run(prepared: Prepared, stopping: StopRequests | None) -> Run:
    """The run of a prepared recipe. It writes nothing before its context is entered."""
    renderer = prepared.renderer
    return Run(prepared.config, renderer.text, prepared.identity, stopping, renderer.text_with_special_tokens)


def run_with_recovery(prepared: Prepared, run: Run) -> None:
    """Run all rounds. When workers are lost, start the roles again and resume from the last checkpoint."""
    for attempt in count(1):
        try:
            run_rounds(prepared, run)
            return
        except LoadError:
            raise  # loading is deterministic: another attempt would fail as well
        except WorkerError as error:
            run.recover(error, attempt)
        except PlacementError as error:
            if attempt == 1:
                raise
            raise WorkerError(f"the roles no longer fit: {error.message}", remedy=error.remedy) from None
        except DivergedError as error:
            raise run.add_bundle(error) from None


def run_rounds(prepared: Prepared, run: Run) -> None:
    """Run the remaining rounds. Each starts its roles from the models of the previous round."""
    startup_s = []
    for config in run.rounds():
        begin = time.perf_counter()
        run.stop_if_requested()
        with start_training_roles(config, run, prepared.conversations, prepared.exported) as roles:
            run.stop_if_requested()
            startup_s.append(time.perf_counter() - begin)
            run.write_json("startup.json", {"seconds": sum(startup_s), "by_round": startup_s})
            prepared.algorithm.train(config, prepared.train_data, roles, run)


@contextmanager
def start_training_roles(
    config: RecipeConfig,
    run: Run,
    conversations: Mapping[str, ConversationIndex] = MappingProxyType({}),
    exported: Mapping[str, Exported] = MappingProxyType({}),
) -> Iterator[SimpleNamespace]:
    """The roles of a recipe, attached to the run; a role that the recipe does not use is None. ``conversations`` are
    the texts of the prompts, for each reward role that reads text; ``exported`` holds the
    algorithm and chat format that the exported model folders record."""
    plan = plan_roles(config)
    options = StartOptions(
        seed=config.run.seed,
        total_steps=plan.total_updates,
        skip_non_finite=config.run.max_non_finite > 1,
        cuda=tuple(config.run.cuda),
        exported=exported,
        clock=run.clock,
        announce=silent if config.run.progress == "none" else to_stdout,
        report=run.report,
        max_restarts=config.run.max_restarts,
        interrupt=run.raise_on_force_quit,
        ray_started=run.stopping.install,  # Ray installs signal handlers: install the run's again
    )
    with start_roles(plan.configs, config.executor, plan.slots, config.cluster, run.logs, options) as started:
        roles = SimpleNamespace(**dict.fromkeys(plan.absent), **started)
        if getattr(roles, "sampler", None) is not None:
            roles.policy.use_sampler(roles.sampler)
        for name, dialogues in conversations.items():
            started[name].read_text(dialogues)
        worlds = {
            name: {"world_size": role.ranks.world_size, "zero_stage": plan.configs[name].zero_stage}
            for name, role in started.items()
        }
        run.attach(roles, worlds)
        yield roles
