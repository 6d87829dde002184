"""Every kind of reward checkpoint against a plain forward pass of transformers, and what each refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from align.config import EnsembleConfig, RewardConfig
from align.data import chat, toy
from align.data.chat import Dialogue, Message, Renderer
from align.data.conversations import Conversations
from align.errors import DataError, ModelError
from align.prechecks.roles import with_absolute_paths
from align.rewards import card, checkpoint_format, scorers, texts
from align.rewards.card import Card, Moments
from align.rewards.checkpoint_format import HeadSpec
from align.rewards.scorers import CheckpointScorer, EnsembleScorer, build_scorer
from align.types import Packed, Sequences

CPU = torch.device("cpu")
NAMES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FIRST = (Message("user", "reverse the words : cat dog sun"),)
SECOND = (
    Message("user", "say the last word : moon egg"),
    Message("assistant", "egg"),
    Message("user", "sort the words : wolf ant"),
)
DIALOGUES = [
    Dialogue(FIRST, "sun dog cat"),
    Dialogue(SECOND, "ant wolf"),
    Dialogue(FIRST, "cat"),
    Dialogue(SECOND, "wolf ant okay thanks friend"),
    Dialogue(FIRST, "sun dog cat indeed"),
]
"""Conversations of two contexts, not side by side."""

Save = Callable[..., str]


def words() -> PreTrainedTokenizerFast:
    """The tokenizer of the bundled task with two words more."""
    return _with_words(toy.tokenizer(), ["Yes", "No", *texts.QUESTION.split()])


def _with_words(base: PreTrainedTokenizerFast, more: Sequence[str]) -> PreTrainedTokenizerFast:
    entries = list(dict.fromkeys([*sorted(base.get_vocab(), key=base.get_vocab().get), *more]))  # type: ignore[arg-type]
    level = Tokenizer(models.WordLevel({word: id for id, word in enumerate(entries)}, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=level,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        chat_template=toy.CHAT_TEMPLATE,
    )


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a random checkpoint and returns its folder."""

    def saved(auto: Any, tokenizer: Any = None, name: str = "m", seed: int = 0, own: Card | None = None, **fields: Any):
        tokenizer = tokenizer or words()
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            fields.pop("model_type", "llama"), vocab_size=len(tokenizer), **{**SIZES, **fields}
        )
        config.pad_token_id = tokenizer.pad_token_id
        model = auto.from_config(config)
        for parameter in model.parameters():  # logits of a fresh model are almost all alike
            parameter.data.mul_(4)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        if own is not None:
            (tmp_path / name / card.NAME).write_text(own.dumps())
        return str(tmp_path / name)

    return saved


def section(path: str, **fields: Any) -> RewardConfig:
    return RewardConfig(path=path, dtype="float32", **fields)


def opened(path: str, **fields: Any) -> CheckpointScorer:
    judge = build_scorer(section(path, **fields), CPU)
    assert isinstance(judge, CheckpointScorer)
    return judge


def rendered(path: str, dialogue: Dialogue, *more: Message, ask: bool = False) -> torch.Tensor:
    """Ids as a model card makes them."""
    turns = [*dialogue.context, Message("assistant", dialogue.response), *more]
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = tokenizer.apply_chat_template([t._asdict() for t in turns], add_generation_prompt=ask, tokenize=False)
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])


@torch.no_grad()
def last_logits(auto: Any, path: str, ids: torch.Tensor) -> torch.Tensor:
    logits = auto.from_pretrained(path, dtype=torch.float32).eval()(input_ids=ids).logits
    return logits[0, -1] if logits.ndim == 3 else logits[0]


def test_a_classifier_is_read_at_the_last_token(save: Save):
    path = save(AutoModelForSequenceClassification, num_labels=1)
    wanted = [float(last_logits(AutoModelForSequenceClassification, path, rendered(path, one))) for one in DIALOGUES]
    assert opened(path).score(DIALOGUES).tolist() == pytest.approx(wanted, abs=1e-5)
    assert len({round(score, 3) for score in wanted}) == len(DIALOGUES)


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_row_zero_is_the_raw_logit_of_id_0(save: Save, attention: str):
    path = save(AutoModelForCausalLM, tie_word_embeddings=False)
    wanted = [float(last_logits(AutoModelForCausalLM, path, rendered(path, one))[0]) for one in DIALOGUES]
    judge = opened(path, kind="lm_head_row0", attention=attention)
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
    judge = opened(path, kind="yes_no", principle="be brief", attention=attention)
    assert judge.score(DIALOGUES).tolist() == pytest.approx(wanted, abs=1e-5)
    asking = opened(path, kind="yes_no", question=question.content)
    assert torch.equal(asking.score(DIALOGUES), opened(path, kind="yes_no", principle="be brief").score(DIALOGUES))


