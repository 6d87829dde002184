"""From a loaded recipe to a finished run: check, prepare, start the cast, train; go on, and replay."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

from rich.console import Console

from align import faults, sections
from align.config import Loaded
from align.config import load as load_recipe
from align.data import chat, helpsteer
from align.data.chat import Renderer
from align.data.conversations import Conversations
from align.errors import ConfigError, DataError, DivergedError, PlacementError, StoppedError, WorkerError
from align.models.load import check as check_model
from align.rewards import functions, genrm, reading, texts
from align.rewards.http import HttpJudge
from align.run import Identity, Run, Stopping, bundle
from align.sections import Model, Recipe
from align.workers import critic, local, placement, policy, reward
from align.workers.base import Ranks, Role, Spec
from align.workers.pool import RayCluster

ROLES: dict[type[Model], type[Role]] = {
    sections.Policy: policy.Policy,
    sections.Sampler: policy.Sampler,
    sections.Critic: critic.Critic,
    sections.Reference: policy.Reference,
    sections.Base: policy.Base,
    sections.Previous: policy.Previous,
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
        if isinstance(section, sections.Critic):
            reading.require_head(section)
        if not section.path and not (isinstance(section, sections.Reward) and section.present):
            raise ConfigError(f"{name}.path is empty", remedy="give a folder or a hub id")
    return slots


def remote_code(config: Recipe) -> list[str]:
    """A line for each role that runs code which comes with its model."""
    models = cast_sections(config)
    judges = {name: one.generative.judge for name, one in models.items() if isinstance(one, sections.Reward)}
    models |= {f"{name}.generative.judge": judge for name, judge in judges.items()}
    trusted = {name: one for name, one in models.items() if one.trust_remote_code}
    commit = {name: f" at {one.revision}" if one.revision else "" for name, one in trusted.items()}
    return [f"{name} runs the Python code that comes with {one.path}{commit[name]}" for name, one in trusted.items()]


def load_renderer(config: Recipe) -> Renderer:
    """Tokenizer and template of the run: roles that are no frozen judges must read the same token ids."""
    found = {name: one for name, one in cast_sections(config).items() if not isinstance(one, sections.Reward)}
    loaded = {name: _tokenizer(section) for name, section in found.items()}
    (first, tokenizer), *others = loaded.items()
    for name, other in others:
        try:
            chat.require_same(tokenizer, other, first, name)
        except DataError as error:
            if not isinstance(found[name], sections.Critic):
                raise
            remedy = "start the critic from the policy: critic.path=${policy.path} critic.head=new"
            raise DataError(error.message, where=error.where, remedy=remedy) from None
    for section in found.values():
        check_model(section, len(tokenizer))
        if isinstance(section, sections.Critic) and section.head == "trained":
            reading.start_of(section)
    return Renderer(tokenizer, config.data.chat_template, config.data.date)


def _tokenizer(section: Model) -> Any:
    return chat.load_tokenizer(section.path, section.revision, section.trust_remote_code)


@dataclass(frozen=True)
class TextReader:
    """A judge that reads conversations and not the policy's token ids."""

    why: str
    renderers: str
    """Fingerprints of what its models render text by; none where it has no model."""


def text_readers(config: Recipe, renderer: Renderer) -> dict[str, TextReader]:
    """Judges that read text, by role, after a look at everything that a judge needs to come up."""
    for name, attributes in config.rated().items():
        reading.require_attributes(getattr(config, name), attributes)
    found = {}
    for name, section in cast_sections(config).items():
        if not isinstance(section, sections.Reward):
            continue
        if section.kind == "generative":
            found[name] = TextReader(section.source, genrm.check(section.generative))
        elif section.kind == "http":
            HttpJudge(section.http, section.failed).close()
            found[name] = TextReader(section.http.url, "")
        elif section.kind == "function":
            functions.load(section.function)
            found[name] = TextReader(section.function, "")
        elif (reader := _reads_text(section, renderer)) is not None:
            found[name] = reader
    return found


def _reads_text(section: sections.Reward, renderer: Renderer) -> TextReader | None:
    """None where all models of a judge can read the policy's token ids."""
    members = reading.members(section)
    tokenizers = [_tokenizer(member) for member in members]
    for member, tokenizer in zip(members, tokenizers, strict=True):
        check_model(member, len(tokenizer))
    reads = reading.read(section)
    reasons = {
        member.path: texts.why_text(read, tokenizer, renderer)
        for member, read, tokenizer in zip(members, reads, tokenizers, strict=True)
    }
    why = [f"{path}: {reason}" for path, reason in reasons.items() if reason]
    if not why:
        return None
    prints = [
        texts.Text(tokenizer, read, section).renderer.fingerprint
        for tokenizer, read in zip(tokenizers, reads, strict=True)
    ]
    return TextReader("; ".join(why), " ".join(prints))


def located(section: Model) -> Model:
    """The section with local files and folders named in full: workers may have another working directory."""
    if isinstance(section, sections.Reward):
        judge = located(section.generative.judge)
        assert isinstance(judge, sections.Generator)
        section = replace(
            section,
            ensemble=replace(section.ensemble, paths=[_full(path) for path in section.ensemble.paths]),
            generative=replace(section.generative, judge=judge),
        )
    if isinstance(section, (sections.Reward, sections.Generator)):
        file, colon, function = section.function.rpartition(":")
        section = replace(
            section,
            chat_template=section.chat_template and _full(section.chat_template),
            function=f"{_full(file)}{colon}{function}" if file.endswith(".py") else section.function,
        )
    return replace(section, path=_full(section.path))


