"""Questions of benchmarks, and answers that were given before, as their authors publish them.

===========  ==========================================================================================================
Arena-Hard   {uid or question_id, category, prompt}, or ``turns`` of one {content} in place of ``prompt``
MT-Bench     {question_id or prompt_id, category, turns or prompt (two texts), reference (two texts or none)}; reference
             answers also as FastChat's answers, which win
WildBench    {session_id, conversation_input, checklist, primary_tag, secondary_tags}
prompts      {prompt or messages or context}, with ``id`` and ``category`` where there are any
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
"""Categories of MT-Bench whose answers are judged beside a reference (FastChat)."""

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
"""WildBench's tags and the group of tasks that each belongs to, as its leaderboard has them."""


@dataclass(frozen=True)
class Question:
    """What is asked, turn by turn, and what a judge is told of it."""

    id: str
    category: str
    context: Context
    """The conversation up to the first answer."""
    follow_ups: tuple[str, ...] = ()
    """What the user says after each answer but the last."""
    references: tuple[str, ...] = ()
    """A right answer for each turn."""
    checklist: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    """Groups of tasks that it counts for (WildBench)."""

    @property
    def num_turns(self) -> int:
        """Answers that it wants."""
        return 1 + len(self.follow_ups)

    def conversation(self, answers: Sequence[str]) -> Context:
        """What is to be answered after ``answers``."""
        said = [
            message
            for answer, follow_up in zip(answers, self.follow_ups, strict=False)
            for message in (Message("assistant", answer), Message("user", follow_up))
        ]
        return (*self.context, *said)


@dataclass(frozen=True)
class Questions:
    """All questions of a benchmark that are asked."""

    items: list[Question]
    source: str
    """Where they were read."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers should know of them."""

    @property
    def fingerprint(self) -> str:
        """sha256 over content and order."""
        whole = json.dumps([[*vars(one).values()] for one in self.items])
        return hashlib.sha256(whole.encode()).hexdigest()


class Answer(NamedTuple):
    """What a policy said in each turn of a question."""

    texts: tuple[str, ...]
    tokens: tuple[int, ...] = ()
    """Of each turn; empty where nobody counted."""
    finished: tuple[bool, ...] = ()
    """Whether each turn ended by itself; empty where nobody knows."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The texts without reasoning: what a judge and the next turn see."""
        return tuple(genrm_prompts.split_reasoning(one)[1] for one in self.texts)


def load(name: str, data: QuestionDataConfig) -> Questions:
    """The questions of a benchmark. Raises `DataError` for a source, a row or an id that cannot be used."""
    hub, split, more = HUB[name]
    source, found, others = data.path or hub, {}, 0
    path = Path(source).expanduser()
    file = path / QUESTIONS
    rows = benchmarks.tables(str(file) if file.is_file() else source, split, data.revision, **more)
    for number, (where, _, raw) in enumerate(rows):
        if data.max_items is not None and len(found) == data.max_items:
            break
        try:
            one = PARSERS[name](parse_row(raw), number)
        except BadRow as error:
            raise DataError(str(error), where=where, remedy=f"give the questions of {name}: data.path") from None
        if data.categories and one.category not in data.categories:
            others += 1
            continue
        if one.id in found:
            raise DataError(f"id {one.id!r} occurs twice", where=where, remedy="give each question once")
        found[one.id] = one
    if not found:
        problem = f"no questions are left, {others} are of other categories"
        raise DataError(problem, where=source, remedy="check data.path and data.categories")
    items = [*found.values()]
    if name == "mt-bench":
        items = _with_references(items, data, path)
    notes = [f"{others} questions of other categories left out"] * bool(others)
    notes += [f"only the first {data.max_items} questions"] * (data.max_items is not None)
    return Questions(items, source, notes)


def require_references(items: Sequence[Question]) -> None:
    """Raise `DataError` for questions of MT-Bench that are judged beside a reference and have none."""
    bare = [one.id for one in items if one.category in WITH_REFERENCES and len(one.references) < one.num_turns]
    if bare:
        raise DataError(
            f"{len(bare)} questions of {', '.join(WITH_REFERENCES)} have no reference answer: {', '.join(bare[:5])}",
            remedy="give FastChat's reference_answer/gpt-4.jsonl, corrected as docs/evaluation_policy.md says: "
            "data.references",
        )


def _with_references(items: list[Question], data: QuestionDataConfig, path: Path) -> list[Question]:
    files = [Path(data.references).expanduser()] if data.references else sorted((path / REFERENCES).glob("*.jsonl"))
    if len(files) > 1:
        names = ", ".join(one.name for one in files)
        raise DataError(f"holds {names}", where=str(path / REFERENCES), remedy="name one of them: data.references")
    known = stored(files[0]) if files else {}
    return [replace(one, references=known[one.id].texts) if one.id in known else one for one in items]


