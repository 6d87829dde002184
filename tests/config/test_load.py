"""Every message is checked for its file, line, key, value and remedy; every accepted spelling for its value."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import MISSING

from align import cli
from align.config import PolicyConfig, RecipeConfig, RewardConfig, SamplingConfig, TrainedRewardConfig, load
from align.errors import ConfigError

RECIPE = Path("r.yaml")


@dataclass(frozen=True)
class Sampler:
    """A section whose checks would fail on a value that is still missing."""

    temperature: float = 1.0
    """Divides the logits;
    0 is greedy."""
    top_k: int = MISSING
    """Tokens kept."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError("temperature must not be negative")
        if self.top_k < 1:
            raise ValueError("top_k must be positive")


@dataclass(frozen=True)
class Base:
    name: str = "toy"
    """Inherited."""
    sampler: Sampler = field(default_factory=Sampler)
    """How responses are drawn."""


@dataclass(frozen=True)
class Toy(Base):
    steps: int = 10
    lr: float = 1e-6
    mode: Literal["fast", "slow"] = "fast"
    level: Literal[1, 2] = 1
    verbose: bool = False
    """Says more."""
    tag: str | None = None
    limit: float | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    ratios: tuple[int, ...] = ()
    words: list[str] = field(default_factory=list)
    slots: dict[str, str] = field(default_factory=dict)
    init: dict[str, Any] = field(default_factory=dict)
    copy: str = "${name}"

    def __post_init__(self) -> None:
        if self.steps < self.sampler.top_k:
            raise ValueError("steps must not be below sampler.top_k")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def build(text: str = "", *overrides: str, schema: type = Toy) -> load.LoadedConfig:
    RECIPE.write_text(text + "\nsampler: {top_k: 5}\n", encoding="utf-8")
    return load.build_config(schema, RECIPE, overrides)


def message(text: str, *overrides: str) -> str:
    """The message for a recipe that is used exactly as written."""
    RECIPE.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load.build_config(Toy, RECIPE, overrides)
    assert caught.value.exit_status == 78
    return str(caught.value)


def fault(text: str, *overrides: str) -> str:
    """The message for a recipe whose mandatory key is given on its last line."""
    return message(text + "\nsampler: {top_k: 5}\n", *overrides)


# Merging and origins


def test_the_later_layer_wins_and_each_leaf_knows_its_origin():
    loaded = build("steps: 20\nlr: 3e-7\nslots:\n  policy: 0-7", "lr=1e-5", "slots.critic=2", "slots={reward: 3}")
    assert (loaded.config.steps, loaded.config.lr, loaded.config.mode) == (20, 1e-5, "fast")
    assert loaded.config.slots == {"policy": "0-7", "critic": "2", "reward": "3"}
    assert loaded.recipe == RECIPE
    origin = loaded.origin
    assert set(origin) == set(load.flatten_config(loaded.config))
    assert (origin["mode"], origin["steps"], origin["lr"]) == ("default", "r.yaml:1", "command line")
    assert (origin["slots.policy"], origin["slots.critic"]) == ("r.yaml:4", "command line")
    assert (origin["sampler.temperature"], origin["sampler.top_k"]) == ("default", "r.yaml:5")


def test_the_last_override_of_a_key_wins_and_lists_are_replaced():
    loaded = build("words: [a, b]", "steps=6", "steps=7", "words=[c]")
    assert (loaded.config.steps, loaded.config.words) == (7, ["c"])


def test_a_missing_value_on_top_of_a_given_one_changes_nothing():
    loaded = build("steps: 20", "steps=???")
    assert (loaded.config.steps, loaded.origin["steps"]) == (20, "r.yaml:1")


def test_the_config_is_the_frozen_dataclass_itself():
    loaded = build("betas: [0.5, 1]\nratios: [1, 2, 3]")
    assert type(loaded.config) is Toy and type(loaded.config.sampler) is Sampler
    assert loaded.config.betas == (0.5, 1.0) and loaded.config.ratios == (1, 2, 3)
    with pytest.raises(FrozenInstanceError):
        loaded.config.steps = 3


