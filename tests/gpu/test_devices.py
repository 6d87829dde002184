"""Every tensor that `engines`, `models` and `ops` make is made on a named device, read from the source with `ast`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "align"
FACTORIES = frozenset(
    {"zeros", "ones", "empty", "full", "arange", "linspace", "logspace", "eye", "tensor", "as_tensor", "from_numpy"}
    | {"rand", "randn", "randint", "randperm", "normal", "empty_strided", "tril_indices", "triu_indices"}
)

HOST_SIDE = {
    "engines": {
        "SampledTokens.rollouts": "makes the record that travels",
        "Decoder._admitted": "plans the prompts to run",
        "Decoder._prefill": "plans the prompts to run, then moves the plan",
        "generate_any": "counts sequences",
        "_generate": "plans the prompts to run, then moves the plan",
        "<module>": "the input of an empty micro-batch",
        "Engine.infer": "collects outputs of all micro-batches",
        "Engine.update": "counts tokens, then moves the sums",
        "Engine._probe": "runs a loss without the model",
        "TrainingState.collect": "writes a checkpoint",
        "TrainingState.apply": "AdamW keeps its step count on the host",
        "random_state": "states of random number generators are bytes of the host",
    },
    "models": {
        "scorer": "draws or combines a head before the model is moved",
        "_other_forward": "runs a layer on the meta device",
        "probe": "makes input for the comparison of an export",
        "probe.random_ids": "makes input for the comparison of an export",
        "_logprobs": "compares an export on the host",
        "_values": "compares an export on the host",
        "_scores": "compares an export on the host",
    },
    "ops": {
        "_ngrams": "statistics of token ids, which travel on the host",
        "<module>": "constants",
    },
}
"""Functions that make tensors on the host, and why."""


def unplaced(source: str) -> Iterator[tuple[str, int, str]]:
    """Function, line and factory of every tensor that is made without ``device=``."""

    def visit(node: ast.AST, owners: tuple[str, ...]) -> Iterator[tuple[str, int, str]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            match child:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=factory), keywords=keywords):
                    if factory in FACTORIES and not any(keyword.arg == "device" for keyword in keywords):
                        yield ".".join(owners) or "<module>", child.lineno, factory
            yield from visit(child, (*owners, child.name) if named else owners)  # type: ignore[attr-defined]

    yield from visit(ast.parse(source), ())


@pytest.mark.parametrize("package", HOST_SIDE)
def test_tensors_are_made_on_a_named_device(package: str):
    missing = [
        f"{file.name}:{line} {function}: torch.{factory} without device="
        for file in sorted((PACKAGE / package).glob("*.py"))
        for function, line, factory in unplaced(file.read_text(encoding="utf-8"))
        if function not in HOST_SIDE[package]
    ]
    assert missing == []


def test_what_counts_as_unplaced():
    source = (
        "import torch\n"
        "A = torch.zeros(2)\n"
        "class C:\n"
        "    def f(self, x):\n"
        "        return torch.ones(2, device=x.device) + torch.arange(2) + torch.zeros_like(x)\n"
    )
    assert list(unplaced(source)) == [("<module>", 2, "zeros"), ("C.f", 5, "arange")]
