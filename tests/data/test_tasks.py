"""What can be demonstrated: rows that each task reads, and that all of them give demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from align.algorithms import sft
from align.config import DataConfig, PolicyConfig
from align.data import dataset, tokenize, toy_family
from align.data.chat import Renderer, load_tokenizer
from align.data.tasks import SFT_TARGETS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_family.write_toy_family(tmp_path_factory.mktemp("family"), 20, 5, seed=0)


def test_every_task_of_a_recipe_is_there():
    assert set(SFT_TARGETS) == set(get_args(get_type_hints(sft.Config)["demonstrates"]))


@pytest.mark.parametrize("name", SFT_TARGETS)
def test_a_task_makes_demonstrations_of_what_it_reads(name: str, folder: Path):
    config = sft.Config(policy=PolicyConfig(path="p"), data=DataConfig(path=str(folder)), demonstrates=name)
    source = dataset.load_dataset(config.data, config.reads())
    found, counts = sft.load_data(config, source, Renderer(load_tokenizer(folder / "tokenizer")))
    assert len(found.demonstrations) == counts["kept"] > 0
    assert bool(found.files) == (name == "verdicts")


@pytest.mark.parametrize("responses", ["preferred", "all"])
def test_answers_are_as_before(responses: str, folder: Path):
    renderer = Renderer(load_tokenizer(folder / "tokenizer"))
    config = sft.Config(policy=PolicyConfig(path="p"), data=DataConfig(path=str(folder)), responses=responses)
    source = dataset.load_dataset(config.data, config.reads())
    train_data, counts = sft.load_data(config, source, renderer)
    found = train_data.demonstrations
    wanted, others = tokenize.tokenize_demonstrations(source.train, renderer, responses, 2048, 2048)
    assert (found.prompts.lists(), found.responses.lists()) == (wanted.prompts.lists(), wanted.responses.lists())
    assert counts == others
