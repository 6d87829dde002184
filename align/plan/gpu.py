"""Bytes of a role on one of its GPUs: what stays, and what each phase adds.

Weights in bfloat16 take 2 bytes, their float32 copy 4 and Adam's moments 8 (Rajbhandari et al. 2020, arXiv 1910.02054,
section 3.1); ZeRO shards the optimizer's part over N ranks from stage 1, gradients from stage 2, weights at stage 3.
Activations are those of transformers' Llama layers in training: what autograd saves for each token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from align.config import PolicyConfig, PreviousPolicyConfig, SamplerConfig, TrainedModelConfig
from align.ops.logprobs import chunk_tokens
from align.plan.shapes import ModelShape
from align.plan.sizes import RoleModel
from align.plan.workload import MicroBatch, Workload

KINDS = ("weights", "gradients", "optimizer", "cache", "activations", "logits", "buffers", "context")
PHASES = ("start", "rollout", "score", "update", "save")
"""``score``: forward passes without gradients of reference, reward, critic and policy. ``save``: checkpoint, export."""

CONTEXT = 1.2e9
"""CUDA context, cuBLAS workspace and NCCL channels of a process. An assumption: 0.5 to 1.5 GB are usual."""
BUCKET = 500_000_000
"""Elements of DeepSpeed's gradient bucket (`align.engines.deepspeed.BUCKET`)."""
GRADIENT = 4
"""Bytes of an accumulated gradient, which is float32 at every stage."""
LIVE = 1_000_000_000
"""Gathered weights that DeepSpeed keeps at ZeRO 3, by its defaults stage3_max_live_parameters and
stage3_max_reuse_distance."""
SUB_GROUP = 1_000_000_000
"""Weights that a ZeRO 3 rank updates together, DeepSpeed's default sub_group_size."""
KEY_BLOCK = 32
"""Positions of the decoder's cache are a multiple of this (`align.engines.decoder.KEY_BLOCK`)."""

Bytes = dict[str, float]
"""By kind."""


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of a role on one of its GPUs."""

    name: str
    resident: Bytes
    """What it holds in every phase."""
    idle: Bytes
    """What it holds while it does not work: ``resident``, or less if it offloads between calls."""
    transient: dict[str, Bytes] = field(default_factory=dict)
    """What a phase adds, for the phases in which the role works."""

    def at(self, phase: str) -> Bytes:
        """Bytes by kind in a phase."""
        if phase not in self.transient:
            return self.idle
        added = self.transient[phase]
        return {kind: self.resident.get(kind, 0.0) + added.get(kind, 0.0) for kind in KINDS}


def saved_per_token(shape: ModelShape, width: int, key_ratio: float = 1.0) -> float:
    """Bytes that autograd keeps for a token in one layer. ``key_ratio``: keys for each token.

    Two RMS norms keep their float32 input, the normalized state and the output; attention keeps q, k, v, its output and
    a float32 normalizer for each head; the MLP keeps gate, silu(gate), up and their product. RMS norms of q and k
    (Qwen3) keep a float32 input and the normalized state.
    """
    norms = 2 * (4 + 2 * width) * shape.hidden
    attention = width * (2 * shape.query_width + 2 * shape.key_width * key_ratio) + 4 * shape.num_heads
    qk_norms = shape.qk_norm * (4 + width) * (shape.query_width + shape.key_width)
    return norms + attention + qk_norms + 4 * width * shape.intermediate


def training_activations(shape: ModelShape, width: int, batch: MicroBatch, checkpointing: bool) -> float:
    """Peak bytes of activations in a backward pass: all layers' (or, with checkpointing, the input of each and one
    layer's), the final norm's, and three gradients of the MLP's width."""
    layer = saved_per_token(shape, width, batch.keys / batch.tokens) * batch.tokens
    layers = (
        layer + width * shape.hidden * batch.tokens * shape.num_layers if checkpointing else layer * shape.num_layers
    )
    ends = (4 + 3 * width) * shape.hidden * batch.tokens
    return layers + ends + 3 * width * shape.intermediate * batch.tokens


def inference_activations(shape: ModelShape, width: int, tokens: int) -> float:
    """Peak bytes of a forward pass without gradients: the residual stream, the normalized state, and three tensors of
    the MLP."""
    return tokens * width * (2 * shape.hidden + 3 * shape.intermediate)


def gathered(model: RoleModel) -> float:
    """Bytes of whole weights that a pass at ZeRO 3 holds beside its shard; 0 below."""
    if model.section.zero_stage != 3:
        return 0.0
    return model.width * min(model.weights, LIVE + model.shape.largest_tensor)


