"""The command as a whole: with a small model, with scores from files, after training."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_rows import judge_row, lines, rm_row
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from align import cli
from align.cluster import roles as cluster_roles
from align.config import (
    BenchmarkDataConfig,
    CheckpointRewardConfig,
    ClusterConfig,
    DataConfig,
    EnsembleRewardConfig,
    HttpRewardConfig,
    RewardEvaluationConfig,
)
from align.config.precision import automatic
from align.data import toy
from align.eval import benchmarks, reward, store, stored_scores
from align.eval.stored_scores import StoredScores
from align.roles import CompletedFuture

OTHER_DTYPE = "float32" if automatic().dtype == "bfloat16" else "bfloat16"
"""Not what ``dtype: auto`` is on this machine."""


def run(*arguments: object) -> None:
    assert cli.main(["eval", "reward", *map(str, arguments)]) == 0


def results(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text())


def values(folder: Path) -> dict[str, float]:
    return {name: one["value"] for name, one in results(folder)["numbers"].items()}


def test_stored_scores_give_the_published_row(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = shared / "judgebench" / "scores-skywork-reward-llama-3.1-8b.jsonl"
    run("--benchmark", "judgebench", "--scores", file, "--out", tmp_path)
    printed = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("│")][:5]
    published = ("knowledge 59.1", "reasoning 64.3", "math 76.8", "coding 50.0", "overall 62.3")
    assert [" ".join("".join(cells).split()) for cells in printed] == list(published)
    beside = tmp_path / "beside"
    run("--benchmark", "judgebench", "--scores", file, "--data", shared / "judgebench", "--out", beside)
    assert values(beside) == values(tmp_path)
    assert "length" in results(beside)["slices"] and "length" not in results(tmp_path)["slices"]


class TestFilesOfScores:
    def test_all_kinds_of_lines_say_the_same(self, tmp_path: Path, judge_data: Path):
        rows = [judge_row(n) for n in range(8)]
        given = [[float(n % 3), 1.0] for n in range(8)]  # of A and B
        right_first = [pair if row["label"] == "A>B" else pair[::-1] for row, pair in zip(rows, given, strict=True)]
        benchmark = benchmarks.load("judgebench", BenchmarkDataConfig(str(judge_data)))
        judged = [
            [row | {"scores": pair} for row, pair in zip(rows, given, strict=True)],
            [
                row | {"judgments": [{"judgment": {"scores": pair}, "decision": "A>B"}]}
                for row, pair in zip(rows, given, strict=True)
            ],
            [{"id": item.id, "scores": pair} for item, pair in zip(benchmark.items, right_first, strict=True)],
            [item.record() | {"scores": pair} for item, pair in zip(benchmark.items, right_first, strict=True)],
        ]
        for number, content in enumerate(judged):
            file = lines(tmp_path / f"{number}.jsonl", content)
            assert stored_scores.read(file, "judgebench", benchmark) == StoredScores(benchmark, right_first)
            if number != 2:
                assert stored_scores.read(file, "judgebench", None).scores == right_first

    def test_two_games_follow_the_counter_and_have_no_margins(self, tmp_path: Path):
        games = {"A>B": ["A>B", "B>A"], "tie": ["A>B", "A=B"], "both": ["A>B", "A>B"], "none": [None, "A>B"]}
        rows = [
            judge_row(1, pair_id=name, label="A>B", judgments=[one and {"decision": one} for one in decisions])
            for name, decisions in games.items()
        ]
        run("--benchmark", "judgebench", "--scores", lines(tmp_path / "x.jsonl", rows), "--out", tmp_path / "out")
        found = results(tmp_path / "out")
        assert found["numbers"]["overall"]["value"] == 0.5  # the first two
        assert found["calibration"] is None and found["margins"] is None
        again = tmp_path / "again"
        run("--benchmark", "judgebench", "--scores", tmp_path / "out" / "items.jsonl", "--out", again)
        assert values(again) == values(tmp_path / "out") and results(again)["margins"] is None


GENRM = """
def verdict(messages, sample):
    first, second = [len(turn["content"]) for turn in messages if turn["role"].startswith("response_")]
    score = 4 if first > second else 3  # and one for the first place
    other = 4 if second > first else 3
    ranking = 1 if first > second else 6 if second > first else 3
    return '{"score_1": %d, "score_2": %d, "ranking": %d}' % (score + 1, other, ranking)
