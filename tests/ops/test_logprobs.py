"""Log-probabilities and entropies against softmax by hand, loops and automatic differentiation."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from align import ops
from align.ops import logprobs

NAN = math.nan


def test_probabilities_written_as_logits():
    # softmax(log [1, 2, 5]) = [1/8, 1/4, 5/8]; token 1 has log(1/4).
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    logprob, entropy = logprobs.of_tokens(logits, torch.tensor([1]), 1.0)
    assert logprob.item() == pytest.approx(math.log(0.25), abs=1e-6)
    # H = 1/8 log 8 + 1/4 log 4 + 5/8 log(8/5)
    assert entropy.item() == pytest.approx(math.log(8) / 8 + math.log(4) / 4 + 0.625 * math.log(1.6), abs=1e-6)


def test_temperature_divides_the_logits():
    # At temperature 1/2 the odds 1 : 3 become 1 : 9.
    logprob, entropy = logprobs.of_tokens(torch.tensor([[0.0, math.log(3)]]), torch.tensor([1]), 0.5)
    assert logprob.item() == pytest.approx(math.log(0.9), abs=1e-6)
    assert entropy.item() == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), abs=1e-6)


def test_against_a_loop():
    torch.manual_seed(0)
    logits, ids, temperature = torch.randn(7, 11) * 4, torch.randint(11, (7,)), 0.7
    logprob, entropy = logprobs.of_tokens(logits, ids, temperature)
    for n in range(7):
        weights = [math.exp(z / temperature) for z in logits[n].tolist()]
        p = [w / sum(weights) for w in weights]
        assert logprob[n].item() == pytest.approx(math.log(p[ids[n]]), abs=1e-5)
        assert entropy[n].item() == pytest.approx(-sum(q * math.log(q) for q in p), abs=1e-5)


def test_adding_a_constant_to_the_logits_changes_nothing_and_large_logits_are_finite():
    logits, ids = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 1.0]]), torch.tensor([2, 1])
    plain, moved = logprobs.of_tokens(logits, ids, 1.0), logprobs.of_tokens(logits + 512.0, ids, 1.0)
    torch.testing.assert_close(moved, plain, atol=2e-4, rtol=0)
    huge = logprobs.of_tokens(torch.tensor([[1e4, 0.0]]), torch.tensor([1]), 1.0)
    assert huge[0].item() == -1e4
    assert huge[1].item() == 0.0


def test_bfloat16_logits_are_read_in_float32():
    torch.manual_seed(1)
    logits, ids = torch.randn(4, 64).bfloat16(), torch.randint(64, (4,))
    logprob, entropy = logprobs.of_tokens(logits, ids, 0.9)
    exact_logprob, exact_entropy = logprobs.of_tokens(logits.float(), ids, 0.9)
    assert logprob.dtype == entropy.dtype == torch.float32
    assert logprob.equal(exact_logprob)
    assert entropy.equal(exact_entropy)


def test_gradient_is_one_hot_minus_probability_over_temperature():
    # d log p_i / d z_v = (1[v = i] - p_v) / temperature
    torch.manual_seed(2)
    logits, ids, temperature = torch.randn(3, 5, requires_grad=True), torch.tensor([4, 0, 2]), 0.8
    logprobs.of_tokens(logits, ids, temperature)[0].sum().backward()
    expected = (F.one_hot(ids, 5) - (logits.detach() / temperature).softmax(-1)) / temperature
    torch.testing.assert_close(logits.grad, expected, atol=1e-6, rtol=1e-5)


def naive_entropy(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    every = (logits / temperature).log_softmax(-1)
    return -(every.exp() * every).sum(-1)


def test_entropy_gradient_by_hand():
    # Two tokens of probability 1/4 and 3/4: dH/dz_0 = -p_0 p_1 log(p_0 / p_1) = 3/16 log 3, and the opposite for z_1.
    logits = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    logprobs.of_tokens(logits, torch.tensor([0]), 1.0)[1].sum().backward()
    expected = 3 / 16 * math.log(3)
    torch.testing.assert_close(logits.grad, torch.tensor([[expected, -expected]]), atol=1e-6, rtol=0)


def test_entropy_gradient_by_finite_differences():
    torch.manual_seed(4)
    scaled = (torch.randn(3, 7, dtype=torch.float64) * 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: logprobs._Entropy.apply(z, z.logsumexp(-1).detach()), scaled)


def test_both_gradients_against_automatic_differentiation():
    torch.manual_seed(5)
    logits, ids, temperature = (torch.randn(6, 50) * 4).requires_grad_(), torch.randint(50, (6,)), 0.7
    weight = torch.randn(2, 6)
    logprob, entropy = logprobs.of_tokens(logits, ids, temperature)
    (weight[0] * logprob + weight[1] * entropy).sum().backward()
    exact = logits.detach().double().requires_grad_()
    every = (exact / temperature).log_softmax(-1)[range(6), ids]
    (weight[0] * every + weight[1] * naive_entropy(exact, temperature)).sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(logits.grad, exact.grad.float(), atol=2e-6, rtol=1e-4)


def test_entropy_gradient_of_a_certain_and_of_an_even_distribution_is_zero():
    logits = torch.tensor([[1e4, 0.0, -1e4], [2.0, 2.0, 2.0]], requires_grad=True)
    logprobs.of_tokens(logits, torch.tensor([0, 0]), 1.0)[1].sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros(2, 3), atol=1e-6, rtol=0)


def test_the_value_of_the_entropy_does_not_depend_on_whether_gradients_are_kept():
    torch.manual_seed(6)
    logits, ids = torch.randn(5, 33) * 5, torch.randint(33, (5,))
    plain = logprobs.of_tokens(logits, ids, 0.7)[1]
    scaled = logits / 0.7
    every = scaled - scaled.logsumexp(-1)[:, None]
    assert plain.equal(-(every.exp() * every).sum(-1))
    assert plain.equal(logprobs.of_tokens(logits.requires_grad_(), ids, 0.7)[1])
    assert not plain.requires_grad


def kept_matrices(function, logits: torch.Tensor) -> int:
    """How many different (N, V) matrices the backward pass of ``function`` of fresh logits keeps."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == logits.numel():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function(logits.clone().requires_grad_())
    assert all(part.requires_grad for part in result)
    return len(kept)


