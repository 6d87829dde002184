"""The pipeline of one prompt through the roles of ``align scale``: drafts, feedback, edits, selection.

One thread runs all pipelines. Each role has a queue and at most one call in flight; an idle role takes the requests
that wait for it, so an edit is requested as soon as the feedback on its draft is there, whatever else is in flight.
Requests are named by prompt, draft and number, so the order in which answers arrive does not change results.
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
from align.scale.sweep import FeedbackSet, feedback_sets, ranked, tokens, uncounted, whole

POLL_S = 0.005
"""Seconds between two polls while every role is busy."""
STRIDE = 1 << 20
"""Distance between the sample numbers of feedback on two drafts: more than anybody samples."""


class RoleQueue:
    """The queue of one role."""

    def __init__(
        self,
        call: Callable[[list[Any]], Future[Sequence[Any]]],
        most: int,
        size: Callable[[Any], int] = lambda request: 1,
    ):
        """``call`` queries the role and gives one answer for each request. A call takes requests up to a total
        ``size`` of ``most``, at least one request."""
        self._call, self._most, self._size = call, most, size
        self._waiting: deque[tuple[Any, Callable[[Any, float], None]]] = deque()
        self._in_flight: tuple[list[Callable[[Any, float], None]], Future[Sequence[Any]], float] | None = None

    @property
    def busy(self) -> bool:
        """Whether a call is in flight."""
        return self._in_flight is not None

    def ask(self, request: Any, then: Callable[[Any, float], None]) -> None:
        """Queue a request; ``then`` is called with its answer and its share of the call's seconds."""
        self._waiting.append((request, then))

    def begin(self) -> bool:
        """Start a call if the role is idle and requests wait; returns whether it did."""
        if self.busy or not self._waiting:
            return False
        taken, room = [self._waiting.popleft()], self._most
        while self._waiting and (room := room - self._size(taken[-1][0])) >= self._size(self._waiting[0][0]):
            taken.append(self._waiting.popleft())
        start = time.perf_counter()
        self._in_flight = ([then for _, then in taken], self._call([request for request, _ in taken]), start)
        return True

    def finish(self) -> bool:
        """Deliver the answers of a call that has ended; returns whether one has."""
        if self._in_flight is None or not self._in_flight[1].done():
            return False
        (thens, future, start), self._in_flight = self._in_flight, None
        answers = future.result()
        seconds = (time.perf_counter() - start) / len(thens)
        for then, answer in zip(thens, answers, strict=True):
            then(answer, seconds)
        return True


def run_event_loop(role_queues: Iterable[RoleQueue]) -> None:
    """Run until no request waits and no call is in flight."""
    role_queues = list(role_queues)
    while True:
        moved = [queue.finish() for queue in role_queues] + [queue.begin() for queue in role_queues]
        if any(moved):
            continue
        if not any(queue.busy for queue in role_queues):
            return
        time.sleep(POLL_S)


@dataclass(frozen=True)
class GroupScores:
    """Scores of several groups of responses from one call."""

    future: Future[Any]
    sizes: list[int]

    def done(self) -> bool:
        return self.future.done()

    def result(self) -> list[list[float]]:
        """Group by group."""
        scores = iter(self.future.result().tolist())
        return [[next(scores) for _ in range(size)] for size in self.sizes]


def role_queues(section: ScaleConfig, roles: dict[str, Any]) -> dict[str, RoleQueue]:
    """The queue of each role. Reward models get whole groups, the responses to one prompt, because a generative reward
    model compares them."""
    sampling = {
        "policy": section.draft_sampling,
        "feedback": section.feedback_sampling,
        "edit": section.edit_sampling,
    }

    def complete(name: str, requests: list[Request]) -> Future[list[Completion]]:
        return roles[name].complete(requests, sampling[name])

    def score(name: str, groups: list[list[Dialogue]]) -> GroupScores:
        dialogues = [dialogue for group in groups for dialogue in group]
        return GroupScores(roles[name].score_dialogues(dialogues), list(map(len, groups)))

    generators = {name: RoleQueue(partial(complete, name), section.batch_size) for name in roles if name in sampling}
    others = [name for name in roles if name not in sampling]
    reward_models = {name: RoleQueue(partial(score, name), section.batch_size, len) for name in others}
    return generators | reward_models


