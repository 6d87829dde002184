"""Schemas of reward models: checkpoints, ensembles, generative reward models, services, functions; and critics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from align.config.generators import HttpClientConfig, is_function
from align.config.genrm import GenerativeConfig
from align.config.models import DType, ModelConfig, RoleConfig, TrainedModelConfig

RewardHead = Literal["auto", "sequence_classification", "attributes", "lm_head_row0", "yes_no"]


@dataclass(frozen=True)
class RewardConfig(RoleConfig):
    """A frozen reward model: gives each response a number."""

    kind: str = MISSING
    """Selects the kind."""
    failed: Literal["fail", "drop"] = "fail"
    """A score that is not finite or missing stops the run (``fail``), or removes all responses to that prompt from the
    step and counts them (``drop``). It is never replaced by a number. ``gold: reward`` of ``dpo`` requires ``fail``."""

    @property
    def source(self) -> str:
        """Folder, hub id, address or function of the reward model."""
        raise NotImplementedError

    @property
    def remote(self) -> bool:
        """Whether scores come from a server, so that request counts depend on timing."""
        return False


@dataclass(frozen=True)
class CheckpointRewardConfig(RewardConfig, ModelConfig):
    """``kind: checkpoint``: a reward model whose score is read from a head of the checkpoint."""

    kind: Literal["checkpoint"] = "checkpoint"
    """The default kind."""
    head: RewardHead = "auto"
    """How the score is read. ``sequence_classification``: the one-label head at the last token. ``attributes``: a head
    of several attributes at the last token, summed by ``weights``. ``lm_head_row0``: the logit of vocabulary id 0 at
    the last token (Llama-3.x-Nemotron-70B-Reward). ``yes_no``: logit of Yes less logit of No after a question
    (Llama-3.3-Nemotron-70B-Reward-Principle). ``auto``: by ``align_reward.json`` in the
    checkpoint, else by its config: a classifier with one label or with several."""
    attributes: list[str] = field(default_factory=list)
    """Names of the outputs of an ``attributes`` head, in order; empty takes the checkpoint's names. ``[nemo]`` stands
    for the nine of NeMo-Aligner."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each attribute in the score; attributes without a weight count 0. Empty takes the weights stored with
    the checkpoint; there is no other default."""
    principle: str = ""
    """The principle in the question of a ``yes_no`` head."""
    question: str = ""
    """The whole question of a ``yes_no`` head, with ``{principle}`` in place of the principle; empty takes the question
    of the model card of Llama-3.3-Nemotron-70B-Reward-Principle."""
    normalize: bool = False
    """Subtract the mean and divide by the standard deviation that were measured on held-out data and are stored with
    the checkpoint; in an ensemble, each member by its own."""
    chat_template: str | None = None
    """File with a Jinja chat template for text that this role renders itself; null takes the one stored with the
    checkpoint. Not read where the role reads the policy's token ids."""
    date: str | None = None
    """Text passed to that template as ``date_string``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError(f"path must be a folder or a hub id: {self.path!r}")
        if self.head not in ("auto", "attributes") and (self.attributes or self.weights):
            raise ValueError(f"head {self.head} has one score: attributes {self.attributes}, weights {self.weights}")
        if self.head != "yes_no" and (self.principle or self.question):
            raise ValueError(
                f"head {self.head} asks no question: principle {self.principle!r}, question {self.question!r}"
            )
        if self.head == "yes_no" and ("{principle}" in (self.question or "{principle}")) != bool(self.principle):
            raise ValueError(
                f"head yes_no needs principle, or a question without {{principle}} in it: {self.principle!r}, "
                f"{self.question!r}"
            )

    @property
    def source(self) -> str:
        return self.path


@dataclass(frozen=True)
class EnsembleRewardConfig(CheckpointRewardConfig):
    """``kind: ensemble``: several checkpoints on the same slots, whose scores are combined."""

    kind: Literal["ensemble"] = "ensemble"  # type: ignore[assignment] - a tag of the union
    """Selects this kind."""
    paths: list[str] = field(default_factory=list)
    """Folders or hub ids of further members beside ``path``, each read by the same ``head``; with ``auto``, each by its
    own. Hub ids are taken at their default branch, and their code is not run."""
    combine: Literal["mean", "minimum", "penalized"] = "mean"
    """``mean`` of the scores, their ``minimum``, or ``penalized``: mean - ``penalty`` * standard deviation (Coste et
    al. 2023, arXiv 2310.02743, section 3.2: minimum is their worst-case, penalized their uncertainty-weighted one)."""
    penalty: float = 1.0
    """Weight of the standard deviation over the members, ``penalized`` only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.paths:
            raise ValueError(f"kind ensemble needs paths, the members beside path: {self.paths}")
        if self.penalty < 0:
            raise ValueError(f"penalty must not be negative: {self.penalty}")


@dataclass(frozen=True)
class GenerativeRewardConfig(RewardConfig, GenerativeConfig):
    """``kind: generative``: an LLM-as-judge that writes verdicts (docs/genrm.md)."""

    kind: Literal["generative"] = "generative"
    """Selects this kind."""

    @property
    def source(self) -> str:
        return self.judge.source

    @property
    def remote(self) -> bool:
        return self.judge.kind == "endpoint"


