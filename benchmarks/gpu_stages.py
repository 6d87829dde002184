"""Stages of `benchmarks/gpu.py` that check numbers, and what all stages share.

A stage yields rows: name, value, unit, and a bound where the row is a check.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
Rows = Iterator[tuple[Any, ...]]


@dataclass(frozen=True)
class Setting:
    """Where the stages run, and whether at tiny sizes. ``folder`` is empty, and is removed after the stage."""

    device_name: str
    tiny: bool
    folder: Path

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_name, 0) if self.device_name == "cuda" else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16, but float32 for the rehearsal on CPUs, many of which only emulate bfloat16."""
        return torch.bfloat16 if self.device_name == "cuda" else torch.float32

    def size(self, real: Any, tiny: Any) -> Any:
        return tiny if self.tiny else real


def seconds(function: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Median time of a call, after one call that does not count."""
    function()
    times = []
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gigabytes(device: torch.device, kind: str) -> float:
    """``allocated``, ``reserved`` or ``peak`` memory of the device; on a CPU, the most that the process has held."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    read = {
        "allocated": torch.cuda.memory_allocated,
        "reserved": torch.cuda.memory_reserved,
        "peak": torch.cuda.max_memory_allocated,
    }
    return read[kind](device) / 1e9


def random_sequences(num_prompts: int, num_samples: int, prompt: int, response: int, vocab: int = 100) -> Any:
    """Prompts and responses of a quarter to all of these lengths."""
    from align.types import Packed, Sequences

    source = torch.Generator().manual_seed(0)

    def rows(count: int, longest: int) -> Packed:
        lengths = torch.randint(max(1, longest // 4), longest + 1, (count,), generator=source).tolist()
        return Packed.from_lists([torch.randint(0, vocab, (n,), generator=source).tolist() for n in lengths])

    prompt_B = torch.arange(num_prompts).repeat_interleave(num_samples)
    return Sequences(rows(num_prompts, prompt), rows(num_prompts * num_samples, response), prompt_B)


TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def random_model(setting: Setting, family: str, sizes: dict[str, Any], dtype: torch.dtype | None = None) -> Any:
    """A causal language model with random weights, made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    importlib.import_module("align.models.attention")  # registers the attention named packed
    fields = {**sizes, **(TINY if setting.tiny else {}), "max_position_embeddings": 32768}
    config = AutoConfig.for_model(family, **fields, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    with setting.device:
        dtype = dtype or setting.dtype
        return AutoModelForCausalLM.from_config(config, attn_implementation="packed", dtype=dtype).eval()


def machine(setting: Setting) -> Rows:
    """Versions, and what copies and matrix products reach."""
    yield "python", platform.python_version()
    for package in ("torch", "transformers", "deepspeed", "ray", "trl", "peft", "vllm", "flash-attn"):
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    if setting.device_name == "cuda":
        yield "GPU", torch.cuda.get_device_name(setting.device)
        yield "memory", torch.cuda.get_device_properties(setting.device).total_memory / 1e9, "GB"
        yield "CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
    yield "FlashAttention in torch", str(torch.backends.cuda.is_flash_attention_available())
    count, n = setting.size((10**9, 8192), (10**6, 256))
    source = torch.ones(count, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    yield "copy on the device", 2e-9 * count / seconds(lambda: target.copy_(source), setting.device), "GB/s"
    host = torch.ones(count // 4, dtype=torch.uint8, device="cpu")
    for name, memory in (("pageable", host), ("pinned", host.pin_memory() if setting.device_name == "cuda" else host)):
        time_s = seconds(lambda memory=memory: memory.to(setting.device, copy=True), setting.device)
        yield f"copy to the device, {name}", 1e-9 * len(memory) / time_s, "GB/s"
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a = torch.ones(n, n, dtype=dtype, device=setting.device)
        yield f"matrix product, {name}", 2e-12 * n**3 / seconds(lambda a=a: a @ a, setting.device), "TFLOP/s"


def cases(setting: Setting) -> Rows:
    """Heads, losses, adapters, decoding and reward checkpoints in float32, against the CPU."""
    sys.path.insert(0, str(ROOT / "tests" / "gpu"))
    module: Any = importlib.import_module("cases")
    chosen = list(module.CASES.items())[:: 8 if setting.tiny else 1]
    errors: dict[str, float] = {}
    for name, case in chosen:
        ours, theirs = case(setting.device), case(torch.device("cpu"))
        error = max(module.relative_error(ours[key].detach().cpu(), value.detach()) for key, value in theirs.items())
        kind = name.split()[0]
        errors[kind] = max(errors.get(kind, 0.0), error)
    yield "cases", len(chosen)
    for kind, error in errors.items():
        yield f"{kind}, relative error", error, "", 1e-4


def attention(setting: Setting) -> Rows:
    """Which kernel takes packed rows, its numbers, its time, and what new shapes cost."""
    from align.data import collate
    from align.models import attention as module
    from align.models.heads import TokenLogprobs

    chosen = module.ragged_kernel
    sequences = random_sequences(4, 4, *setting.size((512, 512), (12, 9)))
    for family in ("llama", "qwen2", "qwen3"):
        sizes = {**TINY, "hidden_size": 256, "num_hidden_layers": 2, "tie_word_embeddings": family == "qwen2"}
        outputs = {}
        for name, kernel in (("rows of any length", chosen), ("padded groups", lambda query: None)):
            module.ragged_kernel = kernel
            model = random_model(setting, family, sizes)
            layout = collate.packed(sequences).to(setting.device)
            logprob_BT = TokenLogprobs(model)(layout, temperature=1.0)["logprob_BT"]
            (-logprob_BT.sum() / sequences.mask_BT.sum()).backward()
            outputs[name] = logprob_BT.detach().double().cpu(), model.model.embed_tokens.weight.grad.double().cpu()
        exact = random_model(setting, family, sizes).cpu().double()
        logprob_BT = TokenLogprobs(exact)(collate.packed(sequences), temperature=1.0)["logprob_BT"]
        (-logprob_BT.sum() / sequences.mask_BT.sum()).backward()
        expected = logprob_BT.detach().double(), exact.model.embed_tokens.weight.grad.double()
        for name, values in outputs.items():
            for what, value, reference, bound in zip(
                ("log-probabilities", "gradient"), values, expected, (1e-2, 5e-2), strict=True
            ):
                error = float((value - reference).norm() / reference.norm())
                yield f"{family}, {name}, {what}: error to float64", error, "", bound
    module.ragged_kernel = chosen
    yield from _attention_time(setting, module, collate)


def _attention_time(setting: Setting, module: Any, collate: Any) -> Rows:
    chosen = module.ragged_kernel
    heads, key_heads, head_dim = setting.size((28, 4, 128), (4, 2, 16))

    def layer(number: int) -> Callable[[], None]:
        sequences = random_sequences(4 + number, 4, *setting.size((512, 512 + 32 * number), (9, 9)))
        layout = collate.packed(sequences).to(setting.device)
        num_tokens = layout.input_ids.shape[1]
        make = lambda count: torch.randn(  # noqa: E731
            1, num_tokens, count, head_dim, dtype=setting.dtype, device=setting.device
        )
        q, k, v = (make(count).transpose(1, 2).requires_grad_() for count in (heads, key_heads, key_heads))
        gradient = make(heads)

        def both_passes() -> None:
            output = module.packed_attention(torch.nn.Module(), q, k, v, None, layout=layout)[0]
            output.backward(gradient)

        return both_passes

    kernel = chosen(torch.empty(1, heads, head_dim, dtype=setting.dtype, device=setting.device))
    yield "kernel", "padded groups" if kernel is None else kernel.__name__.removeprefix("_")
    for name, choice in (("rows of any length", chosen), ("padded groups", lambda query: None)):
        module.ragged_kernel = choice
        layer(0)()
        first = []
        for number in range(1, 7):
            call = layer(number)
            wait(setting.device)
            began = time.perf_counter()
            call()
            wait(setting.device)
            first.append(time.perf_counter() - began)
        again = seconds(layer(1), setting.device)
        yield f"{name}: both passes of a layer", 1e3 * again, "ms"
        yield f"{name}: the same at a new shape, median", 1e3 * sorted(first)[len(first) // 2], "ms"
        yield f"{name}: kernels", ", ".join(sorted(_kernels(layer(0), setting))[:4])
    module.ragged_kernel = chosen


def _kernels(function: Callable[[], Any], setting: Setting) -> set[str]:
    """Names of the attention kernels that a call runs, shortened."""
    cuda = setting.device_name == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        function()
        wait(setting.device)
    names = {event.key for event in profile.key_averages()}
    return {name[:60] for name in names if any(word in name.lower() for word in ("flash", "attention", "fmha", "sdpa"))}


def zero(setting: Setting) -> Rows:
    """Three optimizer steps at each ZeRO stage, one rank, float32, against plain PyTorch on the CPU; and offload."""
    sys.path.insert(0, str(ROOT / "tests" / "engines"))
    shared: Any = importlib.import_module("two_ranks")
    from dataclasses import replace

    from align.engines import distributed
    from align.engines.deepspeed import Engine
    from align.models.heads import TokenLogprobs

    if setting.device_name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    distributed.initialize_alone()
    task = shared.TASKS["clipped"]
    expected = shared.by_hand(task)[0]
    changes: list[tuple[str, int, dict[str, Any]]] = [(f"stage {stage}", stage, {}) for stage in range(4)]
    changes += [("stage 2, optimizer on the host", 2, {"offload_optimizer": True})]
    for name, stage, change in changes:
        section = replace(shared.section(stage, 30, task.max_grad_norm), **change)
        model = shared.llama("packed")
        engine = Engine(TokenLogprobs(model), section, setting.device, shared.TOTAL_STEPS)
        for batch in task.batches:
            engine.update(batch, task.loss, temperature=batch.temperature)
        got = shared.weights(model, engine)
        error = max(float((got[key].cpu() - value).norm() / value.norm()) for key, value in expected.items())
        yield f"{name}: relative error of weights after 3 steps", error, "", 1e-4
    for stage in range(1, 4):
        section = shared.section(stage, dtype="bfloat16")
        engine = Engine(
            TokenLogprobs(shared.llama("packed", torch.bfloat16)), section, setting.device, shared.TOTAL_STEPS
        )
        metrics = engine.update(task.batches[0], task.loss, temperature=1.0)
        yield f"stage {stage}, bfloat16: norm of the gradient", metrics["grad_norm"]


ALIGN = [sys.executable, "-c", "import sys; from align.cli import main; sys.exit(main(sys.argv[1:]))"]


def runs(setting: Setting) -> Rows:
    """`align train` on Ray with all roles on GPU 0: RLOO, RLOO whose policy is killed and resumed, and PPO."""
    importlib.import_module("ray")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from align.data import toy

    folder = setting.folder
    toy.write_toy(folder / "data", 200, 20, seed=0)
    tokenizer, sizes = toy.tokenizer(), {**TINY, "vocab_size": len(toy.tokenizer()), "max_position_embeddings": 128}
    for name, auto in (("policy", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **sizes, num_labels=1, pad_token_id=tokenizer.pad_token_id)
        auto.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    plain = _train(setting, "rloo", "rloo", {})
    yield "rloo: seconds of 4 steps with start and end", plain[1], "s"
    killed = _train(setting, "killed", "rloo", {"ALIGN_FAULT": "role=policy,rank=0,phase=update,step=3,kind=sigkill"})
    yield "rloo, policy killed at step 3: seconds", killed[1], "s"
    bound = 0.0 if setting.device_name == "cpu" else 1e-3
    pairs = list(zip(plain[0], killed[0], strict=True))
    difference = max(abs(a[key] - b[key]) for a, b in pairs for key in ("loss", "grad_norm"))
    yield "rloo: loss and gradient after a kill, largest difference", difference, "", bound
    if not setting.tiny:
        yield "ppo: seconds of 4 steps with start and end", _train(setting, "ppo", "ppo", {})[1], "s"


def _train(setting: Setting, name: str, algorithm: str, environment: dict[str, str]) -> tuple[list[Any], float]:
    """Metrics of the steps of a run, and its seconds."""
    folder, path = setting.folder, setting.folder / name
    roles = ("policy", "reference", "reward", *(["critic"] if algorithm == "ppo" else []))
    recipe: dict[str, Any] = {
        "algorithm": algorithm,
        "run": {"dir": str(path), "steps": 4, "trackers": []},
        "checkpoint": {"every": 1},
        "data": {"path": str(folder / "data")},
        "prompts_per_step": 8,
        "sampling": {"max_tokens": 8} | ({"num_samples": 4} if algorithm == "rloo" else {}),
        "policy": {"path": str(folder / "policy"), "dtype": "float32", "optimizer": {"lr": 1e-3}},
        "reward": {"path": str(folder / "reward"), "dtype": "float32"},
        "placement": dict.fromkeys(roles, 0),
    }
    if algorithm == "ppo":
        critic = {"path": str(folder / "reward"), "dtype": "float32", "optimizer": {"lr": 1e-3}}
        recipe["critic"] = critic
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if setting.device_name == "cpu" else {}
    began = time.perf_counter()
    done = subprocess.run(
        [*ALIGN, "train", str(file)], env={**os.environ, **hidden, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{name}: status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], time.perf_counter() - began