# Scalars


@pytest.mark.parametrize(
    "text", ["no", "on", "010", "12:30:00", "1e-6", "0x1F", "2024-01-01", "12345678", "true", "=", "0-3"]
)
def test_a_text_field_takes_what_is_written(text):
    assert build(f"name: {text}").config.name == text
    assert build("", f"name={text}").config.name == text
    assert build(f"words: [{text}]\nslots: {{policy: {text}}}").config.words == [text]


@pytest.mark.parametrize("text", ["null", "~", "None", ""])
def test_null_is_null_unless_quoted(text):
    assert build(f"tag: {text}\nlimit: {text}").config.tag is None
    assert build("", f"tag={text}").config.tag is None
    assert build(f"tag: '{text}'").config.tag == text
    assert "r.yaml:1: name: expected text, found null" in fault(f"name: {text}")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        ("-2", -2.0),
        ("+.5", 0.5),
        ("3.", 3.0),
        ("1_000.5", 1000.5),
        ("'0.1'", 0.1),
        ("0", 0.0),
    ],
)
def test_a_number_is_decimal(text, value):
    result = build(f"lr: {text}").config.lr
    assert (result, type(result)) == (value, float)
    assert build("", f"lr={text}").config.lr == value


@pytest.mark.parametrize(
    "text", ["010", "12:30:00", "no", "1e999", ".inf", ".nan", "nan", "0x10", "1__0", "'1 '", "[1]", "{a: 1}"]
)
def test_what_is_not_a_decimal_number_is_refused(text):
    for key, wanted, remedy in (
        ("lr", "a number", "such as 0.001 or 1e-3"),
        ("steps", "a whole number", "such as 1000"),
    ):
        said = fault(f"name: x\n{key}: {text}")
        assert f"r.yaml:2: {key}: expected {wanted}, found " in said
        assert "\n  remedy: write " in said and remedy in said
        assert f"command line: {key}: expected {wanted}, found " in fault("", f"{key}={text}")


@pytest.mark.parametrize("text", ["1e3", "1.0", "true", "9" * 5000])
def test_a_whole_number_has_neither_fraction_nor_exponent(text):
    assert f"r.yaml:1: steps: expected a whole number, found '{text}'" in fault(f"steps: {text}")
    assert build("steps: 1_000").config.steps == 1000


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("yes", True), ("off", False), ("NO", False)]
)
def test_a_switch_takes_the_words_of_yaml(text, value):
    assert build(f"verbose: {text}").config.verbose is value


@pytest.mark.parametrize("text", ["1", "0", "maybe", "null"])
def test_a_switch_takes_nothing_else(text):
    said = fault(f"verbose: {text}")
    assert "r.yaml:1: verbose: expected true or false, found " in said
    assert said.endswith("remedy: write true or false")


def test_values_without_a_type_are_read_as_plain_decimal_yaml():
    text = "init: {a: 3, b: 1e-6, c: true, d: null, e: word, f: [1, x, {g: 2.5}], h: '010', i: 2024-01-01, j: 'no'}"
    init = build(text, "init.k.l=4").config.init
    assert init == {
        "a": 3, "b": 1e-6, "c": True, "d": None, "e": "word", "f": [1, "x", {"g": 2.5}],
        "h": "010", "i": "2024-01-01", "j": "no", "k": {"l": 4},
    }  # fmt: skip


@pytest.mark.parametrize("text", ["no", "On", "010", "12:30:00", "0x10", ".nan"])
def test_values_without_a_type_must_not_be_ambiguous(text):
    said = fault(f"init:\n  a: 1\n  b: {text}")
    assert f"r.yaml:3: init.b: expected an unambiguous value, found '{text}'" in said
    assert "remedy: quote text; write true or false, or a decimal number" in said


