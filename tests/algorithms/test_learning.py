"""Does it learn? What no shape and no formula shows: a value shifted by one token is caught only here."""

import importlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from align import config
from align.algorithms import sft
from align.data import helpsteer, toy
from align.data.prompts import PromptStream
from align.launch import cast, load_renderer
from align.roles import Ready
from align.run import Run
from align.sections import Sampling

LIKED = "cat"

COMMON = """
algorithm: {algorithm}
run: {{dir: {run}, steps: {steps}, progress: none, tensorboard: false}}
data: {{path: {data}}}
executor: local
policy: {{path: {policy}, dtype: float32, optimizer: {{lr: {lr}}}}}
"""

SAMPLED = """
prompts_per_step: 16
unfinished: keep
sampling: {{num_samples: {K}, max_tokens: 6}}
reward: {{path: {policy}, kind: lm_head_row0, dtype: float32}}
"""

REFERENCE = """
kl_coef: 0.0
reference: {dtype: float32}
"""


class ShareOfLikedWords:
    """A reward role in three lines: the share of a response's tokens that are the liked word."""

    def __init__(self, token: int):
        self.token = token

    def score(self, sequences):
        shares = [sum(t == self.token for t in row) / len(row) for row in sequences.responses.lists()]
        return Ready(torch.tensor(shares))


