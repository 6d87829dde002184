"""Compute metrics from the records of ``align scale``: the full setting, smaller settings, and best-of-n.

A smaller setting uses a subset of the same samples, exactly the samples that a separate run would draw: drafts are
numbered, and a hash of the candidate feedback decides which feedback an edit uses.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from align.config import ScaleConfig
from align.data import toy
from align.data.chat import Message
from align.data.editing import change_requests

FeedbackSet = tuple[int, ...]
"""Indices of the feedback texts in the prompt of an edit, in prompt order."""
Record = Mapping[str, Any]
AXES = ("drafts", "feedbacks", "edits")
TOTAL = ("drafts", "draft_select", "feedback", "edits", "select")
"""Stages of the full setting."""
APART = ("eval_reward", "sweep_edits", "best_of", "best_of_select", "best_of_eval_reward")
"""Stages that only measure."""
COLUMNS = ("calls", "prompt_tokens", "tokens", "seconds")


class SweepSetting(NamedTuple):
    """The part of a record that a setting uses."""

    drafts: int
    feedbacks: int
    edits: int


class ChosenResponse(NamedTuple):
    """A selected response and its cost."""

    text: str
    edited: bool
    score: float
    """Score by ``select``; NaN if it gave none."""
    judged: float | None
    """Score by ``eval_reward``, if configured."""
    candidates: int
    tokens: int


def whole(section: ScaleConfig) -> SweepSetting:
    """The setting of a recipe."""
    return SweepSetting(section.drafts, section.feedbacks, section.edits)


def feedback_sets(
    section: ScaleConfig, context: Sequence[Message], draft: int, texts: Sequence[str], edits: int
) -> list[FeedbackSet]:
    """The first ``edits`` sets of feedback on a draft, without duplicates; empty if no text asks for a change."""
    useful = change_requests(texts, section.editing)
    name = hashlib.sha256(json.dumps([section.seed, [*map(list, context)], draft]).encode())

    def noise(number: int, text: int) -> bytes:
        own = name.copy()
        own.update(f" {number} {text}".encode())
        return own.digest()

    drawn = [tuple(sorted(useful, key=partial(noise, number))[: section.feedbacks_kept]) for number in range(edits)]
    return list(dict.fromkeys(feedback for feedback in drawn if feedback))


def ranked(scores: Sequence[float | None]) -> list[int]:
    """Indices from the highest score to the lowest; ties keep their order, missing scores come last."""
    values = [-math.inf if score is None else score for score in scores]
    return sorted(range(len(scores)), key=lambda i: values[i], reverse=True)


def _part(section: ScaleConfig, record: Record, setting: SweepSetting) -> tuple[list[int], list[int]]:
    """Indices of the kept drafts and of the edits that belong to a setting."""
    drafts: list[int] = record["kept"][: setting.drafts]
    context = [Message(**turn) for turn in record["context"]]
    own: set[tuple[int, FeedbackSet]] = set()
    for k in drafts:
        texts = [entry["text"] for entry in record["feedback"][str(k)][: setting.feedbacks]]
        own |= {(k, chosen) for chosen in feedback_sets(section, context, k, texts, setting.edits)}
    edits = [i for i, entry in enumerate(record["edits"]) if (entry["draft"], tuple(entry["feedback"])) in own]
    return drafts, edits


def tokens(section: ScaleConfig, record: Record, setting: SweepSetting) -> int:
    """Tokens that a setting generates: all draft samples, feedback, and edits."""
    return _spent(section, record, setting, *_part(section, record, setting))


def _spent(section: ScaleConfig, record: Record, setting: SweepSetting, drafts: list[int], edits: list[int]) -> int:
    sampled = range(section.num_samples) if section.draft_samples is not None else drafts
    feedback = (
        [entry for k in drafts for entry in record["feedback"][str(k)][: setting.feedbacks]] if setting.edits else []
    )
    completions = [record["samples"][k] for k in sampled] + feedback + [record["edits"][i] for i in edits]
    return sum(entry["tokens"] for entry in completions)


def chosen(section: ScaleConfig, record: Record, setting: SweepSetting) -> ChosenResponse:
    """The candidate of a setting that ``select`` scores highest; drafts come first where scores are equal. A setting
    without edits chooses among its drafts."""
    drafts, edits = _part(section, record, setting)
    places = [*range(len(drafts)), *(len(record["kept"]) + i for i in edits)]
    candidates = [record["samples"][k] for k in record["kept"]] + record["edits"]
    best = places[ranked([record["scores"]["select"][place] for place in places])[0]]
    judged = _number(record["scores"]["eval_reward"][best]) if "eval_reward" in record["scores"] else None
    score, spent = _number(record["scores"]["select"][best]), _spent(section, record, setting, drafts, edits)
    return ChosenResponse(candidates[best]["text"], best >= len(record["kept"]), score, judged, len(places), spent)


def first(record: Record) -> ChosenResponse:
    """The first draft. It has no `eval_reward` score if drafts were selected from more samples."""
    scores, sample = record["scores"], record["samples"][0]
    judged = _number(scores["eval_reward"][0]) if "eval_reward" in scores and "draft_select" not in scores else None
    score = _number(scores.get("draft_select", scores["select"])[0])
    return ChosenResponse(sample["text"], False, score, judged, 1, sample["tokens"])


def best_of(record: Record, budget: int) -> ChosenResponse | None:
    """The best of the first samples of the policy that have no more tokens than ``budget`` together, at least one;
    None if best-of-n was not measured."""
    if "best_of_select" not in record["scores"] or any(uncounted(record).values()):
        return None
    count, spent = 1, record["samples"][0]["tokens"]
    while count < len(record["scores"]["best_of_select"]) and spent + record["samples"][count]["tokens"] <= budget:
        spent += record["samples"][count]["tokens"]
        count += 1
    best = ranked(record["scores"]["best_of_select"][:count])[0]
    judged = record["scores"].get("best_of_eval_reward")
    score = _number(record["scores"]["best_of_select"][best])
    text = record["samples"][best]["text"]
    return ChosenResponse(text, False, score, None if judged is None else _number(judged[best]), count, spent)


def _number(score: float | None) -> float:
    return math.nan if score is None else score


def _summary(records: Sequence[Record], choices: Sequence[ChosenResponse]) -> dict[str, float]:
    """Means over prompts; includes the ground truth of the bundled task if all prompts belong to it."""
    means = {
        "select": _mean([choice.score for choice in choices]),
        "edited": _mean([float(choice.edited) for choice in choices]),
        "candidates": _mean([float(choice.candidates) for choice in choices]),
        "tokens": _mean([float(choice.tokens) for choice in choices]),
    }
    judged = [choice.judged for choice in choices if choice.judged is not None]
    contexts = [[Message(**turn) for turn in record["context"]] for record in records]
    truth_P = toy.ground_truth(contexts, [choice.text for choice in choices])
    means |= {"eval_reward": _mean(judged)} if judged else {}
    return means if truth_P is None else means | {"ground_truth": float(truth_P.double().mean())}


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite) if finite else math.nan


def point(section: ScaleConfig, records: Sequence[Record], setting: SweepSetting) -> dict[str, Any]:
    """A setting and best-of-n of the same number of tokens, prompt by prompt; no best-of-n if a prompt lacks it."""
    choices = [chosen(section, record, setting) for record in records]
    other = [best_of(record, choice.tokens) for record, choice in zip(records, choices, strict=True)]
    beside = [choice for choice in other if choice is not None]
    best = _summary(records, beside) if len(beside) == len(records) else None
    return {**setting._asdict(), "feedback_edit": _summary(records, choices), "best_of_n": best}


def measure(section: ScaleConfig, records: Sequence[Record]) -> dict[str, Any]:
    """All metrics of a finished command."""
    full = whole(section)
    smaller = {axis: getattr(section.sweep, axis) for axis in AXES}
    sweep = {
        axis: [point(section, records, full._replace(**{axis: n})) for n in sorted({*numbers, getattr(full, axis)})]
        for axis, numbers in smaller.items()
        if numbers
    }
    return {
        "prompts": len(records),
        "one_draft": _summary(records, [first(record) for record in records]),
        "drafts_alone": _summary(records, [chosen(section, record, full._replace(edits=0)) for record in records]),
        "whole": point(section, records, full),
        "sweep": sweep,
        "budget": budget(section, records),
        "truncated": _added([truncated(record) for record in records]),
        "uncounted": _added([uncounted(record) for record in records]),
    }


def budget(section: ScaleConfig, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Calls, tokens and seconds of each stage over all prompts; ``relative`` is to one draft of each prompt.

    Seconds of a call are shared among its requests. Concurrent stages overlap, so the sum of seconds is work,
    not wall-clock time. The total excludes the cost of the sweep and of best-of-n.
    """
    stages: dict[str, dict[str, float]] = {}
    for record in records:
        for stage, entries in _stages(section, record).items():
            for key in ("prompt_tokens", "tokens"):
                _add(stages, stage, key, sum(per_prompt[key] for per_prompt in entries))
        for stage, count in record["calls"].items():
            _add(stages, stage, "calls", count)
            _add(stages, stage, "seconds", record["seconds"][stage])
    stages = {stage: row for stage, row in stages.items() if row.get("calls")}
    parts = [stages[name] for name in TOTAL if name in stages]
    total = {key: sum(row.get(key, 0) for row in parts) for key in COLUMNS}
    drafts = stages["drafts"]
    per_prompt = {key: drafts[key] / drafts["calls"] * len(records) for key in ("tokens", "seconds")}
    rows = {name: stages[name] for name in TOTAL if name in stages} | {"total": total}
    rows |= {name: stages[name] for name in APART if name in stages}
    return [
        {"stage": name, **{key: row.get(key, 0) for key in COLUMNS}}
        | {f"relative_{key}": row.get(key, 0) / value if value else None for key, value in per_prompt.items()}
        for name, row in rows.items()
    ]