def test_literals():
    assert build("mode: slow\nlevel: 2").config.level == 2
    assert fault("\nmode: slwo") == (
        "r.yaml:2: mode: expected one of fast, slow, found 'slwo'\n  remedy: choose one of fast, slow"
    )
    assert "command line: level: expected one of 1, 2, found '3'" in fault("", "level=3")


def test_lists_and_tuples():
    assert "r.yaml:1: words: expected a list, found 'a'\n  remedy: write a list such as [a, b]" in fault("words: a")
    assert "r.yaml:1: betas: expected a list of 2, found a list of 3" in fault("betas: [1, 2, 3]")
    assert "r.yaml:3: betas[1]: expected a number, found 'x'" in fault("betas:\n  - 0.9\n  - x")
    assert "r.yaml:1: ratios[0]: expected a whole number, found 'x'" in fault("ratios: [x]")
    assert "r.yaml:1: slots: expected a mapping, found a list of 1" in fault("slots: [a]")
    assert "r.yaml:1: slots.a: expected text, found a mapping" in fault("slots: {a: {b: 1}}")
    assert "command line: words: expected a list, found a mapping" in fault("", "words.0=x")


def test_a_list_and_a_mapping_do_not_merge():
    said = fault("init: {a: [1]}", "init.a.b=2")
    assert said.startswith("command line: init.a.b: not merged: ") and "give the whole value in one place" in said


def test_a_field_type_that_no_recipe_can_hold_is_an_error_of_the_schema():
    with pytest.raises(TypeError, match=r"where: a recipe cannot hold fields of type <class 'pathlib\.\w+'>"):
        build("where: x", schema=WithPath)


@dataclass(frozen=True)
class WithPath(Base):
    where: Path = MISSING


# Keys


def test_unknown_keys_are_all_reported_at_once():
    said = message("stesp: 3\nsampler:\n  top_k: 5\n  temprature: 0.5\ntop_k: 3\n", "nmae=x", "zzz=1")
    assert said == "\n".join(
        [
            "r.yaml: 5 faults",
            "r.yaml:1: stesp: unknown key (set to '3')",
            "  remedy: did you mean `steps`?",
            "r.yaml:4: sampler.temprature: unknown key (set to '0.5')",
            "  remedy: did you mean `sampler.temperature`?",
            "r.yaml:5: top_k: unknown key (set to '3')",
            "  remedy: did you mean `sampler.top_k`?",
            "command line: nmae: unknown key (set to 'x')",
            "  remedy: did you mean `name`?",
            "command line: zzz: unknown key (set to '1')",
            "  remedy: keys here: name, sampler, steps, lr, mode, level, verbose, tag, limit, betas, ratios, words, "
            "slots, init, copy",
        ]
    )


def test_faults_of_several_kinds_come_in_one_message():
    said = fault("steps: x\nnmae: y", "lr=z")
    assert said.startswith("r.yaml: 3 faults\n")
    assert "r.yaml:1: steps:" in said and "r.yaml:2: nmae:" in said and "command line: lr:" in said


def test_duplicate_keys_name_both_lines():
    said = fault("steps: 3\nlr: 1\nsteps: 4")
    assert said == "r.yaml:3: steps: given twice, first at r.yaml:1\n  remedy: keep one of the two"
    assert "r.yaml:3: init.a: given twice, first at r.yaml:2" in fault("init:\n  a: 1\n  a: 1")
    assert "command line: slots.a: given twice" in fault("", "slots={a: 1, a: 2}")


@pytest.mark.parametrize("key", ["sampler.temperature", "a b", "<<", "[a]", "''", "${name}"])
def test_a_key_is_one_word(key):
    said = fault(f"lr: 1\n? {key}\n: 1")
    assert said.startswith("r.yaml:2: ") and "is not a key" in said and "nest a section" in said


