"""What is checked before anything starts: placement, tokenizers, models and data of a recipe."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

from align.config import (
    CriticConfig,
    ModelConfig,
    OnPolicyConfig,
    PolicyConfig,
    RecipeConfig,
    RewardConfig,
    SamplerConfig,
    TrainedModelConfig,
    TrainedRewardConfig,
)
from align.config.load import LoadedConfig
from align.data import chat, dataset, prompts
from align.data.chat import Renderer
from align.data.conversations import Conversations
from align.data.detect import described, resolved
from align.errors import DataError
from align.models import exported_files, positions
from align.models.exported_files import Exported
from align.models.load import check as check_model
from align.models.load import check_lora
from align.prechecks.precision import dtype_notes
from align.prechecks.roles import cast_sections, check
from align.rewards import checkpoint_format, functions, genrm, texts
from align.rewards.http import HttpJudge
from align.run import Identity


def load_renderer(config: RecipeConfig) -> Renderer:
    """Tokenizer and template of the run: roles that are no frozen judges must read the same token ids."""
    found = {name: one for name, one in cast_sections(config).items() if not isinstance(one, RewardConfig)}
    loaded = {name: _tokenizer(section) for name, section in found.items()}
    (first, tokenizer), *others = loaded.items()
    for name, other in others:
        try:
            chat.require_same(tokenizer, other, first, name)
        except DataError as error:
            if not isinstance(found[name], CriticConfig):
                raise
            remedy = "start the critic from the policy: critic.path=${policy.path} critic.head=new"
            raise DataError(error.message, where=error.where, remedy=remedy) from None
    rollout = config.data.max_prompt_tokens + config.sampling.max_tokens if isinstance(config, OnPolicyConfig) else 0
    for name, section in found.items():
        vocab_size = chat.vocab_size(tokenizer)
        samples = isinstance(section, (PolicyConfig, SamplerConfig))
        check_model(section, vocab_size, name, rollout if samples else 0)
        if isinstance(section, TrainedModelConfig):
            check_lora(section, vocab_size, f"{name}.lora.targets")
        if isinstance(section, CriticConfig) and section.head == "trained":
            checkpoint_format.start_of(section)
    return Renderer(tokenizer, config.data.chat_template, config.data.date, bad_rows=config.data.bad_rows)


def _tokenizer(section: ModelConfig) -> Any:
    return chat.load_tokenizer(section.path, section.revision, section.trust_remote_code)


@dataclass(frozen=True)
class TextReader:
    """A judge that reads conversations and not the policy's token ids."""

    why: str
    renderers: str
    """Fingerprints of what its models render text by; none where it has no model."""
    templates: tuple[Renderer, ...] = ()
    """Of its models that read a conversation turn by turn."""


def text_readers(config: RecipeConfig, renderer: Renderer) -> dict[str, TextReader]:
    """Judges that read text, by role, after a look at everything that a judge needs to come up."""
    for name, attributes in config.rated().items():
        checkpoint_format.require_attributes(getattr(config, name), attributes)
    found = {}
    for name, section in cast_sections(config).items():
        if not isinstance(section, RewardConfig):
            continue
        if section.kind == "generative":
            found[name] = TextReader(section.source, genrm.check(section.generative))
        elif section.kind == "http":
            HttpJudge(section.http, section.failed).close()
            found[name] = TextReader(section.http.url, "")
        elif section.kind == "function":
            functions.load(section.function)
            found[name] = TextReader(section.function, "")
        elif (reader := _reads_text(name, section, renderer)) is not None:
            found[name] = reader
    return found


