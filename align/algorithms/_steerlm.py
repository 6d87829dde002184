"""What both generations of SteerLM share: responses and their labels, and held-out prompts that ask for the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from align import data, ops
from align.algorithms import _evaluation, _rollout
from align.data.steerlm import SteeringFormat
from align.roles import RewardRole

if TYPE_CHECKING:
    from align.config import DataConfig, EvaluationConfig, OnPolicyConfig, RecipeConfig, SteeringConfig
    from align.data.chat import Renderer
    from align.data.dataset import DataSplits
    from align.data.rows import Rating
    from align.data.steerlm_dataset import SteeredPrompts
    from align.run import Run

Labels = Literal["reward", "data"]

PART = 1024
"""Responses rated in one call, and prompts answered in one call."""


@dataclass(frozen=True)
class SteerLMData:
    """Responses to train on. The attribute model labels them later unless the data have human labels."""

    rows: Sequence[Rating]
    form: SteeringFormat
    renderer: Renderer
    held_out: _evaluation.HeldOutPrompts | None
    files: Mapping[str, str]
    """Extra files of the trained model's folder, text by name."""


def reads(labels: Labels, section: DataConfig) -> Literal["preferences", "ratings"]:
    """Kind of row to read: single responses where the format has them, else pairs without labels."""
    single = labels == "data" or "ratings" in data.dataset.FORMATS.get(section.format, {})
    return "ratings" if single else "preferences"


def load_data(
    config: RecipeConfig,
    evaluation: EvaluationConfig,
    steering: SteeringConfig,
    labels: Labels,
    source: DataSplits[Any],
    renderer: Renderer,
) -> tuple[SteerLMData, dict[str, int]]:
    """Responses of the training split, with human labels for ``labels: data``, and row counts by outcome."""
    form = SteeringFormat.of(steering, config.data.date)
    files = form.files()
    rows, counts = data.steerlm_dataset.distinct_responses(
        source.train, renderer, config.data.max_prompt_tokens, config.data.max_response_tokens
    )
    if labels == "data":
        labelled, rating_BA = data.steerlm_dataset.human_ratings(rows, form.names)
        counts |= {"unrated": len(rows) - len(labelled), "kept": len(labelled)}
        rows = data.steerlm_dataset.with_labels(labelled, ops.steerlm.labels(rating_BA), form.names)
    held_out = None
    if evaluation.every:
        requests = [(row.where, row.context, form.values) for row in source.validation]
        held_out_set = data.steerlm_dataset.steered_prompts(requests, renderer, form, config.data.max_prompt_tokens)
        prompts = data.prompts.first_prompts(
            held_out_set.steered, evaluation.prompts, renderer.stop_ids, _evaluation.NOISE
        )
        contexts = held_out_set.contexts[: evaluation.prompts]
        held_out = _evaluation.HeldOutPrompts(prompts, contexts, held_out_set.plain.select(prompts.index_P), files)
        counts |= {f"held_out_{name}": count for name, count in held_out_set.counts.items()}
    return SteerLMData(rows, form, renderer, held_out, files), counts


def label_ratings(rows: Sequence[Rating], reward: RewardRole, form: SteeringFormat, run: Run) -> list[Rating]:
    """Label the rows with the attribute model and write them to the run folder. Rows without a finite rating
    (``reward.failed: drop``) are left out."""
    dialogues = [data.chat.Dialogue(row.context, row.response) for row in rows]
    starts = range(0, len(dialogues), PART)
    rating_BA = ops.advantages.concatenate([reward.rate(dialogues[i : i + PART], form.names).result() for i in starts])
    finite = rating_BA.isfinite().all(1).nonzero().squeeze(1)
    label_BA = ops.steerlm.labels(rating_BA[finite])
    labelled = data.steerlm_dataset.with_labels([rows[i] for i in finite.tolist()], label_BA, form.names)
    name = f"labelled-round-{run.round}.jsonl"
    run.write_text(name, data.steerlm_dataset.ratings_to_jsonl(labelled))
    run.report(f"{name}: {len(labelled)} responses, {len(rows) - len(labelled)} without a rating left out")
    return labelled


def format_counts(counts: Mapping[str, int]) -> str:
    """Counts as one line."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())


@dataclass(frozen=True, kw_only=True)
class LabelGroups(_rollout.TrainData):
    """Prompts that request the labels of the data's responses."""

    prompt_set: SteeredPrompts
    """The requested labels and the conversation, row by row."""
    steerlm: SteerLMData


def group_labels(
    config: OnPolicyConfig, labels: Labels, train_data: SteerLMData, reward: RewardRole, run: Run
) -> LabelGroups:
    """The prompts; with ``labels: reward`` the attribute model labels their rows first."""
    rows, form, renderer = train_data.rows, train_data.form, train_data.renderer
    if labels == "reward":
        rows = label_ratings(rows, reward, form, run)
    requests = ((row.where, row.context, data.steerlm_dataset.integer_labels(row, form.names)) for row in rows)
    prompts = data.steerlm_dataset.steered_prompts(requests, renderer, form, config.data.max_prompt_tokens)
    run.report(f"training prompts: {format_counts(prompts.counts)}")
    data.prompts.require_rows(config, prompts.counts["kept"])
    stream = data.prompts.PromptStream(prompts.steered, config.prompts_per_step, config.run.seed, renderer.stop_ids)
    return LabelGroups(stream, train_data.held_out, prompts.plain, prompt_set=prompts, steerlm=train_data)
