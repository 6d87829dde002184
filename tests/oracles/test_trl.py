"""Losses, gradients and advantages against TRL's trainers: the same rows, the same weights, float32.

On one side a trainer of TRL from text to gradient, on the other our tokens, layouts, heads and `align.ops`.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from align.data import collate, toy
from align.data.chat import Message, Renderer
from align.models.heads import LastTokenScore, TokenLogprobs
from align.ops import advantages, kl, losses, policy_losses, preference_losses, rewards
from align.ops.logprobs import masked_mean, masked_sum
from align.types import Packed, Sequences


def _oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trl_oracle", Path(__file__).with_name("trl_oracle.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["trl_oracle"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


oracle = _oracle()

TOKENIZER = toy.tokenizer()
PAIRS = [
    oracle.Pair("reverse the words : cat dog sun", "sun dog cat", "cat dog sun okay well indeed", 3.0),
    oracle.Pair("sort the words : owl ant", "ant owl", "owl", 1.0),
    oracle.Pair("say the last word : box key ice jam", "jam thanks hello friend thanks", "box", 2.0),
    oracle.Pair("drop the first word : leaf milk", "milk", "leaf milk", 1.0),
    oracle.Pair("repeat the words : pen pig rain ship", "pen pig rain ship", "ship rain pig pen", 2.0),
]
ATTENTION = ["packed", "sdpa"]


def llama(seed: int, auto: Any = AutoModelForCausalLM, **changes: Any) -> Any:
    """A tiny random Llama with the vocabulary of the bundled task."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(TOKENIZER), num_key_value_heads=2, initializer_range=0.1, **sizes, **changes)
    return auto.from_config(config, attn_implementation="sdpa")


def twin(model: Any, attention: str, auto: Any = AutoModelForCausalLM) -> Any:
    """The same weights under another attention, untouched by a trainer."""
    other = auto.from_config(LlamaConfig(**model.config.to_dict()), attn_implementation=attention)
    other.load_state_dict(model.state_dict())
    return other


def disturb(model: Any, size: float, seed: int) -> None:
    """Move every weight by Gaussian noise."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=source), alpha=size)


def as_pairs(pairs: list[Any]) -> Sequences:
    """Our tokens of the same pairs: rows 2i and 2i + 1."""
    renderer = Renderer(TOKENIZER)
    prompts, responses = [], []
    for pair in pairs:
        prompt, both = renderer.dialogue_ids([Message("user", pair.prompt)], [pair.chosen, pair.rejected])
        prompts.append(prompt)
        responses += both
    of = torch.arange(len(pairs)).repeat_interleave(2)
    return Sequences(Packed.from_lists(prompts), Packed.from_lists(responses), of)


def conversations(sequences: Sequences) -> list[list[int]]:
    """Prompt and response of each pair's preferred row, then of each rejected one."""
    prompts, responses = sequences.prompts.lists(), sequences.responses.lists()
    rows = [prompts[p] + response for p, response in zip(sequences.prompt_B.tolist(), responses, strict=True)]
    return rows[0::2] + rows[1::2]


