"""Read benchmark questions and stored answers in the formats that the benchmark authors publish.

===========  ==========================================================================================================
Arena-Hard   {uid or question_id, category, prompt}, or ``turns`` of one {content} in place of ``prompt``
MT-Bench     {question_id or prompt_id, category, turns or prompt (two texts), reference (two texts or none)}; reference
             answers in FastChat's file take precedence
WildBench    {session_id, conversation_input, checklist, primary_tag, secondary_tags}
prompts      {prompt or messages or context}, optionally with ``id`` and ``category``
answers      {id, answers} as written here; FastChat and Arena-Hard 0.1: {question_id, choices: [{turns}]}; Arena-Hard
             2.0: {uid, messages}; WildBench: {session_id, output}
===========  ==========================================================================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from align.config import QuestionDataConfig
from align.data import genrm_prompts
from align.data.chat import Message
from align.data.rows import BadRow, Context, conversation, parse_row, require_fields, text, texts, turns
from align.errors import DataError
from align.eval import benchmarks

T = TypeVar("T")

HUB: dict[str, tuple[str, str, dict[str, str]]] = {
    "arena-hard": ("lmarena-ai/arena-hard-auto-v0.1", "train", {}),
    "mt-bench": ("HuggingFaceH4/mt_bench_prompts", "train", {}),
    "wildbench": ("allenai/WildBench", "test", {"name": "v2"}),
    "prompts": ("", "train", {}),
}
"""Hub id, split and config of each benchmark."""

QUESTIONS, REFERENCES = "question.jsonl", "reference_answer"
WITH_REFERENCES = ("math", "reasoning", "coding")
"""Categories of MT-Bench whose answers the judge compares with a reference (FastChat)."""

TASKS = {
    "Information seeking": "Information/Advice seeking",
    "Advice seeking": "Information/Advice seeking",
    "Creative Writing": "Creative Tasks",
    "Editing": "Creative Tasks",
    "Brainstorming": "Creative Tasks",
    "Role playing": "Creative Tasks",
    "Others": "Creative Tasks",
    "Coding & Debugging": "Coding & Debugging",
    "Reasoning": "Planning & Reasoning",
    "Planning": "Planning & Reasoning",
    "Math": "Math & Data Analysis",
    "Data Analysis": "Math & Data Analysis",
}
"""Task group of each WildBench tag, as on its leaderboard."""


@dataclass(frozen=True)
class Question:
    """The turns of a question, and the context that the judge prompt includes."""

    id: str
    category: str
    context: Context
    """The conversation up to the first answer."""
    follow_ups: tuple[str, ...] = ()
    """The next user message after each answer but the last."""
    references: tuple[str, ...] = ()
    """A reference answer for each turn."""
    checklist: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    """Task groups whose scores include this question (WildBench)."""

    @property
    def num_turns(self) -> int:
        """Number of answers that the question requires."""
        return 1 + len(self.follow_ups)

    def conversation(self, answers: Sequence[str]) -> Context:
        """The conversation to complete after ``answers``."""
        replies = [
            message
            for answer, follow_up in zip(answers, self.follow_ups, strict=False)
            for message in (Message("assistant", answer), Message("user", follow_up))
        ]
        return (*self.context, *replies)


@dataclass(frozen=True)
class Questions:
    """The selected questions of a benchmark."""

    items: list[Question]
    source: str
    """Path or hub id of the questions."""
    notes: list[str] = field(default_factory=list)
    """Caveats that the report prints beside the metrics."""

    @property
    def fingerprint(self) -> str:
        """sha256 over content and order."""
        whole = json.dumps([[*vars(item).values()] for item in self.items])
        return hashlib.sha256(whole.encode()).hexdigest()


class PolicyAnswer(NamedTuple):
    """The answers of a policy to the turns of a question."""

    texts: tuple[str, ...]
    tokens: tuple[int, ...] = ()
    """Token count of each turn; empty if unknown."""
    finished: tuple[bool, ...] = ()
    """Whether each turn ended before the token limit; empty if unknown."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The texts without reasoning, as the judge and the next turn see them."""
        return tuple(genrm_prompts.split_reasoning(text)[1] for text in self.texts)


