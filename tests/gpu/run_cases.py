"""Run `cases` on the CPU and on the pretended GPU, and count kernels. Prints one JSON line a case."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "models")]
import cases
import pretended_gpu as pretended
import ragged_reference
from cases import CASES, CONFIG, CPU, VOCAB, Case, build, relative_error
from pretended_gpu import GPU, KERNELS, SYNCS, PretendedGPU, counts, sites

from align.config import SamplingConfig
from align.data import collate
from align.data.collate import RaggedRows
from align.engines.decoder import Decoder
from align.models import attention as attention_module
from align.models.heads import TokenLogprobs
from align.types import Packed, Prompts, Sequences

cases.on = lambda device, model: model if device == CPU else pretended.move(model)


def ragged_kernel(query: Tensor, key: Tensor, value: Tensor, rows: RaggedRows, scale: float | None) -> Tensor:
    """The reference of attention of rows of any length, as the one kernel that it is on a GPU."""
    if query.device == CPU:
        return ragged_reference.attend(query, key, value, rows, scale)
    starts = {name: pretended.plain(getattr(rows, name)) for name in ("query_start_R1", "key_start_R1")}
    return pretended.one_kernel(
        lambda q, k, v: ragged_reference.attend(q, k, v, replace(rows, **starts), scale), query, key, value
    )


def with_ragged_kernel(function: Callable[..., Any], *arguments: Any) -> Any:
    original = attention_module.ragged_kernel
    attention_module.ragged_kernel = lambda query: ragged_kernel
    try:
        return function(*arguments)
    finally:
        attention_module.ragged_kernel = original


CASES["token_logprobs ragged"] = partial(with_ragged_kernel, CASES["token_logprobs packed"])


# Counts of one decoded token


def decoding_counts(num_layers: int, num_tokens: int) -> dict[str, int]:
    """Kernels and waits of decoding ``num_tokens`` tokens of 8 sequences, none of which ends early."""
    model = pretended.move(build(Qwen2Config(**CONFIG | {"num_hidden_layers": num_layers})))
    tokens = Packed.from_lists([[1, 2, 3, 4, 5], [6, 7, 8]])
    prompts = Prompts(tokens, torch.arange(2), stop_ids=(VOCAB,), step=0)
    with PretendedGPU():
        Decoder(model, 8).generate(prompts, SamplingConfig(num_samples=4, max_tokens=num_tokens), 3)
        return {KERNELS: counts[KERNELS], SYNCS: counts[SYNCS]}


def training_counts(num_layers: int) -> list[int]:
    """Kernels of a forward pass, and of both passes, over 8 prompts with 4 responses each."""
    length = torch.Generator().manual_seed(3)
    draw = lambda count, longest: torch.randint(1, longest, (count,), generator=length).tolist()  # noqa: E731
    lists = [Packed.from_lists([[1] * n for n in draw(count, longest)]) for count, longest in ((8, 60), (32, 100))]
    sequences = Sequences(*lists, torch.arange(8).repeat_interleave(4))
    model = pretended.move(build(Qwen2Config(**CONFIG | {"num_hidden_layers": num_layers})))
    with PretendedGPU():
        loss = TokenLogprobs(model)(collate.packed(sequences).to(GPU), temperature=1.0)["logprob_BT"].sum()
        forward = counts[KERNELS]
        loss.backward()
        return [forward, counts[KERNELS]]


def of_24_layers(few: list[int], more: list[int]) -> dict[str, int]:
    """From counts of one layer and two: each layer costs the same."""
    both = [one + 23 * (two - one) for one, two in zip(few, more, strict=True)]
    return dict(zip(("forward", "both"), both, strict=True))


def counted() -> dict[str, Any]:
    """Differences leave out prefill and the copies at the end."""
    short, long, deep_short, deep = (decoding_counts(n, t) for n, t in ((1, 9), (1, 25), (2, 9), (2, 25)))
    per_layer = ((deep[KERNELS] - deep_short[KERNELS]) - (long[KERNELS] - short[KERNELS])) / 16
    ragged = [with_ragged_kernel(training_counts, n) for n in (1, 2)]
    return {
        "training_in_groups": of_24_layers(training_counts(1), training_counts(2)),
        "training_ragged": of_24_layers(*ragged),
        "syncs_in_16_tokens": long[SYNCS] - short[SYNCS],
        "kernels_per_layer": per_layer,
        "other_kernels_per_token": (long[KERNELS] - short[KERNELS]) / 16 - per_layer,
    }


def compare(case: Case) -> dict[str, Any]:
    expected = case(CPU)
    with PretendedGPU():
        got = case(GPU)
        waits = dict(sites)
    errors = {name: relative_error(pretended.plain(got[name]), value.detach()) for name, value in expected.items()}
    return {"names": sorted(expected), "got": sorted(got), "errors": errors, "sites": waits}


MIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda here, there: here + there,
    "row": lambda here, there: here[0] * there,
    "choice": lambda here, there: torch.where(here > 0, here, there),
    "in place": lambda here, there: here.add_(there),
    "attention": lambda here, there: torch.nn.functional.scaled_dot_product_attention(here, here, there),
}


def mixed(name: str) -> str:
    """The error of an operation on tensors of two devices."""
    try:
        with PretendedGPU():
            MIXED[name](torch.zeros(1, 2, 3, 4, device=GPU), torch.zeros(1, 2, 3, 4))
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    for name, case in CASES.items():
        try:
            result = compare(case)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"case": name} | result), flush=True)
    for name in MIXED:
        print(json.dumps({"case": f"mixed {name}", "message": mixed(name)}))
    print(json.dumps({"case": "counts"} | counted()), flush=True)


if __name__ == "__main__":
    main()
