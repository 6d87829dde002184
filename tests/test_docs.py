"""The pages say what the code is: keys and defaults, links, recipes, the list of files."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import pkgutil
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import MISSING

from align import algorithms, roles
from align.config import (
    BenchmarkDataConfig,
    CheckpointConfig,
    ClusterConfig,
    CriticConfig,
    CriticFromRewardConfig,
    DataConfig,
    EditingConfig,
    EndpointConfig,
    EnsembleConfig,
    EvaluationConfig,
    GenerativeConfig,
    GeneratorConfig,
    HttpClientConfig,
    HttpConfig,
    JudgeSamplingConfig,
    LoraConfig,
    ModelConfig,
    OnPolicyConfig,
    OptimizerConfig,
    PolicyConfig,
    PolicyEvaluationConfig,
    PolicyGradientConfig,
    PolicyLossConfig,
    PreferenceLossConfig,
    PreviousPolicyConfig,
    QuestionDataConfig,
    RecipeConfig,
    ReferenceFromPolicyConfig,
    ReplicasConfig,
    RewardConfig,
    RewardEvaluationConfig,
    RewardServiceConfig,
    RewardShapingConfig,
    RunConfig,
    SamplerConfig,
    SamplingConfig,
    ScaleConfig,
    ScalePromptsConfig,
    SourceConfig,
    SteeringConfig,
    SweepConfig,
    TrainedModelConfig,
    TrainedRewardConfig,
    VerdictConfig,
)
from align.config.load import build_config, describe_schema, flatten_config
from align.config.yaml_reader import field_types, is_section

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
IMAGES = DOCS / "images"
"""The only folder that a link may point into before the file is there: figures are drawn from measurements."""

ALGORITHMS = {
    module.name: importlib.import_module(f"align.algorithms.{module.name}").Config
    for module in pkgutil.iter_modules(algorithms.__path__)
    if module.name[0] != "_"
}

HEADINGS = {
    RecipeConfig: "Every recipe",
    RunConfig: "`run`",
    CheckpointConfig: "`checkpoint`",
    DataConfig: "`data`",
    ClusterConfig: "`cluster`",
    OnPolicyConfig: "Recipes whose policy samples",
    SamplingConfig: "`sampling`",
    EvaluationConfig: "`evaluation`",
    PolicyGradientConfig: "Policy gradients",
    RewardShapingConfig: "`shaping`",
    PolicyLossConfig: "`loss` of a policy gradient",
    PreferenceLossConfig: "`loss` of preference pairs",
    ModelConfig: "Every role",
    TrainedModelConfig: "Every trained role",
    TrainedRewardConfig: "`reward` of `reward_model`",
    PolicyConfig: "`policy`",
    SamplerConfig: "`sampler`",
    ReferenceFromPolicyConfig: "`reference`",
    SteeringConfig: "`steering`",
    PreviousPolicyConfig: "`previous`",
    RewardConfig: "`reward`",
    HttpConfig: "`reward.http`",
    GenerativeConfig: "`reward.generative`",
    JudgeSamplingConfig: "`reward.generative.sampling`",
    EnsembleConfig: "`reward.ensemble`",
    SourceConfig: "One of `data.sources`",
    EditingConfig: "`editing`",
    VerdictConfig: "`verdict`",
    GeneratorConfig: "What answers: `judge`, `policy`, `feedback`, `edit`",
    EndpointConfig: "`endpoint`",
    CriticConfig: "`critic`",
    CriticFromRewardConfig: "Where a critic starts",
    OptimizerConfig: "`optimizer` of a trained role",
    LoraConfig: "`lora` of a trained role",
    **{schema: f"`algorithm: {name}`" for name, schema in ALGORITHMS.items()},
}
"""Under which heading of docs/recipes.md the own keys of a schema stand."""

SECTION, REQUIRED = "section", "**required**"
_HEADER = "| key | type | default | meaning |"
_ROW = re.compile(r"^\| `([\w.]+)` \| (.*?) \|(.*?)\| ")


@cache
def tables() -> dict[str, dict[str, str]]:
    """By heading: the default that each key's row shows; `SECTION` for a section."""
    found: dict[str, dict[str, str]] = {}
    heading, in_table = "", False
    for line in (DOCS / "recipes.md").read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        in_table = line == _HEADER or (in_table and line.startswith("|"))
        if in_table and (row := _ROW.match(line)):
            rows = found.setdefault(heading, {})
            assert row[1] not in rows, f"{heading}: {row[1]} stands there twice"
            rows[row[1]] = SECTION if row[2] == SECTION else row[3].strip()
    return found