def test_a_section_must_be_a_mapping():
    said = message("name: x\nsampler: 3")
    assert said == "r.yaml:2: sampler: expected a section, found '3'\n  remedy: give it keys: temperature, top_k"
    assert "r.yaml:1: sampler: expected a section, found null" in message("sampler:\nname: x")
    assert "r.yaml:2: sampler: expected a section, found a list of 1" in message("name: x\nsampler:\n  - a")
    assert "found '${name}'" in message("sampler: ${name}")


def test_missing_values_are_all_reported():
    said = message("sampler: {temperature: 0.5}")
    assert said == (
        "r.yaml:1: sampler.top_k: has no value\n"
        "  remedy: give it in the recipe, or as sampler.top_k=VALUE on the command line"
    )
    assert message("name: x").startswith("r.yaml: sampler.top_k: has no value")
    assert message("name: x", "sampler.temperature=1").startswith("r.yaml: sampler.top_k: has no value")
    assert "r.yaml:2: slots.a: has no value" in fault("slots:\n  a: ???")
    RECIPE.write_text("algorithm: x")
    with pytest.raises(ConfigError) as caught:
        load.build_config(RecipeConfig, RECIPE)
    assert all(f"r.yaml: {key}: has no value" in str(caught.value) for key in ("run.dir", "run.steps", "data.path"))


# Values out of range


def test_a_check_of_a_section_becomes_a_message():
    assert fault("", "sampler.temperature=-1") == (
        "command line: sampler: temperature must not be negative\n"
        "  remedy: change sampler.temperature = -1.0 (command line)"
    )


def test_a_check_across_sections_names_every_value():
    assert message("steps: 3\nsampler:\n  top_k: 5") == (
        "r.yaml:3: steps must not be below sampler.top_k\n"
        "  remedy: change sampler.top_k = 5 (r.yaml:3) or steps = 3 (r.yaml:1)"
    )


def test_a_check_that_names_no_field_names_its_section():
    RECIPE.write_text("inner: {}")
    with pytest.raises(ConfigError, match=r"^r\.yaml: inner: no\n  remedy: change inner$"):
        load.build_config(Stubborn, RECIPE)


@dataclass(frozen=True)
class Never:
    def __post_init__(self) -> None:
        raise ValueError("no")


@dataclass(frozen=True)
class Stubborn:
    inner: Never = field(default_factory=Never)


# References


def test_references_are_followed():
    text = "name: a\ntag: x-${name}\nsteps: 8\nratios: ['${steps}']"
    loaded = build(f"{text}\ninit: {{b: ['${{lr}}', {{c: 1}}], d: {{e: '${{..f}}'}}, f: 7}}")
    assert (loaded.config.copy, loaded.config.tag, loaded.config.ratios) == ("a", "x-a", (8,))
    assert loaded.config.init == {"b": [1e-6, {"c": 1}], "d": {"e": 7}, "f": 7}
    assert loaded.origin["copy"] == "default"
    assert build("limit: ${steps}").config.limit == 10.0
    assert build("tag: ${steps}").config.tag == "10"


def test_a_reference_to_a_mapping_brings_its_entries():
    loaded = build("init: {a: {x: 1, y: [2]}, b: {x: 0, z: 3}}", "init.b=${init.a}")
    assert loaded.config.init["b"] == {"x": 1, "y": [2]}
    assert loaded.origin["init.b.x"] == loaded.origin["init.b.y"] == "command line"
    assert "z" not in loaded.config.init["b"]


def test_a_reference_to_nothing():
    said = fault("tag: ${nmae}")
    assert said.startswith("r.yaml:1: tag: '${nmae}': Interpolation key 'nmae' not found")
    assert said.endswith("remedy: did you mean ${name}?")
    assert "refer to a key of the recipe, as ${policy.path}" in fault("tag: ${zzzzzz}")
    assert "command line: words: ['a', '${zzz}']: Interpolation key" in fault("", "words=[a, '${zzz}']")


def test_a_reference_in_a_circle():
    said = fault("tag: ${copy}\ncopy: ${tag}")
    assert "r.yaml:1: tag: '${copy}': Recursive interpolation detected" in said
    assert "r.yaml:2: copy: '${tag}': Recursive interpolation detected" in said


