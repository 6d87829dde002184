"""How recipe, card and config of a checkpoint say what its head is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reward_models import NAMES, Save, section
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.config import CheckpointRewardConfig, EnsembleRewardConfig, FunctionRewardConfig
from align.prechecks.roles import with_absolute_paths
from align.rewards import checkpoint_format
from align.rewards.card import Card


def test_the_recipe_overrides_the_cards_template(save: Save, tmp_path: Path):
    own = Card("sequence_classification", chat_template="card", date="1 May 2025")
    path = save(AutoModelForSequenceClassification, num_labels=1, own=own)
    (tmp_path / "own.jinja").write_text("recipe")
    (by_card,) = checkpoint_format.head_specs(section(path))
    (by_recipe,) = checkpoint_format.head_specs(
        section(path, chat_template=str(tmp_path / "own.jinja"), date="2 May 2025")
    )
    assert (by_card.chat_template, by_card.date) == ("card", "1 May 2025")
    assert (by_recipe.chat_template, by_recipe.date) == ("recipe", "2 May 2025")


def test_kinds_are_told_by_card_and_config(save: Save):
    kinds = {
        "one": save(AutoModelForSequenceClassification, num_labels=1, name="one"),
        "two": save(AutoModelForSequenceClassification, num_labels=2, name="two"),
        "row": save(AutoModelForCausalLM, name="row", own=Card("lm_head_row0")),
    }
    options: dict[str, dict[str, Any]] = {"two": {"attributes": ["a", "b"], "weights": {"a": 1}}}
    found = {
        name: checkpoint_format.head_specs(section(path, **options.get(name, {})))[0].kind
        for name, path in kinds.items()
    }
    assert found == {"one": "sequence_classification", "two": "attributes", "row": "lm_head_row0"}


def test_names_come_from_recipe_card_or_config(save: Save):
    labels = dict(enumerate(NAMES))
    named = save(AutoModelForSequenceClassification, num_labels=5, name="named", id2label=labels)
    nine = save(AutoModelForSequenceClassification, num_labels=9, name="nine")
    (own,) = checkpoint_format.head_specs(section(named, weights={"coherence": 2.0}))
    (nemo,) = checkpoint_format.head_specs(section(nine, attributes=["nemo"], weights={"helpfulness": 1.0}))
    assert (own.names, own.weights) == (NAMES, (0, 0, 2.0, 0, 0))
    assert nemo.names[:5] == ("quality", "toxicity", "humor", "creativity", "helpfulness")
    assert nemo.weights == (0, 0, 0, 0, 1.0, 0, 0, 0, 0)


def test_members_of_an_ensemble_have_what_is_theirs():
    first = EnsembleRewardConfig(path="a", revision="r", paths=["b", "c"], head="lm_head_row0")
    a, b, c = checkpoint_format.members(first)
    assert [(one.path, one.revision, one.head) for one in (a, b, c)] == [
        ("a", "r", "lm_head_row0"), ("b", None, "lm_head_row0"), ("c", None, "lm_head_row0"),
    ]  # fmt: skip
    assert all(type(one) is CheckpointRewardConfig for one in (a, b, c))


def test_files_of_a_judge_are_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Workers, and jobs, may begin in another folder; hub ids and modules stay as they are."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for name in ("judge.py", "t.jinja"):
        (tmp_path / name).write_text("")
    models = with_absolute_paths(EnsembleRewardConfig(path="a", paths=["b", "org/model"], chat_template="t.jinja"))
    assert isinstance(models, EnsembleRewardConfig)
    assert (models.path, models.paths) == (str(tmp_path / "a"), [str(tmp_path / "b"), "org/model"])
    assert models.chat_template == str(tmp_path / "t.jinja")
    for given, full in (("judge.py:f", f"{tmp_path / 'judge.py'}:f"), ("judges.module:f", "judges.module:f")):
        found = with_absolute_paths(FunctionRewardConfig(function=given))
        assert isinstance(found, FunctionRewardConfig)
        assert found.function == full
