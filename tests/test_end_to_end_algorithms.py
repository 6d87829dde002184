"""Whole runs of the other algorithms: on Ray against the same run in one process, rounds, samplers, caches."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.cli import main

HEAD = """
algorithm: {algorithm}
run: {{dir: x, steps: 3, seed: 1, logged_samples: 12, progress: none, trackers: []}}
data: {{path: {data}}}
policy: {{path: {policy}, dtype: float32, zero_stage: 2, optimizer: {{lr: 1e-3}}}}
"""

SAMPLED = """
reward: {{path: {reward}, dtype: float32}}
prompts_per_step: 4
truncated: keep
sampling: {{num_samples: 2, max_tokens: 10}}
"""

ROLES = {
    "rloo": "{policy: 0, reference: 2, reward: 3}",
    "ppo": "{policy: 0-1, critic: 2, reference: 3, reward: 3, eval_reward: 2}",
    "dpo": "{policy: 0-1, reference: 2}",
}
"""Two cores offer four slots."""


@pytest.fixture
def run(tmp_path, toy_data, tiny_policy, tiny_reward):
    """Trains a recipe and returns its folder; a run that is refused returns None."""

    def train(name: str, algorithm: str, *changes: str) -> Path:
        text = HEAD + (SAMPLED if algorithm != "dpo" else "")
        recipe = tmp_path / f"{algorithm}.yaml"
        recipe.write_text(text.format(algorithm=algorithm, data=toy_data, policy=tiny_policy, reward=tiny_reward))
        assert main(["train", str(recipe), f"run.dir={tmp_path / name}", *changes]) == 0
        return tmp_path / name

    return train


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def responses(folder: Path) -> list[str]:
    return [json.loads(line)["response"] for line in (folder / "samples.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def same(on_ray: dict, in_process: dict) -> None:
    """Equal numbers but for the clock."""
    clock = ("seconds/", "tokens_per_second/")
    if on_ray["kl"] == pytest.approx(0.0, abs=1e-4):  # what correlates with rounding is noise
        clock += ("correlation/reward_kl", "gain_per_root_kl")
    assert on_ray.keys() == in_process.keys()
    for name in (key for key in on_ray if not key.startswith(clock)):
        assert on_ray[name] == pytest.approx(in_process[name], rel=1e-3, abs=1e-4), name


@pytest.mark.slow
def test_ppo_on_five_roles_equals_ppo_in_one_process(run, tiny_reward):
    """Policy on two ranks, critic, reference, reward and a second reward model; held-out prompts in between."""
    options = [
        "minibatches=2",
        "epochs=2",
        "critic={zero_stage: 2, optimizer: {lr: 1e-3}}",
        f"eval_reward={{path: {tiny_reward}, dtype: float32}}",
        "evaluation={every: 2, prompts: 6, keep_best: true, best_by: sampled}",
    ]
    on_ray = run("ray", "ppo", *options, f"placement={ROLES['ppo']}")
    in_process = run("local", "ppo", *options, "executor=local")
    assert responses(on_ray) == responses(in_process)
    for a, b in zip(metrics(on_ray), metrics(in_process), strict=True):
        same(a, b)
        assert a["updates"] == a["critic/updates"] == 4
        assert {"seconds/values", "seconds/critic_update", "critic/loss", "explained_variance"} <= a.keys()
        assert a["disagreement"] == 0.0  # the second model is the first
    logs = {log.stem for log in (on_ray / "logs").iterdir()}
    assert logs == {"policy-0", "policy-1", "critic-0", "reference-0", "reward-0", "eval_reward-0"}
    evaluations = [json.loads(line) for line in (on_ray / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    assert evaluations[0]["heldout/greedy/win_rate/reward"] == 0.5
    assert len(evaluations[0]["answers"]) == 12
    (best,) = (on_ray / "best").iterdir()
    scores = {row["step"]: row["heldout/sampled/reward"] for row in evaluations}
    assert int(best.name.removeprefix("step-")) == max(scores, key=lambda step: scores[step])


@pytest.mark.slow
def test_a_sampler_on_slots_of_its_own_samples_what_the_policy_would(run):
    """Rollouts one step behind, from processes that get the weights sent, token for token."""
    placement = "sampler={}", "placement={policy: 0-1, sampler: 2, reference: 3, reward: 3}"
    on_ray = run("ray", "rloo", "max_off_policy_steps=1", *placement)
    in_process = run("local", "rloo", "max_off_policy_steps=1", "executor=local")
    apart = run("apart", "rloo", "max_off_policy_steps=1", "executor=local", *placement)
    on_policy = run("now", "rloo", "executor=local", *placement)
    plain = run("plain", "rloo", "executor=local")
    assert responses(on_ray) == responses(in_process) == responses(apart)
    assert responses(in_process) != responses(plain)
    for a, b in zip(metrics(on_ray), metrics(in_process), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert [row["mismatch_kl"] > 0 for row in metrics(in_process)] == [False, True, True]
    # The rollouts of steps 1 and 2 come from the same weights, those of step 3 from what step 1 made of them.
    assert ["seconds/sync" in row for row in metrics(on_ray)] == [True, False, True]
    for a, b in (
        (apart, in_process),
        (on_policy, plain),
    ):  # with rounding: a sampler recomputes log pi_old
        for name, weight in weights(a).items():
            torch.testing.assert_close(weight, weights(b)[name], rtol=0, atol=1e-4, msg=name)
    assert all(abs(row["mismatch_kl"]) < 1e-6 for row in metrics(on_policy))


@pytest.mark.slow
def test_dpo_on_ray_equals_dpo_from_a_cache(run, tmp_path):
    """Reference workers in each step, against numbers computed once by the policy, against the same numbers read."""
    on_ray = run("ray", "dpo", "batch_size=16", f"placement={ROLES['dpo']}")
    cache = f"reference_cache={tmp_path / 'cache'}"
    first = run("first", "dpo", "batch_size=16", "executor=local", cache)
    (file,) = (tmp_path / "cache").iterdir()
    written = file.stat().st_mtime_ns
    second = run("second", "dpo", "batch_size=16", "executor=local", cache)
    assert file.stat().st_mtime_ns == written
    assert "reference-0.log" in {log.name for log in (on_ray / "logs").iterdir()}
    for a, b, c in zip(*(metrics(folder) for folder in (on_ray, first, second)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert b["loss"] == c["loss"]
        assert "seconds/reference" in a and "seconds/reference" not in b
    assert metrics(first)[0]["margin"] == pytest.approx(0.0, abs=1e-5)  # the policy still is the reference
    assert all(torch.allclose(weights(on_ray)[name], weights(first)[name], atol=1e-5) for name in weights(on_ray))


def test_two_rounds_start_from_the_best(run, tiny_policy):
    """The second round's policy and reference are the best of the first; the critic starts anew; steps go on."""
    folder = run(
        "rounds",
        "ppo",
        "executor=local",
        "rounds=2",
        "minibatches=2",
        "critic.optimizer.lr=1e-3",
        "evaluation={every: 1, prompts: 4, keep_best: true}",
        "policy.optimizer.lr=1e-2",
    )
    numbers = metrics(folder)
    assert [row["step"] for row in numbers] == [1, 2, 3, 4, 5, 6]
    assert numbers[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(numbers[2]["kl"]) > 1e-3
    assert numbers[3]["kl"] == pytest.approx(0.0, abs=1e-5)  # to the new reference
    (best,) = (folder / "round-1" / "best").iterdir()
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    first = {row["step"]: row["heldout/greedy/reward"] for row in evaluations[:4]}
    assert list(first) == [0, 1, 2, 3]
    assert first[int(best.name.removeprefix("step-"))] == max(first.values())
    assert evaluations[4]["heldout/greedy/reward"] == pytest.approx(max(first.values()), abs=1e-5)
    assert (folder / "round-1" / "final").is_dir() and (folder / "final").is_dir()
    for exported in (best, folder / "round-1" / "final", folder / "final"):
        assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == [2]
        assert "algorithm `ppo`, optimizer steps:" in (exported / "README.md").read_text()
    assert len(json.loads((folder / "startup.json").read_text())["by_round"]) == 2


def test_a_critic_starts_from_the_reward_model(run, tmp_path, tiny_policy, tiny_reward):
    """Values of the state before the last token are near the scores; row 0 of an output layer serves as well."""
    plain = run("plain", "ppo", "executor=local", "critic.optimizer.lr=1e-3", "run.steps=1", "minibatches=1")
    assert metrics(plain)[0]["critic/value"] != 0.0
    row = tmp_path / "row"
    row.mkdir()
    for file in tiny_policy.iterdir():
        (row / file.name).write_bytes(file.read_bytes())
    state = load_file(tiny_policy / "model.safetensors")
    state["lm_head.weight"] = load_file(tiny_reward / "model.safetensors")["score.weight"].repeat(
        len(state["model.embed_tokens.weight"]), 1
    )
    for name, value in load_file(tiny_reward / "model.safetensors").items():
        if name.startswith("model."):
            state[name] = value
    save_file(state, row / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((row / "config.json").read_text())
    (row / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    changes = ["executor=local", "critic.optimizer.lr=1e-3", "run.steps=1", "minibatches=1", f"reward.path={row}"]
    from_row = run("row0", "ppo", *changes, "reward.head=lm_head_row0")
    for name in ("reward", "critic/value", "critic/loss", "critic/grad_norm", "explained_variance"):
        assert metrics(from_row)[0][name] == pytest.approx(metrics(plain)[0][name], rel=1e-4, abs=1e-6), name


def test_a_policy_without_a_reward_head_is_a_critic_only_when_told(run, tmp_path, tiny_policy, capsys):
    changes = ["executor=local", "critic.optimizer.lr=1e-3", f"critic.path={tiny_policy}", "minibatches=1"]
    with pytest.raises(AssertionError):
        run("refused", "ppo", *changes)
    assert "cannot tell how this checkpoint gives a reward" in capsys.readouterr().err
    assert metrics(run("fresh", "ppo", *changes, "critic.head=new", "run.steps=1"))[0]["critic/loss"] > 0


def test_gold_differences_come_from_the_reward_role(run, tiny_reward):
    options = ["executor=local", "batch_size=8", "run.steps=1", "gold=reward", "loss={kind: rpo_sq, beta: 0.1, eta: 2}"]
    by_reward = run("reward", "dpo", *options, f"reward={{path: {tiny_reward}, dtype: float32}}")
    assert "seconds/score" in metrics(by_reward)[0]
    by_strength = run("strength", "dpo", *options, "gold=strength")
    assert metrics(by_reward)[0]["loss"] != metrics(by_strength)[0]["loss"]


def test_simpo_needs_no_reference_workers(run):
    folder = run("simpo", "dpo", "executor=local", "batch_size=8", "loss={kind: simpo, beta: 2}")
    assert "seconds/reference" not in metrics(folder)[0]
