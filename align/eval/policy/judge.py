"""Asking for answers and for verdicts, in files that another call can go on from.

``answers.jsonl`` and ``baseline.jsonl`` grow by {id, answers, tokens, finished} of as many questions as are asked at a
time, ``verdicts.jsonl`` by {id, turn, swapped, verdict, attempts, text}. ``verdict`` is null where none of the attempts
could be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from align.config import PolicyEvaluationConfig, SamplingConfig
from align.data import genrm_prompts
from align.data.chat import Message
from align.eval.policy import prompts
from align.eval.policy.prompts import Kind, PromptTemplate
from align.eval.policy.questions import WITH_REFERENCES, PolicyAnswer, Question
from align.eval.store import Rows
from align.generators.base import Completion, Request
from align.roles import Future

AT_ONCE = 256
"""Questions or games that are asked at a time for each rank: what a kill can cost."""

Advance = Callable[[int], None]


class GeneratorRole(Protocol):
    """The role of a generator; see `align.workers.generator.Generator`."""

    def complete(self, requests: Sequence[Request], sampling: SamplingConfig) -> Future[list[Completion]]:
        """An answer to each request."""
        ...


class JudgeRequest(NamedTuple):
    """One thing that a judge is asked."""

    question: Question
    turn: int = 0
    swapped: bool = False
    """The policy's answer stands first, as A; the other way round it is B, as in Arena-Hard's first game."""

    @property
    def key(self) -> tuple[str, int, bool]:
        """What it is known by."""
        return self.question.id, self.turn, self.swapped


@dataclass(frozen=True)
class Judgment:
    """What came of a game."""

    verdict: str | float | None
    """One of five verdicts on a pair, a mark, or None where nothing could be read."""
    attempts: int
    text: str
    """What the judge said last."""


def batches(items: Sequence[Any], ranks: int) -> Iterator[Sequence[Any]]:
    """The items in turn, as many as are asked at a time."""
    size = AT_ONCE * ranks
    yield from (items[start : start + size] for start in range(0, len(items), size))


def answers_in(rows: Rows) -> dict[str, PolicyAnswer]:
    """What a file of answers holds by id of the question."""
    return {
        row["id"]: PolicyAnswer(tuple(row["answers"]), tuple(row["tokens"]), tuple(row["finished"]))
        for row in rows.rows
    }


def answer(
    items: Sequence[Question],
    role: GeneratorRole,
    section: PolicyEvaluationConfig,
    rows: Rows,
    advance: Advance,
    ranks: int = 1,
) -> None:
    """Answer the questions that have no answer yet, all turns of a question before it is written."""
    answered = answers_in(rows)
    for batch in batches([question for question in items if question.id not in answered], ranks):
        replies: list[list[Completion]] = [[] for _ in batch]
        for turn in range(max(question.num_turns for question in batch)):
            active = [i for i, question in enumerate(batch) if turn < question.num_turns]
            shown = [PolicyAnswer(tuple(question.text for question in replies[i])).shown for i in active]
            requests = [Request(batch[i].conversation(texts)) for i, texts in zip(active, shown, strict=True)]
            heats = [section.temperatures.get(batch[i].category, section.sampling.temperature) for i in active]
            for i, completion in zip(active, _complete(role, requests, heats, section.sampling), strict=True):
                replies[i].append(completion)
        rows.write([_row(question, completions) for question, completions in zip(batch, replies, strict=True)])
        advance(len(batch))


def _complete(
    role: GeneratorRole, requests: Sequence[Request], temperatures: Sequence[float], sampling: SamplingConfig
) -> list[Completion]:
    """The answers in order; those of one temperature are asked for together."""
    completions: dict[int, Completion] = {}
    order = sorted(range(len(requests)), key=lambda i: temperatures[i])
    for temperature, part in groupby(order, key=lambda i: temperatures[i]):
        index = [*part]
        answers = role.complete([requests[i] for i in index], replace(sampling, temperature=temperature)).result()
        completions |= dict(zip(index, answers, strict=True))
    return [completions[i] for i in range(len(requests))]


def _row(question: Question, completions: Sequence[Completion]) -> dict[str, Any]:
    columns = {"answers": "text", "tokens": "tokens", "finished": "finished"}
    return {"id": question.id} | {name: [getattr(c, field) for c in completions] for name, field in columns.items()}


@dataclass(frozen=True)
class JudgePromptBuilder:
    """What a judge sees and how it is understood."""

    section: PolicyEvaluationConfig
    answers: Mapping[str, PolicyAnswer]
    baseline: Mapping[str, PolicyAnswer]
    words: Mapping[Kind, PromptTemplate]

    def requests_of(self, items: Sequence[Question]) -> list[JudgeRequest]:
        """Two for each question where there is a baseline, else one for each turn."""
        if self.section.pairwise:
            return [JudgeRequest(question, 0, swapped) for question in items for swapped in (False, True)]
        return [JudgeRequest(question, turn) for question in items for turn in range(question.num_turns)]

    def ask(self, request: JudgeRequest) -> tuple[Message, ...]:
        """What the judge is asked."""
        question, shown = request.question, self.answers[request.question.id].shown
        others = self.baseline[question.id].shown if self.section.pairwise else ()
        responses = [others[0], shown[0]] if others else [shown[request.turn]]
        responses = responses[::-1] if request.swapped else responses
        if self.section.judge_form != "benchmark":
            context = question.conversation(shown[: request.turn])
            return genrm_prompts.judge_messages(
                context, responses, self.section.judge_form, self.section.judge_custom_roles
            )
        kind = _kind(request, self.section)
        first, *more = question.context[-1].content, *question.follow_ups
        values = {"question": prompts.spoken(question.context), "answer": responses[0], "checklist": ""}
        if kind == "pair":
            values |= {"answer_a": responses[0], "answer_b": responses[1]}
        if kind == "checklist":
            history = prompts.spoken(question.context[:-1]) if len(question.context) > 1 else ""
            checklist = "\n".join(f"- {entry}" for entry in question.checklist)
            values |= {"history": history, "question": first, "checklist": checklist}
        for number, text in enumerate((first, *more), start=1):
            values[f"question_{number}"] = text
        for name, texts in (("answer", shown), ("ref_answer", question.references)):
            values |= {f"{name}_{number}": text for number, text in enumerate(texts, start=1)}
        return prompts.ask(kind, values, self.words)

    def read(self, text: str) -> str | float | None:
        """The verdict of an answer of the judge; None where there is none."""
        form, pairwise = self.section.judge_form, self.section.pairwise
        if form == "benchmark":
            return prompts.preference(text) if pairwise else prompts.mark(text)
        scores = genrm_prompts.parse_verdict(text, form, 2 if pairwise else 1)
        return prompts.of_ranking(scores) if pairwise else prompts.of_score(scores)


def _kind(request: JudgeRequest, section: PolicyEvaluationConfig) -> Kind:
    if section.pairwise:
        return "pair"
    if section.benchmark == "wildbench":
        return "checklist"
    if request.question.references and request.question.category in WITH_REFERENCES:
        return "second_turn_reference" if request.turn else "reference"
    return "second_turn" if request.turn else "single"


def rulings_in(rows: Rows) -> dict[tuple[str, int, bool], Judgment]:
    """What a file of verdicts holds by game."""
    return {
        (row["id"], row["turn"], row["swapped"]): Judgment(row["verdict"], row["attempts"], row["text"])
        for row in rows.rows
    }


def judge(
    requests_of: Sequence[JudgeRequest],
    role: GeneratorRole,
    bench: JudgePromptBuilder,
    rows: Rows,
    advance: Advance,
    ranks: int = 1,
) -> None:
    """Have the games judged that have no ruling yet. Those whose verdict cannot be read are asked again together."""
    judged, section = rulings_in(rows), bench.section
    hot = max(section.judge_sampling.temperature, section.retry_temperature)
    for batch in batches([request for request in requests_of if request.key not in judged], ranks):
        messages = [bench.ask(request) for request in batch]
        rulings: dict[int, Judgment] = {}
        for attempt in range(section.attempts):
            open_ones = [i for i in range(len(batch)) if i not in rulings or rulings[i].verdict is None]
            if not open_ones:
                break
            requests = [Request(messages[i], sample=attempt) for i in open_ones]
            sampling = replace(section.judge_sampling, temperature=hot) if attempt else section.judge_sampling
            for i, request in zip(open_ones, role.complete(requests, sampling).result(), strict=True):
                verdict = (
                    bench.read(request.text) if request.finished else None
                )  # what looks like one may be part of reasoning
                rulings[i] = Judgment(verdict, attempt + 1, request.text)
        rows.write(
            [
                {"id": id, "turn": turn, "swapped": swapped, **vars(rulings[i])}
                for i, (id, turn, swapped) in enumerate(request.key for request in batch)
            ]
        )
        advance(len(batch))
