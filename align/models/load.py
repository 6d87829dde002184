"""Loading transformers models as a recipe says, and refusing what would silently be something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from align.config import (
    CheckpointRewardConfig,
    CriticConfig,
    ModelConfig,
    PolicyConfig,
    TrainedModelConfig,
    TrainedRewardConfig,
)
from align.data.attributes import resolve_attributes
from align.data.chat import TRUST
from align.errors import ModelError
from align.models import heads, invariance, weights
from align.models.attention import FLASH, implementation
from align.models.lora import HEAD, add_lora
from align.models.weights import (
    INDEX,
    SINGLE,
    check_numbers,
    first_line,
    no_safetensors,
    read_json,
    stored_file,
    weight_files,
)

HeadSource = Literal["auto", "trained", "new"]


def check(section: ModelConfig, vocab_size: int, name: str = "", sampled: int = 0) -> None:
    """What can be told of a role's checkpoint without reading its weights, before any worker starts.

    Raises `ModelError` for an incomplete model folder, a config that cannot be read or does not fit a tokenizer of
    ``vocab_size`` entries, and for weight files of a folder that are missing, damaged or no safetensors. Of a hub id
    only the config is fetched; `causal_lm` and `scorer` see to the rest. ``name`` is that of the section, for messages.
    ``sampled`` is the longest prompt with its response, in tokens, of a model that samples.
    """
    try:
        _check(section, vocab_size, sampled)
    except ModelError as error:
        where = error.where or (f"{name}.path" if name else None)
        raise ModelError(error.message, where=where, remedy=error.remedy) from error


def _check(section: ModelConfig, vocab_size: int, sampled: int) -> None:
    _check_source(section)
    config = _config(section, vocab_size)
    if sampled:
        invariance.check_sampling(config, sampled)
    if isinstance(section, TrainedRewardConfig):
        start_of(section)
    unread: list[str] = []
    if type(section) is not ModelConfig:  # the files of a checkpoint that no role reads
        unread = list(_check_architecture(section, config)._keys_to_ignore_on_load_unexpected or ())
    if not section.init and Path(section.path).expanduser().is_dir():
        for file in weight_files(section):
            check_numbers(file, unread)


def _check_architecture(section: ModelConfig, config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model without memory for its weights, so that transformers refuses now what it would refuse later."""
    scores = isinstance(section, (CriticConfig, TrainedRewardConfig))
    if isinstance(section, CheckpointRewardConfig):
        classifier = bool(section.init) or is_classifier(config)
        scores = section.head in ("sequence_classification", "attributes") or (section.head == "auto" and classifier)
    model = _on_meta(AutoModelForSequenceClassification if scores else AutoModelForCausalLM, section, config)
    if scores:
        _require_score(section, model)
    else:
        _require_language_model(section, config)
        invariance.require_causal(model)
    if (
        isinstance(section, TrainedModelConfig)
        and section.gradient_checkpointing
        and not model.supports_gradient_checkpointing
    ):
        problem = f"{section.path}: {type(model).__name__} does not support gradient_checkpointing"
        raise ModelError(problem, remedy="leave gradient_checkpointing out")
    return model


def _require_language_model(section: ModelConfig, config: PreTrainedConfig) -> None:
    """A classifier with tied embeddings has all weights of a language model, so only its config tells."""
    if not section.init and is_classifier(config):
        raise ModelError(
            f"{section.path}: not a causal language model, but {', '.join(config.architectures or [])}, a reward model",
            remedy="name the language model that answers, or that the reward model was trained from",
        )


def _on_meta(auto: Any, section: ModelConfig, config: PreTrainedConfig) -> PreTrainedModel:
    """The model with parameters on the meta device, which hold no numbers."""
    elsewhere = section.attention == FLASH and not torch.cuda.is_available()  # the GPUs of a Ray cluster
    built_as = replace(section, attention="eager") if elsewhere and implementation(section, config) else section
    with torch.device("meta"):
        model = _untrained(auto, built_as, config)
    if elsewhere and not model._supports_flash_attn:
        problem = f"{section.path}: {type(model).__name__} does not support attention={FLASH}"
        raise ModelError(problem, remedy="use attention=auto")
    return model