"""


def test_a_judge_that_writes_compares_the_responses_of_an_item(tmp_path: Path):
    """Two items with one prompt stay apart. The longer response is right in two of the three; and the place is worth
    nothing, although the judge adds a point to it."""
    rows = [
        judge_row(1, pair_id="a", question="q", response_A="longer", response_B="long", label="A>B"),
        judge_row(2, pair_id="b", question="q", response_A="long", response_B="longer", label="B>A"),
        judge_row(3, pair_id="c", question="q", response_A="longest", response_B="long", label="B>A"),
    ]
    (tmp_path / "genrm.py").write_text(GENRM)
    keys = {"kind": "function", "function": tmp_path / "genrm.py:verdict"}
    words = [f"reward.judge.{name}={value}" for name, value in keys.items()]
    words += ["reward.kind=generative", "reward.form=json", "reward.custom_roles=true"]
    data, out = lines(tmp_path / "gpt.jsonl", rows), tmp_path / "out"
    run("executor=local", *words, "--benchmark", "judgebench", "--data", data, "--out", out)
    scores = [json.loads(line)["scores"] for line in (out / "items.jsonl").read_text().splitlines()]
    assert scores == [[4.5, 3.5], [4.5, 3.5], [3.5, 4.5]]  # the right one first
    assert results(out)["judge"].endswith("genrm.py:verdict")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A judge that counts characters, in place of a model, and what it was asked."""
    seen = SimpleNamespace(dialogues=[], opened=0)

    def score_dialogues(dialogues, groups):
        assert len(groups) == len(dialogues)
        seen.dialogues += dialogues
        return CompletedFuture(torch.tensor([float(len(one.response)) for one in dialogues]))

    @contextmanager
    def judge(*_) -> Iterator[SimpleNamespace]:
        seen.opened += 1
        yield SimpleNamespace(score_dialogues=score_dialogues)

    monkeypatch.setattr(cluster_roles, "start_reward", judge)
    return seen


