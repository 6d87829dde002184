"""Everything that computes with tensors, on a pretended GPU: no mixed devices, the CPU's numbers, few waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.utils.backend_registration

if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch cannot register a backend written in Python", allow_module_level=True)

HERE = Path(__file__).parent

MAX_SYNCS_IN_16_TOKENS = 3
MAX_KERNELS_PER_LAYER = 36
"""Kernels of one layer for one decoded token, attention being one of them."""
MAX_OTHER_KERNELS = 82
"""Kernels of one decoded token outside of the layers."""

CASES = {
    "heads": ("token_logprobs ", "last_token_", "token_values ", "row_zero_logit ", "logit_difference "),
    "policy losses": ("policy loss ",),
    "preference losses": ("preference loss ",),
    "critic": ("critic",),
    "adapters": ("lora", "merged weights"),
    "decoding": ("decoder", "generate_any"),
    "rewards": ("reward ",),
}
NUMBER_OF_CASES = {
    "heads": 17,
    "policy losses": 10,
    "preference losses": 11,
    "critic": 1,
    "adapters": 2,
    "decoding": 4,
    "rewards": 4,
}

MAX_TRAINING_KERNELS = {"forward": 1039, "both": 3188}
"""Kernels of 24 layers and a head over rows of any length: about two fifths of those over padded groups."""


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What `run_cases` prints, by case. Registering a backend changes torch for the whole process."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(HERE / "run_cases.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {line.pop("case"): line for line in lines}


@pytest.mark.parametrize("group", CASES)
def test_no_mixed_devices_and_the_numbers_of_the_cpu(results: dict[str, Any], group: str):
    cases = {name: result for name, result in results.items() if name.startswith(CASES[group])}
    assert len(cases) == NUMBER_OF_CASES[group]
    for name, result in cases.items():
        assert "error" not in result, f"{name}: {result['error']}"
        assert result["got"] == result["names"]
        wrong = {key: error for key, error in result["errors"].items() if not error <= 1e-6}
        assert not wrong, f"{name}: {wrong}"


def test_sampled_ids_are_those_of_the_cpu(results: dict[str, Any]):
    for name in ("decoder", "decoder greedy", "decoder filters", "generate_any"):
        assert results[name]["errors"]["ids"] == 0.0


def test_waits_and_kernels_of_a_decoded_token(results: dict[str, Any]):
    counts = results["counts"]
    assert counts["syncs_in_16_tokens"] <= MAX_SYNCS_IN_16_TOKENS
    assert counts["kernels_per_layer"] <= MAX_KERNELS_PER_LAYER
    assert counts["other_kernels_per_token"] <= MAX_OTHER_KERNELS


def test_kernels_of_a_training_pass(results: dict[str, Any]):
    ragged, in_groups = results["counts"]["training_ragged"], results["counts"]["training_in_groups"]
    for passes, most in MAX_TRAINING_KERNELS.items():
        assert ragged[passes] <= most < 0.5 * in_groups[passes]


def test_the_pretended_gpu_refuses_mixed_devices(results: dict[str, Any]):
    messages = [result["message"] for name, result in results.items() if name.startswith("mixed ")]
    assert len(messages) == 5
    assert all("Expected all tensors to be on the same device" in message for message in messages)
