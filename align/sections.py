"""Sections of a recipe that algorithms share. Importing this module loads no torch.

Every field is followed by a docstring with its unit and the origin of its default. ``MISSING`` marks
what a recipe must give. Role sections (`Policy`, `Reference`, `Reward`, `TrainedReward`) are also the
cast list: the launcher starts one role for each field of a recipe whose type is a role section.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685). ``rank: 0`` trains all weights."""

    rank: int = 0
    """Rank of each update; 0 turns adapters off."""
    alpha: float = 16.0
    """Scale of the update is alpha / rank (peft's convention)."""
    dropout: float = 0.0
    """Dropout probability on the adapter's input. 0, so that sampling and training see one function."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Module names that get adapters, or ``all-linear`` (peft's word for every linear layer but the head)."""


@dataclass(frozen=True)
class Optimizer:
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
class Model:
    """Where a role's weights come from and how they are held."""

    path: str = MISSING
    """Folder in Hugging Face layout, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None takes the hub's default branch."""
    init: dict[str, Any] = field(default_factory=dict)
    """Architecture for random weights (fields of the transformers config, with ``model_type``). When it is
    given, ``path`` supplies the tokenizer only and ``vocab_size`` follows from it."""
    dtype: DType = "bfloat16"
    """Number format of the weights held for computing."""
    attention: Literal["auto", "packed", "sdpa", "eager", "flash_attention_2"] = "auto"
    """``packed`` runs without padding; ``auto`` takes it where the architecture allows, else ``sdpa``."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage. A role that is not trained shards its weights over its ranks at 3 and replicates them
    below."""
    offload_parameters: bool = False
    """Keep the parameter shards in host memory (ZeRO 3)."""
    micro_batch_tokens: int = 16384
    """Tokens of one forward pass on one rank, prompts counted once. Changes memory and speed, never the result but by
    rounding: gradients of micro-batches are summed in ``dtype``."""
    trust_remote_code: bool = False
    """Run Python code that comes with a checkpoint. Needs a pinned 40-digit ``revision`` for a hub id."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage is 0, 1, 2 or 3: {self.zero_stage}")
        if self.micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens must be positive: {self.micro_batch_tokens}")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3, which shards them")


@dataclass(frozen=True)
class Trained(Model):
    """What every trained role has beside its weights."""

    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 1 shards the optimizer state, 2 also gradients, 3 also weights. 0 only with float32, since
    bfloat16 weights need the float32 copy that stages 1 to 3 keep."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory (ZeRO 1 to 3)."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """AdamW and schedule."""
    lora: Lora = field(default_factory=Lora)
    """Low-rank adapters; off by default."""
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


@dataclass(frozen=True)
class Policy(Trained):
    """The actor: a causal language model that samples responses and is trained."""

    generation_slots: int = 64
    """Rows of the key-value cache on one rank; further sequences wait and take the place of finished ones."""
    gather_for_rollouts: bool = True
    """At ZeRO 3, hold the whole weights on every rank for the time of a rollout. False fetches them layer by layer for
    every token: slow, but the only way for a model that does not fit on one GPU (Llama-shaped families)."""


@dataclass(frozen=True)
class Reference(Model):
    """The frozen policy to which the KL divergence is measured."""


@dataclass(frozen=True)
class StartingPolicy(Reference):
    """The reference that a recipe gets when it says nothing: what its ``policy`` starts from."""

    path: str = "${policy.path}"
    """Follows the policy."""
    revision: str | None = "${policy.revision}"
    """Follows the policy."""
    dtype: DType = "${policy.dtype}"  # type: ignore[assignment] - a reference to another key, which OmegaConf follows
    """Follows the policy."""
    trust_remote_code: bool = "${policy.trust_remote_code}"  # type: ignore[assignment]
    """Follows the policy."""


@dataclass(frozen=True)
class Reward(Model):
    """A frozen reward model."""

    kind: Literal["auto", "sequence_classification", "lm_head_row0"] = "auto"
    """How the score is read. ``sequence_classification``: the one-label head at the last token. ``lm_head_row0``: the
    logit of vocabulary id 0 at the last token (Llama-3.x-Nemotron-70B-Reward). ``auto``: by the architecture
    that the checkpoint names."""


@dataclass(frozen=True)
class TrainedReward(Trained):
    """A reward model in training: a transformer body with a scalar head read at the last token."""


@dataclass(frozen=True)
class Data:
    """HelpSteer3-Preference, from the hub or from a folder of the same layout."""

    path: str = MISSING
    """Hub id (``nvidia/HelpSteer3``) or a folder that holds ``preference/train.jsonl.gz`` and
    ``validation.jsonl.gz``."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    max_rows: int | None = None
    """Read only the first rows of each split; None reads all."""
    domains: list[str] = field(default_factory=list)
    """Keep these values of ``domain`` (general, stem, code, multilingual); empty keeps all."""
    max_prompt_tokens: int = 2048
    """Longer prompts are dropped and counted, never cut."""
    max_response_tokens: int = 2048
    """Longer responses (pairs, demonstrations) are dropped and counted, never cut."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """A row that breaks the schema stops the run with file, line and field, or is skipped and counted."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's own."""
    date: str | None = None
    """Text passed to the template as ``date_string``. A template that writes today's date is refused without it."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Order of the filters: temperature, top-k, top-p, min-p (as in transformers)."""

    num_samples: int = 1
    """K, responses per prompt."""
    max_tokens: int = 1024
    """T, longest response in tokens; a response that reaches it without an end token is unfinished."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this sum."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one."""

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.max_tokens < 1:
            raise ValueError(f"num_samples and max_tokens must be positive: {self.num_samples}, {self.max_tokens}")
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError(f"temperature and top_k must not be negative: {self.temperature}, {self.top_k}")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(f"top_p lies in (0, 1] and min_p in [0, 1]: {self.top_p}, {self.min_p}")