def shown(value: object) -> str:
    """A default as the tables write it."""
    if value == MISSING:
        return REQUIRED
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return '`""`' if value == "" else f"`{value}`".replace("\n", "\\n")


def default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING if field.default is dataclasses.MISSING else field.default


def own_defaults(schema: type) -> dict[str, str]:
    """What a schema's own table must hold: the fields it declares, and values that it changes in a section's."""
    shared = [base for base in schema.__mro__ if base is HttpClientConfig]  # it has no table of its own
    own = {name for base in (schema, *shared) for name in vars(base).get("__annotations__", {})}
    hints, found = field_types(schema), {}
    for field in dataclasses.fields(schema):
        if field.name not in own:
            continue
        value = default(field)
        if not is_section(hints[field.name]):
            found[field.name] = shown(value)
            continue
        usual = {one.name: default(one) for one in dataclasses.fields(type(value))}
        changed = {f"{field.name}.{name}": shown(v) for name, v in vars(value).items() if v != usual[name]}
        found |= changed or {field.name: SECTION}
    return found


@pytest.mark.parametrize("schema", HEADINGS, ids=lambda schema: f"{schema.__module__}.{schema.__name__}")
def test_table_holds_the_keys_and_defaults_of_its_schema(schema: type):
    rows = tables()[HEADINGS[schema]]
    if schema in ALGORITHMS.values():  # beside a default that is changed, its section may have a row too
        rows = {key: cell for key, cell in rows.items() if cell != SECTION or key in own_defaults(schema)}
    assert rows == own_defaults(schema)


def documented(schema: type, key: str) -> str:
    """The default that the tables show for a dotted key of a schema, the nearest table first."""
    nearest = [tables().get(HEADINGS.get(base, ""), {}) for base in schema.__mro__]
    for rows in nearest:
        if key in rows:
            return rows[key]
    name, _, rest = key.partition(".")
    assert rest, f"{schema.__name__}.{key} stands in no table"
    fields = {field.name: field for field in dataclasses.fields(schema)}
    return documented(type(default(fields[name])), rest)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_key_of_an_algorithm_stands_there_with_the_default_that_loading_gives(name: str, tmp_path: Path):
    schema = ALGORITHMS[name]
    hints, cells = describe_schema(schema), {}
    for key in hints:
        parent = schema
        for part in key.split(".")[:-1]:
            parent = field_types(parent)[part]
        if not is_section(field_types(parent)[key.rpartition(".")[2]]):
            cells[key] = documented(schema, key)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}\n")
    needed = [key for key, cell in cells.items() if cell == REQUIRED]
    judged = (issubclass(schema, OnPolicyConfig) and name != "genrm") or name == "steerlm"
    needed += ["reward.path"] if judged else []  # some kinds of judges need none
    loaded = build_config(schema, recipe, [f"{key}=1" for key in needed])
    values = flatten_config(loaded.config)
    assert values.keys() == cells.keys()
    for key, value in values.items():
        if loaded.origin[key] != "default":
            continue
        followed = re.fullmatch(r"`\$\{([\w.]+)\}`", cells[key])
        automatic = cells[key] == "`auto`" and key in loaded.automatic
        assert automatic or cells[key] == shown(value) or (followed and values[followed[1]] == value), key


def test_the_page_of_the_service_holds_the_keys_and_defaults_of_its_schema():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \| .+ \|$", (DOCS / "reward_service.md").read_text(), flags=re.M))
    own = {key: cell for key, cell in own_defaults(RewardServiceConfig).items() if cell != SECTION}
    assert rows == own | {f"replicas.{key}": cell for key, cell in own_defaults(ReplicasConfig).items()}


def test_the_page_of_evaluations_holds_the_keys_and_defaults_of_its_schema():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \| .+ \|$", (DOCS / "evaluation.md").read_text(), flags=re.M))
    own = {key: cell for key, cell in own_defaults(RewardEvaluationConfig).items() if cell != SECTION}
    assert rows == own | {f"data.{key}": cell for key, cell in own_defaults(BenchmarkDataConfig).items()}


