"""Runs that can be killed, and recipes for them."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for harness

from harness import Runs
from killed_recipes import ALGORITHMS, HEAD, LORA


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """A process that starts runs."""
    made = Runs(tmp_path_factory.mktemp("logs"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def write_recipe(tmp_path_factory: pytest.TempPathFactory, toy_data, tiny_policy, tiny_reward):
    """Writes the recipe of a name of `ALGORITHMS`; the epoch does not divide by the batch."""

    def write(name: str) -> str:
        algorithm, text = ALGORITHMS[name]
        lora = LORA if "best" not in name else "{rank: 0}"
        values = {"algorithm": algorithm, "data": toy_data, "policy": tiny_policy, "reward": tiny_reward, "lora": lora}
        path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        path.write_text((HEAD + text).format(**values))
        return str(path)

    return write