def test_a_reference_to_a_value_of_another_type():
    said = fault("name: word\nsteps: ${name}")
    assert said.startswith("r.yaml:2: steps: expected a whole number, found 'word'")
    assert "r.yaml:1: name: expected text, found a list of 0" in fault("name: ${words}")


def test_a_reference_to_a_missing_value_is_reported_where_it_is_missing():
    said = message("tag: ${sampler.top_k}")
    assert said.startswith("r.yaml: sampler.top_k: has no value") and "tag" not in said


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:SECRET}", "${oc.env:SECRET,x}", "${env:SECRET}", "${oc.decode:'1'}", "${eval:1}",
        "a ${ oc.env:SECRET }", "${name}${oc.env:SECRET}", "${oc.env:${name}}", "${${name}}", "${oc.select:name}",
        "\\${oc.env:SECRET}", "\\${name}", "${", "${}", "${name", "${name }", "${.}", "${init[a]}",
        "$${oc.env:SECRET}", "\\???",
    ],
)  # fmt: skip
def test_a_resolver_is_refused_everywhere(text, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    quoted = "'" + text.replace("'", "''") + "'"
    scalars = ["name", "lr", "verbose", "slots.a", "init.a.b", "mode"]
    said = fault("", *[f"{key}={quoted}" for key in scalars], f"words=[{quoted}]", f"betas=[0, {quoted}]")
    for key in [*scalars, "words[0]", "betas[1]"]:
        assert f"command line: {key}: {text!r} holds more than references to keys" in said
    assert said.count("a recipe reads no environment variables") == 8 and "hunter2" not in said


def test_a_refused_resolver_names_its_line():
    said = fault("lr: 1\ninit:\n  a:\n    - ${oc.env:HOME}")
    assert said.startswith("r.yaml:4: init.a[0]: '${oc.env:HOME}' holds more than references to keys\n  remedy: ")


def test_a_resolver_put_together_from_parts_is_refused():
    said = fault("init: {a: $, b: '{oc.env:HOME}'}\ntag: ${init.a}${init.b}")
    assert said.startswith("r.yaml:2: tag: '${init.a}${init.b}' becomes '${oc.env:HOME}'\n  remedy: ")
    assert "r.yaml:2: tag: '${init.a}?': Interpolation resolved to a" in fault("init: {a: '??'}\ntag: '${init.a}?'")


def test_a_resolver_in_a_default_is_refused():
    RECIPE.write_text("{}")
    with pytest.raises(ConfigError, match=r"^default: token: '\$\{oc\.env:HOME\}' holds more than references"):
        load.build_config(Leaky, RECIPE)


@dataclass(frozen=True)
class Leaky:
    token: str = "${oc.env:HOME}"


# The file


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n"])
def test_an_empty_file(text):
    assert message(text) == "r.yaml: the file is empty\n  remedy: begin with `algorithm: NAME`"


@pytest.mark.parametrize(("text", "found"), [("\n- a\n- b", "a list of 2"), ("\nword", "'word'")])
def test_a_file_that_is_no_mapping(text, found):
    said = message(text)
    assert said == f"r.yaml:2: expected lines of `key: value`, found {found}\n  remedy: begin with `algorithm: NAME`"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: !!python/object/apply:os.system [true]", "tag tag:yaml.org,2002:python/object/apply:os.system"),
        ("name: !!str 3", "tag tag:yaml.org,2002:str"),
        ("name: ! x", "tag !"),
        ("init: {a: &x [1], b: *x}", "alias *x"),
        ("init: &x {a: *x}", "alias *x"),
        ("name: [a", "expected ',' or ']'"),
        ("name: a: b", "mapping values are not allowed here"),
        ("\tname: a", "found character '\\t' that cannot start any token"),
        ("name: @a", "found character '@' that cannot start any token"),
        ("name: \x07", "character U+0007"),
        ("name: a\n---\nname: b", "but found another document"),
        ("init: {a: " + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
    ],
)
def test_yaml_that_is_not_plain(text, problem):
    said = message("lr: 1\n" + text)
    assert said.startswith(("r.yaml:2: not readable: ", "r.yaml:3: not readable: ")) and problem in said
    assert "remedy: write plain YAML" in said


