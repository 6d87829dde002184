"""SteerLM and SteerLM 2.0 in one process on small random models: what is labelled, asked, weighed and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from align import launch
from align.algorithms import _steerlm, steerlm, steerlm2
from align.cluster import roles as cluster_roles
from align.config import (
    CheckpointRewardConfig,
    ClusterConfig,
    DataConfig,
    EvaluationConfig,
    FunctionRewardConfig,
    PreviousPolicyConfig,
    SamplingConfig,
)
from align.config.load import load_recipe
from align.data import dataset, openai
from align.data import steerlm as steering
from align.data.attributes import HELPSTEER_ATTRIBUTES
from align.data.chat import Dialogue, Message, Renderer, load_tokenizer
from align.data.rows import Rating
from align.engines.deepspeed import Engine
from align.errors import ConfigError
from align.ops import steerlm as ops
from align.rewards import checkpoint_format
from align.roles import CompletedFuture
from align.run import Clock
from align.types import Packed, Prompts, Rollouts, Sequences
from align.workers import local, policy, reward
from align.workers.base import WorkerGroup, WorkerSpec

NAMES = ("helpfulness", "verbosity")
SAID = {"from": "Assistant", "value": "ant pig", "label": "quality:0"}


class Written:
    """What a run is to these functions."""

    def __init__(self, round: int = 1):
        self.round, self.files, self.lines = round, dict[str, str](), list[str]()

    def write_text(self, name: str, text: str) -> None:
        self.files[name] = text

    def report(self, line: str) -> None:
        self.lines.append(line)


def recipe(tmp_path: Path, algorithm: str, data: Path, model: Path, attributes: Path | None, *more: str) -> Any:
    (tmp_path / "r.yaml").write_text(f"algorithm: {algorithm}\n")
    judge = [] if attributes is None else [f"reward.path={attributes}", "reward.weights={helpfulness: 1}"]
    return load_recipe(
        tmp_path / "r.yaml",
        [
            *(f"run.dir={tmp_path}/run", "run.steps=2", f"data.path={data}", f"policy.path={model}", *judge),
            *("policy.optimizer.lr=1e-3", "policy.dtype=float32", "steering.attributes=[helpfulness,verbosity]", *more),
        ],
    )


class Counted:
    """An attribute model that rates a response by its words: helpfulness their number, verbosity its half."""

    def __init__(self, missing: str = ""):
        self.missing, self.calls = missing, list[int]()

    def rate(self, dialogues: Sequence[Dialogue], names: Sequence[str]) -> CompletedFuture[torch.Tensor]:
        self.calls.append(len(dialogues))
        words = [len(one.response.split()) if one.response != self.missing else float("nan") for one in dialogues]
        columns = {"helpfulness": torch.tensor(words), "verbosity": torch.tensor(words) / 2}
        return CompletedFuture(torch.stack([columns[name].float() for name in names], 1))


def test_rows_are_labelled_in_parts_in_their_order(monkeypatch: pytest.MonkeyPatch):
    """Words 1, 3, 5 and 2 give helpfulness 1, 3, 4 and 2, verbosity 0.5, 1.5, 2.5, 1: halves to the even number."""
    monkeypatch.setattr(_steerlm, "PART", 2)
    rows = [Rating((Message("user", "x"),), text, {}, "", "") for text in ("a", "a b c", "a b c d e", "a b", "drop")]
    run, judge = Written(), Counted(missing="drop")
    form = steering.SteeringFormat(("verbosity", "helpfulness"), (2, 4), "user", "", "")
    found = _steerlm.label_ratings(rows, judge, form, run)  # type: ignore[arg-type]
    assert [row.response for row in found] == ["a", "a b c", "a b c d e", "a b"]
    assert [dict(row.ratings) for row in found] == [
        {"verbosity": 0, "helpfulness": 1},
        {"verbosity": 2, "helpfulness": 3},
        {"verbosity": 2, "helpfulness": 4},
        {"verbosity": 1, "helpfulness": 2},
    ]
    assert judge.calls == [2, 2, 1]
    lines = run.files["labelled-round-1.jsonl"].splitlines()
    assert [row for line in lines for row in openai.parse_rating(line.encode())] == found
    assert run.lines == ["labelled-round-1.jsonl: 4 responses, 1 without a rating left out"]


def test_the_role_gives_attributes_by_name(tmp_path: Path, tiny_attributes: Path):
    """The head's order is verbosity, helpfulness, coherence."""
    section = CheckpointRewardConfig(path=str(tiny_attributes), dtype="float32", weights={"helpfulness": 1.0})
    context = (Message("user", "sort the words : pig ant"),)
    dialogues = [Dialogue(context, text) for text in ("ant pig", "pig", "ant pig okay")]
    with cluster_roles.start_reward(section, "local", (0,), ClusterConfig(), tmp_path, print) as role:
        both = role.rate(dialogues, NAMES).result()
        other = role.rate(dialogues[1:], ("coherence", "verbosity", "helpfulness")).result()
        score = role.score_dialogues(dialogues).result()
    assert both.shape == (3, 2) and len(both.unique()) == 6
    assert torch.allclose(both[:, 0], score, atol=1e-6)  # goodness is helpfulness alone
    assert torch.allclose(other[:, 1:], both[1:].flip(1), atol=1e-6)


