"""Rated responses: HelpSteer, HelpSteer2 and what its annotators said one by one; as rows, as pairs, as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import layouts
import pytest
import torch
from layouts import rated

from align import launch
from align.algorithms import reward_model
from align.config import DataConfig
from align.config.load import load_recipe
from align.data import dataset, helpsteer2, toy
from align.data.chat import Message, Renderer
from align.data.dataset import Rating, SplitCounts
from align.errors import DataError
from align.types import NOT_RATED

ALL = {"helpfulness": 3.0, "correctness": 4.0, "coherence": 4.0, "complexity": 2.0, "verbosity": 1.0}


def load(folder: Path, reads: Any = "ratings", form: Any = "helpsteer2", **options: Any) -> Any:
    return dataset.load_dataset(DataConfig(path=str(folder), format=form, **options), reads)


def helpsteer1(folder: Path, train: list[Any], **options: Any) -> Any:
    layouts.write(folder, "helpsteer", train, [rated("v"), rated("v", "cat pig", 1)])
    return load(folder, "preferences", "helpsteer", **options)


def context(prompt: str) -> tuple[Message, ...]:
    return (Message("user", prompt),)


class TestRatings:
    @pytest.mark.parametrize("form", ["helpsteer", "helpsteer2"])
    def test_every_row_is_one(self, tmp_path: Path, form: str):
        prompt = "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc"
        rows = [rated(prompt), rated(prompt, "cat pig", 0), rated("v"), rated(prompt)]
        read = load(layouts.write(tmp_path, form, rows, [rated("v")]), form=form)
        turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
        assert read.train == [
            Rating(turns, "cat dog", ALL, "", "english"),
            Rating(turns, "cat pig", ALL | {"helpfulness": 0.0}, "", "english"),
        ]
        assert read.counts["train"] == SplitCounts(4, {}, 0, duplicates=1, in_validation=1, kept=2)

    def test_the_fingerprint_follows_every_rating(self, tmp_path: Path):
        rows = [rated(), rated(verbosity=2), rated(helpfulness=2), rated()]
        found = [
            load(layouts.write(tmp_path / str(n), "helpsteer2", [row], [rated("v")])).fingerprint
            for n, row in enumerate(rows)
        ]
        assert len(set(found)) == 3 and found[0] == found[3]

    def test_an_empty_response_can_be_rated(self, tmp_path: Path):
        read = load(layouts.write(tmp_path, "helpsteer2", [rated(response="")], [rated("v")]))
        assert read.train[0].response == ""


class TestDisagreements:
    FILE = "disagreements/disagreements.jsonl.gz"

    def read(self, folder: Path, rows: list[Any], **options: Any) -> Any:
        # The hash of "held out 4" is a multiple of 20, those of the other prompts here are not.
        layouts.put(folder / self.FILE, [*rows, layouts.disagreement("held out 4")])
        return load(folder, form="helpsteer2_disagreements", **options)

    def test_ratings_are_means_and_helpfulness_has_a_spread(self, tmp_path: Path):
        read = self.read(tmp_path, [layouts.disagreement()])
        means = {"helpfulness": 10 / 3, "correctness": 4.0, "coherence": 4.0, "complexity": 1.5, "verbosity": 0.0}
        assert read.train == [Rating(context("cat"), "cat dog", means, "", "english", spread=1)]

    def test_far_apart(self, tmp_path: Path):
        marks = {"a": [0, 2], "b": [0, 3, 1], "c": [4]}
        rows = [layouts.disagreement(name, helpfulness=one) for name, one in marks.items()]
        read = self.read(tmp_path, rows)
        assert [row.context[0].content for row in read.train] == ["a", "c"]
        assert read.counts["train"].spread == 1
        assert self.read(tmp_path, rows, max_spread=None).counts["train"].kept == 3

    def test_one_prompt_in_twenty_is_validation(self, tmp_path: Path):
        names = [f"prompt {n}" for n in range(1000)]
        held_out = [name for name in names if helpsteer2.is_held_out(name)]
        assert len(held_out) == 55
        rows = [layouts.disagreement(name, response) for name in names[:100] for response in ("cat", "dog")]
        read = self.read(tmp_path, rows)
        assert len(read.validation) == 2 * len(set(held_out) & set(names[:100])) + 1
        assert not {row.context for row in read.train} & {row.context for row in read.validation}

    def test_a_row_that_cannot_be_read_counts_once(self, tmp_path: Path):
        read = self.read(
            tmp_path, [layouts.disagreement(), b"{", layouts.disagreement("dog", verbosity=2)], bad_rows="skip"
        )
        assert read.counts["validation"].bad == {"row is not JSON": 1}
        assert read.counts["train"].bad == {"verbosity is not a list of ratings": 1}

    @pytest.mark.parametrize("streaming", [False, True])
    def test_from_the_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool):
        # A folder of the same layout stands in for the hub: `load_dataset` treats both alike.
        rows = [layouts.disagreement("a"), layouts.disagreement("b"), layouts.disagreement("held out 4")]
        layouts.put(tmp_path / self.FILE, rows)
        layouts.write(tmp_path, "helpsteer2", [layouts.rated()], [layouts.rated("v")])
        load_dataset, asked = datasets.load_dataset, []

        def stand_in(path: str, data_dir: str, **options: Any) -> Any:
            asked.append((path, data_dir, options))
            options = {"streaming": streaming, "cache_dir": str(tmp_path / "cache")}
            return load_dataset(str(tmp_path), data_dir=data_dir, **options)

        monkeypatch.setattr(datasets, "load_dataset", stand_in)
        read = load(Path("nvidia/HelpSteer2"), form="helpsteer2_disagreements", streaming=streaming)
        options = {"revision": None} | ({"streaming": True} if streaming else {})
        assert asked == [("nvidia/HelpSteer2", "disagreements", options)]
        assert (len(read.train), len(read.validation)) == (2, 1)
        assert read.fingerprint == load(tmp_path, form="helpsteer2_disagreements").fingerprint


class TestPairsOfHelpSteer1:
    def test_every_two_responses_to_a_prompt(self, tmp_path: Path):
        rows = [rated("a", name, mark) for name, mark in (("x", 4), ("y", 0), ("z", 3))]
        read = helpsteer1(tmp_path, [*rows, rated("b")])
        assert [(row.response1, row.response2, row.preference) for row in read.train] == [
            ("x", "y", -3),  # 4 is cut to 3
            ("x", "z", -1),
            ("y", "z", 3),
        ]
        assert read.counts["train"] == SplitCounts(
            read=4, bad={}, other_domain=0, duplicates=0, in_validation=0, kept=3, single=1
        )

    def test_a_prompt_that_comes_again_later_is_another_group(self, tmp_path: Path):
        read = helpsteer1(tmp_path, [rated("a", "x"), rated("a", "y"), rated("b"), rated("a", "z")])
        assert [(row.response1, row.response2) for row in read.train] == [("x", "y")]
        assert read.counts["train"].single == 2

    def test_a_bad_row_costs_its_group_and_nothing_else(self, tmp_path: Path):
        rows = [
            rated("a", "x"),
            b"{",
            rated("a", "y"),
            rated("b", "x"),
            rated("b", "y", 9),
            rated("c", "x"),
            rated("c", "y"),
        ]
        read = helpsteer1(tmp_path, rows, bad_rows="skip")
        assert read.counts["train"].bad == {"row is not JSON": 1, "helpfulness is outside 0 to 4": 1}
        assert [row.context for row in read.train] == [context("c")]
        with pytest.raises(DataError, match=r"train\.jsonl\.gz:5: helpfulness is outside"):
            helpsteer1(tmp_path, [*rows[:1], *rows[2:3], rated("d"), *rows[3:]])


class TestTokens:
    """The prompt "cat" is <s> <user> cat <assistant>: four tokens; a response has one more than words."""

    def rows(self) -> list[Rating]:
        def row(prompt: str, response: str, **ratings: float) -> Rating:
            return Rating(context(prompt), response, ratings, "", "english")

        return [
            row("cat", "cat dog", helpfulness=3.0, verbosity=1.5),
            row("cat", "pig", humor=4.0),
            row("cat", "", verbosity=0.0),
            row("dog sun", "owl"),
            row("hen", "owl owl owl", helpfulness=1.0),
            row("cat", "owl", helpfulness=2.0),
            row("hen hen hen hen hen", "owl", helpfulness=1.0),
        ]

    def test_labels_and_shared_prompts(self):
        renderer = Renderer(toy.tokenizer())
        found, counts = dataset.tokenize_ratings(self.rows(), renderer, ["verbosity", "helpfulness"], 5, 3)
        assert counts == {"rows": 7, "unrated": 2, "too_long": 2, "kept": 3}
        torch.testing.assert_close(found.label_BA, torch.tensor([[1.5, 3.0], [0.0, NOT_RATED], [NOT_RATED, 2.0]]))
        assert [renderer.text(ids) for ids in found.sequences.responses.lists()] == ["cat dog", "", "owl"]
        assert [renderer.text(ids) for ids in found.sequences.prompts.lists()] == ["cat", "cat"]
        assert found.sequences.prompt_B.tolist() == [0, 0, 1]

    def test_it_is_what_the_renderer_gives_row_by_row(self):
        renderer, rows = Renderer(toy.tokenizer()), self.rows()
        found, _ = dataset.tokenize_ratings(rows, renderer, ["helpfulness"], 99, 99)
        slow = [
            (renderer.prompt_ids(r.context), renderer.response_ids(r.context, r.response))
            for r in rows
            if "helpfulness" in r.ratings
        ]
        prompts, responses = found.sequences.prompts.lists(), found.sequences.responses.lists()
        assert [(prompts[p], responses[i]) for i, p in enumerate(found.sequences.prompt_B.tolist())] == slow

    def test_nothing_left(self):
        with pytest.raises(DataError, match="no rated responses are left in the data: rows 7, unrated 7, too_long 0"):
            dataset.tokenize_ratings(self.rows(), Renderer(toy.tokenizer()), ["toxicity"], 9, 9)


RECIPE = """
algorithm: reward_model
run: {{dir: {run}, steps: 1}}
data: {{path: {data}, format: helpsteer2_disagreements, bad_rows: skip}}
loss: regression
weights: {{helpfulness: 1}}
executor: local
reward:
  path: {tokenizer}
  optimizer: {{lr: 1e-3}}
  attributes: [helpfulness, verbosity]
  init: {{model_type: llama, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 2}}
"""


def test_a_run_says_what_became_of_its_ratings(tmp_path: Path):
    """What `launch` writes to data.json."""
    rows = [layouts.disagreement("cat"), b"{", layouts.disagreement("dog", helpfulness=[0, 4])]
    layouts.put(tmp_path / TestDisagreements.FILE, [*rows, layouts.disagreement("held out 4")])
    toy.tokenizer().save_pretrained(tmp_path / "tokenizer")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(run=tmp_path / "run", data=tmp_path, tokenizer=tmp_path / "tokenizer"))
    prepared = launch.prepare(load_recipe(recipe, ["batch_size=1"]))
    assert isinstance(prepared.config, reward_model.Config)
    source = prepared.description["source"]
    assert (source["train"]["read"], source["train"]["spread"], source["train"]["kept"]) == (2, 1, 1)
    assert source["validation"]["bad"] == {"row is not JSON": 1}
    assert prepared.description["prepared"]["kept"] == 1
    data = prepared.config.data
    assert prepared.description["fingerprint"] == dataset.load_dataset(data, "ratings").fingerprint
