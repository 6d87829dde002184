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
    ``eval_score`` and ``disagreement`` need an eval reward model.
    """
    scored_B = score_B.isfinite()
    valid_B = score_B[scored_B]
    metrics = ops.diagnostics.policy_statistics(
        rollouts.sequences.responses,
        score_B,
        score_B.new_zeros(score_B.shape) if kl_B is None else kl_B,
        rollouts.finished_B,
    )
    reward = float(valid_B.mean()) if len(valid_B) else 0.0
    start = state.setdefault("start/reward", reward)
    metrics |= {
        "reward": reward,
        "reward_std": float(valid_B.std()) if len(valid_B) > 1 else 0.0,
        "failed_scores": float((~scored_B).sum()),
        "length_ratio": metrics["response_tokens"] / state.setdefault("start/length", metrics["response_tokens"]),
    }
    if kl_B is None:
        del metrics["correlation/reward_kl"]
    else:
        kl = float(kl_B.mean())
        metrics |= {"kl": kl, "gain_per_root_kl": (reward - start) / math.sqrt(kl) if kl > 0 else 0.0}
    if eval_B is not None:
        K = len(rollouts) // int(rollouts.sequences.prompt_B[-1] + 1)
        pair = score_B.view(-1, K), eval_B.view(-1, K)
        finite_B = eval_B[eval_B.isfinite()]
        metrics |= {
            "eval_score": float(finite_B.mean()) if len(finite_B) else 0.0,
            "disagreement": ops.diagnostics.disagreement(*pair),
        }
    return metrics


def mismatch(rollout_BT: Tensor, old_BT: Tensor, mask_BT: Tensor) -> dict[str, float]:
    """How far the log-probabilities under which tokens were sampled are from those of the policy before its update.

    With ratio = pi_old / pi_rollout: ``mismatch_kl`` is the KL of the two, nats a token (k3); ``mismatch_share`` the
    share of tokens with ``|ratio - 1| > 0.1``; ``mismatch_max_ratio`` the largest ratio. On-policy with the policy's
    own decoder they are 0, 0 and 1. A sampler on the same weights differs by rounding; more means that its weights or
    its settings are others.
    """
    ratio_N = (old_BT - rollout_BT)[mask_BT].double().exp()
    if not len(ratio_N):
        return {"mismatch_kl": 0.0, "mismatch_share": 0.0, "mismatch_max_ratio": 1.0}
    kl_BT = ops.kl.per_token(rollout_BT, old_BT, "k3")
    return {
        "mismatch_kl": float(ops.logprobs.masked_sum(kl_BT, mask_BT).sum() / len(ratio_N)),
        "mismatch_share": float(((ratio_N - 1).abs() > 0.1).double().mean()),
        "mismatch_max_ratio": float(ratio_N.max()),
    }
