"""Schemas of roles with weights: where these come from, and how they are held and trained."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from omegaconf import MISSING

from align.config import precision

DType = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = MISSING
    """Rank of each update."""
    alpha: float = 16.0
    """Scale of the update is alpha / rank (peft's convention)."""
    dropout: float = 0.0
    """Dropout probability on the adapter's input. 0, so that sampling and training see one function."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Module names that get adapters, in full or their last parts, or ``all-linear`` (peft's word for every linear
    layer but the head). Each must match a module, and none may share its weight with another (docs/lora.md)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be positive: {self.rank}; lora: null trains all weights")
        if not self.targets:
            raise ValueError("targets is empty: name modules, or all-linear")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) and its learning-rate schedule."""

    lr: float = MISSING
    """Peak learning rate. It has no default, because no value fits two models."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of first and second moment; NeMo-Aligner's HelpSteer recipes."""
    eps: float = 1e-8
    """Added to the root of the second moment; AdamW's default."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; vectors (norms, biases) are never decayed."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which the gradient is scaled down; 0 turns it off. NeMo-Aligner: 1.0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after warm-up. HelpSteer2 uses a constant rate."""
    warmup_steps: int = 0
    """Optimizer steps over which the rate rises linearly from 0."""
    min_lr_ratio: float = 0.0
    """Rate at the last step as a fraction of ``lr`` (linear and cosine)."""

    def __post_init__(self) -> None:
        if not isinstance(self.lr, str) and self.lr < 0:  # a string is the mark of a value that is still missing
            raise ValueError(f"lr must not be negative: {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas lie in [0, 1): {list(self.betas)}")


@dataclass(frozen=True)
class RoleConfig:
    """A field of this type becomes a role: its own processes, placed by ``placement``. The class attributes describe a
    role without a checkpoint (a service, a function); `ModelConfig` turns them into keys."""

    # Without annotations, so that they are no fields: a dataclass would inherit them over those of `ModelConfig`.
    path = ""
    revision = None
    init = MappingProxyType({})
    dtype = "float32"
    zero_stage = 0
    trust_remote_code = False


@dataclass(frozen=True)
class ModelConfig(RoleConfig):
    """Where a role's weights come from and how they are held."""

    path: str = MISSING
    """Folder in Hugging Face layout, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None takes the hub's default branch."""
    init: dict[str, Any] = field(default_factory=dict)
    """Architecture for random weights (fields of the transformers config, with ``model_type``). When it is
    given, ``path`` supplies the tokenizer only and ``vocab_size`` follows from it."""
    dtype: DType = "auto"
    """Number format of the weights held for computing. ``auto`` is bfloat16 where the driver's machine has GPUs or a
    CPU with bfloat16 units, else float32; a run keeps its first format."""
    attention: Literal["auto", "packed", "sdpa", "eager", "flash_attention_2"] = "auto"
    """``packed`` runs without padding, on CUDA in bfloat16 by FlashAttention; ``auto`` uses it if the architecture
    allows, else ``sdpa``, or ``eager`` if transformers has no sdpa for the architecture (soft caps, sinks)."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage. A role that is not trained shards its weights over its ranks at 3 and replicates them
    below."""
    offload_parameters: bool = False
    """Keep the parameter shards in host memory (ZeRO 3)."""
    max_tokens_per_micro_batch: int = 4096
    """Tokens of one forward pass on one rank, prompts counted once; a longer sequence is a pass of its own. Changes
    memory and speed, never the result but by rounding. The default lets a policy of 8 billion weights train on 8 GPUs
    of 80 GB without gradient checkpointing (docs/memory.md)."""
    trust_remote_code: bool = False
    """Run the Python code of a checkpoint. Needs a pinned 40-digit ``revision`` for a hub id."""

    def __post_init__(self) -> None:
        if self.dtype == "auto" and self.path not in ("", MISSING):  # once, in the driver, so that all ranks agree
            object.__setattr__(self, "dtype", precision.automatic().dtype)
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage is 0, 1, 2 or 3: {self.zero_stage}")
        if self.max_tokens_per_micro_batch < 1:
            raise ValueError(f"max_tokens_per_micro_batch must be positive: {self.max_tokens_per_micro_batch}")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3, which shards them")
        pinned = re.fullmatch(r"[0-9a-f]{40}", self.revision or "") or Path(self.path).expanduser().is_dir()
        if self.trust_remote_code is True and not pinned:  # a string is a reference that is not followed yet
            raise ValueError(
                f"trust_remote_code runs code of others: path {self.path} is no folder here, so revision must be the "
                f"40-digit commit that you have read, not {self.revision}"
            )


@dataclass(frozen=True)
class TrainedModelConfig(ModelConfig):
    """Keys of every trained role."""

    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 1 shards the optimizer state, 2 also gradients, 3 also weights. 0 only with float32, since
    bfloat16 weights need the float32 copy that stages 1 to 3 keep."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory (ZeRO 1 to 3)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and schedule."""
    lora: LoraConfig | None = None
    """Low-rank adapters; null trains all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more time, far less memory."""
    dropout: float = 0.0
    """Probability set on every dropout field of the model's config. 0, the usual choice in alignment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_stage == 0 and self.dtype == "bfloat16":
            raise ValueError("training bfloat16 weights needs zero_stage 1, 2 or 3, which keep a float32 copy")
        if self.zero_stage == 0 and self.offload_optimizer:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")


ROLLOUT_ENGINES = {"decoder": "align.engines.decoder_engine:DecoderEngine"}
"""Rollout engines by name; see `align.engines.rollout.RolloutEngine`."""


def _check_engine(engine: str) -> None:
    if engine not in ROLLOUT_ENGINES and ":" not in engine:
        raise ValueError(
            f"engine must be one of {', '.join(ROLLOUT_ENGINES)}, or module:Class or path/file.py:Class of a rollout "
            f"engine. Got engine={engine!r}"
        )


@dataclass(frozen=True)
class PolicyConfig(TrainedModelConfig):
    """The actor: a causal language model that samples responses and is trained."""

    engine: str = "decoder"
    """Rollout engine: ``decoder``, or ``module:Class`` of another one (docs/architecture.md)."""
    max_num_seqs: int = 64
    """Rows of the key-value cache on one rank; further sequences wait until a row is free."""
    gather_weights_for_generation: bool = True
    """At ZeRO 3, hold the whole weights on every rank during a rollout. False fetches them layer by layer for
    every token: slow, but the only way for a model that does not fit on one GPU (Llama-shaped families)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_engine(self.engine)


@dataclass(frozen=True)
class SamplerConfig(ModelConfig):
    """Processes that sample for the policy on their own slots, from a copy of its weights. The copy is updated before
    each rollout. Each slot holds the whole model."""

    path: str = "${policy.path}"
    """Follows the policy, as do the next four. The first update replaces the loaded weights by the policy's."""
    revision: str | None = "${policy.revision}"
    """Follows the policy."""
    init: dict[str, Any] = "${policy.init}"  # type: ignore[assignment] - a reference to another key
    """Follows the policy."""
    dtype: DType = "${policy.dtype}"  # type: ignore[assignment]
    """Follows the policy."""
    trust_remote_code: bool = "${policy.trust_remote_code}"  # type: ignore[assignment]
    """Follows the policy."""
    engine: str = "decoder"
    """Rollout engine, as ``policy.engine``."""
    max_num_seqs: int = 64
    """Rows of the key-value cache on one rank; further sequences wait and take the place of finished ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_engine(self.engine)
        if self.zero_stage != 0:
            raise ValueError(f"zero_stage of a sampler must be 0, each slot holds whole weights: {self.zero_stage}")


@dataclass(frozen=True)
class ReferenceConfig(ModelConfig):
    """The frozen policy to which the KL divergence is measured."""


@dataclass(frozen=True)
class ReferenceFromPolicyConfig(ReferenceConfig):
    """The default reference: the policy's starting weights. A recipe with another ``reference.path`` and a pinned
    ``policy.revision`` must also give ``reference.revision``."""

    path: str = "${policy.path}"
    """Follows the policy."""
    revision: str | None = "${policy.revision}"
    """Follows the policy."""
    init: dict[str, Any] = "${policy.init}"  # type: ignore[assignment] - random weights of one seed are the same
    """Follows the policy."""
    dtype: DType = "${policy.dtype}"  # type: ignore[assignment] - a reference to another key, which OmegaConf follows
    """Follows the policy."""
    trust_remote_code: bool = "${policy.trust_remote_code}"  # type: ignore[assignment]
    """Follows the policy."""
