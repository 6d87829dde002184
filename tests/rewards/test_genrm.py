"""Judges that write: what is asked, how verdicts become scores, and what happens to those that cannot be read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.cli import main
from align.config import (
    EndpointGeneratorConfig,
    FunctionGeneratorConfig,
    GenerativeConfig,
    GenerativeRewardConfig,
    ModelGeneratorConfig,
    SamplingConfig,
    VerdictConfig,
)
from align.data import toy_family
from align.data.chat import Dialogue, Message
from align.data.genrm_prompts import FALLBACK, Verdict
from align.errors import ConfigError, DataError, ModelError
from align.generators.base import Completion, Request
from align.rewards import genrm, genrm_card, genrm_groups, scorers
from align.rewards.genrm import GenerativeScorer, JudgeTask, PairVerdict

FILE = Path(__file__).with_name("judges.py")
CPU = torch.device("cpu")
A, B = ((Message("user", text),) for text in ("first", "second"))
GROUP = [Dialogue(A, text) for text in ("a", "a b c", "a b", "a b c d")]


def judge(function: str, **keys: Any) -> GenerativeScorer:
    section = GenerativeConfig(judge=FunctionGeneratorConfig(function=f"{FILE}:{function}"), custom_roles=True)
    return GenerativeScorer(GenerativeRewardConfig(**vars(replace(section, **keys))), CPU)


def compare(scorer: GenerativeScorer, first: str, second: str) -> PairVerdict:
    return scorer.compare_all([JudgeTask(A, (first, second))])[0]


def asked(one: GenerativeScorer) -> list[list[Request]]:
    """What goes to the generator from now on, call by call."""
    calls: list[list[Request]] = []
    complete = one.generator.complete

    def recorded(requests: Sequence[Request], sampling: SamplingConfig, margins: bool = False) -> list[Completion]:
        calls.append(list(requests))
        return complete(requests, sampling, margins)

    one.generator.complete = recorded  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("pairs", ["circular", "all"])
@pytest.mark.parametrize("both_orders", [True, False])
def test_scores_of_a_judge_that_is_right(pairs: str, both_orders: bool):
    one = judge("length", pairs=pairs, both_orders=both_orders)
    assert one.score(GROUP).tolist() == [1, 3, 2, 4]


def test_a_judge_that_favours_a_place_does_no_harm_in_both_orders():
    """Each response has half a point more, in either place of a pair; so the differences are those of `length`.

    Two equal ones are told apart by nothing: their ranking favours the first in either order.
    """
    partial = judge("partial")
    assert partial.score(GROUP).tolist() == [1.5, 3.5, 2.5, 4.5]
    equal = compare(partial, "a b", "c d")
    assert equal.scores == Verdict(2.5, 2.5, 3.5) and equal.agreed is False
    assert partial.score([Dialogue(A, "a b"), Dialogue(A, "c d")]).tolist() == [2.5, 2.5]
    once = judge("partial", pairs="all", both_orders=False)
    assert once.score([Dialogue(A, "a b"), Dialogue(A, "c d")]).tolist() == [3.0, 2.0]


def test_the_order_of_a_group_does_not_matter():
    one = judge("partial", pairs="all")
    order = [2, 0, 3, 1]
    assert one.score([GROUP[i] for i in order]).tolist() == one.score(GROUP)[order].tolist()


def test_groups_are_neighbours_of_one_context_or_of_one_number():
    """A prompt that comes twice in a row is two groups where numbers say so. Alone, a response is judged alone."""
    one = judge("length")
    calls = asked(one)
    twice = [*GROUP[:2], *GROUP[2:]]
    one.score(twice)
    assert len(calls[-1]) == 8  # four pairs both ways
    one.score(twice, groups=[0, 0, 1, 1])
    assert {request.messages[-2:] for request in calls[-1]} == {
        tuple(Message(f"response_{i}", text) for i, text in enumerate(texts, start=1))
        for texts in (("a", "a b c"), ("a b c", "a"), ("a b", "a b c d"), ("a b c d", "a b"))
    }
    mixed = [*GROUP[:2], Dialogue(B, "a b c d e")]
    assert one.score(mixed).tolist() == [1, 3, 5]
    assert calls[-1][-1].messages == (*B, Message("response_1", "a b c d e"))
    assert len(calls) == 3  # one each
    assert one.score([]).tolist() == [] and len(calls) == 3


def test_votes_have_numbers_and_their_mean_counts():
    one = judge("length", votes=3, both_orders=False, pairs="all")
    calls = asked(one)
    one.score(GROUP[:2])
    assert [request.sample for request in calls[0]] == [0, 1, 2]
    section = GenerativeConfig(judge=FunctionGeneratorConfig(function="m:f"), votes=2, both_orders=False)
    said = iter(["4, 2", "5, 2"])
    ranked = iter("16")
    one.config = section
    one.generator = type("Fake", (), {})()
    one.generator.complete = lambda requests, *_: [  # type: ignore[method-assign]
        Completion(
            f"[The Begin of Individual Scores]\n\\boxed{{{next(said)}}}\n[The End of Individual Scores]\n"
            f"[The Begin of Ranking Score]\n\\boxed{{{next(ranked)}}}\n[The End of Ranking Score]",
            True,
            1,
            1,
        )
        for _ in requests
    ]
    assert compare(one, "x", "y").scores == Verdict(4.5, 2, 3.5)


def test_equal_scores_are_equal_however_they_come_about():
    """Over both orders both have 17 / 6; means of means, 9 / 3 and 8 / 3 and 10 / 3 and 7 / 3, differ by rounding."""
    there = [Verdict(1, 4, 2), Verdict(4, 4, 2), Verdict(4, 2, 2)]
    back = [Verdict(2, 2, 5), Verdict(3, 2, 5), Verdict(2, 4, 5)]
    found = genrm._merge_orders([there, back], 2).scores
    assert found == Verdict(17 / 6, 17 / 6, 2)
    assert genrm_groups.from_verdicts(2, [(0, 1)], [found], tie_break=True) == [17 / 6 + 1.5, 17 / 6 - 1.5]


def test_what_cannot_be_read_is_asked_again_under_a_new_number():
    one = judge("late", votes=2, pairs="all", both_orders=False)
    calls = asked(one)
    assert one.score(GROUP[:2]).tolist() == [1, 3]
    assert [[request.sample for request in call] for call in calls] == [[0, 1], [2, 3], [4, 5]]
    assert one.metrics() == {"requests": 6, "verdicts": 2, "retried": 4, "fallbacks": 0}
    assert one.metrics() == {"requests": 0, "verdicts": 0, "retried": 0, "fallbacks": 0}


def test_what_cannot_be_read_at_all_is_no_opinion_and_counted():
    one = judge("unreadable", verdict_retries=1)
    assert one.score([*GROUP[:2], Dialogue(B, "x")]).tolist() == [3, 3, 3]
    assert one.metrics() == {"requests": 6, "verdicts": 3, "retried": 3, "fallbacks": 3}
    found = compare(one, "x", "y")
    assert found.scores == FALLBACK and found.agreed is None and one.metrics()["fallbacks"] == 2


def test_a_verdict_that_was_cut_off_is_none():
    one = judge("length", verdict_retries=0)
    complete = one.generator.complete
    one.generator.complete = lambda *given: [  # type: ignore[method-assign]
        found._replace(finished=False) for found in complete(*given)
    ]
    assert one.score(GROUP[:2]).tolist() == [3, 3] and one.metrics()["fallbacks"] == 2


def test_orders_that_agree_are_counted():
    """Of four pairs in a circle `length` ranks all alike both ways, `partial` those that differ by more than one."""
    sure, partial = judge("length"), judge("partial")
    sure.score(GROUP)
    partial.score(GROUP)
    assert sure.metrics()["order_consistency"] == 1.0
    # Differences 2, 1, 2, 3; of 1 the second place of (a b c, a b) draws level and is ranked 3, for the first.
    assert partial.metrics()["order_consistency"] == 0.75


def test_the_judge_does_not_see_reasoning_unless_told():
    thoughts = Dialogue(A, "<think>a b c</think>a")
    one = judge("length")
    calls = asked(one)
    assert one.score([thoughts, GROUP[1]]).tolist() == [1, 3]
    assert not any("think" in turn.content for request in calls[0] for turn in request.messages)
    assert judge("length", strip_thoughts=False).score([thoughts, GROUP[1]]).tolist() == [3, 3]


def test_bonuses_are_of_what_the_policy_wrote():
    long = [Dialogue(A, "<think>r</think>a b"), Dialogue(A, "<think>rrr</think>a b")]
    assert judge("length", reasoning_length_coef=1.0).score(long).tolist() == [2.5, 1.5]


def test_a_principle_is_asked_about_after_each_response():
    one = judge(
        "fulfils", form="principle", custom_roles=False, principle="names an animal", votes=2, verdict_retries=1
    )
    calls = asked(one)
    assert one.score([Dialogue(A, "a cat"), Dialogue(A, "a car")]).tolist() == [1, -1]
    assert [turn.role for turn in calls[0][0].messages] == ["user", "assistant", "user"]
    assert one.metrics() == {"requests": 6, "verdicts": 4, "retried": 2, "fallbacks": 0}
    never = judge("unreadable", form="principle", custom_roles=False, principle="names an animal", verdict_retries=0)
    assert never.score(GROUP).tolist() == [0, 0, 0, 0] and never.metrics()["fallbacks"] == 4


@pytest.mark.parametrize(
    ("text", "margin", "expected"),
    [
        ("<think>No</think>Yes", 2.5, 2.5),
        ("No.", -3.0, -3.0),
        ("**Yes**", None, 1.0),
        ("No", math.nan, -1.0),
        ("Yes", math.inf, 1.0),
        ("Yes and No", 2.0, None),
        ("<think>Yes", 2.0, None),
        ("", 2.0, None),
        ("yes", 2.0, None),
        ("Yesterday", 2.0, None),
    ],
)
def test_the_verdict_on_a_principle(text: str, margin: float | None, expected: float | None):
    assert genrm_groups.read_principle(Completion(text, True, 1, 1, margin)) == expected


def test_what_a_judge_needs_is_looked_at_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    section = GenerativeConfig(judge=FunctionGeneratorConfig(function=f"{FILE}:length"))
    assert genrm.check_judge(section) == ""
    with pytest.raises(ConfigError, match="has no function nothing"):
        genrm.check_judge(replace(section, judge=FunctionGeneratorConfig(function=f"{FILE}:nothing")))
    endpoint = {"url": "http://127.0.0.1:9/v1", "model": "m", "key_env": "ALIGN_TEST_KEY"}
    remote = EndpointGeneratorConfig(**endpoint)
    monkeypatch.delenv("ALIGN_TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match="ALIGN_TEST_KEY is not set"):
        genrm.check_judge(replace(section, judge=remote))
    function = scorers.fingerprint(GenerativeRewardConfig(**vars(section)), 0)
    assert function != scorers.fingerprint(GenerativeRewardConfig(**vars(replace(section, judge=remote))), 0)


def test_a_template_that_leaves_out_a_role_is_refused(tmp_path: Path, tiny_policy: Path):
    """The family's template writes every role; one that knows user and assistant alone would hide the responses."""
    tokenizer = toy_family.tokenizer()
    init = json.loads((tiny_policy / "config.json").read_text())
    tokenizer.save_pretrained(tmp_path)
    knows = ModelGeneratorConfig(path=str(tmp_path), init={"model_type": init["model_type"]})
    section = GenerativeConfig(judge=knows, custom_roles=True, principle="be right")
    assert len(genrm.check_judge(section)) == 64
    file = tmp_path / "plain.jinja"
    for hidden in ("response_1", "response_2", "principle"):
        file.write_text(
            toy_family.CHAT_TEMPLATE.replace("{% for", "{% for", 1).replace(
                "in messages %}", f"in messages if message.role != '{hidden}' %}}"
            )
        )
        with pytest.raises(DataError, match=f"drops turns of the role {hidden}"):
            genrm.check_judge(replace(section, judge=replace(knows, chat_template=str(file))))
        genrm.check_judge(replace(section, judge=replace(knows, chat_template=str(file)), custom_roles=False))