class TestFolder:
    def test_one_response_without_a_score_leaves_the_others(self, judge_data: Path, tmp_path: Path, capsys):
        """A real judge, that is: what it gives no score is not written, and nothing else is lost."""
        (tmp_path / "judge.py").write_text(
            "def f(prompts, completions, **_):\n"
            "    words = [turns[0]['content'] for turns in completions]\n"
            "    return [None if i == 3 else float(len(one)) for i, one in enumerate(words)]\n"
        )
        judge = ["reward.kind=function", f"reward.function={tmp_path / 'judge.py'}:f"]
        command = ["--benchmark", "judgebench", "--data", judge_data, "--out", tmp_path / "out", *judge]
        assert cli.main(["eval", "reward", *map(str, command)]) == 78
        assert "1 of 8 items have no finite score" in capsys.readouterr().err
        assert len((tmp_path / "out" / "items.jsonl").read_text().splitlines()) == 7

    def test_a_second_call_starts_no_model(self, stub: SimpleNamespace, judge_data: Path, tiny_reward: Path, tmp_path):
        command = ("--benchmark", "judgebench", "--model", tiny_reward, "--data", judge_data, "--out", tmp_path / "out")
        run(*command)
        first = results(tmp_path / "out")
        run("resamples=50", *command)
        assert stub.opened == 1 and len(stub.dialogues) == 16
        assert first["numbers"]["overall"]["value"] == results(tmp_path / "out")["numbers"]["overall"]["value"]
        assert {one.name for one in (tmp_path / "out").iterdir()} == {
            *("items.jsonl", "manifest.json", "scores.json", "report.html")
        }

    def test_a_changed_model_is_refused(self, stub: SimpleNamespace, judge_data: Path, tiny_reward: Path, tmp_path):
        command = ("--benchmark", "judgebench", "--data", judge_data, "--out", tmp_path / "out")
        run("--model", tiny_reward, *command)
        other = f"reward.dtype={OTHER_DTYPE}"
        assert cli.main(["eval", "reward", other, "--model", *map(str, (tiny_reward, *command))]) == 78
        lines(judge_data / "gpt.jsonl", [judge_row(n) for n in range(9)])
        assert cli.main(["eval", "reward", "--model", *map(str, (tiny_reward, *command))]) == 78
        assert stub.opened == 1

    def test_its_items_can_be_judged_without_model_and_data(
        self, stub: SimpleNamespace, tiny_reward: Path, tmp_path: Path
    ):
        data = tmp_path / "chat.json"
        data.write_text(json.dumps([rm_row(n) for n in range(4)]))
        out = tmp_path / "out", tmp_path / "again"
        run("--benchmark", "rm-bench", "--model", tiny_reward, "--data", data, "--out", out[0])
        run("--benchmark", "rm-bench", "--scores", out[0] / "items.jsonl", "--out", out[1])
        first, again = map(results, out)
        for name in ("numbers", "slices", "calibration", "margins", "sizes"):
            assert first[name] == again[name]
        assert values(out[0])["chat"] == pytest.approx(2 / 3)  # the longer one wins: easy and normal always, hard never

    def test_has_a_name_of_its_own_where_none_is_given(
        self, stub: SimpleNamespace, judge_data: Path, tiny_reward: Path, tmp_path: Path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        for model in (tiny_reward, tiny_reward):
            run("--benchmark", "judgebench", "--model", model, "--data", judge_data)
        run(f"reward.dtype={OTHER_DTYPE}", "--benchmark", "judgebench", "--model", tiny_reward, "--data", judge_data)
        assert len(list((tmp_path / "runs" / "evaluation").glob("judgebench-*"))) == 2 == stub.opened

    def test_a_difference_has_a_paired_interval(self, tmp_path: Path, judge_data: Path):
        benchmark = benchmarks.load("judgebench", BenchmarkDataConfig(str(judge_data)))
        better = [{"id": item.id, "scores": [1, 0]} for item in benchmark.items]
        worse = [{"id": item.id, "scores": [n < 6, 0.5]} for n, item in enumerate(benchmark.items)]
        worse = [row | {"scores": [float(x) for x in row["scores"]]} for row in worse]
        files = [lines(tmp_path / name, rows) for name, rows in (("a.jsonl", better), ("b.jsonl", worse))]
        command = ("--benchmark", "judgebench", "--data", judge_data, "--out", tmp_path / "out")
        run("--scores", files[0], "--compare", files[1], *command)
        found = results(tmp_path / "out")["comparison"]["numbers"]["overall"]
        assert found["value"] == 0.25 and 0 <= found["low"] < 0.25 < found["high"] <= 0.75


def test_a_recipe_and_values_may_be_given_before_the_options(stub: SimpleNamespace, tmp_path: Path, judge_data: Path):
    recipe = tmp_path / "x.yaml"
    recipe.write_text("benchmark: judgebench\nresamples: 10\nreward: {kind: http, url: 'http://h'}\n")
    run(recipe, "seed=3", "--data", judge_data, "--out", tmp_path / "out")
    assert results(tmp_path / "out")["bootstrap"] == {"resamples": 10, "confidence": 0.95, "seed": 3}


def test_identity_changes_with_whatever_changes_a_score(byte_models: tuple[Path, Path], tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(byte_models[1], model)
    template = tmp_path / "t.jinja"
    template.write_text((model / "chat_template.jinja").read_text() + " ")
    base = {"path": str(model)}
    changes = ({}, {"dtype": OTHER_DTYPE}, {"chat_template": str(template)})
    found = [reward.identity(CheckpointRewardConfig(**base | change)) for change in changes]
    found.append(reward.identity(EnsembleRewardConfig(**base, paths=[str(model)])))
    found += [reward.identity(HttpRewardConfig(url=f"http://h{n}")) for n in (1, 2)]
    same = CheckpointRewardConfig(**base, max_tokens_per_micro_batch=7, attention="sdpa", zero_stage=3)
    assert reward.identity(same) == found[0]
    shutil.copy(template, model / "chat_template.jinja")
    found.append(reward.identity(CheckpointRewardConfig(**base)))
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    found.append(reward.identity(CheckpointRewardConfig(**base)))
    assert len(set(found)) == len(found) == 8


@pytest.mark.slow
def test_scores_are_those_of_the_model_and_the_same_on_ray(byte_models, judge_data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(store, "RESPONSES_AT_ONCE", 3)
    model = byte_models[1]
    command = ("reward.dtype=float32", "--benchmark", "judgebench", "--model", model, "--data", judge_data)
    run(*command, "--out", tmp_path / "local")
    run("executor=ray", "placement.reward=0-1", *command, "--out", tmp_path / "ray")
    items = [json.loads(line) for line in (tmp_path / "local" / "items.jsonl").read_text().splitlines()]
    on_ray = [json.loads(line) for line in (tmp_path / "ray" / "items.jsonl").read_text().splitlines()]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    direct = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    benchmark = benchmarks.load("judgebench", BenchmarkDataConfig(str(judge_data)))
    for item, here, there in zip(benchmark.items, items, on_ray, strict=True):
        assert here["id"] == there["id"] == item.id
        assert here["scores"] == pytest.approx(there["scores"], abs=1e-6)
        for one, score in zip(item.dialogues, here["scores"], strict=True):
            messages = [*(turn._asdict() for turn in one.context), {"role": "assistant", "content": one.response}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                assert float(direct(input_ids=ids["input_ids"]).logits) == pytest.approx(score, abs=1e-5)


def trained(tmp_path: Path, **evaluations: str) -> SimpleNamespace:
    """What `reward.planned` reads of a recipe."""
    return SimpleNamespace(
        run=SimpleNamespace(dir=str(tmp_path / "run")),
        reward=SimpleNamespace(dtype="float32", attention="auto", zero_stage=3, max_tokens_per_micro_batch=99),
        data=DataConfig(path=str(tmp_path / "toy"), max_spread=1),
        executor="ray",
        placement={"reward": "0-3"},
        cluster=ClusterConfig(call_timeout_s=7),
        evaluations=lambda: evaluations,
    )


class TestAfterTraining:
    def test_the_plan_follows_the_recipe(self, tmp_path: Path, judge_data: Path):
        (plan,) = reward.planned(trained(tmp_path, judgebench=str(judge_data)))
        section, benchmark = plan.args
        assert len(benchmark.items) == 8
        assert section == RewardEvaluationConfig(
            benchmark="judgebench",
            data=BenchmarkDataConfig(str(judge_data)),
            reward=CheckpointRewardConfig(
                path=str(tmp_path / "run/final"), dtype="float32", zero_stage=3, max_tokens_per_micro_batch=99
            ),
            out=str(tmp_path / "run/evaluation/judgebench"),
            executor="ray",
            placement={"reward": "0-3"},
            cluster=ClusterConfig(call_timeout_s=7),
        )

    def test_heldout_without_a_folder_is_the_recipes_own_data(self, tmp_path: Path):
        toy.write_toy(tmp_path / "toy", 20, 10, seed=0)
        (plan,) = reward.planned(trained(tmp_path, heldout=""))
        section, benchmark = plan.args
        assert section.data == BenchmarkDataConfig(str(tmp_path / "toy"), max_spread=1)
        assert 0 < len(benchmark.items) <= 10

    @pytest.mark.slow
    def test_a_run_is_judged_when_it_has_ended(self, tmp_path: Path, byte_models, capsys: pytest.CaptureFixture[str]):
        toy.write_toy(tmp_path / "toy", 20, 10, seed=0)
        recipe = Path(__file__).parents[2] / "recipes" / "quickstart" / "reward_model.yaml"
        values = {
            "run.dir": tmp_path / "run",
            "run.steps": 1,
            "batch_size": 8,
            "data.path": tmp_path / "toy",
            "reward.path": byte_models[0],
            "executor": "local",
            "placement": "{}",
            "benchmarks": "{heldout: ''}",
        }
        command = ["train", str(recipe), *(f"{key}={value}" for key, value in values.items())]
        assert cli.main(command) == 0
        folder = tmp_path / "run" / "evaluation" / "heldout"
        first = (folder / "scores.json").read_bytes()
        validation = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        assert results(folder)["numbers"]["accuracy"]["value"] == pytest.approx(validation["validation/accuracy"])
        capsys.readouterr()
        assert cli.main(command) == 0  # the run is done and its items have scores: only measured again
        assert "done before" in capsys.readouterr().out and (folder / "scores.json").read_bytes() == first