def learn(folder: Path, text: str, *overrides: str) -> list[dict]:
    """Metrics of a run in this process in which the reward is the share of the liked word."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    settings = config.load(folder / "recipe.yaml", overrides).config
    algorithm = importlib.import_module(f"align.algorithms.{settings.algorithm}")
    renderer = load_renderer(settings)
    material, _ = algorithm.prepare(settings, helpsteer.load(settings.data), renderer)
    run = Run(settings, renderer.text)
    with cast(settings, run) as roles, run:
        liked = ShareOfLikedWords(renderer.tokenizer.convert_tokens_to_ids(LIKED))
        algorithm.train(settings, material, SimpleNamespace(**{**vars(roles), "reward": liked}), run)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def recipe(folder: Path, data: Path, policy: Path, algorithm: str, **values: object) -> str:
    values = {"steps": 60, "lr": "5e-3", "K": 4, **values}
    text = (COMMON + SAMPLED).format(algorithm=algorithm, run=folder / "run", data=data, policy=policy, **values)
    return text if algorithm in ("online_dpo", "best_of_n") else text + REFERENCE


LEARNERS = {
    "rloo": ("rloo", {}, []),
    "rloo as in TRL": (
        "rloo",
        {},
        [
            "kl_reduction=sum",
            "kl_estimator=k1",
            "loss={kind: sequence_clipped, aggregation: sequence_mean}",
            "epochs=2",
        ],
    ),
    "rloo, two steps behind": ("rloo", {"steps": 70}, ["lag=2"]),
    "grpo": ("grpo", {}, []),
    "gspo": ("grpo", {}, ["loss={kind: sequence_mean_clipped, aggregation: sequence_mean}", "minibatches=2"]),
    "dr_grpo": ("grpo", {}, ["normalise=false", "loss.aggregation=constant"]),
    "dapo": ("grpo", {}, ["loss={clip_high: 0.28, aggregation: token_mean}", "max_attempts=3", "minibatches=2"]),
    "reinforce++": ("reinforce", {"K": 1, "steps": 90}, ["prompts_per_step=64"]),
    "reinforce++-baseline": ("reinforce", {}, ["baseline=group"]),
    "remax": (
        "reinforce",
        {"K": 1, "steps": 90},
        [
            "baseline=greedy",
            "whiten=false",
            "loss={kind: reinforce, aggregation: sequence_mean}",
            "prompts_per_step=64",
        ],
    ),
    "ppo": (
        "ppo",
        {"K": 1, "steps": 60},
        ["prompts_per_step=64", "minibatches=2", "epochs=2", "critic.optimizer.lr=5e-3", "critic.head=new"],
    ),
    "online_dpo": ("online_dpo", {}, ["sampling.temperature=1.0", "sampling.top_p=1.0", "loss.kind=ipo"]),
    "best_of_n": ("best_of_n", {"K": 8}, []),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_learns_a_trivial_reward(name, tmp_path, toy_data, tiny_policy):
    """From one token in 67 to more than nine in ten."""
    algorithm, values, overrides = LEARNERS[name]
    begun = time.perf_counter()
    metrics = learn(tmp_path, recipe(tmp_path, toy_data, tiny_policy, algorithm, **values), *overrides)
    print([round(m["reward"], 2) for m in metrics][::6], round(time.perf_counter() - begun, 1))
    assert metrics[0]["reward"] < 0.1
    assert metrics[-1]["reward"] > 0.9


@pytest.mark.slow
def test_rloo_learns_to_end_its_responses(tmp_path, toy_data, tiny_policy):
    """With unfinished responses penalised, the end-of-sequence token must be among what is learned."""
    overrides = ["unfinished=penalise", "unfinished_penalty=3.0", "run.steps=40"]
    metrics = learn(tmp_path, recipe(tmp_path, toy_data, tiny_policy, "rloo"), *overrides)
    assert metrics[0]["unfinished"] > 0.8
    assert metrics[-1]["unfinished"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "overrides"),
    [
        ("rloo", ["kl_coef=2.0", "kl_reduction=sum"]),
        ("rloo", ["kl_coef=1.0", "kl_placement=loss", "kl_estimator=k3"]),
        ("grpo", ["kl_coef=1.0"]),
        ("reinforce", ["kl_coef=0.5", "baseline=group"]),
        ("ppo", ["kl_coef=2.0", "critic.optimizer.lr=5e-3", "critic.head=new", "whiten=false", "minibatches=2"]),
        ("rloo", ["kl_coef=0.1", "kl_reduction=sum", "kl_target=0.3", "kl_horizon=200"]),
    ],
    ids=["rloo", "rloo in the loss", "grpo", "reinforce++-baseline", "ppo", "adaptive"],
)
def test_kl_holds_the_policy_back(tmp_path, toy_data, tiny_policy, algorithm, overrides):
    """Free policies end 10 nats and more from the reference."""
    held = learn(tmp_path, recipe(tmp_path, toy_data, tiny_policy, algorithm, steps=40), *overrides)
    assert 0.0 < held[-1]["kl"] < 2.5
    assert held[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    if "kl_target=0.3" in overrides:
        assert held[-1]["kl_coef"] > held[0]["kl_coef"] == 0.1


def write_pairs(folder: Path, liked: str) -> Path:
    """Every preferred response is the liked word, every other one another word."""
    words = [word for word in toy.WORDS if word != liked]
    (folder / "preference").mkdir(parents=True)
    for split, count in (("train", 200), ("validation", 8)):
        rows = []
        for i in range(count):
            context = [{"role": "user", "content": f"say the first word : {words[i % 30]} {words[(i // 30 + i) % 39]}"}]
            row = {
                "domain": "general",
                "language": "english",
                "context": context,
                "overall_preference": 1 - 2 * (i % 2),
            }
            responses = [words[(7 * i) % 39], liked]
            rows.append(row | dict(zip(("response1", "response2"), responses[:: 1 if i % 2 == 0 else -1], strict=True)))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "preference" / f"{split}.jsonl").write_text(lines)
    return folder


def share_said(folder: Path, policy: Path, prompts: int = 32) -> float:
    """Share of greedy-free first words of a trained policy that are the liked one."""
    settings = config.load(folder / "recipe.yaml", [f"run.dir={folder / 'judge'}", f"policy.path={policy}"]).config
    renderer = load_renderer(settings)
    found = helpsteer.prompts(helpsteer.load(settings.data).train, renderer, 100)
    asked = PromptStream(found.tokens, prompts, 0, renderer.stop_ids).batch(1)
    with cast(settings, Run(settings, renderer.text)) as roles:
        rollouts = roles.policy.generate(asked, Sampling(num_samples=4, max_tokens=1)).result()
    token = renderer.tokenizer.convert_tokens_to_ids(LIKED)
    return float((rollouts.sequences.responses.ids_N == token).double().mean())


KINDS = {
    "dpo": "{kind: dpo}",
    "cdpo": "{kind: cdpo, smoothing: 0.1}",
    "robust": "{kind: robust, smoothing: 0.1}",
    "ipo": "{kind: ipo}",
    "ipo of sums": "{kind: ipo, average: false}",
    "hinge": "{kind: hinge}",
    "margin": "{kind: margin}",
    "scaled": "{kind: scaled}",
    "rpo_sq": "{kind: rpo_sq, eta: 3}",
    "rpo_fwd_kl": "{kind: rpo_fwd_kl, eta: 3}",
    "rpo_bwd_kl": "{kind: rpo_bwd_kl, eta: 3}",
    "simpo": "{kind: simpo, beta: 2}",
    "dpo and sft": "{kind: dpo, sft_coef: 0.2}",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_direct_preference_learns_what_is_preferred(tmp_path, tiny_policy, kind):
    """From pairs alone: the preferred word comes to be said, and every pair is ordered right."""
    data = write_pairs(tmp_path / "data", LIKED)
    text = COMMON.format(algorithm="dpo", run=tmp_path / "run", steps=60, data=data, policy=tiny_policy, lr="5e-3")
    text += "batch_size: 32\nreference: {dtype: float32}\n"
    metrics = learn(tmp_path, text, f"loss={KINDS[kind]}", "loss.beta=0.3" if kind != "simpo" else "loss.beta=2.0")
    assert metrics[-1]["accuracy"] == 1.0
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert share_said(tmp_path, tmp_path / "run" / "final") > 0.9


@pytest.mark.slow
def test_sft_learns_the_answers(tmp_path, toy_data, tiny_policy):
    """Twenty demonstrations are learned by heart, so the model says the preferred answer word for word."""
    text = COMMON.format(algorithm="sft", run=tmp_path / "run", steps=120, data=toy_data, policy=tiny_policy, lr="1e-2")
    (tmp_path / "recipe.yaml").write_text(text + "batch_size: 20\n")
    settings = config.load(tmp_path / "recipe.yaml", ["data.max_rows=20"]).config
    renderer = load_renderer(settings)
    source = helpsteer.load(settings.data)
    material, counts = sft.prepare(settings, source, renderer)
    assert counts["kept"] == counts["rows"] - counts["ties"]
    run = Run(settings, renderer.text)
    with cast(settings, run) as roles, run:
        sft.train(settings, material, roles, run)
        found = helpsteer.prompts([row for row in source.train if row.preference], renderer, 100)
        stream = PromptStream(found.tokens, len(found.tokens), 0, renderer.stop_ids)
        rollouts = roles.policy.generate(stream.batch(1), Sampling(temperature=0.0, max_tokens=16)).result()
    rows = [row for row in source.train if row.preference]
    said = [renderer.text(ids) for ids in rollouts.sequences.responses.lists()]
    order = stream.order.indices(1).tolist()
    right = [said[i] == rows[row].chosen for i, row in enumerate(order)]
    assert sum(right) >= 0.9 * len(right)
