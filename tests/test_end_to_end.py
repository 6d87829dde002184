"""Whole runs: the command line, Ray with four roles, and the same run in one process."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.cli import main

RLOO = """
algorithm: rloo
run: {{dir: {run}, steps: 3, seed: 1, logged_samples: 12, progress: none}}
data: {{path: {data}}}
prompts_per_step: 3
kl_reduction: sum
kl_coef: 0.05
truncated: keep
sampling: {{num_samples: 4, max_tokens: 10}}
policy:
  path: {policy}
  dtype: float32
  zero_stage: 2
  optimizer: {{lr: 1e-3}}
reference: {{dtype: float32}}
reward: {{path: {reward}, dtype: float32}}
placement: {{policy: 0-1, reference: 2, reward: 3}}
"""


def recipe(folder: Path, text: str, **values: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text.format(**values))
    return path


def lines(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.mark.slow
def test_rloo_on_four_roles_equals_rloo_in_one_process(tmp_path, toy_data, tiny_policy, tiny_reward):
    """Two data-parallel ranks, reference and reward in processes of their own against everything in this one: the same
    samples token for token, the same numbers and weights within float reduction."""
    ray, local = (tmp_path / name for name in ("ray", "local"))
    for run in (ray, local):
        path = recipe(tmp_path, RLOO, run=run, data=toy_data, policy=tiny_policy, reward=tiny_reward)
        assert main(["train", str(path), f"executor={run.name}"]) == 0
    assert {log.name for log in (ray / "logs").iterdir()} == {
        "policy-0.log",
        "policy-1.log",
        "reference-0.log",
        "reward-0.log",
    }
    samples = lines(ray, "samples.jsonl")
    assert len(samples) == 3 * 12
    for on_ray, in_process in zip(samples, lines(local, "samples.jsonl"), strict=True):
        assert on_ray | {"score": 0} == in_process | {"score": 0}
        assert on_ray["score"] == pytest.approx(in_process["score"], abs=1e-5)
    for on_ray, in_process in zip(lines(ray, "metrics.jsonl"), lines(local, "metrics.jsonl"), strict=True):
        assert on_ray.keys() == in_process.keys()
        noise = ("seconds/", "tokens_per_second/")
        if on_ray["step"] == 1:  # the policy still is the reference: what correlates with rounding is noise
            noise += ("correlation/reward_kl", "gain_per_root_kl")
        for name in on_ray.keys() - {n for n in on_ray if n.startswith(noise)}:
            assert on_ray[name] == pytest.approx(in_process[name], rel=1e-4, abs=1e-5), name
        phases = {"generate", "score", "reference", "update", "wait", "step"}
        assert {f"seconds/{phase}" for phase in phases} <= on_ray.keys()
    first, second = (AutoModelForCausalLM.from_pretrained(run / "final") for run in (ray, local))
    before = AutoModelForCausalLM.from_pretrained(tiny_policy)
    pairs = list(zip(first.parameters(), second.parameters(), before.parameters(), strict=True))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b, _ in pairs)
    assert any((a - c).abs().max() > 1e-4 for a, _, c in pairs)
    assert json.loads((ray / "data.json").read_text())["prepared"]["kept"] == 300
    assert json.loads((ray / "startup.json").read_text())["seconds"] > 0


PAIRS = """
algorithm: reward_model
run: {{dir: {run}, steps: {steps}, progress: none, trackers: []}}
data: {{path: {data}, bad_rows: skip, {data_options}}}
executor: local
batch_size: 16
validate_every: 0
reward:
  path: {model}
  init: {{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
         num_key_value_heads: 2, max_position_embeddings: 1024}}
  dtype: float32
  optimizer: {{lr: 2e-3}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("gather", ["true", "false"])
def test_sharded_roles_sample_the_same(tmp_path, toy_data, tiny_policy, tiny_reward, gather):
    """At ZeRO 3 over two ranks, weights gathered or fetched layer by layer while sampling, against whole weights; every
    role, and in the second run the policy. Three prompts over two ranks make them take unequally many passes."""
    sharded = ["policy.zero_stage=3", f"policy.gather_weights_for_generation={gather}"]
    if gather == "true":
        sharded += ["reference.zero_stage=3", "reward.zero_stage=3"]
        sharded += ["placement.reference=2-3", "placement.reward=2-3"]
    for name, changes in (("sharded", sharded), ("whole", ["executor=local"])):
        path = recipe(tmp_path, RLOO, run=tmp_path / name, data=toy_data, policy=tiny_policy, reward=tiny_reward)
        assert main(["train", str(path), "run.steps=2", *changes]) == 0
    sharded, whole = (lines(tmp_path / name, "samples.jsonl") for name in ("sharded", "whole"))
    assert [sample["response"] for sample in sharded] == [sample["response"] for sample in whole]
    for a, b in zip(*(lines(tmp_path / name, "metrics.jsonl") for name in ("sharded", "whole")), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_reward_model_learns_and_reloads(tmp_path, toy_data):
    """Loss falls, and what is written loads with its head in plain transformers."""
    model = toy_data / "tokenizer"
    path = recipe(tmp_path, PAIRS, run=tmp_path / "run", steps=80, data=toy_data, model=model, data_options="")
    assert main(["train", str(path)]) == 0
    metrics = lines(tmp_path / "run", "metrics.jsonl")
    assert sum(m["loss"] for m in metrics[-5:]) < 0.8 * sum(m["loss"] for m in metrics[:5])
    assert 0.5 < metrics[-1]["validation/accuracy"] <= 1.0
    assert 0.0 <= metrics[-1]["validation/calibration_error"] <= 0.5
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "final", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_an_unknown_key_stops_before_anything(tmp_path, toy_data, tiny_policy, tiny_reward, capsys):
    path = recipe(tmp_path, RLOO, run=tmp_path / "r", data=toy_data, policy=tiny_policy, reward=tiny_reward)
    assert main(["train", str(path), "run.step=3"]) == 78
    message = capsys.readouterr().err
    assert "command line: run.step" in message
    assert "did you mean" in message
    assert "`run.steps`" in message
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("data.path=/nowhere", ["/nowhere"]),
        ("reward.path=/nowhere", ["reward.path=/nowhere", "there is no such file or folder"]),
        ("placement.policy=0-x", ["placement.policy", "'0-x'", "write 0, 0-3 or 0,2"]),
        ("placement.critic=0", ["no role is called critic", "policy, reward, reference"]),
        ("sampling.num_samples=1", ["sampling.num_samples", "at least 2"]),
        ("policy.dtype=bfloat16 policy.zero_stage=0", ["zero_stage 1, 2 or 3"]),
        ("data.max_prompt_tokens=2", ["no prompts are left", "too_long 300"]),
    ],
)
def test_what_cannot_run_is_refused_without_a_run_folder(
    tmp_path, toy_data, tiny_policy, tiny_reward, capsys, change, parts
):
    path = recipe(tmp_path, RLOO, run=tmp_path / "r", data=toy_data, policy=tiny_policy, reward=tiny_reward)
    assert main(["train", str(path), *change.split()]) == 78
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message
    assert not (tmp_path / "r").exists()


