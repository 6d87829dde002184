"""Every shipped recipe parses, names an algorithm and has a possible placement; every field of a schema is read."""

import ast
import dataclasses
import functools
import importlib
import pkgutil
import re
from pathlib import Path
from typing import get_args

import pytest

from align import algorithms, cli
from align import config as sections
from align.cluster.roles import ROLES
from align.config.eval import BenchmarkName
from align.config.eval_policy import PolicyBenchmarkName
from align.config.load import (
    LoadedConfig,
    build_config,
    describe_schema,
    flatten_config,
    list_values,
    load_any,
    load_recipe,
    write_config,
)
from align.errors import ConfigError
from align.eval.arguments import SPEAKERS
from align.prechecks import placement
from align.prechecks.roles import check_roles, role_configs

ROOT = Path(__file__).parents[1]
JUDGED = [
    ROOT / "recipes" / "evaluation" / f"{name}.yaml" for name in (*get_args(PolicyBenchmarkName), "arena-hard-v2")
]
EVALUATIONS = sorted({*(ROOT / "recipes" / "evaluation").glob("*.yaml")} - {*JUDGED})
SERVICES = sorted((ROOT / "recipes" / "service").glob("*.yaml"))
SCALES = sorted((ROOT / "recipes" / "scale").glob("*.yaml"))
RECIPES = sorted({*(ROOT / "recipes").rglob("*.yaml")} - {*EVALUATIONS} - {*JUDGED} - {*SERVICES} - {*SCALES})
SOURCE = {path: path.read_text() for path in (ROOT / "align").rglob("*.py")}


def load(path: Path) -> LoadedConfig:
    """The recipe, with a value for what it leaves to the command line."""
    folders = sorted(set(re.findall(r"([\w.]+)=FOLDER", path.read_text())))
    return load_recipe(path, ["run.dir=runs/x", *[f"{key}=models/{key}" for key in folders]])


def test_flash_attention_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("align.config.precision.gpu_capability", lambda: None)
    loaded = load(next(path for path in RECIPES if path.parent.name == "rloo"))
    flash = dataclasses.replace(
        loaded.config, policy=dataclasses.replace(loaded.config.policy, attention="flash_attention_2")
    )
    with pytest.raises(ConfigError, match=r"policy.attention=flash_attention_2 requires a GPU.*\n.*attention=auto"):
        check_roles(flash)
    cluster = dataclasses.replace(flash.cluster, address="10.0.0.1:6379")
    check_roles(dataclasses.replace(flash, executor="ray", cluster=cluster))  # whose machines may have some


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_is_complete(path: Path, tmp_path: Path):
    loaded = load(path)
    slots = check_roles(loaded.config)
    assert set(slots) == set(role_configs(loaded.config))
    assert all(set(type(section).__mro__) & ROLES.keys() for section in role_configs(loaded.config).values())
    write_config(loaded.config, tmp_path / "config.yaml")
    assert load_recipe(tmp_path / "config.yaml").config == loaded.config


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_evaluation_is_complete(path: Path, tmp_path: Path):
    found = build_config(sections.RewardEvaluationConfig, path).config
    assert found.benchmark == path.stem
    assert placement.resolve(found.placement, ["reward"])["reward"] == tuple(range(8))
    write_config(found, tmp_path / "config.yaml")
    assert build_config(sections.RewardEvaluationConfig, tmp_path / "config.yaml").config == found


@pytest.mark.parametrize("path", JUDGED, ids=lambda path: path.stem)
def test_judged_evaluation_is_complete(path: Path, tmp_path: Path):
    """With what its head gives on the command line."""
    folders = dict(re.findall(r"^#.*?([\w.]+)=(F\w+)", path.read_text(), flags=re.M))
    given = [f"{key}={value}" for key, value in folders.items()]
    given += re.findall(r"(?:baseline_answers\.\w+|(?:policy|baseline)\.path)=F\S+", path.read_text())
    found = build_config(sections.PolicyEvaluationConfig, path, given).config
    assert path.stem.startswith(found.benchmark)
    placement.resolve(found.placement, SPEAKERS.values())
    write_config(found, tmp_path / "config.yaml")
    assert build_config(sections.PolicyEvaluationConfig, tmp_path / "config.yaml").config == found


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.stem)
def test_service_is_complete(path: Path, tmp_path: Path):
    found = build_config(sections.RewardServiceConfig, path, ["reward.path=FOLDER"]).config
    write_config(found, tmp_path / "config.yaml")
    assert build_config(sections.RewardServiceConfig, tmp_path / "config.yaml").config == found


