"""Human comparisons as training data of a generative reward model: its prompts and the verdicts it should write.

The label of a verdict is made of HelpSteer3's: the ranking 1 to 6 of a preference of -3, -2, -1, 1, 2, 3, and the
scores of both responses where people said how helpful they are. No publication states how NVIDIA made its labels; this
mapping is the plausible one. Ties have no ranking and are left out. Every pair is there in both orders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from align.config import DataConfig, GenerativeConfig, VerdictConfig
from align.data import genrm_prompts
from align.data.chat import Message, Renderer
from align.data.genrm_prompts import Verdict
from align.data.rows import Comparison, Context
from align.data.tokenize import Example, require_kept, tokenize_examples
from align.errors import DataError
from align.types import Packed, Sequences

RANKING = {-3: 1.0, -2: 2.0, -1: 3.0, 1: 4.0, 2: 5.0, 3: 6.0}
"""By preference."""

NONE = float("nan")
"""A missing number of a label; an unreadable number of a verdict."""

KEYS = "verdict.custom_roles", "data.chat_template"
"""Keys of a judge in training, for `require_roles`."""

_NAMED = re.compile(r"\b(responses?[ _#-]*)([12])\b(?!\.\d)", re.IGNORECASE)
_OTHERWISE = re.compile(
    r"\b(?:first|second|former|latter|1st|2nd|[RA][12]|responses? (?:one|two|[ab]))\b"
    r"|\b(?:answer|option|model|assistant|output|reply|number)s?[ _#-]*[12]\b"
    r"|(?<!\w)(?<!\d\.)[12]\b(?!\.\d)",
    re.IGNORECASE,
)
"""Other words and bare numbers that may name a response by its place."""


def swap_reason(reason: str) -> str | None:
    """What a person said of a pair, as it would be said of the pair in the other order: Response 1 is called Response 2
    and the other way round.

    None where that is not certain: no response is named so, or the rest of the text may mean a place (the former, the
    second, A2, any bare 1 or 2).
    """
    rest, named = _NAMED.subn(" ", reason)
    if not named or _OTHERWISE.search(rest):
        return None
    return _NAMED.sub(lambda match: match[1] + "21"[int(match[2]) - 1], reason)


def verdict_label(row: Comparison) -> Verdict | None:
    """What the verdict on a pair should be, NaN for scores that people did not give; None for a tie."""
    if row.preference == 0:
        return None
    return Verdict(*(row.helpfulness or (NONE, NONE)), RANKING[row.preference])


def verdict_tensor(scores: Iterable[Verdict | None]) -> Tensor:
    """Verdicts on pairs as rows of first score, second score and ranking, (B, 3); NaN where there is none."""
    rows = [(NONE, NONE, NONE) if verdict is None else tuple(verdict) for verdict in scores]
    return torch.tensor(rows, dtype=torch.float32).view(-1, 3)


@dataclass(frozen=True)
class JudgePrompts:
    """Pairs to be judged: rows 2i and 2i + 1 are pair i and the same pair in the other order."""

    tokens: Packed
    label_P3: Tensor
    """Scores of the first and second response and the ranking; NaN where nobody said so."""
    contexts: list[Context]
    """Of each pair."""
    counts: dict[str, int]


def judge_prompts(
    rows: Iterable[Comparison], renderer: Renderer, verdict: VerdictConfig, max_tokens: int
) -> JudgePrompts:
    """Every pair in both orders, in the order of the rows.

    The counts say of ``rows`` how many were dropped as ``ties``, ``identical`` (responses of the same tokens) or
    ``too_long`` (in one order is in both), how many were ``kept``, and how many of those are ``without_scores``. Raises
    `DataError` when none is left, and for a template that leaves a role out.
    """
    require_roles(renderer, verdict, KEYS)
    counts: dict[str, int] = dict.fromkeys(("rows", "ties", "identical", "too_long", "kept", "without_scores"), 0)
    ids: list[list[int]] = []
    labels: list[Verdict] = []
    contexts: list[Context] = []
    for row, expected in _labeled(rows, counts):
        with renderer.row(row.where, counts):
            both = [renderer.prompt_ids(messages) for messages in _orders(row, verdict)]
            if both[0] == both[1] or max(map(len, both)) > max_tokens:
                counts["identical" if both[0] == both[1] else "too_long"] += 1
                continue
            ids += both
            labels += [expected, genrm_prompts.swap_verdict(expected)]
            contexts.append(row.context)
            counts["without_scores"] += row.helpfulness is None
    counts["kept"] = len(contexts)
    require_kept(counts, "pairs")
    return JudgePrompts(Packed.from_lists(ids), verdict_tensor(labels), contexts, counts)


def _labeled(rows: Iterable[Comparison], counts: dict[str, int]) -> Iterator[tuple[Comparison, Verdict]]:
    for row in rows:
        counts["rows"] += 1
        verdict = verdict_label(row)
        counts["ties"] += verdict is None
        if verdict is not None and row.response1 == row.response2:
            counts["identical"] += 1
        elif verdict is not None:
            yield row, verdict


def _orders(row: Comparison, verdict: VerdictConfig) -> list[tuple[Message, ...]]:
    how = verdict.form, verdict.custom_roles, verdict.principle
    both = [row.response1, row.response2]
    return [genrm_prompts.judge_messages(row.context, responses, *how) for responses in (both, both[::-1])]


def require_roles(renderer: Renderer, section: VerdictConfig | GenerativeConfig, keys: tuple[str, str]) -> None:
    """Raise `DataError` for a template that leaves out a turn of a custom role: its judge would rank what it does not
    see. ``keys`` are those of ``custom_roles`` and of the template."""
    if not section.custom_roles:
        return
    probes = [
        genrm_prompts.judge_messages(
            [Message("user", "1")], responses, "helpsteer3", roles=True, principle=section.principle and text
        )
        for *responses, text in (("1", "2", "1"), ("2", "2", "1"), ("1", "1", "1"), ("1", "2", "2"))
    ]
    first, *others = (renderer.prompt_ids(probe) for probe in probes)
    for role, ids in zip(("response_1", "response_2", "principle"), others, strict=True):
        if ids == first and (role != "principle" or section.principle):
            raise DataError(
                f"the chat template drops turns of the role {role}",
                where=renderer.tokenizer.name_or_path or None,
                remedy=f"{keys[0]}=false asks in plain text; or set a template that supports the roles: {keys[1]}=FILE",
            )


class VerdictRecipe(Protocol):
    """What demonstrations need of a recipe."""

    @property
    def data(self) -> DataConfig:
        """Its limits on tokens."""
        ...

    @property
    def verdict(self) -> VerdictConfig:
        """What is asked, and the form of the answer."""
        ...


def verdict_demonstrations(
    rows: Iterable[Comparison], renderer: Renderer, config: VerdictRecipe
) -> tuple[Sequences, dict[str, int]]:
    """Verdicts to imitate: what a person wrote of a pair, then the scores and the ranking of its label; and the same of
    the pair in the other order.

    A reason is taken where its own score is on the side of the label: another would argue against the verdict. It
    stands before the verdict as plain text, since it speaks of both responses and the analyses of the form speak of one
    each. The counts say of ``rows`` how many were ``ties``, ``identical``, ``without_scores`` or ``without_reason``; of
    the reasons how many were ``not_swapped`` and how many ``unreadable`` (they look like verdicts themselves); and of
    the demonstrations how many were ``too_long`` and ``kept``. Raises `DataError` when none is left, and for a template
    that leaves a role out.
    """
    require_roles(renderer, config.verdict, KEYS)
    names = ("rows", "ties", "identical", "without_scores", "without_reason", "not_swapped", "unreadable")
    counts: dict[str, int] = dict.fromkeys(names, 0)

    def items() -> Iterator[Example]:
        for row, verdict in _labeled(rows, counts):
            reasons = [text.strip() for score, text in row.reasons if score * row.preference > 0 and text.strip()]
            if row.helpfulness is None or not reasons:
                counts["without_scores" if row.helpfulness is None else "without_reason"] += 1
                continue
            turned = [other for text in reasons if (other := swap_reason(text)) is not None]
            counts["not_swapped"] += len(reasons) - len(turned)
            both = (reasons, verdict), (turned, genrm_prompts.swap_verdict(verdict))
            prompts = _orders(row, config.verdict)
            for messages, (texts, scores) in zip(prompts, both, strict=True):
                answers = [f"{text}\n{genrm_prompts.format_verdict(scores, config.verdict.form)}" for text in texts]
                sound = [
                    answer
                    for answer in answers
                    if genrm_prompts.parse_verdict(answer, config.verdict.form, 2) == scores
                ]
                counts["unreadable"] += len(answers) - len(sound)
                yield row.where, messages, sound

    limits = config.data.max_prompt_tokens, config.data.max_response_tokens
    return tokenize_examples(items(), renderer, *limits, counts), counts


def read_verdicts(texts: Iterable[str], finished: Iterable[bool], form: genrm_prompts.VerdictForm) -> Tensor:
    """What a judge said of pairs, as `verdict_tensor`. An answer that was cut off holds no verdict."""
    return verdict_tensor(
        genrm_prompts.parse_verdict(text, form, 2) if ended else None
        for text, ended in zip(texts, finished, strict=True)
    )