def _reads_text(name: str, section: RewardConfig, renderer: Renderer) -> TextReader | None:
    """None where all models of a judge can read the policy's token ids."""
    members = checkpoint_format.members(section)
    tokenizers = [_tokenizer(member) for member in members]
    for member, tokenizer in zip(members, tokenizers, strict=True):
        check_model(member, chat.vocab_size(tokenizer), name)
    reads = checkpoint_format.read(section)
    reasons = {
        member.path: texts.why_text(read, tokenizer, renderer)
        for member, read, tokenizer in zip(members, reads, tokenizers, strict=True)
    }
    why = [f"{path}: {reason}" for path, reason in reasons.items() if reason]
    if not why:
        return None
    templates = tuple(
        texts.Text(tokenizer, read, section).renderer for tokenizer, read in zip(tokenizers, reads, strict=True)
    )
    return TextReader("; ".join(why), " ".join(one.fingerprint for one in templates), templates)


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
    notes: list[str]
    """What the user should know of the data, line by line."""
    exported: dict[str, Exported]
    """What the folders of exported models say, by role."""


def prepare(loaded: LoadedConfig) -> Prepared:
    """Check data, tokenizers and models of a recipe."""
    config: Any = loaded.config
    algorithm = importlib.import_module(f"align.algorithms.{config.algorithm}")
    config = replace(config, data=resolved(config.data))
    check(config)
    renderer = load_renderer(config)
    exported = {
        name: Exported(config.algorithm, exported_files.try_out(section, renderer))
        for name, section in cast_sections(config).items()
        if isinstance(section, (PolicyConfig, TrainedRewardConfig))
    }
    readers = text_readers(config, renderer)
    source = dataset.load(config.data, config.reads())
    templates = [template for reader in readers.values() for template in reader.templates]
    source, refused = dataset.readable(source, templates, config.data)
    material, counts = algorithm.load_data(config, source, renderer)
    require_positions(config, material, readers)
    counts |= {f"{name}_by_rewards": count for name, count in refused.items()}
    num_rows = config.num_rows(counts)
    prompts.require_rows(config, num_rows)
    config = config.with_steps(num_rows)
    description = {
        "source": {name: asdict(split) for name, split in source.counts.items()},
        "prepared": counts,
        "fingerprint": source.fingerprint,
        "renderer_fingerprint": renderer.fingerprint,
    }
    read = {"rows": source.fingerprint, "renderer": renderer.fingerprint}
    read |= {f"renderers of {name}": one.renderers for name, one in readers.items() if one.renderers}
    models = {name: checkpoint_format.fingerprint(one, config.run.seed) for name, one in cast_sections(config).items()}
    identity = Identity.of(config, read, models)
    spoken = {}
    if readers:
        contexts = (row.context for rows in (source.train, source.validation) for row in rows)
        spoken = dict.fromkeys(readers, Conversations(contexts, renderer))
    notes = [*described(config.data), *epochs(config, num_rows, counts), *dtype_notes(loaded)]
    facts = description, identity, readers, spoken, notes, exported
    return Prepared(config, algorithm, material, counts, renderer, *facts)


def require_positions(config: Any, material: Any, readers: Mapping[str, TextReader]) -> None:
    """Raise `DataError` for a role that reads token ids and has fewer positions than the longest sequence of them. What
    a reward model reads as text is known when it is rendered, and is checked there."""
    sampling = getattr(config, "sampling", None)
    parts: dict[str, positions.Longest] = {}
    for part, one in positions.longest(material, sampling.max_tokens if sampling else 0):
        parts[part] = max(one, parts.get(part, one))
    for name, section in cast_sections(config).items():
        if name not in readers:
            positions.check(section, name, parts, scores_data=getattr(config, "gold", None) == "reward")


def epochs(config: Any, num_rows: int, counts: Mapping[str, int]) -> list[str]:
    """How often the data is passed over, and whether held-out prompts are fewer than the recipe asks for."""
    key, batch = config.rows_per_step()
    passes = config.run.steps * batch / num_rows
    notes = [f"{passes:.4g} epochs: run.steps {config.run.steps} x {key} {batch} / {num_rows} rows"]
    held_out = counts.get("held_out_kept")
    if held_out is not None and held_out < config.evaluation.prompts:
        notes.append(f"held-out evaluation: {held_out} prompts, evaluation.prompts is {config.evaluation.prompts}")
    return notes
