"""Decoding against ``transformers.generate`` on the same weights, and the sampler against a sum over the vocabulary.

    GOMP_SPINCOUNT=10000 python -m benchmarks.decode [--vocab 4096,49152,131072] [--rows 8,64,256] [--smollm2]
        [--rounds 3] [--json FILE]

Runs of align set GOMP_SPINCOUNT too: with libgomp's default a step of few rows was 8 times slower on a busy machine.
Both decode the same number of tokens from prompts of equal length, without stop ids, at temperature 1, in turn, with
two threads; the ratio is that of the medians of ``--rounds`` runs. The model has 4 layers of width 512. ``--smollm2``
decodes with random weights in the shape of SmolLM2-135M (32 rows), and prints the share of the time that the matrix
products of such a step take alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from align.config import SamplingConfig
from align.engines.decoder import Decoder
from align.ops import sampling
from align.types import Packed, Prompts

PROMPT, RESPONSE = 16, 32
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def build(config: LlamaConfig, attention: str) -> Any:
    """The same random weights for every ``attention``."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def seconds(runs: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each function, run in turn; one run of each goes before."""
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):
        for own, run in zip(times, runs, strict=True):
            start = time.perf_counter()
            run()
            if number:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def decoding(config: LlamaConfig, rows: int, rounds: int) -> tuple[float, float]:
    """Tokens a second of `Decoder` and of ``generate``."""
    ours, theirs = Decoder(build(config, "packed"), rows), build(config, "sdpa")
    ids = torch.randint(config.vocab_size, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    prompts = Prompts(Packed.from_lists(ids.tolist()), torch.arange(rows), (), 1)
    sample = SamplingConfig(num_samples=1, max_tokens=RESPONSE, temperature=1.0)
    theirs.generation_config.eos_token_id = ours.model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)

    def generate() -> None:
        out = theirs.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=RESPONSE, pad_token_id=0
        )
        assert out.shape[1] == PROMPT + RESPONSE

    def decode() -> None:
        assert int(ours.generate(prompts, sample, 0).sequences.responses.lengths_B.min()) == RESPONSE

    own, other = seconds([decode, generate], rounds)
    return rows * RESPONSE / own, rows * RESPONSE / other


def by_float64_sum(logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """A draw from the cumulative sum of a float64 softmax over the whole vocabulary."""
    cumulative_BV = logits_BV.double().softmax(-1).cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    ids_B = (cumulative_BV <= uniform_B[:, None] * total_B1).sum(-1).minimum((cumulative_BV < total_B1).sum(-1))
    return ids_B, logits_BV.gather(1, ids_B[:, None]).squeeze(1) - logits_BV.logsumexp(-1)


def sampler(vocab: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a draw for 64 rows, and how many ids are those of the sum."""
    logits, uniform = torch.randn(64, vocab) * 3, torch.rand(64, dtype=torch.float64)
    copies = [logits.clone() for _ in range(2)]

    def draw() -> Tensor:
        copies[0].copy_(logits)
        return sampling.sample(copies[0], uniform, 1.0, 0, 1.0, 0.0)[0]

    def whole() -> Tensor:
        copies[1].copy_(logits)  # as `draw`, so that both pay for it
        return by_float64_sum(copies[1], uniform)[0]

    own, other = seconds([draw, whole], rounds)
    return {"vocab": vocab, "ms": own * 1e3, "ms_float64": other * 1e3, "equal_ids": int((draw() == whole()).sum())}


def products(config: LlamaConfig, rows: int) -> float:
    """Seconds that the matrix products of one decoding step take."""
    head = config.hidden_size // config.num_attention_heads
    wide, narrow = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = [(config.hidden_size, wide), (config.hidden_size, narrow), (config.hidden_size, narrow)]
    shapes += [(wide, config.hidden_size), *[(config.hidden_size, config.intermediate_size)] * 2]
    shapes += [(config.intermediate_size, config.hidden_size)]
    layers = [[(torch.randn(rows, m), torch.randn(n, m)) for m, n in shapes] for _ in range(config.num_hidden_layers)]
    layers.append([(torch.randn(rows, config.hidden_size), torch.randn(config.vocab_size, config.hidden_size))])
    return seconds([lambda: [x @ w.T for layer in layers for x, w in layer]], 5)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    parser.add_argument("--vocab", type=numbers, default=[4096, 49152, 131072])
    parser.add_argument("--rows", type=numbers, default=[8, 64, 256])
    parser.add_argument(
        "--sampler", type=numbers, default=[1024, 4096, 32000, 131072], help="vocabularies of the sampler"
    )
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    results: dict[str, list[dict[str, float]]] = {"sampler": [], "decode": []}
    for vocab in arguments.sampler:
        results["sampler"].append(row := sampler(vocab, arguments.rounds))
        print("sampler of 64 rows, vocabulary {vocab:,}: {ms:.1f} ms, float64 sum {ms_float64:.1f} ms".format(**row))
    for vocab in arguments.vocab:
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
        for rows in arguments.rows:
            own, other = decoding(config, rows, arguments.rounds)
            results["decode"].append({"vocab": vocab, "rows": rows, "tokens_s": own, "generate_tokens_s": other})
            print(f"decode {rows} rows, vocabulary {vocab:,}: {own:.0f} tokens/s, {own / other:.2f} times generate")
    if arguments.smollm2:
        own, other = decoding(SMOLLM2, 32, arguments.rounds)
        floor = products(SMOLLM2, 32) * own / 32
        results["decode"].append({"vocab": 49152, "rows": 32, "tokens_s": own, "generate_tokens_s": other})
        print(f"SmolLM2 shape, 32 rows: {own:.0f} tokens/s, {own / other:.2f} times generate; products {floor:.0%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
