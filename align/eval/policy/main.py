"""``align eval policy``: a policy answers benchmark questions and an LLM judge scores the answers.

The output folder holds ``answers.jsonl`` and ``verdicts.jsonl`` (and ``baseline.jsonl`` if a baseline model answers),
from which an interrupted evaluation resumes; ``items.jsonl``, every question with answers and verdicts;
``policy.json``, all metrics with intervals; ``report.html``, the same with plots.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from align.cluster.roles import StartOptions, start_roles
from align.config import AnyGeneratorConfig, GenerativeConfig, ModelGeneratorConfig, PolicyEvaluationConfig
from align.data.genrm import require_roles
from align.errors import DataError
from align.eval import store
from align.eval.arguments import FALLBACK, SPEAKERS
from align.eval.policy import judge as judging
from align.eval.policy import metrics, prompts, questions
from align.eval.policy.judge import JudgePromptBuilder, JudgeRequest, Judgment
from align.eval.policy.metrics import Resampling, StatisticGroup
from align.eval.policy.questions import PolicyAnswer, Question, Questions
from align.eval.store import Rows
from align.generators import models as generators
from align.prechecks import placement
from align.prechecks.roles import with_absolute_paths
from align.report import policy as report
from align.rewards import genrm_card
from align.utils.atomic_write import write_atomic

VERSION = 1
DEFAULT_OUT = "runs/evaluation"
ANSWERS, BASELINE, VERDICTS = "answers.jsonl", "baseline.jsonl", "verdicts.jsonl"
JUDGE_KEYS = {"form": "judge_form", "custom_roles": "judge_custom_roles", "judge.date": "judge.date"}
"""Fields of a judge's model card, and the config keys for the same settings."""
SHAPES = ("judge_form", "judge_custom_roles", "attempts", "retry_temperature", "temperatures", "seed", "benchmark")


def main(arguments: argparse.Namespace, console: Console) -> int:
    """``align eval policy``."""
    section: PolicyEvaluationConfig = arguments.loaded.config
    evaluate(section, questions.load(section.benchmark, section.data), console)
    return 0


def evaluate(section: PolicyEvaluationConfig, question_set: Questions, console: Console) -> dict[str, Any]:
    """Generate missing answers and verdicts, compute, write and print metrics. Returns the ``policy.json`` content."""
    if section.benchmark == "mt-bench" and section.judge_form == "benchmark":
        questions.require_references(question_set.items)
    words = prompts.own_words(Path(section.judge_prompt).expanduser()) if section.judge_prompt else {}
    placement.resolve(section.placement, SPEAKERS.values())
    manifest = _manifest(section, question_set)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    folder = Path(section.out or f"{DEFAULT_OUT}/{section.benchmark}-{digest[:8]}").expanduser()
    names = (ANSWERS, VERDICTS, *([BASELINE] if section.baseline else []))
    with ExitStack() as stack:
        files = {name: stack.enter_context(store.locked(folder / name)) for name in names}
        store.agree([folder / name for name in (ANSWERS, BASELINE, VERDICTS)], manifest, "answers and verdicts")
        stores = {name: Rows(file, folder / name) for name, file in files.items()}
        bench, rulings = _asked(section, question_set, words, stores, console)
    results = measure(section, question_set, bench, rulings)
    write_atomic(folder / store.ITEMS, "".join(_lines(question_set, bench, rulings)))
    write_atomic(folder / "policy.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_atomic(folder / "report.html", report.page(results))
    report.terminal(results, console)
    console.print(f"written: {folder}/policy.json, items.jsonl, report.html", highlight=False, soft_wrap=True)
    return results


def _manifest(section: PolicyEvaluationConfig, question_set: Questions) -> dict[str, Any]:
    """Everything that answers and verdicts depend on, by key, so that an error can name the key that changed. Raises
    `AlignError`, before anything is written, for a generator that cannot be opened."""
    settings: dict[str, Any] = {"version": VERSION, "questions": question_set.fingerprint}
    for name, generator in _speakers(section).items():
        settings |= generators.identity_keys(name, generator, section.seed)
    if section.judge_form != "benchmark":
        _check_judge(section)
    settings |= {name: getattr(section, name) for name in SHAPES}
    for name in ("sampling", "judge_sampling"):
        settings |= {f"{name}.{field}": value for field, value in asdict(getattr(section, name)).items()}
    files = {"answers": section.answers, "judge_prompt": section.judge_prompt}
    files |= {f"baseline_answers.{category}": file for category, file in section.baseline_answers.items()}
    settings |= {name: _file_digest(name, file) for name, file in files.items() if file}
    return settings


def _speakers(section: PolicyEvaluationConfig) -> dict[str, AnyGeneratorConfig]:
    generators_by_role = {"policy": section.policy, "baseline": section.baseline, "judge": section.judge}
    return {name: generator for name, generator in generators_by_role.items() if generator}


def _check_judge(section: PolicyEvaluationConfig) -> None:
    """Apply `align.rewards.genrm.check` to the keys of this command."""
    assert section.judge_form != "benchmark"
    judge = section.judge
    if isinstance(judge, ModelGeneratorConfig):
        judge = replace(judge, zero_stage=0, offload_parameters=False)
    config = GenerativeConfig(judge=judge, form=section.judge_form, custom_roles=section.judge_custom_roles)
    genrm_card.require_same(config, JUDGE_KEYS)
    renderer = generators.generator_class(section.judge).check(section.judge, "judge")
    if renderer is not None:
        require_roles(renderer, config, ("judge_custom_roles", "judge.chat_template"))


def _file_digest(name: str, file: str) -> str:
    try:
        return hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=f"{name}={file}", remedy="check the path") from None


