"""What computes with tensors, as cases that run on any device: heads, losses, adapters, decoding, reward checkpoints.

A case takes a device and returns tensors by name: outputs, losses and gradients.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from align.algorithms import _policy_loss, _preference_loss, ppo
from align.config import LoraConfig, PolicyLossConfig, PreferenceLossConfig, SamplingConfig
from align.data import collate
from align.engines.decoder import Decoder, generate_any
from align.models import export, lora
from align.models.heads import (
    Head,
    LastTokenAttributes,
    LastTokenScore,
    LogitDifference,
    RowZeroLogit,
    TokenizerIds,
    TokenLogprobs,
    TokenValues,
    restrict,
)
from align.rewards.card import Card
from align.rewards.scorers import build_scorer
from align.types import Packed, Prompts, Sequences

sys.path += [str(Path(__file__).parent), *(str(Path(__file__).parents[1] / name) for name in ("rewards", "models"))]
from reward_models import DIALOGUES, NAMES, SIZES, section, words

torch.set_num_threads(1)
CPU = torch.device("cpu")
VOCAB = 64
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
Case = Callable[[torch.device], dict[str, Tensor]]
CASES: dict[str, Case] = {}


def rows() -> Sequences:
    """Six responses to three prompts, in pairs."""
    source = torch.Generator().manual_seed(1)
    row = lambda length: torch.randint(0, VOCAB, (length,), generator=source).tolist()  # noqa: E731
    return Sequences(
        Packed.from_lists([row(n) for n in (5, 2, 9)]),
        Packed.from_lists([row(n) for n in (4, 7, 1, 3, 12, 2)]),
        torch.tensor([0, 0, 1, 1, 2, 2]),
    )


def build(config: Any, auto: Any = AutoModelForCausalLM, attention: str = "packed", num_labels: int = 1) -> Any:
    torch.manual_seed(5)
    config = copy.deepcopy(config)
    config.num_labels = num_labels
    return auto.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def on(device: torch.device, model: Any) -> Any:
    """``model``, moved in place. Models are made on the CPU, so that their random weights are the same everywhere."""
    return model.to(device)


def with_gradients(outputs: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """``outputs``, and the gradient of a weighted sum of them for every trained parameter."""
    total = sum((o * torch.linspace(-1, 1, o.numel()).view(o.shape).to(o.device)).sum() for o in outputs.values())
    total.backward()  # type: ignore[union-attr]
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads
    return outputs | grads


@dataclass(frozen=True)
class HeadCase:
    """Outputs of a head and gradients of all weights."""

    head: Callable[[Any], Head]
    attention: str = "packed"
    config: Any = field(default_factory=lambda: LlamaConfig(**CONFIG))
    auto: Any = AutoModelForCausalLM
    num_labels: int = 1
    arguments: dict[str, float] = field(default_factory=dict)

    def __call__(self, device: torch.device) -> dict[str, Tensor]:
        model = on(device, build(self.config, self.auto, self.attention, self.num_labels))
        layout = (collate.packed if self.attention == "packed" else collate.padded)(rows()).to(device)
        return with_gradients(self.head(model)(layout, **self.arguments), model)


CLASSIFIER = AutoModelForSequenceClassification
for attention in ("packed", "sdpa"):
    CASES |= {
        f"token_logprobs {attention}": HeadCase(TokenLogprobs, attention, arguments={"temperature": 0.7}),
        f"last_token_score {attention}": HeadCase(LastTokenScore, attention, auto=CLASSIFIER),
        f"last_token_attributes {attention}": HeadCase(LastTokenAttributes, attention, auto=CLASSIFIER, num_labels=5),
        f"token_values {attention}": HeadCase(TokenValues, attention, auto=CLASSIFIER),
        f"row_zero_logit {attention}": HeadCase(RowZeroLogit, attention),
        f"logit_difference {attention}": HeadCase(partial(LogitDifference, more=3, less=7), attention),
    }
GPT2 = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4)
QWEN2, QWEN3 = Qwen2Config(**CONFIG, tie_word_embeddings=True), Qwen3Config(**CONFIG, head_dim=16)
for name, config, attention in (("qwen2", QWEN2, "packed"), ("qwen3", QWEN3, "packed"), ("gpt2", GPT2, "sdpa")):
    CASES[f"token_logprobs {name}"] = HeadCase(TokenLogprobs, attention, config, arguments={"temperature": 1.0})


def gaps(device: torch.device) -> dict[str, Tensor]:
    """A tokenizer that lacks ids 3, 9, 62 and 63."""
    model = on(device, build(LlamaConfig(**CONFIG)))
    restrict(model, TokenizerIds(VOCAB - 2, (3, 9)))
    sequences = rows()
    ids = sequences.responses.ids_N % 52 + 10
    layout = collate.packed(replace(sequences, responses=Packed(ids, sequences.responses.offsets_B1)))
    return with_gradients(TokenLogprobs(model)(layout.to(device), temperature=1.0), model)


CASES["token_logprobs gaps"] = gaps


# Losses


def _columns(device: torch.device, names: str) -> dict[str, Tensor]:
    sequences = rows()
    B, T = sequences.mask_BT.shape
    source = torch.Generator().manual_seed(2)
    make = lambda name: torch.randn((B, T) if name.endswith("_BT") else (B,), generator=source)  # noqa: E731
    return {name: make(name).to(device) for name in names.split()}


def policy_loss(device: torch.device, how: PolicyLossConfig) -> dict[str, Tensor]:
    values = _columns(device, "logprob_BT entropy_BT advantage_BT old_BT rollout_BT reference_BT")
    for name in ("logprob_BT", "entropy_BT"):
        values[name].requires_grad_()
    mask_BT, learnable_B = rows().mask_BT.to(device), torch.tensor([1, 1, 0, 1, 1, 1]).bool().to(device)
    loss = _policy_loss.loss(
        mask_BT=mask_BT, learnable_B=learnable_B, **values, how=how, kl_coef=0.1, estimator="k3", max_tokens=16
    )
    (loss.sum / loss.count).backward()
    metrics = {name: total / count for name, (total, count) in loss.metrics.items()}
    return {"loss": loss.sum, "logprob": values["logprob_BT"].grad, "entropy_grad": values["entropy_BT"].grad} | metrics


def preference_loss(device: torch.device, how: PreferenceLossConfig) -> dict[str, Tensor]:
    values = _columns(device, "logprob_BT entropy_BT reference_B strength_B gold_B")
    values["logprob_BT"].requires_grad_()
    loss = _preference_loss.loss(mask_BT=rows().mask_BT.to(device), **values, how=how)
    total = sum(term / count for term, count in loss.terms)
    total.backward()  # type: ignore[union-attr]
    metrics = {name: value / count for name, (value, count) in loss.metrics.items()}
    return {"loss": loss.sum, "logprob": values["logprob_BT"].grad} | metrics


def kinds(schema: type) -> tuple[str, ...]:
    return get_args(get_type_hints(schema)["kind"])


for kind in kinds(PolicyLossConfig):
    for aggregation in get_args(get_type_hints(PolicyLossConfig)["aggregation"]):
        if not kind.startswith("sequence") or aggregation == "sequence_mean_token_mean":
            how = PolicyLossConfig(
                kind=kind, aggregation=aggregation, entropy_coef=0.01, dual_clip=3.0 if kind == "clipped" else None
            )
            CASES[f"policy loss {kind} {aggregation}"] = partial(policy_loss, how=how)
for kind in kinds(PreferenceLossConfig):
    CASES[f"preference loss {kind}"] = partial(preference_loss, how=PreferenceLossConfig(kind=kind, sft_coef=0.1))


def critic(device: torch.device) -> dict[str, Tensor]:
    model = on(device, build(LlamaConfig(**CONFIG), AutoModelForSequenceClassification))
    outputs = TokenValues(model)(collate.packed(rows()).to(device))
    columns, learnable_B = _columns(device, "old_BT return_BT"), torch.ones(6, dtype=torch.bool).to(device)
    loss = ppo.value_loss(mask_BT=rows().mask_BT.to(device), **outputs, **columns, learnable_B=learnable_B, clip=0.2)
    (loss.sum / loss.count).backward()
    return {"loss": loss.sum} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


CASES["critic"] = critic


# Adapters and export


def _adapted(device: torch.device) -> Any:
    model = lora.add_lora(build(LlamaConfig(**CONFIG)), LoraConfig(rank=2), task="CAUSAL_LM")
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return on(device, model)


def adapters(device: torch.device) -> dict[str, Tensor]:
    model = _adapted(device)
    return with_gradients(TokenLogprobs(model)(collate.packed(rows()).to(device), temperature=1.0), model)


def merged(device: torch.device) -> dict[str, Tensor]:
    whole = lambda parameters: nullcontext()  # noqa: E731
    model = _adapted(device)
    dtype = export.merged_dtype(model, whole, torch.bfloat16)
    return {name: value.clone() for name, value in export.merged_weights(model, whole, dtype)}


CASES |= {"lora": adapters, "merged weights": merged}


# Decoding

PROMPTS = Prompts(
    Packed.from_lists([[1, 2, 3, 4, 5], [6, 7, 8], [9] * 9, [4] * 7]), torch.arange(4), stop_ids=(11, 12, 13), step=3
)


def decode(device: torch.device, **filters: Any) -> dict[str, Tensor]:
    """12 sequences in 5 slots: finished ones leave, others enter."""
    model = on(device, build(LlamaConfig(**CONFIG)))
    sample = SamplingConfig(num_samples=3, max_tokens=16, **filters)
    out = Decoder(model, 5).generate(PROMPTS, sample, seed=3)
    assert out.finished_B.any() and not out.finished_B.all()
    responses = out.sequences.responses
    return {"ids": responses.ids_N, "offsets": responses.offsets_B1, "logprobs": out.logprob_BT}


def decode_any(device: torch.device) -> dict[str, Tensor]:
    model = on(device, build(GPT2, attention="sdpa"))
    out = generate_any(model, PROMPTS, SamplingConfig(num_samples=2, max_tokens=8), 3, 3)
    return {"ids": out.sequences.responses.ids_N, "logprobs": out.logprob_BT}


CASES |= {
    "decoder": decode,
    "decoder greedy": partial(decode, temperature=0.0),
    "decoder filters": partial(decode, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01),
    "generate_any": decode_any,
}


# Reward checkpoints


def reward(device: torch.device, auto: Any, options: dict[str, Any], card: Card | None = None, **fields: Any):
    tokenizer = words()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), **SIZES, pad_token_id=tokenizer.pad_token_id, **fields)
        auto.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if card is not None:
            (Path(folder) / "align_reward.json").write_text(card.dumps())
        scorer: Any = build_scorer(section(folder, **options), CPU)
        on(device, scorer.engine.head)
        scorer.engine.device = device
        return {"score_B": scorer.score(DIALOGUES)}


CASES |= {
    "reward one label": partial(reward, auto=CLASSIFIER, options={}, num_labels=1),
    "reward attributes": partial(
        reward,
        auto=CLASSIFIER,
        options={"weights": {"helpfulness": 1.0, "verbosity": -0.5}},
        num_labels=5,
        id2label=dict(enumerate(NAMES)),
    ),
    "reward row zero": partial(reward, auto=AutoModelForCausalLM, options={}, card=Card("lm_head_row0")),
    "reward yes and no": partial(
        reward, auto=AutoModelForCausalLM, options={"head": "yes_no", "principle": "accuracy of the answer"}
    ),
}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|; infinite where shape or dtype differ."""
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    scale = max(float(expected.double().norm()), 1e-30)
    return float((got.double() - expected.double()).norm()) / scale
