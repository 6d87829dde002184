"""Compare a policy before and after training on held-out prompts of the bundled task.

Both policies answer the same prompts with the same sampling noise. For each policy the report gives the ground truth of
the task (0 to 4), the reward model score, and KL = mean over its sampled responses of
sum_t log pi(token t) - log pi_before(token t), in nats.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table

from align.config import CheckpointRewardConfig, DataConfig, ReferenceConfig, SamplingConfig
from align.data import chat, dataset, toy
from align.data.chat import Renderer
from align.data.dataset import PromptSet
from align.engines import decoder
from align.engines.deepspeed import Engine
from align.models import heads, load
from align.ops import logprobs
from align.types import Prompts, Sequences

NUM_SHOWN = 5
SLOTS = 64
SEED = 2**31
"""Sampling seed; no training run uses it by default."""


@dataclass(frozen=True)
class PolicyScores:
    """Scores of a policy on the held-out prompts."""

    ground_truth: float
    reward: float
    kl: float
    tokens: float
    truncated: float


def _engine(path: Path, head: type[heads.Head], vocabulary: int, gaps: tuple[int, ...]) -> Engine:
    section = (
        CheckpointRewardConfig(path=str(path), dtype="float32")
        if head is heads.LastTokenScore
        else ReferenceConfig(path=str(path), dtype="float32")
    )
    if isinstance(section, CheckpointRewardConfig):
        model = load.scorer(section, vocabulary, seed=0, head="trained")
    else:
        model = load.causal_lm(section, vocabulary, 0, gaps)
    return Engine(head(model), section, torch.device("cpu"), total_steps=0)


def _logprob_sums(engine: Engine, sequences: Sequences) -> torch.Tensor:
    return logprobs.masked_sum(engine.infer(sequences, temperature=1.0, entropy=False)["logprob_BT"], sequences.mask_BT)


def measure_policy(
    policy: Engine, before: Engine, reward: Engine, prompt_set: PromptSet, renderer: Renderer
) -> tuple[PolicyScores, list[str]]:
    """Sample and score a response to each prompt; return the scores and the responses."""
    prompts = Prompts(prompt_set.tokens, torch.arange(len(prompt_set.tokens)), renderer.stop_ids, step=0)
    sampling = SamplingConfig(num_samples=1, max_tokens=32)
    rollouts = decoder.generate(policy.head.model, prompts, sampling, SEED, SLOTS)
    sequences = rollouts.sequences
    answers = [renderer.text(ids) for ids in sequences.responses.lists()]
    truth = [toy.score(toy.instruction_of(m), answer) for m, answer in zip(prompt_set.messages, answers, strict=True)]
    judged = PolicyScores(
        ground_truth=fmean(truth),
        reward=float(reward.infer(sequences)["score_B"].mean()),
        kl=float((_logprob_sums(policy, sequences) - _logprob_sums(before, sequences)).mean()),
        tokens=float(sequences.responses.lengths_B.double().mean()),
        truncated=1.0 - float(rollouts.finished_B.double().mean()),
    )
    return judged, answers


def main(arguments: argparse.Namespace, console: Console) -> int:
    """``align compare``: print the table and samples side by side."""
    tokenizer = chat.load_tokenizer(str(arguments.before))
    renderer = Renderer(tokenizer)
    source = dataset.load_dataset(DataConfig(path=str(arguments.data)))
    prompt_set = dataset.tokenize_prompts(source.validation[: arguments.prompts], renderer, max_tokens=512)
    ids = chat.vocab_size(tokenizer), chat.gaps(tokenizer)
    before = _engine(arguments.before, heads.TokenLogprobs, *ids)
    after = _engine(arguments.after, heads.TokenLogprobs, *ids)
    reward = _engine(arguments.reward, heads.LastTokenScore, *ids)
    judged, answers = zip(
        *(measure_policy(policy, before, reward, prompt_set, renderer) for policy in (before, after)), strict=True
    )
    numbers = {name: vars(measured) for name, measured in zip(("before", "after"), judged, strict=True)}

    table = Table("", "before", "after", title=f"{len(prompt_set.tokens)} held-out prompts, sampled at temperature 1")
    labels = {
        "ground_truth": "ground truth (0 to 4)",
        "reward": "reward model",
        "kl": "KL to before (nats a response)",
        "tokens": "tokens a response",
        "truncated": "truncated",
    }
    for name, label in labels.items():
        table.add_row(label, *(f"{numbers[side][name]:.3f}" for side in ("before", "after")))
    console.print(table)
    samples = Table("prompt", "before", "after", title="samples", show_lines=True)
    for messages, *pair in list(zip(prompt_set.messages, *answers, strict=True))[:NUM_SHOWN]:
        samples.add_row(toy.instruction_of(messages), *pair)
    console.print(samples)
    gain = numbers["after"]["ground_truth"] - numbers["before"]["ground_truth"]
    room = 4.0 - numbers["before"]["ground_truth"]
    share = gain / room if room else 0.0
    console.print(f"verdict: ground truth {gain:+.2f}, {share:.0%} of the way to its maximum", highlight=False)
    if arguments.json:
        arguments.json.write_text(json.dumps({"prompts": len(prompt_set.tokens), **numbers}, indent=2) + "\n")
    return 0
