"""Generative reward models as judges: what is asked about the responses to a prompt, and the scores that come of it.

The judge is a generator (`align.generators`): a model in this process, an endpoint, a function. Whatever is asked in a
call goes to it at once, and then, in one more request each time, what could not be read. Answers of a model are a
function of the request and its number, so the same responses get the same verdicts again, in a resumed run too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from align.config import GenerativeConfig
from align.data import genrm, genrm_prompts
from align.data.chat import Dialogue, Message
from align.data.genrm_prompts import FALLBACK, Scores
from align.generators import opening
from align.generators.base import Completion, Request
from align.ops.genrm import MIDDLE
from align.rewards import genrm_card, principles
from align.rewards import genrm_groups as grouping

T = TypeVar("T")
Context = tuple[Message, ...]
COUNTED = ("verdicts", "retried", "fallbacks")


class Question(NamedTuple):
    """One response that is judged alone, or two that are compared."""

    context: Context
    responses: tuple[str, ...]


class Comparison(NamedTuple):
    """What a judge says to a question."""

    scores: Scores
    """The mean over votes and, of a pair, over both orders."""
    unread: int
    """Votes that could not be read, which count as no opinion: (3, 3, 3.5)."""
    agreed: bool | None
    """Whether both orders favour the same response; None where there is one order, or a vote could not be read."""

    @property
    def parsed(self) -> bool:
        """Whether all votes could be read."""
        return not self.unread


class GenerativeJudge:
    """Scores of a judge that writes."""

    def __init__(self, section: GenerativeConfig, device: torch.device, seed: int = 0):
        """Raises `ModelError`, `ConfigError` or `DataError` for a generator that cannot be."""
        self.section = section
        self.generator = opening.open_generator(section.judge, device, seed)
        self._counts: Counter[str] = Counter()
        self._agreed: list[bool] = []

    def score(self, dialogues: Sequence[Dialogue], groups: Sequence[int] | None = None) -> Tensor:
        """A score of each response, (B,) float32 on the CPU.

        Neighbours with one number in ``groups`` are compared with each other; without numbers, those of one context.
        A response that stands alone is judged alone.
        """
        keys: Sequence[object] = [one.context for one in dialogues] if groups is None else groups
        rows = [list(found) for _, found in groupby(range(len(dialogues)), keys.__getitem__)]
        seen = [Dialogue(one.context, self._shown(one.response)) for one in dialogues]
        scores = self._by_principle(seen) if self.section.form == "principle" else self._by_verdict(seen, rows)
        adjusted = [
            score
            for group in rows
            for score in grouping.adjusted(
                [scores[i] for i in group], [dialogues[i].response for i in group], self.section
            )
        ]
        return torch.tensor(adjusted, dtype=torch.float32)

    def compare(self, context: Context, first: str, second: str) -> Comparison:
        """What the judge says of two responses."""
        return self.compare_all([Question(context, (first, second))])[0]

    def compare_all(self, questions: Sequence[Question]) -> list[Comparison]:
        """What the judge says to each question, all asked at once; of form ``helpsteer3`` or ``json``."""
        section = self.section
        form = section.form
        assert form != "principle"
        orders = [self._orders(one) for one in questions]
        asked = [one for found in orders for one in found]
        votes = self._votes(
            [genrm_prompts.ask(*one, form, section.custom_roles, section.principle) for one in asked],
            lambda i, completion: genrm_prompts.read(completion.text, form, len(asked[i].responses)),
        )
        said = iter(votes)
        found = [_merged([next(said) for _ in found], len(found[0].responses)) for found in orders]
        self._agreed += [one.agreed for one in found if one.agreed is not None]
        return found

    def metrics(self) -> dict[str, float]:
        """What the generator counted; ``verdicts`` that were wanted, ``retried``, how often one was asked for again,
        and ``fallbacks``, those that could not be read in the end; ``order_consistency``: of the pairs whose votes
        could all be read, the share of which both orders favour the same response, or neither."""
        found = self.generator.metrics() | {name: float(self._counts[name]) for name in COUNTED}
        found |= {"order_consistency": sum(self._agreed) / len(self._agreed)} if self._agreed else {}
        self._counts, self._agreed = Counter(), []
        return found

    def _shown(self, response: str) -> str:
        return genrm_prompts.thought(response)[1] if self.section.strip_thoughts else response

    def _orders(self, question: Question) -> list[Question]:
        context, responses = question
        both = self.section.both_orders and len(responses) == 2
        return [question, Question(context, responses[::-1])] if both else [question]

    def _by_verdict(self, dialogues: Sequence[Dialogue], rows: Sequence[Sequence[int]]) -> list[float]:
        section = self.section
        compared = [grouping.pairs(len(group), section.pairs, section.both_orders) for group in rows]
        wanted = [
            tuple(group[i] for i in one)
            for group, found in zip(rows, compared, strict=True)
            for one in (found or [(0,)])
        ]
        questions = [Question(dialogues[ids[0]].context, tuple(dialogues[i].response for i in ids)) for ids in wanted]
        said = iter(one.scores for one in self.compare_all(questions))
        scores: list[float] = []
        for group, found in zip(rows, compared, strict=True):
            if found:
                verdicts_of_group = [next(said) for _ in found]
                scores += grouping.from_verdicts(len(group), found, verdicts_of_group, section.tie_break)
            else:
                scores.append(next(said).first)
        return scores

    def _by_principle(self, dialogues: Sequence[Dialogue]) -> list[float]:
        asked = [principles.ask(one, self.section) for one in dialogues]
        votes = self._votes(asked, lambda _, completion: principles.read(completion), margins=True)
        none = principles.NO_OPINION
        return [sum(none if vote is None else vote for vote in found) / len(found) for found in votes]

    def _votes(
        self,
        conversations: Sequence[tuple[Message, ...]],
        read: Callable[[int, Completion], T | None],
        margins: bool = False,
    ) -> list[list[T | None]]:
        """Verdicts on each conversation, one a vote; None for one that could not be read in the end.

        An answer that was cut off is not read: what looks like a verdict in it may be part of the reasoning.
        """
        votes, sampling = self.section.votes, self.section.sampling
        found: list[list[T | None]] = [[None] * votes for _ in conversations]
        waiting = [(i, vote) for i in range(len(conversations)) for vote in range(votes)]
        self._counts["verdicts"] += len(waiting)
        for attempt in range(self.section.retries + 1):
            if not waiting:
                break
            self._counts["retried"] += len(waiting) if attempt else 0
            requests = [Request(conversations[i], vote + votes * attempt) for i, vote in waiting]
            completions = self.generator.complete(requests, sampling, margins)
            for (i, vote), completion in zip(waiting, completions, strict=True):
                found[i][vote] = read(i, completion) if completion.finished else None
            waiting = [(i, vote) for i, vote in waiting if found[i][vote] is None]
        self._counts["fallbacks"] += len(waiting)
        return found


def _merged(orders: Sequence[Sequence[Scores | None]], num_responses: int) -> Comparison:
    """From the votes in each order."""
    none = FALLBACK if num_responses == 2 else Scores(FALLBACK.first, None, None)
    unread = sum(vote is None for votes in orders for vote in votes)
    there, *back = [[vote or none for vote in votes] for votes in orders]
    if not back:
        return Comparison(_mean(there), unread, None)
    swapped = [genrm_prompts.swapped(vote) for vote in back[0]]
    agreed = None if unread else _favours(_mean(there)) == _favours(_mean(swapped))
    return Comparison(_mean([*there, *swapped]), unread, agreed)


def _mean(scores: Sequence[Scores]) -> Scores:
    """By one sum, which is exact, and one division: means are equal where sums are, which a tie-break looks at."""
    first, second, ranking = (
        sum(column) / len(column) if None not in column else None for column in zip(*scores, strict=True)
    )
    assert first is not None
    return Scores(first, second, ranking)


def _favours(scores: Scores) -> int:
    """1 for the first response, -1 for the second, 0 for neither."""
    assert scores.ranking is not None
    return (scores.ranking < MIDDLE) - (scores.ranking > MIDDLE)


def check(section: GenerativeConfig) -> str:
    """Look at all that a judge needs to come up; returns the fingerprint of what its model renders text by, or nothing.

    Raises `AlignError` with a remedy: no such model or function, no key, a template that does not know the roles, a
    judge that learned another form.
    """
    renderer = opening.check(section.judge)
    genrm_card.require_same(section)
    if renderer is None:
        return ""
    keys = "reward.generative.custom_roles", "reward.generative.judge.chat_template"
    genrm.require_roles(renderer, section, keys)
    return renderer.fingerprint
