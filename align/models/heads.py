"""Heads that read log-probabilities or values of response tokens, or scores of a sequence, from a transformer.

All modules take a `Layout`, so trainers and engines never see padding. All run the language-model or score head only
on the hidden states that they read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from align.data.collate import Layout
from align.errors import ModelError
from align.models.attention import PACKED, is_plain
from align.ops import logprobs


def is_packed(model: PreTrainedModel) -> bool:
    """True if the model reads packed layouts."""
    return model.config._attn_implementation == PACKED


def lm_head(model: PreTrainedModel) -> nn.Module:
    """The layer from hidden states to logits."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise ModelError(f"{type(model).__name__} has no language-model head")
    return head


class LanguageModelHead(nn.Linear):
    """The linear layer from hidden states to logits, which can return log-probabilities in their place. At ZeRO 3 only
    the forward pass of this layer has its weight, because DeepSpeed's hooks gather it there."""

    def forward(self, hidden: Tensor, ids_N: Tensor | None = None, *read: Any) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """Logits of ``hidden``; with ids and the fields of `align.ops.logprobs.TokenRead`, what `of_hidden` returns."""
        if ids_N is None:
            return super().forward(hidden)
        return logprobs.of_hidden(hidden, self.weight, ids_N, logprobs.TokenRead(*read))


@dataclass(frozen=True)
class TokenizerIds:
    """The ids that a tokenizer has: those below ``size``, without ``gaps``."""

    size: int
    gaps: tuple[int, ...] = ()


def restrict(model: PreTrainedModel, ids: TokenizerIds) -> None:
    """Make `restricted` give no probability to ids that the tokenizer lacks: published models pad their embedding."""
    vars(model)["tokenizer_ids"] = ids


def tokenizer_ids(model: PreTrainedModel) -> TokenizerIds | None:
    """The ids set by `restrict`, else None."""
    return vars(model).get("tokenizer_ids")


def restricted(model: PreTrainedModel, logits_NV: Tensor) -> Tensor:
    """Logits of the ids that the model's tokenizer has. Columns beyond the last id are cut off, without a copy; columns
    of gaps are -inf. Without `restrict`, all logits unchanged."""
    ids = tokenizer_ids(model)
    if ids is None:
        return logits_NV
    logits_NV = logits_NV[:, : ids.size]
    if not ids.gaps:
        return logits_NV
    return logits_NV.index_fill(1, _gap_ids(ids.gaps, logits_NV.device), -float("inf"))


@cache
def _gap_ids(gaps: tuple[int, ...], device: torch.device) -> Tensor:
    """On the device once, because the decoder reads them for every token."""
    return torch.tensor(gaps, device=device)


def _hidden(model: PreTrainedModel, layout: Layout) -> Tensor:
    """Final hidden states of the transformer body, flattened to (tokens, hidden)."""
    extra: dict[str, Any] = {"layout": layout} if is_packed(model) else {}
    body = getattr(model, model.base_model_prefix)
    output = body(
        input_ids=layout.input_ids,
        position_ids=layout.position_ids,
        attention_mask=layout.attention_mask,
        use_cache=False,
        **extra,
    )
    return output.last_hidden_state.flatten(0, 1)


def _logits(model: PreTrainedModel, layout: Layout, index_N: Tensor) -> Tensor:
    """Logits of the flattened states ``index_N``, as the model's own forward pass gives them: architectures other than
    those that are packed scale and cap them."""
    if is_packed(model):
        return lm_head(model)(_hidden(model, layout)[index_N])
    output = model(
        input_ids=layout.input_ids,
        position_ids=layout.position_ids,
        attention_mask=layout.attention_mask,
        use_cache=False,
    )
    return output.logits.flatten(0, 1)[index_N]


