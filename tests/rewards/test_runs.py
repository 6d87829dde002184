"""PPO and RLOO learn from every sort of judge: nothing is lost, and what is counted is right."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from align.cli import main
from align.data import toy
from align.rewards import card
from align.rewards.card import Card

RECIPE = """
algorithm: {algorithm}
run: {{dir: {run}, steps: 3, seed: 1, logged_samples: 16, progress: none, trackers: []}}
data: {{path: {data}, max_rows: 60}}
executor: local
policy: {{path: {policy}, dtype: float32, optimizer: {{lr: 2e-3}}}}
reference: {{dtype: float32}}
reward: {reward}
prompts_per_step: 4
minibatches: 1
truncated: keep
sampling: {{num_samples: 2, max_tokens: 8}}
evaluation: {{every: 3, prompts: 5}}
"""
CRITIC = "critic: {{dtype: float32, optimizer: {{lr: 2e-3}}{start}}}\n"
FROM_POLICY = ", path: '${policy.path}', head: new, trust_remote_code: false"

TRUTH = """
from align.data import toy

def truth(prompts, completions, **kwargs):
    return [toy.score(p[-1]["content"], c[0]["content"]) for p, c in zip(prompts, completions, strict=True)]
"""
HELD_OUT = 2 * 2 * 5
"""Answers of two evaluations, greedy and sampled; the first step's line counts those before it."""