def test_a_differentiable_entropy_keeps_nothing_more_than_the_log_probability_does():
    logits, ids = torch.randn(4, 9), torch.tensor([1, 2, 3, 4])
    assert kept_matrices(lambda z: (z.div(0.7).logsumexp(-1),), logits) == 1
    assert kept_matrices(lambda z: logprobs.of_tokens(z, ids, 0.7), logits) == 1
    assert kept_matrices(lambda z: (naive_entropy(z, 0.7),), logits) > 1


# Straight from hidden states


def states(N: int, V: int, H: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight of the head, ids and two weights a token."""
    source = torch.Generator().manual_seed(N)
    hidden, weight = torch.randn(N, H, generator=source), torch.randn(V, H, generator=source) / H**0.5 * 3
    return (
        hidden.to(dtype),
        weight.to(dtype),
        torch.randint(V - 3, (N,), generator=source),
        torch.randn(2, N, generator=source),
    )


def with_gradients(function, hidden, weight, ids, cotangent, entropy=True):
    """Log-probabilities, entropies, and the gradients of their weighted sum."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprob, entropy_N = function(hidden, weight, ids)
    total = (cotangent[0] * logprob).sum() + ((cotangent[1] * entropy_N).sum() if entropy else 0.0)
    total.backward()
    return logprob.detach(), entropy_N.detach(), hidden.grad, weight.grad


def whole(read: logprobs.TokenRead):
    """Through all logits at one time."""

    def function(hidden, weight, ids):
        logits = (hidden @ weight.T)[:, : read.size].index_fill(
            1, torch.tensor(read.gaps, dtype=torch.int64), -math.inf
        )
        return logprobs.of_tokens(logits, ids, read.temperature)

    return function


READS = [
    logprobs.TokenRead(1.0, 300),
    logprobs.TokenRead(0.7, 300),
    logprobs.TokenRead(0.7, 297, (290, 293)),  # ids that the tokenizer lacks
]


@pytest.mark.parametrize("read", READS, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 128, 129, 700, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_give_every_bit_of_the_whole_and_exact_gradients(num_tokens, read, dtype):
    hidden, weight, ids, cotangent = states(num_tokens, 300, 24, dtype)
    ids = ids.clamp(max=289)
    chunked = with_gradients(lambda *x: logprobs.of_hidden(*x, read), hidden, weight, ids, cotangent)
    plain = with_gradients(whole(read), hidden, weight, ids, cotangent)
    assert chunked[0].equal(plain[0])
    assert chunked[1].equal(plain[1])
    logits = with_gradients(whole(read), hidden.double(), weight.double(), ids, cotangent.double())
    for ours, exact in zip(chunked[2:], logits[2:], strict=True):
        error = float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-9))
        assert error < (2e-6 if dtype == torch.float32 else 2e-2)
        assert ours.dtype == dtype


