"""A recipe whose parts a test may damage."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for secret_names

RECIPE = """
algorithm: rloo
run: {{dir: {run}, steps: 1, seed: 1, progress: none}}
data: {{path: {data}}}
executor: local
prompts_per_step: 2
sampling: {{num_samples: 2, max_tokens: 4}}
truncated: keep
policy: {{path: {policy}, dtype: float32, zero_stage: 0, optimizer: {{lr: 1e-3}}}}
reference: {{dtype: float32}}
reward: {{path: {reward}, dtype: float32}}
placement: {{policy: 0, reference: 1, reward: 2}}
"""


@pytest.fixture
def recipe(tmp_path: Path, toy_data: Path, tiny_policy: Path, tiny_reward: Path) -> Path:
    """A recipe whose policy and reward model a test may damage."""
    policy, reward = (
        shutil.copytree(source, tmp_path / name) for name, source in (("policy", tiny_policy), ("reward", tiny_reward))
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(run=tmp_path / "run", data=toy_data, policy=policy, reward=reward))
    return path