class Service(ThreadingHTTPServer):
    """Scores conversations by the rule of the bundled task; every fifth request fails."""

    def __init__(self) -> None:
        self.seen, self.failed, self.lock = 0, 0, threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        with self.server.lock:
            self.server.seen += 1
            fails = self.server.seen % 5 == 0
            self.server.failed += fails
        turns = [[turn["content"] for turn in one["messages"][-2:]] for one in asked]
        rows = [{"object": "reward", "index": i, "score": toy.score(*pair)} for i, pair in enumerate(turns)]
        answer = {"error": {"message": "busy"}} if fails else {"object": "list", "model": "toy", "data": rows}
        body = json.dumps(answer).encode()
        self.send_response(503 if fails else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def classifier(folder: Path, tokenizer: PreTrainedTokenizerFast, own: Card | None, num_labels: int) -> Path:
    """A small random reward model."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), num_labels=num_labels, **sizes)
    config.pad_token_id = tokenizer.pad_token_id
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if own is not None:
        (folder / card.NAME).write_text(own.dumps())
    return folder


def train(folder: Path, algorithm: str, name: str, reward: str, *changes: str, critic: str = "", **paths: Path) -> Path:
    """A run in this process; returns its folder."""
    text = RECIPE.format(algorithm=algorithm, run=folder / name, reward=reward, **paths)
    if algorithm == "ppo":
        text += CRITIC.format(start=critic)
    (folder / f"{name}.yaml").write_text(text)
    assert main(["train", str(folder / f"{name}.yaml"), *changes]) == 0
    return folder / name


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def learned(run: Path) -> list[dict[str, Any]]:
    """Metrics without those that depend on the moment."""
    noise = ("seconds/", "tokens_per_second/", "reward/service/")
    return [{k: v for k, v in line.items() if not k.startswith(noise)} for line in lines(run)]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rloo", pytest.param("ppo", marks=pytest.mark.full)])
def test_a_service_that_fails_gives_what_a_function_gives(tmp_path, toy_data, tiny_policy, service, algorithm, capsys):
    """Step by step the same numbers and samples, though every fifth request fails; each answer is asked for once."""
    paths = {"data": toy_data, "policy": tiny_policy}
    (tmp_path / "judge.py").write_text(TRUTH)
    function = f"{{kind: function, function: '{tmp_path / 'judge.py'}:truth'}}"
    url = f"http://127.0.0.1:{service.server_address[1]}"
    http = f"{{kind: http, url: '{url}', batch_size: 2, backoff_s: 0.01, max_backoff_s: 0.02}}"
    called = train(tmp_path, algorithm, "function", function, critic=FROM_POLICY, **paths)
    asked = train(tmp_path, algorithm, "http", http, critic=FROM_POLICY, **paths)
    assert f"reward reads text ({url})" in capsys.readouterr().out
    assert learned(asked) == learned(called)
    assert lines(asked, "samples.jsonl") == lines(called, "samples.jsonl")
    samples = lines(called, "samples.jsonl")
    assert len(samples) == 3 * 8
    for sample in samples:
        assert sample["prompt"].startswith("<s> <user>") and sample["prompt"].endswith("<assistant>")  # roles show
        prompt, response = (re.sub(r" ?<[^>]+> ?", "", sample[name]) for name in ("prompt", "response"))
        assert sample["score"] == toy.score(prompt, response)
    counted = [{k: v for k, v in line.items() if k.startswith("reward/service/")} for line in lines(asked)]
    total = {key: sum(line.get(f"reward/service/{key}", 0.0) for line in counted) for key in (
        "requests", "retries", "failures", "cache_hits", "scored", "unscored"
    )}  # fmt: skip
    assert total["requests"] == service.seen
    assert total["retries"] == service.failed == service.seen // 5 > 0
    assert total["failures"] == total["unscored"] == 0
    assert total["scored"] + total["cache_hits"] == 3 * 8 + HELD_OUT
    assert counted[0]["reward/service/latency_mean"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [pytest.param("rloo", marks=pytest.mark.full), "ppo"])
def test_a_model_with_attributes_learns_like_its_weighted_sum(tmp_path, toy_data, tiny_policy, algorithm):
    """A head of two attributes with goodness weights, against a head whose one row is their weighted sum; PPO's critic
    starts from either."""
    own = Card("attributes", ("a", "b"), {"a": 1.0, "b": -0.5})
    two = classifier(tmp_path / "two", toy.tokenizer(), own, 2)
    one = classifier(tmp_path / "one", toy.tokenizer(), None, 1)
    model = AutoModelForSequenceClassification.from_pretrained(two)
    row = model.score.weight.data[:1] - 0.5 * model.score.weight.data[1:]
    model.score = torch.nn.Linear(32, 1, bias=False)
    model.score.weight.data = row
    model.config.num_labels = 1
    model.save_pretrained(one)
    paths = {"data": toy_data, "policy": tiny_policy}
    a, b = (
        train(tmp_path, algorithm, name, f"{{path: {path}, dtype: float32}}", **paths)
        for name, path in (("attributes", two), ("sum", one))
    )
    for there, here in zip(learned(a), learned(b), strict=True):
        assert there.keys() == here.keys()
        for name, value in there.items():
            if not name.startswith(("correlation/", "gain_per_root_kl")):
                assert value == pytest.approx(here[name], rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_a_reward_with_another_tokenizer(tmp_path, toy_data, tiny_policy, byte_tokenizer, capsys):
    """RLOO on words against an ensemble of a model over bytes and one over words, both read as text."""
    own = PreTrainedTokenizerFast.from_pretrained(byte_tokenizer)
    other = classifier(tmp_path / "bytes", own, None, 1)
    same = classifier(tmp_path / "words", toy.tokenizer(), None, 1)
    reward = f"{{kind: ensemble, path: {other}, dtype: float32, paths: [{same}], combine: minimum}}"
    run = train(tmp_path, "rloo", "r", reward, data=toy_data, policy=tiny_policy)
    out = capsys.readouterr().out
    assert f"reward reads text ({other}: its tokenizer is not the policy's)" in out
    assert all(line["reward/disagreement"] > 0 for line in lines(run))
    assert len({sample["score"] for sample in lines(run, "samples.jsonl")}) > 8


@pytest.mark.slow
def test_ids_pass_where_tokenizers_are_the_same(tmp_path, toy_data, tiny_policy, tiny_reward, capsys):
    """No word of text, and the same samples as with the one template written out in the recipe, which is the run's."""
    (tmp_path / "t.jinja").write_text(toy.CHAT_TEMPLATE)
    runs = []
    for name, more in (("plain", ""), ("named", f", chat_template: {tmp_path / 't.jinja'}")):
        reward = f"{{path: {tiny_reward}, dtype: float32{more}}}"
        runs.append(train(tmp_path, "rloo", name, reward, data=toy_data, policy=tiny_policy))
    assert "reads text" not in capsys.readouterr().out
    assert learned(runs[0]) == learned(runs[1])


@pytest.mark.slow
def test_a_function_with_no_score_takes_its_prompt_out(tmp_path, toy_data, tiny_policy):
    """With ``failed: drop`` the group of a response without a score is left out and counted; with ``fail`` the run
    stops."""
    (tmp_path / "judge.py").write_text(
        "def some(completion_ids, **kwargs):\n"
        "    return [None if i == 0 else float(len(ids)) for i, ids in enumerate(completion_ids)]\n"
    )
    reward = f"{{kind: function, function: '{tmp_path / 'judge.py'}:some', failed: drop}}"
    run = train(tmp_path, "rloo", "drop", reward, "evaluation.every=0", data=toy_data, policy=tiny_policy)
    assert [line["usable"] for line in lines(run)] == [0.75] * 3  # one prompt of four
    assert [line["failed_scores"] for line in lines(run)] == [1.0] * 3
    stops = ["reward.failed=fail", f"run.dir={tmp_path / 'stop'}", "evaluation.every=0"]
    assert main(["train", str(tmp_path / "drop.yaml"), *stops]) == 79


@pytest.mark.full
@pytest.mark.slow
def test_rloo_learns_a_function(tmp_path, toy_data, tiny_policy):
    """The share of a liked word rises from one in 67 to more than nine in ten."""
    (tmp_path / "judge.py").write_text(
        "def liked(completions, **kwargs):\n"
        "    words = [one[0]['content'].split() for one in completions]\n"
        "    return [said.count('cat') / len(said) if said else 0.0 for said in words]\n"
    )
    reward = f"{{kind: function, function: '{tmp_path / 'judge.py'}:liked'}}"
    changes = ["run.steps=60", "prompts_per_step=16", "sampling={num_samples: 4, max_tokens: 6}", "kl_coef=0"]
    changes += ["policy.optimizer.lr=5e-3", "evaluation.every=0"]
    run = train(tmp_path, "rloo", "learn", reward, *changes, data=toy_data, policy=tiny_policy)
    metrics = lines(run)
    assert metrics[0]["reward"] < 0.1
    assert metrics[-1]["reward"] > 0.9


@pytest.mark.slow
def test_a_changed_function_is_another_run(tmp_path, toy_data, tiny_policy, capsys):
    (tmp_path / "judge.py").write_text(
        "def f(prompts, **kwargs):\n    return [1.0 * (i % 3) for i in range(len(prompts))]\n"
    )
    reward = f"{{kind: function, function: '{tmp_path / 'judge.py'}:f'}}"
    train(tmp_path, "rloo", "r", reward, "run.steps=1", data=toy_data, policy=tiny_policy)
    (tmp_path / "judge.py").write_text("def f(prompts, **kwargs):\n    return [0.0] * len(prompts)\n")
    assert main(["train", str(tmp_path / "r.yaml"), "run.steps=1"]) == 78
    assert "model: reward" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_judges_on_ray(tmp_path, toy_data, tiny_policy, byte_tokenizer):
    """A text model over two processes gives the samples and scores that it gives in one."""
    own = PreTrainedTokenizerFast.from_pretrained(byte_tokenizer)
    other = classifier(tmp_path / "bytes", own, None, 1)
    reward = f"{{path: {other}, dtype: float32}}"
    here = train(tmp_path, "rloo", "here", reward, "run.steps=2", data=toy_data, policy=tiny_policy)
    ray = [
        "executor=ray",
        "run.steps=2",
        "placement={policy: 0, reference: 0, reward: 0-1}",
        f"run.dir={tmp_path / 'ray'}",
    ]
    assert main(["train", str(tmp_path / "here.yaml"), *ray]) == 0
    for a, b in zip(lines(here, "samples.jsonl"), lines(tmp_path / "ray", "samples.jsonl"), strict=True):
        assert a["response"] == b["response"]
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
