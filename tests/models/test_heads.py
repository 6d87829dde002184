"""What is read from a transformer: which state, which logit, at which length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, LlamaConfig

from align.config import LoraConfig
from align.data import collate
from align.errors import ModelError
from align.models.heads import LastTokenScore, RowZeroLogit, TokenizerIds, TokenLogprobs, TokenValues, lm_head, restrict
from align.models.lora import add_lora
from align.ops import logprobs
from align.types import Packed, Sequences

EOS = 2


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 18 response tokens of `ROWS` are read in five chunks."""
    monkeypatch.setattr(logprobs, "MIN_CHUNK", 4)


def config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }
    return LlamaConfig(**sizes | changes)


def build(auto: Any, attention: str, own: Any = None, **changes: Any) -> Any:
    torch.manual_seed(5)
    model = auto.from_config(own or config(**changes), attn_implementation=attention, dtype=torch.float32)
    return model.eval()


# Responses that end in EOS, hold EOS or the filler id 0 inside, end in several, or are cut off.
ROWS = Sequences(
    Packed.from_lists([[3, EOS, 4, EOS], [0, 0, 9]]),
    Packed.from_lists([[5, EOS], [EOS, 6, EOS], [7, EOS, EOS, EOS], [8, 0, 0], [0], [11, 12, 13, 14, 15, EOS]]),
    torch.tensor([0, 0, 0, 1, 1, 1]),
)


def layouts(rows: Sequences) -> dict[str, collate.Layout]:
    return {
        "packed": collate.packed(rows),
        "right": collate.padded(rows, side="right"),
        "left": collate.padded(rows, side="left"),
    }


def last_state_scores(model: Any, rows: Sequences) -> torch.Tensor:
    prompts, out = rows.prompts.lists(), []
    for prompt, response in zip(rows.prompt_B.tolist(), rows.responses.lists(), strict=True):
        states = model.model(torch.tensor([prompts[prompt] + response])).last_hidden_state
        out.append(model.score(states[0, -1])[0])
    return torch.stack(out)


@pytest.mark.parametrize("layout", ["packed", "right", "left"])
@torch.no_grad()
def test_scores_are_read_by_length(layout):
    theirs = last_state_scores(build(AutoModelForSequenceClassification, "eager", num_labels=1), ROWS)
    model = build(AutoModelForSequenceClassification, "packed" if layout == "packed" else "sdpa", num_labels=1)
    ours = LastTokenScore(model)(layouts(ROWS)[layout])["score_B"]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert float(theirs.std()) > 0.05  # they differ, so a wrong position would show


@torch.no_grad()
def test_transformers_looks_for_pads_and_reads_elsewhere():
    # Why the head is not the classifier's own forward: with pad == EOS it reads the token before the last run of EOS.
    model = build(AutoModelForSequenceClassification, "eager", num_labels=1)
    ours = last_state_scores(model, ROWS)
    prompts, responses = ROWS.prompts.lists(), ROWS.responses.lists()
    whole = torch.tensor([prompts[0] + responses[0]])
    assert abs(float(model(whole).logits[0, 0]) - float(ours[0])) > 1e-3