def test_the_gradient_of_the_weight_is_summed_over_chunks_in_float32():
    # Chunks in bfloat16: summed in bfloat16 they would lose more than one product of all tokens does.
    hidden, weight, ids, cotangent = states(16 * 128, 300, 24, torch.bfloat16)
    read = logprobs.TokenRead(1.0, 300)
    chunked = with_gradients(lambda *x: logprobs.of_hidden(*x, read), hidden, weight, ids, cotangent)
    plain = with_gradients(whole(read), hidden, weight, ids, cotangent)
    exact = with_gradients(whole(read), hidden.double(), weight.double(), ids, cotangent.double())
    errors = [float((made[3].double() - exact[3]).norm()) for made in (chunked, plain)]
    assert errors[0] < 1.2 * errors[1]


def test_an_entropy_that_is_not_read_costs_nothing_and_changes_nothing():
    hidden, weight, ids, cotangent = states(600, 300, 24)
    with_entropy, without = logprobs.TokenRead(0.7, 300), logprobs.TokenRead(0.7, 300, entropy=False)
    full = with_gradients(lambda *x: logprobs.of_hidden(*x, with_entropy), hidden, weight, ids, cotangent, False)
    lean = with_gradients(lambda *x: logprobs.of_hidden(*x, without), hidden, weight, ids, cotangent, False)
    assert lean[1].eq(0).all()
    assert all(full[i].equal(lean[i]) for i in (0, 2, 3))


def test_gradients_of_frozen_parts_are_not_computed():
    hidden, weight, ids, _ = states(300, 300, 24)
    read = logprobs.TokenRead(1.0, 300)
    logprobs.of_hidden(hidden.requires_grad_(), weight, ids, read)[0].sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    frozen = hidden.detach()
    logprobs.of_hidden(frozen, weight.requires_grad_(), ids, read)[1].sum().backward()
    assert weight.grad is not None
    assert frozen.grad is None


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made within the context held at one time."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in self.live:
                    self.live[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize(("backward", "limit"), [(False, 1.0), (True, 3.0)])
def test_bytes_a_logit(backward: bool, limit: float):
    N, V, H = 2048, 4096, 16
    hidden, weight, ids, cotangent = states(N, V, H, torch.bfloat16)
    peaks = []
    for function in (lambda *x: logprobs.of_hidden(*x, logprobs.TokenRead(0.7, V)), whole(logprobs.TokenRead(0.7, V))):
        with LiveBytes() as count, torch.set_grad_enabled(backward):
            if backward:
                with_gradients(function, hidden, weight, ids, cotangent)
            else:
                function(hidden, weight, ids)
        peaks.append(count.peak / (N * V))
    assert peaks[0] < limit
    assert peaks[1] > 10  # what the count is worth: logits that are held whole


def test_to_padded_places_row_after_row():
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    padded = logprobs.to_padded(values, mask)
    assert padded.tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    (padded * torch.arange(9.0).view(3, 3)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 1, 6, 7, 8]  # the weights of the cells they went to


def test_sums_and_means_select():
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    values = torch.tensor([[1.0, 2.0, NAN], [-4.0, math.inf, NAN], [NAN, NAN, NAN]], requires_grad=True)
    assert logprobs.masked_sum(values, mask).tolist() == [3.0, -4.0, 0.0]
    mean = logprobs.masked_mean(values, mask)
    assert mean.tolist() == [1.5, -4.0, 0.0]  # 0 and not 0/0 for the sequence without tokens
    mean.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5, 0.5, 0], [1, 0, 0], [0, 0, 0]]


def test_ops_has_no_other_submodules():
    assert ops.logprobs is logprobs
    with pytest.raises(AttributeError, match="no attribute 'lobprobs'"):
        _ = ops.lobprobs
