"""What a judge's folder says of how it learned to be asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from align.config import FunctionGeneratorConfig, GenerativeConfig, ModelGeneratorConfig, VerdictConfig
from align.errors import ConfigError, ModelError
from align.rewards import genrm_card


def asked(folder: Path, **values: object) -> GenerativeConfig:
    return replace(GenerativeConfig(judge=ModelGeneratorConfig(path=str(folder))), **values)


def card(folder: Path, verdict: VerdictConfig, date: str | None = None) -> Path:
    ((name, text),) = genrm_card.files(verdict, date).items()
    (folder / name).write_text(text)
    return folder


def test_a_judge_is_asked_as_it_learned(tmp_path: Path):
    folder = card(tmp_path, VerdictConfig(form="json", custom_roles=True, principle="clear"))
    genrm_card.require_same(asked(folder, form="json", custom_roles=True))  # by any principle
    with pytest.raises(ConfigError) as caught:
        genrm_card.require_same(asked(folder))
    assert caught.value.where == str(folder)
    assert caught.value.remedy == "set reward.form=json reward.custom_roles=true"


def test_a_judge_reads_the_date_that_it_learned_with(tmp_path: Path):
    folder = card(tmp_path, VerdictConfig(), "26 Jul 2024")
    genrm_card.require_same(asked(folder, judge=ModelGeneratorConfig(path=str(folder), date="26 Jul 2024")))
    with pytest.raises(ConfigError, match=r"but the recipe uses reward\.judge\.date=null") as caught:
        genrm_card.require_same(asked(folder))
    assert caught.value.remedy == "set reward.judge.date=26 Jul 2024"


def test_nothing_is_known_of_others(tmp_path: Path):
    genrm_card.require_same(asked(tmp_path))
    genrm_card.require_same(GenerativeConfig(judge=FunctionGeneratorConfig(function="m:f")))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", json.dumps({"version": 2}), json.dumps({"version": 1, "form": "json"})]
)
def test_a_card_that_cannot_be_read(tmp_path: Path, text: str):
    (tmp_path / genrm_card.NAME).write_text(text)
    with pytest.raises(ModelError, match=genrm_card.NAME):
        genrm_card.require_same(asked(tmp_path))
