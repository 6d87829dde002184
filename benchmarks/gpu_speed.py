"""Stages of `benchmarks/gpu.py` that measure speed and memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_stages import Rows, Setting, gigabytes, random_model, random_sequences, seconds, wait
from torch import Tensor

QWEN_05B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def decode(setting: Setting) -> Rows:
    """Tokens a second of a 0.5B model by number of rows, against ``transformers.generate``; launches a token."""
    from align.config import SamplingConfig
    from align.engines.decoder import Decoder
    from align.types import Packed, Prompts

    model = random_model(setting, "qwen2", QWEN_05B)
    num_tokens, prompt = setting.size((128, 64), (8, 6))

    def sample(rows: int, max_tokens: int = num_tokens) -> None:
        prompts = Prompts(Packed.from_lists([[i + 1] * prompt for i in range(8)]), torch.arange(8), (10**6,), 0)
        Decoder(model, rows).generate(prompts, SamplingConfig(num_samples=rows // 8, max_tokens=max_tokens), 1)

    for rows in setting.size((64, 256, 512), (8, 16)):
        time_s = seconds(lambda rows=rows: sample(rows), setting.device, repeats=1)
        yield f"decoder, {rows} rows", rows * num_tokens / time_s, "tokens/s"
    rows = setting.size(64, 8)
    model.set_attn_implementation("sdpa")
    ids = torch.ones(rows, prompt, dtype=torch.int64, device=setting.device)
    options = {"do_sample": True, "max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "top_k": 0}
    time_s = seconds(
        lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options), setting.device, repeats=1
    )
    yield f"transformers.generate, {rows} rows", rows * num_tokens / time_s, "tokens/s"
    model.set_attn_implementation("packed")
    yield from _launches(lambda: sample(setting.size(64, 8), 16), setting)


def _launches(decode_16_tokens: Callable[[], None], setting: Setting) -> Rows:
    """Launches a token, and the share of the time in which the GPU computes nothing, under the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if setting.device_name == "cuda" else []
    began = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profile:
        decode_16_tokens()
        wait(setting.device)
    wall, events = time.perf_counter() - began, profile.key_averages()
    launches = sum(event.count for event in events if "LaunchKernel" in event.key)
    # Operators of the host have the time of their kernels too, so only events of the device are added.
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = 1e-6 * sum(event.self_device_time_total for event in kernels if not event.is_user_annotation)
    yield "launches a token", launches / 16
    yield "share of the time in which the GPU is idle, profiled", 1 - busy / wall


def update(setting: Setting) -> Rows:
    """Tokens a second and peak memory of training a 0.5B model, by the token budget of a micro-batch."""
    from align.config import OptimizerConfig, PolicyConfig
    from align.engines import distributed
    from align.engines.deepspeed import Engine
    from align.models import attention as module
    from align.models.heads import TokenLogprobs
    from align.roles import Loss

    distributed.initialize_alone()
    chosen = module.ragged_kernel
    batch = random_sequences(8, 8, *setting.size((512, 512), (9, 9))).batch()
    dtype: Any = str(setting.dtype).removeprefix("torch.")

    def loss(logprob_BT: Tensor, entropy_BT: Tensor, mask_BT: Tensor) -> Loss:
        return Loss(-torch.where(mask_BT, logprob_BT, 0.0).sum(), mask_BT.sum(), {})

    choices = itertools.product(
        setting.size((4096, 8192, 16384), (64,)),
        (("rows of any length", chosen), ("padded groups", lambda query: None)),
    )
    for max_tokens, (name, kernel) in choices:
        module.ragged_kernel = kernel
        section = PolicyConfig(
            path="random",
            dtype=dtype,
            max_tokens_per_micro_batch=max_tokens,
            optimizer=OptimizerConfig(lr=1e-5),
            zero_stage=1,
        )
        engine = Engine(TokenLogprobs(random_model(setting, "qwen2", QWEN_05B)), section, setting.device, 100)
        if setting.device_name == "cuda":
            torch.cuda.reset_peak_memory_stats(setting.device)
        tokens = 0.0

        def step(engine: Engine = engine) -> None:
            nonlocal tokens
            tokens = engine.update(batch, loss, temperature=1.0)["trained_tokens"]

        time_s = seconds(step, setting.device, repeats=1)
        yield f"{max_tokens} tokens, {name}", tokens / time_s, "tokens/s"
        yield f"{max_tokens} tokens, {name}: peak", gigabytes(setting.device, "peak"), "GB"
        del engine, step
        if setting.device_name == "cuda":
            torch.cuda.empty_cache()
    module.ragged_kernel = chosen


def memory(setting: Setting) -> Rows:
    """Memory of a frozen 8B model after each phase, and the time to move its weights to the host and back."""
    from align.config import SamplingConfig
    from align.data import collate
    from align.engines.decoder import Decoder
    from align.models.heads import TokenLogprobs
    from align.types import Packed, Prompts

    device, model = setting.device, random_model(setting, "llama", LLAMA_8B)

    def held(phase: str) -> Rows:
        wait(device)
        yield f"{phase}: allocated", gigabytes(device, "allocated"), "GB"
        yield f"{phase}: reserved", gigabytes(device, "reserved"), "GB"

    yield from held("weights")
    with torch.no_grad():
        sequences = random_sequences(8, 4, *setting.size((1024, 768), (9, 9)))
        layout = collate.packed(sequences).to(device)
        TokenLogprobs(model)(layout, temperature=1.0)
        yield "tokens of the pass for log-probabilities", layout.input_ids.shape[1]
        del layout
        yield from held("log-probabilities")
        prompts = Prompts(Packed.from_lists([[1] * setting.size(512, 5)] * 8), torch.arange(8), (10**6,), 0)
        Decoder(model, setting.size(64, 16)).generate(
            prompts, SamplingConfig(num_samples=setting.size(8, 2), max_tokens=setting.size(64, 4)), 1
        )
        yield from held("decoding")
        if device.type == "cuda":
            torch.cuda.empty_cache()
            yield from held("caches given back")
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e9
        pinned = [torch.empty_like(p, device="cpu", pin_memory=device.type == "cuda") for p in model.parameters()]
        for name, pairs in (
            ("to the host", [*zip(pinned, model.parameters(), strict=True)]),
            ("back", [*zip(model.parameters(), pinned, strict=True)]),
        ):
            time_s = seconds(lambda pairs=pairs: [a.copy_(b, non_blocking=True) for a, b in pairs], device, repeats=1)
            yield f"weights {name}, pinned", size / time_s, "GB/s"
