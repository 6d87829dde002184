"""From a prepared recipe to a finished run: bring the roles up, train, resume, replay."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

from rich.console import Console

from align.cluster.pool import RayCluster
from align.config import (
    CriticConfig,
    EvalRewardConfig,
    ModelConfig,
    OptionalRewardConfig,
    PolicyConfig,
    PreviousPolicyConfig,
    PriorPolicyConfig,
    RecipeConfig,
    ReferenceConfig,
    RewardConfig,
    SamplerConfig,
    TrainedRewardConfig,
)
from align.config.load import LoadedConfig, load_recipe
from align.data.conversations import Conversations
from align.errors import DivergedError, LoadError, PlacementError, StoppedError, WorkerError
from align.models.exported_files import Exported
from align.prechecks.announce import silent, to_stdout
from align.prechecks.roles import cast_sections, check, located, remote_code
from align.prepare import Prepared, prepare
from align.run import Run, Stopping, bundle
from align.utils import fault_injection
from align.workers import critic, local, policy, reward
from align.workers.base import Ranks, Role, Spec

ROLES: dict[type[ModelConfig], type[Role]] = {
    PolicyConfig: policy.Policy,
    SamplerConfig: policy.Sampler,
    CriticConfig: critic.Critic,
    ReferenceConfig: policy.Reference,
    PriorPolicyConfig: policy.Base,
    PreviousPolicyConfig: policy.Previous,
    RewardConfig: reward.Reward,
    OptionalRewardConfig: reward.Reward,
    EvalRewardConfig: reward.SecondReward,
    TrainedRewardConfig: reward.TrainedReward,
}
"""Which role each section of a recipe becomes."""


def _worlds(config: RecipeConfig, slots: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, int]]:
    """How each role is split over processes: what a snapshot says of it."""
    return {
        name: {"world_size": len(slots[name]) if config.executor == "ray" else 1, "zero_stage": section.zero_stage}
        for name, section in cast_sections(config).items()
    }


@contextmanager
def cast(
    config: RecipeConfig,
    run: Run,
    spoken: Mapping[str, Conversations] = MappingProxyType({}),
    exported: Mapping[str, Exported] = MappingProxyType({}),
) -> Iterator[SimpleNamespace]:
    """The roles of a recipe, brought up on its executor and ended with the context. ``spoken`` has the conversations of
    those judges that read text, ``exported`` what the folders of exported models say."""
    slots = check(config)
    named = {name: located(section) for name, section in cast_sections(config).items()}
    worlds = _worlds(config, slots)
    num_updates = config.run.steps * config.updates_per_step()
    cluster_section, skip = config.cluster, config.run.non_finite == "skip"
    timeout_s = cluster_section.call_timeout_s
    specs = {
        name: [
            Spec(name, rank, size, section, config.run.seed, num_updates, timeout_s, skip, exported.get(name))
            for rank in range(size)
        ]
        for name, section in named.items()
        for size in [worlds[name]["world_size"]]
    }
    sides = {name: ROLES[type(section)] for name, section in named.items()}
    announce = silent if config.run.progress == "none" else to_stdout
    if config.executor == "local":
        ranks = {name: local.bring_up(side.worker, specs[name][0], run.clock, announce) for name, side in sides.items()}
        yield _attached(config, sides, ranks, run, worlds, spoken)
        return
    num_slots = 1 + max(slot for role in slots.values() for slot in role)
    restarts = config.run.max_restarts
    with RayCluster(cluster_section, num_slots, run.leave_if_told, run.report, restarts, announce) as cluster:
        wanted = {name: (side.worker, specs[name], slots[name]) for name, side in sides.items()}
        run.stopping.install()  # Ray has set a handler of its own
        ranks = cluster.bring_up(wanted, run.logs.absolute(), run.clock)
        yield _attached(config, sides, ranks, run, worlds, spoken)


def _attached(
    config: RecipeConfig,
    sides: Mapping[str, type[Role]],
    ranks: Mapping[str, Ranks],
    run: Run,
    worlds: Mapping[str, Mapping[str, int]],
    spoken: Mapping[str, Conversations],
) -> SimpleNamespace:
    """The driver's side of every role, known to the run; one that is absent is None."""
    company = SimpleNamespace(**dict.fromkeys(config.absent()))
    for name, side in sides.items():
        setattr(company, name, side(ranks[name], getattr(config, name)))
    if getattr(company, "sampler", None) is not None:
        company.policy.sampled_by(company.sampler)
    for name, conversations in spoken.items():
        getattr(company, name).read_text(conversations)
    run.attach(company, worlds)
    return company