class Head(nn.Module):
    """A transformer with a head; ``forward`` returns the tensors named in ``outputs``."""

    outputs: tuple[str, ...]
    num_attributes: int = 1
    """A, the number of columns of ``_BA`` outputs."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model: PreTrainedModel = model
        self.packed = is_packed(model)


class TokenLogprobs(Head):
    """``logprob_BT`` and ``entropy_BT`` of every response token at a temperature, 0 where there is none, over the ids
    of `restrict`.

    Where logits are the plain product of hidden states and the head's weight, they are computed by chunks of tokens and
    never kept (`align.ops.logprobs.of_hidden`). Heads with adapters take the same chunks, and compute them again in the
    backward pass. Architectures that scale or cap logits compute them whole, in the model's number format.
    """

    outputs = ("logprob_BT", "entropy_BT")

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self._plain = is_plain(model.config) and type(model).__module__.startswith("transformers.")
        head = lm_head(model)
        if self._plain and type(head) is nn.Linear and head.bias is None:
            head.__class__ = LanguageModelHead

    def forward(self, layout: Layout, temperature: float, entropy: bool = True) -> dict[str, Tensor]:
        """``entropy=False`` leaves out ``entropy_BT``, for passes that read log-probabilities only."""
        ids_N = layout.target_N
        if not self._plain:
            logits_NV = _logits(self.model, layout, layout.predicting_N)
            value_N = self._in_chunks(logits_NV, ids_N, temperature, nn.Identity())
        else:
            head = lm_head(self.model)
            hidden_NH = _hidden(self.model, layout)[layout.predicting_N]
            if isinstance(head, LanguageModelHead):
                present = tokenizer_ids(self.model) or TokenizerIds(head.out_features)
                value_N = head(hidden_NH, ids_N, temperature, present.size, present.gaps, entropy)
            else:
                value_N = self._in_chunks(hidden_NH, ids_N, temperature, head)
        names = self.outputs if entropy else self.outputs[:1]
        return {name: logprobs.to_padded(value, layout.mask_BT) for name, value in zip(names, value_N, strict=False)}

    def _in_chunks(self, state_NX: Tensor, ids_N: Tensor, temperature: float, head: nn.Module) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy from hidden states by ``head``, or from logits."""

        def read(state_CX: Tensor, ids_C: Tensor) -> tuple[Tensor, Tensor]:
            return logprobs.of_tokens(restricted(self.model, head(state_CX)), ids_C, temperature)

        chunk = partial(checkpoint, read, use_reentrant=False) if torch.is_grad_enabled() else read
        size = logprobs.chunk_tokens(len(ids_N))
        parts = [chunk(*part) for part in zip(state_NX.split(size), ids_N.split(size), strict=True)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


class LastTokenScore(Head):
    """``score_B``: the one-label head at the last token of each sequence, located by length, never by searching for
    padding tokens."""

    outputs = ("score_B",)

    def forward(self, layout: Layout) -> dict[str, Tensor]:
        head: Any = self.model.score
        return {"score_B": head(_hidden(self.model, layout)[layout.last_B]).squeeze(-1).float()}


class LastTokenAttributes(Head):
    """``attribute_BA``: all outputs of the head at the last token of each sequence."""

    outputs = ("attribute_BA",)

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self.num_attributes = int(model.config.num_labels or 1)

    def forward(self, layout: Layout) -> dict[str, Tensor]:
        head: Any = self.model.score
        return {"attribute_BA": head(_hidden(self.model, layout)[layout.last_B]).float()}


class TokenValues(Head):
    """``value_BT``: the one-label head at the state from which each response token is predicted, so column t is the
    value before token t is chosen."""

    outputs = ("value_BT",)

    def forward(self, layout: Layout) -> dict[str, Tensor]:
        head: Any = self.model.score
        value_N = head(_hidden(self.model, layout)[layout.predicting_N]).squeeze(-1).float()
        return {"value_BT": logprobs.to_padded(value_N, layout.mask_BT)}


class RowZeroLogit(Head):
    """``score_B``: the raw logit of vocabulary id 0 at the last token (Llama-3.x-Nemotron-70B-Reward).

    The model cards read ``generate(...).scores[0][0][0]``; that is ``lm_head.weight[0] . h_last``, one forward pass.
    This returns raw logits: ``scores`` of ``generate`` are changed by the sampling settings of a generation config.
    """

    outputs = ("score_B",)

    def forward(self, layout: Layout) -> dict[str, Tensor]:
        return {"score_B": _logits(self.model, layout, layout.last_B)[:, 0].float()}


class LogitDifference(Head):
    """``score_B``: the logit of one token minus that of another after the last token (Yes and No of a
    principle model)."""

    outputs = ("score_B",)

    def __init__(self, model: PreTrainedModel, more: int, less: int):
        super().__init__(model)
        self.more, self.less = more, less

    def forward(self, layout: Layout) -> dict[str, Tensor]:
        logits_BV = _logits(self.model, layout, layout.last_B).float()
        return {"score_B": logits_BV[:, self.more] - logits_BV[:, self.less]}