@torch.no_grad()
def test_row_zero_logit_is_the_first_score_of_generate():
    causal = build(AutoModelForCausalLM, "eager")
    theirs = []
    for prompt, response in zip(ROWS.prompt_B.tolist(), ROWS.responses.lists(), strict=True):
        ids = torch.tensor([ROWS.prompts.lists()[prompt] + response])
        out = causal.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            return_dict_in_generate=True,
            output_scores=True,
            do_sample=False,
        )
        theirs.append(out.scores[0][0][0])
    expected = torch.stack(theirs)
    classifier = build(AutoModelForSequenceClassification, "packed", num_labels=1)
    classifier.model.load_state_dict(causal.model.state_dict())
    classifier.score.weight.copy_(causal.lm_head.weight[:1])
    assert float(expected.std()) > 0.05
    for name, layout in layouts(ROWS).items():
        model = build(AutoModelForCausalLM, "packed" if name == "packed" else "sdpa")
        ours = RowZeroLogit(model)(layout)["score_B"]
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    converted = LastTokenScore(classifier)(layouts(ROWS)["packed"])["score_B"]
    torch.testing.assert_close(converted, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_token_logprobs_and_entropy_at_a_temperature():
    causal = build(AutoModelForCausalLM, "eager")
    for name, layout in layouts(ROWS).items():
        outputs = TokenLogprobs(build(AutoModelForCausalLM, "packed" if name == "packed" else "sdpa"))(
            layout, temperature=0.6
        )
        for i, (prompt, response) in enumerate(zip(ROWS.prompt_B.tolist(), ROWS.responses.lists(), strict=True)):
            row = ROWS.prompts.lists()[prompt] + response
            table = (causal(torch.tensor([row])).logits[0] / 0.6).log_softmax(-1)
            for t in range(outputs["logprob_BT"].shape[1]):
                got = [float(outputs[key][i, t]) for key in ("logprob_BT", "entropy_BT")]
                if t >= len(response):
                    assert got == [0.0, 0.0]
                    continue
                # Column t speaks about response token t, predicted from the state before it.
                at = table[len(row) - len(response) + t - 1]
                assert got == pytest.approx([float(at[response[t]]), float(-(at.exp() * at).sum())], abs=1e-5)


@pytest.mark.parametrize("gaps", [None, (), (1, 30)], ids=["every row of the head", "padded", "with gaps"])
def test_gradients_reach_the_weights_through_logprobs_and_entropy(gaps):
    """Of the ids that the tokenizer has alone; other rows of the head have no part in either."""
    temperature = 0.6
    ids = [id for id in range(50) if gaps is None or (id < 40 and id not in gaps)]
    weight_2BT = torch.randn(2, *ROWS.mask_BT.shape, generator=torch.Generator().manual_seed(3))
    causal = build(AutoModelForCausalLM, "eager")
    for i, (prompt, response) in enumerate(zip(ROWS.prompt_B.tolist(), ROWS.responses.lists(), strict=True)):
        row = ROWS.prompts.lists()[prompt] + response
        logits = causal(torch.tensor([row])).logits[0, -len(response) - 1 : -1]
        at = (logits[:, ids] / temperature).log_softmax(-1)
        logprob, entropy = at[range(len(response)), [ids.index(id) for id in response]], -(at.exp() * at).sum(-1)
        (weight_2BT[0, i, : len(response)] @ logprob + weight_2BT[1, i, : len(response)] @ entropy).backward()
    for name, layout in layouts(ROWS).items():
        model = build(AutoModelForCausalLM, "packed" if name == "packed" else "sdpa")
        if gaps is not None:
            restrict(model, TokenizerIds(40, gaps))
        outputs = TokenLogprobs(model)(layout, temperature)
        (weight_2BT[0] * outputs["logprob_BT"] + weight_2BT[1] * outputs["entropy_BT"]).sum().backward()
        for (key, own), theirs in zip(model.named_parameters(), causal.parameters(), strict=True):
            torch.testing.assert_close(
                own.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
            )


def token_values(model: Any, rows: Sequences, after: bool) -> torch.Tensor:
    """The score head at the state before each response token, or at the one after it; one row at a time."""
    value_BT = torch.zeros(rows.mask_BT.shape)
    for i, (prompt, response) in enumerate(zip(rows.prompt_B.tolist(), rows.responses.lists(), strict=True)):
        given = rows.prompts.lists()[prompt]
        states = model.model(torch.tensor([given + response])).last_hidden_state[0]
        first = len(given) if after else len(given) - 1
        value_BT[i, : len(response)] = model.score(states[first : first + len(response)])[:, 0]
    return value_BT


@pytest.mark.parametrize("layout", ["packed", "right", "left"])
@torch.no_grad()
def test_values_are_read_before_their_tokens(layout):
    plain = build(AutoModelForSequenceClassification, "eager", num_labels=1)
    model = build(AutoModelForSequenceClassification, "packed" if layout == "packed" else "sdpa", num_labels=1)
    ours = TokenValues(model)(layouts(ROWS)[layout])["value_BT"]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, token_values(plain, ROWS, after=False), rtol=0, atol=1e-6)  # 0 where no token is
    mutant = token_values(plain, ROWS, after=True)
    assert float((ours - mutant)[ROWS.mask_BT].abs().min()) > 1e-4  # one later would show at every token


