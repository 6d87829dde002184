"""Sections of judges: reward models, services, functions and judges that write; and the critic that starts from one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from align.config.generators import HttpClientConfig, is_function
from align.config.genrm import GenerativeConfig
from align.config.models import DType, ModelConfig, TrainedModelConfig

RewardKind = Literal[
    "auto",
    "sequence_classification",
    "attributes",
    "lm_head_row0",
    "yes_no",
    "generative",
    "http",
    "function",
]


@dataclass(frozen=True)
class HttpConfig(HttpClientConfig):
    """How a reward service is called (``kind: http``); `docs/reward_service.md` has its protocol."""

    url: str = ""
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
        if self.batch_size < 1 or self.cache_size < 0:
            raise ValueError(
                f"batch_size must be positive and cache_size not negative: {self.batch_size}, {self.cache_size}"
            )


@dataclass(frozen=True)
class EnsembleConfig:
    """Further reward models that judge every response beside ``path``, on the same slots."""

    paths: list[str] = field(default_factory=list)
    """Folders or hub ids, read as ``path`` is: each by its own kind where ``kind`` is auto. Hub ids are taken at their
    default branch, and code that comes with them is not run."""
    combine: Literal["mean", "minimum", "penalized"] = "mean"
    """``mean`` of the scores, their ``minimum``, or ``penalized``: mean - ``penalty`` * standard deviation (Coste et
    al. 2023, arXiv 2310.02743, section 3.2: minimum is their worst-case, penalized their uncertainty-weighted one)."""
    penalty: float = 1.0
    """Weight of the standard deviation over the models, ``penalized`` only."""

    def __post_init__(self) -> None:
        if self.penalty < 0:
            raise ValueError(f"penalty must not be negative: {self.penalty}")


@dataclass(frozen=True)
class RewardConfig(ModelConfig):
    """A frozen reward model, or another judge of responses that takes its place."""

    path: str = ""
    """Folder in Hugging Face layout, or a hub id. Given but with kind ``generative``, ``http`` or ``function``."""
    kind: RewardKind = "auto"
    """How the score is read. ``sequence_classification``: the one-label head at the last token. ``attributes``: a head
    of several attributes at the last token, as ``weights`` add them up. ``lm_head_row0``: the logit of vocabulary id 0
    at the last token (Llama-3.x-Nemotron-70B-Reward). ``yes_no``: logit of Yes less that of No after a question
    (Llama-3.3-Nemotron-70B-Reward-Principle). ``generative``: a judge that writes a verdict. ``http``: a reward
    service. ``function``: Python. ``auto``: by what the checkpoint says of itself."""
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
    http: HttpConfig = field(default_factory=HttpConfig)
    """The service (kind ``http``)."""
    generative: GenerativeConfig = field(default_factory=GenerativeConfig)
    """The judge that writes (kind ``generative``)."""
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    """Further models beside ``path``."""
    normalize: bool = False
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
        if self.kind == "function" and not is_function(self.function):
            raise ValueError(f"kind function needs function=module:name or file.py:name: {self.function!r}")
        if (self.kind == "generative") != self.generative.judge.present:
            raise ValueError(
                "kind generative, and no other, needs generative.judge.path, or generative.judge.kind endpoint or "
                f"function: {self.kind}, {self.generative.judge.path!r}, {self.generative.judge.kind}"
            )
        if not self.is_model and (self.path or self.ensemble.paths):
            raise ValueError(
                f"kind {self.kind} reads no checkpoint: path {self.path!r}, ensemble.paths {self.ensemble.paths}"
            )
        if not self.is_model and (self.normalize or self.chat_template or self.date):
            raise ValueError(
                f"kind {self.kind} has no template and no moments: normalize {self.normalize}, chat_template "
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
        """Whether the role holds a reward checkpoint, which a score is read from."""
        return self.kind not in ("generative", "http", "function")

    @property
    def source(self) -> str:
        """What judges: the folder, id, address or function that the recipe names."""
        if self.kind == "generative":
            judge = self.generative.judge
            return judge.path or judge.function or f"{judge.endpoint.model} at {judge.endpoint.url}"
        return self.path or self.http.url or self.function

    @property
    def remote(self) -> bool:
        """Whether scores come from elsewhere, so that what is counted depends on the moment."""
        return self.kind == "http" or (self.kind == "generative" and self.generative.judge.kind == "endpoint")

    @property
    def present(self) -> bool:
        """Whether the recipe names a judge."""
        return bool(self.path) or not self.is_model


@dataclass(frozen=True)
class OptionalRewardConfig(RewardConfig):
    """A frozen reward model that is absent unless ``path`` is given, or a kind that needs none."""


@dataclass(frozen=True)
class EvalRewardConfig(OptionalRewardConfig):
    """A second reward model that is never learned from: a gain that it does not share is the first one's mistake."""


@dataclass(frozen=True)
class TrainedRewardConfig(TrainedModelConfig):
    """A reward model in training: a transformer body with a linear head read at the last token."""

    attributes: list[str] = field(default_factory=list)
    """Names of the head's outputs; empty for one score. ``[nemo]`` stands for the nine of NeMo-Aligner."""
    head: Literal["auto", "trained", "new"] = "auto"
    """``trained``: the checkpoint must bring a head. ``new``: it is drawn from ``run.seed``. ``auto``: drawn where the
    checkpoint has none."""
    from_attribute: str = "helpfulness"
    """Which output of a checkpoint with several the one score starts from (HelpSteer2-Preference: helpfulness)."""


@dataclass(frozen=True)
class CriticConfig(TrainedModelConfig):
    """A value function in training: a transformer body whose scalar head is read at every response token."""

    kind: RewardKind = "auto"
    """How the reward model that it starts from gives its score, as ``reward.kind``; one without a head (``yes_no``,
    ``generative``, ``http``, ``function``) is refused. This and the next two are not read with ``head: new``."""
    attributes: list[str] = field(default_factory=list)
    """As ``reward.attributes``."""
    weights: dict[str, float] = field(default_factory=dict)
    """As ``reward.weights``: of a head of several attributes the critic starts from their weighted sum."""
    head: Literal["trained", "new"] = "trained"
    """``trained``: values start as the scores of a reward model; a checkpoint without such a head is refused.
    ``new``: a head that the checkpoint lacks is drawn from ``run.seed``, so that a critic can start from the policy."""


@dataclass(frozen=True)
class CriticFromRewardConfig(CriticConfig):
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
