"""The pages say what the code is: generated keys, links, recipes, names of keys; modules have docstrings."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import itertools
import re
from functools import cache
from pathlib import Path

import pytest

from align import config, roles
from align.config import docs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
IMAGES = DOCS / "images"
"""The only folder that a link may point into before the file exists: figures are drawn from measurements."""
MODULES = sorted((ROOT / "align").rglob("*.py"))


def test_the_page_of_recipe_keys_is_fresh():
    fresh = (DOCS / "recipes.md").read_text() == docs.generate()
    assert fresh, "a docstring, type or default changed: run `python -m align.config.docs docs/recipes.md` (make docs)"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_has_a_docstring(path: Path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("name", docs.list_algorithms())
def test_an_algorithm_has_a_page_that_the_readme_links(name: str):
    assert (DOCS / "algorithms" / f"{name}.md").exists()
    assert f"(docs/algorithms/{name}.md)" in (ROOT / "README.md").read_text()


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_a_page_imports_what_exists(page: Path):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "align":
                exec(ast.unparse(node), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_source_files_that_a_page_names_exist(page: Path):
    names = re.findall(r"`((?:align|tests|benchmarks|launchers)/[\w/.-]+?)`", page.read_text())
    assert [name for name in names if not (ROOT / name).exists()] == []


def expand_braces(text: str) -> list[str]:
    """``a/{b,c}.yaml`` as a/b.yaml and a/c.yaml."""
    parts = [part.split(",") for part in re.split(r"[{}]", text)]
    return ["".join(choice) for choice in itertools.product(*parts)] if "{" in text else [text]


def test_every_recipe_is_named_in_a_table():
    rows = [line for page in PAGES for line in page.read_text().splitlines() if line.startswith("|")]
    spans = {name for row in rows for span in re.findall(r"`([^`]+\.yaml)`", row) for name in expand_braces(span)}
    named = {name.removeprefix("recipes/") for name in spans}
    recipes = {str(path.relative_to(ROOT / "recipes")) for path in (ROOT / "recipes").rglob("*.yaml")}
    assert recipes <= named, recipes - named
    assert {name for name in named if "/" in name and "*" not in name} <= recipes


@cache
def recipe_keys() -> set[str]:
    """Every dotted key of every schema, those of each kind of a section included."""
    schemas = [*docs.list_algorithms().values(), *(getattr(config, name) for name, _ in docs.COMMANDS.values())]
    sections = docs.list_keys(schemas)
    keys = {field.name for schema in schemas for field in dataclasses.fields(schema)}
    for schema, prefixes in sections.items():
        keys |= {f"{prefix}.{field.name}" for prefix in prefixes for field in dataclasses.fields(schema)}
    return keys


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_names_a_key_that_no_schema_has(page: Path):
    top = {key for key in recipe_keys() if "." not in key}
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        key = re.match(r"^([a-z_]\w*(?:\.[a-z_]\w*)+)(?=$|[=:])", span)
        if key is None or key[1].split(".")[0] not in top:
            continue
        open_ended = any(
            key[1].startswith(f"{name}.") for name in recipe_keys() if name.endswith(("placement", "init"))
        )
        assert key[1] in recipe_keys() or open_ended or is_code(key[1]), f"{span}: no recipe has the key {key[1]}"
