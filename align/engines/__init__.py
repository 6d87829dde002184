"""Engines execute models. The only package that imports DeepSpeed."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it on import; unset, it searches and warns
