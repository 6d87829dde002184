"""Every kind of reward checkpoint against a plain forward pass of transformers, and ensembles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reward_models import (
    CPU,
    DIALOGUES,
    FIRST,
    NAMES,
    SECOND,
    Save,
    ids_of,
    last_logits,
    opened,
    rendered,
    section,
    words,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from align.config import EnsembleRewardConfig, FunctionRewardConfig
from align.data.chat import Message, Renderer
from align.data.conversations import ConversationIndex
from align.errors import DataError, ModelError
from align.rewards import card, scorers
from align.rewards.card import Card, ScoreMoments
from align.rewards.checkpoint_format import HeadSpec
from align.rewards.scorers import CheckpointScorer, EnsembleScorer, build_scorer


def test_a_classifier_is_read_at_the_last_token(save: Save):
    path = save(AutoModelForSequenceClassification, num_labels=1)
    wanted = [float(last_logits(AutoModelForSequenceClassification, path, rendered(path, one))) for one in DIALOGUES]
    assert opened(path).score(DIALOGUES).tolist() == pytest.approx(wanted, abs=1e-5)
    assert len({round(score, 3) for score in wanted}) == len(DIALOGUES)


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_row_zero_is_the_raw_logit_of_id_0(save: Save, attention: str):
    path = save(AutoModelForCausalLM, tie_word_embeddings=False)
    wanted = [float(last_logits(AutoModelForCausalLM, path, rendered(path, one))[0]) for one in DIALOGUES]
    judge = opened(path, head="lm_head_row0", attention=attention)
    assert judge.score(DIALOGUES).tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_yes_no_is_a_difference_of_logits_after_the_question(save: Save, attention: str):
    path = save(AutoModelForCausalLM)
    asked = "Evaluate the response to the previous prompt in terms of whether it satisfies this principle: be brief. "
    question = Message("user", asked + "Only answer Yes or No.")
    yes, no = (words().get_vocab()[word] for word in ("Yes", "No"))
    wanted = []
    for one in DIALOGUES:
        logits = last_logits(AutoModelForCausalLM, path, rendered(path, one, question, ask=True))
        wanted.append(float(logits[yes] - logits[no]))
    judge = opened(path, head="yes_no", principle="be brief", attention=attention)
    assert judge.score(DIALOGUES).tolist() == pytest.approx(wanted, abs=1e-5)
    asking = opened(path, head="yes_no", question=question.content)
    assert torch.equal(asking.score(DIALOGUES), opened(path, head="yes_no", principle="be brief").score(DIALOGUES))


def test_goodness_is_a_weighted_sum_of_what_the_head_says(save: Save):
    """Weights of the recipe first, then the card's; an attribute that is not named counts 0."""
    own = Card("attributes", NAMES, {"helpfulness": 1.0, "verbosity": -0.5})
    path = save(AutoModelForSequenceClassification, num_labels=5, own=own)
    output_BA = torch.stack(
        [last_logits(AutoModelForSequenceClassification, path, rendered(path, one)) for one in DIALOGUES]
    )
    by_card, named = opened(path), opened(path, weights={"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45})
    assert by_card.attribute_names == NAMES
    assert torch.allclose(by_card.score_attributes(DIALOGUES)[1], output_BA, atol=1e-5)
    assert torch.allclose(by_card.score(DIALOGUES), output_BA[:, 0] - 0.5 * output_BA[:, 4], atol=1e-5)
    wanted_B = 0.65 * output_BA[:, 0] + 0.8 * output_BA[:, 1] + 0.45 * output_BA[:, 2]
    assert torch.allclose(named.score(DIALOGUES), wanted_B, atol=1e-5)


def test_goodness_by_hand():
    """0.3, 0.74, 0.46, 0.47 and -0.33 of 4, 3, 2, 1 and 2 are 1.2 + 2.22 + 0.92 + 0.47 - 0.66 = 4.15."""
    judge = object.__new__(CheckpointScorer)
    judge.head_spec = HeadSpec("attributes", NAMES, (0.3, 0.74, 0.46, 0.47, -0.33), None, None, None, True)
    judge.attribute_names = NAMES
    values_BA = torch.tensor([[4.0, 3, 2, 1, 2], [0, 0, 0, 0, math.nan]])
    first, second = judge._score({"attribute_BA": values_BA}).tolist()
    assert first == pytest.approx(4.15, abs=1e-6)
    assert math.isnan(second)
    judge.head_spec = replace(judge.head_spec, moments=ScoreMoments(4.0, 0.5, 10))
    assert judge._score({"attribute_BA": values_BA})[0].item() == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize("kind", ["sequence_classification", "attributes", "lm_head_row0", "yes_no"])
def test_batches_and_neighbours_change_no_score(save: Save, kind: str):
    """One by one, all at once, in another order, and in micro-batches of a few tokens."""
    fields: dict[str, Any] = {"num_labels": 2 if kind == "attributes" else 1}
    auto = AutoModelForCausalLM if kind in ("lm_head_row0", "yes_no") else AutoModelForSequenceClassification
    path = save(auto, **(fields if auto is AutoModelForSequenceClassification else {"tie_word_embeddings": False}))
    options: dict[str, Any] = {"head": kind}
    options |= {"principle": "be brief"} if kind == "yes_no" else {}
    options |= {"attributes": ["a", "b"], "weights": {"a": 1.0, "b": -2.0}} if kind == "attributes" else {}
    judge = opened(path, **options)
    together = judge.score(DIALOGUES)
    alone = torch.cat([judge.score([one]) for one in DIALOGUES])
    backwards = judge.score(DIALOGUES[::-1]).flip(0)
    small = opened(path, **options, max_tokens_per_micro_batch=12).score(DIALOGUES)
    padded = opened(path, **options, attention="sdpa").score(DIALOGUES)
    for other in (alone, backwards, small, padded):
        # Float32 rounding of outputs of order 3, which the weights 1 and -2 subtract from each other.
        assert torch.allclose(together, other, atol=1e-5), (together - other).abs().max()
    assert judge.score([]).shape == (0,)


@pytest.mark.parametrize("own", [None, Card("sequence_classification")], ids=["public", "trained here"])
def test_ids_and_text_give_the_same_score(save: Save, own: Card | None):
    path = save(AutoModelForSequenceClassification, num_labels=1, own=own)
    judge = opened(path)
    said = ConversationIndex([FIRST, SECOND], Renderer(words())).dialogues(ids_of(words(), DIALOGUES))
    assert said == DIALOGUES
    assert torch.allclose(judge.score(said), judge.score_ids(ids_of(words(), DIALOGUES)), atol=1e-6)


def test_another_tokenizer_reads_the_same_conversation(save: Save, byte_tokenizer: Path):
    """The policy's words reach a model over bytes as its own template writes them."""
    own = PreTrainedTokenizerFast.from_pretrained(byte_tokenizer)
    path = save(AutoModelForSequenceClassification, own, num_labels=1)
    said = ConversationIndex([SECOND, FIRST], Renderer(words())).dialogues(ids_of(words(), DIALOGUES))
    text = "<user>reverse the words : cat dog sun<assistant>sun dog cat</s>"
    assert rendered(path, said[0])[0].tolist() == own.encode(text, add_special_tokens=False)
    wanted = [float(last_logits(AutoModelForSequenceClassification, path, rendered(path, one))) for one in DIALOGUES]
    assert opened(path).score(said).tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_conversation_without_positions_is_refused(save: Save):
    judge = opened(save(AutoModelForSequenceClassification, num_labels=1, max_position_embeddings=8))
    with pytest.raises(DataError, match=r"a conversation of \d+ tokens exceeds the 8 positions"):
        judge.score(DIALOGUES)


def test_a_bias_of_the_head_is_not_left_out(save: Save):
    path = save(AutoModelForSequenceClassification, num_labels=1)
    weights = load_file(f"{path}/model.safetensors")
    save_file({**weights, "score.bias": torch.ones(1)}, f"{path}/model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="does not read score.bias, so its scores would be others"):
        opened(path)


def test_normalized_scores(save: Save):
    own = Card("sequence_classification", moments=ScoreMoments(mean=0.25, std=2.0, count=10))
    path = save(AutoModelForSequenceClassification, num_labels=1, own=own)
    raw = opened(path).score(DIALOGUES)
    assert torch.allclose(opened(path, normalize=True).score(DIALOGUES), (raw - 0.25) / 2, atol=1e-6)


def test_a_score_that_is_not_a_number_stays_so(save: Save):
    path = save(AutoModelForSequenceClassification, num_labels=1)
    judge = opened(path)
    judge.engine.head.model.score.weight.data.fill_(math.nan)  # type: ignore[union-attr]
    assert judge.score(DIALOGUES).isnan().all()


@pytest.mark.parametrize(
    ("combine", "wanted"),
    [
        ("mean", lambda a, b: (a + b) / 2),
        ("minimum", torch.minimum),
        ("penalized", lambda a, b: (a + b - (a - b).abs()) / 2),
    ],
)
def test_an_ensemble_of_two(save: Save, combine: Any, wanted: Callable[..., torch.Tensor]):
    """Each by its own kind. The population standard deviation of two numbers is half their distance."""
    a = save(AutoModelForSequenceClassification, num_labels=1, name="a")
    own = Card("attributes", NAMES, {"helpfulness": 1.0})
    b = save(AutoModelForSequenceClassification, num_labels=5, name="b", seed=1, own=own)
    judge = build_scorer(EnsembleRewardConfig(path=a, paths=[b], combine=combine, dtype="float32"), CPU)
    assert isinstance(judge, EnsembleScorer)
    score_a, score_b = opened(a).score(DIALOGUES), opened(b).score(DIALOGUES)
    assert torch.allclose(judge.score(DIALOGUES), wanted(score_a, score_b), atol=1e-5)
    assert judge.metrics()["disagreement"] == pytest.approx(float((score_a - score_b).abs().mean() / 2), abs=1e-5)
    assert judge.metrics() == {}
    ids = ids_of(words(), DIALOGUES)
    assert torch.allclose(judge.score_ids(ids), wanted(score_a, score_b), atol=1e-5)


def test_a_member_without_a_score_takes_no_part_in_the_disagreement():
    scores = iter([[1.0, math.nan, 3.0], [3.0, 2.0, 7.0]])
    members: Any = [SimpleNamespace(score=lambda dialogues: torch.tensor(next(scores)))] * 2
    judge = object.__new__(EnsembleScorer)
    judge.config, judge.members = EnsembleRewardConfig(path="a", paths=["b"], combine="mean"), members
    judge._spreads = []
    assert judge.score(DIALOGUES).tolist() == pytest.approx([2.0, math.nan, 5.0], nan_ok=True)
    assert judge.metrics() == {"disagreement": 1.5}  # (1 + 2) / 2, of the two responses that both scored


def test_what_a_judge_starts_from_is_told_apart(save: Save, tmp_path: Path):
    a = save(AutoModelForSequenceClassification, num_labels=1, name="a")
    b = save(AutoModelForSequenceClassification, num_labels=1, name="b", seed=1)
    (tmp_path / "f.py").write_text("def f(prompts, completions):\n    return [0.0] * len(prompts)\n")
    function = FunctionRewardConfig(function=f"{tmp_path / 'f.py'}:f")
    alone, other = (scorers.fingerprint(section(path), 0) for path in (a, b))
    both = scorers.fingerprint(EnsembleRewardConfig(path=a, paths=[b], dtype="float32"), 0)
    before = scorers.fingerprint(function, 0)
    (tmp_path / "f.py").write_text("def f(prompts, completions):\n    return [1.0] * len(prompts)\n")
    assert len({alone, other, both, before, scorers.fingerprint(function, 0)}) == 5
    Path(a, card.NAME).write_text(Card("sequence_classification").dumps())
    assert scorers.fingerprint(section(a), 0) != alone


def test_an_unknown_prompt_is_no_conversation():
    known = ConversationIndex([FIRST], Renderer(words()))
    with pytest.raises(DataError, match="sort the words : wolf ant"):
        known.dialogues(ids_of(words(), DIALOGUES))


def test_a_head_is_never_made_up(save: Save):
    path = save(AutoModelForCausalLM, tie_word_embeddings=False)
    with pytest.raises(ModelError, match="no trained reward head"):
        build_scorer(section(path, head="sequence_classification"), CPU)
