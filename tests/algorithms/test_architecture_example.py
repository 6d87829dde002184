"""The algorithm that docs/architecture.md adds as an example, run as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from align import algorithms
from align.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"


@pytest.mark.slow
def test_the_example_trains(tmp_path: Path, toy_data: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch):
    ((name, source),) = re.findall(
        r"```python\n# align/algorithms/(sft_by_response)\.py\n(.*?)```", PAGE.read_text(), re.DOTALL
    )
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(algorithms, "__path__", [*algorithms.__path__, str(tmp_path)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"algorithm: {name}\nrun: {{dir: {tmp_path}/run, steps: 20}}\ndata: {{path: {toy_data}}}\n"
        f"batch_size: 16\nexecutor: local\npolicy: {{path: {tiny_policy}, dtype: float32, optimizer: {{lr: 1e-3}}}}\n"
    )
    assert main(["train", str(recipe)]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.1
