"""What both generations of SteerLM share: responses and their labels, and held-out prompts that ask for the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from align import data, ops
from align.algorithms import _evaluation, _rollout
from align.data.steerlm import Form
from align.roles import RewardRole

if TYPE_CHECKING:
    from align.config import DataConfig, EvaluationConfig, OnPolicyConfig, RecipeConfig, SteeringConfig
    from align.data.chat import Renderer
    from align.data.dataset import Corpus
    from align.data.rows import Rating
    from align.data.steerlm_dataset import Asked
    from align.run import Run

Labels = Literal["reward", "data"]

PART = 1024
"""Responses that are rated by one call, and prompts that are answered by one."""


@dataclass(frozen=True)
class SteerLMData:
    """Responses to learn from. Their labels, unless people gave them, wait for the attribute model."""

    rows: Sequence[Rating]
    form: Form
    renderer: Renderer
    held_out: _evaluation.HeldOutPrompts | None
    files: Mapping[str, str]
    """What a trained model's folder gets beside the model, text by name."""


def reads(labels: Labels, section: DataConfig) -> Literal["preferences", "ratings"]:
    """What the data are read as: responses one by one where the format has them so, else pairs, without labels."""
    by_one = labels == "data" or "ratings" in data.dataset.FORMATS.get(section.format, {})
    return "ratings" if by_one else "preferences"


def load_data(
    config: RecipeConfig,
    evaluation: EvaluationConfig,
    steering: SteeringConfig,
    labels: Labels,
    source: Corpus[Any],
    renderer: Renderer,
) -> tuple[SteerLMData, dict[str, int]]:
    """Responses of the training split, those of people's labels with them, and what became of the rows."""
    form = Form.of(steering, config.data.date)
    files = form.files()
    rows, counts = data.steerlm_dataset.answers(
        source.train, renderer, config.data.max_prompt_tokens, config.data.max_response_tokens
    )
    if labels == "data":
        rated, rating_BA = data.steerlm_dataset.own_ratings(rows, form.names)
        counts |= {"unrated": len(rows) - len(rated), "kept": len(rated)}
        rows = data.steerlm_dataset.labelled(rated, ops.steerlm.labels(rating_BA), form.names)
    held_out = None
    if evaluation.every:
        wanted = [(row.where, row.context, form.values) for row in source.validation]
        asked = data.steerlm_dataset.asked(wanted, renderer, form, config.data.max_prompt_tokens)
        prompts = data.prompts.first(asked.steered, evaluation.prompts, renderer.stop_ids, _evaluation.NOISE)
        contexts = asked.contexts[: evaluation.prompts]
        held_out = _evaluation.HeldOutPrompts(prompts, contexts, asked.plain.select(prompts.index_P), files)
        counts |= {f"held_out_{name}": count for name, count in asked.counts.items()}
    return SteerLMData(rows, form, renderer, held_out, files), counts


def label_ratings(rows: Sequence[Rating], reward: RewardRole, form: Form, run: Run) -> list[Rating]:
    """The rows as the attribute model labels them, written to the run folder too. Those that it gives no finite rating
    (``reward.failed: drop``) are left out."""
    dialogues = [data.chat.Dialogue(row.context, row.response) for row in rows]
    starts = range(0, len(dialogues), PART)
    rating_BA = ops.groups.joined([reward.rate(dialogues[i : i + PART], form.names).result() for i in starts])
    known = rating_BA.isfinite().all(1).nonzero().squeeze(1)
    label_BA = ops.steerlm.labels(rating_BA[known])
    found = data.steerlm_dataset.labelled([rows[i] for i in known.tolist()], label_BA, form.names)
    name = f"labelled-round-{run.round}.jsonl"
    run.write_text(name, data.steerlm_dataset.dumps(found))
    run.report(f"{name}: {len(found)} responses, {len(rows) - len(found)} without a rating left out")
    return found


def told(counts: Mapping[str, int]) -> str:
    """As one line."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())


@dataclass(frozen=True, kw_only=True)
class LabelGroups(_rollout.TrainData):
    """Prompts that ask for the labels of the data's responses."""

    asked: Asked
    """Row by row, what is asked for and of which conversation."""
    steer: SteerLMData


def group_labels(
    config: OnPolicyConfig, labels: Labels, material: SteerLMData, reward: RewardRole, run: Run
) -> LabelGroups:
    """The prompts, after their labels have come from the attribute model where they must."""
    rows, form, renderer = material.rows, material.form, material.renderer
    if labels == "reward":
        rows = label_ratings(rows, reward, form, run)
    wanted = ((row.where, row.context, data.steerlm_dataset.labels(row, form.names)) for row in rows)
    asked = data.steerlm_dataset.asked(wanted, renderer, form, config.data.max_prompt_tokens)
    run.report(f"training prompts: {told(asked.counts)}")
    data.prompts.require_rows(config, asked.counts["kept"])
    stream = data.prompts.PromptStream(asked.steered, config.prompts_per_step, config.run.seed, renderer.stop_ids)
    return LabelGroups(stream, material.held_out, asked.plain, asked=asked, steer=material)
