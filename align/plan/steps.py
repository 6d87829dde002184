"""Seconds of the phases of a step, by roofline arithmetic (Williams et al. 2009, doi 10.1145/1498765.1498785).

A phase takes the longer of its operations over the ceiling of compute and its bytes over that of bandwidth, each times
an assumed share (`align.plan.hardware`). Every prompt and response counts with its longest length, so that tokens are
an upper bound; answers that end earlier cost less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.config import PolicyConfig, TrainedModelConfig
from align.plan.hardware import COPY, DECODE, FORWARD, TRAIN, Gpu
from align.plan.host import GPUS_PER_NODE
from align.plan.sizes import RoleModel
from align.plan.workload import Workload


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of a phase, and the tokens that it passes."""

    name: str
    seconds: float
    tokens: float


def pass_seconds(model: RoleModel, work: Workload, gpu: Gpu, K: int, backward: bool) -> float:
    """Seconds of a pass over a step's sequences, ``K`` for each prompt: forward, or forward and backward (3 times its
    operations, 4 with recomputed activations).

    At ZeRO 3 each micro-batch gathers the weights, and again in the backward pass: the time is that of the transfer
    where it is longer than the computation, which it overlaps.
    """
    shape, ranks, section = model.shape, model.ranks, model.section
    prompts = math.ceil(work.prompts / ranks) if work.prompts > ranks else work.prompts / ranks
    prompt_tokens, response_tokens = prompts * work.prompt_tokens, prompts * K * work.response_tokens
    predicted = 0 if model.scores else response_tokens
    flops = shape.forward_flops(prompt_tokens, work.prompt_tokens / 2, 0)
    flops += shape.forward_flops(response_tokens, work.prompt_tokens + work.response_tokens / 2, predicted)
    factor = (4 if section.gradient_checkpointing else 3) if backward else 1
    seconds = factor * flops / (gpu.flops * (TRAIN if backward else FORWARD))
    if section.zero_stage == 3 and ranks > 1:
        tokens = prompt_tokens + response_tokens
        passes = max(1, math.ceil(tokens / section.max_tokens_per_micro_batch))
        moved = model.width * model.weights * (ranks - 1) / ranks * passes * (3 if backward else 1)
        seconds = max(seconds, moved / (rate(gpu, ranks) * COPY))
    return seconds


def rate(gpu: Gpu, ranks: int) -> float:
    """Bytes a second between the ranks of a role."""
    return gpu.link if ranks <= GPUS_PER_NODE else gpu.network


def rollout_seconds(model: RoleModel, work: Workload, gpu: Gpu) -> tuple[float, float]:
    """Seconds of prefill and of decoding. A token step reads all weights and the cache of its rows."""
    shape, section = model.shape, model.section
    engines, parts = model.ranks // tensor_parallel(section), tensor_parallel(section)
    prompts = math.ceil(work.prompts / engines)
    sequences = prompts * work.K
    rows = min(section.max_num_seqs, sequences)
    flops = shape.forward_flops(prompts * work.prompt_tokens, work.prompt_tokens / 2, prompts)
    prefill = flops / parts / (gpu.flops * FORWARD)
    context = work.prompt_tokens + work.response_tokens / 2
    read = (model.width * model.weights + shape.cache(rows, int(context), model.width)) / parts
    compute = shape.forward_flops(rows, context, rows) / parts / (gpu.flops * FORWARD)
    step = max(read / (gpu.bandwidth * DECODE), compute)
    if section.zero_stage == 3 and not section.gather_weights_for_generation:
        moved = model.width * model.weights * (model.ranks - 1) / model.ranks
        step = max(step, moved / (rate(gpu, model.ranks) * COPY))
    return prefill, step * work.response_tokens * sequences / rows


def tensor_parallel(section: Any) -> int:
    """GPUs of one rollout engine."""
    return int(getattr(section, "tensor_parallel", 1))


def optimizer_seconds(model: RoleModel, gpu: Gpu) -> float:
    """An AdamW step reads and writes weight, copy, moments and gradient: 28 bytes a weight in bfloat16."""
    return 28 * model.trained / (model.ranks if model.section.zero_stage else 1) / (gpu.bandwidth * DECODE)


def step_times(models: Mapping[str, RoleModel], work: Workload, gpu: Gpu) -> list[PhaseTime]:
    """The phases of a step in their order. Roles of the score phase count one after the other."""
    times = []
    response, tokens = work.sequences * work.response_tokens, work.prompts * work.prompt_tokens
    policy = next((model for model in models.values() if isinstance(model.section, PolicyConfig)), None)
    sampling = models.get("sampler") or models.get("previous") or policy
    if work.samples and sampling is not None:
        prefill, decode = rollout_seconds(sampling, work, gpu)
        times += [PhaseTime("prefill", prefill, tokens), PhaseTime("decode", decode, response)]
        if "sampler" in models and policy is not None:
            moved = policy.width * policy.weights
            times.append(PhaseTime("weight transfer", moved / (gpu.network * COPY), 0))
    scoring = [
        model for model in models.values() if model.name not in ("sampler", "previous", "policy") and not model.judge
    ]
    for model in scoring:
        if work.samples or not isinstance(model.section, TrainedModelConfig):
            times.append(
                PhaseTime(f"{model.name} forward", pass_seconds(model, work, gpu, work.K, False), tokens + response)
            )
    trained = work.prompts * (work.prompt_tokens + work.trained_K * work.response_tokens)
    for model in models.values():
        if isinstance(model.section, TrainedModelConfig):
            seconds = work.passes * pass_seconds(model, work, gpu, work.trained_K, True)
            seconds += work.updates * optimizer_seconds(model, gpu)
            times.append(PhaseTime(f"{model.name} update", seconds, work.passes * trained))
    return times