@dataclass(frozen=True)
class HttpRewardConfig(RewardConfig, HttpClientConfig):
    """``kind: http``: a reward service (protocol: docs/reward_service.md)."""

    kind: Literal["http"] = "http"
    """Selects this kind."""
    url: str = MISSING
    """Address of the service, as ``http://127.0.0.1:8000``; requests go to ``/v1/rewards`` below it."""
    token_env: str = ""
    """Name of the environment variable that holds the bearer token; empty sends none. The token itself is never
    written anywhere."""
    batch_size: int = 16
    """Conversations of one request."""
    cache_size: int = 65536
    """Scores that are cached by the hash of their conversation, so that no conversation is sent twice; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.url:
            raise ValueError(f"kind http needs url: {self.url!r}")
        if self.batch_size < 1 or self.cache_size < 0:
            raise ValueError(
                f"batch_size must be positive and cache_size not negative: {self.batch_size}, {self.cache_size}"
            )

    @property
    def source(self) -> str:
        return self.url

    @property
    def remote(self) -> bool:
        return True


@dataclass(frozen=True)
class FunctionRewardConfig(RewardConfig):
    """``kind: function``: a Python reward function."""

    kind: Literal["function"] = "function"
    """Selects this kind."""
    function: str = MISSING
    """``module:function`` or ``path/file.py:function`` with TRL's signature: it is called with
    ``prompts``, ``completions`` (lists of messages) and ``completion_ids`` and returns a list of numbers, None for no
    score. A module must be installed on every node."""

    def __post_init__(self) -> None:
        if not is_function(self.function):
            raise ValueError(f"kind function needs function=module:name or file.py:name: {self.function!r}")

    @property
    def source(self) -> str:
        return self.function


AnyRewardConfig = (
    CheckpointRewardConfig | EnsembleRewardConfig | GenerativeRewardConfig | HttpRewardConfig | FunctionRewardConfig
)
"""One of the kinds of reward model; the key ``kind`` selects it."""


@dataclass(frozen=True)
class TrainedRewardConfig(TrainedModelConfig):
    """A reward model in training: a transformer body with a linear head read at the last token."""

    attributes: list[str] = field(default_factory=list)
    """Names of the head's outputs; empty for a single score. ``[nemo]`` stands for the nine of NeMo-Aligner."""
    head: Literal["auto", "trained", "new"] = "auto"
    """``trained``: the checkpoint must have a head. ``new``: it is drawn from ``run.seed``. ``auto``: drawn if the
    checkpoint has none."""
    from_attribute: str = "helpfulness"
    """The output from which a single score starts, if the checkpoint has several (HelpSteer2-Preference:
    helpfulness)."""


@dataclass(frozen=True)
class CriticConfig(TrainedModelConfig):
    """A value function in training: a transformer body whose scalar head is read at every response token."""

    reward_head: RewardHead = "auto"
    """How the reward model that the critic starts from gives its score, as ``reward.head``; ``yes_no`` is refused. This
    and the next two are not read with ``head: new``."""
    attributes: list[str] = field(default_factory=list)
    """As ``reward.attributes``."""
    weights: dict[str, float] = field(default_factory=dict)
    """As ``reward.weights``: of a head of several attributes the critic starts from their weighted sum."""
    head: Literal["trained", "new"] = "trained"
    """``trained``: values start as the scores of a reward model; a checkpoint without such a head is refused.
    ``new``: a head that the checkpoint lacks is drawn from ``run.seed``, so that a critic can start from the policy,
    with ``critic.path: ${policy.path}``."""


@dataclass(frozen=True)
class CriticFromRewardConfig(CriticConfig):
    """The default critic: it starts from the reward model (InstructGPT, arXiv 2203.02155; HelpSteer2, arXiv
    2406.08673). If the reward is not a checkpoint, give ``critic.path``. A recipe with another ``critic.path`` and a
    pinned ``reward.revision`` must also give ``critic.revision``."""

    # Without an annotation, so that it is not a field. Shown if the reward is not a checkpoint.
    remedy = (
        "this reward is no checkpoint: start the critic from the policy: critic.path=${policy.path} critic.head=new"
    )

    path: str = "${reward.path}"
    """Follows the reward model."""
    revision: str | None = "${reward.revision}"
    """Follows the reward model."""
    dtype: DType = "${reward.dtype}"  # type: ignore[assignment]
    """Follows the reward model."""
    trust_remote_code: bool = "${reward.trust_remote_code}"  # type: ignore[assignment]
    """Follows the reward model."""
    reward_head: RewardHead = "${reward.head}"  # type: ignore[assignment]
    """Follows the reward model."""
    attributes: list[str] = "${reward.attributes}"  # type: ignore[assignment]
    """Follows the reward model."""
    weights: dict[str, float] = "${reward.weights}"  # type: ignore[assignment]
    """Follows the reward model."""
