"""LoRA adapters on a model, and refusing targets whose update a checkpoint could not hold (docs/lora.md)."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import cast

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.config import LoraConfig
from align.errors import ModelError

ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)
"""Classes of modules that adapters are put on."""
ALL_LINEAR = "all-linear"
HEAD = re.compile(r"^score\.")
"""Names of the weights of a head that scores, which is trained whole beside the adapters."""


def add_lora(model: PreTrainedModel, lora: LoraConfig, *, task: str, key: str = "lora.targets") -> PreTrainedModel:
    """Inject adapters and freeze the rest, but for a ``score`` head. Returns the same model.

    Raises `ModelError`, which names ``key``, for a target that matches no module, that matches a module which cannot
    have adapters, or whose weight another module uses too: a merged checkpoint holds one weight for both, and the
    other module would read the update as well.
    """
    shared = _shared(model)
    usable = _usable(model, shared)
    for target in lora.targets if lora.targets != [ALL_LINEAR] else ():
        _check(model, target, shared, usable, key)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if lora.targets == [ALL_LINEAR] else lora.targets,
        exclude_modules=[name for name, module in model.named_modules() if _other_forward(module)] or None,
        task_type=task,
    )
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        remedy = "name one or more of " + ", ".join(name for name in usable if f"'{name}'" not in reason)
        raise ModelError(f"{', '.join(lora.targets)}: {reason}", where=key, remedy=remedy) from error
    for module in model.modules():
        if isinstance(module, LoraLayer):
            _refuse_shared(ALL_LINEAR, module.get_base_layer(), shared, usable, key)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or bool(HEAD.match(name)))
    return model


def _other_forward(module: nn.Module) -> bool:
    """A linear layer or embedding that computes something else, so that peft would add to another thing.

    Routers return tuples (Llama 4, Phi-3.5-MoE), embeddings shift or norm (OPT's positions); peft knows
    ``embed_scale``. Falcon's linear layer is a product, though in its own code.
    """
    forward = type(module).forward
    if isinstance(module, nn.Embedding):
        return forward is not nn.Embedding.forward and not hasattr(module, "embed_scale")
    if not isinstance(module, nn.Linear) or forward is nn.Linear.forward:
        return False
    rows, columns = module.out_features, module.in_features
    with torch.device("meta"):
        weights = {"weight": torch.empty(rows, columns)}
        weights |= {} if module.bias is None else {"bias": torch.empty(rows)}
        try:
            output = functional_call(module, weights, torch.empty(2, 3, columns))
        except Exception:
            return True
    return not isinstance(output, torch.Tensor) or output.shape != (2, 3, rows)


def _shared(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter that has more than one, by its id."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {parameter: owners for parameter, owners in names.items() if len(owners) > 1}


def _usable(model: nn.Module, shared: Mapping[int, Sequence[str]]) -> list[str]:
    """Last parts of the names of modules that may have adapters, in the order of the model."""
    names = (
        name
        for name, module in model.named_modules()
        if isinstance(module, ADAPTABLE)
        and not _other_forward(module)
        and not HEAD.match(f"{name}.")
        and not any(id(parameter) in shared for parameter in module.parameters())
    )
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _remedy(usable: Sequence[str]) -> str:
    return f"name one or more of {', '.join(usable)}, or {ALL_LINEAR} alone"


def _check(model: nn.Module, target: str, shared: Mapping[int, Sequence[str]], usable: Sequence[str], key: str) -> None:
    """A target matches modules as peft matches it, by full name or last parts, and only ones that fit."""
    matched = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name == target or name.endswith(f".{target}")
    }
    if not matched:
        close = difflib.get_close_matches(target, usable, n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise ModelError(
            f"{target} matches no module of {type(model).__name__}{hint}", where=key, remedy=_remedy(usable)
        )
    for name, module in matched.items():
        if HEAD.match(f"{name}."):
            raise ModelError(f"{name} is trained whole, without adapters", where=key, remedy=f"leave {target} out")
        if not isinstance(module, ADAPTABLE) or _other_forward(module):
            kind = type(module).__name__
            raise ModelError(
                f"{target} matches {name}, and a {kind} cannot have adapters", where=key, remedy=_remedy(usable)
            )
        _refuse_shared(target, module, shared, usable, key)


def _refuse_shared(
    target: str, module: nn.Module, shared: Mapping[int, Sequence[str]], usable: Sequence[str], key: str
) -> None:
    for parameter in module.parameters():
        if names := shared.get(id(parameter)):
            raise ModelError(
                f"{target}: {' and '.join(names)} are one weight (tied), so a merged checkpoint cannot hold an adapter "
                "of only one of the modules",
                where=key,
                remedy=f"{_remedy(usable)}; or train all weights, without adapters: rank 0",
            )
