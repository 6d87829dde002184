"""Load and check everything that a recipe reads, before its run folder is made and any worker starts."""

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
    RoleConfig,
    SamplerConfig,
    TrainedModelConfig,
    TrainedRewardConfig,
)
from align.config.load import LoadedConfig
from align.data import chat, dataset, prompts
from align.data.chat import Renderer
from align.data.conversations import ConversationIndex
from align.data.detect import describe_sources, resolve_format
from align.errors import DataError
from align.models import exported_files, positions
from align.models.exported_files import Exported
from align.models.load import check as check_model
from align.models.load import check_lora
from align.prechecks.roles import check_roles, dtype_notes, remote_code, role_configs
from align.rewards import checkpoint_format, scorers
from align.rewards.base import TextInput
from align.run import Identity
from align.utils.plugins import function_fingerprint


@dataclass(frozen=True)
class Prepared:
    """A recipe whose data, tokenizers and models are checked."""

    config: Any
    """The recipe, with the detected data format and the number of steps."""
    algorithm: ModuleType
    train_data: Any
    """What the algorithm's ``load_data`` returned."""
    counts: dict[str, int]
    renderer: Renderer
    description: dict[str, Any]
    """The content of ``data.json``."""
    identity: Identity
    text_inputs: dict[str, TextInput]
    """Reward roles that score decoded text."""
    conversations: dict[str, ConversationIndex]
    """The texts of the prompts, for each of these roles."""
    notes: list[str]
    """What the user should know about the data, line by line."""
    remote_code: list[str]
    """A line for each role that runs code from its model's repository."""
    exported: dict[str, Exported]
    """What the folders of exported models say, by role."""


def prepare(loaded: LoadedConfig) -> Prepared:
    """Check the roles, then tokenizers and models, then the data that they read. Raises `AlignError`."""
    config: Any = loaded.config
    algorithm = importlib.import_module(f"align.algorithms.{config.algorithm}")
    config = replace(config, data=resolve_format(config.data))
    notes = describe_sources(config.data)

    check_roles(config)
    roles = role_configs(config)
    notes_on_dtypes, code = dtype_notes(loaded), remote_code(config)

    renderer = load_renderer(config)
    exported = {
        name: Exported(config.algorithm, exported_files.try_out(role, renderer))
        for name, role in roles.items()
        if isinstance(role, (PolicyConfig, TrainedRewardConfig))
    }
    inputs = text_inputs(config, roles, renderer)

    source = dataset.load_dataset(config.data, config.reads())
    templates = [template for text_input in inputs.values() for template in text_input.templates]
    source, refused = dataset.renderable_rows(source, templates, config.data)
    train_data, counts = algorithm.load_data(config, source, renderer)
    _require_positions(config, roles, train_data, inputs)
    counts |= {f"{name}_by_rewards": count for name, count in refused.items()}
    num_rows = config.num_rows(counts)
    prompts.require_rows(config, num_rows)
    config = config.with_steps(num_rows)
    notes = [*notes, *_epoch_notes(config, num_rows, counts), *notes_on_dtypes]

    # A run resumes only if all that these hashes cover is unchanged.
    hashes = {"rows": source.fingerprint, "renderer": renderer.fingerprint}
    hashes |= {f"renderers of {name}": item.renderers for name, item in inputs.items() if item.renderers}
    engines = {name: getattr(role, "engine", "") for name, role in roles.items()}
    hashes |= {f"engine of {name}": function_fingerprint(engine) for name, engine in engines.items() if ":" in engine}
    models = {name: scorers.fingerprint(role, config.run.seed) for name, role in roles.items()}
    identity = Identity.of(config, hashes, models)
    description = {
        "source": {name: asdict(split) for name, split in source.counts.items()},
        "prepared": counts,
        "fingerprint": hashes["rows"],
        "renderer_fingerprint": hashes["renderer"],
    }
    conversations = {}
    if inputs:
        contexts = (row.context for rows in (source.train, source.validation) for row in rows)
        conversations = dict.fromkeys(inputs, ConversationIndex(contexts, renderer))
    checked = inputs, conversations, notes, code, exported
    return Prepared(config, algorithm, train_data, counts, renderer, description, identity, *checked)