@dataclass(frozen=True)
class Cluster:
    """Where Ray runs. Not read by ``executor: local``."""

    address: str | None = None
    """``host:port`` of a running Ray cluster; None starts one on 127.0.0.1 for this run and stops it at the end."""
    slots_per_core: int = 2
    """Worker processes that one CPU core offers on a cluster without GPUs that this run starts. Threads are shared out,
    so more slots than cores cost memory rather than speed while only some roles are busy."""
    start_timeout_s: float = 180.0
    """Seconds for slots to be granted and for each role to come up."""
    call_timeout_s: float = 3600.0
    """Seconds that one call to a role may take before the run stops and names it."""


@dataclass(frozen=True)
class Run:
    """The run folder and what is written there."""

    dir: str = MISSING
    """Folder of this run. It must be new or empty."""
    steps: int = MISSING
    """Optimizer steps."""
    seed: int = 0
    """Seed of data order, weight initialisation and sampling."""
    logged_samples: int = 4
    """Responses written to ``samples.jsonl`` each step."""
    tensorboard: bool = True
    """Write event files to ``tensorboard/``."""
    progress: Literal["auto", "live", "plain", "none"] = "auto"
    """Display in the terminal; ``auto`` is live on a terminal and about a hundred plain lines elsewhere."""


@dataclass(frozen=True)
class Recipe:
    """What every recipe has; the ``Config`` of an algorithm extends it."""

    algorithm: str = MISSING
    """Module of ``align.algorithms``."""
    run: Run = field(default_factory=Run)
    """The run folder."""
    data: Data = field(default_factory=Data)
    """The data source."""
    executor: Literal["ray", "local"] = "ray"
    """``ray``: each role in worker processes of its own. ``local``: every role in this process, for debugging."""
    placement: dict[str, str] = field(default_factory=dict)
    """Slots of each role, as ``0``, ``0-3`` or ``0,2``. A slot is a GPU, or a worker process on a CPU cluster. Roles
    that share a slot share its device."""
    cluster: Cluster = field(default_factory=Cluster)
    """Where Ray runs."""

    def notes(self) -> list[str]:
        """What a reader of the configuration should know beside its values."""
        return []
