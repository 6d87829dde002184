"""Signs of reward hacking in each rollout batch, whatever the algorithm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from align import ops

if TYPE_CHECKING:
    from torch import Tensor

    from align.types import Rollouts


def reward_diagnostics(
    rollouts: Rollouts, score_B: Tensor, eval_B: Tensor | None, kl_B: Tensor | None, state: dict[str, float]
) -> dict[str, float]:
    """Metrics of a rollout batch. ``state`` keeps the first batch's reward and length, to compare with.

    ``length_ratio`` is the mean length over that of the first batch; ``gain_per_root_kl`` the gain in mean score over
    the first batch divided by sqrt(KL), which falls where a policy pays more and more KL for a score (Gao et al. 2022,
    arXiv 2210.10760). ``kl_B`` is each response's KL to the reference, nats; None where there is no reference.
    ``second_score`` and ``disagreement`` are there with a second reward model.
    """
    scored_B = score_B.isfinite()
    kept_B = score_B[scored_B]
    found = ops.diagnostics.policy_statistics(
        rollouts.sequences.responses,
        score_B,
        score_B.new_zeros(score_B.shape) if kl_B is None else kl_B,
        rollouts.finished_B,
    )
    reward = float(kept_B.mean()) if len(kept_B) else 0.0
    start = state.setdefault("start/reward", reward)
    found |= {
        "reward": reward,
        "reward_std": float(kept_B.std()) if len(kept_B) > 1 else 0.0,
        "failed_scores": float((~scored_B).sum()),
        "length_ratio": found["response_tokens"] / state.setdefault("start/length", found["response_tokens"]),
    }
    if kl_B is None:
        del found["correlation/reward_kl"]
    else:
        kl = float(kl_B.mean())
        found |= {"kl": kl, "gain_per_root_kl": (reward - start) / math.sqrt(kl) if kl > 0 else 0.0}
    if eval_B is not None:
        K = len(rollouts) // int(rollouts.sequences.prompt_B[-1] + 1)
        pair = score_B.view(-1, K), eval_B.view(-1, K)
        known_B = eval_B[eval_B.isfinite()]
        found |= {
            "second_score": float(known_B.mean()) if len(known_B) else 0.0,
            "disagreement": ops.diagnostics.disagreement(*pair),
        }
    return found
