"""Best-of-n, or rejection sampling: supervised fine-tuning on the reward's best of n samples (RAFT: Dong et al. 2023,
arXiv 2304.06767; Llama 2: Touvron et al. 2023, arXiv 2307.09288, section 3.2.3).

    y*_x = argmax_k r(x, y_k)            L = - sum_x sum_t log pi(y*_xt | x, y*_x<t) / sum_x |y*_x|

of n responses that the policy samples itself. Unfinished responses are not chosen by default; a prompt without one
that can be chosen is left out.

Left out: a buffer of the best of earlier steps (Llama 2), and a threshold below which a best response is not learned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from align import ops, roles, sections
from align.algorithms import _candidates, _diagnose, _on_policy
from align.algorithms._heldout import Evaluator
from align.algorithms.sft import loss

if TYPE_CHECKING:
    from torch import Tensor

    from align.run import Run
    from align.types import Batch, Rollouts

prepare = _on_policy.prepare


@dataclass(frozen=True)
class Config(sections.OnPolicy):
    """Recipe of best-of-n."""

    sampling: sections.Sampling = field(default_factory=lambda: sections.Sampling(num_samples=8))
    """``num_samples`` is n, at least 2. 8: RAFT compares 8, 16 and 32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_varied()


class Cast(Protocol):
    """Roles of this algorithm."""

    policy: roles.Policy
    reward: roles.Reward
    second_reward: roles.Reward | None


def best(config: Config, rollouts: Rollouts, score_B: Tensor) -> tuple[Batch, dict[str, float]]:
    """The best response to each prompt that has one, and its mean score."""
    num_samples = config.sampling.num_samples
    score_PK, usable_PK = _candidates.comparable(config, rollouts, score_B)
    best_P, _, _ = ops.groups.best_and_worst(score_PK, usable_PK)
    prompts = usable_PK.any(1).nonzero().squeeze(1)
    rows = ops.groups.rows(prompts, best_P[prompts], num_samples)
    kept = score_B[rows]
    statistics = {
        "best_reward": float(kept.mean()) if len(kept) else 0.0,
        "learnable": len(rows) / len(best_P),
    }
    return rollouts.sequences.select(rows).batch(), statistics


def train(config: Config, material: _on_policy.Material, cast: Cast, run: Run) -> None:
    """Sample, keep the best, imitate it."""
    evaluator = Evaluator(config.evaluation, config.sampling, material.held_out, cast, run)
    for step, rollouts in run.rollouts(material.prompts, cast.policy, config.sampling, config.lag):
        score_B, second_B = _candidates.opinions(cast, rollouts)
        batch, statistics = best(config, rollouts, score_B)
        statistics |= _diagnose.describe(rollouts, score_B, second_B, None, run.state)
        metrics = _on_policy.learn(config, step, 1, {"": (cast.policy, batch, loss)})
        run.log(step, statistics | metrics | evaluator.measure(step), rollouts, score_B)
    cast.policy.export(run.final).result()
