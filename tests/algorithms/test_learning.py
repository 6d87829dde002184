"""Does it learn? What no shape and no formula shows: a value shifted by one token is caught only here."""

import importlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from align.algorithms import sft
from align.config import SamplingConfig
from align.config.load import load_recipe
from align.data import dataset, toy
from align.data.prompts import PromptStream
from align.launch import start_training_roles
from align.prepare import load_renderer
from align.roles import CompletedFuture
from align.run import Run

LIKED = "cat"

COMMON = """
algorithm: {algorithm}
run: {{dir: {run}, steps: {steps}, progress: none, trackers: []}}
data: {{path: {data}}}
executor: local
policy: {{path: {policy}, dtype: float32, optimizer: {{lr: {lr}}}}}
"""

SAMPLED = """
prompts_per_step: 16
truncated: keep
sampling: {{num_samples: {K}, max_tokens: 6}}
reward: {{path: {policy}, head: lm_head_row0, dtype: float32}}
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
        return CompletedFuture(torch.tensor(shares))


def learn(folder: Path, text: str, *overrides: str) -> list[dict]:
    """Metrics of a run in this process in which the reward is the share of the liked word."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    settings = load_recipe(folder / "recipe.yaml", overrides).config
    algorithm = importlib.import_module(f"align.algorithms.{settings.algorithm}")
    renderer = load_renderer(settings)
    train_data, _ = algorithm.load_data(settings, dataset.load_dataset(settings.data), renderer)
    run = Run(settings, renderer.text)
    with run, start_training_roles(settings, run) as roles:
        liked = ShareOfLikedWords(renderer.tokenizer.convert_tokens_to_ids(LIKED))
        algorithm.train(settings, train_data, SimpleNamespace(**{**vars(roles), "reward": liked}), run)
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
            "loss={kind: sequence_clipped, aggregation: sequence_mean_token_mean}",
            "epochs=2",
        ],
    ),
    "rloo, two steps behind": ("rloo", {"steps": 70}, ["max_off_policy_steps=2"]),
    "grpo": ("grpo", {}, []),
    "gspo": ("grpo", {}, ["loss.kind=sequence_mean_clipped", "minibatches=2"]),
    "dr_grpo": ("grpo", {}, ["normalize=false", "loss.aggregation=constant"]),
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
    """With unfinished responses penalized, the end-of-sequence token must be among what is learned."""
    overrides = ["truncated=penalize", "truncation_penalty=3.0", "run.steps=40"]
    metrics = learn(tmp_path, recipe(tmp_path, toy_data, tiny_policy, "rloo"), *overrides)
    assert metrics[0]["truncated"] > 0.8
    assert metrics[-1]["truncated"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "overrides"),
    [
        ("rloo", ["kl_coef=2.0", "kl_reduction=sum"]),
        ("rloo", ["kl_coef=1.0", "kl_placement=loss", "kl_estimator=k3"]),
        pytest.param("grpo", ["kl_coef=1.0"], marks=pytest.mark.full),
        pytest.param("reinforce", ["kl_coef=0.5", "baseline=group"], marks=pytest.mark.full),
        ("ppo", ["kl_coef=1.0", "kl_estimator=k1", "critic.optimizer.lr=5e-3", "critic.head=new", "minibatches=1"]),
        ("rloo", ["kl_coef=0.1", "kl_reduction=sum", "kl_target=0.2", "kl_horizon=64"]),
    ],
    ids=["rloo", "rloo in the loss", "grpo", "reinforce++-baseline", "ppo", "adaptive"],
)
def test_kl_holds_the_policy_back(tmp_path, toy_data, tiny_policy, algorithm, overrides):
    """A free policy ends more than 15 nats from the reference (RLOO, 40 steps)."""
    held = learn(tmp_path, recipe(tmp_path, toy_data, tiny_policy, algorithm, steps=40), *overrides)
    assert held[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert abs(held[-1]["kl"]) < 4.0  # the mean of an estimate that may be negative
    if "kl_target=0.2" in overrides:
        assert held[-1]["kl_coef"] > held[0]["kl_coef"] == 0.1


def write_pairs(folder: Path, liked: str) -> Path:
    """One word is preferred to each other text of the vocabulary, to an instruction of its own."""
    texts = [*toy.WORDS, *toy.FILLER, *{word for request in toy.OPERATIONS for word in request.split()}, ":"]
    others = sorted(set(texts) - {liked})
    (folder / "preference").mkdir(parents=True)
    for split, start in (("train", 0), ("validation", 1)):
        rows = []
        for i in range(4 * len(others)):
            words = [toy.WORDS[(i // 3 + start) % 40], toy.WORDS[(7 * i) % 40], toy.WORDS[(11 * i + start) % 40]]
            content = f"say the first word : {' '.join(words)} {toy.FILLER[start]}"
            row = {"domain": "general", "language": "english", "context": content}
            first = i % 2 == 0
            pair = (liked, others[i % len(others)])[:: 1 if first else -1]
            rows.append(row | {"response1": pair[0], "response2": pair[1], "overall_preference": -1 if first else 1})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "preference" / f"{split}.jsonl").write_text(lines)
    return folder


def share_said(folder: Path, policy: Path) -> float:
    """Share of a trained policy's first words that are the liked one."""
    recipe = policy.parents[1] / "recipe.yaml"
    settings = load_recipe(recipe, [f"run.dir={folder / 'judge'}", f"policy.path={policy}"]).config
    renderer = load_renderer(settings)
    found = dataset.tokenize_prompts(dataset.load_dataset(settings.data).train, renderer, 100)
    asked = PromptStream(found.tokens, 32, 0, renderer.stop_ids).batch(1)
    with Run(settings, renderer.text) as run, start_training_roles(settings, run) as roles:
        rollouts = roles.policy.generate(asked, SamplingConfig(num_samples=4, max_tokens=1)).result()
    token = renderer.tokenizer.convert_tokens_to_ids(LIKED)
    return float((rollouts.sequences.responses.ids_N == token).double().mean())


KINDS = {
    "dpo": "{kind: dpo}",
    "ipo": "{kind: ipo}",
    "scaled": "{kind: scaled}",
    "rpo_bwd_kl": "{kind: rpo_bwd_kl, eta: 1}",
    "simpo": "{kind: simpo}",
    "dpo and sft": "{kind: dpo, sft_coef: 0.2}",
}
NEIGHBOURS = {
    "cdpo": "{kind: cdpo, smoothing: 0.01}",
    "robust": "{kind: robust, smoothing: 0.1}",
    "ipo of sums": "{kind: ipo, average: false}",
    "hinge": "{kind: hinge}",
    "margin": "{kind: margin}",
    "rpo_sq": "{kind: rpo_sq, eta: 1}",
    "rpo_fwd_kl": "{kind: rpo_fwd_kl, eta: 1}",
}
"""Losses of the same numbers as one above; the formula of each has tests of its own."""


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> tuple[Path, Path, float]:
    """Pairs, a policy that says both answers of a pair alike, what preferences are learned from, and how often it says
    the liked one."""
    folder = tmp_path_factory.mktemp("spoken")
    data = write_pairs(folder / "data", LIKED)
    text = COMMON.format(algorithm="sft", run=folder / "run", steps=60, data=data, policy=tiny_policy, lr="1e-2")
    learn(folder, text + "batch_size: 64\nresponses: all\n")
    policy = folder / "run" / "final"
    return data, policy, share_said(folder, policy)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.full) for kind in NEIGHBOURS)])