def load(name: str, data: QuestionDataConfig) -> Questions:
    """The questions of a benchmark. Raises `DataError` for an invalid source, row or id."""
    hub, split, more = HUB[name]
    source, by_id, others = data.path or hub, {}, 0
    path = Path(source).expanduser()
    file = path / QUESTIONS
    rows = benchmarks.tables(str(file) if file.is_file() else source, split, data.revision, **more)
    for number, (where, _, raw) in enumerate(rows):
        if data.max_items is not None and len(by_id) == data.max_items:
            break
        try:
            question = PARSERS[name](parse_row(raw), number)
        except BadRow as error:
            raise DataError(str(error), where=where, remedy=f"give the questions of {name}: data.path") from None
        if data.categories and question.category not in data.categories:
            others += 1
            continue
        if question.id in by_id:
            raise DataError(f"id {question.id!r} occurs twice", where=where, remedy="give each question once")
        by_id[question.id] = question
    if not by_id:
        problem = f"no questions are left, {others} are of other categories"
        raise DataError(problem, where=source, remedy="check data.path and data.categories")
    items = [*by_id.values()]
    if name == "mt-bench":
        items = _with_references(items, data, path)
    notes = [f"{others} questions of other categories left out"] * bool(others)
    notes += [f"only the first {data.max_items} questions"] * (data.max_items is not None)
    return Questions(items, source, notes)


def require_references(items: Sequence[Question]) -> None:
    """Raise `DataError` for MT-Bench questions that need a reference answer and have none."""
    bare = [
        question.id
        for question in items
        if question.category in WITH_REFERENCES and len(question.references) < question.num_turns
    ]
    if bare:
        raise DataError(
            f"{len(bare)} questions of {', '.join(WITH_REFERENCES)} have no reference answer: {', '.join(bare[:5])}",
            remedy="give FastChat's reference_answer/gpt-4.jsonl, corrected as docs/evaluation_policy.md says: "
            "data.references",
        )


def _with_references(items: list[Question], data: QuestionDataConfig, path: Path) -> list[Question]:
    files = [Path(data.references).expanduser()] if data.references else sorted((path / REFERENCES).glob("*.jsonl"))
    if len(files) > 1:
        names = ", ".join(item.name for item in files)
        raise DataError(f"holds {names}", where=str(path / REFERENCES), remedy="name one of them: data.references")
    references = stored(files[0]) if files else {}
    return [replace(item, references=references[item.id].texts) if item.id in references else item for item in items]


def stored(file: Path) -> dict[str, PolicyAnswer]:
    """The answers in a file, by question id. Raises `DataError`."""
    if not file.is_file():
        raise DataError("there is no such file", where=str(file), remedy="give a file of answers")
    answers: dict[str, PolicyAnswer] = {}
    for where, _, raw in benchmarks.tables(str(file), "", None):
        try:
            id, answer = _answer(parse_row(raw))
        except BadRow as error:
            remedy = "see docs/evaluation_policy.md for what a row of answers may be"
            raise DataError(str(error), where=where, remedy=remedy) from None
        if id in answers:
            raise DataError(f"question {id!r} is answered twice", where=where, remedy="give each answer once")
        answers[id] = answer
    return answers


def matched(items: Iterable[Question], answers: Mapping[str, PolicyAnswer], where: str) -> dict[str, PolicyAnswer]:
    """The answers to these questions. Raises `DataError` if an answer is missing or has another number of turns."""
    turns = {item.id: item.num_turns for item in items}
    lacking = [id for id in turns if id not in answers]
    if lacking:
        problem = f"{len(lacking)} of {len(turns)} questions have no answer, the first is {lacking[0]!r}"
        raise DataError(problem, where=where, remedy="give the answers to these questions, or other questions")
    for id, count in turns.items():
        if len(answers[id].texts) != count:
            problem = f"question {id!r} has {count} turns and {len(answers[id].texts)} answers"
            raise DataError(problem, where=where, remedy="give an answer for each turn")
    return {id: answers[id] for id in turns}


def _answer(row: dict[str, Any]) -> tuple[str, PolicyAnswer]:
    id = _id(row, "id", "question_id", "uid", "session_id")
    if "answers" in row:
        replies = texts("answers", row["answers"])
        return id, PolicyAnswer(
            replies, _each(row, "tokens", int, len(replies)), _each(row, "finished", bool, len(replies))
        )
    if "choices" in row:
        if not isinstance(row["choices"], list) or not row["choices"] or not isinstance(row["choices"][0], dict):
            raise BadRow("choices", "is not a list of {turns}", row["choices"])
        return id, PolicyAnswer(tuple(_content("choices.turns", turn) for turn in _list("turns", row["choices"][0])))
    if "messages" in row:
        replies = [
            message
            for message in _list("messages", row)
            if isinstance(message, dict) and message.get("role") == "assistant"
        ]
        if not replies:
            raise BadRow("messages", "have no turn of the assistant")
        return id, PolicyAnswer((_content("messages", replies[-1]),))
    if "output" in row:
        output = row["output"]
        return id, PolicyAnswer(texts("output", [output] if isinstance(output, str) else output)[:1])
    raise BadRow("answers", "is missing, and so are choices, messages and output")


