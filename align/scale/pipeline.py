"""A prompt's way through the roles of ``align scale``: drafts, feedback, edits, choice.

One thread. Every role has a queue and at most one call under way; an idle role takes what waits for it, so an edit is
asked for as soon as the feedback on its draft is there, whatever else is still under way. What is asked is named by
prompt, draft and number alone, and answers go where they belong: their order in time changes nothing.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from align.config import ScaleConfig
from align.data.chat import Dialogue
from align.data.editing import edit_prompt, feedback_prompt
from align.data.rows import Context
from align.generators.base import Completion, Request
from align.roles import Future
from align.scale.sweep import Set, feedback_sets, ranked, tokens, uncounted, whole

POLL_S = 0.005
"""Seconds between two looks at the roles while all of them are at work."""
STRIDE = 1 << 20
"""Distance of the sample numbers of feedback on two drafts: more than anybody samples."""


class Desk:
    """The queue of one role."""

    def __init__(
        self, call: Callable[[list[Any]], Future[Sequence[Any]]], most: int, size: Callable[[Any], int] = lambda one: 1
    ):
        """``call`` asks the role; an answer stands for each request. Requests whose ``size`` adds up to ``most`` are
        asked at a time, at least one."""
        self._call, self._most, self._size = call, most, size
        self._waiting: deque[tuple[Any, Callable[[Any, float], None]]] = deque()
        self._under_way: tuple[list[Callable[[Any, float], None]], Future[Sequence[Any]], float] | None = None

    @property
    def busy(self) -> bool:
        """Whether a call is under way."""
        return self._under_way is not None

    def ask(self, request: Any, then: Callable[[Any, float], None]) -> None:
        """Put a request in the queue; ``then`` is called with its answer and its share of the call's seconds."""
        self._waiting.append((request, then))

    def begin(self) -> bool:
        """Ask the role for what waits, where it is idle; returns whether it was asked."""
        if self.busy or not self._waiting:
            return False
        taken, room = [self._waiting.popleft()], self._most
        while self._waiting and (room := room - self._size(taken[-1][0])) >= self._size(self._waiting[0][0]):
            taken.append(self._waiting.popleft())
        begun = time.perf_counter()
        self._under_way = ([then for _, then in taken], self._call([request for request, _ in taken]), begun)
        return True

    def finish(self) -> bool:
        """Pass on the answers of a call that has ended; returns whether one has."""
        if self._under_way is None or not self._under_way[1].done():
            return False
        (thens, future, begun), self._under_way = self._under_way, None
        answers = future.result()
        seconds = (time.perf_counter() - begun) / len(thens)
        for then, answer in zip(thens, answers, strict=True):
            then(answer, seconds)
        return True


def work(desks: Iterable[Desk]) -> None:
    """Until nothing waits and nothing is under way."""
    desks = list(desks)
    while True:
        moved = [desk.finish() for desk in desks] + [desk.begin() for desk in desks]
        if any(moved):
            continue
        if not any(desk.busy for desk in desks):
            return
        time.sleep(POLL_S)


@dataclass(frozen=True)
class Scores:
    """Scores of several groups of responses, asked for in one call."""

    future: Future[Any]
    sizes: list[int]

    def done(self) -> bool:
        """See `align.roles.Future`."""
        return self.future.done()

    def result(self) -> list[list[float]]:
        """Group by group."""
        scores = iter(self.future.result().tolist())
        return [[next(scores) for _ in range(size)] for size in self.sizes]


def desks(section: ScaleConfig, roles: dict[str, Any]) -> dict[str, Desk]:
    """A desk for each role. Judges are asked for whole groups, the responses to one prompt: one that compares them
    needs to see them together."""
    sampling = {
        "policy": section.draft_sampling,
        "feedback": section.feedback_sampling,
        "edit": section.edit_sampling,
    }

    def complete(name: str, requests: list[Request]) -> Future[list[Completion]]:
        return roles[name].complete(requests, sampling[name])

    def score(name: str, groups: list[list[Dialogue]]) -> Scores:
        dialogues = [dialogue for group in groups for dialogue in group]
        return Scores(roles[name].score_dialogues(dialogues), list(map(len, groups)))

    generators = {name: Desk(partial(complete, name), section.batch_size) for name in roles if name in sampling}
    judges = {name: Desk(partial(score, name), section.batch_size, len) for name in roles if name not in sampling}
    return generators | judges


