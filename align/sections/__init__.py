"""Sections of a recipe that algorithms share. Importing this package loads no torch.

Every field is followed by a docstring with its unit and the origin of its default. ``MISSING`` marks
what a recipe must give. Role sections (`Model` and what extends it) are also the cast list: the launcher
starts one role for each field of a recipe whose type is a role section, but for those the recipe calls absent.
"""

from align.sections.evaluation_reward import BenchmarkData, RewardEvaluation
from align.sections.losses import DirectLoss, PolicyLoss
from align.sections.roles import (
    Critic,
    DType,
    Ensemble,
    Http,
    Lora,
    Model,
    Optimizer,
    OptionalReward,
    Policy,
    Reference,
    Reward,
    RewardKind,
    Sampler,
    SecondReward,
    StartingCritic,
    StartingPolicy,
    Trained,
    TrainedReward,
)
from align.sections.rollouts import Evaluation, OnPolicy, PolicyGradient, Shaping
from align.sections.runs import Checkpoint, Cluster, Data, DataFormat, Recipe, Run, Sampling
from align.sections.service import Replicas, RewardService

__all__ = [
    "BenchmarkData",
    "Checkpoint",
    "Cluster",
    "Critic",
    "DType",
    "Data",
    "DataFormat",
    "DirectLoss",
    "Ensemble",
    "Evaluation",
    "Http",
    "Lora",
    "Model",
    "OnPolicy",
    "Optimizer",
    "OptionalReward",
    "Policy",
    "PolicyGradient",
    "PolicyLoss",
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
    "SecondReward",
    "Shaping",
    "StartingCritic",
    "StartingPolicy",
    "Trained",
    "TrainedReward",
]
