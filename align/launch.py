"""From a loaded recipe to a finished run: check, prepare, start the cast, train."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from align import sections
from align.config import Loaded
from align.data import chat, helpsteer
from align.data.chat import Renderer
from align.errors import ConfigError
from align.run import Run
from align.sections import Model, Recipe
from align.workers import critic, local, placement, policy, reward
from align.workers.base import Ranks, Role, Spec
from align.workers.pool import RayCluster

ROLES: dict[type[Model], type[Role]] = {
    sections.Policy: policy.Policy,
    sections.Sampler: policy.Sampler,
    sections.Critic: critic.Critic,
    sections.Reference: policy.Reference,
    sections.Reward: reward.Reward,
    sections.OptionalReward: reward.Reward,
    sections.SecondReward: reward.SecondReward,
    sections.TrainedReward: reward.TrainedReward,
}
"""Which role each section of a recipe becomes."""


def cast_sections(config: Recipe) -> dict[str, Model]:
    """The role sections of a recipe by name, the trained ones first; without those it calls absent."""
    absent = config.absent()
    found = {name: one for name, one in vars(config).items() if isinstance(one, Model) and name not in absent}
    return dict(sorted(found.items(), key=lambda item: not isinstance(item[1], sections.Trained)))


def check(config: Recipe) -> dict[str, tuple[int, ...]]:
    """Slots of every role. Raises `ConfigError` for a placement that cannot be."""
    roles = cast_sections(config)
    slots = placement.resolve(config.placement, roles)
    for name, section in roles.items():
        if not section.path:
            raise ConfigError(f"{name}.path is empty", remedy="give a folder or a hub id")
    return slots


def load_renderer(config: Recipe) -> Renderer:
    """Tokenizer and template of the run; every role must read the same token ids."""
    loaded = {
        name: chat.load_tokenizer(section.path, section.revision, section.trust_remote_code)
        for name, section in cast_sections(config).items()
    }
    (first, tokenizer), *others = loaded.items()
    for name, other in others:
        chat.require_same(tokenizer, other, first, name)
    return Renderer(tokenizer, config.data.chat_template, config.data.date)


def _located(section: Model) -> Model:
    """The section with a local folder named in full: workers may have another working directory."""
    folder = Path(section.path).expanduser()
    return replace(section, path=str(folder.absolute())) if folder.is_dir() else section


@contextmanager
def cast(config: Recipe, run: Run) -> Iterator[SimpleNamespace]:
    """The roles of a recipe, brought up on its executor and ended with the context."""
    slots = check(config)
    named = {name: _located(section) for name, section in cast_sections(config).items()}
    world = {name: len(slots[name]) if config.executor == "ray" else 1 for name in named}
    num_updates = config.run.steps * config.updates_per_step()
    specs = {
        name: [
            Spec(name, rank, world[name], section, config.run.seed, num_updates, config.cluster.call_timeout_s)
            for rank in range(world[name])
        ]
        for name, section in named.items()
    }
    sides = {name: ROLES[type(section)] for name, section in named.items()}
    if config.executor == "local":
        ranks = {name: local.bring_up(side.worker, specs[name][0], run.clock) for name, side in sides.items()}
        yield _company(config, sides, ranks)
        return
    num_slots = 1 + max(slot for role in slots.values() for slot in role)
    with RayCluster(config.cluster, num_slots) as cluster:
        wanted = {name: (side.worker, specs[name], slots[name]) for name, side in sides.items()}
        yield _company(config, sides, cluster.bring_up(wanted, run.logs.absolute(), run.clock))


def _company(config: Recipe, sides: Mapping[str, type[Role]], ranks: Mapping[str, Ranks]) -> SimpleNamespace:
    """The driver's side of every role; one that is absent is None."""
    company = SimpleNamespace(**dict.fromkeys(config.absent()))
    for name, side in sides.items():
        setattr(company, name, side(ranks[name], getattr(config, name)))
    if getattr(company, "sampler", None) is not None:
        company.policy.sampled_by(company.sampler)
    return company


def train(loaded: Loaded, console: Console) -> None:
    """Run a recipe to its end. Data and tokenizers are checked before the run folder is made and any worker starts."""
    config: Any = loaded.config
    algorithm = importlib.import_module(f"align.algorithms.{config.algorithm}")
    check(config)
    renderer = load_renderer(config)
    source = helpsteer.load(config.data)
    material, counts = algorithm.prepare(config, source, renderer)
    run = Run(config, renderer.text)
    run.write_json(
        "data.json",
        {
            "source": {name: asdict(split) for name, split in source.counts.items()},
            "prepared": counts,
            "fingerprint": source.fingerprint,
            "renderer_fingerprint": renderer.fingerprint,
        },
    )
    console.print(f"{config.algorithm}: {', '.join(f'{n} {name}' for name, n in counts.items())}", highlight=False)
    startup = []
    with run:
        for number in range(1, config.num_rounds() + 1):
            current = config if number == 1 else config.in_round(str(run.best or run.final))
            run.begin_round(number)
            begun = time.perf_counter()
            with cast(current, run) as roles:
                startup.append(time.perf_counter() - begun)
                run.write_json("startup.json", {"seconds": sum(startup), "by_round": startup})
                algorithm.train(current, material, roles, run)
    console.print(f"done: {run.final}", highlight=False)
