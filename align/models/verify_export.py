"""Verify that an exported folder is the trained model: equal weights, bit for bit, and equal outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.errors import ModelError
from align.models.heads import restrict, restricted, tokenizer_ids
from align.models.weights import named_weights
from align.types import Packed, Sequences

PROBE_LENGTHS = ((5, 6), (7, 6), (3, 6))
"""Tokens of prompt and response of each sequence that `probe` makes."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest allowed `difference` between outputs of one model, by the coarser dtype of the two (docs/lora.md)."""


def probe(tokenizer: PreTrainedTokenizerBase) -> Sequences:
    """A fixed batch of random token ids from the whole vocabulary, without the padding token."""
    source = torch.Generator().manual_seed(0)
    ids = torch.tensor(sorted(id for id in tokenizer.get_vocab().values() if id != tokenizer.pad_token_id))

    def random_ids(length: int) -> list[int]:
        return ids[torch.randint(len(ids), (length,), generator=source)].tolist()

    prompts, responses = zip(
        *((random_ids(prompt), random_ids(response)) for prompt, response in PROBE_LENGTHS), strict=True
    )
    return Sequences(Packed.from_lists(prompts), Packed.from_lists(responses), torch.arange(len(prompts)))


def difference(expected: Tensor, other: Tensor) -> float:
    """Mean of ``|x - y| / max(1, |x|)``: absolute for small numbers, relative for large ones. Not finite if an
    element of either tensor is not."""
    return float(((other - expected).abs() / expected.abs().clamp(min=1.0)).mean())


def tolerance(*dtypes: torch.dtype) -> float:
    return max(TOLERANCE[dtype] for dtype in dtypes)


def check_weights(folder: Path, state: Mapping[str, Tensor], kind: type[PreTrainedModel]) -> None:
    """Read the files back and compare every weight, bit for bit. Raises `ModelError`."""
    read: set[str] = set()
    for name, value in _read_back(folder, state.keys(), kind):
        read.add(name)
        if name not in state or not torch.equal(value, state[name]):
            raise ModelError(f"{folder}: weight {name} reads back other than it was written")
    if missing := state.keys() - read:
        raise ModelError(f"{folder}: weights were not written: {', '.join(sorted(missing)[:3])}")


def _read_back(folder: Path, names: Set[str], kind: type[PreTrainedModel]) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the files. Loads the model where transformers saves an architecture under other weight names."""
    file_of: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            file_of |= dict.fromkeys(tensors.keys(), file)
    if file_of.keys() != names:
        yield from named_weights(kind.from_pretrained(folder, dtype="auto"))
        return
    for file in sorted(set(file_of.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                yield name, tensors.get_tensor(name)


def _own_code(folder: Path) -> bool:
    """True if the folder holds Python code. It is the code of the model in training, which is already running."""
    return "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))


@torch.no_grad()
def check_outputs(folder: Path, sequences: Sequences, expected: Mapping[str, Tensor], trained: PreTrainedModel) -> None:
    """Compare outputs of the exported model with those of the model in training.

    ``expected`` holds outputs of the head (`align.models.heads`) of ``trained`` on ``sequences``, computed on its own
    device. The folder is loaded by transformers alone, on the CPU and in the dtype of its files; log-probabilities are
    over the same ids (`align.models.heads.restrict`). Raises `ModelError` with the difference.
    """
    auto: Any = AutoModelForCausalLM if "logprob_BT" in expected else AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype="auto", trust_remote_code=_own_code(folder)).eval()
    if (ids := tokenizer_ids(trained)) is not None:
        restrict(model, ids)
    computed = {name: READERS[name](model, sequences, expected[name]) for name in READERS.keys() & expected.keys()}
    for name, value in computed.items():
        error, allowed = difference(expected[name], value), tolerance(trained.dtype, model.dtype)
        if not error <= allowed:
            raise ModelError(
                f"the folder is not the trained model: on a fixed batch its {WORDS[name]} differ by {error:.3g} on "
                f"average from those of the model in training, and rounding explains {allowed:.3g}",
                where=str(folder),
                remedy="the trained model is in the run's checkpoints; train with other lora.targets, or with rank 0, "
                "and with attention: sdpa",
            )


WORDS = {"logprob_BT": "log-probabilities", "value_BT": "values", "score_B": "scores", "attribute_BA": "attributes"}


def _rows(sequences: Sequences) -> Iterator[tuple[int, list[int], list[int]]]:
    for row, prompt in enumerate(sequences.prompt_B.tolist()):
        yield row, sequences.prompts.row(prompt).tolist(), sequences.responses.row(row).tolist()


def _logprobs(model: Any, sequences: Sequences, expected_BT: Tensor) -> Tensor:
    logprob_BT = torch.zeros_like(expected_BT)
    for row, prompt, response in _rows(sequences):
        logits_TV = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logprob_T = (
            restricted(model, logits_TV).float().log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        )
        logprob_BT[row, : len(response)] = logprob_T
    return logprob_BT


def _values(model: Any, sequences: Sequences, expected_BT: Tensor) -> Tensor:
    """A classifier scores its last token: the value before token t is the score of what comes before it."""
    value_BT = torch.zeros_like(expected_BT)
    for row, prompt, response in _rows(sequences):
        for t in range(len(response)):
            value_BT[row, t] = model(torch.tensor([prompt + response[:t]])).logits[0, 0].float()
    return value_BT


def _scores(model: Any, sequences: Sequences, expected: Tensor) -> Tensor:
    logits = [model(torch.tensor([prompt + response])).logits[0].float() for _, prompt, response in _rows(sequences)]
    return torch.stack(logits).reshape(expected.shape)


READERS = {"logprob_BT": _logprobs, "value_BT": _values, "score_B": _scores, "attribute_BA": _scores}
"""For each output of `align.models.heads`, how to compute it with transformers; column t as in `align.types`."""