def _asked(
    section: PolicyEvaluationConfig,
    question_set: Questions,
    words: Mapping[prompts.Kind, prompts.PromptTemplate],
    stores: Mapping[str, Rows],
    console: Console,
) -> tuple[JudgePromptBuilder, dict[tuple[str, int, bool], Judgment]]:
    """All answers and verdicts. Generates the missing ones; starts only roles that have work."""
    files = {"policy": ANSWERS, "baseline": BASELINE}
    answering = {name: stores[files[name]] for name in _speakers(section) if name in files}
    answering = {name: rows for name, rows in answering.items() if len(rows.rows) < len(question_set.items)}
    given = {"answers": _stored_answers(section, question_set), "baseline": _stored_baseline(section, question_set)}

    def bench() -> JudgePromptBuilder:
        answered = {name: judging.answers_in(rows) for name, rows in stores.items() if name != VERDICTS}
        baseline = given["baseline"] or answered.get(BASELINE, {})
        return JudgePromptBuilder(section, given["answers"] or answered[ANSWERS], baseline, words)

    rulings = stores[VERDICTS]
    if rulings.rows and answering:
        name, rows = next(iter(answering.items()))
        gone = len(question_set.items) - len(rows.rows)
        problem = f"{gone} of {len(question_set.items)} answers of the {name} are gone, the verdicts on them are not"
        remedy = f"delete {VERDICTS} too, or give another folder (--out)"
        raise DataError(problem, where=str(rows.path), remedy=remedy)
    requests_of = bench().requests_of(question_set.items)
    needed = [*answering, *(["judge"] if len(rulings.rows) < len(requests_of) else [])]
    if needed:
        with _company(section, needed, stores[ANSWERS].path.parent / "logs", console) as (roles, ranks):
            for name, rows in answering.items():
                title, sizes = f"{section.benchmark}, answers of the {name}", (len(rows.rows), len(question_set.items))
                with store.progress(console, title, *sizes) as advance:
                    judging.answer(question_set.items, roles[name], section, rows, advance, ranks[name])
            with store.progress(
                console, f"{section.benchmark}, verdicts", len(rulings.rows), len(requests_of)
            ) as advance:
                judging.judge(requests_of, roles["judge"], bench(), rulings, advance, ranks["judge"])
    return bench(), judging.rulings_in(rulings)


def _stored_answers(section: PolicyEvaluationConfig, question_set: Questions) -> dict[str, PolicyAnswer]:
    if not section.answers:
        return {}
    return questions.matched(question_set.items, questions.stored(Path(section.answers).expanduser()), section.answers)


def _stored_baseline(section: PolicyEvaluationConfig, question_set: Questions) -> dict[str, PolicyAnswer]:
    by_file: dict[str, list[Question]] = {}
    for question in question_set.items if section.baseline_answers else ():
        file = section.baseline_answers.get(question.category) or section.baseline_answers.get(FALLBACK)
        if file is None:
            categories = ", ".join(section.baseline_answers)
            problem = f"no answers for category {question.category!r}, only for {categories}"
            remedy = f"name a file for it, or baseline_answers.{FALLBACK}"
            raise DataError(problem, where="baseline_answers", remedy=remedy)
        by_file.setdefault(file, []).append(question)
    answers: dict[str, PolicyAnswer] = {}
    for file, items in by_file.items():
        answers |= questions.matched(items, questions.stored(Path(file).expanduser()), file)
    return answers


@contextmanager
def _company(
    section: PolicyEvaluationConfig, needed: Sequence[str], logs: Path, console: Console
) -> Iterator[tuple[dict[str, Any], dict[str, int]]]:
    """The roles that have work, and the number of ranks of each."""
    slots = placement.resolve(section.placement, SPEAKERS.values())
    ranks = {name: len(slots[name]) if section.executor == "ray" else 1 for name in needed}
    sections = {name: with_absolute_paths(_speakers(section)[name]) for name in needed}

    def tell(line: str) -> None:
        console.print(line, highlight=False)

    options = StartOptions(seed=section.seed, announce=tell)
    with start_roles(sections, section.executor, slots, section.cluster, logs, options) as roles:
        yield roles, ranks


