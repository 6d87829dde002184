"""Generative reward models: what the judge is asked about the responses to a prompt, and the scores that result.

The judge is a generator (`align.generators`): a local model, an endpoint or a function. All requests of a call are sent
together; then unreadable answers are requested again, up to ``retries`` times. A local model's answer is a function of
the request and its sample number, so the same responses get the same verdicts again, also in a resumed run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from align.config import GenerativeConfig, GenerativeRewardConfig
from align.data import genrm, genrm_prompts
from align.data.chat import Dialogue, Message, Renderer
from align.data.genrm_prompts import FALLBACK, Verdict
from align.generators import models as generators
from align.generators.base import Completion, Request
from align.ops.genrm import MIDDLE
from align.rewards import genrm_card
from align.rewards import genrm_groups as genrm_groups
from align.rewards.base import Groups, Ids, RewardScorer, TextInput

T = TypeVar("T")
Context = tuple[Message, ...]
COUNTS = ("verdicts", "retried", "fallbacks")


class JudgeTask(NamedTuple):
    """One response that is scored alone, or two that are compared."""

    context: Context
    responses: tuple[str, ...]


class PairVerdict(NamedTuple):
    """A judge's verdict on a `JudgeTask`."""

    scores: Verdict
    """Mean over votes and, for a pair, over both orders. Unreadable votes count as no opinion: (3, 3, 3.5)."""
    agreed: bool | None
    """Whether both orders favor the same response; None if there is one order or an unreadable vote."""


class GenerativeScorer(RewardScorer):
    """Scores from the verdicts of an LLM judge."""

    def __init__(self, config: GenerativeRewardConfig, device: torch.device, seed: int = 0):
        """Raises `ModelError`, `ConfigError` or `DataError` if the judge cannot be loaded."""
        self.config = config
        self.generator = generators.build_generator(self.config.judge, device, seed)
        self._counts: Counter[str] = Counter()
        self._agreed: list[bool] = []

    @classmethod
    def check(cls, config: GenerativeRewardConfig, name: str, renderer: Renderer | None) -> TextInput:
        """Also raises `AlignError` if the template ignores the roles, or if the judge was trained on another form."""
        return TextInput(config.source, check_judge(config, name))

    @classmethod
    def fingerprint(cls, config: GenerativeRewardConfig, seed: int) -> str:
        return generators.generator_class(config.judge).fingerprint(config.judge, seed)

    def score(self, dialogues: Sequence[Dialogue], completion_ids: Ids = None, groups: Groups = None) -> Tensor:
        """See `RewardScorer.score`. The responses of a group are compared; a group of one is scored alone."""
        keys: Sequence[object] = [dialogue.context for dialogue in dialogues] if groups is None else groups
        rows = [list(group) for _, group in groupby(range(len(dialogues)), keys.__getitem__)]
        strip = self.config.strip_thoughts
        shown = [
            Dialogue(d.context, genrm_prompts.split_reasoning(d.response)[1] if strip else d.response)
            for d in dialogues
        ]
        by_principle = self.config.form == "principle"
        scores = self._score_by_principle(shown) if by_principle else self._score_by_verdict(shown, rows)
        adjusted = [
            score
            for group in rows
            for score in genrm_groups.adjusted(
                [scores[i] for i in group], [dialogues[i].response for i in group], self.config
            )
        ]
        return torch.tensor(adjusted, dtype=torch.float32)

    def compare_all(self, tasks: Sequence[JudgeTask]) -> list[PairVerdict]:
        """The verdict on each task, all requested together; for the forms ``helpsteer3`` and ``json``."""
        config, form = self.config, self.config.form
        assert form != "principle"
        orders = [
            [task, JudgeTask(task.context, task.responses[::-1])]
            if config.both_orders and len(task.responses) == 2
            else [task]
            for task in tasks
        ]
        requests = [task for order in orders for task in order]
        votes = iter(
            self._votes(
                [genrm_prompts.judge_messages(*task, form, config.custom_roles, config.principle) for task in requests],
                lambda i, completion: genrm_prompts.parse_verdict(completion.text, form, len(requests[i].responses)),
            )
        )
        merged = [_merge_orders([next(votes) for _ in order], len(order[0].responses)) for order in orders]
        self._agreed += [verdict.agreed for verdict in merged if verdict.agreed is not None]
        return merged

    def metrics(self) -> dict[str, float]:
        """Counts of the generator, and ``verdicts`` requested, ``retried`` requests of unreadable ones, ``fallbacks``
        that stayed unreadable; ``order_consistency``: the share of pairs, of those with readable votes, on which both
        orders favor the same response, or neither."""
        metrics = self.generator.metrics() | {name: float(self._counts[name]) for name in COUNTS}
        metrics |= {"order_consistency": sum(self._agreed) / len(self._agreed)} if self._agreed else {}
        self._counts, self._agreed = Counter(), []
        return metrics

    def close(self) -> None:
        self.generator.close()

    def _score_by_verdict(self, dialogues: Sequence[Dialogue], rows: Sequence[Sequence[int]]) -> list[float]:
        config = self.config
        pairs = [genrm_groups.pairs(len(group), config.pairs, config.both_orders) for group in rows]
        members = [
            tuple(group[i] for i in pair)
            for group, group_pairs in zip(rows, pairs, strict=True)
            for pair in (group_pairs or [(0,)])
        ]
        tasks = [JudgeTask(dialogues[ids[0]].context, tuple(dialogues[i].response for i in ids)) for ids in members]
        verdict_scores = iter(verdict.scores for verdict in self.compare_all(tasks))
        scores: list[float] = []
        for group, group_pairs in zip(rows, pairs, strict=True):
            if group_pairs:
                values = [next(verdict_scores) for _ in group_pairs]
                scores += genrm_groups.from_verdicts(len(group), group_pairs, values, config.tie_break)
            else:
                scores.append(next(verdict_scores).first)
        return scores

    def _score_by_principle(self, dialogues: Sequence[Dialogue]) -> list[float]:
        conversations = [genrm_groups.ask_principle(dialogue, self.config.principle) for dialogue in dialogues]
        votes = self._votes(conversations, lambda _, completion: genrm_groups.read_principle(completion), margins=True)
        return [
            sum(genrm_groups.NO_OPINION if vote is None else vote for vote in row_votes) / len(row_votes)
            for row_votes in votes
        ]

    def _votes(
        self,
        conversations: Sequence[tuple[Message, ...]],
        read: Callable[[int, Completion], T | None],
        margins: bool = False,
    ) -> list[list[T | None]]:
        """``votes`` verdicts on each conversation; None for one that is still unreadable after all retries.

        A truncated answer is not read: what looks like a verdict in it may be part of the reasoning.
        """
        num_votes, sampling = self.config.votes, self.config.sampling
        votes: list[list[T | None]] = [[None] * num_votes for _ in conversations]
        missing = [(i, vote) for i in range(len(conversations)) for vote in range(num_votes)]
        self._counts["verdicts"] += len(missing)
        for attempt in range(self.config.verdict_retries + 1):
            if not missing:
                break
            self._counts["retried"] += len(missing) if attempt else 0
            # A new sample number, because the same request would get the same answer.
            requests = [Request(conversations[i], vote + num_votes * attempt) for i, vote in missing]
            completions = self.generator.complete(requests, sampling, margins)
            for (i, vote), completion in zip(missing, completions, strict=True):
                votes[i][vote] = read(i, completion) if completion.finished else None
            missing = [(i, vote) for i, vote in missing if votes[i][vote] is None]
        self._counts["fallbacks"] += len(missing)
        return votes