def test_an_alias_bomb_is_refused_at_the_first_alias():
    levels = "\n".join(f"  l{i + 1}: [{', '.join([f'*a{i}'] * 10)}]" for i in range(9))
    assert "r.yaml:3: not readable: alias *a0" in message(f"init:\n  l0: &a0 [x]\n{levels}")


def test_a_file_that_is_not_utf8():
    RECIPE.write_bytes(b"lr: 1\nname: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"^r\.yaml:2: not UTF-8\n  remedy: save the file as UTF-8$"):
        load.build_config(Toy, RECIPE)


def test_a_byte_order_mark_and_windows_line_ends_are_read():
    RECIPE.write_bytes(b"\xef\xbb\xbfname: a\r\nsampler: {top_k: 1}\r\nstepz: 3\r\n")
    with pytest.raises(ConfigError, match=r"^r\.yaml:3: stepz: unknown key"):
        load.build_config(Toy, RECIPE)


def test_a_file_that_cannot_be_read():
    with pytest.raises(ConfigError, match=r"^none\.yaml: No such file or directory\n  remedy: name a recipe"):
        load.build_config(Toy, Path("none.yaml"))
    with pytest.raises(ConfigError, match=r"^\.: Is a directory"):
        load.build_config(Toy, Path("."))


# The command line


@pytest.mark.parametrize("text", ["steps", "=3", "sampler..top_k=3", "--steps=3", "steps =3", ".steps=3", "", "a[0]=1"])
def test_a_malformed_override(text):
    assert fault("", text) == (
        f"command line: {text!r} is not key=value\n"
        "  remedy: write key=value without spaces around `=`, as in run.steps=100"
    )


def test_an_override_that_is_not_yaml():
    assert fault("", "words=[a").startswith("command line: 'words=[a': not readable: expected ',' or ']'")
    assert "not readable: tag tag:yaml.org,2002:python/name:os.system" in fault("", "name=!!python/name:os.system ''")
    assert "not readable: alias *x" in fault("", "words=[&x a, *x]")


def test_an_override_may_hold_an_equals_sign_but_no_comment():
    assert build("", "name=a=b").config.name == "a=b"
    assert build("", "name='a #b'").config.name == "a #b"
    assert build("", "name=a#b").config.name == "a#b"
    for text in ("name=a #b", "name=#b"):
        said = fault("", text)
        assert f"command line: {text!r} holds a comment, which would be lost" in said and "quote the value" in said


def test_an_override_of_a_whole_section():
    assert build("", "sampler={temperature: 0.5}").config.sampler == Sampler(temperature=0.5, top_k=5)
    assert "command line: sampler: expected a section, found '1'" in fault("", "sampler=1")


# Writing, listing and describing


def test_a_dump_loads_to_an_equal_config():
    words = [
        "no",
        "010",
        "null",
        "None",
        "1e-6",
        "12:30:00",
        "",
        " x ",
        "a: b",
        "#",
        "é\u2028",
        "a\nb\n",
        "=",
        "<<",
        "2024-01-01",
    ]
    quoted = ", ".join(f'"{word}"'.replace("\n", "\\n") for word in words)
    text = f"name: a\nwords: [{quoted}]\ninit: {{w: [{quoted}], x: {{y: 1e-7, z: [true, null, 2]}}}}"
    loaded = build(text, "init.again=${init.x}", "betas=[0.1, 0.2]", "slots={b: 1, a: 2}")
    assert loaded.config.words == loaded.config.init["w"] == words
    load.write_config(loaded.config, Path("resolved.yaml"))
    again = load.build_config(Toy, Path("resolved.yaml"))
    assert again.config == loaded.config and repr(again.config) == repr(loaded.config)
    assert "default" not in again.origin.values()


def test_a_dump_keeps_the_order_of_the_fields():
    load.write_config(build("steps: 7\nname: a\nslots: {b: 1, a: 2}").config, Path("resolved.yaml"))
    lines = Path("resolved.yaml").read_text().splitlines()
    assert lines[:4] == ["name: a", "sampler:", "  temperature: 1.0", "  top_k: 5"]
    assert lines[4:6] == ["steps: 7", "lr: 1.0e-06"]
    assert lines.index("  b: '1'") + 1 == lines.index("  a: '2'")
    assert lines[-1] == "copy: a"


def test_flatten_and_show():
    loaded = build("slots: {policy: 0}\nwords: [a]")
    flat = load.flatten_config(loaded.config)
    assert flat["sampler.top_k"] == 5 and flat["slots.policy"] == "0" and flat["words"] == ["a"] and flat["init"] == {}
    assert list(flat)[:4] == ["name", "sampler.temperature", "sampler.top_k", "steps"]
    assert load.list_values(loaded)[:3] == [
        ("name", "toy", "default"),
        ("sampler.temperature", 1.0, "default"),
        ("sampler.top_k", 5, "r.yaml:3"),
    ]


def test_describe_reads_the_text_after_each_field():
    docs = load.describe_schema(Toy)
    assert docs["name"] == "Inherited."
    assert docs["sampler"] == "How responses are drawn."
    assert docs["sampler.temperature"] == "Divides the logits; 0 is greedy."
    assert docs["verbose"] == "Says more." and docs["steps"] == ""


# The shared sections and the choice of an algorithm


def test_every_field_of_the_shared_sections_is_described():
    for schema in (RecipeConfig, PolicyConfig, RewardConfig, TrainedRewardConfig, SamplingConfig):
        assert [key for key, doc in load.describe_schema(schema).items() if not doc] == []


ALGORITHM = '''
from dataclasses import dataclass, field
from align.config import PolicyConfig, RecipeConfig, ReferenceConfig

@dataclass(frozen=True)
class Config(RecipeConfig):
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The actor."""
    reference: ReferenceConfig = field(
        default_factory=lambda: ReferenceConfig(path="${policy.path}", init="${policy.init}")
    )
    """Its frozen copy."""
'''
GIVEN = """\
algorithm: fake_rl
run: {dir: runs/x, steps: 3}
data: {path: nvidia/HelpSteer3}
placement: {policy: 0-1, reference: 2}
policy:
  path: m
  init: {model_type: llama, rope_theta: 1e4}
  optimizer: {lr: 1e-6}
"""


@pytest.fixture
def _algorithms(tmp_path, monkeypatch):
    """Puts two modules beside the algorithms of the package for one test."""
    package = tmp_path / "algorithms"
    package.mkdir()
    (package / "fake_rl.py").write_text(ALGORITHM)
    (package / "fake_ft.py").write_text(ALGORITHM)
    (package / "_private.py").write_text("raise SystemExit('imported')")
    (package / "not-a-name.py").write_text("raise SystemExit('imported')")
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(load, "ALGORITHMS", "algorithms")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "algorithms"]:
        del sys.modules[name]