def _each(row: Mapping[str, Any], field: str, kind: type[T], count: int) -> tuple[T, ...]:
    """A value for each answer; empty if the row lacks the field."""
    values = row.get(field)
    if values is None or values == []:
        return ()
    if not isinstance(values, list) or len(values) != count or not all(type(value) is kind for value in values):
        raise BadRow(field, f"is not a list with {kind.__name__} for each answer", values)
    return tuple(values)


def _content(field: str, value: Any) -> str:
    """The text of a turn: the value, its ``content``, or the ``answer`` within ``content``."""
    for key in ("content", "answer"):
        value = value.get(key) if isinstance(value, dict) else value
    return text(field, value)


def _list(field: str, row: Mapping[str, Any]) -> list[Any]:
    values = row.get(field)
    if not isinstance(values, list) or not values:
        raise BadRow(field, "is not a list of turns", values)
    return values


def _id(row: Mapping[str, Any], *names: str) -> str:
    identifier = next((row[name] for name in names if row.get(name) is not None), None)
    if not isinstance(identifier, str | int) or isinstance(identifier, bool) or identifier == "":
        raise BadRow(" or ".join(names), "is neither text nor a number", identifier)
    return text(names[0], str(identifier))


def _arena_hard(row: dict[str, Any], number: int) -> Question:
    require_fields(row, ("category",))
    if "prompt" not in row and len(_list("turns", row)) != 1:
        raise BadRow("turns", "is not one turn", row["turns"])
    prompt = text("prompt", row["prompt"]) if "prompt" in row else _content("turns", row["turns"][0])
    context = conversation("prompt", turns("prompt", prompt))
    return Question(_id(row, "uid", "question_id"), text("category", row["category"]), context)


def _mt_bench(row: dict[str, Any], number: int) -> Question:
    require_fields(row, ("category",))
    prompts = texts("turns", row.get("turns", row.get("prompt")))
    references = row.get("reference") or []
    if len(prompts) != 2 or not isinstance(references, list) or len(references) not in (0, 2):
        raise BadRow("turns", "are not two, or reference is neither none nor two", [len(prompts), references])
    return Question(
        _id(row, "question_id", "prompt_id"),
        text("category", row["category"]),
        conversation("turns", turns("turns", prompts[0])),
        (prompts[1],),
        tuple(text("reference", entry) for entry in references),
    )


def _wildbench(row: dict[str, Any], number: int) -> Question:
    require_fields(row, ("session_id", "conversation_input", "checklist", "primary_tag"))
    tags = [row["primary_tag"], *(row.get("secondary_tags") or [])]
    if unknown := [tag for tag in tags if tag not in TASKS]:
        raise BadRow("primary_tag or secondary_tags", f"is none of {', '.join(TASKS)}", unknown[0])
    return Question(
        _id(row, "session_id"),
        TASKS[row["primary_tag"]],
        conversation("conversation_input", turns("conversation_input", row["conversation_input"])),
        checklist=texts("checklist", row["checklist"]),
        tasks=tuple(dict.fromkeys(TASKS[tag] for tag in tags)),
    )


def _prompts(row: dict[str, Any], number: int) -> Question:
    name = next((name for name in ("prompt", "messages", "context") if name in row), None)
    if name is None:
        raise BadRow("prompt", "is missing, and so are messages and context")
    id = _id(row, "id") if row.get("id") is not None else str(number)
    context = conversation(name, turns(name, row[name]))
    return Question(id, text("category", row.get("category") or "all"), context)


PARSERS: dict[str, Callable[[dict[str, Any], int], Question]] = {
    "arena-hard": _arena_hard,
    "mt-bench": _mt_bench,
    "wildbench": _wildbench,
    "prompts": _prompts,
}
"""Parser of a row for each benchmark; the second argument is the row number, from 0."""