class Split(WorkerGroup):
    """Ranks that rate a response by its length."""

    def __init__(self, world_size: int):
        self.world_size = world_size

    def call(self, phase: str, method: Any, arguments: Any, gather: Any) -> CompletedFuture[Any]:
        assert method is reward.RewardWorker.rate
        return CompletedFuture(
            gather([torch.tensor([[len(d.response), 0.0] for d in one]).view(-1, 2) for one, _ in arguments])
        )

    def start(self, method: Any, arguments: Any) -> list[Any]:
        raise NotImplementedError


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_ratings_of_several_ranks_come_in_order(world_size: int):
    said = [Dialogue((Message("user", str(i // 2)),), "x" * i) for i in range(7)]
    found = reward.Reward(Split(world_size), CheckpointRewardConfig(path="p")).rate(said, NAMES).result()
    assert found[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_an_attribute_that_the_head_lacks_is_refused_before_anything_starts(
    tmp_path, family_data, tiny_family, tiny_attributes
):
    settings = "steerlm", family_data, tiny_family, tiny_attributes, "steering.attributes=[helpfulness,humor]"
    with pytest.raises(ConfigError, match="it does not rate humor; it has verbosity, helpfulness, coherence"):
        launch.prepare(recipe(tmp_path, *settings))


def test_a_judge_with_one_score_cannot_label(tiny_reward: Path):
    for section in (FunctionRewardConfig(function="m:f"), CheckpointRewardConfig(path=str(tiny_reward))):
        with pytest.raises(ConfigError, match="does not rate helpfulness, verbosity; it has one score"):
            checkpoint_format.require_attributes(section, NAMES)


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("openai", {"messages": [{"role": "user", "content": "pig"}, {"role": "assistant", "content": "ant pig"}]}),
        ("helpsteer", {"prompt": "pig", "response": "ant pig", **dict.fromkeys(HELPSTEER_ATTRIBUTES, 1)}),
        ("nemo", {"conversations": [{"from": "User", "value": "pig"}, SAID]}),
    ],
)
def test_one_response_to_a_prompt_can_be_labelled(tmp_path, family_data, tiny_family, tiny_attributes, layout, row):
    """The attribute model gives labels, so data need no second response and no rating of the attributes."""
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    for split in ("validation", "val"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row).replace("pig", "owl"))
    settings = "steerlm", tmp_path, tiny_family, tiny_attributes, f"data.format={layout}", "batch_size=1"
    (said,) = launch.prepare(recipe(tmp_path, *settings)).train_data.rows
    assert (said.context, said.response) == ((Message("user", "pig"),), "ant pig")


def test_people_s_labels_and_held_out_prompts(tmp_path, family_data, tiny_family, tiny_attributes):
    """Judges read plain prompts; the policy is asked for the best."""
    more = (
        "labels=data",
        "data.format=helpsteer2",
        "evaluation.every=1",
        "evaluation.prompts=3",
        "sampling.max_tokens=30",
    )
    prepared = launch.prepare(recipe(tmp_path, "steerlm", family_data, tiny_family, tiny_attributes, *more))
    train_data, renderer = prepared.train_data, prepared.renderer
    source = dataset.load_dataset(DataConfig(path=str(family_data), format="helpsteer2"), "ratings")
    known = {(row.context, row.response): {name: row.ratings[name] for name in NAMES} for row in source.train}
    assert len(train_data.rows) == prepared.counts["kept"] > 200
    assert all(dict(row.ratings) == known[row.context, row.response] for row in train_data.rows)
    held_out = train_data.held_out
    assert prepared.counts["held_out_kept"] >= len(held_out.messages) == 3
    asked = [renderer.text(ids) for ids in held_out.prompts.tokens.lists()]
    assert asked == [f"{m[-1].content}<extra_id_2>helpfulness:4,verbosity:2\n" for m in held_out.messages]
    assert held_out.reward_prompts.lists() == [renderer.prompt_ids(m) for m in held_out.messages]
    assert train_data.files.keys() == held_out.files.keys() == {steering.NAME}


def test_bootstrapping_asks_for_the_best_and_others_each_round(tmp_path, family_data, tiny_family, tiny_attributes):
    more = "rounds=3", "bootstrap_prompts=20", "sampling.num_samples=2", "sampling.max_tokens=30", "batch_size=8"
    prepared = launch.prepare(recipe(tmp_path, "steerlm", family_data, tiny_family, tiny_attributes, *more))
    section = replace(prepared.config.policy, zero_stage=0)
    ranks = local.start_role(policy.PolicyWorker, WorkerSpec("policy", 0, 1, section, 0, 2, 60.0), Clock())
    role = policy.Policy(ranks, section)
    found = {
        number: steerlm.bootstrap(prepared.config, prepared.train_data, role, Written(number))  # type: ignore[arg-type]
        for number in (2, 3)
    }
    run = Written(2)
    again = steerlm.bootstrap(prepared.config, prepared.train_data, role, run)  # type: ignore[arg-type]
    assert run.lines[0] == "round 2, bootstrap prompts: 20 asked, 0 repeated, 0 too_long, 20 kept"
    assert run.lines[1].startswith("round 2, their answers: 40 answers, ")
    assert run.lines[1].endswith(f", {len(again)} kept")
    assert found[2] == again and found[2] and found[3]
    assert all(row.response.strip() and not row.ratings for row in found[2])
    contexts = [{row.context for row in rows} for rows in found.values()]
    assert contexts[0] != contexts[1] and contexts[0] <= {row.context for row in prepared.train_data.rows}


@pytest.mark.slow
def test_two_rounds_of_steerlm_and_two_of_its_successor(tmp_path, family_data, tiny_family, tiny_attributes, capsys):
    """Round 2 of SteerLM learns from samples with their own labels; its model starts SteerLM 2.0."""
    small = "executor=local", "run.trackers=[]", "run.progress=none", "data.max_rows=20", "reward.dtype=float32"
    held_out = "evaluation.every=2", "evaluation.prompts=4"
    more = *small, *held_out, "rounds=2", "batch_size=4", "sampling.num_samples=4", "sampling.max_tokens=40"
    loaded = recipe(tmp_path / ".", "steerlm", family_data, tiny_family, tiny_attributes, *more)
    launch.train(loaded, Console(quiet=True))
    folder = tmp_path / "run"
    first, second = (
        [json.loads(line) for line in (folder / f"labelled-round-{n}.jsonl").read_text().splitlines()] for n in (1, 2)
    )
    assert len(first) >= 36 and 0 < len(second) < 80
    assert {tuple(row["ratings"]) for row in first + second} == {NAMES}
    form = steering.read_steering_card(folder / "final" / steering.NAME)
    assert (form.names, form.values) == (NAMES, (4, 2))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert {"heldout/greedy/reward", "heldout/sampled/ground_truth"} <= metrics[1].keys()

    after = tmp_path / "after"
    after.mkdir()
    more = *small, *held_out, f"base.path={tiny_family}", "base.dtype=float32", "prompts_per_step=3"
    model = folder / "final"
    sampling = "sampling.num_samples=3", "sampling.max_tokens=20", "truncated=keep", "max_off_policy_steps=1"
    launch.train(recipe(after, "steerlm2", family_data, model, tiny_attributes, *more, *sampling), Console(quiet=True))
    metrics = [json.loads(line) for line in (after / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert metrics[0]["learnable"] == 1.0 and metrics[0]["kl"] > 0
    assert (after / "run" / "round-1" / "final" / steering.NAME).is_file()


# SteerLM 2.0


class Fixed:
    """A base model that gives every token of a response the same log-probability, and keeps what it was asked."""

    def logprobs(self, sequences: Sequences, temperature: float) -> CompletedFuture[torch.Tensor]:
        self.sequences = sequences
        return CompletedFuture(torch.where(sequences.mask_BT, -2.0, 0.0))


def test_the_weight_of_a_sample_by_hand(tmp_path, family_data, tiny_family, tiny_attributes):
    """log P(a|x, y) + log P(y|x) - log Q'(y|a, x), sums over tokens at temperature 1, on the plain prompt."""
    more = "base.path=b", "labels=data", "data.format=helpsteer2", "sampling.num_samples=2", "prompts_per_step=2"
    settings = recipe(tmp_path, "steerlm2", family_data, tiny_family, tiny_attributes, *more).config
    renderer = Renderer(load_tokenizer(tiny_family))
    source = dataset.load_dataset(settings.data, "ratings")
    train_data, _ = steerlm2.load_data(settings, source, renderer)
    run = Written()
    groups = _steerlm.group_labels(settings, "data", train_data, None, run)  # type: ignore[arg-type]
    assert run.lines[0].endswith(f", 0 too_long, {len(groups.prompt_set.contexts)} kept")
    prompts = groups.prompts.batch(1)
    rows = groups.prompts.order.indices(1).tolist()
    texts = ["ant", "ant pig", "ant pig owl", "ant pig owl hen"]
    responses = Packed.from_lists(
        [renderer.response_ids(groups.prompt_set.contexts[rows[i // 2]], t) for i, t in enumerate(texts)]
    )
    sequences = Sequences(prompts.tokens, responses, torch.tensor([0, 0, 1, 1]))
    previous_BT = torch.where(sequences.mask_BT, -0.5, 0.0)
    rollouts = Rollouts(sequences, previous_BT * 7, previous_BT, torch.tensor([True, True, False, True]), 0.7, 1)
    roles: Any = SimpleNamespace(reward=Counted(), base=Fixed())
    batch, fit_B, statistics = steerlm2.weigh_samples(settings, groups, roles, rollouts)
    for i in range(4):
        rated = torch.tensor([[i + 1.0, (i + 1) / 2]])
        fit = ops.attribute_logprob(rated, groups.prompt_set.label_PA[rows[i // 2]][None])
        assert float(fit_B[i]) == pytest.approx(float(fit), abs=1e-5)
        tokens = i + 2  # its words and the end
        assert float(batch.columns["weight_B"][i]) == pytest.approx(float(fit) - 2.0 * tokens + 0.5 * tokens, abs=1e-4)
    assert batch.columns["learnable_B"].tolist() == [True, True, False, True]
    assert (batch.unit, batch.temperature, statistics["learnable"]) == (2, 1.0, 0.5)
    assert roles.base.sequences.prompts.lists() == [
        renderer.prompt_ids(groups.prompt_set.contexts[row]) for row in rows
    ]
    assert batch.sequences.prompts.lists() == groups.prompt_set.steered.select(torch.tensor(rows)).lists()


def test_the_previous_policy_samples_layer_by_layer(tiny_family: Path, monkeypatch: pytest.MonkeyPatch):
    """The same tokens as on whole weights, which are never gathered."""
    said = []
    prompts = Prompts(Packed.from_lists([[5, 6], [7]]), torch.arange(2), (2,), 1)
    for keys in ({}, {"zero_stage": 3}, {"zero_stage": 3, "gather_weights_for_generation": False}):
        section = PreviousPolicyConfig(
            path=str(tiny_family), revision=None, init={}, dtype="float32", trust_remote_code=False
        )
        spec = WorkerSpec("previous", 0, 1, replace(section, **keys), 0, 2, 60.0)
        role = policy.FrozenSampler(local.start_role(policy.FrozenSamplerWorker, spec, Clock()), section)
        if "gather_weights_for_generation" in keys:
            monkeypatch.setattr(Engine, "full", None)
        said.append(role.generate(prompts, SamplingConfig(num_samples=2, max_tokens=4)).result())
    assert [one.sequences.responses.lists() for one in said[1:]] == [said[0].sequences.responses.lists()] * 2


def test_a_policy_that_learned_another_form_is_refused(tmp_path, family_data, tiny_family, tiny_attributes):
    model = tmp_path / "model"
    shutil.copytree(tiny_family, model)
    for name, text in steering.SteeringFormat(NAMES, (4, 2), "user", "", "").files().items():
        (model / name).write_text(text)
    settings = "steerlm2", family_data, model, tiny_attributes, f"base.path={tiny_family}", "steering.prefix=''"
    with pytest.raises(ConfigError, match=r'trained with steering\.place="user" steering\.suffix=""'):
        launch.prepare(recipe(tmp_path, *settings))


def test_the_loss_counts_groups_in_which_two_samples_are_usable():
    logprob_BT = torch.tensor([[-1.0, -1.0], [-2.0, 0.0], [-1.0, -3.0], [-9.0, 0.0]], requires_grad=True)
    mask_BT = torch.tensor([[True, True], [True, False], [True, True], [True, False]])
    value = steerlm2.loss(
        logprob_BT=logprob_BT,
        entropy_BT=torch.ones(4, 2),
        mask_BT=mask_BT,
        previous_BT=torch.tensor([[-1.0, -1.0], [-2.0, 5.0], [-1.0, -3.0], [-9.0, 0.0]]),
        weight_B=torch.tensor([0.0, 1.0986123, 5.0, 7.0]),
        learnable_B=torch.tensor([True, True, True, False]),
        num_samples=2,
    )
    value.sum.backward()
    assert (int(value.count), float(value.metrics["entropy"][1])) == (1, 3.0)
    # w' = (1/4, 3/4), b' = (1/2, 1/2), 1.5 tokens on average
    assert float(value.sum.detach()) == pytest.approx(0.0, abs=1e-6)  # -(-1/4 * -2 + 1/4 * -2) / 1.5
    expected = [[0.25 / 1.5, 0.25 / 1.5], [-0.25 / 1.5, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert torch.allclose(logprob_BT.grad, torch.tensor(expected), atol=1e-6)  # type: ignore[arg-type]


def test_a_later_round_moves_the_previous_policy_and_not_the_base(tmp_path, family_data, tiny_family, tiny_attributes):
    settings = recipe(tmp_path, "steerlm2", family_data, tiny_family, tiny_attributes, "base.path=b").config
    later = settings.in_round("runs/x/final")
    assert (later.policy.path, later.previous.path, later.base.path) == ("runs/x/final", "runs/x/final", "b")
    assert EvaluationConfig() == settings.evaluation