def load_renderer(config: RecipeConfig) -> Renderer:
    """Tokenizer and template of the run. All roles but frozen reward models must read the same token ids."""
    roles = {
        name: role
        for name, role in role_configs(config).items()
        if isinstance(role, ModelConfig) and not isinstance(role, RewardConfig)
    }
    tokenizers = {
        name: chat.load_tokenizer(role.path, role.revision, role.trust_remote_code) for name, role in roles.items()
    }
    (first, tokenizer), *others = tokenizers.items()
    for name, other in others:
        try:
            chat.require_same_tokenizer(tokenizer, other, first, name)
        except DataError as error:
            if not isinstance(roles[name], CriticConfig):
                raise
            remedy = "start the critic from the policy: critic.path=${policy.path} critic.head=new"
            raise DataError(error.message, where=error.where, remedy=remedy) from None
    vocab_size = chat.vocab_size(tokenizer)
    renderer = Renderer(tokenizer, config.data.chat_template, config.data.date, bad_rows=config.data.bad_rows)
    rollout = config.data.max_prompt_tokens + config.sampling.max_tokens if isinstance(config, OnPolicyConfig) else 0
    for name, role in roles.items():
        check_model(role, vocab_size, name, rollout if isinstance(role, (PolicyConfig, SamplerConfig)) else 0)
        if isinstance(role, TrainedModelConfig):
            check_lora(role, vocab_size, f"{name}.lora.targets")
        if isinstance(role, CriticConfig) and role.head == "trained":
            checkpoint_format.critic_start(role)
    return renderer


def text_inputs(config: RecipeConfig, roles: Mapping[str, RoleConfig], renderer: Renderer) -> dict[str, TextInput]:
    """Reward roles that score decoded text, after checking everything that their scorers need."""
    for name, attributes in config.rated().items():
        checkpoint_format.require_attributes(getattr(config, name), attributes)
    inputs = {}
    for name, role in roles.items():
        if isinstance(role, RewardConfig):
            scorer = scorers.scorer_class(role)
            text_input = scorer.check(role, name, renderer)
            if text_input or scorer.wants == "text":
                inputs[name] = text_input or TextInput(role.source)
    return inputs


def _require_positions(
    config: Any, roles: Mapping[str, RoleConfig], train_data: Any, inputs: Mapping[str, TextInput]
) -> None:
    """Raise `DataError` for a role that reads token ids and has fewer positions than the longest sequence.

    A reward role that reads text checks its sequences when it renders them.
    """
    sampling = getattr(config, "sampling", None)
    longest: dict[str, positions.LongestSequence] = {}
    for part, length in positions.longest(train_data, sampling.max_tokens if sampling else 0):
        longest[part] = max(length, longest.get(part, length))
    for name, role in roles.items():
        if name not in inputs and isinstance(role, ModelConfig):
            positions.check(role, name, longest, scores_data=getattr(config, "gold", None) == "reward")


def _epoch_notes(config: Any, num_rows: int, counts: Mapping[str, int]) -> list[str]:
    """How often training passes over the data, and whether held-out prompts are fewer than the recipe asks for."""
    key, batch = config.rows_per_step()
    epochs = config.run.steps * batch / num_rows
    notes = [f"{epochs:.4g} epochs: run.steps {config.run.steps} x {key} {batch} / {num_rows} rows"]
    held_out = counts.get("held_out_kept")
    if held_out is not None and held_out < config.evaluation.prompts:
        notes.append(f"held-out evaluation: {held_out} prompts, evaluation.prompts is {config.evaluation.prompts}")
    return notes