class PromptPipeline:
    """One prompt in progress."""

    def __init__(
        self,
        section: ScaleConfig,
        role_queues: dict[str, RoleQueue],
        number: int,
        context: Context,
        done: Callable[[dict[str, Any]], None],
    ):
        """``done`` is called with the record; docs/scale.md lists its fields."""
        self.section, self.role_queues, self.number = section, role_queues, number
        self.context, self.done = context, done
        self.samples: dict[int, Completion] = {}
        self.feedback: defaultdict[int, dict[int, Completion]] = defaultdict(dict)
        self.edits: dict[tuple[int, FeedbackSet], Completion] = {}
        self.sets: dict[int, list[FeedbackSet]] = {}
        self.scores: dict[str, list[float | None]] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._open = 0
        self._progress = self._steps()

    def advance(self) -> None:
        """Run the next steps until one waits for a role."""
        while not self._open and next(self._progress, None):
            pass

    def _steps(self) -> Iterator[bool]:
        """The steps from drafts to the record. Each yields when it waits for its requests."""
        section = self.section
        self._sample("drafts", range(section.num_samples))
        yield True
        kept = list(range(section.num_samples))
        if section.draft_samples is not None:  # also if all are kept: smaller settings keep the best
            self._score("draft_select", "select", [self.samples[k].text for k in kept])
            yield True
            kept = ranked(self.scores["draft_select"])[: section.drafts]
        for k in kept:
            self._request_feedback(k)
        yield True
        edits = [(k, chosen) for k in kept for chosen in self.sets[k]]
        texts = [self.samples[k].text for k in kept] + [self.edits[index].text for index in edits]
        for name in self._reward_models():
            self._score(name, name, texts)
        yield True
        record = self._record(kept, edits)
        most = 0 if any(uncounted(record).values()) else section.max_best_of
        while more := self._missing(tokens(section, record, whole(section)), most):
            self._sample("best_of", more)
            yield True
        for name in self._reward_models() if most else ():
            self._score(f"best_of_{name}", name, [self.samples[k].text for k in sorted(self.samples)[:most]])
        yield True
        self.done(self._record(kept, edits))

    def _reward_models(self) -> list[str]:
        return [name for name in ("select", "eval_reward") if name in self.role_queues]

    def _request(self, queue: str, stage: str, request: Any, then: Callable[[Any], None]) -> None:
        self._open += 1

        def answered(answer: Any, seconds: float) -> None:
            self.seconds[stage] += seconds
            self.calls[stage] += 1
            then(answer)
            self._open -= 1
            self.advance()

        self.role_queues[queue].ask(request, answered)

    def _sample(self, stage: str, numbers: Iterable[int]) -> None:
        for k in numbers:
            self._request("policy", stage, Request(self.context, k), partial(self.samples.__setitem__, k))

    def _score(self, name: str, role: str, texts: list[str]) -> None:
        def keep(values: list[float]) -> None:
            self.scores[name] = [score if math.isfinite(score) else None for score in values]

        self._request(role, name, [Dialogue(self.context, text) for text in texts], keep)

    def _request_feedback(self, k: int) -> None:
        messages = feedback_prompt(self.context, self.samples[k].text, self.section.editing)
        for j in range(self.section.feedbacks):
            self._request(
                "feedback", "feedback", Request(messages, k * STRIDE + j), partial(self._collect_feedback, k, j)
            )

    def _collect_feedback(self, k: int, j: int, completion: Completion) -> None:
        self.feedback[k][j] = completion
        if len(self.feedback[k]) < self.section.feedbacks:
            return
        texts = [self.feedback[k][j].text for j in range(self.section.feedbacks)]
        numbers = [self.section.feedbacks, *self.section.sweep.feedbacks]
        sets_by_number = [
            feedback_sets(self.section, self.context, k, texts[:number], self.section.edits) for number in numbers
        ]
        self.sets[k] = list(dict.fromkeys(chosen for sets in sets_by_number for chosen in sets))
        for chosen in self.sets[k]:
            feedback = [texts[j] for j in chosen]
            messages = edit_prompt(self.context, self.samples[k].text, feedback, self.section.editing)
            stage = "edits" if chosen in sets_by_number[0] else "sweep_edits"
            self._request("edit", stage, Request(messages), partial(self.edits.__setitem__, (k, chosen)))

    def _missing(self, budget: int, most: int) -> range | None:
        """Numbers of further samples of the policy, until all have as many tokens as ``budget``; ``most`` in all."""
        count, have = len(self.samples), sum(sample.tokens for sample in self.samples.values())
        if have >= budget or count >= most or not have:
            return None
        more = math.ceil((budget - have) * count / have)
        return range(count, min(count + more, most))

    def _record(self, kept: list[int], edits: list[tuple[int, FeedbackSet]]) -> dict[str, Any]:
        order = sorted(self.samples)
        return {
            "id": self.number,
            "context": [message._asdict() for message in self.context],
            "samples": [_record_of(self.samples[k]) for k in order],
            "kept": kept,
            "feedback": {str(k): [_record_of(self.feedback[k][j]) for j in sorted(self.feedback[k])] for k in kept},
            "edits": [
                {"draft": k, "feedback": list(chosen), **_record_of(self.edits[k, chosen])} for k, chosen in edits
            ],
            "scores": dict(sorted(self.scores.items())),
            "calls": dict(sorted(self.calls.items())),
            "seconds": {name: round(value, 6) for name, value in sorted(self.seconds.items())},
        }


def _record_of(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "finished": completion.finished,
        "prompt_tokens": completion.prompt_tokens,
        "tokens": completion.tokens,
    }