def _add(stages: dict[str, dict[str, float]], stage: str, key: str, value: float) -> None:
    row = stages.setdefault(stage, {})
    row[key] = row.get(key, 0) + value


def _stages(section: ScaleConfig, record: Record) -> dict[str, list[Any]]:
    """Completions by stage."""
    main = {*_part(section, record, whole(section))[1]}
    return {
        "drafts": record["samples"][: section.num_samples],
        "best_of": record["samples"][section.num_samples :],
        "feedback": [entry for entries in record["feedback"].values() for entry in entries],
        "edits": [entry for i, entry in enumerate(record["edits"]) if i in main],
        "sweep_edits": [entry for i, entry in enumerate(record["edits"]) if i not in main],
    }


def truncated(record: Record) -> dict[str, int]:
    """Number of answers truncated at the token limit, by role."""
    return {name: sum(not entry["finished"] for entry in entries) for name, entries in _said(record).items()}


def uncounted(record: Record) -> dict[str, int]:
    """Number of answers without a token count, by role."""
    return {
        name: sum(bool(entry["text"]) and not entry["tokens"] for entry in entries)
        for name, entries in _said(record).items()
    }


def _said(record: Record) -> dict[str, list[Any]]:
    feedback = [entry for entries in record["feedback"].values() for entry in entries]
    return {"drafts": record["samples"], "feedback": feedback, "edits": record["edits"]}


def _added(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(count[name] for count in counts) for name in counts[0]}
