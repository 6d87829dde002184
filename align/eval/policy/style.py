"""Win rates at equal style: a logistic regression of verdicts on differences in length and markdown (Li et al. 2024,
Arena-Hard's style control).

For game i, with outcome y_i of the policy (1, 1/2, 0), weight w_i and style differences x_i:

    minimize  - sum_i w_i [ y_i log s(z_i) + (1 - y_i) log(1 - s(z_i)) ]  + RIDGE / 2 |(a, b)|^2,   z_i = a + x_i b

s(a) is the win rate against answers of the same style. Differences are divided by their standard deviation, not
centered. Arena-Hard centers them over the games of all models of its table; with the games of one policy, centering
would move a back to the style of this policy and control nothing.

Style is length and, relative to it, headings, list items and bold text outside blocks of code. Arena-Hard counts
length in tokens of GPT-4o's tokenizer, we in characters, which are the same for all. Either enters as a ratio.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

FEATURES = ("length", "headings", "lists", "bold")
RIDGE = 0.01
"""L2 penalty. Keeps coefficients finite if a policy wins every game or style separates wins from losses. With 1000
games it moves a win rate of 0.6 by less than 0.0001."""
LARGEST_STEP = 0.5
"""Maximum change of any z_i in a step: within it the curvature changes by a factor of at most e^(1/2) < 2, so a Newton
step always descends."""
MOST_STEPS = 1000
ENOUGH = 1e-9
"""The fit has converged if no z_i changes by more than this in a step."""

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
    """Style of ``answers`` minus style of ``others``, (Q, 4): (l - m) / (l + m) for lengths, (d - e) / (d + e + 1) for
    markdown densities d and e by length, as in Arena-Hard."""
    ours, theirs = (
        np.array([counts(text) for text in texts], dtype=np.float64).reshape(-1, 4) for texts in (answers, others)
    )
    length, other = ours[:, :1], theirs[:, :1]
    density, density_there = ours[:, 1:] / length.clip(1), theirs[:, 1:] / other.clip(1)
    by_length = (length - other) / (length + other).clip(1)
    return np.concatenate([by_length, (density - density_there) / (density + density_there + 1)], axis=1)


def scaled(difference_QF: np.ndarray) -> np.ndarray:
    """Differences divided by their standard deviation; 0 for a feature with no variation."""
    spread_F = difference_QF.std(axis=0)
    varies_F = spread_F > 1e-12
    return np.where(varies_F, difference_QF / np.where(varies_F, spread_F, 1.0), 0.0)


def fit(feature_GF: np.ndarray, outcome_G: np.ndarray, weight_RG: np.ndarray) -> np.ndarray:
    """Minimize the loss above for each row of weights by Newton's method to rounding. Returns (R, 1 + F): a, then b."""
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