def logprobs(model: Any, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    head = TokenLogprobs(model)
    layout = collate.packed(sequences) if head.packed else collate.padded(sequences)
    return head(layout, temperature)["logprob_BT"]


def assert_same(loss: Tensor, model: Any, answer: Any) -> None:
    """Equal loss to 2e-6, and gradient of every weight to 3e-6 of the largest (measured: 0.7e-6 and 1.5e-6)."""
    model.zero_grad()
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert gradients.keys() == answer.gradients.keys()
    assert loss.item() == pytest.approx(answer.loss, abs=2e-6, rel=2e-6)
    scale = max(float(gradient.abs().max()) for gradient in answer.gradients.values())
    assert scale > 1e-3
    atol = 3e-6 * max(scale, 0.1)  # rounding does not shrink with a gradient that is small because terms cancel
    for name, gradient in answer.gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


# Direct preference optimization

BETA, SMOOTHING = 0.4, 0.2
LABEL = torch.full((len(PAIRS),), math.log((1 - SMOOTHING) / SMOOTHING))
"""A gold difference whose sigmoid is 1 - SMOOTHING."""

DPO = {
    "sigmoid": lambda d, mean_d: preference_losses.dpo(d, BETA),
    "hinge": lambda d, mean_d: preference_losses.hinge(d, BETA),
    "ipo": lambda d, mean_d: preference_losses.ipo(mean_d, BETA),
    "robust": lambda d, mean_d: preference_losses.robust(d, BETA, SMOOTHING),
    "sigmoid_norm": lambda d, mean_d: preference_losses.dpo(mean_d, BETA),
    # KL of the policy's preference to a label of probability 1 - SMOOTHING (EXO, arXiv 2402.00856, equation 16)
    "exo_pair": lambda d, mean_d: preference_losses.rpo_fwd_kl(d, LABEL, BETA, 1.0),
}
"""Ours for a ``loss_type`` of TRL, from differences of sums and of token means."""


def differences(model: Any, reference: Any, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios of the tokens, and their sums and means preferred minus rejected."""
    logprob_BT, mask_BT = logprobs(model, sequences), sequences.mask_BT
    with torch.no_grad():
        ratio_BT = logprobs(reference, sequences)
    ratio_BT = logprob_BT - ratio_BT
    sum_P, mean_P = (
        preference_losses.pair_difference(reduce(ratio_BT, mask_BT)) for reduce in (masked_sum, masked_mean)
    )
    return logprob_BT, sum_P, mean_P


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", DPO)
def test_dpo(name: str, attention: str):
    model, reference = llama(1), llama(2)
    ours, frozen = twin(model, attention), twin(reference, attention)
    answer = oracle.dpo(
        model, reference, TOKENIZER, PAIRS, loss_type=[name], beta=BETA, label_smoothing=SMOOTHING, max_length=None
    )
    sequences = as_pairs(PAIRS)
    assert answer.ids == conversations(sequences)
    _, d, mean_d = differences(ours, frozen, sequences)
    assert d.min() < 0 < 1 / BETA < d.max()  # on both sides of the hinge
    assert_same(DPO[name](d, mean_d).mean(), ours, answer)


def test_dpo_with_a_likelihood_term():
    model, reference = llama(1), llama(2)
    ours, frozen, sequences = twin(model, "packed"), twin(reference, "packed"), as_pairs(PAIRS)
    answer = oracle.dpo(
        model, reference, TOKENIZER, PAIRS, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3], beta=BETA
    )
    logprob_BT, d, _ = differences(ours, frozen, sequences)
    total, count = losses.cross_entropy(logprob_BT[0::2], sequences.mask_BT[0::2])  # over all preferred tokens
    assert_same(preference_losses.dpo(d, BETA).mean() + 0.3 * total / count, ours, answer)


@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_conservative_dpo_and_backward_rpo_of_one_pair(pair: int):
    # TRL's `sigmoid` ignores label smoothing. `aot_unpaired` has it; it sorts the log-ratios of a batch, and one pair
    # is sorted.
    model, reference = llama(1), llama(2)
    ours, frozen, sequences = twin(model, "packed"), twin(reference, "packed"), as_pairs([PAIRS[pair]])
    smooth = {"loss_type": ["aot_unpaired"], "beta": BETA, "label_smoothing": SMOOTHING}
    answer = oracle.dpo(model, reference, TOKENIZER, [PAIRS[pair]], **smooth)
    assert_same(preference_losses.cdpo(differences(ours, frozen, sequences)[1], BETA, SMOOTHING).mean(), ours, answer)
    entropy = -SMOOTHING * math.log(SMOOTHING) - (1 - SMOOTHING) * math.log(1 - SMOOTHING)
    backward = preference_losses.rpo_bwd_kl(differences(ours, frozen, sequences)[1], LABEL[:1], BETA, 1.0)
    assert_same(backward.mean() + entropy, ours, answer)


@pytest.mark.parametrize("attention", ATTENTION)
def test_simpo(attention: str):
    model = llama(1)
    ours, sequences = twin(model, attention), as_pairs(PAIRS)
    answer = oracle.cpo(model, TOKENIZER, PAIRS, loss_type="simpo", beta=2.0, simpo_gamma=0.7)
    assert answer.ids == conversations(sequences)
    mean_d = preference_losses.pair_difference(masked_mean(logprobs(ours, sequences), sequences.mask_BT))
    assert_same(preference_losses.simpo(mean_d, 2.0, 0.7).mean(), ours, answer)


# Reward models


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("with_margin", [False, True])
def test_reward_model(with_margin: bool, attention: str):
    scorer = AutoModelForSequenceClassification
    model = llama(3, scorer, num_labels=1)
    ours, sequences = twin(model, attention, scorer), as_pairs(PAIRS)
    answer = oracle.reward(model, TOKENIZER, PAIRS, with_margin)
    assert answer.ids == conversations(sequences)
    head = LastTokenScore(ours)
    score_B = head(collate.packed(sequences) if head.packed else collate.padded(sequences))["score_B"]
    d, strength_P = preference_losses.pair_difference(score_B), torch.tensor([pair.margin for pair in PAIRS])
    loss_P = losses.margin_bradley_terry(d, strength_P) if with_margin else losses.bradley_terry(d)
    assert_same(loss_P.mean(), ours, answer)


# Sampled responses

K, MAX_TOKENS = 4, 9
PROMPTS = [pair.prompt for pair in PAIRS[:3] for _ in range(K)]
SCORES = [1.0, -2.0, 0.5, 3.0, 0.0, 0.0, 1.5, -1.0, 2.5, 2.0, -0.5, 1.0]
STOP_IDS = [2, *range(20, 42)]  # a third of the vocabulary, so that random responses differ in length


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The reference on disk: TRL reads it from where the policy came from."""
    path = tmp_path_factory.mktemp("reference")
    llama(4).save_pretrained(path)
    return path


class Run:
    """One rollout of TRL, and our log-probabilities of the same tokens."""

    def __init__(
        self, algorithm: str, folder: Path, attention: str, temperature: float, scores: list[Any], **settings: Any
    ):
        policy = AutoModelForCausalLM.from_pretrained(folder)
        reference = twin(policy, attention)
        disturb(policy, 0.03, seed=5)
        self.policy, self.ours, self.temperature = policy, twin(policy, attention), temperature
        common = {"num_generations": K, "max_completion_length": MAX_TOKENS, "temperature": temperature}
        self.online = oracle.Online(algorithm, policy, TOKENIZER, scores, STOP_IDS, **common, **settings)
        rollout = self.online.roll_out(PROMPTS)
        self.advantage_B = rollout.advantages
        of = torch.arange(len(PROMPTS) // K).repeat_interleave(K)
        self.sequences = Sequences(Packed.from_lists(rollout.prompts[::K]), Packed.from_lists(rollout.responses), of)
        assert len(set(self.sequences.responses.lengths_B.tolist())) > 3
        self.mask_BT = self.sequences.mask_BT
        with torch.no_grad():
            self.old_BT = logprobs(self.ours, self.sequences, temperature)
            self.reference_BT = logprobs(reference, self.sequences, temperature)

    def moved(self, size: float) -> Tensor:
        """Log-probabilities after both policies were moved alike."""
        disturb(self.policy, size, seed=6)
        self.ours.load_state_dict(self.policy.state_dict())
        return logprobs(self.ours, self.sequences, self.temperature)


@pytest.mark.parametrize(("attention", "temperature"), [("packed", 1.0), ("sdpa", 0.7)])
@pytest.mark.parametrize("failed", [(), (1, 6)])
def test_rloo(failed: tuple[int, ...], attention: str, temperature: float, folder: Path):
    beta, clip = 0.3, (0.1, 0.15)
    scores = [None if i in failed else score for i, score in enumerate(SCORES)]  # None: could not be scored
    run = Run(
        "rloo",
        folder,
        attention,
        temperature,
        scores,
        beta=beta,
        epsilon=clip[0],
        epsilon_high=clip[1],
        num_iterations=2,
    )

    kl_B = kl.per_sequence(kl.per_token(run.old_BT, run.reference_BT, "k1"), run.mask_BT, "sum")
    assert kl_B.abs().max() > 0.1
    score_B = torch.tensor([math.nan if score is None else score for score in scores])
    reward_B = rewards.subtract_kl(score_B, kl_B, beta)
    advantage_PK, _ = advantages.leave_one_out(reward_B.view(-1, K), ~score_B.isnan().view(-1, K))
    advantage_B = advantage_PK.flatten()
    torch.testing.assert_close(advantage_B, run.advantage_B, atol=2e-6, rtol=1e-6)
    assert (advantage_B == 0).nonzero().flatten().tolist() == list(failed)

    for size in (0.0, 0.02):  # on the policy that sampled, and off it
        logprob_BT = run.moved(size)
        answer, clipped_share = run.online.loss()
        loss_BT, clipped_BT = policy_losses.sequence_clipped(
            logprob_BT, run.old_BT, advantage_B, run.mask_BT, clip, reduction="sum"
        )
        total, count = policy_losses.aggregate(loss_BT, run.mask_BT, "sequence_mean_token_mean", MAX_TOKENS)
        assert_same(total / count, run.ours, answer)
        share = clipped_BT.any(1).float().mean().item()
        assert share == pytest.approx(clipped_share)
        assert 0 < share < 1 if size else share == 0


GROUP = {
    # loss_type, level of the ratio, delta, aggregation
    "grpo": ("grpo", "token", None, "sequence_mean_token_mean"),
    "bnpo": ("bnpo", "token", None, "token_mean"),
    "dapo": ("dapo", "token", None, "token_mean"),
    "dr_grpo": ("dr_grpo", "token", None, "constant"),
    "gspo": ("grpo", "sequence", None, "sequence_mean_token_mean"),
    "dual_clip": ("dapo", "token", 1.2, "token_mean"),
}


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
@pytest.mark.parametrize("name", GROUP)
def test_group_losses(name: str, kl_coef: float, folder: Path):
    loss_type, level, delta, aggregation = GROUP[name]
    clip = (0.1, 0.15)
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "delta": delta, "num_iterations": 2}
    settings["use_bias_correction_kl"] = False  # would multiply the KL by the ratio
    run = Run("grpo", folder, "packed", 0.9, SCORES, beta=kl_coef, epsilon=clip[0], epsilon_high=clip[1], **settings)
    logprob_BT = run.moved(0.02)
    answer, clipped_share = run.online.loss()
    if level == "token":
        advantage_BT = advantages.broadcast_to_tokens(run.advantage_B, run.mask_BT)
        loss_BT, clipped_BT = policy_losses.clipped(logprob_BT, run.old_BT, advantage_BT, run.mask_BT, clip, delta)
    else:
        loss_BT, clipped_BT = policy_losses.sequence_clipped(
            logprob_BT, run.old_BT, run.advantage_B, run.mask_BT, clip, reduction="mean"
        )
    total, count = policy_losses.aggregate(loss_BT, run.mask_BT, aggregation, MAX_TOKENS)
    loss = total / count
    if kl_coef:
        k3_BT = kl.per_token(logprob_BT, run.reference_BT, "k3")
        total, count = policy_losses.aggregate(k3_BT, run.mask_BT, aggregation, MAX_TOKENS)
        loss = loss + kl_coef * total / count
    assert_same(loss, run.ours, answer)
    assert 0 < clipped_share < 1
    if delta is not None:  # TRL does not log what delta clips
        ratio_BT = torch.where(run.mask_BT, logprob_BT - run.old_BT, 0.0).exp()
        assert ((ratio_BT > delta) & (run.advantage_B < 0)[:, None]).any()
    else:
        share = clipped_BT.any(1).float().mean() if level == "sequence" else clipped_BT.sum() / run.mask_BT.sum()
        assert share.item() == pytest.approx(clipped_share)


@pytest.mark.parametrize("scaled", [False, True])
def test_group_advantages(scaled: bool, folder: Path):
    scores = [None if i == 6 else score for i, score in enumerate(SCORES)]
    run = Run("grpo", folder, "packed", 1.0, scores, beta=0.0, scale_rewards="group" if scaled else "none")
    score_PK = torch.tensor([math.nan if score is None else score for score in scores]).view(-1, K)
    usable_PK = ~score_PK.isnan()
    if scaled:
        ours_PK, _ = advantages.group_standardized(score_PK, usable_PK)
        std_P = torch.tensor([row[ok].std() for row, ok in zip(score_PK, usable_PK, strict=True)])
        ours_PK = ours_PK * ((std_P + 1e-6) / (std_P + 1e-4))[:, None]  # TRL adds 1e-4 where we add 1e-6
    else:
        ours_PK, _ = advantages.group_centered(score_PK, usable_PK)
    torch.testing.assert_close(ours_PK.flatten(), run.advantage_B, atol=1e-6, rtol=1e-6)