def check_lora(section: TrainedModelConfig, vocab_size: int, key: str) -> None:
    """Put the adapters of a role on a model of its config that has no weights. Raises as `align.models.lora.add_lora`
    does; ``key`` is that of the targets in the recipe."""
    if not section.lora:
        return
    model = without_weights(section, vocab_size)
    task = "CAUSAL_LM" if isinstance(section, PolicyConfig) else "SEQ_CLS"
    add_lora(model, section.lora, task=task, key=key)


def _check_source(section: ModelConfig) -> None:
    """Refuse a folder that is not there, and adapters, which transformers would put on whatever base they name."""
    if section.init:
        return
    folder = Path(section.path).expanduser()
    looks_local = section.path.startswith((".", "/", "~")) or section.path.count("/") > 1
    missing = looks_local and not (folder / "config.json").is_file()
    if missing and not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"no model folder: {folder / 'config.json'} does not exist", remedy="give a folder or a hub id"
        )
    if adapter := stored_file(section, "adapter_config.json"):
        base = read_json(Path(adapter)).get("base_model_name_or_path")
        raise ModelError(
            f"{section.path}: holds adapters for {base}, not a whole model",
            remedy="merge them into that model and save it (peft: merge_and_unload), then give the folder",
        )


def config(section: ModelConfig, vocab_size: int = 0) -> PreTrainedConfig:
    """The config of a role's model; ``init`` takes ``vocab_size`` where it names none."""
    return _config(section, vocab_size)


def _config(section: ModelConfig, vocab_size: int, **changes: Any) -> PreTrainedConfig:
    """The checkpoint's config, or that of ``init`` with the tokenizer's vocabulary, with dropout as the recipe says."""
    try:
        if section.init:
            # The family's own stop id, 2 or 50256, is that of another tokenizer.
            fields = {"vocab_size": vocab_size, "eos_token_id": None, **section.init}
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:
            config = AutoConfig.from_pretrained(
                section.path, revision=section.revision, trust_remote_code=section.trust_remote_code
            )
    except KeyError as error:
        raise ModelError(f"init needs a model_type that transformers knows: {error}") from error
    except (OSError, ValueError) as error:
        remedy = TRUST if "trust_remote_code" in str(error) else None
        raise ModelError(f"cannot read the config of {section.path}: {first_line(error)}", remedy=remedy) from error
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"{section.path}: the checkpoint is quantized, and dtype={section.dtype} asks for its plain weights",
            remedy="give the checkpoint as it was before it was quantized",
        )
    embedded = _embedded(config, vocab_size)
    if vocab_size > embedded:
        raise ModelError(
            f"{section.path}: the tokenizer has {vocab_size} entries, the model embeds only {embedded}",
            remedy="give the tokenizer that belongs to the model",
        )
    rate = section.dropout if isinstance(section, TrainedModelConfig) else 0.0
    invariance.set_dropout(config, rate)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _embedded(config: PreTrainedConfig, default: int) -> int:
    """Rows of the embedding."""
    return getattr(config.get_text_config(), "vocab_size", default)


def _untrained(auto: Any, section: ModelConfig, config: PreTrainedConfig) -> PreTrainedModel:
    """The model with random weights."""
    common = {"attn_implementation": implementation(section, config), "dtype": getattr(torch, section.dtype)}
    if section.revision and section.trust_remote_code and auto.__name__ in (getattr(config, "auto_map", None) or {}):
        registered = auto._model_mapping.get(type(config), None)  # by an earlier call, which takes no such argument
        if registered is None or registered.__module__.startswith("transformers."):
            common["code_revision"] = section.revision  # the pinned one, not the newest
    try:
        model = auto.from_config(config, trust_remote_code=section.trust_remote_code, **common)
    except Exception as error:  # of any kind, where a config does not fit
        with_attention = "" if section.attention == "auto" else f" with attention={section.attention}"
        raise ModelError(
            f"transformers cannot build {section.path}{with_attention}: {first_line(error)}",
            remedy="use attention=auto" if with_attention else None,
        ) from error
    invariance.apply(model)
    return model