def test_the_page_of_judged_evaluations_holds_the_keys_and_defaults_of_its_schema():
    rows = dict(
        re.findall(r"^\| `([\w.]+)` \| (.*?) \| .+ \|$", (DOCS / "evaluation_policy.md").read_text(), flags=re.M)
    )
    own = {key: cell for key, cell in own_defaults(PolicyEvaluationConfig).items() if cell != SECTION}
    assert rows == own | {f"data.{key}": cell for key, cell in own_defaults(QuestionDataConfig).items()}


def test_the_page_of_scaling_holds_the_keys_and_defaults_of_its_schema():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \| .+ \|$", (DOCS / "scale.md").read_text(), flags=re.M))
    own = {key: cell for key, cell in own_defaults(ScaleConfig).items() if cell != SECTION}
    own |= {f"prompts.{key}": cell for key, cell in own_defaults(ScalePromptsConfig).items()}
    assert rows == own | {f"sweep.{key}": cell for key, cell in own_defaults(SweepConfig).items()}


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_to_files_and_headings(page: Path):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", prose(page)):
        if target.startswith(("http:", "https:")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists() or file.is_relative_to(IMAGES), f"{target} does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", prose(file), flags=re.M)), f"{target}#{anchor}"


def expanded(text: str) -> list[str]:
    """``a/{b,c}.yaml`` as a/b.yaml and a/c.yaml."""
    parts = [part.split(",") for part in re.split(r"[{}]", text)]
    return ["".join(choice) for choice in itertools.product(*parts)] if "{" in text else [text]


def test_every_recipe_is_named_in_a_table():
    rows = [line for page in PAGES for line in page.read_text().splitlines() if line.startswith("|")]
    spans = {name for row in rows for span in re.findall(r"`([^`]+\.yaml)`", row) for name in expanded(span)}
    named = {name.removeprefix("recipes/") for name in spans}
    there = {str(path.relative_to(ROOT / "recipes")) for path in (ROOT / "recipes").rglob("*.yaml")}
    assert there <= named, there - named
    assert {name for name in named if "/" in name and "*" not in name} <= there


def listed() -> list[str]:
    """Files and folders in the README's list."""
    block = (ROOT / "README.md").read_text().split("\n## Files\n", 1)[1].split("```")[1]
    return [line.split()[0] for line in block.splitlines() if line.strip()]


def test_the_readme_lists_every_file():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("which files belong to the project is known to git alone")
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True)
    folders = tuple(name for name in listed() if name.endswith("/"))
    missing = [
        name
        for name in done.stdout.splitlines()
        if name not in listed() and not name.startswith(folders) and (ROOT / name).exists()
    ]
    assert not missing
    assert len(listed()) == len(set(listed()))


def test_what_the_readme_lists_is_there():
    assert [name for name in listed() if not (ROOT / name).exists() and not (ROOT / name).is_relative_to(IMAGES)] == []


OTHERS = (ScaleConfig, PolicyEvaluationConfig, RewardEvaluationConfig, RewardServiceConfig)
"""Schemas of other commands than `align train`."""


@cache
def known_keys() -> set[str]:
    return {key for schema in (*ALGORITHMS.values(), *OTHERS) for key in describe_schema(schema)}


def is_code(name: str) -> bool:
    """A module of align, a name in one, a file, or a method of a role."""
    first, _, rest = name.partition(".")
    protocols = [value for value in vars(roles).values() if isinstance(value, type)]
    if any(hasattr(protocol, rest) for protocol in protocols):
        return True
    parts = name.split(".")
    module = any((ROOT / "align" / "/".join(parts[:n])).with_suffix(".py").exists() for n in range(1, len(parts) + 1))
    package = (ROOT / "align" / first).is_dir() and rest.split(".")[0] in vars(
        importlib.import_module(f"align.{first}")
    )
    return module or package or rest in ("json", "jsonl", "yaml", "md", "py")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_names_a_key_that_no_schema_has(page: Path):
    top = {key for key in known_keys() if "." not in key}
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        key = re.match(r"^([a-z_]\w*(?:\.[a-z_]\w*)+)(?=$|[=:])", span)
        if key is None or key[1].split(".")[0] not in top:
            continue
        open_ended = any(key[1].startswith(f"{name}.") for name in known_keys() if name.endswith(("placement", "init")))
        assert key[1] in known_keys() or open_ended or is_code(key[1]), f"{span}: no recipe has the key {key[1]}"