def logits_bytes(model: RoleModel, predicted: int, training: bool) -> float:
    """Bytes of the logits of one chunk (`align.ops.logprobs.of_hidden`), and of the gradient of a head that trains,
    which is summed over chunks in float32. Architectures of other families hold their logits whole."""
    vocab = model.shape.vocab
    chunk = min(predicted, chunk_tokens(predicted))
    total = chunk * vocab * (14.0 if training else 8.0)
    if not model.shape.chunked_logits:
        total += predicted * vocab * model.width * (3 if training else 1)
    elif training and model.trained == model.weights:
        total += 4.0 * vocab * model.shape.hidden
    return total


def _resident(model: RoleModel) -> Bytes:
    """Weights, and of a trained role the sharded optimizer state; ZeRO 3 also keeps its gradient shard and bucket."""
    section, ranks, width = model.section, model.ranks, model.width
    sharded = section.zero_stage == 3
    held: Bytes = {"context": CONTEXT, "weights": width * model.weights / (ranks if sharded else 1)}
    if section.offload_parameters:
        held["weights"] = 0.0
    if not isinstance(section, TrainedModelConfig):
        return held
    shards = ranks if section.zero_stage else 1
    if not section.offload_optimizer:
        held["optimizer"] = (12 if section.zero_stage else 8) * model.trained / shards
        if sharded:
            held["gradients"] = GRADIENT * model.trained / ranks
    if sharded:
        held["buffers"] = width * min(BUCKET, model.weights)
    return held


def _update(model: RoleModel, work: Workload) -> Bytes:
    """What an optimizer step adds."""
    section, shape, width = model.section, model.shape, model.width
    batch = work.micro_batch(section, model.ranks, work.unit)
    added: Bytes = {
        "activations": training_activations(shape, width, batch, section.gradient_checkpointing),
        "weights": gathered(model),
    }
    if not model.scores:
        added["logits"] = logits_bytes(model, batch.predicted, training=True)
    local = width * max(shape.layer, shape.largest_tensor) * model.trained / model.weights
    if section.zero_stage == 3:
        added["buffers"] = local
        added["gradients"] = 4 * min(SUB_GROUP, model.trained / model.ranks)
    elif section.zero_stage == 0:
        added["gradients"] = width * model.trained
    else:
        added["gradients"] = GRADIENT * model.trained / model.ranks
        added["buffers"] = width * min(BUCKET, model.trained) + local
    return added


def _score(model: RoleModel, work: Workload) -> Bytes:
    """What forward passes without gradients add."""
    batch = work.micro_batch(model.section, model.ranks)
    added: Bytes = {
        "activations": inference_activations(model.shape, model.width, batch.tokens),
        "weights": gathered(model),
    }
    if not model.scores:
        added["logits"] = logits_bytes(model, batch.predicted, training=False)
    return added


def rollout(model: RoleModel, sequences: int, prompt: int, positions: int) -> Bytes:
    """What the decoder adds for ``sequences`` of a rank: cache, a prefill within the budget of tokens, float32 logits
    and their cumulated probabilities for each row."""
    section, shape, width = model.section, model.shape, model.width
    rows = min(section.max_num_seqs, sequences)
    length = math.ceil(positions / KEY_BLOCK) * KEY_BLOCK
    whole = section.zero_stage == 3 and section.gather_weights_for_generation
    prefill = min(rows * prompt, max(section.max_tokens_per_micro_batch, prompt))
    return {
        "weights": width * model.weights if whole else gathered(model),
        "cache": shape.cache(rows, length, width),
        "activations": inference_activations(shape, width, prefill),
        "logits": rows * shape.vocab * (width + 12),
    }


def role_memory(model: RoleModel, work: Workload, sampler: bool, evaluates: bool) -> RoleMemory:
    """Bytes of a role. ``sampler``: another role samples for the policy; ``evaluates``: held-out prompts are
    answered."""
    section, resident = model.section, _resident(model)
    transient: dict[str, Bytes] = {"start": _start(model)}
    trained = isinstance(section, TrainedModelConfig)
    share = math.ceil(work.prompts / model.ranks) * work.K
    samples = isinstance(section, (SamplerConfig, PreviousPolicyConfig)) or (
        isinstance(section, PolicyConfig) and not sampler and (work.samples or evaluates)
    )
    if samples:
        transient["rollout"] = rollout(model, share, work.prompt_tokens, work.positions)
    if model.judge:
        transient["score"] = rollout(model, section.max_num_seqs, work.positions * 2, work.positions * 3)
    elif not isinstance(section, (SamplerConfig, PreviousPolicyConfig)):
        transient["score"] = _score(model, work)
    if trained:
        transient["update"] = _update(model, work)
        transient["save"] = {"buffers": (model.width if section.zero_stage == 3 else 0) * model.shape.largest_tensor}
    return RoleMemory(model.name, resident, resident, transient)


def _start(model: RoleModel) -> Bytes:
    """Loading: at ZeRO 3 the largest tensor before it is sharded; a model from ``init`` is built whole."""
    if model.section.zero_stage != 3:
        return {}
    whole = model.weights if model.section.init else model.shape.largest_tensor
    return {"weights": model.width * whole}