@pytest.mark.usefixtures("_algorithms")
def test_load_takes_the_schema_from_the_algorithm():
    RECIPE.write_text(GIVEN)
    loaded = load.load_recipe(RECIPE, ["policy.lora.rank=8"])
    assert type(loaded.config).__module__ == "algorithms.fake_rl"
    assert loaded.config.placement == {"policy": "0-1", "reference": "2"}
    assert loaded.config.reference.path == "m" and loaded.config.policy.lora.rank == 8
    assert loaded.config.reference.init == {"model_type": "llama", "rope_theta": 1e4}
    assert loaded.config.policy.optimizer.betas == (0.9, 0.98)
    assert type(load.load_recipe(RECIPE, ["algorithm=fake_ft"]).config).__module__ == "algorithms.fake_ft"
    load.write_config(loaded.config, Path("resolved.yaml"))
    assert load.load_recipe(Path("resolved.yaml")).config == loaded.config


@pytest.mark.usefixtures("_algorithms")
@pytest.mark.parametrize(
    "name", ["fake_lr", "zzz", "_private", "not-a-name", "os.path", "[fake_rl]", "${run.dir}", "__init__"]
)
def test_an_unknown_algorithm_is_never_imported(name):
    RECIPE.write_text(f"run: {{}}\nalgorithm: {name}\n")
    with pytest.raises(ConfigError) as caught:
        load.load_recipe(RECIPE)
    said = str(caught.value)
    assert said.startswith("r.yaml:2: algorithm: ") and "is not an algorithm" in said
    assert said.endswith("available: fake_ft, fake_rl")
    assert ("did you mean `fake_rl`?; available" in said) == (name == "fake_lr")
    RECIPE.write_text(GIVEN)
    with pytest.raises(ConfigError, match="^command line: algorithm: .* is not an algorithm"):
        load.load_recipe(RECIPE, [f"algorithm={name}"])