@pytest.mark.parametrize("path", SCALES, ids=lambda path: path.stem)
def test_scaling_is_complete(path: Path, tmp_path: Path):
    found = build_config(sections.ScaleConfig, path).config
    roles = ("policy", "feedback", "edit", "select")
    assert set(placement.resolve(found.placement, roles)) == set(roles)
    write_config(found, tmp_path / "config.yaml")
    assert build_config(sections.ScaleConfig, tmp_path / "config.yaml").config == found


def test_scaling_with_a_server_as_its_recipe_says():
    path = ROOT / "recipes" / "scale" / "llama3.3-70b.yaml"
    (words,) = re.findall(r"^#   (policy\.kind=.*)$", path.read_text(), flags=re.M)
    for name in ("policy", "feedback", "edit"):
        found = build_config(sections.ScaleConfig, path, words.replace("policy.", f"{name}.").split()).config
        assert getattr(found, name).kind == "endpoint"


def test_shipped_recipes_are_there():
    assert {path.stem for path in EVALUATIONS} == set(get_args(BenchmarkName))
    names = {str(path.relative_to(ROOT / "recipes")) for path in RECIPES}
    assert names >= {
        "quickstart/sft.yaml",
        "quickstart/reward_model.yaml",
        "quickstart/rloo.yaml",
        "reward_model/llama3.3-70b-helpsteer3.yaml",
        "rloo/llama3.3-70b-helpsteer3.yaml",
        "rloo/qwen2.5-0.5b-helpsteer3.yaml",
    }


ALGORITHMS = sorted(module.name for module in pkgutil.iter_modules(algorithms.__path__) if module.name[0] != "_")


def _sections() -> list[type]:
    found = [value for value in vars(sections).values() if isinstance(value, type) and dataclasses.is_dataclass(value)]
    return [*found, *(importlib.import_module(f"align.algorithms.{name}").Config for name in ALGORITHMS)]


@functools.cache
def _attributes_read() -> set[str]:
    """Names read as attributes anywhere but in the range checks of the schemas themselves."""
    read = set()
    for text in SOURCE.values():
        tree = ast.parse(text)
        checks = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in ("__post_init__", "notes")]
        skipped = {node for check in checks for node in ast.walk(check)}
        read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n not in skipped}
    return read


@pytest.mark.parametrize("schema", _sections(), ids=lambda schema: f"{schema.__module__}.{schema.__name__}")
def test_every_field_is_read_and_described(schema: type):
    read, described = _attributes_read(), describe_schema(schema)
    for field in dataclasses.fields(schema):
        assert field.name in read, f"{schema.__name__}.{field.name} is read nowhere"
        assert described[field.name], f"{schema.__name__}.{field.name} has no docstring"


def test_kl_coefficient_is_shown_in_the_other_unit():
    loaded = load_recipe(ROOT / "recipes/quickstart/rloo.yaml")
    assert loaded.config.notes() == [
        "kl_coef 0.1 on the sum over tokens equals 3.2 on the mean for a response of 32 tokens (sampling.max_tokens)"
    ]


@pytest.mark.parametrize("path", [*RECIPES, *EVALUATIONS, *JUDGED, *SERVICES, *SCALES], ids=lambda path: path.stem)
def test_show_prints_what_differs_from_the_defaults(path: Path, capsys: pytest.CaptureFixture[str]):
    """Every file in recipes/, whatever command reads it; ``--all`` prints every key."""
    text = path.read_text()
    given = [f"{key}=models/{key}" for key in sorted(set(re.findall(r"([\w.]+)=FOLDER", text)))]
    given += [f"{key}={value}" for key, value in re.findall(r"^#.*?([\w.]+)=(FILE\w*)", text, flags=re.M)]
    given += re.findall(r"(?:baseline_answers\.\w+|(?:policy|baseline)\.path)=F\S+", text)
    loaded = load_any(path, given)
    assert cli.main(["show", str(path), *given]) == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:] if line.strip()]
    differing = [key for key, _, origin in list_values(loaded) if origin != "default" and key in loaded.changed]
    assert shown[: len(differing)] == differing
    assert cli.main(["show", str(path), *given, "--all"]) == 0
    printed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert flatten_config(loaded.config).keys() <= printed
    assert len(differing) < len(flatten_config(loaded.config))


@pytest.mark.parametrize(("algorithm", "limit"), [("rloo", 140), ("ppo", 170), ("dpo", 130)])
def test_a_recipe_has_few_keys(algorithm: str, limit: int):
    """Keys as ``align show --all`` prints them for the shipped quickstart. DPO's limit is ours."""
    assert len(flatten_config(load_recipe(ROOT / "recipes" / "quickstart" / f"{algorithm}.yaml").config)) <= limit
