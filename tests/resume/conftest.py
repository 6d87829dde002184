"""Runs that can be killed, and recipes for them."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for harness

from harness import Runs
from killed_recipes import ALGORITHMS, HEAD, LORA, PLACEMENTS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """A process that starts runs."""
    made = Runs(tmp_path_factory.mktemp("logs"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def write_recipe(
    tmp_path_factory: pytest.TempPathFactory,
    toy_data,
    family_data,
    tiny_policy,
    tiny_family,
    tiny_reward,
    tiny_attributes,
    tiny_judge,
):
    """Writes the recipe of a name of `ALGORITHMS`; the epoch does not divide by the batch."""

    def write(name: str) -> str:
        algorithm, text = ALGORITHMS[name]
        lora = LORA if "best" not in name else "null"
        values = {"algorithm": algorithm, "data": toy_data, "policy": tiny_policy, "reward": tiny_reward, "lora": lora}
        if algorithm == "feedback_edit":
            values["data"] = family_data
        if algorithm in ("genrm", "steerlm", "steerlm2"):
            values |= {"data": family_data, "policy": tiny_family, "attributes": tiny_attributes}
        values["writer"] = tiny_judge
        values["judge"] = f"{Path(__file__).with_name('judge.py')}:different_words"
        values["format"] = "helpsteer2" if name.endswith("regression") else "helpsteer3"
        path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        path.write_text((HEAD + text).format(**values))
        return str(path)

    return write


@pytest.fixture(scope="module")
def on_ray(runs, write_recipe, tmp_path_factory):
    """The undisturbed run of a recipe on Ray; returns (arguments but for the folder, folder)."""
    made: dict[str, tuple[tuple[str, ...], Path]] = {}

    def get(name: str) -> tuple[tuple[str, ...], Path]:
        if name not in made:
            sampler = ["sampler={}"] if "sampler" in PLACEMENTS[name] else []
            train = ("train", write_recipe(name), "executor=ray", *sampler, f"placement={PLACEMENTS[name]}")
            folder = tmp_path_factory.mktemp("reference") / "run"
            assert runs.run(*train, f"run.dir={folder}", log=f"whole {name}") == 0, runs.text(f"whole {name}")
            made[name] = train, folder
        return made[name]

    return get
