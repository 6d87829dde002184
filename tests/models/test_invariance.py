"""Every number of a sequence against plain transformers on that sequence alone, whatever its neighbors are.

Log-probabilities, scores, values and sampled tokens over architectures, rotary types and kinds of attention, as a
recipe loads them, in calls of long and short sequences after each other, padded left, right or packed.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from align.config import ModelConfig, OptimizerConfig, PolicyConfig, RewardConfig, SamplingConfig, TrainedRewardConfig
from align.data import collate
from align.engines.decoder import generate
from align.errors import ModelError
from align.models import load
from align.models.heads import LastTokenScore, LogitDifference, RowZeroLogit, TokenLogprobs, TokenValues
from align.models.invariance import constant_length, set_dropout
from align.types import Packed, Prompts, Sequences

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
VOCABULARY, LIMIT = 60, 20
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.7}
SHORT = {"max_position_embeddings": LIMIT}
HALF = {"rope_parameters": DYNAMIC | {"partial_rotary_factor": 0.5}, **SHORT}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
PHI3 = {"original_max_position_embeddings": LIMIT, "max_position_embeddings": 64, "rope_parameters": LONGROPE}
MSCALE = {"short_mscale": 1.1, "long_mscale": 1.3, "original_max_position_embeddings": LIMIT}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 4}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}


def scaled(kind: str, **fields: Any) -> dict[str, Any]:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    return {"max_position_embeddings": 64, "rope_parameters": parameters | fields}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama linear": ("llama", scaled("linear")),
    "llama yarn": ("llama", scaled("yarn")),
    "llama llama3": ("llama", scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama dynamic": ("llama", {"rope_parameters": DYNAMIC, **SHORT}),
    "llama longrope": ("llama", PHI3),
    "qwen2": ("qwen2", {}),
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen2 dynamic": ("qwen2", {"rope_parameters": DYNAMIC, **SHORT}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral window": ("mistral", {"sliding_window": 8}),
    "phi3 longrope": ("phi3", PHI3),
    "phi3 window": ("phi3", {"sliding_window": 8}),
    "phimoe longrope": ("phimoe", PHI3 | {"rope_parameters": LONGROPE | MSCALE}),
    "phi dynamic": ("phi", HALF),
    "gpt_neox dynamic": ("gpt_neox", HALF),
    "stablelm dynamic": ("stablelm", HALF),
    "falcon dynamic": ("falcon", {"rope_parameters": DYNAMIC, **SHORT}),
    "falcon alibi": ("falcon", {"alibi": True}),
    "gemma2 soft caps": ("gemma2", GEMMA | CAPS),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3 dynamic": (
        "gemma3_text",
        GEMMA
        | SHORT
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": 8, "router_jitter_noise": 0.3}),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "olmoe": ("olmoe", EXPERTS),
    "gpt_oss sinks": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        MLA | ROUTED | {"moe_intermediate_size": 16, "num_key_value_heads": 4, "head_dim": 8},
    ),
    "cohere logit scale": ("cohere", {"logit_scale": 0.25}),
    "granite multipliers": (
        "granite",
        {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    ),
    "gpt2": ("gpt2", {}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "bloom alibi": ("bloom", {}),
    "mpt alibi": ("mpt", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bamba state": ("bamba", MAMBA | {"attn_layer_indices": [1]}),
    "qwen3_next state": (
        "qwen3_next",
        EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16, "num_hidden_layers": 4},
    ),
}
LONG, MIDDLE, SHORTEST = 30, 9, 3
"""Tokens of the prompts; `LONG` is beyond the length up to which ``dynamic`` and ``longrope`` change nothing."""


def row(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


BATCHES = [  # after each other, so that what a model keeps of a long sequence meets a short one
    Sequences(
        Packed.from_lists([row(SHORTEST, 0), row(LONG, 1)]),
        Packed.from_lists([row(4, 2), row(7, 3), row(5, 4)]),
        torch.tensor([0, 0, 1]),
    ),
    Sequences(Packed.from_lists([row(MIDDLE, 5)]), Packed.from_lists([row(1, 6), row(11, 7)]), torch.tensor([0, 0])),
    Sequences(
        Packed.from_lists([row(LONG, 8), row(MIDDLE, 9)]), Packed.from_lists([row(1, 6), row(8, 7)]), torch.arange(2)
    ),
]


class Alone:
    """A model of transformers that reads one sequence a call, and keeps nothing of the one before."""

    def __init__(self, auto: Any, fields: dict[str, Any], weights: dict[str, Any]):
        fields = {"vocab_size": VOCABULARY, **fields}
        attention = "sdpa" if fields.get("alibi") else "eager"  # Falcon's eager attention adds ALiBi twice
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.model = auto.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
        self.model.load_state_dict(weights)
        self.known: dict[tuple[int, ...], Any] = {}

    def __call__(self, ids: list[int]) -> Any:
        """Logits of the language model, (tokens, vocabulary), or scores at every token, (tokens,)."""
        if tuple(ids) not in self.known:
            model, read = copy.deepcopy(self.model), torch.tensor([ids])
            if hasattr(model, "score"):
                body = getattr(model, model.base_model_prefix)
                out = model.score(body(read, use_cache=False).last_hidden_state)[0, :, 0]
            else:
                out = model(read, use_cache=False).logits[0]
            self.known[tuple(ids)] = out
        return self.known[tuple(ids)]


def loaded(make: Any, section: ModelConfig, **arguments: Any) -> Any:
    """The model of a section, with biases and norms that are not 0 and 1."""
    model = make(section, VOCABULARY, 0, **arguments).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def section(name: str, kind: Any = PolicyConfig, **changes: Any) -> Any:
    model_type, fields = CASES[name]
    init = {"model_type": model_type, **SIZES, **fields}
    trained = {"optimizer": OptimizerConfig(lr=1.0)} if kind is not RewardConfig else {}
    return kind(path="", init=init, dtype="float32", **trained, **changes)


def layouts(head: Any, rows: Sequences) -> list[collate.Layout]:
    if head.packed:
        return [collate.packed(rows)]
    return [collate.padded(rows, side="left"), collate.padded(rows, side="right")]


def wholes(rows: Sequences) -> list[tuple[list[int], int]]:
    """Tokens of each prompt with its response, and the length of the prompt."""
    prompts = rows.prompts.lists()
    pairs = zip(rows.prompt_B.tolist(), rows.responses.lists(), strict=True)
    return [(prompts[p] + response, len(prompts[p])) for p, response in pairs]


def logprobs_alone(alone: Alone, rows: Sequences) -> torch.Tensor:
    out_BT = torch.zeros(rows.mask_BT.shape)
    for i, (ids, start) in enumerate(wholes(rows)):
        table = alone(ids)[start - 1 : -1].log_softmax(-1)
        out_BT[i, : len(table)] = table[range(len(table)), ids[start:]]
    return out_BT


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 5e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_numbers_of_a_language_model_are_those_of_each_sequence_alone(name):
    policy = section(name)
    load.check(policy, VOCABULARY)
    model = loaded(load.causal_lm, policy)
    head, difference, zero = TokenLogprobs(model), LogitDifference(model, 5, 9), RowZeroLogit(model)
    alone = Alone(AutoModelForCausalLM, policy.init, model.state_dict())
    for rows in BATCHES:
        theirs_BT = logprobs_alone(alone, rows)
        last_BV = torch.stack([alone(ids)[-1] for ids, _ in wholes(rows)])
        for layout in layouts(head, rows):
            close(head(layout, temperature=1.0)["logprob_BT"], theirs_BT)
            model.train()  # what gradients are of: no dropout, no jitter
            close(head(layout, temperature=1.0)["logprob_BT"], theirs_BT)
            model.eval()
            close(difference(layout)["score_B"], last_BV[:, 5] - last_BV[:, 9])
            close(zero(layout)["score_B"], last_BV[:, 0])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_sampled_tokens_are_those_of_each_prompt_alone(name):
    policy = section(name)
    model = loaded(load.causal_lm, policy)
    sampling = SamplingConfig(num_samples=2, max_tokens=6)
    ids = [row(SHORTEST, 0), row(MIDDLE, 5)] + ([row(LONG, 1)] if constant_length(model.config) is None else [])
    answer = lambda rows, index: generate(model, Prompts(Packed.from_lists(rows), index, (59,), 1), sampling, 3, 8)  # noqa: E731
    together = answer(ids, torch.arange(len(ids)))
    apart = [answer([prompt], torch.tensor([i])).sequences.responses.lists() for i, prompt in enumerate(ids)]
    assert together.sequences.responses.lists() == [response for responses in apart for response in responses]
    alone = Alone(AutoModelForCausalLM, policy.init, model.state_dict())
    close(together.logprob_BT, logprobs_alone(alone, together.sequences), atol=2e-4)  # scans of states are rounded


SCORED = [name for name in CASES if CASES[name][0] not in ("cohere", "granite", "olmoe", "bamba")]
"""Architectures of which transformers has sequence classifiers."""


@pytest.mark.parametrize("name", SCORED)
@torch.no_grad()
def test_scores_and_values_are_those_of_each_sequence_alone(name):
    reward = section(name, TrainedRewardConfig)
    load.check(reward, VOCABULARY)
    model = loaded(load.scorer, reward, head="auto")
    score, value = LastTokenScore(model), TokenValues(model)
    alone = Alone(AutoModelForSequenceClassification, reward.init | {"num_labels": 1}, model.state_dict())
    for rows in BATCHES:
        states = [alone(ids) for ids, _ in wholes(rows)]
        values_BT = torch.zeros(rows.mask_BT.shape)
        for i, (ids, start) in enumerate(wholes(rows)):
            values_BT[i, : len(ids) - start] = states[i][start - 1 : -1]
        for layout in layouts(score, rows):
            close(score(layout)["score_B"], torch.stack([state[-1] for state in states]))
            close(value(layout)["value_BT"], values_BT)


def test_the_classifiers_of_transformers_score_the_last_token():
    # The oracle of scores reads body and head; this is what `forward` of the classifier makes of them.
    fields = {"model_type": "gemma2", **SIZES, **GEMMA, **CAPS, "num_labels": 1, "vocab_size": VOCABULARY}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    alone = Alone(AutoModelForSequenceClassification, {"model_type": "gemma2", **fields}, model.state_dict())
    close(alone(row(MIDDLE, 5))[-1], model(torch.tensor([row(MIDDLE, 5)])).logits[0, 0])


@pytest.mark.parametrize(("name", "length"), [("llama dynamic", LIMIT), ("phi3 longrope", LIMIT), ("llama yarn", None)])
def test_lengths_that_cannot_be_sampled_are_refused(name, length):
    policy = section(name)
    model = load.causal_lm(policy, VOCABULARY, 0)
    assert constant_length(model.config) == length
    ask = lambda tokens: generate(  # noqa: E731
        model,
        Prompts(Packed.from_lists([row(MIDDLE, 0)]), torch.tensor([0]), (59,), 1),
        SamplingConfig(max_tokens=tokens),
        3,
        8,
    )
    load.check(policy, VOCABULARY, "policy", sampled=LIMIT)
    ask(LIMIT - MIDDLE)
    if length is None:
        load.check(policy, VOCABULARY, "policy", sampled=LIMIT + 1)
        return
    for refuse in (
        lambda: load.check(policy, VOCABULARY, "policy", sampled=LIMIT + 1),
        lambda: ask(LIMIT + 1 - MIDDLE),
    ):
        with pytest.raises(ModelError, match=f"take {LIMIT + 1} tokens, and above {LIMIT} .*\n.*lower data.max_prompt"):
            refuse()


@pytest.mark.parametrize("kind", ["rwkv", "recurrent_gemma"])
def test_a_state_that_reads_padding_is_not_sampled(kind):
    policy = PolicyConfig(
        path="", init={"model_type": kind, "num_hidden_layers": 3}, dtype="float32", optimizer=OptimizerConfig(lr=1.0)
    )
    with pytest.raises(ModelError, match=f"policy.path: {kind}: {kind} cannot sample for a batch of prompts"):
        load.check(policy, VOCABULARY, "policy", sampled=1)


def test_an_encoder_is_no_language_model():
    sizes = {name: value for name, value in SIZES.items() if not name.endswith("_id")}
    init = {"model_type": "bert", "pad_token_id": 0, **sizes}
    policy = PolicyConfig(path="", init=init, dtype="float32", optimizer=OptimizerConfig(lr=1.0))
    with pytest.raises(ModelError, match="BertLMHeadModel attends to later tokens"):
        load.check(policy, VOCABULARY)
    load.check(
        PolicyConfig(path="", init=init | {"is_decoder": True}, dtype="float32", optimizer=OptimizerConfig(lr=1.0)),
        VOCABULARY,
    )
    with pytest.raises(ModelError, match="BertForSequenceClassification has no `score` head"):
        load.check(
            TrainedRewardConfig(path="", init=init, dtype="float32", optimizer=OptimizerConfig(lr=1.0)), VOCABULARY
        )


def test_dropout_is_set_wherever_a_config_has_it():
    config = AutoConfig.for_model("opt", attention_dropout=0.3, layerdrop=0.2)
    set_dropout(config, 0.1)
    assert (config.dropout, config.attention_dropout, config.layerdrop) == (0.1, 0.1, 0.0)
    nested = AutoConfig.for_model("mpt", emb_pdrop=0.4)
    nested.attn_config.attn_pdrop = 1
    set_dropout(nested, 0.0)
    assert (nested.emb_pdrop, nested.attn_config.attn_pdrop) == (0.0, 0)
