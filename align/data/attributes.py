"""Names of the rated attributes, in the order of a model's outputs."""

from __future__ import annotations

from collections.abc import Sequence

from align.errors import ConfigError

HELPSTEER_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
"""What HelpSteer and HelpSteer2 rate, each 0 to 4."""

NEMO_ATTRIBUTES = ("quality", "toxicity", "humor", "creativity", *HELPSTEER_ATTRIBUTES)
"""The nine outputs of a regression reward model of NeMo-Aligner. HelpSteer rates the last five; in a comparison file
the first holds the strength of the preference."""


def resolve_attributes(names: Sequence[str]) -> tuple[str, ...]:
    """``names`` as they are, or the nine of NeMo-Aligner for ``[nemo]``. Raises `ConfigError` for one given twice."""
    attributes = NEMO_ATTRIBUTES if list(names) == ["nemo"] else tuple(names)
    if repeated := [name for name in dict.fromkeys(attributes) if attributes.count(name) > 1]:
        raise ConfigError(f"attributes lists {', '.join(repeated)} more than once", remedy="name each attribute once")
    return attributes