def _build(auto: Any, section: ModelConfig, config: PreTrainedConfig, seed: int) -> tuple[PreTrainedModel, set[str]]:
    """The model and the names of weights that no checkpoint supplied (their values follow from ``seed``)."""
    torch.manual_seed(seed)
    if section.init:
        return _untrained(auto, section, config), set()
    if Path(section.path).expanduser().is_dir():
        weight_files(section)
    elif not (stored_file(section, SINGLE) or stored_file(section, INDEX)):
        raise no_safetensors(section, [])  # transformers would have a server of the hub convert pickled ones
    try:
        model, info = auto.from_pretrained(
            section.path,
            config=config,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation=implementation(section, config),
            dtype=getattr(torch, section.dtype),
        )
    except (ImportError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load {section.path}: {first_line(error)}") from error
    invariance.apply(model)
    unread = sorted(name for name in info["unexpected_keys"] if HEAD.match(name))
    if unread and auto is AutoModelForSequenceClassification:
        raise ModelError(
            f"{section.path}: {type(model).__name__} does not read {', '.join(unread)}, so its scores would be others",
            remedy="give a head without bias; that of one score may be left out and taken off by reward shaping",
        )
    return model, set(info["missing_keys"])


def causal_lm(section: ModelConfig, vocab_size: int, seed: int, gaps: tuple[int, ...] = ()) -> PreTrainedModel:
    """A causal language model; every weight must be in the checkpoint.

    Where its head has more rows than ``vocab_size``, or the tokenizer has ``gaps``, it predicts the tokenizer's ids
    alone (`align.models.heads.restrict`).
    """
    _check_source(section)
    config = _config(section, vocab_size)
    _require_language_model(section, config)
    model, missing = _build(AutoModelForCausalLM, section, config, seed)
    if missing:
        raise ModelError(
            f"{section.path}: not a causal language model, it lacks {len(missing)} weights: "
            + ", ".join(sorted(missing)[:3])
        )
    if gaps or vocab_size < _embedded(model.config, vocab_size):
        heads.restrict(model, heads.TokenizerIds(vocab_size, gaps))
    return model


def without_weights(section: ModelConfig, vocab_size: int) -> PreTrainedModel:
    """The model of a role that trains, with parameters on the meta device, which hold no numbers."""
    config: Any = _config(section, vocab_size)
    if isinstance(section, TrainedRewardConfig):
        config.num_labels = start_of(section)[0]
    auto: Any = AutoModelForCausalLM if isinstance(section, PolicyConfig) else AutoModelForSequenceClassification
    model = _on_meta(auto, section, config)
    if not section.init and (file := stored_file(section, "generation_config.json")) and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(Path(file).parent)
    return model


def start_of(section: TrainedRewardConfig) -> tuple[int, list[float] | None]:
    """``num_labels`` and ``combine`` by which `scorer` makes the head that a reward model in training starts from.

    Raises `ModelError` where the checkpoint's head has other outputs than the recipe names, or none to go on with.
    """
    names, outputs = resolve_attributes(section.attributes), () if section.head == "new" else labels(section)
    if not outputs and section.head == "trained" and not section.init:
        raise ModelError(
            f"{section.path}: reward.head is trained, and the checkpoint is no sequence classifier",
            remedy="name a reward model, or have a head drawn: reward.head=auto",
        )
    unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(outputs))
    if names and outputs and (len(names) != len(outputs) or not (unnamed or names == outputs)):
        raise ModelError(
            f"{section.path}: its head has the outputs {', '.join(outputs)}, reward.attributes are {', '.join(names)}",
            remedy="name those in their order, or have a head drawn: reward.head=new",
        )
    if names or len(outputs) < 2:
        return max(1, len(names)), None
    if section.from_attribute not in outputs:
        raise ModelError(
            f"{section.path}: its head has no output {section.from_attribute}, but {', '.join(outputs)}",
            remedy="set reward.from_attribute to one of them, or have a head drawn: reward.head=new",
        )
    return 1, [float(name == section.from_attribute) for name in outputs]


