"""Sections that become roles: where weights come from, how they are held and trained."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
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
        pinned = re.fullmatch(r"[0-9a-f]{40}", self.revision or "") or Path(self.path).expanduser().is_dir()
        if self.trust_remote_code is True and not pinned:  # a string is a reference that is not followed yet
            raise ValueError(
                f"trust_remote_code runs code of others: path {self.path} is no folder here, so revision must be the "
                f"40-digit commit that you have read, not {self.revision}"
            )


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
class Sampler(Model):
    """Processes that sample for the policy on slots of their own, from a copy of its weights that is renewed before
    each rollout. There when ``placement`` names slots for it; it needs whole weights on each slot."""

    path: str = "${policy.path}"
    """Follows the policy, as do the next four. What is loaded gives way to the weights that are sent."""
    revision: str | None = "${policy.revision}"
    """Follows the policy."""
    init: dict[str, Any] = "${policy.init}"  # type: ignore[assignment] - a reference to another key
    """Follows the policy."""
    dtype: DType = "${policy.dtype}"  # type: ignore[assignment]
    """Follows the policy."""
    trust_remote_code: bool = "${policy.trust_remote_code}"  # type: ignore[assignment]
    """Follows the policy."""
    generation_slots: int = 64
    """Rows of the key-value cache on one rank; further sequences wait and take the place of finished ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_stage != 0:
            raise ValueError(f"zero_stage of a sampler must be 0, each slot holds whole weights: {self.zero_stage}")
        if self.micro_batch_tokens != Model.micro_batch_tokens:
            raise ValueError(
                f"micro_batch_tokens means nothing to a sampler, set generation_slots: {self.micro_batch_tokens}"
            )


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
    init: dict[str, Any] = "${policy.init}"  # type: ignore[assignment] - random weights of one seed are the same
    """Follows the policy."""
    dtype: DType = "${policy.dtype}"  # type: ignore[assignment] - a reference to another key, which OmegaConf follows
    """Follows the policy."""
    trust_remote_code: bool = "${policy.trust_remote_code}"  # type: ignore[assignment]
    """Follows the policy."""


RewardKind = Literal["auto", "sequence_classification", "attributes", "lm_head_row0", "yes_no", "http", "function"]


@dataclass(frozen=True)
class Http:
    """How a reward service is called (``kind: http``); `docs/reward_service.md` has its protocol."""

    url: str = ""
    """Address of the service, as ``http://127.0.0.1:8000``; requests go to ``/v1/rewards`` below it."""
    token_env: str = ""
    """Name of the environment variable that holds the bearer token; empty sends none. The token itself is never
    written anywhere."""
    timeout_s: float = 60.0
    """Seconds that one request may take."""
    retries: int = 10
    """How often a request is sent again that got no usable answer, or 408, 425, 429 or 5xx. 10: with the next two, a
    minute and a quarter on average, so that a service may restart."""
    backoff_s: float = 0.5
    """Before repeat n, from 0, the client waits a random time up to this times 2^n seconds, at least what
    ``Retry-After`` says."""
    max_backoff_s: float = 30.0
    """Bound on that time, seconds."""
    max_concurrency: int = 16
    """Requests of one rank that are under way at a time."""
    batch_size: int = 16
    """Conversations of one request."""
    cache_size: int = 65536
    """Scores that are remembered by the hash of their conversation, so that none is asked for twice; 0 for none."""

    def __post_init__(self) -> None:
        if self.url and not re.fullmatch(
            r"https?://[^\s/?#@:]+(:\d+)?(/[^\s?#]*)?", re.sub(r"\[[\d:a-fA-F]+\]", "v6", self.url)
        ):
            raise ValueError(f"url must be http://HOST:PORT or https://HOST:PORT, without user or query: {self.url!r}")
        if min(self.timeout_s, self.backoff_s, self.max_backoff_s) <= 0:
            numbers = f"{self.timeout_s}, {self.backoff_s}, {self.max_backoff_s}"
            raise ValueError(f"timeout_s, backoff_s and max_backoff_s must be positive: {numbers}")
        if min(self.max_concurrency, self.batch_size) < 1 or min(self.retries, self.cache_size) < 0:
            numbers = f"{self.max_concurrency}, {self.batch_size}, {self.retries}, {self.cache_size}"
            raise ValueError(
                "max_concurrency and batch_size must be positive, retries and cache_size not negative: " + numbers
            )


