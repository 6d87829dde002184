"""Targets of supervised fine-tuning: each reads its kind of rows and makes demonstrations of them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from align.algorithms import sft
from align.config import DataConfig, PolicyConfig
from align.data import dataset, tokenize, toy_family
from align.data.chat import Renderer, load_tokenizer
from align.data.sft_targets import SFT_TARGETS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_family.write_toy_family(tmp_path_factory.mktemp("family"), 20, 5, seed=0)


def test_every_target_of_a_recipe_is_defined():
    assert set(SFT_TARGETS) == set(get_args(get_type_hints(sft.Config)["target"]))


@pytest.mark.parametrize("name", SFT_TARGETS)
def test_a_target_makes_demonstrations_of_the_rows_it_reads(name: str, folder: Path):
    config = sft.Config(policy=PolicyConfig(path="p"), data=DataConfig(path=str(folder)), target=name)
    source = dataset.load_dataset(config.data, config.reads())
    train_data, counts = sft.load_data(config, source, Renderer(load_tokenizer(folder / "tokenizer")))
    assert len(train_data.demonstrations) == counts["kept"] > 0
    assert bool(train_data.files) == (name == "genrm_verdicts")


@pytest.mark.parametrize("responses", ["preferred", "all"])
def test_responses_are_tokenized_as_demonstrations(responses: str, folder: Path):
    renderer = Renderer(load_tokenizer(folder / "tokenizer"))
    config = sft.Config(policy=PolicyConfig(path="p"), data=DataConfig(path=str(folder)), responses=responses)
    source = dataset.load_dataset(config.data, config.reads())
    train_data, counts = sft.load_data(config, source, renderer)
    demonstrations = train_data.demonstrations
    expected, others = tokenize.tokenize_demonstrations(source.train, renderer, responses, 2048, 2048)
    assert (demonstrations.prompts.lists(), demonstrations.responses.lists()) == (
        expected.prompts.lists(),
        expected.responses.lists(),
    )
    assert counts == others
