"""Reward models: what a recipe may say, numbers of held-out rows by hand, and whole runs in this process."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.algorithms import _reward_pairs, _reward_ratings, reward_model
from align.config.load import build_config
from align.data import dataset
from align.data.attributes import HELPSTEER_ATTRIBUTES, NEMO_ATTRIBUTES
from align.data.chat import Message, Renderer, load_tokenizer
from align.data.toy import WORDS
from align.errors import ConfigError, ModelError
from align.launch import start_training_roles
from align.models import exported_files
from align.models.exported_files import Exported
from align.prepare import load_renderer
from align.rewards import card
from align.rewards.card import ScoreMoments
from align.roles import CompletedFuture
from align.run import Run
from align.types import NOT_RATED, Packed, Pairs, Ratings, Sequences

LEAST = ["run.dir=x", "run.steps=1", "data.path=d", "reward.path=r", "reward.optimizer.lr=1"]


def settings(*overrides: str) -> reward_model.Config:
    return build_config(reward_model.Config, None, ["algorithm=reward_model", *LEAST, *overrides]).config


# Recipes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("loss=regression", "regression needs reward.attributes"),
        ("reward.attributes=[helpfulness]", "needs reward.attributes, others none"),
        ("center_coef=-0.1", "center_coef is for pairs and must not be negative"),
        ("loss=regression reward.attributes=[helpfulness] center_coef=0.1", "center_coef is for pairs"),
        ("weights.helpfulness=1", "weights.helpfulness belong to loss regression"),
        ("loss=regression reward.attributes=[verbosity]", "must be of reward.attributes"),
        ("loss=regression reward.attributes=[verbosity] weights.verbosity=0", "one of them not 0"),
        ("loss=regression reward.attributes=[helpfulness] weights.helpfullness=1", "must be of reward.attributes"),
        ("loss=regression reward.attributes=[verbosity,verbosity]", "attributes lists verbosity more than once"),
    ],
)
def test_combinations_that_cannot_be(overrides, message):
    with pytest.raises(ConfigError, match=message):
        settings(*overrides.split())


def test_what_is_read_and_how_attributes_add_up():
    assert settings().reads() == "preferences"
    assert settings().goodness == {}
    nemo = settings("loss=regression", "reward.attributes=[nemo]")
    assert nemo.reads() == "ratings"
    assert nemo.goodness == {"helpfulness": 1.0}
    weighted = settings("loss=regression", "reward.attributes=[nemo]", "weights.coherence=0.5", "weights.verbosity=-1")
    assert weighted.goodness == {"coherence": 0.5, "verbosity": -1.0}
    assert settings("benchmarks.rm-bench=folder").evaluations() == {"rm-bench": "folder"}


# Numbers


class Knows:
    """A reward role that gives what it was told."""

    def __init__(self, value: Tensor):
        self.value = value

    def score(self, sequences: Sequences) -> CompletedFuture[Tensor]:
        return CompletedFuture(self.value)

    attributes = score

    def update(self, batch: Any, loss: Any) -> Any:
        raise AssertionError("measuring trains nothing")

    def export(self, folder: Path, extra: Mapping[str, str]) -> Any:
        raise AssertionError("measuring writes nothing")


def sequences(prompts: list[int]) -> Sequences:
    """A response of one token to each of these prompts."""
    texts = Packed.from_lists([[5]] * (max(prompts) + 1)), Packed.from_lists([[7]] * len(prompts))
    return Sequences(*texts, torch.tensor(prompts))


def test_held_out_pairs_by_hand():
    pairs = Pairs(sequences([0, 0, 1, 1]), torch.tensor([1.0, 3.0]))
    loss = partial(_reward_pairs.loss, kind="scaled", center_coef=0.5)
    score_B = torch.tensor([1.0, 1.0, 0.0, -2.0])
    found, scores = _reward_pairs.PairTask(pairs, pairs, loss).measure(Knows(score_B))
    two, softplus = torch.tensor(2.0), torch.nn.functional.softplus(torch.tensor(-2.0))
    wanted = (two.log() + 3 * softplus) / 2 + 0.5 * (4 + 4) / 2
    assert found["loss"] == pytest.approx(wanted.item())
    assert (found["accuracy"], found["margin"]) == (0.5, 1.0)
    assert scores is score_B


def test_held_out_ratings_by_hand():
    label_BA = torch.tensor([[4.0, 1.0], [2.0, NOT_RATED], [1.0, 3.0], [1.0, 0.0]])
    attribute_BA = torch.tensor([[3.0, 1.0], [3.0, 9.0], [1.0, 3.0], [1.0, 2.0]])
    held_out = Ratings(sequences([0, 0, 1, 1]), label_BA)
    task = _reward_ratings.RatingTask(held_out, held_out, ("helpfulness", "verbosity"), {"helpfulness": 1.0})
    found, scores = task.measure(Knows(attribute_BA))
    assert found["loss"] == pytest.approx((1 + 1 + 0 + 0 + 0 + 0 + 4) / 7)
    assert found["helpfulness/mse"] == 0.5
    assert found["verbosity/mse"] == pytest.approx(4 / 3)
    assert found["accuracy"] == 0.0  # prompt 0: a tie of scores; prompt 1: equally helpful
    assert scores.tolist() == [3.0, 3.0, 1.0, 1.0]
    less = _reward_ratings.RatingTask(held_out, held_out, task.names, {"helpfulness": 1.0, "verbosity": -0.5})
    found, scores = less.measure(Knows(attribute_BA))
    assert scores.tolist() == [2.5, -1.5, -0.5, 0.0]
    assert found["accuracy"] == 1.0  # prompt 1 alone: 1 - 0 over 1 - 1.5, predicted 0 over -0.5
    assert found["margin"] == 0.5


def test_moments_are_over_the_count():
    assert ScoreMoments.of(torch.tensor([1.0, 3.0, 5.0, 7.0])) == ScoreMoments(4.0, 5.0**0.5, 4)
    assert ScoreMoments.of(torch.tensor([2.5])) == ScoreMoments(2.5, 0.0, 1)


# Whole runs

GOODNESS = {"helpfulness": 0.5, "verbosity": -0.25}


def rated(folder: Path, count: int, seed: int, shift: int = 0) -> Path:
    """Data in HelpSteer2's layout whose ratings are linear in what a response holds: helpfulness counts "cat",
    verbosity is the number of words less one. Two responses to a prompt, the ratings moved on by ``shift`` rows."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        prompt = " ".join(["say :", *rng.sample(WORDS, 4)])
        for _ in range(2):
            words = rng.choices(["cat", *WORDS[:8]], weights=[6, *[1] * 8], k=rng.randint(1, 5))
            labels = dict.fromkeys(HELPSTEER_ATTRIBUTES, 0)
            labels |= {"helpfulness": min(4, words.count("cat")), "verbosity": len(words) - 1}
            rows.append((prompt, " ".join(words), labels))
    moved = [(*row[:2], other[2]) for row, other in zip(rows, rows[shift:] + rows[:shift], strict=True)]
    lines = [json.dumps({"prompt": prompt, "response": text, **labels}) for prompt, text, labels in moved]
    folder.mkdir(exist_ok=True)
    for split, part in (("train", lines[: count * 2 * 9 // 10]), ("validation", lines[count * 2 * 9 // 10 :])):
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress("\n".join(part).encode()))
    return folder


REGRESSION = ["loss=regression", "reward.attributes=[helpfulness,verbosity]", "data.format=helpsteer2"]
WEIGHTS = [f"weights.{name}={weight}" for name, weight in GOODNESS.items()]


@contextmanager
def trained(
    folder: Path, data: Path, start: Path, *overrides: str
) -> Iterator[tuple[Any, list[dict[str, float]], Any]]:
    """After a run in this process: its role, its metrics, and the material."""
    given = [f"run.dir={folder}", f"data.path={data}", f"reward.path={start}", "run.progress=none", "executor=local"]
    more = ["run.trackers=[]", "run.seed=3", "reward.dtype=float32", "batch_size=32", "validate_every=0"]
    loaded = settings("reward.optimizer.lr=3e-3", "checkpoint.every=0", *more, *given, *overrides)
    renderer = load_renderer(loaded)
    train_data, _ = reward_model.load_data(loaded, dataset.load_dataset(loaded.data, loaded.reads()), renderer)
    run = Run(loaded, renderer.text)
    exported = {"reward": Exported(loaded.algorithm, exported_files.try_out(loaded.reward, renderer))}
    with run, start_training_roles(loaded, run, exported=exported) as found:
        roles: Any = found
        reward_model.train(loaded, train_data, roles, run)
        yield roles.reward, [json.loads(line) for line in (folder / "metrics.jsonl").open()], train_data


def in_transformers(folder: Path, sequences: Sequences) -> Tensor:
    """Outputs of the folder as plain transformers reads it, (B, A)."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    prompts, responses = sequences.prompts.lists(), sequences.responses.lists()
    whole = [prompts[p] + row for p, row in zip(sequences.prompt_B.tolist(), responses, strict=True)]
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits for row in whole])


@pytest.mark.slow
def test_regression_recovers_a_known_goodness_and_is_read_by_plain_transformers(tmp_path, tiny_policy):
    data = rated(tmp_path / "data", 400, seed=1)
    overrides = [*REGRESSION, *WEIGHTS, "run.steps=120"]
    with trained(tmp_path / "run", data, tiny_policy, *overrides) as (role, metrics, train_data):
        held_out = train_data.task.validation
        attribute_BA = role.attributes(held_out.sequences).result()
        assert set(role.attributes(held_out.sequences.select(torch.arange(3))).result().shape) == {3, 2}
    last = metrics[-1]
    assert last["validation/helpfulness/correlation"] > 0.95
    assert last["validation/verbosity/correlation"] > 0.95
    assert last["validation/accuracy"] > 0.9
    assert last["validation/loss"] < 0.3 < metrics[0]["loss"]
    moved = {
        name: torch.corrcoef(torch.stack([attribute_BA[1:, i], held_out.label_BA[:-1, i]]))[0, 1]
        for i, name in enumerate(("helpfulness", "verbosity"))
    }
    assert max(moved.values()) < 0.5  # labels of the neighbours are not what was learned
    final = tmp_path / "run" / "final"
    theirs_BA = in_transformers(final, held_out.sequences)
    torch.testing.assert_close(theirs_BA, attribute_BA, rtol=1e-6, atol=1e-6)
    found = card.read(final)
    assert found is not None
    assert (found.kind, found.attributes, found.weights) == ("attributes", ("helpfulness", "verbosity"), GOODNESS)
    assert (found.loss, found.data) == ("regression", train_data.card.data)
    score_B = (theirs_BA @ torch.tensor([0.5, -0.25])).double()
    assert found.moments is not None
    assert found.moments.count == len(score_B)
    assert found.moments.mean == pytest.approx(score_B.mean().item(), abs=1e-5)
    assert found.moments.std == pytest.approx(score_B.std(correction=0).item(), abs=1e-5)
    labels = json.loads((final / "config.json").read_text())["id2label"]
    assert labels == {"0": "helpfulness", "1": "verbosity"}


@pytest.mark.slow
def test_labels_moved_by_one_row_teach_nothing(tmp_path, tiny_policy):
    """What the thresholds above are worth."""
    data = rated(tmp_path / "data", 400, seed=1, shift=1)
    with trained(tmp_path / "run", data, tiny_policy, *REGRESSION, *WEIGHTS, "run.steps=120") as (_, metrics, _):
        assert metrics[-1]["validation/verbosity/correlation"] < 0.5
        assert metrics[-1]["validation/accuracy"] < 0.75


@pytest.mark.slow
def test_scaled_pairs_recover_the_order_of_a_known_goodness(tmp_path, tiny_policy):
    data = rated(tmp_path / "data", 400, seed=1)
    overrides = ["data.format=helpsteer2", "loss=scaled", "center_coef=0.01", "run.steps=120"]
    with trained(tmp_path / "run", data, tiny_policy, *overrides) as (role, metrics, train_data):
        pairs = train_data.task.validation
        score_B = role.score(pairs.sequences).result()
    assert metrics[-1]["validation/accuracy"] > 0.95
    assert abs(score_B.mean()) < score_B.std()  # centering holds them around 0
    torch.testing.assert_close(
        in_transformers(tmp_path / "run" / "final", pairs.sequences)[:, 0], score_B, rtol=1e-6, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_the_second_stage_starts_from_an_output_of_the_first(stage, tmp_path, tiny_policy):
    """Not learning at all, its scores are those of the attribute; sharded or not, one step is the same step."""
    data = rated(tmp_path / "data", 60, seed=1)
    with trained(tmp_path / "first", data, tiny_policy, *REGRESSION, "run.steps=20"):
        pass
    first, overrides = tmp_path / "first" / "final", ["data.format=helpsteer2", f"reward.zero_stage={stage}"]
    overrides += ["reward.from_attribute=verbosity", "run.steps=1"]
    with trained(tmp_path / "still", data, first, *overrides, "reward.optimizer.lr=0") as (role, _, train_data):
        score_B = role.score(train_data.task.validation.sequences).result()
        wanted_BA = in_transformers(first, train_data.task.validation.sequences)
    torch.testing.assert_close(score_B, wanted_BA[:, 1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        in_transformers(tmp_path / "still" / "final", train_data.task.validation.sequences)[:, 0],
        wanted_BA[:, 1], rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    with trained(tmp_path / "moved", data, first, *overrides) as (role, metrics, _):
        assert not torch.equal(role.score(train_data.task.validation.sequences).result(), score_B)
    assert metrics[0]["grad_norm"] > 0
    assert json.loads((tmp_path / "moved" / "final" / "config.json").read_text())["id2label"] == {"0": "LABEL_0"}


@pytest.mark.slow
@pytest.mark.parametrize("warm", [False, True])
def test_lora_trains_and_writes_the_head(warm, tmp_path, tiny_policy):
    data, start = rated(tmp_path / "data", 60, seed=1), tiny_policy
    if warm:
        start = tmp_path / "first" / "final"
        with trained(tmp_path / "first", data, tiny_policy, *REGRESSION, "run.steps=3"):
            pass
    overrides = [*REGRESSION, "run.steps=6", "reward.lora.rank=2", "reward.lora.alpha=4"]
    with trained(tmp_path / "run", data, start, *overrides) as (role, _, train_data):
        sequences = train_data.task.validation.sequences
        attribute_BA = role.attributes(sequences).result()
        final = tmp_path / "run" / "final"
        torch.testing.assert_close(in_transformers(final, sequences), attribute_BA, rtol=1e-6, atol=1e-6)
        adapters = [name for name, _ in role.ranks.worker.model.named_parameters() if "lora_" in name]
    auto: Any = AutoModelForSequenceClassification if warm else AutoModelForCausalLM
    before, after = auto.from_pretrained(start), AutoModelForSequenceClassification.from_pretrained(final)
    if warm:
        assert not torch.equal(before.score.weight, after.score.weight)
    inner = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before.get_parameter(inner), after.get_parameter(inner))  # the adapters are merged
    assert torch.equal(before.get_parameter("model.norm.weight"), after.get_parameter("model.norm.weight"))
    assert adapters
    assert not any("score" in name for name in adapters)


@pytest.mark.slow
def test_a_template_in_place_of_the_tokenizers_own_is_written(tmp_path, tiny_policy, toy_data, monkeypatch):
    template = tmp_path / "other.jinja"
    own = AutoTokenizer.from_pretrained(tiny_policy).chat_template
    template.write_text(own.replace("{{ bos_token }}", "{{ bos_token }} <system> {{ date_string }}"))
    overrides = ["run.steps=1", f"data.chat_template={template}", "data.date=cat"]
    renderer = Renderer(load_tokenizer(tiny_policy), str(template), "cat")
    prompt, responses = renderer.dialogue_ids([Message("user", "2 + 2?")], ["4"])
    conversation = Sequences(Packed.from_lists([prompt]), Packed.from_lists(responses), torch.tensor([0]))
    with trained(tmp_path / "run", toy_data, tiny_policy, *overrides) as (role, _, _):
        score_B = role.score(conversation).result()
    final = tmp_path / "run" / "final"
    monkeypatch.chdir(final)
    names: dict[str, Any] = {}
    exec((final / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    torch.testing.assert_close(names["scores"].detach(), score_B, rtol=0, atol=1e-5)
    found = card.read(final)
    assert found is not None
    assert (found.chat_template, found.date) == (template.read_text(), "cat")
    assert AutoTokenizer.from_pretrained(final).chat_template == template.read_text()


@pytest.mark.slow
def test_attributes_that_nobody_rated(tmp_path, tiny_policy):
    """The first four of NeMo-Aligner's nine have no label in HelpSteer2; another name is a mistake."""
    data = rated(tmp_path / "data", 60, seed=1)
    overrides = ["loss=regression", "data.format=helpsteer2", "run.steps=2"]
    with trained(tmp_path / "run", data, tiny_policy, *overrides, "reward.attributes=[nemo]") as (
        _,
        metrics,
        train_data,
    ):
        assert (train_data.task.train.label_BA[:, :4] == NOT_RATED).all()
    assert "validation/quality/mse" not in metrics[-1]
    assert "validation/coherence/mse" in metrics[-1]
    assert card.read(tmp_path / "run" / "final").attributes == NEMO_ATTRIBUTES  # type: ignore[union-attr]
    for wrong in ("reward.attributes=[helpfulness,honesty]", "reward.attributes=[nemo] weights.quality=1"):
        with (
            pytest.raises(ConfigError, match=r"no row of train is rated by (honesty|quality)"),
            trained(tmp_path / "no", data, tiny_policy, *overrides, *wrong.split()),
        ):
            pass
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_head_of_other_attributes_is_refused_before_anything(tmp_path, tiny_policy):
    data = rated(tmp_path / "data", 60, seed=1)
    with trained(tmp_path / "first", data, tiny_policy, *REGRESSION, "run.steps=1"):
        pass
    first, other = tmp_path / "first" / "final", ["data.format=helpsteer2", "run.steps=1"]
    for overrides, message in (
        ([*REGRESSION, "reward.attributes=[verbosity,helpfulness]"], "has the outputs helpfulness, verbosity, reward"),
        (["reward.from_attribute=coherence"], "has no output coherence, but helpfulness, verbosity"),
    ):
        with pytest.raises(ModelError, match=message), trained(tmp_path / "no", data, first, *other, *overrides):
            pass
    with (
        pytest.raises(ModelError, match=r"reward\.head is trained, and the checkpoint is no sequence classifier"),
        trained(tmp_path / "no", data, tiny_policy, *other, "reward.head=trained"),
    ):
        pass
    assert not (tmp_path / "no").exists()