def measure(
    section: PolicyEvaluationConfig,
    question_set: Questions,
    bench: JudgePromptBuilder,
    rulings: Mapping[tuple[str, int, bool], Judgment],
) -> dict[str, Any]:
    """All metrics of a benchmark whose games have verdicts."""
    by_question: dict[str, list[Any]] = {}
    for request in bench.requests_of(question_set.items):
        by_question.setdefault(request.question.id, []).append(rulings[request.key].verdict)
    items = [item for item in question_set.items if None not in by_question[item.id]]
    if not items:
        example = next(iter(rulings.values())).text[:200]
        problem = f"of none of {len(question_set.items)} questions all verdicts can be read; one is {example!r}"
        remedy = "take another judge, judge_form or judge_prompt, or more judge_sampling.max_tokens, and another --out"
        raise DataError(problem, where=section.judge.source, remedy=remedy)
    groups = _numbers(section, items, [by_question[item.id] for item in items], bench)
    kept = [rulings[request.key] for request in bench.requests_of(question_set.items)]
    return {
        "version": VERSION,
        "benchmark": section.benchmark,
        "policy": section.answers or (section.policy.source if section.policy else ""),
        "judge": section.judge.source,
        "baseline": ", ".join(section.baseline_answers.values())
        or (section.baseline.source if section.baseline else ""),
        "source": question_set.source,
        "fingerprint": question_set.fingerprint,
        "sizes": {"questions": len(question_set.items), "judged": len(items), "games": len(kept)},
        "notes": [*question_set.notes, *_notes(section, question_set, items)],
        "bootstrap": {name: getattr(section, name) for name in ("resamples", "confidence", "seed")},
        "groups": [asdict(item) for item in groups],
        "judging": {
            "unreadable": sum(item.verdict is None for item in kept),
            "asked again": sum(item.attempts > 1 for item in kept),
            "verdicts": dict(sorted(Counter(str(item.verdict) for item in kept if item.verdict is not None).items())),
            **(metrics.agreement([tuple(by_question[item.id]) for item in items]) if section.pairwise else {}),
        },
        "lengths": {
            "policy": _lengths(bench.answers, question_set.items),
            **({"baseline": _lengths(bench.baseline, question_set.items)} if section.pairwise else {}),
        },
    }


def _numbers(
    section: PolicyEvaluationConfig, items: list[Question], given: list[Any], bench: JudgePromptBuilder
) -> list[StatisticGroup]:
    chance = Resampling(section.resamples, section.confidence, section.seed)
    if section.pairwise:
        texts = tuple([answers[item.id].shown[0] for item in items] for answers in (bench.answers, bench.baseline))
        return metrics.pairs(items, given, (texts[0], texts[1]), chance)
    return (metrics.wildbench if section.benchmark == "wildbench" else metrics.marks)(items, given, chance)


def _notes(section: PolicyEvaluationConfig, question_set: Questions, items: Sequence[Question]) -> list[str]:
    left = len(question_set.items) - len(items)
    notes = [f"{left} questions left out: a verdict on them cannot be read"] * bool(left)
    if section.judge_form != "benchmark":
        notes.append(f"judged in the form {section.judge_form}: not comparable with published numbers")
    elif not section.judge_prompt:
        notes.append("the judge was asked in align's words, not in the benchmark's: see docs/evaluation_policy.md")
    return notes


def _lengths(answers: Mapping[str, PolicyAnswer], items: Sequence[Question]) -> dict[str, float | int | None]:
    """Mean characters (without reasoning) and tokens of an answer, and the number of truncated answers."""
    shown_answers = [answers[answer.id] for answer in items]
    tokens = [count for answer in shown_answers for count in answer.tokens]
    return {
        "characters": fmean(len(text) for answer in shown_answers for text in answer.shown),
        "tokens": fmean(tokens) if any(tokens) else None,
        "empty": sum(not text.strip() for answer in shown_answers for text in answer.shown),
        "cut off": sum(not finished for answer in shown_answers for finished in answer.finished),
    }


def _lines(
    question_set: Questions, bench: JudgePromptBuilder, rulings: Mapping[tuple[str, int, bool], Judgment]
) -> Iterator[str]:
    """A row for each question, with its answers and verdicts."""
    for question in question_set.items:
        row: dict[str, Any] = {
            "id": question.id,
            "category": question.category,
            "turns": [question.context[-1].content, *question.follow_ups],
        }
        row["answers"] = bench.answers[question.id].texts
        row |= {"baseline": bench.baseline[question.id].texts} if bench.section.pairwise else {}
        row["verdicts"] = [_told(request, rulings[request.key]) for request in bench.requests_of([question])]
        yield json.dumps(row, ensure_ascii=False) + "\n"


def _told(request: JudgeRequest, ruling: Judgment) -> dict[str, Any]:
    return {"turn": request.turn, "swapped": request.swapped, **asdict(ruling)}