def test_direct_preference_learns_what_is_preferred(tmp_path, spoken, kind):
    """From pairs alone: the preferred word, said every other time at first, comes to be said more than nine in ten."""
    data, policy, before = spoken
    text = COMMON.format(algorithm="dpo", run=tmp_path / "run", steps=40, data=data, policy=policy, lr="2e-3")
    text += "batch_size: 60\nreference: {dtype: float32}\n"
    loss, beta = (KINDS | NEIGHBOURS)[kind], 0.5 if kind == "simpo" else 0.05
    metrics = learn(tmp_path, text, f"loss={loss}", f"loss.beta={beta}")
    after = share_said(tmp_path / "x", tmp_path / "run" / "final")
    print(kind, before, after, metrics[-1]["accuracy"])
    assert before < 0.65
    assert after > 0.9
    assert metrics[-1]["accuracy"] == 1.0


@pytest.mark.slow
def test_sft_learns_the_answers(tmp_path, toy_data, tiny_policy):
    """Twenty demonstrations are learned by heart, so the model says the preferred answer word for word."""
    text = COMMON.format(algorithm="sft", run=tmp_path / "run", steps=120, data=toy_data, policy=tiny_policy, lr="1e-2")
    (tmp_path / "recipe.yaml").write_text(text + "batch_size: 20\n")
    settings = load_recipe(tmp_path / "recipe.yaml", ["data.max_rows=20"]).config
    renderer = load_renderer(settings)
    source = dataset.load_dataset(settings.data)
    train_data, counts = sft.load_data(settings, source, renderer)
    assert counts["kept"] == counts["rows"] - counts["ties"]
    run = Run(settings, renderer.text)
    with run, start_training_roles(settings, run) as roles:
        sft.train(settings, train_data, roles, run)
        found = dataset.tokenize_prompts([row for row in source.train if row.preference], renderer, 100)
        stream = PromptStream(found.tokens, len(found.tokens), 0, renderer.stop_ids)
        rollouts = roles.policy.generate(stream.batch(1), SamplingConfig(temperature=0.0, max_tokens=16)).result()
    rows = [row for row in source.train if row.preference]
    said = [renderer.text(ids) for ids in rollouts.sequences.responses.lists()]
    order = stream.order.indices(1).tolist()
    right = [said[i] == rows[row].chosen for i, row in enumerate(order)]
    assert sum(right) >= 0.9 * len(right)
