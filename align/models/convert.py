"""A reward model that hides in a causal language model, as a sequence classifier."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from align import __version__
from align.data import chat
from align.data.chat import Renderer
from align.errors import ModelError
from align.models import exported_files, readme
from align.models.streaming import ModelFolder

OUTPUT = "lm_head.weight"


def row_zero(source: Path, out: Path, texts: Mapping[str, str]) -> str:
    """Write ``source``, whose score is row 0 of its output layer (Llama-3.x-Nemotron-70B-Reward), as a classifier of
    one label; returns the name of its class.

    The row becomes ``score.weight``, all other rows go. ``texts`` are written beside the model. Raises `ModelError`
    if the output layer is not a separate weight, or transformers has no classifier of this family.
    """
    folder = ModelFolder(source)
    config, where = dict(folder.config), str(source)
    if config.get("tie_word_embeddings") or OUTPUT not in folder.shapes:
        remedy = "row 0 of tied embeddings is a word, not a reward; name a model whose lm_head was trained as one"
        raise ModelError(f"has no output layer of its own ({OUTPUT})", where=where, remedy=remedy)
    name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config["model_type"])
    if name is None:
        raise ModelError(f"transformers has no sequence classifier for {config['model_type']}", where=where)
    config |= {
        "architectures": [name],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    tokenizer_files = _tokenizer_files(source, config)

    def kept(name: str, value: Tensor) -> dict[str, Tensor]:
        return {"score.weight": value[:1].clone()} if name == OUTPUT else {name: value}

    folder.rewrite(out, kept, {"config.json": json.dumps(config, indent=2) + "\n", **tokenizer_files, **texts})
    return name


def _tokenizer_files(source: Path, config: dict[str, Any]) -> dict[str, str]:
    """``README.md`` and files of the tokenizer that must name the padding token, text by name; sets ``pad_token_id``.

    By that id transformers' classifiers find the last token of a padded row, so it must end no conversation: they read
    the last token that is another. Raises `ModelError` where there is none.
    """
    tokenizer: Any = chat.load_tokenizer(source)
    ends = config.get("eos_token_id")
    used = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    rendered = None
    if tokenizer.chat_template is not None:
        rendered = exported_files.Chat.of(Renderer(tokenizer, section="tokenizer"), whole=True)
        used |= rendered.ids
    own, token = tokenizer.pad_token, exported_files.padding_token(tokenizer, used, (), config["vocab_size"])
    if token not in tokenizer.get_vocab():
        raise ModelError(
            f"has no padding token that is not an end of sequence: {own!r}",
            where=str(source),
            remedy="set pad_token in its tokenizer_config.json to a token that no conversation holds",
        )
    tokenizer.pad_token = token
    config["pad_token_id"] = tokenizer.pad_token_id
    names = () if token == own else ("tokenizer_config.json", "special_tokens_map.json")
    files = [source / name for name in names if (source / name).is_file()]
    changed = {file.name: json.loads(file.read_text(encoding="utf-8")) | {"pad_token": token} for file in files}
    texts = {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for name, content in changed.items()}
    origin = f"Written by `align convert row0` of align {__version__} from `{source}`: row 0 of its output layer."
    about = f"# Reward model\n\n{origin}\n"
    if rendered is not None:
        about = readme.reward(origin, rendered, tokenizer, pads=True, weighted=False, trust=False)
    return {readme.NAME: about, **texts}
