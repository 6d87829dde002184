"""What a judge cannot be is refused before a run begins, in one message that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from align.cli import main
from align.config import VerdictConfig
from align.data import toy
from align.rewards import card, genrm_card
from align.rewards.card import Card, ScoreMoments

RECIPE = """
algorithm: {algorithm}
run: {{dir: {run}, steps: 1, progress: none, trackers: []}}
data: {{path: {data}, max_rows: 20}}
executor: local
policy: {{path: {policy}, dtype: float32, optimizer: {{lr: 1e-3}}}}
prompts_per_step: 2
minibatches: 1
sampling: {{num_samples: 2, max_tokens: 4}}
"""
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
FIVE = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Path) -> dict[str, Path]:
    """Checkpoints, and what stands beside them."""
    root = tmp_path_factory.mktemp("checkpoints")
    bytes_only = PreTrainedTokenizerFast.from_pretrained(byte_tokenizer)
    bare = PreTrainedTokenizerFast.from_pretrained(byte_tokenizer)
    bare.chat_template = None
    deaf = PreTrainedTokenizerFast.from_pretrained(byte_tokenizer)
    known = "in messages if m.role in ('user', 'assistant') %}"
    deaf.chat_template = str(bytes_only.chat_template).replace("in messages %}", known)
    dated = PreTrainedTokenizerFast.from_pretrained(byte_tokenizer)
    dated.chat_template = "{{ strftime_now('%d') }}" + str(bytes_only.chat_template)

    def save(name: str, auto: Any, tokenizer: Any, own: Card | str | None = None, **fields: Any) -> None:
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), **SIZES, **fields)
        auto.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        if own is not None:
            (root / name / card.NAME).write_text(own if isinstance(own, str) else own.dumps())

    save("causal", AutoModelForCausalLM, toy.tokenizer())
    save("one", AutoModelForSequenceClassification, toy.tokenizer(), num_labels=1)
    save("five", AutoModelForSequenceClassification, toy.tokenizer(), Card("attributes", FIVE), num_labels=5)
    scale = Card("attributes", FIVE, {"helpfulness": 1.0}, ScoreMoments(2.0, 1.0, 9))
    save("measured", AutoModelForSequenceClassification, toy.tokenizer(), scale, num_labels=5)
    save("nameless", AutoModelForSequenceClassification, toy.tokenizer(), num_labels=3)
    save("broken", AutoModelForSequenceClassification, toy.tokenizer(), "{", num_labels=1)
    future = json.loads(Card("sequence_classification").dumps()) | {"version": 2}
    save("future", AutoModelForSequenceClassification, toy.tokenizer(), json.dumps(future), num_labels=1)
    save("strange", AutoModelForSequenceClassification, toy.tokenizer(), Card("oracle"), num_labels=1)
    save("bytes", AutoModelForSequenceClassification, bytes_only, num_labels=1)
    save("bare", AutoModelForSequenceClassification, bare, num_labels=1)
    save("dated", AutoModelForSequenceClassification, dated, num_labels=1)
    save("deaf", AutoModelForCausalLM, deaf)
    save("learned", AutoModelForCausalLM, bytes_only)
    for name, text in genrm_card.files(VerdictConfig(form="json"), None).items():
        (root / "learned" / name).write_text(text)
    (root / "judge.py").write_text("def f(prompts, completions, answer): return [0.0] * len(prompts)\n")
    return {path.stem: path for path in root.iterdir()}


CASES: dict[str, tuple[str, list[str]]] = {
    "no checkpoint": ("reward.path={nowhere}", ["nowhere: there is no such file or folder", "give a folder"]),
    "a causal model": ("reward.path={causal}", ["cannot tell how", "reward.head=lm_head_row0", "reward.head=yes_no"]),
    "a card that is no JSON": ("reward.path={broken}", ["align_reward.json", "cannot be read", "set reward.head"]),
    "a card of a later version": ("reward.path={future}", ["version 2", "update align"]),
    "a card of no kind": (
        "reward.path={strange}",
        ["has kind oracle", "sequence_classification", "set reward.head"],
    ),
    "no weights": ("reward.path={five}", ["combine helpfulness, correctness", "reward.weights.helpfulness=1"]),
    "a weight of nothing": (
        "reward.path={five} reward.weights.helpfullness=1",
        ["helpfullness, which is not an output", "did you mean `helpfulness`?", "outputs: helpfulness, correctness"],
    ),
    "no names": ("reward.path={nameless}", ["does not name the 3 outputs", "reward.attributes=[helpfulness, ...]"]),
    "too few names": (
        "reward.path={nameless} reward.attributes=[a,b] reward.weights.a=1",
        ["has 3 outputs, 2 are named: a, b"],
    ),
    "names in another order": (
        "reward.path={five} reward.attributes=[correctness,helpfulness,coherence,complexity,verbosity]",
        ["has the outputs helpfulness, correctness", "remove reward.attributes"],
    ),
    "moments of another score": (
        "reward.path={measured} reward.normalize=true reward.weights.verbosity=1",
        ["of a score with these weights", "has those with {'helpfulness': 1.0}", "remove reward.weights"],
    ),
    "a name twice": ("reward.path={nameless} reward.attributes=[a,a,b] reward.weights.a=1", ["lists a more than once"]),
    "weights of one score": ("reward.path={one} reward.weights.a=1", ["is read as sequence_classification", "remove"]),
    "moments that nobody took": (
        "reward.path={one} reward.normalize=true",
        ["normalize needs the mean and standard deviation", "algorithm: reward_model", "shaping.mean"],
    ),
    "Yes is no token": (
        "reward.path={causal} reward.head=yes_no reward.principle=x",
        ["needs Yes as one token", "another reward.head"],
    ),
    "a member that is none": (
        "reward.kind=ensemble reward.path={one} reward.paths=[{causal}]",
        ["causal: cannot tell how"],
    ),
    "no template to render by": ("reward.path={bare}", ["no chat template", "reward.chat_template=FILE"]),
    "a template with today's date": ("reward.path={dated}", ["writes today's date", "reward.date='26 Jul 2024'"]),
    "a template that is not there": (
        "reward.path={one} reward.chat_template={nowhere}",
        ["reward.chat_template=", "nowhere: there is no such file or folder"],
    ),
    "no such file": ("reward.kind=function reward.function={nowhere}.py:f", ["nowhere.py", "path/to/file.py:function"]),
    "no such function": ("reward.kind=function reward.function={judge}:g", ["has no function g", "it has: f"]),
    "a column of data": (
        "reward.kind=function reward.function={judge}:f",
        ["requires the argument answer", "**kwargs"],
    ),
    "no token": (
        "reward.kind=http reward.url=http://127.0.0.1:9 reward.token_env=ALIGN_NO_SUCH_TOKEN",
        ["ALIGN_NO_SUCH_TOKEN is not set"],
    ),
    "a judge that is nobody": (
        "reward.kind=generative",
        ["reward.judge.path: has no value", "reward.judge.path=VALUE"],
    ),
    "a judge without its key": (
        "reward.kind=generative reward.judge.kind=endpoint reward.judge.model=m "
        "reward.judge.url=http://127.0.0.1:9/v1 "
        "reward.judge.key_env=ALIGN_NO_SUCH_KEY",
        ["key_env", "ALIGN_NO_SUCH_KEY is not set", "export ALIGN_NO_SUCH_KEY=KEY"],
    ),
    "a judge in shards": (
        "reward.kind=generative reward.judge.path={causal} reward.judge.zero_stage=3",
        ["judge.zero_stage must be below 3", "reward.judge.zero_stage = 3"],
    ),
    "a judge that does not see the responses": (
        "reward.kind=generative reward.judge.path={deaf} reward.custom_roles=true",
        ["drops turns of the role response_1", "reward.custom_roles=false"],
    ),
    "a judge that learned another form": (
        "reward.kind=generative reward.judge.path={learned}",
        ["trained with reward.form=json", "remedy: set reward.form=json"],
    ),
}

CRITICS: dict[str, tuple[str, list[str]]] = {
    "a service has no head": (
        "reward.kind=http reward.url=http://127.0.0.1:9",
        ["critic.path: has no value", "no checkpoint", "critic.path=${policy.path} critic.head=new"],
    ),
    "a question has no head": (
        "reward.path={causal} reward.head=yes_no reward.principle=x",
        ["Got critic.reward_head=yes_no", "critic.head=new"],
    ),
    "a critic over other tokens": (
        "reward.path={bytes}",
        ["different tokenizers", "critic.path=${policy.path} critic.head=new"],
    ),
    "a critic without weights": ("reward.path={five}", ["no weights to combine", "reward.weights.helpfulness=1"]),
}


@pytest.fixture
def said(
    tmp_path: Path, toy_data: Path, tiny_policy: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    def ask(algorithm: str, changes: str, *more: str) -> str:
        values = {"algorithm": algorithm, "run": tmp_path / "r", "data": toy_data, "policy": tiny_policy}
        (tmp_path / "r.yaml").write_text(RECIPE.format(**values))
        names = {**{name: str(path) for name, path in folders.items()}, "nowhere": str(tmp_path / "nowhere")}
        given = [change.format(**names) for change in changes.split()]
        assert main(["train", str(tmp_path / "r.yaml"), *given, *more]) == 78
        assert not (tmp_path / "r").exists()
        return capsys.readouterr().err

    return ask


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_judge_is_refused(said: Callable[..., str], name: str):
    changes, parts = CASES[name]
    message = said("rloo", changes)
    assert all(part in message for part in parts), message
    assert "remedy:" in message


@pytest.mark.parametrize("name", CRITICS)
def test_what_no_critic_can_start_from_is_refused(said: Callable[..., str], name: str):
    changes, parts = CRITICS[name]
    message = said("ppo", changes, "critic.optimizer.lr=1e-3", "critic.dtype=float32", "critic.zero_stage=1")
    assert all(part in message for part in parts), message
