"""Packed attention against whole sequences, one at a time and padded: states, log-probabilities, scores, gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from align.data import collate
from align.models.attention import is_plain, packed_attention
from align.models.heads import LastTokenScore, TokenLogprobs
from align.types import Packed, Sequences

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "num_labels": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama all heads": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
}


def build(config: Any, attention: str, auto: Any = AutoModelForCausalLM) -> Any:
    torch.manual_seed(5)
    return auto.from_config(copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32).eval()


def sequences(prompts: list[int], responses: list[list[int]]) -> Sequences:
    source = torch.Generator().manual_seed(1)
    row = lambda length: torch.randint(0, 50, (length,), generator=source).tolist()  # noqa: E731
    return Sequences(
        Packed.from_lists([row(length) for length in prompts]),
        Packed.from_lists([row(length) for lengths in responses for length in lengths]),
        torch.tensor([i for i, lengths in enumerate(responses) for _ in lengths]),
    )


SHAPES = {
    "shared prompts": ([3, 9, 1, 14], [[4, 7, 4], [1, 2], [6], [5, 12, 3, 30]]),
    "single": ([5], [[3]]),
    "no response": ([5, 2], [[3, 0], [0]]),
    "one token each": ([1, 1], [[1], [1, 1]]),
    "many lengths": (list(range(1, 12)), [[length] for length in range(12, 1, -1)]),
}


def wholes(rows: Sequences) -> list[Tensor]:
    prompts, responses = rows.prompts.lists(), rows.responses.lists()
    return [torch.tensor([prompts[p] + r]) for p, r in zip(rows.prompt_B.tolist(), responses, strict=True)]


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads, strict=True)}


def logprobs_one_by_one(model: Any, rows: Sequences, temperature: float) -> Tensor:
    out = []
    lengths = rows.responses.lengths_B.tolist()
    for ids, length in zip(wholes(rows), lengths, strict=True):
        table = (model(ids).logits[0, :-1] / temperature).log_softmax(-1)
        picked = table.gather(1, ids[0, 1:, None]).squeeze(1)
        out.append(torch.nn.functional.pad(picked[len(picked) - length :], (0, max(lengths) - length)))
    return torch.stack(out)


def scores_one_by_one(model: Any, rows: Sequences) -> Tensor:
    return torch.cat([model.score(model.model(ids).last_hidden_state[:, -1]).squeeze(-1) for ids in wholes(rows)])


@pytest.mark.parametrize("layout", ["packed", "right", "left"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_and_gradients(name, shape, layout):
    rows, oracle = sequences(*SHAPES[shape]), build(CONFIGS[name], "eager")
    model = build(CONFIGS[name], "packed" if layout == "packed" else "sdpa")
    laid = collate.packed(rows) if layout == "packed" else collate.padded(rows, side=layout)
    ours = TokenLogprobs(model)(laid, temperature=0.7)["logprob_BT"]
    theirs = logprobs_one_by_one(oracle, rows, 0.7)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    weight_BT = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)) / max(1, int(rows.mask_BT.sum()))
    ours_g = gradients(model, (ours * weight_BT).sum())
    theirs_g = gradients(oracle, (theirs * weight_BT).sum())
    assert max(float(g.abs().max()) for g in theirs_g.values()) > 1e-3
    for key, value in theirs_g.items():
        torch.testing.assert_close(ours_g[key], value, rtol=0, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("layout", ["packed", "right", "left"])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_and_gradients(shape, layout):
    rows, config = sequences(*SHAPES[shape]), CONFIGS["llama"]
    oracle = build(config, "eager", AutoModelForSequenceClassification)
    model = build(config, "packed" if layout == "packed" else "sdpa", AutoModelForSequenceClassification)
    laid = collate.packed(rows) if layout == "packed" else collate.padded(rows, side=layout)
    ours, theirs = LastTokenScore(model)(laid)["score_B"], scores_one_by_one(oracle, rows)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    ours_g, theirs_g = (gradients(m, 0.1 * x.square().mean()) for m, x in ((model, ours), (oracle, theirs)))
    assert max(float(g.abs().max()) for g in theirs_g.values()) > 1e-3
    for key, value in theirs_g.items():
        torch.testing.assert_close(ours_g[key], value, rtol=0, atol=1e-6)


def test_hidden_states_of_every_token():
    rows, config = sequences(*SHAPES["shared prompts"]), CONFIGS["llama"]
    model, oracle = build(config, "packed"), build(config, "eager")
    layout = collate.packed(rows)
    with torch.no_grad():
        body = model.model(input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, layout=layout)
        states = body.last_hidden_state[0]
        prompts = torch.cat([oracle.model(torch.tensor([p])).last_hidden_state[0] for p in rows.prompts.lists()])
        responses = [
            oracle.model(ids).last_hidden_state[0, ids.shape[1] - length :]
            for ids, length in zip(wholes(rows), rows.responses.lengths_B.tolist(), strict=True)
        ]
    torch.testing.assert_close(states, torch.cat([prompts, *responses]), rtol=0, atol=2e-6)
    assert len(states) == 27 + 74  # each prompt once


def test_a_neighbour_changes_nothing():
    rows = sequences(*SHAPES["shared prompts"])
    ids = rows.responses.ids_N.clone()
    ids[rows.responses.offsets_B1[1] : rows.responses.offsets_B1[2]] = 7  # the second response only
    other = Sequences(rows.prompts, Packed(ids, rows.responses.offsets_B1), rows.prompt_B)
    head = TokenLogprobs(build(CONFIGS["llama"], "packed"))
    with torch.no_grad():
        a, b = (head(collate.packed(x), temperature=1.0)["logprob_BT"] for x in (rows, other))
    changed = (a != b).any(1)
    assert changed.nonzero().flatten().tolist() == [1]


def test_what_may_be_packed():
    assert all(is_plain(config) for config in CONFIGS.values())
    assert not is_plain(GPT2Config())
    assert not is_plain(MistralConfig(**SIZES, sliding_window=8))
    windowed = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert not is_plain(windowed)
    assert is_plain(Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=8))


def test_packed_attention_refuses_a_mask_or_no_layout():
    q = torch.zeros(1, 2, 3, 4)
    layout = collate.packed(sequences([2], [[1]]))
    with pytest.raises(ValueError, match="takes no mask"):
        packed_attention(torch.nn.Module(), q, q, q, torch.ones(1, 3), layout=layout)
    with pytest.raises(ValueError, match="needs the layout"):
        packed_attention(torch.nn.Module(), q, q, q, None)


def test_a_packed_model_called_without_a_layout_is_refused():
    with pytest.raises(ValueError, match="needs the layout"):
        build(CONFIGS["llama"], "packed")(torch.tensor([[1, 2, 3]]))
