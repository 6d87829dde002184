"""Sections that are unions told apart by ``kind``, and sections that are null where they are absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config import (
    CheckpointRewardConfig,
    EndpointGeneratorConfig,
    FunctionRewardConfig,
    GenerativeRewardConfig,
    HttpRewardConfig,
)
from align.config.load import flatten_config, load_recipe, write_config
from align.errors import ConfigError

HEAD = """\
algorithm: {algorithm}
run: {{dir: runs/x, steps: 3}}
data: {{path: d}}
policy: {{path: p, optimizer: {{lr: 1e-6}}}}
reward: {reward}
"""


def load(tmp_path: Path, reward: str, *overrides: str, algorithm: str = "rloo", more: str = "") -> Any:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(HEAD.format(algorithm=algorithm, reward=reward) + more)
    return load_recipe(recipe, overrides).config


@pytest.mark.parametrize(
    ("reward", "overrides", "schema", "values"),
    [
        ("{path: r}", [], CheckpointRewardConfig, {"path": "r"}),
        ("{kind: http, url: 'http://h'}", ["reward.retries=3"], HttpRewardConfig, {"url": "http://h", "retries": 3}),
        # a later kind replaces the section; keys that both kinds have stay
        ("{path: r, failed: drop}", ["reward.kind=http", "reward.url=http://h"], HttpRewardConfig, {"failed": "drop"}),
        ("{path: r}", ["reward.url=http://h", "reward.kind=http"], HttpRewardConfig, {"url": "http://h"}),
        ("{kind: http, url: 'http://h'}", ["reward={kind: function, function: 'm:f'}"], FunctionRewardConfig, {}),
        ("{kind: http, url: 'http://h'}", ["reward.kind=checkpoint", "reward.path=r"], CheckpointRewardConfig, {}),
    ],
)
def test_kind_selects_the_schema(tmp_path: Path, reward: str, overrides: list[str], schema: type, values: dict):
    config = load(tmp_path, reward, *overrides)
    assert type(config.reward) is schema
    assert {name: getattr(config.reward, name) for name in values} == values
    write_config(config, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml").config == config


def test_a_union_within_a_union(tmp_path: Path):
    judge = "{kind: generative, judge: {kind: endpoint, url: 'http://h/v1', model: m}}"
    config = load(tmp_path, judge, "reward.judge.timeout_s=5")
    assert type(config.reward) is GenerativeRewardConfig and type(config.reward.judge) is EndpointGeneratorConfig
    assert config.reward.judge.timeout_s == 5.0
    local = load(tmp_path, judge, "reward.judge.kind=model", "reward.judge.path=j").reward.judge
    assert local.path == "j" and not hasattr(local, "url")


@pytest.mark.parametrize(
    ("reward", "overrides", "parts"),
    [
        ("{path: r, url: 'http://h'}", [], ["reward.url: unknown key", "url belongs to reward.kind=http", ":5"]),
        ("{path: r, kind: htp}", [], ["reward.kind: expected one of checkpoint, ensemble, generative, http, function"]),
        ("null", [], ["reward: expected a section, found null"]),
        ("[r]", [], ["reward: expected a section, found a list of 1"]),
        ("{kind: http}", [], ["reward.url: has no value"]),
        ("{path: r}", ["eval_reward.url=http://h"], ["eval_reward.url: unknown key", "eval_reward.kind=http"]),
        ("{path: r}", ["sampler=1"], ["sampler: expected a section, found '1'", "give it keys: path"]),
        ("{path: r}", ["policy.lora=8"], ["policy.lora: expected a section, found '8'", "rank"]),
        ("{path: r}", ["eval_reward=${reward}"], ["eval_reward: expected a section, found '${reward}'"]),
        ("{path: r}", ["eval_reward=[a]"], ["eval_reward: expected a section, found a list of 1"]),
    ],
)
def test_what_fits_no_schema_is_refused(tmp_path: Path, reward: str, overrides: list[str], parts: list[str]):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, reward, *overrides)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_an_optional_section_is_null_until_a_key_is_given(tmp_path: Path):
    config = load(tmp_path, "{path: r}")
    assert config.eval_reward is None and config.sampler is None and config.policy.lora is None
    assert {"eval_reward", "sampler"} <= config.absent()
    assert not any(key.startswith(("eval_reward.", "sampler.")) for key in flatten_config(config))
    given = "eval_reward: {path: e}\nsampler: {}\n"
    config = load(tmp_path, "{path: r}", "policy.lora.rank=4", more=given)
    assert (config.eval_reward.path, config.sampler.path, config.policy.lora.rank) == ("e", "p", 4)
    config = load(tmp_path, "{path: r}", "eval_reward=null", more=given)
    assert config.eval_reward is None and config.sampler is not None
    config = load(tmp_path, "{path: r}", "eval_reward=null", "eval_reward.path=f", more=given)
    assert config.eval_reward.path == "f"


def test_the_default_critic_follows_a_checkpoint_and_no_other_reward(tmp_path: Path):
    own = ["critic.optimizer.lr=1e-5"]
    assert load(tmp_path, "{path: r, revision: v}", *own, algorithm="ppo").critic.revision == "v"
    http = "{kind: http, url: 'http://h'}"
    critic = load(tmp_path, http, *own, "critic.path=${policy.path}", "critic.head=new", algorithm="ppo").critic
    assert (critic.path, critic.revision, critic.reward_head) == ("p", None, "auto")
    with pytest.raises(ConfigError, match=r"critic\.path: has no value\n.*no checkpoint.*critic\.head=new"):
        load(tmp_path, http, *own, algorithm="ppo")
