"""TRL's reward functions as rewards: the values of TRL's own call, and which of them are refused before a run."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest
import trl.rewards
from trl import GRPOTrainer

from align.cli import main
from align.config import FunctionRewardConfig
from align.data.chat import Dialogue, Message
from align.errors import ConfigError
from align.rewards import functions
from align.rewards.functions import FunctionScorer
from align.utils import plugins

QUESTION = (Message("user", "what is 1 + 1?"),)
THOUGHT = "<think>\none and one\n</think>\n2"


def scorer(name: str) -> FunctionScorer:
    return FunctionScorer(FunctionRewardConfig(function=name))


def test_think_format_reward_by_hand_and_by_trls_call():
    """1 for one pair of tags at the start, 0 otherwise; TRL passes columns and its own state too."""
    responses = [THOUGHT, "2", "<think>never closed", f"so: {THOUGHT}", "<think>a<think>b</think>2"]
    dialogues = [Dialogue(QUESTION, text) for text in responses]
    ids = [[5, 2]] * len(responses)
    scores = scorer("trl.rewards:think_format_reward").score(dialogues, ids).tolist()
    assert scores == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert scores == trl.rewards.think_format_reward(
        prompts=[[message._asdict() for message in QUESTION]] * len(responses),
        completions=[[{"role": "assistant", "content": text}] for text in responses],
        completion_ids=ids,
        solution=["2"] * len(responses),
        trainer_state=None,
    )


def test_trl_still_calls_reward_functions_by_these_keywords():
    source = inspect.getsource(GRPOTrainer)
    call = "prompts=prompts, completions=completions, completion_ids=completion_ids_list, **reward_kwargs"
    assert call in source


FACTORIES = """
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

overlong = get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4)
repeated = get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
"""


def test_what_factories_make_is_named_in_a_file(tmp_path: Path):
    """DAPO's punishment (arXiv 2503.14476, equation 13) of 6, 8, 10 and 11 tokens: 0, (6 - 8) / 4, (6 - 10) / 4, -1. Of
    the four pairs in 5 5 5 5 5 one is unique: (1 - 1/4) * -1."""
    (tmp_path / "f.py").write_text(FACTORIES)
    ids = [list(range(length)) for length in (6, 8, 10, 11)]
    dialogues = [Dialogue(QUESTION, "x")] * 4
    assert scorer(f"{tmp_path / 'f.py'}:overlong").score(dialogues, ids).tolist() == [0.0, -0.5, -1.0, -1.0]
    repeated = scorer(f"{tmp_path / 'f.py'}:repeated")
    assert repeated.score(dialogues[:2], [[1, 2, 3, 4], [5] * 5]).tolist() == [0.0, -0.75]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("accuracy_reward", ["requires the argument solution", "columns of the data set", "looks solution up"]),
        ("reasoning_accuracy_reward", ["requires the argument solution"]),
        ("get_soft_overlong_punishment", ["accepts none of", "reward = get_soft_overlong_punishment(...)"]),
        ("get_repetition_penalty_reward", ["accepts none of", "reward = get_repetition_penalty_reward(...)"]),
        ("get_cosine_scaled_reward", ["accepts none of"]),
        ("no_such_reward", ["has no function no_such_reward", "think_format_reward"]),
    ],
)
def test_what_cannot_be_called_is_refused_before_a_run(name: str, parts: list[str]):
    with pytest.raises(ConfigError) as caught:
        functions.load(f"trl.rewards:{name}")
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match="also needs the package math-verify"):
        functions.load("trl.rewards:accuracy_reward")


def test_the_file_that_defines_a_function_counts():
    """`trl.rewards` loads its functions from other files when they are used."""
    think = plugins.function_fingerprint("trl.rewards:think_format_reward")
    assert think != plugins.function_fingerprint("trl.rewards:accuracy_reward")


RECIPE = """
algorithm: rloo
run: {{dir: {run}, steps: 2, seed: 1, logged_samples: 8, progress: none, trackers: []}}
data: {{path: {data}, max_rows: 40}}
executor: local
policy: {{path: {policy}, dtype: float32, optimizer: {{lr: 2e-3}}}}
reference: {{dtype: float32}}
reward: {{kind: function, function: "trl.rewards:think_format_reward"}}
prompts_per_step: 4
minibatches: 1
sampling: {{num_samples: 2, max_tokens: 8}}
"""


@pytest.mark.slow
def test_a_run_with_think_format_reward(tmp_path: Path, toy_data: Path, tiny_policy: Path):
    (tmp_path / "r.yaml").write_text(RECIPE.format(run=tmp_path / "run", data=toy_data, policy=tiny_policy))
    assert main(["train", str(tmp_path / "r.yaml")]) == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 8
    texts = [[{"content": sample["response"]}] for sample in samples]
    assert [sample["score"] for sample in samples] == trl.rewards.think_format_reward(texts)