@dataclass(frozen=True)
class Ensemble:
    """Further reward models that judge every response beside ``path``, on the same slots."""

    paths: list[str] = field(default_factory=list)
    """Folders or hub ids, read as ``path`` is: each by its own kind where ``kind`` is auto. Hub ids are taken at their
    default branch, and code that comes with them is not run."""
    combine: Literal["mean", "minimum", "penalised"] = "mean"
    """``mean`` of the scores, their ``minimum``, or ``penalised``: mean - ``penalty`` * standard deviation (Coste et
    al. 2023, arXiv 2310.02743, section 3.2: minimum is their worst-case, penalised their uncertainty-weighted one)."""
    penalty: float = 1.0
    """Weight of the standard deviation over the models, ``penalised`` only."""

    def __post_init__(self) -> None:
        if self.penalty < 0:
            raise ValueError(f"penalty must not be negative: {self.penalty}")


@dataclass(frozen=True)
class Reward(Model):
    """A frozen reward model, or another judge of responses that takes its place."""

    path: str = ""
    """Folder in Hugging Face layout, or a hub id. Given but with kind ``http`` or ``function``."""
    kind: RewardKind = "auto"
    """How the score is read. ``sequence_classification``: the one-label head at the last token. ``attributes``: a head
    of several attributes at the last token, as ``weights`` add them up. ``lm_head_row0``: the logit of vocabulary id 0
    at the last token (Llama-3.x-Nemotron-70B-Reward). ``yes_no``: logit of Yes less that of No after a question
    (Llama-3.3-Nemotron-70B-Reward-Principle). ``http``: a reward service. ``function``: Python. ``auto``: by what the
    checkpoint says of itself."""
    attributes: list[str] = field(default_factory=list)
    """Names of the outputs of an ``attributes`` head, in their order; empty takes those that the checkpoint names.
    ``[nemo]`` stands for the nine of NeMo-Aligner."""
    weights: dict[str, float] = field(default_factory=dict)
    """Goodness: weight of each attribute in the score; one that is not named counts 0. Empty takes those stored with
    the checkpoint."""
    principle: str = ""
    """What a ``yes_no`` model judges by, the text in its question."""
    question: str = ""
    """The whole question to a ``yes_no`` model, in which ``{principle}`` stands for that text; empty takes that of the
    model card of Llama-3.3-Nemotron-70B-Reward-Principle."""
    function: str = ""
    """``module:function`` or ``path/file.py:function`` with TRL's signature (kind ``function``): it is called with
    ``prompts``, ``completions`` (lists of messages) and ``completion_ids`` and returns a list of numbers, None for no
    score. A module must be installed on every node."""
    http: Http = field(default_factory=Http)
    """The service (kind ``http``)."""
    ensemble: Ensemble = field(default_factory=Ensemble)
    """Further models beside ``path``."""
    normalise: bool = False
    """Subtract the mean and divide by the standard deviation that were measured on held-out data and are stored with
    the checkpoint; of an ensemble, each member by its own."""
    chat_template: str | None = None
    """File with a Jinja chat template for text that this role renders itself; None takes the one stored with the
    checkpoint. Not read where the role reads the policy's token ids."""
    date: str | None = None
    """Text passed to that template as ``date_string``."""
    failed: Literal["fail", "drop"] = "fail"
    """A score that is not finite, or that a service does not give, stops the run, or takes all responses to that prompt
    out of the step, counted. It is never replaced by a number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "http" and not self.http.url:
            raise ValueError(f"kind http needs http.url: {self.http.url!r}")
        if self.kind == "function" and not re.fullmatch(r"[^:]+:[A-Za-z_]\w*", self.function):
            raise ValueError(f"kind function needs function=module:name or file.py:name: {self.function!r}")
        if not self.is_model and (self.path or self.ensemble.paths):
            raise ValueError(
                f"kind {self.kind} reads no checkpoint: path {self.path!r}, ensemble.paths {self.ensemble.paths}"
            )
        if not self.is_model and (self.normalise or self.chat_template or self.date):
            raise ValueError(
                f"kind {self.kind} has no template and no moments: normalise {self.normalise}, chat_template "
                f"{self.chat_template}, date {self.date}"
            )
        if self.kind not in ("auto", "attributes") and (self.attributes or self.weights):
            raise ValueError(f"kind {self.kind} has one score: attributes {self.attributes}, weights {self.weights}")
        if self.kind != "yes_no" and (self.principle or self.question):
            raise ValueError(f"kind {self.kind} asks nothing: principle {self.principle!r}, question {self.question!r}")
        if self.kind == "yes_no" and ("{principle}" in (self.question or "{principle}")) != bool(self.principle):
            raise ValueError(
                f"kind yes_no needs principle, or a question without {{principle}} in it: {self.principle!r}, "
                f"{self.question!r}"
            )
        if self.kind != "function" and self.function:
            raise ValueError(f"kind {self.kind} calls no function: {self.function!r}")

    @property
    def is_model(self) -> bool:
        """Whether the role holds a model and reads token ids with a tokenizer of its own."""
        return self.kind not in ("http", "function")

    @property
    def present(self) -> bool:
        """Whether the recipe names a judge."""
        return bool(self.path) or not self.is_model


@dataclass(frozen=True)
class OptionalReward(Reward):
    """A frozen reward model that is absent unless ``path`` is given, or a kind that needs none."""


@dataclass(frozen=True)
class SecondReward(OptionalReward):
    """A second reward model that is never learned from: a gain that it does not share is the first one's mistake."""