def scorer(
    section: ModelConfig,
    vocab_size: int,
    seed: int,
    *,
    head: HeadSource,
    num_labels: int = 1,
    combine: Sequence[float] | None = None,
) -> PreTrainedModel:
    """A sequence classifier with ``num_labels`` outputs.

    ``head``: ``trained`` refuses a checkpoint that lacks one, because transformers would fill it with noise and only
    warn; ``auto`` draws it from ``seed`` where the checkpoint has none, ``new`` in any case. ``combine`` holds a weight
    for each output of the checkpoint and makes one output of them, with the row ``sum_k combine[k] row k``; without it
    a checkpoint of another number of outputs is refused. Raises `ModelError`.
    """
    _check_source(section)
    config: Any = _config(section, vocab_size)
    brings = not section.init and is_classifier(config)
    stored = config.num_labels if brings else num_labels
    if brings and head != "new" and stored != (num_labels if combine is None else len(combine)):
        expected = f"{num_labels} wanted" if combine is None else f"{len(combine)} weights given"
        remedy = "name the attributes that the checkpoint has, or, to train, draw a head: reward.head=new"
        raise ModelError(f"{section.path}: its head has {stored} outputs, {expected}", remedy=remedy)
    config.num_labels = stored
    model, missing = _build(AutoModelForSequenceClassification, section, config, seed)
    unexpected = {name for name in missing if head == "trained" or not HEAD.match(name)}
    if unexpected:
        raise ModelError(
            f"{section.path}: no trained reward head, the checkpoint lacks {', '.join(sorted(unexpected)[:3])}",
            remedy="train one first (algorithm: reward_model), or name the right reward.head",
        )
    _require_score(section, model)
    if brings and head == "new":
        drawn_AH = torch.empty(num_labels, config.hidden_size)
        std = getattr(config, "initializer_range", 0.02)
        _replace_head(model, drawn_AH.normal_(std=std, generator=torch.Generator().manual_seed(seed)))
    elif brings and combine is not None:
        rows_KH = weights.stored(section, "score.weight").double()
        _replace_head(model, (torch.tensor(combine, dtype=torch.float64) @ rows_KH)[None])
    return model


def _require_score(section: ModelConfig, model: PreTrainedModel) -> None:
    if not hasattr(model, "score"):
        raise ModelError(f"{section.path}: {type(model).__name__} has no `score` head", remedy="use a decoder model")


def _replace_head(model: Any, weight_AH: torch.Tensor) -> None:
    """Give the model a head of these weights. It is whole even where the model is sharded: ZeRO 3 shards what it finds
    whole when training starts."""
    old = model.score
    if getattr(old, "bias", None) is not None:
        raise ModelError(f"{model.config.name_or_path}: its `score` head has a bias, which cannot be taken over")
    layer = torch.nn.Linear(weight_AH.shape[1], len(weight_AH), bias=False)
    layer.weight = torch.nn.Parameter(weight_AH.to(old.weight.dtype))
    model.score = layer
    model.config.num_labels = model.num_labels = len(weight_AH)


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint's config names a head that scores sequences."""
    return (config.architectures or ["?"])[0].endswith("ForSequenceClassification")


def labels(section: ModelConfig) -> tuple[str, ...]:
    """Names of the outputs of a checkpoint that is a classifier; none where it is not, or is drawn (``init``)."""
    if section.init:
        return ()
    _check_source(section)
    config: Any = _config(section, 0)
    return tuple(config.id2label[i] for i in range(config.num_labels)) if is_classifier(config) else ()


def row_zero(section: ModelConfig) -> torch.Tensor:
    """Row 0 of a checkpoint's language-model head, (hidden,): what such a reward model scores with, alone."""
    remedy = "kind lm_head_row0 reads checkpoints whose output layer is a weight of its own"
    return weights.stored(section, "lm_head.weight", 0, remedy)
