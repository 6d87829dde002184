"""Pairs as tasks of a judge: labels, both orders, demonstrations, and reasons told the other way round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from align.config import DataConfig, VerdictConfig
from align.data import genrm, genrm_prompts, toy_family
from align.data.chat import Message, Renderer
from align.data.genrm_prompts import Verdict
from align.data.rows import Comparison
from align.errors import DataError

ROLES = VerdictConfig(custom_roles=True)
CAT = (Message("user", "say the first word : cat dog"),)
SAID = "Response 1 is perfectly helpful. Response 2 is not helpful."


def row(preference: int = -2, **changes: Any) -> Comparison:
    usual = {"context": CAT, "response1": "cat", "response2": "dog", "reasons": ((-1, SAID),)}
    return Comparison(
        **{**usual, "preference": preference, "helpfulness": (5.0, 1.0), "domain": "", "language": ""} | changes
    )


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(toy_family.tokenizer())


@pytest.mark.parametrize(("preference", "ranking"), [(-3, 1), (-2, 2), (-1, 3), (1, 4), (2, 5), (3, 6)])
def test_the_ranking_of_a_preference(preference: int, ranking: int):
    assert genrm.verdict_label(row(preference)) == Verdict(5.0, 1.0, ranking)
    assert genrm_prompts.swap_verdict(Verdict(5.0, 1.0, ranking)).ranking == genrm.RANKING[-preference]


def test_labels_that_nobody_gave():
    assert genrm.verdict_label(row(0)) is None
    first, second, ranking = genrm.verdict_label(row(3, helpfulness=None)) or ()
    assert math.isnan(first) and math.isnan(second) and ranking == 6


def test_every_pair_stands_in_both_orders_with_mirrored_labels(renderer: Renderer):
    rows = [row(), row(0), row(1, response2="cat okay", helpfulness=None), row(response2="cat")]
    found = genrm.judge_prompts(rows, renderer, ROLES, 99)
    texts = [renderer.tokenizer.decode(ids) for ids in found.tokens.lists()]
    asked = "<s><user>say the first word : cat dog"
    assert texts == [
        f"{asked}<response_1>cat<response_2>dog<assistant>",
        f"{asked}<response_1>dog<response_2>cat<assistant>",
        f"{asked}<response_1>cat<response_2>cat okay<assistant>",
        f"{asked}<response_1>cat okay<response_2>cat<assistant>",
    ]
    assert found.label_P3[:2].tolist() == [[5, 1, 2], [1, 5, 5]]
    assert found.label_P3[2:, 2].tolist() == [4, 3]
    assert found.label_P3[2:, :2].isnan().all()
    assert found.contexts == [CAT, CAT]
    counts = {"rows": 4, "ties": 1, "identical": 1, "too_long": 0, "kept": 2, "without_scores": 1}
    assert found.counts == counts


def test_a_pair_is_too_long_as_a_whole(renderer: Renderer):
    found = genrm.judge_prompts([row(), row(response1="cat " * 30)], renderer, ROLES, 20)
    assert (len(found.tokens), found.counts["too_long"]) == (2, 1)
    with pytest.raises(DataError, match="no pairs are left"):
        genrm.judge_prompts([row()], renderer, ROLES, 3)


@pytest.mark.parametrize("hidden", ["response_1", "response_2", "principle"])
def test_a_template_that_leaves_out_a_role_is_refused(hidden: str):
    tokenizer = toy_family.tokenizer()
    shown = f"in messages if message.role != '{hidden}' %}}"
    tokenizer.chat_template = toy_family.CHAT_TEMPLATE.replace("in messages %}", shown)
    renderer = Renderer(tokenizer)

    def make(verdict: VerdictConfig) -> Iterator[Callable[[], Any]]:
        config = SimpleNamespace(data=DataConfig(path="x"), verdict=verdict)
        yield lambda: genrm.judge_prompts([row()], renderer, verdict, 9999)
        yield lambda: genrm.verdict_demonstrations([row()], renderer, config)

    for refused in make(VerdictConfig(custom_roles=True, principle="right")):
        with pytest.raises(DataError, match=f"drops turns of the role {hidden}") as caught:
            refused()
        assert "verdict.custom_roles=false" in (caught.value.remedy or "")
    for works in make(VerdictConfig(principle="right")):
        works()


def test_responses_of_the_same_tokens_are_identical(renderer: Renderer):
    """The tokenizer knows neither letter."""
    found = genrm.judge_prompts([row(), row(response1="\u00e9", response2="\u00fc")], renderer, ROLES, 99)
    assert (found.counts["identical"], found.counts["kept"]) == (1, 1)


@pytest.mark.parametrize(
    ("said", "turned"),
    [
        ("Response 1 is better than Response 2.", "Response 2 is better than Response 1."),
        ("@Response 1 errs; response 2 does not", "@Response 2 errs; response 1 does not"),
        ("RESPONSE_2's and Response1", "RESPONSE_1's and Response2"),
        ("Response #1: 3 of 12 words, 1.5 lines", "Response #2: 3 of 12 words, 1.5 lines"),
        ("Response 12 and Response 1", "Response 12 and Response 2"),
    ],
)
def test_a_reason_told_the_other_way_round(said: str, turned: str):
    assert genrm.swap_reason(said) == turned
    assert genrm.swap_reason(turned) == said


@pytest.mark.parametrize(
    "said",
    [
        "",
        "It is better.",
        "The first one is better.",
        "Response 1 is better than the latter.",
        "Responses 1 and 2 are alike, Response 1 is longer.",
        "Response 1 beats 2 of them, more than 2 others",
        "Response 1 is fine, A2 is not",
        "Response 1 is fine, answer 2 is not",
        "Response 1 is fine, #2 is not",
        "I prefer response 2 over 1.",
        "Response 1 > 2",
        "Response 1 is wrong. 2 is better.",
        "Response 1 is wrong.2 is better.",
        "Response 1: 2 of 12 words",
        "Response One is better than response 2",
        "La respuesta 1 es mejor",
        "The response 1.5 of them",
    ],
)
def test_a_reason_that_may_name_a_place_otherwise_is_not_turned(said: str):
    assert genrm.swap_reason(said) is None


def test_demonstrations(renderer: Renderer):
    against = (1, "Response 2 is better.")
    unclear = (-3, "All words are right.")
    rows = [
        row(reasons=((-1, SAID), against, unclear, (-1, " "))),
        row(0),
        row(helpfulness=None),
        row(reasons=(against,)),
    ]
    config = SimpleNamespace(data=DataConfig(path="x"), verdict=ROLES)
    found, counts = genrm.verdict_demonstrations(rows, renderer, config)
    texts = [renderer.text(ids) for ids in found.responses.lists()]
    assert texts == [
        f"{SAID}\n{genrm_prompts.format_verdict(Verdict(5, 1, 2), 'helpsteer3')}",
        f"All words are right.\n{genrm_prompts.format_verdict(Verdict(5, 1, 2), 'helpsteer3')}",
        "Response 2 is perfectly helpful. Response 1 is not helpful.\n"
        + genrm_prompts.format_verdict(Verdict(1, 5, 5), "helpsteer3"),
    ]
    assert found.prompt_B.tolist() == [0, 0, 1]
    assert counts == {
        **{"rows": 4, "ties": 1, "identical": 0, "without_scores": 1, "without_reason": 1},
        **{"not_swapped": 1, "unreadable": 0, "empty": 0, "too_long": 0, "kept": 3},
    }


def test_a_reason_that_looks_like_a_verdict_is_no_demonstration(renderer: Renderer):
    quoted = f"{SAID} {genrm_prompts.format_verdict(Verdict(1, 5, 6), 'json')}"
    config = SimpleNamespace(data=DataConfig(path="x"), verdict=VerdictConfig(form="json", custom_roles=True))
    _, counts = genrm.verdict_demonstrations([row(reasons=((-1, SAID), (-1, quoted)))], renderer, config)
    assert (counts["unreadable"], counts["not_swapped"], counts["kept"]) == (1, 1, 2)


def test_reading_counts_what_is_cut_off_as_no_verdict():
    sound = genrm_prompts.format_verdict(Verdict(5, 1, 2), "json")
    found = genrm.read_verdicts([sound, sound, "no"], [True, False, True], "json")
    assert found[0].tolist() == [5, 1, 2]
    assert found[1:].isnan().all()
    assert genrm.verdict_tensor([]).shape == (0, 3)
