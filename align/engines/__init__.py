"""Engines: what executes a model. The only place that names DeepSpeed."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported; unset, it searches and warns
