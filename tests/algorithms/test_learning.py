"""Does it learn? What no shape and no formula shows: a value shifted by one token is caught only here."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from align import config
from align.algorithms import rloo, sft
from align.data import helpsteer, toy
from align.launch import cast, load_renderer
from align.run import Run
from align.workers.local import Ready

LIKED = "cat"

RLOO = """
algorithm: rloo
run: {{dir: {run}, steps: 60, progress: none, tensorboard: false}}
data: {{path: {data}}}
executor: local
prompts_per_step: 16
unfinished: keep
kl_coef: 0.0
sampling: {{num_samples: 4, max_tokens: 6}}
policy: {{path: {policy}, dtype: float32, optimizer: {{lr: 5e-3}}}}
reference: {{dtype: float32}}
reward: {{path: {policy}, kind: lm_head_row0, dtype: float32}}
"""


class ShareOfLikedWords:
    """A reward role in three lines: the share of a response's tokens that are the liked word."""

    def __init__(self, token: int):
        self.token = token

    def score(self, sequences):
        shares = [sum(t == self.token for t in row) / len(row) for row in sequences.responses.lists()]
        return Ready(torch.tensor(shares))


def run_rloo(folder: Path, toy_data: Path, tiny_policy: Path, *overrides: str) -> list[dict]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(RLOO.format(run=folder / "run", data=toy_data, policy=tiny_policy))
    settings = config.load(recipe, overrides).config
    renderer = load_renderer(settings)
    material, _ = rloo.prepare(settings, helpsteer.load(settings.data), renderer)
    run = Run(settings, renderer.text)
    with cast(settings, run) as roles, run:
        liked = ShareOfLikedWords(renderer.tokenizer.convert_tokens_to_ids(LIKED))
        stage = SimpleNamespace(policy=roles.policy, reference=roles.reference, reward=liked)
        rloo.train(settings, material, stage, run)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_rloo_learns_a_trivial_reward(tmp_path, toy_data, tiny_policy):
    """From one token in 67 to more than nine in ten."""
    metrics = run_rloo(tmp_path, toy_data, tiny_policy)
    assert metrics[0]["reward"] < 0.1
    assert metrics[-1]["reward"] > 0.9


@pytest.mark.slow
def test_rloo_learns_to_end_its_responses(tmp_path, toy_data, tiny_policy):
    """With unfinished responses penalised, the end-of-sequence token must be among what is learned."""
    overrides = ["unfinished=penalise", "unfinished_penalty=3.0", "run.steps=40"]
    metrics = run_rloo(tmp_path, toy_data, tiny_policy, *overrides)
    assert metrics[0]["unfinished"] > 0.8
    assert metrics[-1]["unfinished"] < 0.1


@pytest.mark.slow
def test_kl_holds_the_policy_back(tmp_path, toy_data, tiny_policy):
    free = run_rloo(tmp_path, toy_data, tiny_policy, "run.steps=40")
    (tmp_path / "held").mkdir()
    held = run_rloo(tmp_path / "held", toy_data, tiny_policy, "run.steps=40", "kl_coef=2.0", "kl_reduction=sum")
    assert held[-1]["kl"] < 0.25 * free[-1]["kl"]


@pytest.mark.slow
def test_sft_learns_the_answers(tmp_path, toy_data, tiny_policy):
    """Twenty demonstrations are learned by heart, so the model says the preferred answer word for word."""
    text = f"""
algorithm: sft
run: {{dir: {tmp_path / "run"}, steps: 120, progress: none, tensorboard: false}}
data: {{path: {toy_data}, max_rows: 20}}
executor: local
batch_size: 20
policy: {{path: {tiny_policy}, dtype: float32, optimizer: {{lr: 1e-2}}}}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    settings = config.load(tmp_path / "recipe.yaml").config
    renderer = load_renderer(settings)
    source = helpsteer.load(settings.data)
    material, counts = sft.prepare(settings, source, renderer)
    assert counts["kept"] == counts["rows"] - counts["ties"]
    run = Run(settings, renderer.text)
    with cast(settings, run) as roles, run:
        sft.train(settings, material, roles, run)
        found = helpsteer.prompts([row for row in source.train if row.preference], renderer, 100)
        stream = rloo.data.prompts.PromptStream(found.tokens, len(found.tokens), 0, renderer.stop_ids)
        batch = stream.batch(1)
        sampling = dataclasses.replace(rloo.Config().sampling, num_samples=1, temperature=0.0, max_tokens=16)
        rollouts = roles.policy.generate(batch, sampling).result()
    rows = [row for row in source.train if row.preference]
    said = [renderer.text(ids) for ids in rollouts.sequences.responses.lists()]
    order = stream.order.indices(1).tolist()
    right = [said[i] == rows[row].chosen for i, row in enumerate(order)]
    assert sum(right) >= 0.9 * len(right)
    assert all(toy.instruction_of(row.context) for row in rows)
