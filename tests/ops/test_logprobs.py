"""Log-probabilities and entropies against softmax by hand, loops and automatic differentiation."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

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
