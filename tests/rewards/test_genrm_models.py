"""Models as judges that write: what a principle's margin is, and the same scores on either executor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.cli import main
from align.config import GenerativeRewardConfig, ModelGeneratorConfig
from align.config.genrm import JudgeSamplingConfig
from align.data import chat, toy
from align.data.chat import Dialogue, Message, Renderer
from align.rewards import genrm_groups
from align.rewards.genrm import GenerativeScorer

PRINCIPLE = "the words are sorted"


def test_the_score_by_a_principle_is_a_difference_of_log_probabilities(tiny_yes_no: Path):
    """Against a forward pass of transformers in float32. An answer of two tokens is Yes or No and the end."""
    judge = ModelGeneratorConfig(path=str(tiny_yes_no), dtype="float32")
    sampling = JudgeSamplingConfig(max_tokens=2, temperature=0.6)
    section = GenerativeRewardConfig(
        judge=judge, form="principle", principle=PRINCIPLE, sampling=sampling, verdict_retries=3
    )
    words = toy.WORDS[:12]
    dialogues = [
        Dialogue((Message("user", f"sort the words : {one} {other}"),), f"{other} {one}")
        for one, other in zip(words[::2], words[1::2], strict=True)
    ]
    one = GenerativeScorer(section, torch.device("cpu"), seed=1)
    scores = one.score(dialogues).tolist()
    unread = int(one.metrics()["fallbacks"])
    model = AutoModelForCausalLM.from_pretrained(tiny_yes_no, dtype=torch.float32)
    renderer = Renderer(chat.load_tokenizer(str(tiny_yes_no), None, False))
    yes, no = (renderer.tokenizer.encode(word, add_special_tokens=False) for word in ("Yes", "No"))
    checked = []
    for dialogue, score in zip(dialogues, scores, strict=True):
        ids = renderer.prompt_ids(genrm_groups.ask_principle(dialogue, PRINCIPLE))
        with torch.no_grad():
            logprob_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        if score:
            checked.append(float(logprob_V[yes] - logprob_V[no]))
            assert score == pytest.approx(checked[-1], abs=1e-4)
    assert len(checked) == len(dialogues) - unread > 2
    assert len(set(checked)) == len(checked)


RECIPE = """
algorithm: rloo
run: {{dir: {run}, steps: 2, seed: 1, logged_samples: 12, progress: none, trackers: []}}
data: {{path: {data}, max_rows: 60}}
executor: local
policy: {{path: {policy}, dtype: float32, optimizer: {{lr: 2e-3}}}}
reference: {{dtype: float32}}
reward:
  kind: generative
  judge: {{path: {judge}, dtype: float32}}
  form: json
  custom_roles: true
  verdict_retries: 1
  sampling: {{max_tokens: 4}}
prompts_per_step: 4
minibatches: 1
truncated: keep
sampling: {{num_samples: 3, max_tokens: 8}}
evaluation: {{every: 2, prompts: 4}}
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_judge_on_ray_gives_the_scores_that_it_gives_here(
    tmp_path: Path, toy_data: Path, tiny_policy: Path, tiny_judge: Path
):
    """The policy on two ranks, the judge on two others."""
    paths = {"data": toy_data, "policy": tiny_policy, "judge": tiny_judge}
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(run=tmp_path / "here", **paths))
    ray = ("executor=ray", "placement={policy: 0-1, reference: 2, reward: 2-3}", f"run.dir={tmp_path / 'ray'}")
    for more in ((), ray):
        assert main(["train", str(tmp_path / "recipe.yaml"), *more]) == 0
    here, there = (
        [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        for name in ("here", "ray")
    )
    for a, b in zip(here, there, strict=True):
        assert (a["response"], a["score"]) == (b["response"], pytest.approx(b["score"], abs=1e-5))
    assert len({one["score"] for one in here}) > 5
    counted = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("here", "ray")
    ]
    for name in ("verdicts", "retried", "fallbacks", "completion_tokens"):
        a, b = ([line[f"reward/{name}"] for line in lines] for lines in counted)
        assert a == pytest.approx(b), name
    assert all(0 < line["reward/retried"] < line["reward/verdicts"] for line in counted[0])
