"""Every recipe for published models fits the GPUs that it is written for, and a remedy that is named is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config.load import load_recipe
from align.plan import remedies
from align.plan.hardware import GPUS
from align.plan.main import on_gpus
from align.plan.planning import make_plan

RECIPES = Path(__file__).parents[2] / "recipes"
LLAMA, QWEN = "meta-llama/Llama-3.3-70B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"
FITTING: dict[str, tuple[str, ...]] = {
    "dpo/llama3-70b-helpsteer2": (f"policy.path={LLAMA}",),
    "dpo/llama3.1-70b-helpsteer2-preference-scaled": (),
    "dpo/qwen2.5-0.5b": (),
    "feedback_edit/llama3.3-70b-edit-reward": (),
    "feedback_edit/llama3.3-70b-edit-rloo": (f"policy.path={LLAMA}", f"reward.path={LLAMA}"),
    "feedback_edit/llama3.3-70b-edit": (),
    "feedback_edit/llama3.3-70b-feedback": (),
    "genrm/llama3.3-nemotron-49b-helpsteer3-sft": (),
    "ppo/llama3-70b-helpsteer2": (f"policy.path={LLAMA}", f"reward.path={LLAMA}"),
    "ppo/llama3.1-70b-helpsteer2-preference": (),
    "reward_model/llama3-70b-helpsteer2-regression": (),
    "reward_model/llama3.1-70b-helpsteer2-preference-stage1": (),
    "reward_model/llama3.1-70b-helpsteer2-preference-stage2": (f"reward.path={LLAMA}",),
    "reward_model/llama3.3-70b-helpsteer3": (),
    "reward_model/qwen2.5-0.5b": (),
    "reward_model/qwen3-32b-helpsteer3": (),
    "rloo/llama3.1-70b-helpsteer2-preference": (),
    "rloo/llama3.3-70b-helpsteer3": (),
    "rloo/qwen2.5-0.5b-helpsteer3": (f"reward.path={QWEN}",),
    "rloo/qwen3-32b-genrm": (),
    "sft/qwen2.5-0.5b": (),
    "steerlm/llama2-13b-helpsteer": ("policy.path=meta-llama/Llama-2-13b-hf",),
    "steerlm/llama3-70b-helpsteer2-steerlm2": tuple(
        f"{key}.path={LLAMA}" for key in ("data", "policy", "reward", "base")
    ),
    "steerlm/llama3-70b-helpsteer2": (
        f"policy.path={LLAMA}",
        "data.path=FOLDER",
        f"reward.path={LLAMA}",
    ),
}
"""Recipes with what they require on the command line. They are for GPUs of 80 GB."""
LARGER = {"genrm/llama3.3-nemotron-49b-helpsteer3": "H200"}
LOCAL = {"reward_model/human-preference", "reward_model/quickstart-regression"}
"""Recipes for models that other recipes make."""


def plan(name: str, words: tuple[str, ...], gpu: str = "H100") -> Any:
    return make_plan(on_gpus(load_recipe(RECIPES / f"{name}.yaml", list(words))), GPUS[gpu])


def test_no_recipe_is_left_out():
    kinds = {"dpo", "feedback_edit", "genrm", "ppo", "reward_model", "rloo", "sft", "steerlm"}
    there = {f"{kind}/{path.stem}" for kind in kinds for path in (RECIPES / kind).glob("*.yaml")}
    assert there == FITTING.keys() | LARGER.keys() | LOCAL


@pytest.mark.parametrize("name", [*FITTING, *LARGER])
def test_fits_its_gpus(name: str):
    made = plan(name, FITTING.get(name, ()), LARGER.get(name, "H100"))
    assert made.too_large == []
    assert max(group.peak[1] for group in made.groups) > 0.05 * made.gpu.memory  # a plan of something


@pytest.mark.parametrize(
    "words", [("policy.max_num_seqs=64",), ("policy.max_num_seqs=8", "policy.gradient_checkpointing=false")]
)
def test_the_named_remedy_makes_it_fit(words: tuple[str, ...]):
    """Too many rows of the cache, and activations of all layers."""
    made = plan("rloo/qwen3-32b-genrm", words)
    assert made.too_large
    result = remedies.first_that_fits(made)
    assert result is not None
    assert result[1].too_large == []
