"""A reward model that hides in a causal language model, as a sequence classifier."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from align.data import chat
from align.errors import ModelError
from align.models.streaming import Checkpoint

OUTPUT = "lm_head.weight"


def row_zero(source: Path, out: Path, texts: Mapping[str, str]) -> str:
    """Write ``source``, whose score is row 0 of its output layer (Llama-3.x-Nemotron-70B-Reward), as a classifier of
    one label; returns the name of its class.

    The row becomes ``score.weight``, all other rows go. ``texts`` are written beside the model. Raises `ModelError`
    where the output layer is not a weight of its own, or transformers has no classifier of this family.
    """
    found = Checkpoint(source)
    config, where = dict(found.config), str(source)
    if config.get("tie_word_embeddings") or OUTPUT not in found.shapes:
        remedy = "row 0 of tied embeddings is a word, not a reward; name a model whose lm_head was trained as one"
        raise ModelError(f"has no output layer of its own ({OUTPUT})", where=where, remedy=remedy)
    name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config["model_type"])
    if name is None:
        raise ModelError(f"transformers has no sequence classifier for {config['model_type']}", where=where)
    config |= {
        "architectures": [name],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": _padding(source, config),
    }

    def kept(name: str, value: Tensor) -> dict[str, Tensor]:
        return {"score.weight": value[:1].clone()} if name == OUTPUT else {name: value}

    found.rewrite(out, kept, {"config.json": json.dumps(config, indent=2) + "\n", **texts})
    return name


def _padding(source: Path, config: Mapping[str, Any]) -> int:
    """The id by which transformers' classifiers find the last token of a padded row. It must end no conversation:
    they read the last token that is another."""
    tokenizer: Any = chat.load_tokenizer(source)
    ends = config.get("eos_token_id")
    ending = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    for candidate in (config.get("pad_token_id"), tokenizer.pad_token_id):
        if candidate is not None and candidate not in ending:
            return int(candidate)
    raise ModelError(
        f"has no padding token that is not an end of sequence: {tokenizer.pad_token!r}",
        where=str(source),
        remedy="set pad_token in its tokenizer_config.json to a token that no conversation holds",
    )
