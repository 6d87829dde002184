"""A judge that learns from labels: which label belongs to which response, held-out verdicts, and whether it learns."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.algorithms import _genrm_evaluation, genrm, sft
from align.cli import main
from align.config import DataConfig, EvaluationConfig, PolicyConfig, SamplingConfig, VerdictConfig
from align.data import genrm as judging
from align.data import genrm_prompts, toy, toy_family
from align.data.chat import Message, Renderer
from align.data.dataset import DataSplits
from align.data.genrm_prompts import Verdict
from align.data.rows import Comparison
from align.rewards import genrm_card
from align.roles import CompletedFuture
from align.types import Packed, Prompts, Rollouts, Sequences

LABELS = [(-3, (5.0, 1.0)), (-2, None), (-1, (4.0, 3.0)), (1, (2.0, 3.0)), (2, (2.0, 4.0)), (3, (1.0, 4.0))]
"""Preference and helpfulness of six pairs."""


def config(**values: Any) -> genrm.Config:
    usual = {
        "policy": PolicyConfig(path="p"),
        "verdict": VerdictConfig(form="json", custom_roles=True),
        "sampling": SamplingConfig(num_samples=2, max_tokens=64, temperature=0.7),
        "prompts_per_step": 4,
    }
    return genrm.Config(**{**usual, **values})


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(toy_family.tokenizer())


@pytest.fixture(scope="module")
def source() -> DataSplits[Comparison]:
    """All six pairs to learn from, and as held-out ones."""
    rows = [
        Comparison((Message("user", word),), "cat", "dog", preference, (), helpfulness, "general", "english")
        for word, (preference, helpfulness) in zip(toy.WORDS, LABELS, strict=False)
    ]
    return DataSplits(rows, rows, {}, "")


def answers(prompts: Prompts, texts: list[str], renderer: Renderer, K: int, finished: bool = True) -> Rollouts:
    """Rollouts that say ``texts``, K to each prompt."""
    responses = Packed.from_lists([renderer.tokenizer.encode(text, add_special_tokens=False) for text in texts])
    sequences = Sequences(prompts.tokens, responses, torch.arange(len(prompts)).repeat_interleave(K))
    zero_BT = torch.zeros(sequences.mask_BT.shape)
    return Rollouts(sequences, zero_BT, zero_BT, torch.full((len(texts),), finished), 0.7, prompts.step)


def right(prompt: list[int], renderer: Renderer) -> Verdict:
    """The label of a prompt, read from its text: which pair, and in which order."""
    asked, first, _ = re.split(r"<response_[12]>", renderer.tokenizer.decode(prompt))
    preference, helpfulness = LABELS[toy.WORDS.index(asked.rpartition("<user>")[2])]
    scores = Verdict(*(helpfulness or (3.0, 3.0)), {-3: 1, -2: 2, -1: 3, 1: 4, 2: 5, 3: 6}[preference])
    return scores if first == "cat" else genrm_prompts.swap_verdict(scores)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_every_response_is_graded_by_its_own_label(step: int, source, renderer):
    """The first sample of each prompt is right, the second holds no verdict. In three steps all twelve rows come."""
    recipe = config()
    train_data, counts = genrm.load_data(recipe, source, renderer)
    assert (counts["kept"], counts["without_scores"], len(train_data.prompts.tokens)) == (6, 1, 12)
    prompts = train_data.prompts.batch(step)
    said = [genrm_prompts.format_verdict(right(prompt, renderer), "json") for prompt in prompts.tokens.lists()]
    texts = [text for one in said for text in (one, "Yes")]
    score_B, distance = genrm.grade(recipe, train_data, answers(prompts, texts, renderer, 2), renderer.text)
    assert score_B.tolist() == [0.0, -10.0] * 4
    assert distance["format_violations"] == 50.0
    assert distance["ranking_error"] == 0.0
    moved = replace(train_data, label_R3=train_data.label_R3.roll(1, 0))
    score_B, _ = genrm.grade(recipe, moved, answers(prompts, texts, renderer, 2), renderer.text)
    assert all(score < 0 for score in score_B.tolist())
    cut_off = answers(prompts, texts, renderer, 2, finished=False)
    assert genrm.grade(recipe, train_data, cut_off, renderer.text)[0].tolist() == [-10.0] * 8


def test_a_judge_s_folder_tells_how_it_learned(tmp_path: Path, source, renderer):
    """Of reinforcement and of imitation; the best one of an evaluation too."""
    file = tmp_path / "t.jinja"
    file.write_text(f"{{# {{{{ date_string }}}} #}}{toy_family.CHAT_TEMPLATE}")
    section = DataConfig(path="d", chat_template=str(file), date="26 Jul 2024")
    recipe = config(data=section, evaluation=EvaluationConfig(every=1))
    read = Renderer(renderer.tokenizer, section.chat_template, section.date)
    train_data, _ = genrm.load_data(recipe, source, read)
    card = json.loads(train_data.files[genrm_card.NAME])
    assert (card["form"], card["date"]) == ("json", section.date)
    assert train_data.held_out is not None and train_data.held_out.files == train_data.files
    said = [replace(row, reasons=((row.preference, "All right"),)) for row in source.train]
    imitated = sft.Config(policy=PolicyConfig(path="p"), data=section, target="genrm_verdicts", verdict=recipe.verdict)
    assert sft.load_data(imitated, DataSplits(said, said, {}, ""), read)[0].files == train_data.files


class Run:
    """What an evaluation needs of a run."""

    def __init__(self, renderer: Renderer):
        self.state: dict[str, float] = {}
        self.written: list[tuple[int, dict[str, float], list[dict[str, Any]]]] = []
        self.kept: list[tuple[int, dict[str, str]]] = []
        self.first_step, self.decode = 1, renderer.text

    def is_last(self, step: int) -> bool:
        return step == 5

    def log_evaluation(self, *written: Any) -> None:
        self.written.append(written)

    def keep_best(self, step: int, policy: Any, extra: dict[str, str]) -> None:
        self.kept.append((step, extra))


class Judge:
    """Says what it is told, and keeps what it was asked."""

    def __init__(self, renderer: Renderer, say: Any):
        self.renderer, self.say, self.temperatures = renderer, say, list[float]()

    def generate(self, prompts: Prompts, sampling: SamplingConfig) -> CompletedFuture[Rollouts]:
        assert (sampling.num_samples, prompts.step) == (1, -1)
        self.temperatures.append(sampling.temperature)
        texts = [self.say(right(prompt, self.renderer)) for prompt in prompts.tokens.lists()]
        return CompletedFuture(answers(prompts, texts, self.renderer, 1))


def test_held_out_verdicts_when_they_are_due(source, renderer):
    recipe = config(evaluation=EvaluationConfig(every=2, prompts=4, keep_best=True))
    held_out = _genrm_evaluation.load_held_out(recipe, source, renderer, genrm_card.files(recipe.verdict, None), {})
    assert held_out is not None and len(held_out.prompts) == 8
    run, judge = Run(renderer), Judge(renderer, lambda label: genrm_prompts.format_verdict(Verdict(3, 3, 1), "json"))
    evaluator = _genrm_evaluation.GenRMEvaluator(recipe, held_out, judge, run)
    step, start, lines = run.written[0]
    assert (step, run.state["heldout/start/greedy/agreement"], judge.temperatures) == (0, 0.0, [0.0, 0.7])
    greedy = {name: value for name, value in start.items() if name.startswith("heldout/greedy/")}
    assert {name.replace("sampled", "greedy"): value for name, value in start.items()} == greedy  # it says the same
    assert {name.removeprefix("heldout/greedy/"): value for name, value in greedy.items()} == pytest.approx(
        # three of four pairs prefer the first response; 0, 1, 2, 3 and, turned round, 5, 4, 3, 2 steps from 1
        {"agreement": 0.0, "first_order": 75.0, "order_consistency": 0.0, "format_violations": 0.0}
        | {"ranking_error": 2.5, "score_error": 6 / 6, "reward": -(20 + 12) / 8}
        | {"response_tokens": start["heldout/greedy/response_tokens"], "truncated": 0.0}
    )
    assert [(line["ranking"], line["label"]) for line in lines[:4]] == [(1, 1), (1, 6), (1, 2), (1, 5)]
    assert [line["kind"] for line in lines] == ["greedy"] * 8 + ["sampled"] * 8
    assert [line["prompt"] for line in lines[:4]] == [toy.WORDS[0]] * 2 + [toy.WORDS[1]] * 2
    judge.say = lambda label: genrm_prompts.format_verdict(label, "json")
    assert evaluator.measure(1) == {}
    found = evaluator.measure(2)
    assert found["heldout/start/greedy/agreement"] == found["heldout/start/sampled/agreement"] == 0.0
    assert (found["heldout/greedy/agreement"], found["heldout/greedy/reward"]) == (100.0, 0.0)
    judge.say = lambda label: "No"
    found = evaluator.measure(5)  # the last step
    assert (found["heldout/greedy/agreement"], found["heldout/greedy/format_violations"]) == (0.0, 100.0)
    assert run.written[-1][2][0]["ranking"] is None
    assert [step for step, _ in run.kept] == [0, 2]
    assert json.loads(run.kept[0][1]["align_judge.json"])["custom_roles"] is True
    _genrm_evaluation.GenRMEvaluator(recipe, held_out, judge, run)  # a run that is gone on with has measured its start
    assert len(run.written) == 3
    assert _genrm_evaluation.load_held_out(config(), source, renderer, {}, {}) is None


def write_pairs(folder: Path) -> Path:
    """A word that people like and one that they do not, in either order."""
    (folder / "preference").mkdir()
    for split, count in (("train", 160), ("validation", 24)):
        lines = ""
        for i in range(count):
            asked = f"{toy.WORDS[i % 40]} {toy.FILLER[i // 40 if split == 'train' else 5]}"
            said, mark = (("cat", "dog"), -3) if i % 2 else (("dog", "cat"), 3)
            row = {"domain": "general", "language": "english", "context": asked, "response1": said[0]}
            lines += json.dumps(row | {"response2": said[1], "overall_preference": mark}) + "\n"
        (folder / "preference" / f"{split}.jsonl").write_text(lines)
    return folder


RECIPE = """
algorithm: genrm
run: {{dir: {run}, steps: 60, progress: none, trackers: []}}
data: {{path: {data}}}
executor: local
verdict: {{form: json, custom_roles: true}}
prompts_per_step: 32
kl_coef: 0.0
sampling: {{num_samples: 8, max_tokens: 1}}
policy: {{path: {policy}, dtype: float32, optimizer: {{lr: 5e-3}}}}
evaluation: {{every: 20, prompts: 24}}
"""


def read_first_word(texts: list[str], finished: list[bool], form: str) -> torch.Tensor:
    """Every word is a ranking, by its length: what a random model says is a verdict."""
    return torch.tensor([[3.0, 3.0, float(1 + len(text.strip()) % 6)] for text in texts])


@pytest.mark.slow
def test_learns_what_people_prefer(tmp_path: Path, tiny_family: Path, monkeypatch: pytest.MonkeyPatch):
    """A random model comes to rank the response first that people like, wherever it stands, on pairs that it has not
    seen. Rankings are 1 or 6, so with labels that belong to other rows it would learn the opposite."""
    monkeypatch.setattr(judging, "read_verdicts", read_first_word)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(run=tmp_path / "run", data=write_pairs(tmp_path), policy=tiny_family))
    assert main(["train", str(recipe)]) == 0
    found = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    names = [f"heldout/greedy/{name}" for name in ("agreement", "order_consistency", "reward")]
    print([[round(one[name], 2) for name in names] for one in found])
    start, end = found[0], found[-1]
    assert start["heldout/greedy/agreement"] < 60 < 90 < end["heldout/greedy/agreement"]
    assert end["heldout/greedy/reward"] > start["heldout/greedy/reward"] + 1
    card = json.loads((tmp_path / "run" / "final" / "align_judge.json").read_text())
    assert card == {"version": 1, "form": "json", "custom_roles": True, "principle": "", "date": None}