def test_goodness_is_a_weighted_sum_of_what_the_head_says(save: Save):
    """Weights of the recipe first, then the card's; an attribute that is not named counts 0."""
    own = Card("attributes", NAMES, {"helpfulness": 1.0, "verbosity": -0.5})
    path = save(AutoModelForSequenceClassification, num_labels=5, own=own)
    output_BA = torch.stack(
        [last_logits(AutoModelForSequenceClassification, path, rendered(path, one)) for one in DIALOGUES]
    )
    by_card, named = opened(path), opened(path, weights={"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45})
    assert by_card.attribute_names == NAMES
    assert torch.allclose(by_card.attributes(DIALOGUES), output_BA, atol=1e-5)
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
    judge.head_spec = replace(judge.head_spec, moments=Moments(4.0, 0.5, 10))
    assert judge._score({"attribute_BA": values_BA})[0].item() == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize("kind", ["sequence_classification", "attributes", "lm_head_row0", "yes_no"])
def test_batches_and_neighbours_change_no_score(save: Save, kind: str):
    """One by one, all at once, in another order, and in micro-batches of a few tokens."""
    fields: dict[str, Any] = {"num_labels": 2 if kind == "attributes" else 1}
    auto = AutoModelForCausalLM if kind in ("lm_head_row0", "yes_no") else AutoModelForSequenceClassification
    path = save(auto, **(fields if auto is AutoModelForSequenceClassification else {"tie_word_embeddings": False}))
    options: dict[str, Any] = {"kind": kind}
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


def ids_of(tokenizer: Any, dialogues: Sequence[Dialogue]) -> Sequences:
    """What a policy would have sampled: prompts, and responses with their end-of-sequence token."""
    renderer = Renderer(tokenizer)
    rows = [renderer.dialogue_ids(one.context, [one.response]) for one in dialogues]
    prompts, responses = Packed.from_lists([p for p, _ in rows]), Packed.from_lists([r for _, (r,) in rows])
    return Sequences(prompts, responses, torch.arange(len(rows)))


@pytest.mark.parametrize("own", [None, Card("sequence_classification")], ids=["public", "trained here"])
def test_ids_and_text_give_the_same_score(save: Save, own: Card | None):
    path = save(AutoModelForSequenceClassification, num_labels=1, own=own)
    judge = opened(path)
    said = Conversations([FIRST, SECOND], Renderer(words())).dialogues(ids_of(words(), DIALOGUES))
    assert said == DIALOGUES
    assert torch.allclose(judge.score(said), judge.score_ids(ids_of(words(), DIALOGUES)), atol=1e-6)


def test_another_tokenizer_reads_the_same_conversation(save: Save, byte_tokenizer: Path):
    """The policy's words reach a model over bytes as its own template writes them."""
    own = PreTrainedTokenizerFast.from_pretrained(byte_tokenizer)
    path = save(AutoModelForSequenceClassification, own, num_labels=1)
    said = Conversations([SECOND, FIRST], Renderer(words())).dialogues(ids_of(words(), DIALOGUES))
    text = "<user>reverse the words : cat dog sun<assistant>sun dog cat</s>"
    assert rendered(path, said[0])[0].tolist() == own.encode(text, add_special_tokens=False)
    wanted = [float(last_logits(AutoModelForSequenceClassification, path, rendered(path, one))) for one in DIALOGUES]
    assert opened(path).score(said).tolist() == pytest.approx(wanted, abs=1e-5)


def test_responses_of_one_prompt_share_its_tokens(save: Save):
    """Five conversations of two contexts: two prompts, also where a question follows each response."""
    for options in ({"kind": "lm_head_row0"}, {"kind": "yes_no", "principle": "be brief"}):
        judge = opened(save(AutoModelForCausalLM, tie_word_embeddings=False), **options)
        sequences, order = judge.text.sequences(DIALOGUES)
        assert len(sequences.prompts) == 2
        assert order.tolist() == [0, 2, 4, 1, 3]
        assert sequences.prompt_B.tolist() == [0, 0, 0, 1, 1]


TAIL = toy.CHAT_TEMPLATE.replace("{{ eos_token }}{% endif %}", "{{ eos_token }} okay{% endif %}")
"""As Qwen's, which writes a newline after the end of a turn."""


def test_what_stands_after_the_end_of_turn(save: Save):
    """A public checkpoint reads it, as its card does; one that was trained here ends where its training did."""
    tokenizer = words()
    tokenizer.chat_template = TAIL
    whole, okay = [rendered_with(tokenizer, one) for one in DIALOGUES], tokenizer.get_vocab()["okay"]
    assert all(ids[-1] == okay for ids in whole)
    public = opened(save(AutoModelForSequenceClassification, tokenizer, num_labels=1, name="public"))
    trained = opened(
        save(
            AutoModelForSequenceClassification, tokenizer, num_labels=1, own=Card("sequence_classification", loss="bt")
        )
    )
    converted = opened(
        save(
            AutoModelForSequenceClassification,
            tokenizer,
            num_labels=1,
            own=Card("sequence_classification"),
            name="converted",
        )
    )
    rows = lambda judge: rows_of(judge.text.sequences(DIALOGUES))  # noqa: E731
    assert rows(public) == rows(converted) == whole
    assert rows(trained) == [ids[:-1] for ids in whole]


def rendered_with(tokenizer: Any, one: Dialogue) -> list[int]:
    turns = [turn._asdict() for turn in (*one.context, Message("assistant", one.response))]
    return tokenizer.encode(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)


def rows_of(found: tuple[Sequences, torch.Tensor]) -> list[list[int]]:
    sequences, order = found
    prompts, responses = sequences.prompts.lists(), sequences.responses.lists()
    rows = [prompts[p] + r for p, r in zip(sequences.prompt_B.tolist(), responses, strict=True)]
    return [rows[i] for i in order.argsort().tolist()]


WHY = {
    "same": ({}, None, None),
    "card without template": ({}, Card("sequence_classification"), None),
    "card with the run's template": ({}, Card("sequence_classification", chat_template=toy.CHAT_TEMPLATE), None),
    "card with another template": (
        {},
        Card("sequence_classification", chat_template=TAIL),
        "its chat template or date",
    ),
    "another date": ({"date": "1 May 2025"}, None, "its chat template or date"),
    "question": ({"kind": "yes_no", "principle": "x"}, None, "it reads a question"),
}


@pytest.mark.parametrize("name", WHY)
def test_who_reads_the_policys_ids(save: Save, name: str):
    options, own, why = WHY[name]
    path = save(AutoModelForSequenceClassification, num_labels=1, own=own)
    (read,) = checkpoint_format.head_specs(section(path, **options))
    found = texts.text_reason(read, chat.load_tokenizer(path), Renderer(words()))
    assert (found or "").startswith(why or "")
    assert (found is None) == (why is None)


def test_other_tokenizers_and_longer_templates_read_text(save: Save, byte_tokenizer: Path):
    own = PreTrainedTokenizerFast.from_pretrained(byte_tokenizer)
    other = save(AutoModelForSequenceClassification, own, num_labels=1)
    (read,) = checkpoint_format.head_specs(section(other))
    assert texts.text_reason(read, chat.load_tokenizer(other), Renderer(words())) == "its tokenizer is not the policy's"
    longer = words()
    longer.chat_template = TAIL
    assert "more after a response" in str(texts.text_reason(read, longer, Renderer(longer)))
    named = replace(read, chat_template=TAIL)  # that the run has it too gives the policy no tokens after the end
    assert "more after a response" in str(texts.text_reason(named, longer, Renderer(longer)))
    assert texts.text_reason(replace(read, by_align=True), longer, Renderer(longer)) is None


def test_the_recipe_overrides_the_cards_template(save: Save, tmp_path: Path):
    own = Card("sequence_classification", chat_template="card", date="1 May 2025")
    path = save(AutoModelForSequenceClassification, num_labels=1, own=own)
    (tmp_path / "own.jinja").write_text("recipe")
    (by_card,) = checkpoint_format.head_specs(section(path))
    (by_recipe,) = checkpoint_format.head_specs(
        section(path, chat_template=str(tmp_path / "own.jinja"), date="2 May 2025")
    )
    assert (by_card.chat_template, by_card.date) == ("card", "1 May 2025")
    assert (by_recipe.chat_template, by_recipe.date) == ("recipe", "2 May 2025")


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
    own = Card("sequence_classification", moments=Moments(mean=0.25, std=2.0, count=10))
    path = save(AutoModelForSequenceClassification, num_labels=1, own=own)
    raw = opened(path).score(DIALOGUES)
    assert torch.allclose(opened(path, normalize=True).score(DIALOGUES), (raw - 0.25) / 2, atol=1e-6)


def test_a_score_that_is_not_a_number_stays_so(save: Save):
    path = save(AutoModelForSequenceClassification, num_labels=1)
    judge = opened(path)
    judge.engine.head.model.score.weight.data.fill_(math.nan)  # type: ignore[union-attr]
    assert judge.score(DIALOGUES).isnan().all()


def test_kinds_are_told_by_card_and_config(save: Save):
    kinds = {
        "one": save(AutoModelForSequenceClassification, num_labels=1, name="one"),
        "two": save(AutoModelForSequenceClassification, num_labels=2, name="two"),
        "row": save(AutoModelForCausalLM, name="row", own=Card("lm_head_row0")),
    }
    options: dict[str, dict[str, Any]] = {"two": {"attributes": ["a", "b"], "weights": {"a": 1}}}
    found = {
        name: checkpoint_format.head_specs(section(path, **options.get(name, {})))[0].kind
        for name, path in kinds.items()
    }
    assert found == {"one": "sequence_classification", "two": "attributes", "row": "lm_head_row0"}


def test_names_come_from_recipe_card_or_config(save: Save):
    labels = dict(enumerate(NAMES))
    named = save(AutoModelForSequenceClassification, num_labels=5, name="named", id2label=labels)
    nine = save(AutoModelForSequenceClassification, num_labels=9, name="nine")
    (own,) = checkpoint_format.head_specs(section(named, weights={"coherence": 2.0}))
    (nemo,) = checkpoint_format.head_specs(section(nine, attributes=["nemo"], weights={"helpfulness": 1.0}))
    assert (own.names, own.weights) == (NAMES, (0, 0, 2.0, 0, 0))
    assert nemo.names[:5] == ("quality", "toxicity", "humor", "creativity", "helpfulness")
    assert nemo.weights == (0, 0, 0, 0, 1.0, 0, 0, 0, 0)


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
    judge = build_scorer(section(a, ensemble=EnsembleConfig([b], combine)), CPU)
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
    judge.config, judge.members = RewardConfig(path="a", ensemble=EnsembleConfig(["b"], "mean")), members
    judge._spreads = []
    assert judge.score(DIALOGUES).tolist() == pytest.approx([2.0, math.nan, 5.0], nan_ok=True)
    assert judge.metrics() == {"disagreement": 1.5}  # (1 + 2) / 2, of the two responses that both scored


def test_members_of_an_ensemble_have_what_is_theirs():
    first = RewardConfig(path="a", revision="r", ensemble=EnsembleConfig(["b", "c"]), kind="lm_head_row0")
    a, b, c = checkpoint_format.members(first)
    assert [(one.path, one.revision, one.kind) for one in (a, b, c)] == [
        ("a", "r", "lm_head_row0"), ("b", None, "lm_head_row0"), ("c", None, "lm_head_row0"),
    ]  # fmt: skip
    assert all(not one.ensemble.paths for one in (a, b, c))


def test_what_a_judge_starts_from_is_told_apart(save: Save, tmp_path: Path):
    a = save(AutoModelForSequenceClassification, num_labels=1, name="a")
    b = save(AutoModelForSequenceClassification, num_labels=1, name="b", seed=1)
    (tmp_path / "f.py").write_text("def f(prompts, completions):\n    return [0.0] * len(prompts)\n")
    function = RewardConfig(kind="function", function=f"{tmp_path / 'f.py'}:f")
    alone, other = (scorers.fingerprint(section(path), 0) for path in (a, b))
    both = scorers.fingerprint(section(a, ensemble=EnsembleConfig([b])), 0)
    before = scorers.fingerprint(function, 0)
    (tmp_path / "f.py").write_text("def f(prompts, completions):\n    return [1.0] * len(prompts)\n")
    assert len({alone, other, both, before, scorers.fingerprint(function, 0)}) == 5
    Path(a, card.NAME).write_text(Card("sequence_classification").dumps())
    assert scorers.fingerprint(section(a), 0) != alone


def test_an_unknown_prompt_is_no_conversation():
    known = Conversations([FIRST], Renderer(words()))
    with pytest.raises(DataError, match="sort the words : wolf ant"):
        known.dialogues(ids_of(words(), DIALOGUES))


def test_a_head_is_never_made_up(save: Save):
    path = save(AutoModelForCausalLM, tie_word_embeddings=False)
    with pytest.raises(ModelError, match="no trained reward head"):
        build_scorer(section(path, kind="sequence_classification"), CPU)


def test_files_of_a_judge_are_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Workers, and jobs, may begin in another folder; hub ids and modules stay as they are."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for name in ("judge.py", "t.jinja"):
        (tmp_path / name).write_text("")
    models = with_absolute_paths(
        RewardConfig(path="a", ensemble=EnsembleConfig(["b", "org/model"]), chat_template="t.jinja")
    )
    assert isinstance(models, RewardConfig)
    assert (models.path, models.ensemble.paths) == (str(tmp_path / "a"), [str(tmp_path / "b"), "org/model"])
    assert models.chat_template == str(tmp_path / "t.jinja")
    for given, full in (("judge.py:f", f"{tmp_path / 'judge.py'}:f"), ("judges.module:f", "judges.module:f")):
        found = with_absolute_paths(RewardConfig(kind="function", function=given))
        assert isinstance(found, RewardConfig)
        assert (found.function, found.path) == (full, "")
