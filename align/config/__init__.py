"""Schemas of recipes and of the files of other commands. Importing this package loads no torch.

A docstring with unit and origin of the default follows every field; ``MISSING`` marks a required value. Each field of a
recipe whose type is a `RoleConfig` becomes a role, unless it is null or the recipe does not use it.
"""

from align.config.base import (
    CheckpointConfig,
    ClusterConfig,
    CudaOption,
    DataConfig,
    DataFormat,
    RecipeConfig,
    RowKind,
    RunConfig,
    SourceConfig,
    TrackerName,
)
from align.config.editing import EditingConfig
from align.config.eval import BenchmarkDataConfig, RewardEvaluationConfig
from align.config.eval_policy import PolicyEvaluationConfig, QuestionDataConfig
from align.config.generators import (
    AnyGeneratorConfig,
    EndpointGeneratorConfig,
    FunctionGeneratorConfig,
    GeneratorConfig,
    HttpClientConfig,
    ModelGeneratorConfig,
)
from align.config.genrm import GenerativeConfig, JudgeSamplingConfig
from align.config.losses import PolicyLossConfig, PreferenceLossConfig
from align.config.models import (
    DType,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    ReferenceConfig,
    ReferenceFromPolicyConfig,
    RoleConfig,
    SamplerConfig,
    TrainedModelConfig,
)
from align.config.rewards import (
    AnyRewardConfig,
    CheckpointRewardConfig,
    CriticConfig,
    CriticFromRewardConfig,
    EnsembleRewardConfig,
    FunctionRewardConfig,
    GenerativeRewardConfig,
    HttpRewardConfig,
    RewardConfig,
    RewardHead,
    TrainedRewardConfig,
)
from align.config.rl import EvaluationConfig, OnPolicyConfig, PolicyGradientConfig, RewardShapingConfig
from align.config.sampling import SamplingConfig
from align.config.scale import ScaleConfig, ScalePromptsConfig, SweepConfig
from align.config.serve import ReplicasConfig, RewardServiceConfig
from align.config.steerlm import PreviousPolicyConfig, PriorPolicyConfig, SteeringConfig
from align.config.verdicts import VerdictConfig

__all__ = [
    "AnyGeneratorConfig",
    "AnyRewardConfig",
    "BenchmarkDataConfig",
    "CheckpointConfig",
    "CheckpointRewardConfig",
    "ClusterConfig",
    "CriticConfig",
    "CriticFromRewardConfig",
    "CudaOption",
    "DType",
    "DataConfig",
    "DataFormat",
    "EditingConfig",
    "EndpointGeneratorConfig",
    "EnsembleRewardConfig",
    "EvaluationConfig",
    "FunctionGeneratorConfig",
    "FunctionRewardConfig",
    "GenerativeConfig",
    "GenerativeRewardConfig",
    "GeneratorConfig",
    "HttpClientConfig",
    "HttpRewardConfig",
    "JudgeSamplingConfig",
    "LoraConfig",
    "ModelConfig",
    "ModelGeneratorConfig",
    "OnPolicyConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "PolicyEvaluationConfig",
    "PolicyGradientConfig",
    "PolicyLossConfig",
    "PreferenceLossConfig",
    "PreviousPolicyConfig",
    "PriorPolicyConfig",
    "QuestionDataConfig",
    "RecipeConfig",
    "ReferenceConfig",
    "ReferenceFromPolicyConfig",
    "ReplicasConfig",
    "RewardConfig",
    "RewardEvaluationConfig",
    "RewardHead",
    "RewardServiceConfig",
    "RewardShapingConfig",
    "RoleConfig",
    "RowKind",
    "RunConfig",
    "SamplerConfig",
    "SamplingConfig",
    "ScaleConfig",
    "ScalePromptsConfig",
    "SourceConfig",
    "SteeringConfig",
    "SweepConfig",
    "TrackerName",
    "TrainedModelConfig",
    "TrainedRewardConfig",
    "VerdictConfig",
]
