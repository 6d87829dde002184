"""Sections of a recipe that algorithms share. Importing this package loads no torch.

Every field is followed by a docstring with its unit and the origin of its default. ``MISSING`` marks
what a recipe must give. Role sections (`Model` and what extends it) are also the cast list: the launcher
starts one role for each field of a recipe whose type is a role section, but for those the recipe calls absent.
"""

from align.sections.editing import Editing
from align.sections.evaluation_policy import PolicyEvaluation, QuestionData
from align.sections.evaluation_reward import BenchmarkData, RewardEvaluation
from align.sections.generators import Endpoint, Generator
from align.sections.judging import Generative, JudgeSampling
from align.sections.losses import DirectLoss, PolicyLoss
from align.sections.rewards import (
    Critic,
    Ensemble,
    Http,
    OptionalReward,
    Reward,
    RewardKind,
    SecondReward,
    StartingCritic,
    TrainedReward,
)
from align.sections.roles import (
    DType,
    Lora,
    Model,
    Optimizer,
    Policy,
    Reference,
    Sampler,
    StartingPolicy,
    Trained,
)
from align.sections.rollouts import Evaluation, OnPolicy, PolicyGradient, Shaping
from align.sections.runs import Checkpoint, Cluster, Data, DataFormat, Reads, Recipe, Run, Source
from align.sections.sampling import Sampling
from align.sections.scaling import InferenceScaling, ScalingPrompts, Sweep
from align.sections.service import Replicas, RewardService
from align.sections.steering import Base, Previous, Steering
from align.sections.verdicts import Verdict

__all__ = [
    "Base",
    "BenchmarkData",
    "Checkpoint",
    "Cluster",
    "Critic",
    "DType",
    "Data",
    "DataFormat",
    "DirectLoss",
    "Editing",
    "Endpoint",
    "Ensemble",
    "Evaluation",
    "Generative",
    "Generator",
    "Http",
    "InferenceScaling",
    "JudgeSampling",
    "Lora",
    "Model",
    "OnPolicy",
    "Optimizer",
    "OptionalReward",
    "Policy",
    "PolicyEvaluation",
    "PolicyGradient",
    "PolicyLoss",
    "Previous",
    "QuestionData",
    "Reads",
    "Recipe",
    "Reference",
    "Replicas",
    "Reward",
    "RewardEvaluation",
    "RewardKind",
    "RewardService",
    "Run",
    "Sampler",
    "Sampling",
    "ScalingPrompts",
    "SecondReward",
    "Shaping",
    "Source",
    "StartingCritic",
    "StartingPolicy",
    "Steering",
    "Sweep",
    "Trained",
    "TrainedReward",
    "Verdict",
]