RECIPE = f"""
algorithm: rloo
run: {{{{dir: {{run}}, steps: 14, seed: 1, progress: none, trackers: []}}}}
data: {{{{path: {{data}}, max_rows: 64, max_prompt_tokens: 40, max_response_tokens: 12}}}}
executor: local
policy: {{{{path: {{policy}}, dtype: float32, optimizer: {{{{lr: 1e-2}}}}}}}}
reference: {{{{dtype: float32}}}}
reward:
  kind: generative
  judge: {{{{kind: function, function: {FILE}:words}}}}
  custom_roles: true
  verdict_retries: 1
prompts_per_step: 8
truncated: keep
kl_coef: 0.0
sampling: {{{{num_samples: 4, max_tokens: 6}}}}
"""


@pytest.mark.slow
def test_rloo_learns_what_a_judge_prefers(tmp_path: Path, toy_data: Path, tiny_policy: Path):
    """The judge counts a word, and a quarter of its verdicts is broken; fallbacks are one in sixteen."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(run=tmp_path / "run", data=toy_data, policy=tiny_policy))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    means = [line["reward"] for line in lines]
    assert sum(means[-3:]) / 3 > sum(means[:3]) / 3 + 1
    assert all(line["reward/verdicts"] == 8 * 4 * 2 for line in lines)  # four pairs both ways
    retried, left = (sum(line[f"reward/{name}"] for line in lines) for name in ("retried", "fallbacks"))
    assert 0 < left < retried < 64 * 14 / 2


def test_a_judge_is_asked_as_it_learned(tmp_path: Path):
    toy_family.tokenizer().save_pretrained(tmp_path)
    for name, text in genrm_card.files(VerdictConfig(form="json", custom_roles=True), None).items():
        (tmp_path / name).write_text(text)
    learned = ModelGeneratorConfig(path=str(tmp_path), init={"model_type": "llama"})
    assert genrm.check_judge(GenerativeConfig(judge=learned, form="json", custom_roles=True))
    for keys, remedy in (
        ({"form": "json"}, "custom_roles=true"),
        ({"custom_roles": True}, "form=json"),
        ({"form": "principle", "principle": "x"}, "form=json reward.custom_roles=true"),
    ):
        with pytest.raises(ConfigError, match="this judge was trained with") as caught:
            genrm.check_judge(GenerativeConfig(judge=learned, **keys))
        assert caught.value.remedy == f"set reward.{remedy}"
    (tmp_path / genrm_card.NAME).write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        genrm.check_judge(GenerativeConfig(judge=learned, form="json", custom_roles=True))