def test_a_malformed_row_is_named(tmp_path, toy_data, tiny_policy, tiny_reward, capsys):
    broken = tmp_path / "data" / "preference"
    broken.mkdir(parents=True)
    row = {"domain": "d", "language": "l", "context": "say", "response1": "a", "response2": "b"}
    good, bad = (json.dumps(row | {"overall_preference": preference}) for preference in (1, 7))
    (broken / "train.jsonl").write_text(f"{good}\n{bad}\n")
    (broken / "validation.jsonl").write_text(f"{good}\n")
    path = recipe(tmp_path, RLOO, run=tmp_path / "r", data=broken.parent, policy=tiny_policy, reward=tiny_reward)
    assert main(["train", str(path)]) == 78
    message = capsys.readouterr().err
    assert "train.jsonl:2" in message
    assert "overall_preference" in message
    assert "data.bad_rows=skip" in message


def test_a_reference_with_another_tokenizer_is_refused(tmp_path, toy_data, tiny_policy, tiny_reward, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_policy.iterdir():
        text = file.read_bytes()
        (other / file.name).write_bytes(text.replace(b'"wolf"', b'"lion"') if file.name == "tokenizer.json" else text)
    path = recipe(tmp_path, RLOO, run=tmp_path / "r", data=toy_data, policy=tiny_policy, reward=tiny_reward)
    assert main(["train", str(path), f"reference.path={other}"]) == 78
    message = capsys.readouterr().err
    assert "different tokenizers" in message
    assert "wolf" in message
    assert "lion" in message


def test_a_causal_model_is_no_reward_model(tmp_path, toy_data, tiny_policy, capsys):
    """transformers would fill the head with noise and only warn."""
    path = recipe(tmp_path, RLOO, run=tmp_path / "r", data=toy_data, policy=tiny_policy, reward=tiny_policy)
    assert main(["train", str(path), "executor=local"]) == 78
    assert "reward.head=lm_head_row0" in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_starts_nothing(tmp_path, toy_data, tiny_policy, tiny_reward, capsys):
    path = recipe(tmp_path, RLOO, run=tmp_path / "r", data=toy_data, policy=tiny_policy, reward=tiny_reward)
    assert main(["train", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "0,1" in out
    assert "4 slots of Ray" in out
    assert not (tmp_path / "r").exists()


def test_show_tells_where_values_come_from(tmp_path, toy_data, tiny_policy, tiny_reward, capsys):
    path = recipe(tmp_path, RLOO, run=tmp_path / "r", data=toy_data, policy=tiny_policy, reward=tiny_reward)
    assert main(["show", str(path), "run.steps=5", "--all"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    assert rows["run.steps"].split()[1:] == ["5", "command", "line"]
    assert rows["kl_coef"].split()[1] == "0.05"
    assert rows["kl_coef"].rstrip().endswith("recipe.yaml:7")
    assert rows["kl_estimator"].rstrip().endswith("default")
    assert str(tiny_policy) in rows["reference.path"]


@pytest.mark.slow
def test_a_reward_model_on_pairs_labelled_by_people(tmp_path, human_preference, byte_tokenizer):
    """A small random Llama fits the training pairs of the real folder for a few steps."""
    options = "max_rows: 150, max_prompt_tokens: 400, max_response_tokens: 300"
    path = recipe(
        tmp_path, PAIRS, run=tmp_path / "r", steps=60, data=human_preference, model=byte_tokenizer, data_options=options
    )
    assert main(["train", str(path), "loss=scaled", "run.seed=3"]) == 0
    counts = json.loads((tmp_path / "r" / "data.json").read_text())
    assert counts["source"]["train"]["read"] == 150
    assert counts["prepared"]["kept"] > 50
    metrics = lines(tmp_path / "r", "metrics.jsonl")
    assert sum(m["loss"] for m in metrics[-8:]) < 0.9 * sum(m["loss"] for m in metrics[:8])


@pytest.mark.slow
def test_rloo_on_prompts_of_people(tmp_path, human_preference, byte_models):
    policy, reward = byte_models
    path = recipe(tmp_path, RLOO, run=tmp_path / "r", data=human_preference, policy=policy, reward=reward)
    changes = ["data.bad_rows=skip", "data.max_prompt_tokens=400", "run.steps=3", "sampling.max_tokens=24"]
    assert main(["train", str(path), *changes]) == 0
    metrics = lines(tmp_path / "r", "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert all(m["generated_tokens"] > 0 and m["grad_norm"] > 0 for m in metrics)
    assert abs(metrics[0]["kl"]) < 1e-4  # the policy still is the reference
    assert abs(metrics[2]["kl"]) > 1e-4


@pytest.mark.slow
def test_a_sharded_reward_model_trains_like_a_whole_one(tmp_path, toy_data, tiny_policy):
    """At ZeRO 3 the head that the checkpoint lacks is drawn anew into shards, the same on every rank."""
    text = f"""
algorithm: reward_model
run: {{dir: x, steps: 3, progress: none, trackers: []}}
data: {{path: {toy_data}}}
batch_size: 8
reward: {{path: {tiny_policy}, dtype: float32, zero_stage: 3, optimizer: {{lr: 1e-3}}}}
placement: {{reward: 0-1}}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    for name, changes in (("sharded", []), ("whole", ["executor=local", "reward.zero_stage=1"])):
        assert main(["train", str(tmp_path / "recipe.yaml"), f"run.dir={tmp_path / name}", *changes]) == 0
    sharded, whole = (lines(tmp_path / name, "metrics.jsonl") for name in ("sharded", "whole"))
    assert [step["loss"] for step in sharded] == pytest.approx([step["loss"] for step in whole], rel=1e-4)
