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
from align.eval.policy.prompts import Kind, Words
from align.eval.policy.questions import WITH_REFERENCES, Answer, Question
from align.eval.store import Rows
from align.generators.base import Completion, Request
from align.roles import Future

AT_ONCE = 256
"""Questions or games that are asked at a time for each rank: what a kill can cost."""

Advance = Callable[[int], None]


class Answering(Protocol):
    """The role of a generator; see `align.workers.generator.Generator`."""

    def complete(self, requests: Sequence[Request], sampling: SamplingConfig) -> Future[list[Completion]]:
        """An answer to each request."""
        ...


class Game(NamedTuple):
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
class Ruling:
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


def answers_in(rows: Rows) -> dict[str, Answer]:
    """What a file of answers holds by id of the question."""
    return {row["id"]: Answer(tuple(row["answers"]), tuple(row["tokens"]), tuple(row["finished"])) for row in rows.rows}


def answer(
    items: Sequence[Question],
    role: Answering,
    section: PolicyEvaluationConfig,
    rows: Rows,
    advance: Advance,
    ranks: int = 1,
) -> None:
    """Answer the questions that have no answer yet, all turns of a question before it is written."""
    known = answers_in(rows)
    for batch in batches([one for one in items if one.id not in known], ranks):
        said: list[list[Completion]] = [[] for _ in batch]
        for turn in range(max(one.num_turns for one in batch)):
            asked = [i for i, one in enumerate(batch) if turn < one.num_turns]
            shown = [Answer(tuple(one.text for one in said[i])).shown for i in asked]
            requests = [Request(batch[i].conversation(texts)) for i, texts in zip(asked, shown, strict=True)]
            heats = [section.temperatures.get(batch[i].category, section.sampling.temperature) for i in asked]
            for i, completion in zip(asked, _complete(role, requests, heats, section.sampling), strict=True):
                said[i].append(completion)
        rows.write([_row(one, completions) for one, completions in zip(batch, said, strict=True)])
        advance(len(batch))


def _complete(
    role: Answering, requests: Sequence[Request], temperatures: Sequence[float], sampling: SamplingConfig
) -> list[Completion]:
    """The answers in order; those of one temperature are asked for together."""
    found: dict[int, Completion] = {}
    order = sorted(range(len(requests)), key=lambda i: temperatures[i])
    for temperature, part in groupby(order, key=lambda i: temperatures[i]):
        index = [*part]
        asked = role.complete([requests[i] for i in index], replace(sampling, temperature=temperature)).result()
        found |= dict(zip(index, asked, strict=True))
    return [found[i] for i in range(len(requests))]


def _row(question: Question, completions: Sequence[Completion]) -> dict[str, Any]:
    columns = {"answers": "text", "tokens": "tokens", "finished": "finished"}
    return {"id": question.id} | {name: [getattr(c, field) for c in completions] for name, field in columns.items()}


@dataclass(frozen=True)
class Bench:
    """What a judge sees and how it is understood."""

    section: PolicyEvaluationConfig
    answers: Mapping[str, Answer]
    baseline: Mapping[str, Answer]
    words: Mapping[Kind, Words]

    def games(self, items: Sequence[Question]) -> list[Game]:
        """Two for each question where there is a baseline, else one for each turn."""
        if self.section.pairwise:
            return [Game(one, 0, swapped) for one in items for swapped in (False, True)]
        return [Game(one, turn) for one in items for turn in range(one.num_turns)]

    def ask(self, game: Game) -> tuple[Message, ...]:
        """What the judge is asked."""
        question, said = game.question, self.answers[game.question.id].shown
        others = self.baseline[question.id].shown if self.section.pairwise else ()
        responses = [others[0], said[0]] if others else [said[game.turn]]
        responses = responses[::-1] if game.swapped else responses
        if self.section.judge_form != "benchmark":
            context = question.conversation(said[: game.turn])
            return genrm_prompts.judge_messages(
                context, responses, self.section.judge_form, self.section.judge_custom_roles
            )
        kind = _kind(game, self.section)
        asked, *more = question.context[-1].content, *question.follow_ups
        values = {"question": prompts.spoken(question.context), "answer": responses[0], "checklist": ""}
        if kind == "pair":
            values |= {"answer_a": responses[0], "answer_b": responses[1]}
        if kind == "checklist":
            history = prompts.spoken(question.context[:-1]) if len(question.context) > 1 else ""
            checklist = "\n".join(f"- {one}" for one in question.checklist)
            values |= {"history": history, "question": asked, "checklist": checklist}
        for number, text in enumerate((asked, *more), start=1):
            values[f"question_{number}"] = text
        for name, texts in (("answer", said), ("ref_answer", question.references)):
            values |= {f"{name}_{number}": text for number, text in enumerate(texts, start=1)}
        return prompts.ask(kind, values, self.words)

    def read(self, text: str) -> str | float | None:
        """The verdict of an answer of the judge; None where there is none."""
        form, pairwise = self.section.judge_form, self.section.pairwise
        if form == "benchmark":
            return prompts.preference(text) if pairwise else prompts.mark(text)
        scores = genrm_prompts.parse_verdict(text, form, 2 if pairwise else 1)
        return prompts.of_ranking(scores) if pairwise else prompts.of_score(scores)


def _kind(game: Game, section: PolicyEvaluationConfig) -> Kind:
    if section.pairwise:
        return "pair"
    if section.benchmark == "wildbench":
        return "checklist"
    if game.question.references and game.question.category in WITH_REFERENCES:
        return "second_turn_reference" if game.turn else "reference"
    return "second_turn" if game.turn else "single"


def rulings_in(rows: Rows) -> dict[tuple[str, int, bool], Ruling]:
    """What a file of verdicts holds by game."""
    return {
        (row["id"], row["turn"], row["swapped"]): Ruling(row["verdict"], row["attempts"], row["text"])
        for row in rows.rows
    }


def judge(games: Sequence[Game], role: Answering, bench: Bench, rows: Rows, advance: Advance, ranks: int = 1) -> None:
    """Have the games judged that have no ruling yet. Those whose verdict cannot be read are asked again together."""
    known, section = rulings_in(rows), bench.section
    hot = max(section.judge_sampling.temperature, section.retry_temperature)
    for batch in batches([one for one in games if one.key not in known], ranks):
        messages = [bench.ask(one) for one in batch]
        found: dict[int, Ruling] = {}
        for attempt in range(section.attempts):
            open_ones = [i for i in range(len(batch)) if i not in found or found[i].verdict is None]
            if not open_ones:
                break
            requests = [Request(messages[i], sample=attempt) for i in open_ones]
            sampling = replace(section.judge_sampling, temperature=hot) if attempt else section.judge_sampling
            for i, one in zip(open_ones, role.complete(requests, sampling).result(), strict=True):
                verdict = bench.read(one.text) if one.finished else None  # what looks like one may be part of reasoning
                found[i] = Ruling(verdict, attempt + 1, one.text)
        rows.write(
            [
                {"id": id, "turn": turn, "swapped": swapped, **vars(found[i])}
                for i, (id, turn, swapped) in enumerate(one.key for one in batch)
            ]
        )
        advance(len(batch))
