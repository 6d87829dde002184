"""From a section to what it names, ready to answer."""

from __future__ import annotations

import torch

from align.generators.base import Generator
from align.generators.endpoint import EndpointGenerator
from align.generators.functions import FunctionGenerator
from align.generators.models import ModelGenerator
from align.sections import Generator as GeneratorSection


def open_generator(section: GeneratorSection, device: torch.device, seed: int = 0) -> Generator:
    """What a section names. ``seed`` is part of the noise of a model, and of what an endpoint is sent.

    Raises `ModelError`, `ConfigError` or `DataError`, each with a remedy.
    """
    match section.kind:
        case "endpoint":
            return EndpointGenerator(section.endpoint, seed)
        case "function":
            return FunctionGenerator(section.function)
        case _:
            return ModelGenerator(section, device, seed)
