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
from align.rewards import checkpoint_format
from align.rewards import scorers as scorers
from align.rewards.base import TextInput
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
            checkpoint_format.critic_start(section)
    return Renderer(tokenizer, config.data.chat_template, config.data.date, bad_rows=config.data.bad_rows)


def _tokenizer(section: ModelConfig) -> Any:
    return chat.load_tokenizer(section.path, section.revision, section.trust_remote_code)


def text_inputs(config: RecipeConfig, renderer: Renderer) -> dict[str, TextInput]:
    """Reward roles that score decoded text, after checking everything that their scorers need."""
    for name, attributes in config.rated().items():
        checkpoint_format.require_attributes(getattr(config, name), attributes)
    inputs = {}
    for name, section in cast_sections(config).items():
        if isinstance(section, RewardConfig):
            scorer = scorers.scorer_class(section)
            text_input = scorer.check(section, name, renderer)
            if text_input or scorer.wants == "text":
                inputs[name] = text_input or TextInput(section.source)
    return inputs


@dataclass(frozen=True)
class Prepared:
    """A recipe whose data, tokenizers and models have been looked at, before anything is started."""

    config: Any
    algorithm: ModuleType
    train_data: Any
    counts: dict[str, int]
    renderer: Renderer
    description: dict[str, Any]
    identity: Identity
    text_inputs: dict[str, TextInput]
    """Reward roles that score decoded text."""
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
    inputs = text_inputs(config, renderer)
    source = dataset.load(config.data, config.reads())
    templates = [template for text_input in inputs.values() for template in text_input.templates]
    source, refused = dataset.readable(source, templates, config.data)
    train_data, counts = algorithm.load_data(config, source, renderer)
    require_positions(config, train_data, inputs)
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
    read |= {f"renderers of {name}": item.renderers for name, item in inputs.items() if item.renderers}
    models = {name: scorers.fingerprint(one, config.run.seed) for name, one in cast_sections(config).items()}
    identity = Identity.of(config, read, models)
    spoken = {}
    if inputs:
        contexts = (row.context for rows in (source.train, source.validation) for row in rows)
        spoken = dict.fromkeys(inputs, Conversations(contexts, renderer))
    notes = [*described(config.data), *epochs(config, num_rows, counts), *dtype_notes(loaded)]
    facts = description, identity, inputs, spoken, notes, exported
    return Prepared(config, algorithm, train_data, counts, renderer, *facts)


def require_positions(config: Any, train_data: Any, inputs: Mapping[str, TextInput]) -> None:
    """Raise `DataError` for a role that reads token ids and has fewer positions than the longest sequence of them. What
    a reward model reads as text is known when it is rendered, and is checked there."""
    sampling = getattr(config, "sampling", None)
    parts: dict[str, positions.Longest] = {}
    for part, one in positions.longest(train_data, sampling.max_tokens if sampling else 0):
        parts[part] = max(one, parts.get(part, one))
    for name, section in cast_sections(config).items():
        if name not in inputs:
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
