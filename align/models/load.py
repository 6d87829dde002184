"""Loading transformers models as a recipe says, and refusing what would silently be something else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import peft
import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from align.data.chat import TRUST
from align.errors import ModelError
from align.models.attention import PACKED, is_plain
from align.sections import Lora, Model, Trained

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Where transformers looks for safetensors, in this order."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Number formats of safetensors that weights are read from."""
_HEAD = re.compile(r"^score\.")


def check(section: Model, vocab_size: int) -> None:
    """What can be told of a role's checkpoint without reading its weights, before any worker starts.

    Raises `ModelError` for a folder that is no whole model, a config that cannot be read or does not fit a tokenizer of
    ``vocab_size`` entries, and for weight files of a folder that are missing, damaged or no safetensors. Of a hub id
    only the config is fetched; `causal_lm` and `scorer` see to the rest.
    """
    _check_source(section)
    _attention(section, _config(section, vocab_size))
    if not section.init and Path(section.path).expanduser().is_dir():
        for file in _weight_files(section):
            _check_weights(file)


def _check_source(section: Model) -> None:
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
    if adapter := _file(section, "adapter_config.json"):
        base = _json(Path(adapter)).get("base_model_name_or_path")
        raise ModelError(
            f"{section.path}: holds adapters for {base}, not a whole model",
            remedy="merge them into that model and save it (peft: merge_and_unload), then give the folder",
        )


def _weight_files(section: Model) -> list[Path]:
    """The safetensors files of a checkpoint in a folder, all of them there."""
    folder = Path(section.path).expanduser()
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise _no_safetensors(section, sorted(file.name for file in folder.glob("*.bin")))
    weights = _json(folder / INDEX).get("weight_map")
    shards = sorted({str(shard) for shard in weights.values()}) if isinstance(weights, dict) else []
    if not shards:
        raise ModelError(f"{folder / INDEX} has no weight_map", remedy="copy or download the checkpoint again")
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ModelError(
                f"{folder / INDEX} names {shard}, which is not in the folder",
                remedy="copy or download the checkpoint again",
            )
    return [folder / shard for shard in shards]


def _no_safetensors(section: Model, pickles: list[str]) -> ModelError:
    others = f", but {', '.join(pickles[:3])}: pickles, which can run code when they are loaded" if pickles else ""
    return ModelError(
        f"{section.path}: there are no weights in {SINGLE} or {INDEX}{others}",
        remedy="give a checkpoint in safetensors; where you trust a pickled one, load it elsewhere and save it again",
    )


def _check_weights(file: Path) -> None:
    """Read the header of a file, and refuse numbers that would be cast to something else than what they mean."""
    try:
        with safe_open(file, framework="pt") as tensors:
            kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} is damaged: {_first_line(error)}", remedy="copy or download it again") from error
    for name, kind in kinds.items():
        if kind not in FLOATS:
            raise ModelError(
                f"{file}: {name} holds {kind} numbers, a quantised weight without its scale; readable: "
                f"{', '.join(FLOATS)}",
                remedy="give the checkpoint as it was before it was quantised",
            )


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {_first_line(error)}") from error
    return found if isinstance(found, dict) else {}


def _config(section: Model, vocab_size: int, **changes: Any) -> PreTrainedConfig:
    """The checkpoint's config, or that of ``init`` with the tokenizer's vocabulary, with dropout as the recipe says."""
    try:
        if section.init:
            fields = {"vocab_size": vocab_size, **section.init}
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:
            config = AutoConfig.from_pretrained(
                section.path, revision=section.revision, trust_remote_code=section.trust_remote_code
            )
    except KeyError as error:
        raise ModelError(f"init needs a model_type that transformers knows: {error}") from error
    except (OSError, ValueError) as error:
        remedy = TRUST if "trust_remote_code" in str(error) else None
        raise ModelError(f"cannot read the config of {section.path}: {_first_line(error)}", remedy=remedy) from error
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"{section.path}: the checkpoint is quantised, and dtype={section.dtype} asks for its plain weights",
            remedy="give the checkpoint as it was before it was quantised",
        )
    embedded = getattr(config.get_text_config(), "vocab_size", vocab_size)
    if vocab_size > embedded:
        raise ModelError(
            f"{section.path}: the tokenizer has {vocab_size} entries, the model embeds only {embedded}",
            remedy="give the tokenizer that belongs to the model",
        )
    rate = section.dropout if isinstance(section, Trained) else 0.0
    for name in vars(config):
        if name.endswith(("dropout", "_pdrop")) and isinstance(getattr(config, name), (int, float)):
            setattr(config, name, rate)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _attention(section: Model, config: PreTrainedConfig) -> str:
    if section.attention == "auto":
        return PACKED if is_plain(config) else "sdpa"
    if section.attention == PACKED and not is_plain(config):
        raise ModelError(
            f"{section.path}: attention=packed does not fit {config.model_type} with its layer types",
            remedy="use attention=sdpa or auto",
        )
    return section.attention


