"""Win rates at equal style: a logistic regression of verdicts on differences in length and markdown (Li et al. 2024,
Arena-Hard's style control).

For game i, with outcome y_i of the policy (1, 1/2, 0), weight w_i and style differences x_i:

    minimize  - sum_i w_i [ y_i log s(z_i) + (1 - y_i) log(1 - s(z_i)) ]  + RIDGE / 2 |(a, b)|^2,   z_i = a + x_i b

s(a) is the win rate against answers of the same style. Differences are divided by their standard deviation and not
centred. Arena-Hard centres them over the games of all models of its table; with the games of one policy that would put
a back to where this policy's own style is, and control nothing.

Style is length and, relative to it, headings, list items and bold text outside blocks of code. Arena-Hard counts
length in tokens of GPT-4o's tokenizer, we in characters, which are the same for all. Either enters as a ratio.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

FEATURES = ("length", "headings", "lists", "bold")
RIDGE = 0.01
"""Keeps coefficients finite where a policy wins every game, or style tells wins from losses. With 1000 games it moves a
win rate of 0.6 by less than 0.0001."""
LARGEST_STEP = 0.5
"""No step moves any z_i further: along it the curvature changes by a factor of at most e^(1/2) < 2, so that Newton's
step always descends."""
MOST_STEPS = 1000
ENOUGH = 1e-9
"""The step, in any z_i, below which the fit is done."""

_CODE = re.compile(r"```[^`]*```")
_MARKDOWN = (
    re.compile(r"^#{1,6}\s", re.MULTILINE),
    re.compile(r"^\s*(?:\d+\.|[-*+])\s", re.MULTILINE),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
)


def counts(text: str) -> tuple[int, ...]:
    """Characters, and headings, list items and bold passages outside blocks of code."""
    prose = _CODE.sub("", text)
    return len(text), *(len(pattern.findall(prose)) for pattern in _MARKDOWN)


def differences(answers: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Style of ``answers`` less that of ``others``, (Q, 4): of lengths (l - m) / (l + m), of densities d and e of
    markdown by length (d - e) / (d + e + 1), as in Arena-Hard."""
    ours, theirs = (
        np.array([counts(text) for text in texts], dtype=np.float64).reshape(-1, 4) for texts in (answers, others)
    )
    length, other = ours[:, :1], theirs[:, :1]
    density, density_there = ours[:, 1:] / length.clip(1), theirs[:, 1:] / other.clip(1)
    by_length = (length - other) / (length + other).clip(1)
    return np.concatenate([by_length, (density - density_there) / (density + density_there + 1)], axis=1)


def scaled(difference_QF: np.ndarray) -> np.ndarray:
    """Differences in units of their standard deviation; 0 where they are all alike, which tells nothing apart."""
    spread_F = difference_QF.std(axis=0)
    varies_F = spread_F > 1e-12
    return np.where(varies_F, difference_QF / np.where(varies_F, spread_F, 1.0), 0.0)


def fit(feature_GF: np.ndarray, outcome_G: np.ndarray, weight_RG: np.ndarray) -> np.ndarray:
    """The minimum above for each row of weights, (R, 1 + F): a, then b. By Newton's method, to rounding."""
    design_GC = np.concatenate([np.ones((len(feature_GF), 1)), feature_GF], axis=1)
    coefficient_RC = np.zeros((len(weight_RG), design_GC.shape[1]))
    ridge_CC = RIDGE * np.eye(design_GC.shape[1])
    outer_GCC = design_GC[:, :, None] * design_GC[:, None, :]
    for _ in range(MOST_STEPS):
        chance_RG = 1 / (1 + np.exp(-(coefficient_RC @ design_GC.T)))
        gradient_RC = (weight_RG * (chance_RG - outcome_G)) @ design_GC + RIDGE * coefficient_RC
        hessian_RCC = np.tensordot(weight_RG * chance_RG * (1 - chance_RG), outer_GCC, axes=1) + ridge_CC
        step_RC = np.linalg.solve(hessian_RCC, gradient_RC[:, :, None])[:, :, 0]
        furthest_R = np.abs(step_RC @ design_GC.T).max(axis=1, initial=0.0)
        coefficient_RC -= step_RC * (LARGEST_STEP / furthest_R.clip(LARGEST_STEP))[:, None]
        if furthest_R.max(initial=0.0) < ENOUGH:
            break
    return coefficient_RC
