"""Names say what they hold: no pronouns or participles, and each class name once."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "align"
TREES = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
REFUSED = {"one", "found", "said", "told", "asked", "wanted", "known", "seen"}
"""Name the noun in place of these: `section`, `member`, `rows`, `message`, `requests`."""


def stored(node: ast.AST) -> str:
    """The name that a node defines or assigns to, else an empty string."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
            return name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
    return ""


def test_no_name_is_a_pronoun_or_a_participle():
    nodes = [(path, node) for path, tree in TREES.items() for node in ast.walk(tree)]
    assert [f"{path}:{node.lineno} {stored(node)}" for path, node in nodes if stored(node) in REFUSED] == []  # type: ignore[attr-defined]


def test_a_class_name_is_defined_once():
    files = defaultdict(list)
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                files[node.name].append(str(path))
    assert {name: paths for name, paths in files.items() if len(paths) > 1 and name != "Config"} == {}
