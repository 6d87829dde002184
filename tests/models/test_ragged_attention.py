"""Attention of rows of any length, as on CUDA: the numbers of padded groups, and how kernels are called."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))
import ragged_reference
from test_attention import CONFIGS, SHAPES, build, gradients, sequences

from align.config import SamplingConfig
from align.data import collate
from align.engines.decoder import Decoder
from align.models import attention
from align.models.heads import TokenLogprobs
from align.types import Packed, Prompts

BFLOAT16 = torch.bfloat16


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[collate.RaggedRows]:
    """Use the reference as kernel. Returns the rows of each call."""
    rows_of: list[collate.RaggedRows] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, rows: collate.RaggedRows, scale: float | None) -> Tensor:
        rows_of.append(rows)
        return ragged_reference.attend(query, key, value, rows, scale)

    monkeypatch.setattr(attention, "ragged_kernel", lambda query: kernel)
    return rows_of


@pytest.mark.parametrize("shape", [*SHAPES, "empty among others"])
@pytest.mark.parametrize("name", CONFIGS)
def test_states_and_gradients_are_those_of_padded_groups(name: str, shape: str, calls: list, monkeypatch):
    lengths = SHAPES.get(shape, ([4, 2], [[3, 0, 5], [0, 1]]))
    layout, model = collate.packed(sequences(*lengths)), build(CONFIGS[name], "packed").double()
    head = TokenLogprobs(model)

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        states = model.model(
            input_ids=layout.input_ids, position_ids=layout.position_ids, layout=layout, use_cache=False
        )
        logprob_BT = head(layout, temperature=0.7)["logprob_BT"]
        weights = torch.linspace(-1, 1, logprob_BT.numel()).view(logprob_BT.shape)
        return states.last_hidden_state, gradients(model, (logprob_BT * weights).sum() + states.last_hidden_state.sum())

    states, grads = run()
    assert len(calls) == 2 * 2  # two passes of two layers, one call each
    monkeypatch.setattr(attention, "ragged_kernel", lambda query: None)
    expected, expected_grads = run()
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-12)
    assert max(float(g.abs().max()) for g in expected_grads.values()) > 1e-3
    for key, value in expected_grads.items():
        torch.testing.assert_close(grads[key], value, rtol=1e-9, atol=1e-6 if "lm_head" in key else 1e-10)


def test_prefill_of_the_decoder(calls: list, monkeypatch: pytest.MonkeyPatch):
    model = build(CONFIGS["qwen3"], "packed").double()
    prompts = Prompts(Packed.from_lists([[1, 2, 3], [4], [5, 6, 7, 8]]), torch.arange(3), stop_ids=(49,), step=1)
    sample = SamplingConfig(num_samples=2, max_tokens=5)
    ours = Decoder(model, 4).generate(prompts, sample, seed=2)
    assert calls and all(rows.key_M is None for rows in calls)
    monkeypatch.setattr(attention, "ragged_kernel", lambda query: None)
    theirs = Decoder(model, 4).generate(prompts, sample, seed=2)
    assert ours.sequences.responses.ids_N.equal(theirs.sequences.responses.ids_N)
    torch.testing.assert_close(ours.logprob_BT, theirs.logprob_BT, rtol=0, atol=1e-5)


def test_dropout_stays_with_padded_groups(calls: list):
    layout = collate.packed(sequences([3], [[2]]))
    q = torch.ones(1, 2, 5, 8)
    attention.packed_attention(torch.nn.Module(), q, q, q, None, dropout=0.5, layout=layout)
    assert calls == []
    attention.packed_attention(torch.nn.Module(), q, q, q, None, layout=layout)
    assert len(calls) == 1


def test_gradients_of_shared_keys_are_summed_in_float32():
    """2^-9 added to 1 is lost in bfloat16, 256 of them are a half."""
    state = torch.ones(2, 1, 1, dtype=BFLOAT16, requires_grad=True)
    gathered = attention._GatherKeys.apply(state, torch.tensor([0] * 257 + [1]))
    gathered.backward(torch.tensor([1.0] + [2.0**-9] * 256 + [3.0], dtype=BFLOAT16).view(258, 1, 1))
    assert state.grad is not None
    assert state.grad.dtype == BFLOAT16
    assert state.grad.flatten().tolist() == [1.5, 3.0]


# Which kernel


def fake(device: str = "cuda", dtype: torch.dtype = BFLOAT16, head_dim: int = 64) -> Any:
    return SimpleNamespace(device=SimpleNamespace(type=device), dtype=dtype, shape=(7, 4, head_dim))


@pytest.mark.parametrize(
    ("query", "capability", "in_torch", "package", "expected"),
    [
        (fake(), (9, 0), True, False, attention._torch_varlen),
        (fake(dtype=torch.float16), (8, 0), True, True, attention._torch_varlen),
        (fake(), (9, 0), False, True, attention._flash_varlen),
        (fake(), (9, 0), False, False, None),
        (fake(), (7, 5), True, True, None),
        (fake(dtype=torch.float32), (9, 0), True, True, None),
        (fake(device="cpu"), (9, 0), True, True, None),
        (fake(head_dim=100), (9, 0), True, True, None),
        (fake(head_dim=512), (9, 0), True, True, None),
    ],
)
def test_which_kernel(monkeypatch: pytest.MonkeyPatch, query, capability, in_torch, package, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: in_torch)
    monkeypatch.setattr(attention, "find_spec", lambda name: object() if package else None)
    monkeypatch.setattr(attention, "_cuda_kernel", attention._cuda_kernel.__wrapped__)
    assert attention.ragged_kernel(query) is expected


def test_cpus_use_padded_groups():
    assert attention.ragged_kernel(torch.zeros(7, 4, 64, dtype=BFLOAT16)) is None


@pytest.mark.parametrize("num_key_heads", [2, 4])
def test_torch_takes_the_call(num_key_heads: int):
    """On the meta device, which checks arguments and shapes and computes nothing."""
    layout = collate.packed(sequences([3, 5], [[2, 1], [4]])).to(torch.device("meta"))
    assert layout.attention is not None
    rows = layout.attention.ragged
    make = lambda heads: torch.zeros(1, heads, 15, 16, dtype=BFLOAT16, device="meta", requires_grad=True)  # noqa: E731
    query, key, value = make(4), make(num_key_heads), make(num_key_heads)
    assert rows.key_M is not None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    output = attention._torch_varlen(q, k.index_select(0, rows.key_M), v.index_select(0, rows.key_M), rows, 0.25)
    assert output.shape == (15, 4, 16) and output.dtype == BFLOAT16
    output.sum().backward()
    assert key.grad is not None and key.grad.shape == key.shape


def test_torch_and_flash_attention_are_told_the_same(monkeypatch: pytest.MonkeyPatch):
    """`varlen_attn` of torch 2.11 takes grouped heads without being told; from 2.12 on it must be."""
    told: dict[str, Any] = {}

    def torch_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        told["2.12"] = (cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, enable_gqa)

    def torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        told["2.11"] = (cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, True)

    def flash(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, causal, deterministic):
        assert causal and not deterministic
        told["flash"] = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, (-1, 0), True)

    rows = collate.RaggedRows(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 5]), None, 2, 3)
    x = torch.zeros(3, 2, 8)
    for name, function in (("varlen_attn", torch_2_12), ("varlen_attn", torch_2_11), ("flash_attn_varlen_func", flash)):
        monkeypatch.setattr(attention, "import_module", lambda _, n=name, f=function: SimpleNamespace(**{n: f}))
        (attention._flash_varlen if function is flash else attention._torch_varlen)(x, x, x, rows, 0.5)
    assert len(told) == 3
    assert all(call == (rows.query_start_R1, rows.key_start_R1, 2, 3, 0.5, (-1, 0), True) for call in told.values())