class Flow:
    """One prompt on its way."""

    def __init__(
        self,
        section: ScaleConfig,
        desks: dict[str, Desk],
        number: int,
        context: Context,
        done: Callable[[dict[str, Any]], None],
    ):
        """``done`` is called with the record, see docs/scale.md."""
        self.section, self.desks, self.number, self.context, self.done = section, desks, number, context, done
        self.samples: dict[int, Completion] = {}
        self.feedback: defaultdict[int, dict[int, Completion]] = defaultdict(dict)
        self.edits: dict[tuple[int, Set], Completion] = {}
        self.sets: dict[int, list[Set]] = {}
        self.scores: dict[str, list[float | None]] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._open = 0
        self._life = self._steps()

    def advance(self) -> None:
        """Go on as far as nothing is waited for."""
        while not self._open and next(self._life, None):
            pass

    def _steps(self) -> Iterator[bool]:
        """From drafts to the record. What one step asks for is there when the next begins."""
        section = self.section
        self._sample("drafts", range(section.num_samples))
        yield True
        kept = list(range(section.num_samples))
        if section.draft_samples is not None:  # also for as many as are kept: smaller settings keep the best of them
            self._score("draft_select", "select", [self.samples[k].text for k in kept])
            yield True
            kept = ranked(self.scores["draft_select"])[: section.drafts]
        for k in kept:
            self._ask_feedback(k)
        yield True
        edits = [(k, chosen) for k in kept for chosen in self.sets[k]]
        texts = [self.samples[k].text for k in kept] + [self.edits[one].text for one in edits]
        for judge in self._judges():
            self._score(judge, judge, texts)
        yield True
        record = self._record(kept, edits)
        most = 0 if any(uncounted(record).values()) else section.max_best_of
        while more := self._missing(tokens(section, record, whole(section)), most):
            self._sample("best_of", more)
            yield True
        for judge in self._judges() if most else ():
            self._score(f"best_of_{judge}", judge, [self.samples[k].text for k in sorted(self.samples)[:most]])
        yield True
        self.done(self._record(kept, edits))

    def _judges(self) -> list[str]:
        return [name for name in ("select", "eval_reward") if name in self.desks]

    def _ask(self, desk: str, stage: str, request: Any, then: Callable[[Any], None]) -> None:
        self._open += 1

        def answered(answer: Any, seconds: float) -> None:
            self.seconds[stage] += seconds
            self.calls[stage] += 1
            then(answer)
            self._open -= 1
            self.advance()

        self.desks[desk].ask(request, answered)

    def _sample(self, stage: str, numbers: Iterable[int]) -> None:
        for k in numbers:
            self._ask("policy", stage, Request(self.context, k), partial(self.samples.__setitem__, k))

    def _score(self, name: str, judge: str, texts: list[str]) -> None:
        def keep(found: list[float]) -> None:
            self.scores[name] = [score if math.isfinite(score) else None for score in found]

        self._ask(judge, name, [Dialogue(self.context, text) for text in texts], keep)

    def _ask_feedback(self, k: int) -> None:
        messages = feedback_prompt(self.context, self.samples[k].text, self.section.editing)
        for j in range(self.section.feedbacks):
            self._ask("feedback", "feedback", Request(messages, k * STRIDE + j), partial(self._told, k, j))

    def _told(self, k: int, j: int, completion: Completion) -> None:
        self.feedback[k][j] = completion
        if len(self.feedback[k]) < self.section.feedbacks:
            return
        texts = [self.feedback[k][j].text for j in range(self.section.feedbacks)]
        numbers = [self.section.feedbacks, *self.section.sweep.feedbacks]
        every = [feedback_sets(self.section, self.context, k, texts[:number], self.section.edits) for number in numbers]
        self.sets[k] = list(dict.fromkeys(chosen for sets in every for chosen in sets))
        for chosen in self.sets[k]:
            told = [texts[j] for j in chosen]
            messages = edit_prompt(self.context, self.samples[k].text, told, self.section.editing)
            stage = "edits" if chosen in every[0] else "sweep_edits"
            self._ask("edit", stage, Request(messages), partial(self.edits.__setitem__, (k, chosen)))

    def _missing(self, budget: int, most: int) -> range | None:
        """Numbers of further samples of the policy, until all have as many tokens as ``budget``; ``most`` in all."""
        count, have = len(self.samples), sum(one.tokens for one in self.samples.values())
        if have >= budget or count >= most or not have:
            return None
        more = math.ceil((budget - have) * count / have)
        return range(count, min(count + more, most))

    def _record(self, kept: list[int], edits: list[tuple[int, Set]]) -> dict[str, Any]:
        order = sorted(self.samples)
        return {
            "id": self.number,
            "context": [message._asdict() for message in self.context],
            "samples": [_said(self.samples[k]) for k in order],
            "kept": kept,
            "feedback": {str(k): [_said(self.feedback[k][j]) for j in sorted(self.feedback[k])] for k in kept},
            "edits": [{"draft": k, "feedback": list(chosen), **_said(self.edits[k, chosen])} for k, chosen in edits],
            "scores": dict(sorted(self.scores.items())),
            "calls": dict(sorted(self.calls.items())),
            "seconds": {name: round(value, 6) for name, value in sorted(self.seconds.items())},
        }


def _said(one: Completion) -> dict[str, Any]:
    return {
        "text": one.text,
        "finished": one.finished,
        "prompt_tokens": one.prompt_tokens,
        "tokens": one.tokens,
    }