def train(loaded: LoadedConfig, console: Console) -> None:
    """Run a recipe to its end, or go on with it. Data and tokenizers are checked before the run folder is made and any
    worker starts. Raises `StoppedError` when it was asked to stop and has saved."""
    section = loaded.config.run
    fault_injection.arm(os.environ.get("ALIGN_FAULT"))
    prepared = prepare(loaded)
    with Stopping(Path(section.dir).expanduser().absolute(), section.max_seconds) as stopping:
        renderer = prepared.renderer
        run = Run(prepared.config, renderer.text, prepared.identity, stopping, renderer.text_with_special_tokens)
        with run:
            if run.finished:
                console.print(f"done before: {run.final}", highlight=False)
                return
            run.write_json("data.json", prepared.description)
            counts = ", ".join(f"{n} {name}" for name, n in prepared.counts.items())
            console.print(f"{prepared.config.algorithm}: {counts}", highlight=False)
            texts_read = [f"{name} reads text ({item.reason})" for name, item in prepared.text_inputs.items()]
            for line in [*prepared.notes, *remote_code(prepared.config), *texts_read]:
                console.print(line, highlight=False)
            if run.progress.step:
                console.print(f"going on after step {run.progress.step}", highlight=False)
            carry_out(prepared, run)
    console.print(f"done: {run.final}", highlight=False)


def carry_out(prepared: Prepared, run: Run) -> None:
    """All rounds of a run. When workers are lost, the roles are brought up again and go on from the last snapshot."""
    for attempt in count(1):
        try:
            _rounds(prepared, run)
            return
        except LoadError:
            raise  # loading is deterministic
        except WorkerError as error:
            run.recover(error, attempt)
        except PlacementError as error:
            if attempt == 1:
                raise
            raise WorkerError(f"the roles do not fit any more: {error.message}", remedy=error.remedy) from None
        except DivergedError as error:
            raise run.diverged(error) from None


def _rounds(prepared: Prepared, run: Run) -> None:
    config, startup = prepared.config, []
    for number in range(run.round, config.num_rounds() + 1):
        start = run.start_of(number)
        current = config if start is None else config.in_round(str(start))
        if not run.begin_round(number, start):
            continue
        begun = time.perf_counter()
        run.stop_if_asked()
        with cast(current, run, prepared.spoken, prepared.exported) as roles:
            run.stop_if_asked()
            startup.append(time.perf_counter() - begun)
            run.write_json("startup.json", {"seconds": sum(startup), "by_round": startup})
            prepared.algorithm.train(current, prepared.train_data, roles, run)


def replay(folder: Path, overrides: Sequence[str], console: Console) -> bool:
    """Run the step of a bundle again in a folder that is deleted afterwards; returns whether it went the same way."""
    fault_injection.arm(os.environ.get("ALIGN_FAULT"))
    found = bundle.read(folder)
    with tempfile.TemporaryDirectory(prefix="align-replay-") as temporary:
        own = [
            f"run.dir={temporary}/run",
            f"run.resume={found.snapshot or 'auto'}",
            "run.bundle_steps=[]",
            "run.max_restarts=0",
            "run.max_time=null",
            "checkpoint.every=0",
        ]
        prepared = prepare(load_recipe(folder / "config.yaml", [*own, *overrides]))
        renderer = prepared.renderer
        run = Run(prepared.config, renderer.text, prepared.identity, None, renderer.text_with_special_tokens)
        run.stop_after = found.step
        outcome = "ended"
        with run:
            begun = run.progress.step
            console.print(f"step {found.step}, bundled because: {found.reason}", highlight=False)
            console.print(f"running steps {begun + 1} to {found.step} again", highlight=False)
            try:
                _rounds(prepared, run)
            except StoppedError:
                pass  # where it should
            except DivergedError as error:
                outcome = error.message
            lines = bundle.differences(found, run.metrics if found.metrics else None, run.sampled)
        if found.metrics is None and outcome != found.reason:
            lines.append(f"outcome: {found.reason!r} then, {outcome!r} now")
        elif found.metrics is not None and outcome != "ended":
            lines.append(f"outcome: ended then, {outcome!r} now")
    console.print("\n".join(lines) or "the same, number by number", highlight=False)
    return not lines