@torch.no_grad()
def test_a_value_does_not_see_its_token():
    # Another last token in each response: no value changes, since there is none after it. Another first one: all but
    # the first.
    head = TokenValues(build(AutoModelForSequenceClassification, "packed", num_labels=1))
    before = head(collate.packed(ROWS))["value_BT"]
    changed = {"last": [[*row[:-1], 20] for row in ROWS.responses.lists()]}
    changed["first"] = [[20, *row[1:]] for row in ROWS.responses.lists()]
    moved = {
        name: (
            head(collate.packed(Sequences(ROWS.prompts, Packed.from_lists(rows), ROWS.prompt_B)))["value_BT"] - before
        )
        for name, rows in changed.items()
    }
    assert float(moved["last"].abs().max()) < 1e-6
    assert float(moved["first"][:, 0].abs().max()) < 1e-6
    assert float(moved["first"][:, 1:][ROWS.mask_BT[:, 1:]].abs().min()) > 1e-4


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
@torch.no_grad()
def test_values_of_responses_that_share_a_prompt(attention):
    head = TokenValues(build(AutoModelForSequenceClassification, attention, num_labels=1))
    lay = collate.packed if attention == "packed" else collate.padded
    apart = Sequences(ROWS.prompts.select(ROWS.prompt_B), ROWS.responses, torch.arange(len(ROWS)))
    shared, alone = (head(lay(rows))["value_BT"] for rows in (ROWS, apart))
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-6)
    first_B = shared[:, 0]  # the state before the first token is that of the prompt
    torch.testing.assert_close(first_B, first_B[[0, 0, 0, 3, 3, 3]], rtol=0, atol=1e-6)
    assert abs(float(first_B[0] - first_B[3])) > 1e-3


@torch.no_grad()
def test_an_architecture_that_cannot_be_packed():
    own = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    model, causal = build(AutoModelForCausalLM, "sdpa", own), build(AutoModelForCausalLM, "eager", own)
    for side in ("right", "left"):
        ours = TokenLogprobs(model)(layouts(ROWS)[side], temperature=1.0)["logprob_BT"]
        for i, (prompt, response) in enumerate(zip(ROWS.prompt_B.tolist(), ROWS.responses.lists(), strict=True)):
            row = ROWS.prompts.lists()[prompt] + response
            table = causal(torch.tensor([row])).logits[0].log_softmax(-1)
            theirs = [float(table[len(row) - len(response) + t - 1, token]) for t, token in enumerate(response)]
            assert ours[i, : len(response)].tolist() == pytest.approx(theirs, abs=1e-5)


def adapted() -> Any:
    """A Llama with adapters on the language-model head that change it."""
    model = build(AutoModelForCausalLM, "packed")
    add_lora(model, LoraConfig(rank=2, targets=["lm_head", "q_proj"]), task="CAUSAL_LM")
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def gpt2() -> Any:
    own = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    return build(AutoModelForCausalLM, "sdpa", own)


@pytest.mark.parametrize(("make", "layout"), [(adapted, "packed"), (gpt2, "right")])
def test_heads_with_adapters_and_other_architectures_are_read_in_chunks_too(make, layout):
    layout, weight_2BT = layouts(ROWS)[layout], torch.randn(2, *ROWS.mask_BT.shape)
    gradients = []
    for chunk in (4, 128):
        logprobs.MIN_CHUNK = chunk  # the fixture restores it
        model = make()
        outputs = TokenLogprobs(model)(layout, temperature=0.6)
        (weight_2BT[0] * outputs["logprob_BT"] + weight_2BT[1] * outputs["entropy_BT"]).sum().backward()
        trained = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        assert all(gradient is not None and gradient.any() for gradient in trained.values())
        gradients.append(outputs | trained)
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_head_still_gives_logits():
    model = build(AutoModelForCausalLM, "sdpa")
    before = model(torch.tensor([[3, 4, 5]])).logits
    assert type(lm_head(model)) is torch.nn.Linear
    head = TokenLogprobs(TokenLogprobs(model).model)
    assert model(torch.tensor([[3, 4, 5]])).logits.equal(before)
    outputs = head(layouts(ROWS)["right"], temperature=1.0, entropy=False)
    assert list(outputs) == ["logprob_BT"]


@torch.no_grad()
def test_bfloat16_scores_values_and_logprobs_come_as_float32():
    for auto, head, arguments in (
        (AutoModelForSequenceClassification, LastTokenScore, {}),
        (AutoModelForSequenceClassification, TokenValues, {}),
        (AutoModelForCausalLM, RowZeroLogit, {}),
        (AutoModelForCausalLM, TokenLogprobs, {"temperature": 1.0}),
    ):
        own = config(num_labels=1)
        torch.manual_seed(5)
        model = auto.from_config(own, attn_implementation="packed", dtype=torch.bfloat16).eval()
        outputs = head(model)(layouts(ROWS)["packed"], **arguments)
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in outputs.values())


def test_a_classifier_has_no_language_model_head():
    with pytest.raises(ModelError, match="no language-model head"):
        lm_head(build(AutoModelForSequenceClassification, "sdpa", num_labels=1))