@dataclass(frozen=True)
class TrainedReward(Trained):
    """A reward model in training: a transformer body with a linear head read at the last token."""

    attributes: list[str] = field(default_factory=list)
    """Names of the head's outputs; empty for one score. ``[nemo]`` stands for the nine of NeMo-Aligner."""
    head: Literal["auto", "trained", "new"] = "auto"
    """``trained``: the checkpoint must bring a head. ``new``: it is drawn from ``run.seed``. ``auto``: drawn where the
    checkpoint has none."""
    from_attribute: str = "helpfulness"
    """Which output of a checkpoint with several the one score starts from (HelpSteer2-Preference: helpfulness)."""


@dataclass(frozen=True)
class Critic(Trained):
    """A value function in training: a transformer body whose scalar head is read at every response token."""

    kind: RewardKind = "auto"
    """How the reward model that it starts from gives its score, as ``reward.kind``; one without a head (``yes_no``,
    ``http``, ``function``) is refused. This and the next two are not read with ``head: new``."""
    attributes: list[str] = field(default_factory=list)
    """As ``reward.attributes``."""
    weights: dict[str, float] = field(default_factory=dict)
    """As ``reward.weights``: of a head of several attributes the critic starts from their weighted sum."""
    head: Literal["trained", "new"] = "trained"
    """``trained``: values start as the scores of a reward model; a checkpoint without such a head is refused.
    ``new``: a head that the checkpoint lacks is drawn from ``run.seed``, so that a critic can start from the policy."""


@dataclass(frozen=True)
class StartingCritic(Critic):
    """The critic that a recipe gets when it says nothing: it starts from the reward model (InstructGPT, arXiv
    2203.02155; HelpSteer2, arXiv 2406.08673)."""

    path: str = "${reward.path}"
    """Follows the reward model."""
    revision: str | None = "${reward.revision}"
    """Follows the reward model."""
    dtype: DType = "${reward.dtype}"  # type: ignore[assignment]
    """Follows the reward model."""
    trust_remote_code: bool = "${reward.trust_remote_code}"  # type: ignore[assignment]
    """Follows the reward model."""
    kind: RewardKind = "${reward.kind}"  # type: ignore[assignment]
    """Follows the reward model."""
    attributes: list[str] = "${reward.attributes}"  # type: ignore[assignment]
    """Follows the reward model."""
    weights: dict[str, float] = "${reward.weights}"  # type: ignore[assignment]
    """Follows the reward model."""