def stored(file: Path) -> dict[str, Answer]:
    """The answers in a file by id of the question. Raises `DataError`."""
    if not file.is_file():
        raise DataError("there is no such file", where=str(file), remedy="give a file of answers")
    found: dict[str, Answer] = {}
    for where, _, raw in benchmarks.tables(str(file), "", None):
        try:
            id, answer = _answer(parse_row(raw))
        except BadRow as error:
            remedy = "see docs/evaluation_policy.md for what a row of answers may be"
            raise DataError(str(error), where=where, remedy=remedy) from None
        if id in found:
            raise DataError(f"question {id!r} is answered twice", where=where, remedy="give each answer once")
        found[id] = answer
    return found


def matched(items: Iterable[Question], answers: Mapping[str, Answer], where: str) -> dict[str, Answer]:
    """The answers to these questions. Raises `DataError` where there is none, or one of fewer or more turns."""
    wanted = {one.id: one.num_turns for one in items}
    lacking = [id for id in wanted if id not in answers]
    if lacking:
        problem = f"{len(lacking)} of {len(wanted)} questions have no answer, the first is {lacking[0]!r}"
        raise DataError(problem, where=where, remedy="give the answers to these questions, or other questions")
    for id, count in wanted.items():
        if len(answers[id].texts) != count:
            problem = f"question {id!r} has {count} turns and {len(answers[id].texts)} answers"
            raise DataError(problem, where=where, remedy="give an answer for each turn")
    return {id: answers[id] for id in wanted}


def _answer(row: dict[str, Any]) -> tuple[str, Answer]:
    id = _id(row, "id", "question_id", "uid", "session_id")
    if "answers" in row:
        said = texts("answers", row["answers"])
        return id, Answer(said, _each(row, "tokens", int, len(said)), _each(row, "finished", bool, len(said)))
    if "choices" in row:
        if not isinstance(row["choices"], list) or not row["choices"] or not isinstance(row["choices"][0], dict):
            raise BadRow("choices", "is not a list of {turns}", row["choices"])
        return id, Answer(tuple(_content("choices.turns", turn) for turn in _list("turns", row["choices"][0])))
    if "messages" in row:
        said = [one for one in _list("messages", row) if isinstance(one, dict) and one.get("role") == "assistant"]
        if not said:
            raise BadRow("messages", "have no turn of the assistant")
        return id, Answer((_content("messages", said[-1]),))
    if "output" in row:
        output = row["output"]
        return id, Answer(texts("output", [output] if isinstance(output, str) else output)[:1])
    raise BadRow("answers", "is missing, and so are choices, messages and output")


def _each(row: Mapping[str, Any], field: str, kind: type[T], count: int) -> tuple[T, ...]:
    """A value for each answer; nothing where none is given."""
    found = row.get(field)
    if found is None or found == []:
        return ()
    if not isinstance(found, list) or len(found) != count or not all(type(one) is kind for one in found):
        raise BadRow(field, f"is not a list with {kind.__name__} for each answer", found)
    return tuple(found)


def _content(field: str, value: Any) -> str:
    """The text of a turn: as it is, or below ``content``, or below its ``answer``."""
    for key in ("content", "answer"):
        value = value.get(key) if isinstance(value, dict) else value
    return text(field, value)


def _list(field: str, row: Mapping[str, Any]) -> list[Any]:
    found = row.get(field)
    if not isinstance(found, list) or not found:
        raise BadRow(field, "is not a list of turns", found)
    return found


def _id(row: Mapping[str, Any], *names: str) -> str:
    found = next((row[name] for name in names if row.get(name) is not None), None)
    if not isinstance(found, str | int) or isinstance(found, bool) or found == "":
        raise BadRow(" or ".join(names), "is neither text nor a number", found)
    return text(names[0], str(found))


def _arena_hard(row: dict[str, Any], number: int) -> Question:
    require_fields(row, ("category",))
    if "prompt" not in row and len(_list("turns", row)) != 1:
        raise BadRow("turns", "is not one turn", row["turns"])
    said = text("prompt", row["prompt"]) if "prompt" in row else _content("turns", row["turns"][0])
    context = conversation("prompt", turns("prompt", said))
    return Question(_id(row, "uid", "question_id"), text("category", row["category"]), context)


def _mt_bench(row: dict[str, Any], number: int) -> Question:
    require_fields(row, ("category",))
    said = texts("turns", row.get("turns", row.get("prompt")))
    references = row.get("reference") or []
    if len(said) != 2 or not isinstance(references, list) or len(references) not in (0, 2):
        raise BadRow("turns", "are not two, or reference is neither none nor two", [len(said), references])
    return Question(
        _id(row, "question_id", "prompt_id"),
        text("category", row["category"]),
        conversation("turns", turns("turns", said[0])),
        (said[1],),
        tuple(text("reference", one) for one in references),
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
"""How a row becomes a question; the second argument is its number, from 0."""
