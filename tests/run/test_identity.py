"""Which changes a checkpoint refuses, key by key."""

import dataclasses
from pathlib import Path

import pytest

from align.algorithms import ppo
from align.config import SamplerConfig
from align.config.load import describe_schema, load_recipe
from align.errors import ConfigError
from align.run.identity import Identity

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart" / "ppo.yaml"


def identity(*overrides: str, rows: str = "r", policy: str = "p") -> Identity:
    return Identity.of(load_recipe(RECIPE, overrides).config, {"rows": rows}, {"policy": policy})


BEGUN = dataclasses.asdict(identity())


@pytest.mark.parametrize(
    "change",
    [
        "run.dir=elsewhere", "run.resume=never", "run.max_time=1h", "run.max_restarts=9", "run.progress=none",
        "run.trackers=[]", "run.logged_samples=1", "run.bundle_steps=[1]",
        "run.max_non_finite=9", "run.allow_change=[x]", "checkpoint.every=1", "checkpoint.keep_best=3",
        "cluster.call_timeout_s=5", "executor=local", "placement.policy=0", "policy.zero_stage=3",
        "policy.max_tokens_per_micro_batch=64", "critic.gradient_checkpointing=true", "policy.max_num_seqs=2",
        "policy.path=elsewhere", "data.path=elsewhere", "reward.path=elsewhere",
        "reference.max_tokens_per_micro_batch=8", "cluster.phase_timeout_s={generate: 1}", "reward.zero_stage=3",
    ],
)  # fmt: skip
def test_what_may_change(change: str):
    identity(change).require(BEGUN, [], "x")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("run.seed=5", "run.seed"),
        ("run.steps=5", "run.steps"),
        ("critic.head=new", "critic.head"),
        ("policy.optimizer.schedule=linear", "policy.optimizer.schedule"),
        ("critic.optimizer.lr=1", "critic.optimizer.lr"),
        ("reward.failed=drop", "reward.failed"),
        ("sampling.top_p=0.5", "sampling.top_p"),
        ("evaluation.every=1", "evaluation.every"),
        ("gae_lambda=0.5", "gae_lambda"),
        ("data.max_prompt_tokens=7", "data.max_prompt_tokens"),
        ("max_off_policy_steps=1", "max_off_policy_steps"),
    ],
)
def test_what_may_not(change: str, key: str):
    with pytest.raises(ConfigError) as caught:
        identity(change).require(BEGUN, [], "the checkpoint's place")
    assert f"    {key}: " in str(caught.value)
    assert f"run.allow_change=[{key}]" in str(caught.value)
    assert str(caught.value).startswith("the checkpoint's place: ")
    identity(change).require(BEGUN, [key], "x")
    identity(change).require(BEGUN, [key.split(".")[0]], "x")  # a section stands for its keys
    with pytest.raises(ConfigError):
        identity(change).require(BEGUN, [key[:-1]], "x")


def test_rows_and_models_are_compared_by_content():
    with pytest.raises(ConfigError, match=r"data: rows: r in the checkpoint, s now"):
        identity(rows="s").require(BEGUN, [], "x")
    with pytest.raises(ConfigError, match=r"model: policy: p in the checkpoint, q now(?s:.*)allow_change=\[model\]"):
        identity(policy="q").require(BEGUN, [], "x")
    identity(rows="s", policy="q").require(BEGUN, ["data", "model"], "x")


def test_a_key_that_is_new_or_gone_is_a_difference():
    older = {**BEGUN, "recipe": {**BEGUN["recipe"], "old_key": 1}}
    with pytest.raises(ConfigError, match=r"old_key: 1 in the checkpoint, '\(not there\)' now"):
        identity().require(older, [], "x")
    del older["recipe"]["gamma"], older["recipe"]["old_key"]
    with pytest.raises(ConfigError, match=r"gamma: '\(not there\)' in the checkpoint, 1.0 now"):
        identity().require(older, [], "x")


def test_every_key_of_a_role_that_is_harmless_is_a_key_of_some_role():
    """A pattern that fits no key would be a promise about nothing."""
    keys = describe_schema(ppo.Config).keys() | {f"policy.{key}" for key in describe_schema(SamplerConfig)}
    kept = identity().recipe
    for name in ("zero_stage", "max_tokens_per_micro_batch", "offload_optimizer", "offload_parameters", "max_num_seqs"):
        assert f"policy.{name}" in keys
        assert f"policy.{name}" not in kept


def test_another_algorithm_and_many_differences_are_told_in_a_few_lines():
    other = load_recipe(RECIPE.with_name("dpo.yaml"), []).config
    with pytest.raises(ConfigError) as caught:
        Identity.of(other, {"rows": "r"}, {"policy": "p"}).require(BEGUN, [], "runs/x/checkpoints/step-000004")
    assert str(caught.value) == (
        "runs/x/checkpoints/step-000004: the checkpoint belongs to a run of algorithm ppo, and this recipe is dpo\n"
        "  remedy: choose another run.dir"
    )
    changes = [f"{key}=0.123" for key in ("kl_coef", "gamma", "gae_lambda", "sampling.top_p", "policy.optimizer.lr")]
    changes += [
        "run.seed=9",
        "run.steps=9",
        "max_off_policy_steps=1",
        "epochs=9",
        "critic.optimizer.lr=9",
        "sampling.max_tokens=9",
    ]
    with pytest.raises(ConfigError) as caught:
        identity(*changes).require(BEGUN, [], "x")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 8 + 1 + 1
    assert lines[-2:] == ["    and 3 more", "  remedy: undo the change, or choose another run.dir"]