def _full(path: str) -> str:
    """The name in full of what is there; a hub id as it is."""
    found = Path(path).expanduser()
    return str(found.absolute()) if path and found.exists() else path


def _worlds(config: Recipe, slots: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, int]]:
    """How each role is split over processes: what a snapshot says of it."""
    return {
        name: {"world_size": len(slots[name]) if config.executor == "ray" else 1, "zero_stage": section.zero_stage}
        for name, section in cast_sections(config).items()
    }


@contextmanager
def cast(
    config: Recipe, run: Run, spoken: Mapping[str, Conversations] = MappingProxyType({})
) -> Iterator[SimpleNamespace]:
    """The roles of a recipe, brought up on its executor and ended with the context. ``spoken`` has the conversations of
    those judges that read text."""
    slots = check(config)
    named = {name: located(section) for name, section in cast_sections(config).items()}
    worlds = _worlds(config, slots)
    num_updates = config.run.steps * config.updates_per_step()
    cluster_section, skip = config.cluster, config.run.non_finite == "skip"
    specs = {
        name: [
            Spec(name, rank, size, section, config.run.seed, num_updates, cluster_section.call_timeout_s, skip)
            for rank in range(size)
        ]
        for name, section in named.items()
        for size in [worlds[name]["world_size"]]
    }
    sides = {name: ROLES[type(section)] for name, section in named.items()}
    if config.executor == "local":
        ranks = {name: local.bring_up(side.worker, specs[name][0], run.clock) for name, side in sides.items()}
        yield _attached(config, sides, ranks, run, worlds, spoken)
        return
    num_slots = 1 + max(slot for role in slots.values() for slot in role)
    with RayCluster(cluster_section, num_slots, run.leave_if_told, run.report, config.run.max_restarts) as cluster:
        wanted = {name: (side.worker, specs[name], slots[name]) for name, side in sides.items()}
        run.stopping.install()  # Ray has set a handler of its own
        ranks = cluster.bring_up(wanted, run.logs.absolute(), run.clock)
        yield _attached(config, sides, ranks, run, worlds, spoken)


def _attached(
    config: Recipe,
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


@dataclass(frozen=True)
class Prepared:
    """A recipe whose data, tokenizers and models have been looked at, before anything is started."""

    config: Any
    algorithm: ModuleType
    material: Any
    counts: dict[str, int]
    renderer: Renderer
    description: dict[str, Any]
    identity: Identity
    readers: dict[str, TextReader]
    """Judges that read text."""
    spoken: dict[str, Conversations]
    """What they read, by role."""


def prepare(loaded: Loaded) -> Prepared:
    """Check data, tokenizers and models of a recipe."""
    config: Any = loaded.config
    algorithm = importlib.import_module(f"align.algorithms.{config.algorithm}")
    check(config)
    renderer = load_renderer(config)
    readers = text_readers(config, renderer)
    source = helpsteer.load(config.data, config.reads())
    material, counts = algorithm.prepare(config, source, renderer)
    description = {
        "source": {name: asdict(split) for name, split in source.counts.items()},
        "prepared": counts,
        "fingerprint": source.fingerprint,
        "renderer_fingerprint": renderer.fingerprint,
    }
    read = {"rows": source.fingerprint, "renderer": renderer.fingerprint}
    read |= {f"renderers of {name}": one.renderers for name, one in readers.items() if one.renderers}
    models = {name: reading.fingerprint(one, config.run.seed) for name, one in cast_sections(config).items()}
    identity = Identity.of(config, read, models)
    spoken = {}
    if readers:
        contexts = (row.context for rows in (source.train, source.validation) for row in rows)
        spoken = dict.fromkeys(readers, Conversations(contexts, renderer))
    return Prepared(config, algorithm, material, counts, renderer, description, identity, readers, spoken)


def train(loaded: Loaded, console: Console) -> None:
    """Run a recipe to its end, or go on with it. Data and tokenizers are checked before the run folder is made and any
    worker starts. Raises `StoppedError` when it was asked to stop and has saved."""
    section = loaded.config.run
    faults.arm(os.environ.get("ALIGN_FAULT"))
    with Stopping(Path(section.dir).expanduser().absolute(), section.max_seconds) as stopping:
        prepared = prepare(loaded)
        run = Run(prepared.config, prepared.renderer.text, prepared.identity, stopping)
        with run:
            if run.finished:
                console.print(f"done before: {run.final}", highlight=False)
                return
            run.write_json("data.json", prepared.description)
            counts = ", ".join(f"{n} {name}" for name, n in prepared.counts.items())
            console.print(f"{prepared.config.algorithm}: {counts}", highlight=False)
            texts_read = [f"{name} reads text ({one.why})" for name, one in prepared.readers.items()]
            for line in [*remote_code(prepared.config), *texts_read]:
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
        with cast(current, run, prepared.spoken) as roles:
            startup.append(time.perf_counter() - begun)
            run.write_json("startup.json", {"seconds": sum(startup), "by_round": startup})
            prepared.algorithm.train(current, prepared.material, roles, run)


def replay(folder: Path, overrides: Sequence[str], console: Console) -> bool:
    """Run the step of a bundle again in a folder that is deleted afterwards; returns whether it went the same way."""
    faults.arm(os.environ.get("ALIGN_FAULT"))
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
        run = Run(prepared.config, prepared.renderer.text, prepared.identity)
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
