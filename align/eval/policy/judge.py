"""Generate answers and judge verdicts, in files from which an interrupted evaluation resumes.

Each batch of questions appends rows {id, answers, tokens, finished} to ``answers.jsonl`` or ``baseline.jsonl``; each
batch of games appends {id, turn, swapped, verdict, attempts, text} to ``verdicts.jsonl``. ``verdict`` is null if no
attempt gave a readable verdict.
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
"""Questions or games in a batch for each rank; a killed process loses at most one batch."""

Advance = Callable[[int], None]


class GeneratorRole(Protocol):
    """Interface of `align.workers.generator.Generator`."""

    def complete(self, requests: Sequence[Request], sampling: SamplingConfig) -> Future[list[Completion]]:
        """Generate a completion for each request."""
        ...


class JudgeRequest(NamedTuple):
    """A request to the judge: a game, or a turn."""

    question: Question
    turn: int = 0
    swapped: bool = False
    """True: the policy's answer comes first, as A. False: it is B, as in Arena-Hard's first game."""

    @property
    def key(self) -> tuple[str, int, bool]:
        """Key of the request in ``verdicts.jsonl``."""
        return self.question.id, self.turn, self.swapped


@dataclass(frozen=True)
class Judgment:
    """The result of a judge request."""

    verdict: str | float | None
    """One of five verdicts on a pair, a mark, or None if no attempt was readable."""
    attempts: int
    text: str
    """The judge's last response."""


def batches(items: Sequence[Any], ranks: int) -> Iterator[Sequence[Any]]:
    """Split the items into batches, in order."""
    size = AT_ONCE * ranks
    yield from (items[start : start + size] for start in range(0, len(items), size))


def answers_in(rows: Rows) -> dict[str, PolicyAnswer]:
    """Answers in a file, by question id."""
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
    """Answer the questions that have no answer yet; write a question after all its turns are answered."""
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
    """The completions in order; requests with the same temperature share a call."""
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
    """Builds judge prompts and parses judge responses."""

    section: PolicyEvaluationConfig
    answers: Mapping[str, PolicyAnswer]
    baseline: Mapping[str, PolicyAnswer]
    words: Mapping[Kind, PromptTemplate]

    def requests_of(self, items: Sequence[Question]) -> list[JudgeRequest]:
        """Two requests for each question with a baseline, else one for each turn."""
        if self.section.pairwise:
            return [JudgeRequest(question, 0, swapped) for question in items for swapped in (False, True)]
        return [JudgeRequest(question, turn) for question in items for turn in range(question.num_turns)]

    def ask(self, request: JudgeRequest) -> tuple[Message, ...]:
        """The messages to the judge."""
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
        """Parse the verdict in a judge response; None if there is no readable verdict."""
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
    """Verdicts in a file, by request key."""
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
    """Judge the games that have no verdict yet. Retries games with unreadable verdicts together."""
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
                )  # text that looks like a verdict may be part of the reasoning
                rulings[i] = Judgment(verdict, attempt + 1, request.text)
        rows.write(
            [
                {"id": id, "turn": turn, "swapped": swapped, **vars(rulings[i])}
                for i, (id, turn, swapped) in enumerate(request.key for request in batch)
            ]
        )
        advance(len(batch))