@pytest.mark.usefixtures("_algorithms")
def test_a_recipe_without_an_algorithm():
    RECIPE.write_text("run: {steps: 1}")
    with pytest.raises(ConfigError) as caught:
        load.load_recipe(RECIPE)
    assert str(caught.value) == ("r.yaml: algorithm: has no value\n  remedy: name one; available: fake_ft, fake_rl")


def test_nothing_heavy_is_imported():
    heavy = "torch ray transformers deepspeed datasets peft"
    code = f"import sys, align.config.load; print(*sys.modules.keys() & set('{heavy}'.split()))"
    root = Path(load.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("recipe", "key", "meant"),
    [
        ("rloo", "learning_rate", "policy.optimizer.lr"),
        ("reward_model", "learning_rate", "reward.optimizer.lr"),
        ("ppo", "critic.learning_rate", "critic.optimizer.lr"),
        ("rloo", "policy.lora.r", "policy.lora.rank"),
        ("rloo", "lora_alpha", "policy.lora.alpha"),
        ("rloo", "target_modules", "policy.lora.targets"),
        ("rloo", "beta", "kl_coef"),
        ("dpo", "beta", "loss.beta"),
        ("rloo", "kl_penalty", "kl_estimator"),
        ("rloo", "num_generations", "sampling.num_samples"),
        ("rloo", "max_completion_length", "sampling.max_tokens"),
        ("rloo", "per_device_train_batch_size", "prompts_per_step"),
        ("reward_model", "per_device_train_batch_size", "batch_size"),
        ("rloo", "gradient_accumulation_steps", "max_tokens_per_micro_batch"),
        ("rloo", "num_train_epochs", "run.epochs"),
        ("rloo", "max_steps", "run.steps"),
        ("rloo", "max_length", "data.max_response_tokens"),
        ("rloo", "output_dir", "run.dir"),
        ("rloo", "model_name_or_path", "policy.path"),
        ("reward_model", "model_name_or_path", "reward.path"),
        ("rloo", "dataset_name", "data.path"),
    ],
)
def test_keys_of_other_libraries_get_the_key_that_is_meant(recipe: str, key: str, meant: str):
    path = Path(__file__).parents[2] / "recipes" / "quickstart" / f"{recipe}.yaml"
    with pytest.raises(ConfigError) as caught:
        load.load_recipe(path, [f"{key}=1"])
    assert f"{key}: unknown key" in str(caught.value) and f"`{meant}`" in str(caught.value).partition("remedy")[2]


@pytest.mark.parametrize("words", [["--run.steps", "2"], ["--run.steps=2"], ["-run.steps=2"]])
def test_keys_are_written_without_dashes(words: list[str], capsys):
    assert cli.main(["show", "recipes/none.yaml", *words]) == 78
    assert "remedy: write run.steps=" in capsys.readouterr().err