def _build(auto: Any, section: Model, config: PreTrainedConfig, seed: int) -> tuple[PreTrainedModel, set[str]]:
    """The model and the names of weights that no checkpoint supplied (their values follow from ``seed``)."""
    torch.manual_seed(seed)
    dtype = getattr(torch, section.dtype)
    common = {"attn_implementation": _attention(section, config), "dtype": dtype}
    if section.init:
        return auto.from_config(config, **common), set()
    if Path(section.path).expanduser().is_dir():
        _weight_files(section)
    elif not (_file(section, SINGLE) or _file(section, INDEX)):
        raise _no_safetensors(section, [])  # transformers would have a server of the hub convert pickled ones
    try:
        model, info = auto.from_pretrained(
            section.path,
            config=config,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **common,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load {section.path}: {_first_line(error)}") from error
    return model, set(info["missing_keys"])


def causal_lm(section: Model, vocab_size: int, seed: int) -> PreTrainedModel:
    """A causal language model; every weight must be in the checkpoint."""
    _check_source(section)
    model, missing = _build(AutoModelForCausalLM, section, _config(section, vocab_size), seed)
    if missing:
        raise ModelError(
            f"{section.path}: not a causal language model, it lacks {len(missing)} weights: "
            + ", ".join(sorted(missing)[:3])
        )
    return model


def scorer(section: Model, vocab_size: int, seed: int, *, new_head: bool) -> PreTrainedModel:
    """A sequence classifier with one label.

    With ``new_head`` (training) a head that the checkpoint lacks is drawn from ``seed``; otherwise such a checkpoint
    is refused, because transformers would fill the head with noise and only warn.
    """
    _check_source(section)
    config = _config(section, vocab_size)
    trained = (config.architectures or ["?"])[0].endswith("ForSequenceClassification")
    if not new_head and trained and config.num_labels != 1:
        raise ModelError(f"{section.path}: a reward model has one label, this checkpoint has {config.num_labels}")
    config.num_labels = 1
    model, missing = _build(AutoModelForSequenceClassification, section, config, seed)
    unexpected = {name for name in missing if not (new_head and _HEAD.match(name))}
    if unexpected:
        raise ModelError(
            f"{section.path}: no trained reward head, the checkpoint lacks {', '.join(sorted(unexpected)[:3])}",
            remedy="train one first (algorithm: reward_model), or name the right reward.kind",
        )
    if not hasattr(model, "score"):
        raise ModelError(f"{section.path}: {type(model).__name__} has no `score` head", remedy="use a decoder model")
    return model


def row_zero(section: Model) -> torch.Tensor:
    """Row 0 of a checkpoint's language-model head, (hidden,): what such a reward model scores with, alone."""
    name = "lm_head.weight"
    try:
        index = _file(section, INDEX)
        shard = json.loads(Path(index).read_text())["weight_map"].get(name, "") if index else SINGLE
        with safe_open(_file(section, shard) or shard, framework="pt") as tensors:
            return tensors.get_slice(name)[0]
    except (OSError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{section.path}: its safetensors hold no {name} ({_first_line(error)})",
            remedy="kind lm_head_row0 reads checkpoints whose output layer is a weight of its own",
        ) from error


def _file(section: Model, name: str) -> str | None:
    """A file of the checkpoint on this disk; None where it has none of that name."""
    return cached_file(
        str(Path(section.path).expanduser()) if Path(section.path).expanduser().is_dir() else section.path,
        name,
        revision=section.revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def reward_kind(section: Model, kind: str) -> str:
    """Resolve ``auto`` by the architecture that the checkpoint names."""
    if kind != "auto":
        return kind
    _check_source(section)
    config = _config(section, 0)
    names = config.architectures or ["?"]
    if names[0].endswith("ForSequenceClassification"):
        return "sequence_classification"
    raise ModelError(
        f"{section.path}: cannot tell how {names[0]} gives a reward",
        remedy="set reward.kind=lm_head_row0 for a Llama-3.x-Nemotron-70B-Reward, else give a sequence classifier",
    )


def add_lora(model: PreTrainedModel, lora: Lora, *, task: str) -> PreTrainedModel:
    """Inject adapters and freeze the rest; a new ``score`` head stays trainable. Returns the same model."""
    targets = "all-linear" if lora.targets == ["all-linear"] else lora.targets
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=cast(int, lora.alpha), lora_dropout=lora.dropout, target_modules=targets, task_type=task
    )
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or bool(_HEAD.match(name)))
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