def _merge_orders(orders: Sequence[Sequence[Verdict | None]], num_responses: int) -> PairVerdict:
    """One verdict from the votes in one or both orders."""
    fallback = FALLBACK if num_responses == 2 else Verdict(FALLBACK.first, None, None)
    unread = any(vote is None for votes in orders for vote in votes)
    forward, *swapped_orders = [[vote or fallback for vote in votes] for votes in orders]
    if not swapped_orders:
        return PairVerdict(_mean(forward), None)
    swapped_back = [genrm_prompts.swap_verdict(vote) for vote in swapped_orders[0]]
    agreed = None if unread else _favors(_mean(forward)) == _favors(_mean(swapped_back))
    return PairVerdict(_mean([*forward, *swapped_back]), agreed)


def _mean(scores: Sequence[Verdict]) -> Verdict:
    """One exact sum and one division, so that means are equal if sums are: ``tie_break`` compares them."""
    first, second, ranking = (
        sum(column) / len(column) if None not in column else None for column in zip(*scores, strict=True)
    )
    assert first is not None
    return Verdict(first, second, ranking)


def _favors(scores: Verdict) -> int:
    """1 for the first response, -1 for the second, 0 for neither."""
    assert scores.ranking is not None
    return (scores.ranking < MIDDLE) - (scores.ranking > MIDDLE)


def check_judge(config: GenerativeConfig, name: str = "reward") -> str:
    """Check everything that a judge needs; returns the fingerprint of its template, empty if it is not a local model.

    Raises `AlignError` with a remedy: missing model, function or key, a template that ignores the roles, a judge that
    was trained on another form.
    """
    renderer = generators.generator_class(config.judge).check(config.judge, f"{name}.judge")
    genrm_card.require_same(config)
    if renderer is None:
        return ""
    keys = f"{name}.custom_roles", f"{name}.judge.chat_template"
    genrm.require_roles(renderer, config, keys)
    return renderer.fingerprint
