"""The loss of preference pairs in the engine's terms, shared by offline and online DPO; functions of d are in
`align.ops.preference_losses`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from align import ops
from align.roles import Loss, PolicyRole, ReferenceRole

if TYPE_CHECKING:
    from torch import Tensor

    from align.config import PreferenceLossConfig
    from align.types import Pairs, Sequences


def log_prob_sums(role: ReferenceRole | PolicyRole, sequences: Sequences) -> Tensor:
    """log pi of each whole response, (B,), nats."""
    return ops.logprobs.masked_sum(role.logprobs(sequences, 1.0).result(), sequences.mask_BT)


def reference_sums(reference: ReferenceRole | None, pairs: Pairs) -> Tensor:
    """log pi_ref of both responses of each pair; 0 where the loss reads no reference and so there is none."""
    if reference is None:
        return ops.advantages.interleave(0.0 * pairs.strength_P, 0.0 * pairs.strength_P)
    return log_prob_sums(reference, pairs.sequences)


def loss(
    *,
    logprob_BT: Tensor,
    entropy_BT: Tensor,
    mask_BT: Tensor,
    reference_B: Tensor,
    strength_B: Tensor,
    gold_B: Tensor,
    how: PreferenceLossConfig,
) -> Loss:
    """Mean over pairs, rows 2i and 2i + 1; with ``sft_coef`` plus a mean over the preferred responses' tokens.

    ``reference_B`` is log pi_ref of each whole response, nats; the difference of ``gold_B`` in a pair is the target d*.
    Metrics: ``accuracy``, share of pairs with d > 0; ``margin``, beta d; ``chosen_logratio`` and ``rejected_logratio``,
    log pi - log pi_ref, nats a response; ``entropy``, nats a token.
    """
    ratio_B = ops.logprobs.masked_sum(logprob_BT, mask_BT) - reference_B
    d_P = ops.preference_losses.pair_difference(ratio_B / mask_BT.sum(1) if how.by_token_mean else ratio_B)
    loss_P = _of_difference(d_P, strength_B[0::2], ops.preference_losses.pair_difference(gold_B), how)
    pairs = mask_BT.new_tensor(len(d_P), dtype=d_P.dtype)
    metrics = {
        "accuracy": ((d_P > 0).to(d_P.dtype).sum(), pairs),
        "margin": (how.beta * d_P.sum(), pairs),
        "chosen_logratio": (ratio_B[0::2].sum(), pairs),
        "rejected_logratio": (ratio_B[1::2].sum(), pairs),
        "entropy": (ops.logprobs.masked_sum(entropy_BT, mask_BT).sum(), mask_BT.sum()),
    }
    if not how.sft_coef:
        return Loss(loss_P.sum(), pairs, metrics)
    sft, num_tokens = ops.losses.cross_entropy(logprob_BT[0::2], mask_BT[0::2])
    return Loss(loss_P.sum(), pairs, metrics, ((how.sft_coef * sft, num_tokens),))


def _of_difference(d_P: Tensor, strength_P: Tensor, gold_P: Tensor, how: PreferenceLossConfig) -> Tensor:
    match how.kind:
        case "dpo":
            return ops.preference_losses.dpo(d_P, how.beta)
        case "cdpo":
            return ops.preference_losses.cdpo(d_P, how.beta, how.smoothing)
        case "robust":
            return ops.preference_losses.robust(d_P, how.beta, how.smoothing)
        case "ipo":
            return ops.preference_losses.ipo(d_P, how.beta)
        case "hinge":
            return ops.preference_losses.hinge(d_P, how.beta)
        case "margin":
            return ops.preference_losses.margin(d_P, strength_P, how.beta)
        case "scaled":
            return ops.preference_losses.scaled(d_P, strength_P, how.beta)
        case "rpo_sq":
            return ops.preference_losses.rpo_sq(d_P, gold_P, how.beta, how.eta)
        case "rpo_fwd_kl":
            return ops.preference_losses.rpo_fwd_kl(d_P, gold_P, how.beta, how.eta)
        case "rpo_bwd_kl":
            return ops.preference_losses.rpo_bwd_kl(d_P, gold_P, how.beta, how.eta)
        case "simpo":
            return ops.preference_losses.simpo(d_P, how.beta, how.gamma)
