"""How attributes are told: NeMo's text byte by byte, the other places, and the card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from align.config import SteeringConfig
from align.data import toy_family
from align.data.chat import Message, Renderer
from align.data.steerlm import NAME, SteeringFormat, read_steering_card, require_same_steering
from align.errors import ConfigError, ModelError

TEMPLATE = Path(__file__).parents[2] / "recipes" / "templates" / "steerlm.jinja"
ASKED = (Message("system", "Be brief."), Message("user", "Hi"))


def rendered(form: SteeringFormat, context: tuple[Message, ...], values: tuple[int, ...] | None = None) -> str:
    messages, opening = form.steered(context, values)
    return Renderer(toy_family.tokenizer(), str(TEMPLATE))._render(messages, add_generation_prompt=True) + opening


def test_the_shipped_template_writes_the_text_of_nemo():
    form = SteeringFormat.of(SteeringConfig(attributes=["nemo"], values={"complexity": 4, "verbosity": 4}))
    assert rendered(form, ASKED) == (
        "<extra_id_0>System\nBe brief.\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n"
        "<extra_id_2>quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,correctness:4,coherence:4,complexity:4,"
        "verbosity:4\n"
    )


def test_earlier_turns_and_the_usual_system_text():
    form = SteeringFormat.of(SteeringConfig(attributes=["verbosity"]))
    context = (Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "Why"))
    assert rendered(form, context, (1,)) == (
        "<extra_id_0>System\nA chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions.\n<extra_id_1>User\nHi\n"
        "<extra_id_1>Assistant\nHo\n<extra_id_1>User\nWhy\n<extra_id_1>Assistant\n<extra_id_2>verbosity:1\n"
    )


def test_the_template_ends_an_answer_and_its_ids_follow_the_prompt():
    renderer = Renderer(toy_family.tokenizer(), str(TEMPLATE))
    messages, opening = SteeringFormat.of(SteeringConfig()).steered((Message("user", "sort the words : pig ant"),))
    prompt, (answer,) = renderer.dialogue_ids(messages, ["ant pig"], opening)
    assert renderer.text(answer) == "ant pig" and answer[-1] in renderer.stop_ids
    assert renderer.text(prompt).endswith(
        "<extra_id_2>helpfulness:4,correctness:4,coherence:4,complexity:2,verbosity:2\n"
    )


TOLD = " (b:1,a:0)"


@pytest.mark.parametrize(
    ("place", "context", "expected"),
    [
        ("user", ASKED, (ASKED[0], Message("user", "Hi" + TOLD))),
        ("system", ASKED, (Message("system", "Be brief." + TOLD), ASKED[1])),
        ("system", ASKED[1:], (Message("system", TOLD), ASKED[1])),
        ("assistant", ASKED, ASKED),
    ],
)
def test_where_attributes_are_told(place, context, expected):
    form = SteeringFormat.of(SteeringConfig(attributes=["b", "a"], place=place, prefix=" (", suffix=")"))
    assert form.steered(context, (1, 0)) == (expected, TOLD if place == "assistant" else "")


def test_what_is_asked_for_where_nothing_is_said():
    """HelpSteer2: H4 C4 Coh4 Complexity2 Verbosity2; NeMo-Aligner: no toxicity, humor, creativity."""
    assert SteeringFormat.of(SteeringConfig(attributes=["nemo"])).values == (4, 0, 0, 0, 4, 4, 4, 2, 2)
    assert SteeringFormat.of(SteeringConfig(values={"verbosity": 4})).values == (4, 4, 4, 2, 4)
    assert SteeringFormat.of(SteeringConfig()).asking({"helpfulness": 1}).values == (1, 4, 4, 2, 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"helpfullness": 4}, "did you mean `helpfulness`?.*helpfulness, correctness"),
        ({"humor": 1}, "attributes: helpfulness, correctness, coherence, complexity, verbosity"),
        ({"verbosity": 5}, "verbosity=5 is outside 0 to 4"),
    ],
)
def test_a_value_that_cannot_be_asked_for(given, said):
    with pytest.raises(ConfigError, match=said):
        SteeringFormat.of(SteeringConfig()).asking(given)


def test_unknown_names_of_nemo_are_refused():
    with pytest.raises(ConfigError, match="overall=3"):
        SteeringFormat.of(SteeringConfig(attributes=["nemo"], values={"overall": 3}))


def test_the_card_reads_back(tmp_path: Path):
    form = SteeringFormat.of(
        SteeringConfig(attributes=["b", "a"], values={"a": 3}, place="user", prefix="{", suffix="}"), "26 Jul 2024"
    )
    files = form.files()
    assert files.keys() == {NAME}
    (tmp_path / NAME).write_text(files[NAME])
    assert read_steering_card(tmp_path / NAME) == form


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"values": [1]}, {"values": [1, "x"]}, {"more": 1}, None], ids=lambda x: str(x)
)
def test_a_card_that_cannot_be_read(change, tmp_path: Path):
    card = json.loads(SteeringFormat.of(SteeringConfig(attributes=["b", "a"])).files()[NAME])
    (tmp_path / NAME).write_text("[" if change is None else json.dumps(card | change))
    with pytest.raises(ModelError):
        read_steering_card(tmp_path / NAME)


def test_a_policy_is_told_as_it_learned(tmp_path: Path):
    """By any values."""
    learned = SteeringConfig(attributes=["helpfulness", "verbosity"], place="user", prefix="\n\n", suffix="")
    for name, text in SteeringFormat.of(learned).files().items():
        (tmp_path / name).write_text(text)
    require_same_steering(SteeringFormat.of(replace(learned, values={"helpfulness": 1})), str(tmp_path))
    require_same_steering(SteeringFormat.of(SteeringConfig()), str(tmp_path / "of another"))
    for changes, said in (
        ({"attributes": ["verbosity", "helpfulness"]}, 'steering.attributes=["helpfulness", "verbosity"]'),
        ({"place": "system", "prefix": "x"}, 'steering.place="user" steering.prefix="\\n\\n"'),
        ({"suffix": "\n"}, 'steering.suffix=""'),
    ):
        with pytest.raises(ConfigError) as caught:
            require_same_steering(SteeringFormat.of(replace(learned, **changes)), str(tmp_path))
        assert caught.value.remedy == f"use the values of its training: {said}"
        assert caught.value.where == str(tmp_path)
